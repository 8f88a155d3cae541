# RL with SFT loss, the paper's baseline (40.1 at 7B): GRPO on the own samples, with the mean of their rewards alone, and
# an SFT loss on the trace beside it. The released coefficient of 1.0 is per micro-batch, so it acts as 4 to 7; ours is 1.0 of
# one mean over all teacher tokens. No clip (train_rl_sft_loss.sh).
n_teacher = 1
baseline = "own"
sft_coef = 1.0
clip_low = 0.0
clip_high = 0.0
