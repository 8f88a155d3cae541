# ReLIFT on Qwen2.5-Math-7B, arXiv 2506.07527, as its released examples/math-7b/train.sh runs it (June 2025: commit
# eb95454; other versions of it have a buffer of 64 and PPO's clip). Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/relift_7b.py
#
# 3 epochs of 357 steps = 1071, of which the release's counter leaves one out. Its paper's average over AIME24, AIME25,
# AMC, MATH-500, Olympiad and MMLU-Pro: 52.6 (28.3 22.9 65.1 87.9 57.3 53.9), its RL baseline 46.9. The release kept the
# checkpoint that was best on test questions; ours is chosen by the held-out ones. On purpose different:
# sft_entropy_coef is the paper's best, the script has 0.001; the SFT loss is one token mean, the script's a mean over
# micro-batches of four. The entropy's coefficient stays luffy_7b.py's: answers grow from 700 to 3,500 tokens, so that K
# is 2 to 8 by our estimate. The 1.5B run: --model=models/Qwen2.5-Math-1.5B-16k-think, nothing else (its script differs
# in an SFT micro-batch of two). Its RL baseline, train_rl.sh: config/grpo_7b.py --max_steps=1070.

include("config/luffy_7b.py")
include("config/method/relift.py")

out_dir = "out/relift_7b"
max_steps = 1070
sft_grad_clip = 8.0  # the release's default of 1.0: there the gradient is divided by 32, of which each of 8 ranks has only 4
