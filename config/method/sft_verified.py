# SFT on those traces alone that the verifier accepts.
n_rollouts = 1
n_teacher = 1
sft_coef = 1.0
entropy_coef = 0.0
verified_only = True
