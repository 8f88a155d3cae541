# LUFFY on one GPU of 24 GB or more: Qwen2.5-0.5B and a GSM8K-sized set in LUFFY's schema. Our own choice of numbers,
# no paper's; not run by us yet, so neither its time nor its accuracy is known.
#
#     python train.py config/luffy_1gpu.py
#
# 32 prompts x (7 own + 1 teacher) = 256 sequences a step, 2 updates of 128 each. 7473 prompts / 32 = 233 steps an epoch.

data = "data/gsm8k.parquet"  # 7,473 problems; a trace is a worked solution, then </think> and the boxed answer
model = "models/Qwen2.5-0.5B-think"  # prepare.py model --rope_theta=0 --max_position=0: prompt ends in "<think>\n"
out_dir = "out/luffy_1gpu"
eval_data = ""  # the released valid.parquet asks the questions of the test files: choosing a checkpoint by it leaks
holdout = 128  # so these questions of the training set are kept for it; 0 trains on all, as the paper does
eval_interval = 10
eval_greedy = False
eval_k = 1
eval_temperature = 0.6  # as the final evaluation

n_rollouts = 8
n_teacher = 1
verified_only = False
temperature = 1.0
max_tokens = 1024
max_prompt_tokens = 512
max_teacher_tokens = 1024  # EOS included

use_std = False
shaping = "luffy"
gamma = 0.1
clip_low = 0.0
clip_high = 0.0
loss_constant = 131072.0  # 128 sequences x 1024 tokens: Dr.GRPO's mean
entropy_coef = 0.0
sft_coef = 0.0

max_steps = 500
prompts_per_step = 32
update_batches = 2
learning_rate = 1e-6
warmup_steps = 0
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01
grad_clip = 1.0
seed = 47

require_think = True
reward_workers = 4
reward_timeout = 2.0
min_teacher_pass = 0.9
preflight_traces = 512

shard = "ddp"
recompute = True
save_interval = 25  # what a crash may cost; see docs/long_run.md
keep_last = 2
keep_every = 100
rollout_interval = 10
canary_limit = 0.1  # bfloat16
micro_tokens = 16384
gpu_memory = 0.35
