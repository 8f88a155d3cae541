# CHORD-mu (arXiv 2508.11408): (1 - mu) GRPO + mu SFT, mu falling from 0.9 to 0.05 along a cosine of 200 steps. Own samples
# are a group of their own, and a trace is beside them. Numbers from the example in Trinity-RFT, its authors' code: std, clip
# 0.2, no entropy term. Different: there 64 traces of other questions are beside 32 prompts, and micro-batches weigh by rows
# where ours weigh by tokens; a question without a trace has nine samples here.
n_rollouts = 9
n_teacher = 1
baseline = "own"
use_std = True
loss_constant = 0.0
clip_low = 0.2
clip_high = 0.2
entropy_coef = 0.0
sft_coef = 0.9
sft_decay_steps = 200
sft_coef_end = 0.05
sft_mix = True
