# Mixed-policy GRPO with PPO's clip on own tokens: LUFFY's first ablation row (44.4 at 7B; with shaping 47.8; with
# shaping and without the clip, which is LUFFY, 50.1).
n_teacher = 1
shaping = "none"
clip_low = 0.2
clip_high = 0.2
