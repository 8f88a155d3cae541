# ExGRPO (arXiv 2510.02245): for up to half of a batch's questions, one stored correct answer joins the group: the one
# that the policy is most certain of, with f(pi / pi_then) in place of the ratio. Replay starts once 35 % of a batch is
# correct. Numbers from its released run_exgrpo.sh, except replay_limit, which is unbounded there. Also different: no clip
# at any time (the released code clips until replay starts), and skipped updates in a row end the run (max_skipped). Its 700
# steps are config/exgrpo_7b.py's.
n_teacher = 0
shaping = "luffy"
gamma = 0.1
clip_low = 0.0
clip_high = 0.0
entropy_coef = min(entropy_coef, 0.003)  # as grpo_7b.py's, by its lengths
skip_grad_norm = 500.0  # skip_grad_bound, of the same sum / 65536
replay_share = 0.5
replay_start = 0.35
replay_limit = 8
