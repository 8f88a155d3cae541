# On-policy GRPO, the paper's baseline: no teacher row, and PPO's clip, which LUFFY drops (train_on_policy.sh).
n_teacher = 0
clip_low = 0.2
clip_high = 0.2
