# On-policy Dr.GRPO without PPO's clip: the paper's ablation "On-Policy + NoClip" (44.9 against 45.5 at 7B), and what
# LUFFY becomes without its trace.
n_teacher = 0
clip_low = 0.0
clip_high = 0.0
