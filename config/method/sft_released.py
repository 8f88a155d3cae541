# SFT as LUFFY's release trained it: a mean over the batch's traces of each one's token mean, and the betas and weight decay
# that OpenRLHF chose. It stacks on config/sft_7b.py, which has the rest of it:
#     torchrun --nproc_per_node=8 train.py config/sft_7b.py config/method/sft_released.py --out_dir=out/sft_released
# Do not expect its 44.1. DeepSpeed (from 0.15.2, fixed in 0.19, ZeRO-1/2 with an offloaded optimizer) kept the gradients of
# the first and the last of 8 micro-batches and lost the others. In arXiv 2604.23747, over AIME24, AIME25, AMC, MATH-500,
# Olympiad and MMLU-Pro, this loss without that fault has 53.4, sft_7b.py's has 54.0, and this loss with the fault 48.3.
# --prompts_per_step=16 --grad_clip=4.0 imitates the fault: a step learns 16 of 64 traces. Their mean is four
# times the faulty gradient, so the clip is, too.
n_rollouts = 1
n_teacher = 1
sft_coef = 1.0
sft_per_sequence = True
entropy_coef = 0.0
beta2 = 0.95
weight_decay = 0.0
