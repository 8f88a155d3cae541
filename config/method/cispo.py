# CISPO (MiniMax-M1, arXiv 2506.13585) on GRPO: the clipped ratio is a detached weight on log p, so tokens beyond the clip
# still learn. No lower clip, as there; the upper one is not published, so that the weight is at most 5 is our choice.
# It differs from GRPO only where the policy has moved: --update_batches=2 or more. GSPO's ratio of whole sequences is absent.
n_teacher = 0
use_std = True
loss_constant = 0.0
clip_low = 0.0
clip_high = 4.0
cispo = True
entropy_coef = 0.0
