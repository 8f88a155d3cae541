# RL with SFT loss, LUFFY's baseline (40.1 at 7B): GRPO on the own samples, with the mean of their rewards alone, and an
# SFT loss on the trace beside it. No clip (train_rl_sft_loss.sh). The script adds 1.0 x the mean NLL for each
# micro-batch with a trace, and 0.001 x the entropy for each of all K. K grows by our estimate from 3 to 11: its middle
# is 6, of which 4.5 have a trace. So both coefficients are raised, or, where the base has not raised the entropy's (the
# toy, and any with --entropy_coef of at most 0.001 before this file), neither.
n_teacher = 1
baseline = "own"
_raised = entropy_coef > 0.001
sft_coef = 4.5 if _raised else 1.0
entropy_coef = 0.006 if _raised else entropy_coef
clip_low = 0.0
clip_high = 0.0
