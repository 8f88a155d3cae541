# TGPO (arXiv 2605.13230): GRPO + w x cross-entropy to the teacher model's first choice along the policy's own samples,
# w falling linearly from 0.002 to zero over 200 steps (its config/tasks.sh: by 1e-5 a step). Needs
# --teacher_model=FOLDER. Std, token mean, clip and entropy as in its released scripts for tipo_reg, whose 300 steps and
# data are config/tgpo_7b.py's.
n_teacher = 0
use_std = True
loss_constant = 0.0
clip_low = 0.2
clip_high = 0.2
entropy_coef = min(entropy_coef, 0.001)
ce_coef = 0.002
ce_steps = 200
