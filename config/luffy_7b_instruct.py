# LUFFY on Qwen2.5-7B-Instruct with luffy_7b.py's numbers. No script of this run is released. Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/luffy_7b_instruct.py
#
# The model's config.json stays as it is, because its context is long enough. Its chat template is edited to end in
# "<think>\n"; how the authors edited it is not known. Their figures:
#     AIME24 AIME25  AMC  MATH-500 Minerva Olympiad average
#      17.7   14.8  50.9    82.0    31.3    47.4     40.7     on-policy 35.2, SFT 29.0 (hurt: config/sft_7b.py)

include("config/luffy_7b.py")

model = "models/Qwen2.5-7B-Instruct-think"  # made by prepare.py model --rope_theta=0 --max_position=0
out_dir = "out/luffy_7b_instruct"
