# The shaping world (toy/shaping.py), where f(p) decides; train.py's defaults are for the other toy.
#
#     python train.py config/toy/shaping.py                  LUFFY
#     python train.py config/toy/shaping.py --shaping=none   mixed-policy GRPO without shaping
#     python train.py config/toy/shaping.py --n_teacher=0    on-policy GRPO

data = "toy/shaping/train.parquet"  # 256 easy and 256 hard problems, alternating
eval_data = "toy/shaping/test.parquet"  # 100 and 100; eval_N.json reports them separately
model = "toy/shaping/base"
out_dir = "out/shaping"

max_tokens = 44  # a correct answer to a hard problem takes 30
max_teacher_tokens = 44
loss_constant = 5632.0  # 128 sequences x 44 tokens
learning_rate = 3e-4  # three times the other toy's
min_teacher_pass = 0.9  # the teacher is always correct here
eval_k = 0  # only the greedy answer, for a fast run
