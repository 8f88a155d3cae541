# The base of TGPO's runs (arXiv 2605.13230), as its train.sh and config/tasks.sh set them (commit 0a32d6f). Methods
# stack on it; alone it is LUFFY as TGPO ran it. Not run by us yet.
#
#     python prepare.py align --model=Qwen/Qwen3-30B-A3B-Thinking-2507 --policy=models/Qwen2.5-Math-7B-16k-think \
#         --out=models/Qwen3-30B-A3B-Thinking-2507-aligned
#     torchrun --nproc_per_node=8 train.py config/tgpo_7b.py config/method/tgpo.py \
#         --teacher_model=models/Qwen3-30B-A3B-Thinking-2507-aligned
#
# rkl, kdrl and tgpo_adv likewise, grpo_std without a teacher model; each algorithm of its tasks.sh is a line of
# docs/presets.md, which also says what aligning does. The same teacher, with its own files, wrote the traces:
# prepare.py reanswer. Its losses are token means per micro-batch, summed over K of them, so the coefficients are exact
# beside each other and only the clip of the gradient is not: 1.0 there is 1 / K here, and K is 4 to 11 (64 sequences in
# micro-batches of 16,384 tokens).

include("config/luffy_7b.py")

data = "data/openr1.a3b.parquet"  # made by prepare.py reanswer, which keeps one verified answer: some 35k of the 46k
out_dir = "out/tgpo_7b"
loss_constant = 0.0
entropy_coef = 0.001
grad_clip = 0.15  # 1.0 / 7
max_steps = 300
