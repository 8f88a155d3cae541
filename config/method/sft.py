# Supervised fine-tuning on the same prompts and traces: the teacher row alone, token-mean NLL.
n_rollouts = 1
n_teacher = 1
sft_coef = 1.0
