# CHORD-mu (arXiv 2508.11408): (1 - mu) GRPO + mu SFT, mu falling from 0.9 to 0.05 along a cosine of 200 steps. Own samples
# are a group of their own, and a trace is beside them. Numbers from the example in Trinity-RFT, its authors' code: the comments
# of that file give those of CHORD-mu and CHORD-phi; the values it sets are of neither. Std, clip 0.2, no entropy term; it takes
# one update of 32 prompts a step. Different: there 64 traces of other questions are beside these prompts, each micro-batch
# weighs by its rows, here by its tokens, and a sample without think tags loses 0.1, where ours gets 0. Here a question without
# a trace has nine samples.
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
