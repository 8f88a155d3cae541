# LUFFY: one teacher trace in the group, shaped by f(p) = p / (p + 0.1), no clip. The toy's defaults say the same.
n_teacher = 1
shaping = "luffy"
gamma = 0.1
clip_low = 0.0
clip_high = 0.0
