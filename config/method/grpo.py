# On-policy Dr.GRPO, LUFFY's baseline: no teacher row, and PPO's clip, which LUFFY drops (train_on_policy.sh).
n_teacher = 0
clip_low = 0.2
clip_high = 0.2
entropy_coef = min(entropy_coef, 0.003)  # an on-policy run of the release has fewer micro-batches: see config/grpo_7b.py
