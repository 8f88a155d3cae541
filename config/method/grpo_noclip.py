# On-policy Dr.GRPO without PPO's clip: LUFFY's ablation "On-Policy + NoClip" (44.9 against 45.5 at 7B), and what
# LUFFY becomes without its trace.
n_teacher = 0
clip_low = 0.0
clip_high = 0.0
entropy_coef = min(entropy_coef, 0.003)  # an on-policy run of the release has fewer micro-batches: see config/grpo_7b.py
