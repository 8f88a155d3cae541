# Our ablation: on-policy Dr.GRPO with the token mean instead of a constant: the longer answers of a batch count more.
n_teacher = 0
loss_constant = 0.0
clip_low = 0.2
clip_high = 0.2
entropy_coef = min(entropy_coef, 0.001)  # of a token mean, as the policy term is: the number of micro-batches drops out
