# SFT, then RL (48.2 at 7B): the second of two commands, on prompts that SFT did not see (the complement set).
#     python train.py config/method/sft.py --out_dir=out/sft
#     python train.py config/method/sft_then_rl.py --model=out/sft/ckpt_60
# The clip is on, as in the released train_sft_rl.sh.
data = data.replace(".parquet", ".complement.parquet")
n_teacher = 0
clip_low = 0.2
clip_high = 0.2
