# ReLIFT (arXiv 2506.07527): on-policy Dr.GRPO; questions that a whole group failed wait in a buffer, and as soon as it
# holds a batch of them, one SFT step on their traces follows the RL step. Numbers from its released train.sh (commit
# eb95454): buffer 128 beside 128 prompts a step, both learning rates equal, grad_clip 0.7, no clip; entropy 1e-4 as its
# paper finds best (the script has 1e-3). Its 1070 steps, and the clip of its SFT step in our units, are
# config/relift_7b.py's.
n_teacher = 0
clip_low = 0.0
clip_high = 0.0
grad_clip = 0.7
sft_buffer = prompts_per_step
sft_learning_rate = learning_rate
sft_grad_clip = 1.0
sft_entropy_coef = 1e-4
