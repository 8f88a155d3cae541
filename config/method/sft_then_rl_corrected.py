# SFT, then RL, as arXiv 2604.23747 ran it (57.0 at 7B, three seeds): the second of two commands, on the very prompts of SFT.
#     torchrun --nproc_per_node=8 train.py config/sft_7b.py
#     torchrun --nproc_per_node=8 train.py config/grpo_7b.py config/method/sft_then_rl_corrected.py --model=out/sft_7b/ckpt_2142
# Its short variant (55.6): --max_steps=50 --learning_rate=5e-6. No std, no entropy bonus, a token mean, a higher clip;
# 128 x 8, 2 updates, 1e-6 and 500 steps, the base's, are its, too.
n_teacher = 0
use_std = False
loss_constant = 0.0
clip_low = 0.2
clip_high = 0.28
entropy_coef = 0.0
