# On-policy Dr.GRPO on Qwen2.5-Math-7B, LUFFY's baseline, as its released train_on_policy.sh runs it. Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/grpo_7b.py
#
# It differs from luffy_7b.py in two ways, as in the paper: no trace in the group, and PPO's clip, which LUFFY drops. The
# third is arithmetic: without traces the responses are shorter (600 to 2,200 tokens, an estimate), so K in luffy_7b.py's
# comment is 2 to 5, and the script's 0.001 acts as 0.003.
# 128 prompts x 8 own samples = 1024 sequences a step, 2 updates of 512 each.
# The paper's six-benchmark average: 45.5; its ablation without the clip: 44.9.

include("config/luffy_7b.py")

out_dir = "out/grpo_7b"
n_teacher = 0
clip_low = 0.2
clip_high = 0.2
entropy_coef = 0.003
