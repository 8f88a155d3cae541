# TGPO's tipo_adv (arXiv 2605.13230), made to act: where TGPO's loss has a cross-entropy, an own token's advantage gets
# w (1[token = y*] - pi(y*)), y* being the teacher model's first choice, w falling linearly from 0.02 to zero over 200 steps
# (its config/tasks.sh: by 1e-4 a step). As released it adds w pi_old(y*) whatever the token is, whose expected gradient is zero
# but for the clip: 0.02 was not tuned for this term. A y* that is not a token of the policy adds nothing. All else is
# tgpo.py's. Needs --teacher_model=FOLDER.
include("config/method/tgpo.py")
ce_coef = 0.0
top1_bonus = 0.02
