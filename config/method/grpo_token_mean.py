# On-policy Dr.GRPO with the token mean instead of a constant: the longer answers of a batch count more.
n_teacher = 0
loss_constant = 0.0
clip_low = 0.2
clip_high = 0.2
