# SFT on LUFFY's traces, the paper's baseline, from Qwen2.5-Math-7B: 3 epochs, batch 64, learning rate 5e-5, warm-up 0.1,
# cosine (LUFFY's README). Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/sft_7b.py
#
# 64 traces a step; 45.7k prompts / 64 = 714 steps an epoch, 3 epochs = 2142 steps, of which 214 warm up. Nothing is
# sampled but the held-out answers. The paper's six-benchmark average: 44.1 (22.2 22.3 52.8 82.6 40.8 43.7). Not known:
# its betas and weight decay, which OpenRLHF chose; ours are LUFFY's.

data = "data/openr1.parquet"  # Elliott/Openr1-Math-46k-8192, LUFFY's training set
model = "models/Qwen2.5-Math-7B-16k-think"  # by prepare.py model: prompt ends in "<think>\n"
out_dir = "out/sft_7b"
eval_data = ""  # the released valid.parquet asks the questions of the test files: choosing a checkpoint by it leaks
holdout = 256  # so these questions of the training set are kept for it; 0 trains on all, as the paper does
eval_interval = 714
eval_greedy = False
eval_k = 1
eval_temperature = 0.6  # as the final evaluation

n_rollouts = 1
n_teacher = 1
verified_only = False  # the set is verified already; a trace that fails here is learnt all the same
temperature = 1.0
max_tokens = 8192
max_prompt_tokens = 1024
max_teacher_tokens = 8192  # EOS included; the original cuts longer traces, we drop them

use_std = False
shaping = "luffy"  # of no effect: the traces are learnt by likelihood
gamma = 0.1
clip_low = 0.0
clip_high = 0.0
loss_constant = 0.0  # of no effect
entropy_coef = 0.0
sft_coef = 1.0

max_steps = 2142
prompts_per_step = 64
update_batches = 1
learning_rate = 5e-5
lr_schedule = "cosine"
warmup_steps = 214
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01
grad_clip = 1.0
seed = 0

require_think = True
reward_workers = 8
reward_timeout = 2.0
min_teacher_pass = 0.9
preflight_traces = 512

shard = "fsdp"
recompute = True
save_interval = 102  # seven times an epoch
keep_last = 2
keep_every = 714
rollout_interval = 0
canary_limit = 0.1  # bfloat16
micro_tokens = 32768
gpu_memory = 0.5
