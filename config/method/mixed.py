# Mixed-policy GRPO: LUFFY's group without its shaping, f(p) = p. Other shapes: --shaping=sqrt, pow, log or p_log, and
# --gamma=0.05 to 0.5 with --shaping=luffy (LUFFY's Fig. 9: 0.1 is best, all others within about 3 points below it).
# Its figure without shaping has the clip: mixed_clip.
n_teacher = 1
shaping = "none"
clip_low = 0.0
clip_high = 0.0
