# GRPO as first published (arXiv 2402.03300), without its KL term: advantages divided by the group's std, losses by the
# number of tokens over the whole batch (the paper's own mean is over each sequence first), PPO's clip. On
# config/tgpo_7b.py it is "grpo" of TGPO's exp_scripts.
n_teacher = 0
use_std = True
loss_constant = 0.0
clip_low = 0.2
clip_high = 0.2
entropy_coef = min(entropy_coef, 0.001)  # of a token mean, as the policy term is: the number of micro-batches drops out
