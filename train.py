"""
LUFFY and its relatives: mixed-policy GRPO with teacher traces in the group. The knobs, then the loop.

    python train.py                                          LUFFY on the toy world, one CPU
    python train.py config/method/grpo.py --seed=1           a method is a small overlay; any knob is --key=value
    torchrun --nproc_per_node=2 train.py                     the same in two processes
    python train.py config/luffy_7b.py --dry_run=True        memory and batch arithmetic; needs only the model's config
    torchrun --nproc_per_node=8 train.py config/luffy_7b.py  the paper's run, one node
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST --master_port=29500 train.py config/luffy_7b.py
                                                             two nodes: the same line on each, --node_rank=1 on the other
    python train.py --help                                   every knob with its default and meaning

Each step: the engine takes the policy's weights and answers a batch of prompts, the verifier grades the answers and the
teacher traces beside them, and the policy takes `update_batches` optimizer steps. Unlike PPO there is no value model and no
reference model. Unlike GRPO a group holds a teacher's trace, advantages are not divided by the std, and the summed token
losses are divided by a constant, not by lengths (loss.py has the equations). main() sets up; then its loop reads like the
algorithm. The functions below it are in the order of their use. runtime/ keeps a run alive: checks, checkpoints, logs.

Writes out_dir/{config.json, metrics.jsonl, rollouts/step_N.jsonl, eval_N.json, ckpt_N/, latest, .lock}. A path starts at the
repository, or at the current folder if it begins with ./ or ../. --resume=auto continues from the newest checkpoint in
out_dir. SIGTERM, SIGINT and SIGHUP save and end, SIGUSR1 saves; docs/long_run.md has the rest.
"""

import contextlib
import hashlib
import inspect
import math
import os
import sys
import time
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import NamedTuple

from runtime.process import begin, heartbeat

if __name__ == "__main__":
    begin()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch loads; see docs/faq.md, Troubleshooting

# The defaults are the embedded toy run (toy/build.py); every config is a small difference from them.
# A bracket at a comment's end is the knob's range; without one a number is zero or more.
# ---------------------------------------------------------------- the group
n_rollouts = 8  # rows per prompt, teacher traces included [> 0]
n_teacher = 1  # teacher traces among them; 0 is on-policy GRPO
teacher_gate = -1  # where at most so many are right traces replace wrong samples (with sft_coef all); -1: always [-1, 1024]
teacher_share = 1.0  # share of a trace that is given, at the first step; the policy writes the rest [0, 1]
teacher_share_end = 1.0  # the same at the last step; set both for a constant share [0, 1]
teacher_share_low = 1.0  # draw each share at random, down to a bound that moves from teacher_share to this; 1 is off [0, 1]
teacher_share_schedule = "linear"  # of the shares between first and last step [linear | cosine]
train_teacher = True  # False: of a cut trace only the policy's part is trained, and the teacher's is only read
verified_only = False  # drop traces that the verifier rejects before training
temperature = 1.0  # logits are divided by it, in sampling and training; vLLM has none below 0.01 [0.01, 100]
max_tokens = 40  # response tokens at most [> 0]
max_prompt_tokens = 64  # longer prompts are dropped [> 0]
max_teacher_tokens = 40  # longer traces are dropped [> 0]
# ---------------------------------------------------------------- the loss (loss.py says what each does)
use_std = False  # divide advantages by the group's std
baseline = "group"  # the mean that is subtracted: of the whole group, teacher rows included, or of own samples [group | own]
shaping = "luffy"  # f(p) on teacher tokens: luffy, none, sqrt, pow, log, p_log, phi
gamma = 0.1  # of shaping and sft_shaping [> 0]
teacher_top_entropy = 1.0  # share of a trace's tokens that carry its advantage: those of the highest entropy [0, 1]
shape_own = False  # shape own tokens, too: f(p) / f(p_old) in place of the ratio; not with log and p_log
clip_low = 0.0  # PPO's clip of own tokens at 1 - clip_low; 0 is off [0, 1)
clip_high = 0.0  # PPO's clip of own tokens at 1 + clip_high; 0 is off
cispo = False  # the clipped ratio of own tokens is only a weight on log p: those beyond the clip keep their gradient
loss_constant = 5120.0  # divides an update's summed token losses, here 128 sequences x 40 tokens; 0 is the token mean
policy_coef = 1.0  # coefficient of the policy term; 0 leaves the reward out of the loss
entropy_coef = 0.0  # coefficient of the token-mean entropy, teacher tokens included [any]
sft_coef = 0.0  # coefficient of the teacher tokens' mean NLL; above 0 they leave the policy term
sft_shaping = "log"  # f(p) in place of log p in that mean, without an advantage: any shaping; log is log p itself
sft_per_sequence = False  # that mean is taken over each trace first, and then over the traces; else over all tokens at once
sft_warmup_steps = 0  # steps over which sft_coef rises linearly from zero
sft_decay_steps = 0  # steps after the warm-up over which it falls to sft_coef_end along a cosine; 0 keeps it
sft_coef_end = 0.0  # where it ends
sft_mix = False  # the policy term gets the rest: policy_coef times 1 - sft_coef
kl_coef = 0.0  # coefficient of the token-mean reverse KL to the teacher model (k2)
ce_coef = 0.0  # coefficient of the token-mean cross-entropy to the teacher model's top-1 token
top1_bonus = 0.0  # times (1[the token is the teacher model's top-1] - that one's probability), added to own tokens' advantage
ce_steps = 0  # steps over which ce_coef and top1_bonus fall linearly to zero; 0 keeps them
tis_cap = 0.0  # truncated importance sampling: own tokens times min(pi_old / pi_sampler, cap); 0 is off
skip_equal_groups = False  # leave out groups whose rewards are all equal (DAPO's dynamic sampling, without the refill)
skip_truncated = False  # leave out samples that max_tokens cut off (DAPO); then not ending costs nothing, and may be learnt
# ---------------------------------------------------------------- methods with memory (replay.py)
sft_buffer = 0  # ReLIFT: an SFT step as soon as this many questions without a right answer wait; 0 is off
sft_learning_rate = 1e-4  # of the SFT step's own AdamW, constant [> 0]
sft_grad_clip = 1.0  # global norm [> 0]
sft_entropy_coef = 0.0  # coefficient of the token-mean entropy in the SFT step [any]
replay_share = 0.0  # ExGRPO: at most this share of a batch's questions replays a stored success; 0 is off [0, 1)
replay_start = 0.35  # replay starts once this share of a batch's samples is right [0, 1)
replay_limit = 8  # successes stored per question [> 0]
# ---------------------------------------------------------------- optimisation
prompts_per_step = 16  # prompts per rollout batch, over all ranks [> 0]
update_batches = 1  # optimizer steps per rollout batch [> 0]
learning_rate = 1e-4  # AdamW, after the warm-up [> 0]
lr_schedule = "constant"  # constant, or cosine: to lr_floor at max_steps [constant | cosine]
lr_floor = 0.0  # where the cosine ends, as a share of the learning rate [0, 1]
warmup_steps = 5  # linear, in rollout batches
beta1 = 0.9  # AdamW [0, 1)
beta2 = 0.99  # AdamW [0, 1)
weight_decay = 0.0  # AdamW
grad_clip = 1.0  # global norm [> 0]
skip_grad_norm = 0.0  # skip updates with a larger norm; 0 is no limit, and non-finite ones are always skipped
seed = 0  # of the data order and of every sample [0, 4294967295]
holdout = 0  # questions of `data` set aside for evaluation, in addition to eval_data; the seed does not change them
# ---------------------------------------------------------------- numerics, verifier
require_think = True  # the prompt must end in "<think>\n" and a response must close its thought
refuse_unevaluated = False  # where the ground truth is a plain number, \binom{10}{3} for 120 is wrong
solved_at = 1.0  # a reward from here on counts as solved: metrics, memories, verified traces; for your own grader [> 0]
reward_timeout = 2.0  # seconds of grading per answer [0.01, 86400]
sampler = "auto"  # vLLM where it is installed, else the torch sampler [auto | vllm | torch]
dtype = "auto"  # of matrix products and the engine; auto is bfloat16 on a GPU, else float32 [auto | float32 | bfloat16]
# ================================================================ below: how it is run; these may change when a run is resumed
# ---------------------------------------------------------------- files (a path may change, its content may not)
data = "toy/train.parquet"  # prompts, answers and traces: parquet, JSON lines or a dataset on the hub (docs/data.md)
eval_data = "toy/test.parquet"  # held-out problems; "" for none
model = "toy/base"  # the base: a folder in Hugging Face format, or a hub name
teacher_model = ""  # for kl_coef, ce_coef and top1_bonus: a folder or hub name, with the policy's own tokenizer
grader = "math_verify"  # or oat (the last \boxed{} counts), or a Python file that defines grade(text, answer)
out_dir = "out/toy"  # an earlier run found there is moved aside, never overwritten
resume = "no"  # auto: from out_dir's newest whole checkpoint; force: even if knobs or data differ [no | auto | force]
# ---------------------------------------------------------------- length and limits
max_steps = 60  # rollout batches [> 0]
max_skipped = 3  # stop the run after this many skipped updates in a row [> 0]
min_teacher_pass = 0.6  # refuse to start if fewer teacher traces verify (the toy's are 70 % right on purpose) [0, 1)
preflight_traces = 512  # traces graded for that; 0 is all
canary_interval = 20  # steps between comparisons of the engine's log-probs with the trainer's, on one prompt; 0 is none
canary_limit = 0.0  # stop if their mean |difference| is above it, there or over a batch; 0 is 0.001, or 0.1 in bfloat16
hang_timeout = 300.0  # end the run after so many seconds without progress on any rank [0.1, 604800]
# ---------------------------------------------------------------- evaluation, logging, checkpoints
eval_interval = 10  # steps between evaluations, in addition to the first and the last; 0 is none
eval_greedy = True  # evaluate one greedy answer per problem
eval_k = 4  # samples per problem that are evaluated, too; 0 is none
eval_temperature = 1.0  # of these samples [0 or 0.01, 100]
eval_max_problems = 0  # problems per source that are evaluated; 0 is all
save_interval = 0  # steps between checkpoints, in addition to the last; 0 is none
keep_last = 2  # keep the newest N checkpoints; 0 keeps all
keep_every = 0  # also keep every N-th step's; 0 is none
rollout_interval = 1  # steps between files of rollouts; 0 is none
log = "jsonl"  # metrics.jsonl, always; also there, by the package of this name [jsonl | wandb | tensorboard]
# ---------------------------------------------------------------- machine
device = "auto"  # the GPU if there is one, and vLLM is not the one for CPUs [auto | cpu | cuda]
shard = "ddp"  # none: one process; ddp: every rank holds the model; fsdp: FSDP2, each holds a slice [none | ddp | fsdp]
recompute = False  # activation checkpointing: a decoder layer's activations are computed again in backward
flash_kernel = "auto"  # of attention on a GPU; FA2: torch's; FA3, FA4: packages; auto: the newest [auto | FA2 | FA3 | FA4]
compile = "auto"  # decoder layers, by torch.compile; takes half a minute; auto: a GPU and 100 M parameters [auto | yes | no]
micro_tokens = 8192  # tokens per forward pass and rank; the result does not depend on it [> 0]
tensor_parallel = 1  # consecutive ranks that share one engine [> 0]
gpu_memory = 0.4  # share of the GPU's memory that vLLM may take [> 0]
cuda_graphs = "auto"  # vLLM's: faster decoding, a minute's start; auto: a GPU and 100 M parameters [auto | yes | no]
teacher_offload = False  # keep the teacher model's weights on the host between uses
reward_workers = 2  # verifier processes per rank [1, 1024]
dry_run = False  # print the plan and stop; needs only the model's config.json
plan_gpus = 8  # GPUs a dry run plans for [> 0]
plan_gib = 80.0  # memory of each of these GPUs, GiB [> 0]

import configurator
from configurator import configure

if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    config = configurator.run(lambda: configure(globals(), sys.argv[1:], __file__))

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from data import Order, cut_into_updates, in_order, load_benchmark, load_problems, set_aside, spread
from eval import evaluate_modes
from loss import batch_loss, group_advantages, shape
from model import ask_teacher, load_policy, mean_entropies, use_flash_kernel
from replay import open_memory
from reward import Verifier
from rollout import Grading, choose_sampler, open_sampler, pick_device, roll_out
from runtime import metrics, preflight
from runtime.files import load_config, model_path, write_json
from runtime.folder import OutputFolder
from runtime.guard import Guard, canary
from runtime.plan import worth_compiling
from runtime.ranks import RANK, WORLD, all_reduce, end_processes, gather_engines, leave, mine, print0, start_processes
from runtime.rows import data_path
from runtime.run import check_same_run, find_checkpoint, identify, open_run
from runtime.tokenizer import ends_in_words, load_tokenizer
from runtime.trackers import open_tracker

# Knobs with the name of a keyword of batch_loss are passed to it: see loss_terms().
LOSS_DEFAULTS = {name: p.default for name, p in inspect.signature(batch_loss).parameters.items() if p.default is not p.empty}


def main(open_sampler=open_sampler, hook=lambda step, phase, record: None):
    """One run from start to end. Returns the exit code.

    For tools that import this file and set `config` (measure/peers/ours.py does): open_sampler may be any function
    with the arguments of rollout.open_sampler; hook(step, phase, record) is called as each phase of a step begins, with what is
    measured so far, and at the step's end, as phase "done", with all of it.
    """
    # Before a GPU is used and before anything is written: find every mistake that can be found.
    knobs = SimpleNamespace(**config)
    preflight.check_knobs(knobs, n_ranks=plan_gpus if dry_run else WORLD, shape=shape)
    if dry_run:
        return preflight.dry_run(knobs)
    device, precision = pick_device(knobs.device, dtype)
    compute_dtype, engine_kind = getattr(torch, precision), choose_sampler(sampler)
    start_processes(device, shard, config)
    preflight.warn_of_busy_cores(device)
    with contextlib.ExitStack() as stack:
        output = OutputFolder(out_dir, "train.py", inputs=[data, eval_data, model, teacher_model, grader])
        checkpoint = find_checkpoint(stack.enter_context(output), resume)
        if checkpoint and checkpoint.run["step"] >= max_steps and not checkpoint.run["pending"]:
            print0(f"nothing to do: {checkpoint.path} has {checkpoint.run['step']} steps, max_steps is {max_steps}")
            return end_processes(shard)
        base = checkpoint.path if checkpoint else model_path(model)
        tokenizer, model_config = load_tokenizer(base), load_config(base)
        teacher_config = preflight.check_models(knobs, base, tokenizer, model_config)
        problems, held_out, read = load_data(tokenizer)
        preflight.check_ids(problems + held_out, tokenizer, model_config)
        verifier = Verifier(reward_workers, reward_timeout, require_think, grader, solved_at=solved_at,
                            refuse_unevaluated=refuse_unevaluated)  # fmt: skip
        stack.enter_context(verifier)
        problems = preflight.check_traces(knobs, problems, tokenizer, verifier)
        preflight.check_problems(knobs, problems)
        identity = identify(config, problems, read, engine_kind, precision, verifier, checkpoint)
        if checkpoint:
            check_same_run(checkpoint, identity, configurator.free_knobs(__file__), resume)
        preflight.show_plan(knobs, model_config, teacher_config, problems, device)
        tracker = open_tracker(config, identity, checkpoint, folder=output.path) if RANK == 0 else None

        # Load the policy, the engine and the teacher model; make the optimizers and the method's memory.
        policy = load_policy(base, temperature, compute_dtype, device, shard=shard == "fsdp", recompute=recompute,
                             compiled=worth_compiling(compile, model_config))  # fmt: skip
        backend = policy.hf.config._attn_implementation
        print0(f"attention: {backend}" + (f", {use_flash_kernel(flash_kernel)}" if backend == "packed_varlen" else ""))
        ddp = WORLD > 1 and shard == "ddp"  # averages gradients over ranks; FSDP does so by itself
        wrapped = DDP(policy, gradient_as_bucket_view=True) if ddp else policy
        engine = teacher = None
        if n_teacher < n_rollouts or held_out:
            engine = open_sampler(base, **engine_options(tokenizer, engine_kind, precision))
            engine.sleep()
        if teacher_model:
            teacher = load_policy(model_path(teacher_model), temperature, compute_dtype, device, shard=shard == "fsdp",
                                  frozen=True, offload=teacher_offload)  # fmt: skip
        # The fused AdamW needs no temporary copy of the weights on a GPU: 4 bytes per weight less at the step's peak.
        adamw = partial(torch.optim.AdamW, [*policy.parameters()], betas=(beta1, beta2), weight_decay=weight_decay, fused=True)
        optimizer, sft_optimizer = adamw(lr=learning_rate), adamw(lr=sft_learning_rate)
        optimizers = {"adamw": optimizer, "sft": sft_optimizer}
        memory = open_memory(knobs, problems)
        run = open_run(output, config, identity, checkpoint, tracker, policy=policy, optimizers=optimizers, memory=memory)
        order = Order(len(problems), seed, **run.order)
        by_id = {p.id: p for p in problems}
        grading = Grading(verifier, tokenizer, answers={p.id: p.answer for p in problems})
        guard = stack.enter_context(Guard(hang_timeout))
        save = partial(run.save, policy=policy, tokenizer=tokenizer, optimizers=optimizers, memory=memory, guard=guard,
                       keep_last=keep_last, keep_every=keep_every)  # fmt: skip
        finish = partial(finish_step, run, policy=policy, engine=engine, verifier=verifier, tokenizer=tokenizer,
                         problem=problems[0], held_out=held_out, guard=guard)  # fmt: skip
        guard.on_stop, verifier.tick = save, guard.tick
        if engine:
            # A tick may end the rollout on one rank alone, where a signal came. Ranks that share an engine must stay together.
            engine.tick = guard.tick if tensor_parallel == 1 else guard.progress
            gap = compare_engine(run, policy, engine, problems[0])
            print0(f"canary: engine and trainer agree to {gap:.1e} in mean |log-prob| (limit {mismatch_limit(engine):g})")
            if not checkpoint:
                run.pending["mismatch/canary"] = gap
        print0(f"process {os.getpid()}: SIGUSR1 saves a checkpoint, SIGTERM, SIGINT and SIGHUP save and end")
        if run.pending:  # step 0, or a step that was saved before its evaluation
            finish()
            if run.step == max_steps:
                run.saved = None  # its checkpoint says that the evaluation is missing: write it again
                save()

        # At a signal all ranks leave the loop together, by Stopped, which Guard catches. Before a step's first update
        # (guard.droppable) they drop the step and save the one before; after it they finish the step.
        start = time.time()
        for step in range(run.step + 1, max_steps + 1):
            phases = metrics.Phases(step, guard, hook, engine)

            # 1. Sync: the engine takes the policy's weights.
            phases.begin("sync")
            if n_teacher < n_rollouts:
                sync(engine, policy, run)

            # 2. Roll out: own samples from the engine, and beside them the teacher's trace or a
            # replayed success.
            phases.begin("rollout")
            batch, replays = next_batch(memory, order, policy, step)
            with guard.interruptible():
                rollouts = sample(engine, batch, replays, grading, step=step, stamp=run.n_updates)

                # 3. Reward: the verifier grades samples and traces alike, most of them while others
                # are still sampled.
                phases.begin("reward")
                grading.collect()
            rollouts = in_order(gather_engines(rollouts, tensor_parallel), batch)  # now on all ranks

            # 4. Advantage: reward minus the mean of the group, by default with the teacher's row in it.
            phases.begin("update")
            members = gated(rollouts)  # all of them, unless traces join only where the policy fails
            rewards = torch.tensor([r.reward for r in members])
            groups = torch.tensor([r.problem for r in members])
            own = torch.tensor([r.source == "own" for r in members]) if baseline == "own" else None
            advantages = group_advantages(rewards, groups, use_std, own)
            for r, advantage in zip(members, advantages.tolist(), strict=True):
                r.advantage = advantage

            # 5. Pack: each update's rollouts are spread over the ranks by tokens. Every rank gets as
            # many micro-batches as the others, or a collective of the backward pass would never end.
            parts = cut_into_updates(worth_training(members), batch, update_batches)
            updates = [pack_share(part, device) for part in parts]

            # 6. Old log-probs, for updates that will find the policy moved. The teacher model's
            # log-probs, if there is one.
            terms = loss_terms(step)
            note_old_logps(policy, chain(*updates[1:]), guard)
            if teacher:
                note_teacher(teacher, [*chain(*updates)], terms, tokenizer)

            # 7. Update: loss, backward, clip, AdamW. A bad update is skipped on all ranks.
            optimizer.param_groups[0]["lr"] = lr = learning_rate * schedule(step)
            step_with = partial(take_step, run, guard, wrapped)
            results = [step_with(optimizer, u, terms, max_norm=grad_clip) for u in updates]
            guard.droppable = False  # even if no group was worth an update

            # 8. Memory: it sees the rollouts. ReLIFT's may ask for an SFT step on traces of questions
            # that failed.
            memory.observe(rollouts)
            sft = None
            if traces := memory.sft_due():
                packed = pack_share(traces, device)
                sft = step_with(sft_optimizer, packed, sft_loss_terms(), max_norm=sft_grad_clip)
            phases.end()

            # 9. Log.
            record = {"step": step, "lr": lr, "micro_batches": sum(map(len, updates))}
            record |= metrics.rollout_metrics(rollouts, [*chain(*parts)])
            record |= metrics.update_metrics(results, sft) | memory.metrics() | phases.record
            if is_due(step, rollout_interval):
                logps = metrics.logps_of_given_tokens(rollouts, parts, updates, results)
                run.write_rollouts(step, rollouts, logps, by_id, tokenizer)
            print0(run.report(record, rollouts, max_steps, skip_truncated))
            metrics.check_mismatch(record, mismatch_limit(engine))

            # 10. From here a checkpoint may hold the step. Canary, evaluation, the step's line in
            # metrics.jsonl, checkpoint.
            run.advance(step, order.state(), record)
            guard.droppable = True
            finish()
            guard.agree()
            run.save_due |= guard.save_now or step == max_steps or is_due(step, save_interval)
            if run.save_due:
                save(must=step == max_steps)
            hook(step, "done", record)
        print0(f"done in {time.time() - start:.0f} s: {run.folder}")
    if engine:
        engine.close()
    run.track("end", guard.agreed)
    end_processes(shard)
    return 128 + guard.agreed if guard.agreed else 0


# ---------------------------------------------------------------- before the loop, and at a step's end


def load_data(tokenizer):
    """The problems to train on; those to evaluate on: held out from `data`, and of eval_data; and for each of these two knobs
    a digest of the rows that were read."""
    print0(ends_in_words(tokenizer))
    read = {name: hashlib.sha256() for name in ("data", "eval_data")}
    problems = load_problems(data_path(data), tokenizer, max_prompt_tokens, max_teacher_tokens, require_think, log=print0,
                             content=read["data"])  # fmt: skip
    problems, held_out = set_aside(problems, holdout)
    if eval_data:
        held_out += load_benchmark(data_path(eval_data), tokenizer, eval_max_problems, max_prompt_tokens, require_think,
                                   log=print0, content=read["eval_data"])  # fmt: skip
    return problems, held_out, {name: content.hexdigest() for name, content in read.items()}


def engine_options(tokenizer, kind, precision):
    """rollout.open_sampler's arguments, without the model."""
    shares = teacher_share, teacher_share_end, teacher_share_low
    continued = max_teacher_tokens if min(shares) < 1 else 0  # the engine continues cut traces
    return dict(stop_ids=tokenizer.stop_ids, max_model_len=max_prompt_tokens + max(max_tokens, continued), sampler=kind,
                dtype=precision, gpu_memory=gpu_memory, seed=seed, tensor_parallel=tensor_parallel,
                cuda_graphs=cuda_graphs)  # fmt: skip


def is_due(step, interval):
    """Every interval-th step; never if it is 0."""
    return interval > 0 and step % interval == 0


def sync(engine, policy, run):
    """Load the policy's weights into the engine, unless it has this version of them."""
    if engine and engine.stamp != run.n_updates:
        engine.load(policy.hf, run.n_updates)


def mismatch_limit(engine):
    """canary_limit; 0 is what fits the engine's dtype. In bfloat16 an H200 showed 0.004 to 0.017."""
    return canary_limit or (0.1 if engine and engine.dtype == torch.bfloat16 else 1e-3)


def compare_engine(run, policy, engine, problem):
    """The canary: mean |log-prob difference| of engine and trainer. Ends the run above mismatch_limit()."""
    sync(engine, policy, run)
    return canary(policy, engine, problem, temperature=temperature, max_tokens=min(max_tokens, 32), stamp=run.n_updates,
                  limit=mismatch_limit(engine))  # fmt: skip


def finish_step(run, policy, engine, verifier, tokenizer, problem, held_out, guard):
    """What follows a step's updates, and step 0: canary, evaluation, its line in metrics.jsonl."""
    step, found = run.step, {}
    if engine and step and is_due(step, canary_interval):
        guard.phase(step, "canary")
        found["mismatch/canary"] = compare_engine(run, policy, engine, problem)
    due = step in (0, max_steps) or is_due(step, eval_interval)
    modes = [("greedy", 1, 0.0)] * eval_greedy + [("avg@k", eval_k, eval_temperature)] * (eval_k > 0)
    if held_out and modes and due:
        guard.phase(step, "evaluation")
        sync(engine, policy, run)
        record, table, rows = evaluate_modes(
            held_out, engine, verifier, tokenizer, guard, stamp=run.n_updates, modes=modes, max_tokens=max_tokens,
            seed=seed, tensor_parallel=tensor_parallel,
        )  # fmt: skip
        found |= record
        run.try_to(write_json, os.path.join(run.folder, f"eval_{step}.json"), table)
        print0("\n".join(metrics.eval_report(table, rows)))
    run.write_line(found)


# ---------------------------------------------------------------- from a batch of problems to micro-batches


def next_batch(memory, order, policy, step):
    """The step's problems, and what they replay: see replay.py."""
    rng, entropies = np.random.default_rng([seed, step]), partial(mean_entropies, policy, micro_tokens=micro_tokens)
    return memory.next_batch(order, prompts_per_step, rng, entropies)


def share_range(step):
    """The range from which the share of each trace that is given in this step is drawn. By default its ends are the same."""
    done = (step - 1) / max(1, max_steps - 1)
    if teacher_share_schedule == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    low, high = (teacher_share + (end - teacher_share) * done for end in (teacher_share_low, teacher_share_end))
    return min(low, high), high


def sample(engine, batch, replays, grading, step, stamp):
    """This rank's rollouts, each handed to the verifier as soon as it has ended. Then the engine sleeps."""
    low, share = share_range(step)
    rollouts = roll_out(
        engine, mine(batch, tensor_parallel), n_rollouts=n_rollouts, n_teacher=n_teacher, temperature=temperature,
        max_tokens=max_tokens, seed=seed, step=step, stamp=stamp, beside=teacher_gate >= 0, teacher_share=share,
        teacher_share_low=low, replays=replays, done=grading.submit,
    )  # fmt: skip
    if engine:
        engine.sleep()
    return rollouts


def gated(rollouts):
    """The rows of each group: all, or with a teacher_gate own samples alone where more of them are right. Elsewhere the traces
    join: with sft_coef they are learnt in place of all samples (HPT), without it each replaces a wrong sample (AMPO)."""
    if teacher_gate < 0:
        return rollouts
    groups, members = {}, []
    for r in rollouts:
        groups.setdefault(r.problem, ([], []))[r.source == "teacher"].append(r)
    for own, traces in groups.values():
        if sum(r.solved for r in own) > teacher_gate or not traces:
            members += own
        else:
            n_left = 0 if sft_coef else len(own) - len(traces)
            members += [*sorted(own, key=lambda r: not r.solved)[:n_left], *traces]  # right samples stay
    return members


def worth_training(rollouts):
    """The rollouts to train on: all, or without those that DAPO leaves out. Traces that are learnt by likelihood stay, because
    they need no advantage."""
    if skip_equal_groups:
        rewards = {}
        for r in rollouts:
            rewards.setdefault(r.problem, set()).add(r.reward)
        rollouts = [r for r in rollouts if len(rewards[r.problem]) > 1 or (sft_coef and r.source == "teacher")]
    return [r for r in rollouts if not (skip_truncated and r.finish_reason == "length")]


def pack_share(rollouts, device):
    """This rank's share of the rollouts as micro-batches, a list of Packed."""
    return [micro_batch.to(device) for micro_batch in spread(rollouts, micro_tokens, RANK, WORLD, train_teacher)]


@torch.no_grad()
def note_old_logps(policy, micro_batches, guard):
    """Put the policy's log-probs into the micro-batches, before it moves."""
    for micro_batch in micro_batches:
        guard.safe_point()
        micro_batch.old_logp, _ = policy(micro_batch)


def note_teacher(teacher, micro_batches, terms, tokenizer):
    """Put the teacher model's log-probs and first choices into the micro-batches, if this step's loss reads them."""
    want_top1 = terms["ce_coef"] > 0 or terms["top1_bonus"] > 0
    if micro_batches and (terms["kl_coef"] or want_top1):
        ask_teacher(teacher, micro_batches, want_top1=want_top1, n_tokens=len(tokenizer),
                    offload=teacher_offload and shard != "fsdp")  # fmt: skip


# ---------------------------------------------------------------- one optimizer step


def schedule(step):
    """The learning rate's factor: a linear warm-up, then constant, or a cosine's half that ends at lr_floor."""
    if step <= warmup_steps:
        return step / warmup_steps
    if lr_schedule == "constant":
        return 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))
    return lr_floor + (1 - lr_floor) * cosine


def sft_weight(step):
    """sft_coef in this step: a linear rise from zero, then a cosine's half down to sft_coef_end (CHORD's mu)."""
    risen = min(1.0, (step - 1) / sft_warmup_steps) if sft_warmup_steps else 1.0
    fallen = min(1.0, max(0, step - 1 - sft_warmup_steps) / sft_decay_steps) if sft_decay_steps else 0.0
    return risen * sft_coef + (sft_coef_end - sft_coef) * 0.5 * (1 - math.cos(math.pi * fallen))


def loss_terms(step):
    """batch_loss's switches and coefficients in this step: each is the knob of the same name, but for by_likelihood."""
    terms = {name: globals()[name] for name in LOSS_DEFAULTS if name != "by_likelihood"}
    terms |= {"by_likelihood": sft_coef > 0, "sft_coef": sft_weight(step)}
    if sft_mix:
        terms["policy_coef"] *= 1 - terms["sft_coef"]
    if ce_steps:
        for name in ("ce_coef", "top1_bonus"):
            terms[name] *= max(0.0, 1 - (step - 1) / ce_steps)
    return terms


def sft_loss_terms():
    """The same for the SFT step of a method with memory: the likelihood term only; the others stay at batch_loss's defaults."""
    return LOSS_DEFAULTS | dict(policy_coef=0.0, by_likelihood=True, sft_coef=1.0, entropy_coef=sft_entropy_coef)


class Update(NamedTuple):
    """What update() returns."""

    stepped: bool  # False if it was skipped
    norm: float  # of the gradient, before the clip
    loss: float  # over all ranks
    sums: dict  # {metric: (sum, count)} of this rank's tokens
    logps: list  # of each micro-batch (T,): the policy's log-probs before the step


def update(policy, optimizer, micro_batches, terms, max_norm, skip_norm, tick):
    """Forward and backward over the micro-batches, clip, step: an Update. terms: loss_terms(); tick() is called before each
    micro-batch and before the step. It skips the step if loss or norm is not finite on any rank, or if skip_norm is above
    zero and the norm above it."""
    # The loss's denominators are those of the whole optimizer batch over all ranks: Packed.counts.
    counts = all_reduce([sum(column) for column in zip(*(b.counts for b in micro_batches), strict=True)])
    sums, logps, total = [], [], 0.0
    with heartbeat("update, micro-batches", len(micro_batches)) as show:
        for i, micro_batch in enumerate(micro_batches):
            tick()
            show(i)
            last = i == len(micro_batches) - 1
            # FSDP reduces after every micro-batch, because keeping a whole gradient is what it avoids.
            with policy.no_sync() if isinstance(policy, DDP) and not last else contextlib.nullcontext():
                logp, entropy, *top1_logp = policy(micro_batch)
                loss = batch_loss(logp, entropy, *(top1_logp or [None]), micro_batch, counts, **terms)
                (loss * WORLD).backward()  # gradients are averaged over ranks, but the denominators are global already
            logp, entropy = logp.detach(), entropy.detach()
            ratio = (logp - micro_batch.behaviour_logp).exp()  # as in token_loss: of a teacher token p / pi_phi
            shaped = None if terms["by_likelihood"] else shape(ratio, terms["shaping"], terms["gamma"])
            clip_at = terms["clip_low"], terms["clip_high"]
            sums.append(metrics.token_metrics(logp, entropy, micro_batch, shaped, *clip_at))
            logps.append(logp)
            total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    (total, norm), sums = metrics.to_host([total, norm], metrics.merge(sums))  # the first time that a GPU is waited for
    tick()
    bad = not math.isfinite(total) or not math.isfinite(norm) or 0 < skip_norm < norm
    n_bad, loss = all_reduce([bad, total])
    if not n_bad:
        optimizer.step()
    optimizer.zero_grad()  # now, so that the engine finds their memory free; DDP keeps it for its buckets
    return Update(not n_bad, norm, loss, sums, logps)


def take_step(run, guard, policy, optimizer, micro_batches, terms, max_norm):
    """update(), and count it. Too many updates skipped in a row end the run."""
    result = update(policy, optimizer, micro_batches, terms, max_norm=max_norm, skip_norm=skip_grad_norm,
                    tick=guard.safe_point)  # fmt: skip
    guard.droppable = False
    run.n_updates += result.stepped
    run.n_skipped = 0 if result.stepped else run.n_skipped + 1
    if run.n_skipped:
        print0(f"update skipped, {run.n_skipped} in a row: loss {result.loss:.3g}, gradient norm {result.norm:.3g}")
    if run.n_skipped >= max_skipped:
        raise FloatingPointError(f"{run.n_skipped} updates in a row were skipped: lower learning_rate, or look at the rollouts")
    return result


if __name__ == "__main__":
    leave(configurator.run(main), tensor_parallel)
