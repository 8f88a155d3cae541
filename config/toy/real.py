# A real language model on three-event word problems, on a CPU: the one setting of all methods in `make demo-real`, which makes
# the files that it names (toy/real.py).
#
#     python train.py config/toy/real.py config/method/luffy.py --out_dir=out/real/mine

data = "out/real/train.parquet"  # 512 problems; 30 % of the traces stop one event early
eval_data = "out/real/test.parquet"  # 128
model = "out/real/warm_up/latest"
grader = "toy/last_number.py"
require_think = False

prompts_per_step = 8
n_rollouts = 4
max_tokens = 40  # a right trace takes about 30
max_teacher_tokens = 44
loss_constant = 1280.0  # 32 sequences x 40 tokens
max_steps = 24
warmup_steps = 2
learning_rate = 1e-5
eval_interval = 12
eval_k = 1
sampler = "torch"  # vLLM starts longer than it saves here
reward_workers = 1
