# DAPO's switches (arXiv 2503.14476) on GRPO: clip-higher, token-level mean, no groups of equal reward, no samples that
# were cut off. Left out by us: the refill after dropping groups, so batches shrink, and the soft over-long penalty.
n_teacher = 0
use_std = True
loss_constant = 0.0
clip_low = 0.2
clip_high = 0.28
entropy_coef = 0.0
skip_equal_groups = True
skip_truncated = True  # no cost for never ending: watch own/truncated
