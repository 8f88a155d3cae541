# SFT for a minute before all methods of `make demo-real`: the base learns each event, and to stop after one.
include("config/toy/real.py")
include("config/method/sft.py")
data = "out/real/warm_up.parquet"
model = "out/real/base"
prompts_per_step = 16
max_steps = 30
learning_rate = 5e-5
lr_schedule = "cosine"  # what all methods start from should not hang on the last batch
eval_data = ""  # each method evaluates the result at its step 0
min_teacher_pass = 0.3  # most traces stop early, on purpose: see toy/real.py
