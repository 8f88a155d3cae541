# Ours: supervised fine-tuning on the same prompts and traces: the teacher row alone, token-mean NLL. Batch, learning
# rate and schedule stay the base's; config/sft_7b.py has the paper's.
n_rollouts = 1
n_teacher = 1
sft_coef = 1.0
entropy_coef = 0.0
