# AMPO (arXiv 2510.02227): LUFFY with a gate. Where none of eight samples is right, two traces replace two of them. Numbers from
# its train_ampo.sh; its loss has about a fifth of our scale, so its clip of the norm is --grad_clip=5.0. Its traces are of four
# teachers: put several in `target`. Different: it takes the two traces behind which the policy finds the answer most probable,
# ours are the first two; it counts each of its traces as right, ours are graded. Its samples' reward is 0.9 for the answer, 0.1
# for one pair of <answer> tags, and -1 where ten words occur ten times; all of it enters A, ours is 0 or 1. No second bound on
# the ratio (10, where A < 0).
n_teacher = 2
teacher_gate = 0
shaping = "luffy"
gamma = 0.1
clip_low = 0.2
clip_high = 0.2
weight_decay = 0.1
