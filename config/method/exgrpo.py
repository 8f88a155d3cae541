# ExGRPO (arXiv 2510.02245): up to half of a batch's questions put one of their stored right answers into the group, the
# one the policy is surest of, with f(pi / pi_then) in place of the ratio. It starts once 35 % of a batch is right.
# Numbers from its released run_exgrpo.sh, but for replay_limit, which is unbounded there; no clip at any time (the
# released code has it on until the start), no skip_grad_bound.
n_teacher = 0
shaping = "luffy"
gamma = 0.1
clip_low = 0.0
clip_high = 0.0
replay_share = 0.5
replay_start = 0.35
replay_limit = 8
