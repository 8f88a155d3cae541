# SFT on LUFFY's traces from Qwen2.5-Math-7B, as arXiv 2604.23747 corrected it: 3 epochs, batch 64, learning rate 5e-5,
# warm-up 0.1, cosine to a tenth, one mean over the batch's tokens. Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/sft_7b.py
#
# Its six-benchmark average there: 52.2 (33.6 28.2 65.4 90.0 40.6 55.7), on three seeds. LUFFY's own 44.1 (22.2 22.3 52.8
# 82.6 40.8 43.7) should not be reproduced: DeepSpeed lost most of each batch's gradient. method/sft_released.py has its
# numbers without that fault, README ("What to believe") the two tables.
#
# 64 traces a step; 45.7k prompts / 64 = 714 steps an epoch. 3 epochs = 2142 steps, the first 215 of them warm-up. The
# epochs are exact with --holdout=0; the 256 questions held out make them 710 steps. Only their answers are sampled.

include("config/luffy_7b.py")  # betas 0.9 and 0.999, weight decay 0.01, as in that paper; gradient norm 1

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
lr_floor = 0.1
warmup_steps = 215

# From here on our own choice.
seed = 0
save_interval = 102  # seven times an epoch
keep_every = 714
rollout_interval = 0
