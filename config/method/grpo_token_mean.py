# On-policy Dr.GRPO with the token mean instead of a constant: long answers of a batch count for more.
n_teacher = 0
loss_constant = 0.0
clip_low = 0.2
clip_high = 0.2
