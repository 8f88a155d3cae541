# LUFFY on Qwen2.5-Math-7B, arXiv 2504.14945, as its released train.sh runs it on 8 GPUs. Not run by us yet.
# On purpose different: 256 questions are held out, and longer traces dropped; docs/methods.md has the rest.
#
#     torchrun --nproc_per_node=8 train.py config/luffy_7b.py
#
# 128 prompts x (7 own samples + 1 trace) = 1024 sequences a step, 2 updates of 512 each. 45.7k prompts / 128 = 357
# steps an epoch, 355 with the held-out set. The paper stops at 500 = 1.4 epochs (the script says 30 epochs), and its
# "LUFFY-Extra" at 860: --max_steps=860. The paper's own figures for this run, 77 h on 8 A100:
#     AIME24 AIME25  AMC  MATH-500 Minerva Olympiad average
#      29.4   23.1  65.6    87.6    37.5    57.2     50.1     on-policy 45.5, SFT 44.1, RL with SFT loss 40.1
# One rerun of it has 46.3 (arXiv 2604.23747, one seed). That SFT was hurt: config/sft_7b.py.

data = "data/openr1.parquet"  # Elliott/Openr1-Math-46k-8192, LUFFY's training set
model = "models/Qwen2.5-Math-7B-16k-think"  # made by prepare.py model: the prompt ends in "<think>\n"
out_dir = "out/luffy_7b"
eval_data = ""  # not the released valid.parquet: it has the test files' questions, so to choose a checkpoint by it leaks
holdout = 256  # training questions set aside to choose a checkpoint by; 0 trains on all, as the paper does
eval_interval = 10
eval_greedy = False
eval_k = 1
eval_temperature = 0.6  # as in the final evaluation

n_rollouts = 8
n_teacher = 1
verified_only = False  # the set is verified already; a trace that fails here gets advantage <= 0
temperature = 1.0
max_tokens = 8192
max_prompt_tokens = 1024
max_teacher_tokens = 8192  # EOS included; the original cuts longer traces, we drop them

use_std = False  # the paper's equation divides by the std, its text and the script do not
shaping = "luffy"
gamma = 0.1
clip_low = 0.0  # loss_remove_clip=True
clip_high = 0.0
# The script divides a rank's token sum by 8192 and FSDP averages over 8 ranks: one step is sum / 65536.
# That holds here for any number of GPUs.
loss_constant = 65536.0
# The script adds 0.001 x the token mean for each of a rank's K micro-batches of 32,768 tokens. With 64 sequences a
# rank, K = ceil(mean tokens of a sequence / 512). It grows with the responses, here by our estimate from 4 to 7; the
# paper's text says 0.01.
entropy_coef = 0.005
sft_coef = 0.0

max_steps = 500
prompts_per_step = 128
update_batches = 2  # ppo_mini_batch_size 64
learning_rate = 1e-6
warmup_steps = 0
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01
grad_clip = 1.0
seed = 47  # the release's, of its data's order

require_think = True
# From here on our own choice.
reward_workers = 8
reward_timeout = 2.0
min_teacher_pass = 0.9
preflight_traces = 512

shard = "fsdp"
recompute = True
save_interval = 10  # steps that a crash may cost; see docs/long_run.md
keep_last = 2
keep_every = 100
rollout_interval = 10
micro_tokens = 32768
gpu_memory = 0.5
