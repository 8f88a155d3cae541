# SFT, then RL for 500 steps, as LUFFY's train_sft_rl.sh (48.2 at 7B): the second of two commands, on prompts that SFT
# did not see (the complement set, which prepare.py openr1 also writes). The clip is on.
#     torchrun --nproc_per_node=8 train.py config/sft_7b.py config/method/sft_released.py --out_dir=out/sft_released
#     torchrun --nproc_per_node=8 train.py config/grpo_7b.py config/method/sft_then_rl.py --model=out/sft_released/ckpt_2142
# On the toy: config/method/sft.py --out_dir=out/sft, then config/method/sft_then_rl.py --model=out/sft/ckpt_60.
# Its 48.2 should not be reproduced, because the SFT that it starts from was hurt (config/sft_7b.py), and what it would be
# is not known. sft_then_rl_corrected.py has 57.0.
data = data.replace(".parquet", ".complement.parquet")
n_teacher = 0
clip_low = 0.2
clip_high = 0.2
entropy_coef = 0.008 if entropy_coef > 0.001 else entropy_coef  # answers are long: 8 to 10 micro-batches (our estimate)
