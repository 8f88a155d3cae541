# CHORD-phi (arXiv 2508.11408): CHORD with a constant mu of 0.1 (the example's comments), and each trace's token weighted by
# phi = p (1 - p), detached: neither what the policy knows nor what it would never write. p - p^2 / 2 has the same gradient.
include("config/method/chord_mu.py")
sft_coef = 0.1
sft_decay_steps = 0
sft_coef_end = 0.0
sft_shaping = "phi"
