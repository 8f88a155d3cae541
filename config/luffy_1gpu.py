# LUFFY on one GPU of 24 GiB or more: Qwen2.5-0.5B and a GSM8K-sized set in LUFFY's schema. These numbers are our own
# choice, not a paper's. Not run by us yet, so neither its time nor its accuracy is known.
#
#     python train.py config/luffy_1gpu.py
#
# 32 prompts x (7 own samples + 1 trace) = 256 sequences a step, 2 updates of 128 each. (7473 - 128) / 32 = 229 steps an
# epoch.
# What is not below is as in luffy_7b.py.

include("config/luffy_7b.py")

data = "data/gsm8k.parquet"  # 7,473 problems; a trace is a worked solution, then </think> and the boxed answer
model = "models/Qwen2.5-0.5B-think"  # made by prepare.py model --rope_theta=0 --max_position=0
out_dir = "out/luffy_1gpu"
holdout = 128

max_tokens = 1024
max_prompt_tokens = 512
max_teacher_tokens = 1024  # EOS included
loss_constant = 131072.0  # 128 sequences x 1024 tokens: Dr.GRPO's mean
entropy_coef = 0.0
prompts_per_step = 32

reward_workers = 4
shard = "ddp"
save_interval = 25  # steps that a crash may cost
micro_tokens = 16384
gpu_memory = 0.35
