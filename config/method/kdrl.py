# KDRL (arXiv 2506.02208): GRPO + beta x reverse KL to a teacher model, estimated as (log p - log p_T)^2 / 2. Needs
# --teacher_model=FOLDER. beta = 2e-3 is its constant one; it also has a falling one, and one
# for wrong samples alone. There both terms are token means, so loss_constant is 0 here.
# Advantages are divided by the std, and PPO's clip is on, as in the GRPO that it builds on and in TGPO's exp_scripts (its
# tasks.sh: --use_std=False). The entropy's coefficient is TGPO's.
n_teacher = 0
use_std = True
loss_constant = 0.0
clip_low = 0.2
clip_high = 0.2
entropy_coef = min(entropy_coef, 0.001)
kl_coef = 0.002
