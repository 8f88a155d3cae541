# ExGRPO on Qwen2.5-Math-7B, arXiv 2510.02245, as its released run_exgrpo.sh runs it. Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/exgrpo_7b.py
#
# Its paper's average over AIME24, AIME25, AMC, MATH-500, Minerva and Olympiad:
#     48.3 (31.6 18.7 66.3 87.4 36.0 50.1), its on-policy baseline 45.3.
# Its other runs, of which the release has no script; by the paper they are 500 steps, with the model as the difference (in
# Llama's line the last two knobs are our guess):
#     --max_steps=500 --model=models/Qwen2.5-Math-1.5B-16k-think               35.3, on-policy 30.0
#     --max_steps=500 --model=models/Qwen2.5-7B-Instruct-think                 39.3, on-policy 35.2
#     --max_steps=500 --model=models/Llama-3.1-8B-simple --require_think=False --replay_start=0.0     6.1, on-policy 3.4
#     --model=Elliott/LUFFY-Qwen-Math-7B-Zero      "continual", its steps are not known: 51.4, on-policy 48.7
# Llama-3.1-8B-Instruct (23.0, on-policy 19.9) is no line here: its prompt is not known.

include("config/luffy_7b.py")
include("config/method/exgrpo.py")

out_dir = "out/exgrpo_7b"
max_steps = 700  # total_training_steps=701: its counter starts at 1, so the last one is not taken
