# AMPO (arXiv 2510.02227): LUFFY with a gate. Where none of eight samples is right, two traces replace two of them. Numbers from
# its released train_ampo.sh. Its traces are four teachers': put several into `target`. Different: of more than two traces it
# takes those behind which the policy finds the answer most probable, ours are the first; it counts each of its traces as right,
# ours are graded; its second bound on the ratio (10, where A < 0) is absent.
n_teacher = 2
teacher_gate = 0
shaping = "luffy"
gamma = 0.1
clip_low = 0.2
clip_high = 0.2
weight_decay = 0.1
