# LUFFY on Llama-3.1-8B with luffy_7b.py's numbers, on the problems with short traces and without think tags, as we read the
# paper. No script of this run is released. Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/luffy_llama8b.py
#
# The paper's prompt: "User: {QUESTION}\nAnswer: Let's think step by step." (the model's chat template must say so). The
# Easy subset has 7.3k prompts, whose correct trace has up to 2k tokens: 7300 / 128 = 57 steps an epoch, 55 with the
# held-out set. The paper's averages: LUFFY 13.2, on-policy 9.6, SFT 5.9 (hurt: config/sft_7b.py; corrected, then RL,
# 43.7 over AIME24, AMC, MATH-500, Minerva and Olympiad by arXiv 2604.23747, with Qwen's template). On-policy RL fails
# on its Hard subset and on the whole set.
#
# Not known: the traces' tags in RL, so no tags is our guess (the released loader would leave both tags in, because this
# prompt does not end in "<think>"); whether the reward asked for a closed thought; whether lengths were limited in
# another way. Of SFT the authors say (issue 29) that its file is made as Qwen's, so that "</think>" stays and the
# opening tag goes: prepare.py openr1 --tags=open --out=data/openr1.open.parquet, and
#     torchrun --nproc_per_node=8 train.py config/sft_7b.py --model=models/Llama-3.1-8B-simple --require_think=False \
#         --out_dir=out/sft_llama8b --data=data/openr1.open.parquet

include("config/luffy_7b.py")

data = "data/openr1.easy.parquet"  # made by prepare.py openr1 --tags=drop
model = "models/Llama-3.1-8B-simple"  # made by prepare.py model --template=llama --rope_theta=0 --max_position=0
out_dir = "out/luffy_llama8b"
require_think = False
