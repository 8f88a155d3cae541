# LUFFY on one GPU of 24 GiB or more: Qwen2.5-0.5B and GSM8K, whose worked solutions are the traces. These numbers are our
# own choice, not a paper's. Not run by us yet, so neither its time nor its accuracy is known. docs/one_gpu.md says more.
#
#     pip install -r requirements-gpu.txt
#     python prepare.py model --model=Qwen/Qwen2.5-0.5B --out=models/Qwen2.5-0.5B-think --rope_theta=0 --max_position=0
#     python prepare.py gsm8k
#     python train.py config/luffy_1gpu.py --dry_run=True
#     python train.py config/luffy_1gpu.py
#     python eval.py --model=out/luffy_1gpu/latest --data=data/gsm8k.test.parquet --temperature=0 \
#         --max_tokens=1024 --out_dir=out/eval_1gpu
#
# Beside it GRPO, and SFT for three epochs of 114 steps, then RL from it:
#
#     python train.py config/luffy_1gpu.py config/method/grpo.py --out_dir=out/grpo_1gpu
#     python train.py config/luffy_1gpu.py config/method/sft.py --out_dir=out/sft_1gpu --prompts_per_step=64 \
#         --update_batches=1 --learning_rate=1e-5 --lr_schedule=cosine --lr_floor=0.1 --warmup_steps=34 --max_steps=342
#     python train.py config/luffy_1gpu.py config/method/sft_then_rl_corrected.py --model=out/sft_1gpu/latest \
#         --out_dir=out/sft_then_rl_1gpu
#
# 32 prompts x (7 own samples + 1 trace) = 256 sequences a step, 2 updates of 128 each. (7473 - 128) / 32 = 229 steps an
# epoch.
# What is not below is as in luffy_7b.py.

include("config/luffy_7b.py")

data = "data/gsm8k.parquet"  # 7,473 problems; a trace is a worked solution, then </think> and the boxed answer
model = "models/Qwen2.5-0.5B-think"
out_dir = "out/luffy_1gpu"
holdout = 128  # the test questions are for the end, not to choose a checkpoint by

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
plan_gpus = 1
plan_gib = 24.0
