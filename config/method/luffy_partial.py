# Our ablation, LUFFY on partial traces: the policy continues where the trace is cut, and its part is trained like an
# own sample. The share falls linearly to zero, so the last steps are on-policy (the released prefix_strategy has this
# and others; its scripts use whole traces). A fixed share: --teacher_share=0.5 --teacher_share_end=0.5.
n_teacher = 1
shaping = "luffy"
gamma = 0.1
clip_low = 0.0
clip_high = 0.0
teacher_share = 1.0
teacher_share_end = 0.0
