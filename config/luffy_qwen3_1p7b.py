# LUFFY on Qwen3-1.7B-Base with luffy_7b.py's numbers. No paper has this run: the choice is ours. Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/luffy_qwen3_1p7b.py
#
# For 0.6B, 4B and 8B only the model differs. "<think>" and "</think>" are one token each here, in prompts and in traces.

include("config/luffy_7b.py")

model = "models/Qwen3-1.7B-Base-think"  # made by prepare.py model --rope_theta=0 --max_position=0
out_dir = "out/luffy_qwen3_1p7b"
