# LUFFY on Llama-3.1-8B with luffy_7b.py's numbers, on the problems with short traces and without think tags, as the
# paper trains it. Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/luffy_llama8b.py
#
# The paper's prompt: "User: {QUESTION}\nAnswer: Let's think step by step." (the model's chat template must say so).
# The Easy subset has 7.3k prompts, whose correct trace has up to 2k tokens: 7300 / 128 = 57 steps an epoch.
# The paper's averages: LUFFY 13.2, on-policy 9.6, SFT 5.9. On-policy RL fails on its Hard subset and on the whole set.
# Not known: the exact form of the traces, and whether lengths were limited in another way.

include("config/luffy_7b.py")

data = "data/openr1.easy.parquet"  # made by prepare.py openr1 --tags=drop: these traces must have no think tags
model = "models/Llama-3.1-8B-simple"  # made by prepare.py model --template=llama --rope_theta=0 --max_position=0
out_dir = "out/luffy_llama8b"
require_think = False
