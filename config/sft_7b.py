# SFT on LUFFY's traces from Qwen2.5-Math-7B, the paper's baseline: 3 epochs, batch 64, learning rate 5e-5, warm-up 0.1,
# cosine (LUFFY's README). Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/sft_7b.py
#
# 64 traces a step; 45.7k prompts / 64 = 714 steps an epoch. 3 epochs = 2142 steps, the first 214 of them warm-up.
# Only the held-out answers are sampled. The paper's six-benchmark average: 44.1 (22.2 22.3 52.8 82.6 40.8 43.7).
# Not known: its betas and its weight decay, which OpenRLHF chose; ours are LUFFY's.

include("config/luffy_7b.py")

out_dir = "out/sft_7b"
eval_interval = 714

n_rollouts = 1  # the trace alone; a trace that fails the verifier is learnt too
loss_constant = 0.0  # no effect, like shaping and gamma: traces are learnt by likelihood
entropy_coef = 0.0
sft_coef = 1.0

max_steps = 2142
prompts_per_step = 64
update_batches = 1
learning_rate = 5e-5
lr_schedule = "cosine"
warmup_steps = 214
seed = 0

save_interval = 102  # seven times an epoch
keep_every = 714
rollout_interval = 0
