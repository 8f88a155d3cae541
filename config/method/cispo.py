# CISPO (MiniMax-M1, arXiv 2506.13585): the clipped ratio is a detached weight on log p: tokens beyond the clip still learn. No
# lower bound, as there. The upper one is not published: 5 is ScaleRL's (arXiv 2510.13786) and TRL's; verl's example has 1.2.
# Left out: DAPO's dynamic sampling (--skip_equal_groups=True is it without the refill) and its length penalty. One token mean
# over the batch, as in TRL; the paper's is over each question's samples. It differs from grpo_std.py with --entropy_coef=0
# only where the policy has moved: --update_batches=2 or more, 16 in the paper. GSPO's ratio of whole sequences is absent.
n_teacher = 0
use_std = True
loss_constant = 0.0
clip_low = 0.0
clip_high = 4.0  # a weight of at most 5
cispo = True
entropy_coef = 0.0
