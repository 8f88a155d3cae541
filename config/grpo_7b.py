# On-policy Dr.GRPO on Qwen2.5-Math-7B, LUFFY's baseline, as its released train_on_policy.sh. Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/grpo_7b.py
#
# 128 prompts x 8 own = 1024 sequences a step, 2 updates of 512 each. It differs from luffy_7b.py in two ways, as in
# the paper: no trace in the group, and PPO's clip, which LUFFY drops. The paper's six-benchmark average: 45.5; its
# ablation without the clip: 44.9.

data = "data/openr1.parquet"  # Elliott/Openr1-Math-46k-8192, LUFFY's training set
model = "models/Qwen2.5-Math-7B-16k-think"  # by prepare.py model: prompt ends in "<think>\n"
out_dir = "out/grpo_7b"
eval_data = ""  # the released valid.parquet asks the questions of the test files: choosing a checkpoint by it leaks
holdout = 256  # so these questions of the training set are kept for it; 0 trains on all, as the paper does
eval_interval = 10
eval_greedy = False
eval_k = 1
eval_temperature = 0.6  # as the final evaluation

n_rollouts = 8
n_teacher = 0
verified_only = False  # the set is verified already; a trace that fails here gets advantage <= 0
temperature = 1.0
max_tokens = 8192
max_prompt_tokens = 1024
max_teacher_tokens = 8192  # EOS included; the original cuts longer traces, we drop them

use_std = False  # the paper's equation divides by the std, its text and the script do not
shaping = "luffy"  # of no effect without teacher tokens
gamma = 0.1
clip_low = 0.2
clip_high = 0.2
# The script divides a rank's token sum by 8192 and FSDP averages over 8 ranks: one step is sum / 65536.
# That holds here for any number of GPUs.
loss_constant = 65536.0
# The script's 0.001 is added per micro-batch, some 4 to 7 of them (32,768 tokens each), so it acts as 0.004 to
# 0.007 times the token mean; the paper's text says 0.01.
entropy_coef = 0.005
sft_coef = 0.0

max_steps = 500
prompts_per_step = 128
update_batches = 2  # ppo_mini_batch_size 64
learning_rate = 1e-6
warmup_steps = 0
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01
grad_clip = 1.0
seed = 47

require_think = True
reward_workers = 8
reward_timeout = 2.0
min_teacher_pass = 0.9
preflight_traces = 512

shard = "fsdp"
recompute = True
save_interval = 10  # what a crash may cost; see docs/long_run.md
keep_last = 2
keep_every = 100
rollout_interval = 10
canary_limit = 0.1  # bfloat16
micro_tokens = 32768
gpu_memory = 0.5
