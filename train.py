"""
LUFFY and its relatives: mixed-policy GRPO with teacher traces in the group. The knobs, then the loop.

    python train.py                                          LUFFY on the toy world, one CPU
    python train.py config/method/grpo.py --seed=1           a method is a small overlay; any knob is --key=value
    torchrun --nproc_per_node=2 train.py                     the same in two processes
    python train.py config/luffy_7b.py --dry_run=True        memory and batch arithmetic, from the model's config alone
    torchrun --nproc_per_node=8 train.py config/luffy_7b.py  the paper's run, one node
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST --master_port=29500 train.py config/luffy_7b.py
                                                             two nodes: the same line on each, --node_rank=1 on the other
    python train.py --help                                   every knob with its default and meaning

Each step: the sampler takes over the policy's weights, answers a batch of prompts, the verifier grades the
answers and the teacher traces beside them, and the policy takes `update_batches` optimizer steps.
Writes out_dir/{config.json, metrics.jsonl, rollouts/step_N.jsonl, eval_N.json, ckpt_N/, latest}. --resume=auto goes on
from the newest checkpoint there. SIGTERM and SIGINT save and end, SIGUSR1 saves; docs/long_run.md has the rest.
"""

import contextlib
import importlib.util
import math
import os
import random
import signal
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch loads; see README, Troubleshooting

# The defaults are the embedded toy run (toy/build.py); every config is a small difference from them.
# ---------------------------------------------------------------- files
data = "toy/train.parquet"  # prompts, answers and teacher traces, in LUFFY's parquet schema
eval_data = "toy/test.parquet"  # held-out problems; "" for none
model = "toy/base"  # the base: a folder in Hugging Face format, or a hub name
out_dir = "out/toy"  # an earlier run found there is moved aside, never overwritten
resume = "no"  # auto: go on from out_dir's newest whole checkpoint, if there is one; force: under other knobs or data, too
# ---------------------------------------------------------------- the group
n_rollouts = 8  # rows per prompt, teacher traces included
n_teacher = 1  # of which teacher traces; 0 is on-policy GRPO
teacher_share = 1.0  # of a trace's tokens, at the first step; the policy writes and is trained on the rest
teacher_share_end = 1.0  # the same at the last step, linear in between
verified_only = False  # drop traces that the verifier rejects before training
temperature = 1.0  # of sampling, and of the policy that is trained
max_tokens = 40  # response tokens at most
max_prompt_tokens = 64  # longer prompts are dropped
max_teacher_tokens = 40  # longer traces are dropped
# ---------------------------------------------------------------- the loss (loss.py says what each does)
use_std = False  # divide advantages by the group's std
baseline = "group"  # whose mean reward is subtracted: group, teacher rows included, or own
shaping = "luffy"  # f(p) on teacher tokens: luffy, none, sqrt, pow, log, p_log
gamma = 0.1  # of the shaping
clip_low = 0.0  # PPO's clip of own tokens at 1 - clip_low; 0 is off
clip_high = 0.0  # and at 1 + clip_high
loss_constant = 5120.0  # divides the summed token losses, here 128 sequences x 40 tokens; 0 is the token mean
policy_coef = 1.0  # times that sum; 0 leaves the reward out of the loss
entropy_coef = 0.0  # times the token mean of the entropy, teacher tokens included
sft_coef = 0.0  # above 0 teacher tokens are learnt by likelihood instead: times their token-mean NLL
kl_coef = 0.0  # times the token mean of the reverse KL to the teacher model (k2)
ce_coef = 0.0  # times the token-mean cross-entropy to the teacher model's first choice
ce_steps = 0  # steps over which ce_coef falls linearly to zero; 0 keeps it
tis_cap = 0.0  # truncated importance sampling: own tokens weigh min(pi_old / pi_sampler, cap); 0 is off
skip_equal_groups = False  # leave out groups whose rewards are all equal (DAPO's dynamic sampling, without the refill)
skip_truncated = False  # leave out samples that max_tokens cut off (DAPO's over-long masking)
# ---------------------------------------------------------------- a teacher model (for kl_coef and ce_coef)
teacher_model = ""  # a folder in Hugging Face format, or a hub name, with the policy's own tokenizer
teacher_offload = False  # keep its weights on the host between uses
# ---------------------------------------------------------------- methods with memory (replay.py)
sft_buffer = 0  # ReLIFT: an SFT step whenever so many questions failed by a whole group wait; 0 is off
sft_learning_rate = 1e-4  # of the SFT step's own AdamW
sft_grad_clip = 1.0  # global norm
sft_entropy_coef = 0.0  # times the token mean of the entropy in the SFT step
replay_share = 0.0  # ExGRPO: questions of a batch that replay a stored success, at most this share; 0 is off
replay_start = 0.35  # share of right samples in a batch that starts it
replay_limit = 8  # successes stored per question
# ---------------------------------------------------------------- optimisation
max_steps = 60  # rollout batches
prompts_per_step = 16  # prompts per rollout batch, over all ranks
update_batches = 1  # optimizer steps per rollout batch
learning_rate = 1e-4  # AdamW, after the warm-up
lr_schedule = "constant"  # constant, or cosine: to zero at max_steps
warmup_steps = 5  # linear, in rollout batches
beta1 = 0.9  # AdamW
beta2 = 0.99  # AdamW
weight_decay = 0.0  # AdamW
grad_clip = 1.0  # global norm
skip_grad_norm = 0.0  # skip an update whose norm is above it, as one that is not finite always is; 0 is no limit
max_skipped = 3  # updates skipped in a row that stop the run
seed = 0  # of the data order and of every sample
# ---------------------------------------------------------------- the verifier
grader = "math_verify"  # or oat (the last \boxed{} counts), or a Python file that defines grade(text, answer)
require_think = True  # the prompt must end in "<think>\n" and a response must close its thought
reward_workers = 2  # processes per rank
reward_timeout = 2.0  # seconds of grading per answer
min_teacher_pass = 0.6  # refuse to start if fewer teacher traces verify (the toy's are 70 % right on purpose)
preflight_traces = 512  # traces graded for that; 0 is all
# ---------------------------------------------------------------- evaluation, logging, checkpoints
holdout = 0  # questions of `data` set aside to select checkpoints by, the same whatever the seed; beside eval_data's
eval_interval = 10  # steps between evaluations, besides the first and the last; 0 is none
eval_greedy = True  # evaluate one greedy answer per problem
eval_k = 4  # and this many samples; 0 is none
eval_temperature = 1.0  # of those
eval_max_problems = 0  # per source; 0 is all
save_interval = 0  # steps between checkpoints, besides the last; 0 is none
keep_last = 2  # checkpoints that stay, the newest; 0 is all
keep_every = 0  # and those of every so many steps; 0 is none
rollout_interval = 1  # steps between files of rollouts; 0 is none
log = "jsonl"  # metrics.jsonl, always; wandb: Weights & Biases besides (pip install wandb)
# ---------------------------------------------------------------- system
sampler = "auto"  # vllm, torch, or auto: vllm where it is installed
dtype = "auto"  # matrix products and the engine: float32, bfloat16, or auto: bfloat16 on a GPU
shard = "ddp"  # none: one process; ddp: every rank holds the model; fsdp: FSDP2, each holds a slice
recompute = False  # activation checkpointing: a decoder layer's activations are computed again in backward
tensor_parallel = 1  # consecutive ranks that share one engine
micro_tokens = 8192  # tokens per forward pass and rank; the result does not depend on it
gpu_memory = 0.4  # share of the GPU's memory that vLLM may take
canary_interval = 20  # steps between comparisons of the engine's log-probs with the trainer's
canary_limit = 0.001  # mean |difference|, there or over a batch, that stops the run; in bfloat16 it takes about 0.1
hang_timeout = 300.0  # seconds without progress on any rank that end the run
dry_run = False  # print the plan and stop; needs no more than the model's config.json
plan_gpus = 8  # GPUs a dry run plans for
plan_gib = 80.0  # and the memory of each

from configurator import UserError, configure, heartbeat, provenance, repo_path, require, run

if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    config = run(lambda: configure(globals(), sys.argv[1:], __file__))

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from checkpoint import NotSaved, all_ranks, check_same, find, fingerprint, prune, put_aside, restore, save, together
from data import (
    Order,
    Rollout,
    check_same_tokens,
    count_rows,
    load_problems,
    load_tokenizer,
    pack,
    response_text,
    set_aside,
    spread,
)
from eval import evaluate, load_benchmark, make_folder, weights_digest, write_json
from guard import Guard
from loss import batch_loss, group_advantages, shape
from metrics import (
    Phases,
    batch_warnings,
    collapse,
    end_wandb,
    eval_report,
    finite,
    rewind,
    rollout_metrics,
    start_wandb,
    step_line,
    to_wandb,
    token_metrics,
    write_metrics,
    write_rollouts,
)
from model import attention_backends, load_config, load_policy, model_path, start_processes
from plan import print_plan
from replay import FailedQuestions, Successes
from reward import Verifier
from rollout import TorchSampler, VLLMSampler, request_seed, roll_out, wants_vllm
from stats import summarize

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*args):
    if RANK == 0:
        print(*args, flush=True)


def all_reduce(values, op=dist.ReduceOp.SUM):
    """A list of numbers, reduced over the ranks."""
    if WORLD == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return tensor.tolist()


def mine(items):
    """The share of a list that this rank's engine works on."""
    return items[RANK // tensor_parallel :: WORLD // tensor_parallel]


def gather(items):
    """All ranks' lists in one, the same on every rank."""
    return [x for part in all_ranks(items) for x in part]


def gather_engines(items):
    """The same of one rank for each engine: the ranks that share one have the same list."""
    return gather(items if RANK % tensor_parallel == 0 else [])


def merge(results):
    """[{name: (sum, count)}, ...] -> one."""
    return {k: (sum(r[k][0] for r in results), sum(r[k][1] for r in results)) for k in results[0]}


def means(sums):
    """{name: (sum, count)} of this rank -> {name: mean over all ranks}, without names that nobody counted."""
    totals, counts = all_reduce([s for s, _ in sums.values()]), all_reduce([n for _, n in sums.values()])
    return {k: t / n for k, t, n in zip(sums, totals, counts, strict=True) if n and math.isfinite(t)}


# ---------------------------------------------------------------- before step 1


def check_knobs(n_ranks):
    require(
        globals(),
        "n_rollouts temperature max_tokens max_prompt_tokens max_teacher_tokens gamma max_steps prompts_per_step update_batches"
        " learning_rate grad_clip reward_workers reward_timeout micro_tokens gpu_memory tensor_parallel canary_limit plan_gpus"
        " plan_gib replay_limit sft_learning_rate sft_grad_clip max_skipped hang_timeout",
        "n_teacher loss_constant policy_coef sft_coef kl_coef ce_coef ce_steps tis_cap clip_high warmup_steps weight_decay"
        " preflight_traces holdout eval_interval eval_k eval_temperature eval_max_problems save_interval rollout_interval"
        " canary_interval sft_buffer teacher_share teacher_share_end skip_grad_norm keep_last keep_every",
        "clip_low beta1 beta2 min_teacher_pass replay_share replay_start",
    )
    if n_ranks % tensor_parallel:
        raise UserError(f"tensor_parallel={tensor_parallel} must divide the {n_ranks} process(es) that torchrun started")
    if prompts_per_step % update_batches or prompts_per_step % (n_ranks // tensor_parallel):
        raise UserError(
            f"prompts_per_step={prompts_per_step} must divide into {update_batches} updates and over the engines of"
            f" {n_ranks} ranks"
        )
    if shard not in ("none", "ddp", "fsdp") or (shard == "none" and n_ranks > 1):
        raise UserError(f"shard={shard!r} with {n_ranks} process(es): choose ddp or fsdp, or none for one process")
    if not 0 <= n_teacher <= n_rollouts:
        raise UserError(f"n_teacher={n_teacher} must lie between 0 and n_rollouts={n_rollouts}")
    if max_prompt_tokens + max(max_tokens, max_teacher_tokens) > micro_tokens:
        raise UserError(f"micro_tokens={micro_tokens} cannot hold a prompt and its response at their limits: raise it")
    wants_vllm(sampler)
    for name, value, choices in (("dtype", dtype, ("auto", "float32", "bfloat16")), ("baseline", baseline, ("group", "own")),
                                 ("lr_schedule", lr_schedule, ("constant", "cosine")),
                                 ("resume", resume, ("no", "auto", "force")), ("log", log, ("jsonl", "wandb"))):  # fmt: skip
        if value not in choices:
            raise UserError(f"{name}={value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    if log == "wandb" and not dry_run and not getattr(importlib.util.find_spec("wandb"), "origin", None):
        # A folder of that name, as the package leaves behind where it ran, has a spec, but no origin.
        raise UserError("log='wandb' wants its package: pip install wandb, or leave log out: metrics.jsonl is always written")
    if baseline == "own" and n_teacher == n_rollouts:
        raise UserError(f"baseline='own' wants own samples, but n_teacher={n_teacher} leaves none: set baseline='group'")
    if max(teacher_share, teacher_share_end) > 1:
        raise UserError("teacher_share and teacher_share_end must lie between 0 and 1")
    if replay_share and n_teacher:
        raise UserError("replay_share puts a replayed sample where a trace would be: set n_teacher=0")
    if n_teacher == n_rollouts and min(teacher_share, teacher_share_end) < 1:
        raise UserError(
            f"teacher_share below 1 wants the policy to go on, but n_teacher={n_teacher} is all of the group: lower it"
        )
    if sft_buffer and replay_share:
        raise UserError("sft_buffer (ReLIFT) and replay_share (ExGRPO) are two methods: set one of them to 0")
    if teacher_model and not (kl_coef or ce_coef):
        raise UserError("teacher_model is of no use without kl_coef or ce_coef: set one, or leave it out")
    if (kl_coef or ce_coef) and not teacher_model and not dry_run:
        raise UserError("kl_coef and ce_coef want a teacher model: name its folder by --teacher_model=FOLDER (for the toy, a"
                        " checkpoint of config/method/sft_verified.py)")  # fmt: skip
    try:
        shape(torch.ones(()), shaping, gamma)
    except ValueError as e:
        raise UserError(str(e)) from None


def check_teachers(problems, tokenizer, verifier):
    """Grade teacher traces as the model's answers are graded. Refuse to start if too few pass: it would mean a
    wrong template or verifier, and train away from the teacher. Returns the problems to train on."""
    traced = [p for p in problems if p.teacher]
    if not traced:
        raise UserError(f"{data} has no teacher trace within max_teacher_tokens={max_teacher_tokens}: add a 'target' "
                        "column, raise the limit, or train without (--n_teacher=0)")  # fmt: skip
    n = len(traced) if verified_only or not preflight_traces else min(preflight_traces, len(traced))
    chosen = mine([traced[i] for i in Order(len(traced), seed).take(n)])
    rows = [(p, i, response_text(tokenizer, ids)) for p in chosen for i, ids in enumerate(p.teacher)]
    verdicts = verifier.score([text for _, _, text in rows], [p.answer for p, _, _ in rows])
    graded = gather_engines([(p.id, i, p.answer, v, text[-60:]) for (p, i, text), v in zip(rows, verdicts, strict=True)])
    failed = sorted(g for g in graded if not g[3].reward)
    share = 1 - len(failed) / len(graded)
    print0(f"teacher traces: {len(graded)} graded, {share:.1%} verified (min_teacher_pass {min_teacher_pass:.0%})")
    if share < min_teacher_pass:
        shown = "; ".join(
            f"row {id}: {v.reason}, answer {answer!r}, trace ends {tail!r}" for id, _, answer, v, tail in failed[:3]
        )
        raise UserError(f"only {share:.1%} of the teacher traces in {data} verify, min_teacher_pass is {min_teacher_pass:.0%}:"
                        f" check template and answers.\n{shown}")  # fmt: skip
    if verified_only:
        bad = {(id, i) for id, i, *_ in failed}
        for p in traced:
            p.teacher = [ids for i, ids in enumerate(p.teacher) if (p.id, i) not in bad]
    return [p for p in problems if p.teacher] if n_teacher == n_rollouts else problems


def canary(policy, engine, problem, stamp):
    """Stop the run if the engine does not give its own tokens the log-probs that the trainer gives them."""
    sample = engine.generate([problem.prompt_ids], [0], temperature, min(max_tokens, 32), stamp)[0]
    batch = pack([(problem.prompt_ids, Rollout(problem.id, sample.ids, 0, sample.logps, ""))]).to(policy.hf.device)
    with torch.no_grad():
        logp, _ = policy(batch)
    gap = (logp - batch.sampler_logp)[batch.loss_mask].abs().mean().item()
    if not gap <= canary_limit:
        raise RuntimeError(f"rank {RANK}: engine and trainer disagree by {gap:.3g} in mean |log-prob|, canary_limit is"
                           f" {canary_limit}: the engine does not hold the policy's weights")  # fmt: skip
    return gap


# ---------------------------------------------------------------- one optimizer step


def update(policy, optimizer, micro_batches, max_norm, terms, safe_point):
    """Forward and backward over the micro-batches, clip, step. terms: batch_loss's switches and coefficients; safe_point()
    is called before each. Returns {name: (sum, count)}, the norm, and whether it stepped: not if loss or norm is not finite
    on any rank, or too large."""
    counts = all_reduce(
        [sum(b.loss_mask.sum().item() for b in micro_batches),
         sum((b.loss_mask & b.is_teacher).sum().item() for b in micro_batches)]
    )  # fmt: skip
    sums = {}
    with heartbeat("update, micro-batches", len(micro_batches)) as show:
        for i, batch in enumerate(micro_batches):
            safe_point()
            show(i)
            last = i == len(micro_batches) - 1
            # FSDP reduces after every micro-batch, because keeping a whole gradient is what it avoids.
            with policy.no_sync() if isinstance(policy, DDP) and not last else contextlib.nullcontext():
                logp, entropy, *top1_logp = policy(batch)
                batch.logp = logp.detach()
                loss = batch_loss(logp, entropy, *(top1_logp or [None]), batch, counts, **terms)
                (loss * WORLD).backward()  # gradients are averaged over ranks, but the denominators are global already
            found = token_metrics(batch.logp, entropy.detach(), batch, "" if sft_coef else shaping, gamma, clip_low, clip_high)
            for name, (total, count) in found.items():
                old = sums.get(name, (0, 0))
                sums[name] = old[0] + total, old[1] + count
            sums["loss"] = sums.get("loss", (0, 0))[0] + loss.item(), 1 / WORLD
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    safe_point()
    broken = all_reduce([not math.isfinite(sums["loss"][0]) or not math.isfinite(norm) or 0 < skip_grad_norm < norm])[0]
    if not broken:
        optimizer.step()
    optimizer.zero_grad()  # now, so that the engine finds their memory free; DDP keeps it for its buckets
    return sums, norm, not broken


# ---------------------------------------------------------------- the run


def main():
    check_knobs(plan_gpus if dry_run else WORLD)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = dtype if dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    teacher_config = load_config(model_path(teacher_model)) if teacher_model and (kl_coef or ce_coef) else None
    if dry_run:
        shape_config = load_config(model_path(model))
        print_plan(config, shape_config, count_rows(repo_path(data)), plan_gpus, True, plan_gib, print0, teacher_config)
        if (kl_coef or ce_coef) and not teacher_model:
            print0("the teacher model is not counted: name it by --teacher_model=FOLDER")
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    start_processes(device, shard)
    found, begun = (None, None) if resume == "no" else find(repo_path(out_dir), print0)
    if begun and begun["step"] >= max_steps and not begun["tail"]:
        return print0(f"nothing to do: {found} has {begun['step']} steps, max_steps is {max_steps}")
    base = found or model_path(model)
    tokenizer = load_tokenizer(base)
    shape_config = load_config(base)
    needed, context = max_prompt_tokens + max(max_tokens, max_teacher_tokens), shape_config.max_position_embeddings
    if needed > context:
        raise UserError(
            f"a prompt and its response may take {needed} tokens, the context of {base} is {context}: lower "
            "max_prompt_tokens and max_tokens, or raise max_position_embeddings (and rope_theta) in its config.json"
        )
    if teacher_config and teacher_config.max_position_embeddings < needed:
        context = teacher_config.max_position_embeddings
        raise UserError(f"sequences may take {needed} tokens, the teacher model's context is {context}: take another teacher")
    if teacher_config and teacher_config.vocab_size < shape_config.vocab_size:
        raise UserError(
            f"the policy may sample any of its {shape_config.vocab_size} embeddings, the teacher model has only"
            f" {teacher_config.vocab_size}: pad it (resize_token_embeddings)"
        )
    if shape_config.num_attention_heads % tensor_parallel:
        raise UserError(f"tensor_parallel={tensor_parallel} must divide the model's {shape_config.num_attention_heads} heads")
    problems = load_problems(repo_path(data), tokenizer, max_prompt_tokens, max_teacher_tokens, require_think, print0)
    problems, held_out = set_aside(problems, holdout)
    if eval_data:
        held_out += load_benchmark(repo_path(eval_data), tokenizer, eval_max_problems, max_prompt_tokens, require_think, print0)
    with Verifier(reward_workers, reward_timeout, require_think, grader) as verifier:
        if n_teacher or any(p.teacher for p in problems):  # on-policy runs learn from it, too, that the verifier works
            problems = check_teachers(problems, tokenizer, verifier)
        if sft_buffer > (traced := sum(bool(p.teacher) for p in problems)):
            raise UserError(
                f"sft_buffer={sft_buffer} but {data} has only {traced} problems with a trace: ReLIFT would never act"
            )
        if prompts_per_step > len(problems):
            raise UserError(
                f"prompts_per_step={prompts_per_step} but {data} has only {len(problems)} usable problems: lower it"
            )
        identity = identify(problems, kind, begun)
        if begun:
            check_same(found, begun, identity, FREE.split(), resume == "force", print0)
        gpu_gib = torch.cuda.mem_get_info()[1] / 2**30 if device == "cuda" else 0
        print_plan(config, shape_config, len(problems), WORLD, device == "cuda", gpu_gib, print0, teacher_config)
        make_folder(repo_path(out_dir))  # before the time is spent
        if log == "wandb" and RANK == 0:
            identity["wandb_id"] = start_wandb(os.path.basename(repo_path(out_dir)), config, (begun or {}).get("wandb_id"))
        policy = load_policy(base, temperature, getattr(torch, kind), device, shard == "fsdp", recompute)
        print0(f"attention: {policy.hf.config._attn_implementation}, of {attention_backends(device, getattr(torch, kind))}")
        length = max_prompt_tokens + max(max_tokens, max_teacher_tokens if min(teacher_share, teacher_share_end) < 1 else 0)
        engine = None
        if n_teacher == n_rollouts and not held_out:
            print0("nothing is sampled: no engine")
        elif wants_vllm(sampler):
            engine = VLLMSampler(
                base, tokenizer.eos_token_id, length, kind, gpu_memory, seed + RANK // tensor_parallel, tensor_parallel
            )
        else:
            engine = TorchSampler(shape_config, tokenizer.eos_token_id, length, kind)
        if engine:
            engine.sleep()
        teacher = None
        if teacher_config:
            folder = model_path(teacher_model)
            check_same_tokens(tokenizer, load_tokenizer(folder))
            sharded = shard == "fsdp"
            teacher = load_policy(
                folder, temperature, getattr(torch, kind), device, sharded, frozen=True, offload=teacher_offload
            )
        with Guard(hang_timeout) as guard:
            train(policy, engine, verifier, tokenizer, problems, held_out, teacher, guard, identity, found, begun)
    if engine:
        engine.close()
    if log == "wandb" and RANK == 0:
        end_wandb(guard.agreed)
    if dist.is_initialized() and (WORLD > 1 or shard == "fsdp"):
        if WORLD > 1:
            dist.barrier()  # nobody leaves while another still needs it
        dist.destroy_process_group()
    return 128 + guard.agreed if guard.agreed else 0


def train(policy, engine, verifier, tokenizer, problems, held_out, teacher, guard, identity, found, begun):
    """The loop. found, begun: the checkpoint that it goes on from and its run.json, or None; identity: what that holds for
    check_same."""
    folder = open_folder(begun)
    by_id = {p.id: p for p in problems}
    wrapped = DDP(policy, gradient_as_bucket_view=True) if WORLD > 1 and shard == "ddp" else policy
    options = dict(betas=(beta1, beta2), weight_decay=weight_decay, fused=True)  # else a GPU holds 4 bytes a weight in passing
    optimizer = torch.optim.AdamW(policy.parameters(), learning_rate, **options)
    sft_optimizer = torch.optim.AdamW(policy.parameters(), sft_learning_rate, **options)
    failed, successes = FailedQuestions(), Successes(n_rollouts, replay_start, replay_limit)
    terms = dict(shaping=shaping, gamma=gamma, clip_low=clip_low, clip_high=clip_high, loss_constant=loss_constant,
                 policy_coef=policy_coef, entropy_coef=entropy_coef, sft_coef=sft_coef, kl_coef=kl_coef,
                 tis_cap=tis_cap)  # fmt: skip
    sft_terms = dict(policy_coef=0.0, sft_coef=1.0, entropy_coef=sft_entropy_coef)
    optimizers = {"adamw": optimizer} | ({"sft": sft_optimizer} if sft_buffer else {})
    kept = failed if sft_buffer else successes if replay_share else None
    # At the last step's end: its number, where the order stood, and what is known of the step if its evaluation is missing.
    done, stood, tail = 0, {}, {"step": 0}
    n_updates = 0  # optimizer steps taken: the stamp of the weights
    n_skipped = 0  # updates skipped in a row
    saved = None  # the step whose end is saved
    unwritten = []  # lines of metrics.jsonl that the disk refused
    at_verifier = []  # (rollout, the verifier's handle) of this step
    if begun:
        done, stood, tail, n_updates, n_skipped = (begun[k] for k in ("step", "order", "tail", "n_updates", "n_skipped"))
        print0(f"going on after step {done}: {found}")
        saved, memory = done, restore(found, begun, policy, optimizers)
        if kept and memory:
            kept.load_state_dict(memory)
    order = Order(len(problems), seed, **stood)
    past = rewind(folder, done, not tail) if RANK == 0 and begun else []
    curve = [row["reward/own"] for row in past if "reward/own" in row]

    def save_boundary(must=True):
        """Save the last step's end, if it is not yet."""
        nonlocal saved
        if saved == done:
            return
        guard.phase(done, "checkpoint")
        state = {"step": done, "order": stood, "tail": tail, "n_updates": n_updates, "n_skipped": n_skipped}
        memory = kept.state_dict() if kept else {}
        try:  # a checkpoint must not be ahead of its curve
            together(lambda: write_metrics(folder, unwritten) if unwritten and RANK == 0 else None)
            unwritten.clear()
            save(folder, done, policy, tokenizer, optimizers, memory, {**state, **identity}, guard.progress)
        except NotSaved as e:
            if must:
                raise UserError(f"{e}; --resume=auto goes on from the one before") from None
            return print0(f"warning: {e}; the next try is after the next step")
        saved, guard.save_now = done, False
        write(prune, folder, done, keep_last, keep_every)

    def write(function, *arguments):
        """On rank 0, write what is for people: a disk that refuses it does not end the run. Returns whether it took it."""
        try:
            if RANK == 0:
                function(*arguments)
            return True
        except OSError as e:
            return print(f"warning: {function.__name__}: {e}", flush=True)

    def step_or_skip(*arguments):
        """update(), counted. Returns its sums and norm, or None if it did not step."""
        nonlocal n_updates, n_skipped
        sums, norm, stepped = update(wrapped, *arguments, guard.safe_point)
        guard.droppable = False
        n_updates += stepped
        n_skipped = 0 if stepped else n_skipped + 1
        if stepped:
            return sums, norm
        print0(f"update skipped, {n_skipped} in a row: loss {sums['loss'][0]:.3g} on rank 0, gradient norm {norm:.3g}")
        if n_skipped >= max_skipped:
            raise FloatingPointError(f"{n_skipped} updates in a row were skipped: lower learning_rate, or look at the rollouts")
        return None

    def sync():
        if engine and engine.stamp != n_updates:
            engine.load(policy.hf, n_updates)

    def evaluation(step):
        """Greedy and sampled accuracy on the held-out problems, all ranks sharing the work."""
        sync()
        guard.phase(step, "evaluation")
        table, record = {}, {}
        modes = [("greedy", 1, 0.0)] * eval_greedy + [("avg@k", eval_k, eval_temperature)] * (eval_k > 0)
        for name, k, t in modes:
            with guard.interruptible():
                rows = evaluate(mine(held_out), engine, verifier, tokenizer, n_updates, k, t, max_tokens, seed)
            rows = gather_engines(rows)
            by_source = summarize(rows)
            for source, row in by_source.items():
                entry = table.setdefault(source, {"n": row["n"]})
                entry |= {"greedy": row["avg@k"]} if name == "greedy" else row
                record |= {f"eval/{name}/{source}": row["avg@k"]} if len(by_source) > 1 else {}
            record[f"eval/{name}"] = sum(sum(r["reward"]) / k for r in rows) / len(rows)
        write(write_json, os.path.join(folder, f"eval_{step}.json"), table)
        print0("\n".join(eval_report(table, rows)))
        return record

    def next_batch(step):
        """The step's problems, and of those that replay a stored success (ExGRPO) {id: Rollout}: the success over which
        the policy's mean entropy is lowest now."""
        rng = np.random.default_rng([seed, step])
        drawn = successes.draw(int(prompts_per_step * replay_share), rng)
        n_fresh, skip, batch = prompts_per_step - len(drawn), successes.retired | set(drawn), []
        if len(problems) - len(skip) < n_fresh:
            skip = set(drawn)  # too few are left: retired questions serve again
        while len(batch) < n_fresh:
            fresh = [problems[i] for i in order.take(n_fresh - len(batch))]
            batch += [p for p in fresh if p.id not in skip and p not in batch]
        if not drawn:
            return batch, {}
        stored = [(q, ids.tolist(), logps.tolist()) for q in drawn for ids, logps in successes.samples[q]]
        pairs = [(by_id[q].prompt_ids, Rollout(q, ids, len(ids), logps, "replay")) for q, ids, logps in stored]
        replays = {}
        for _, i in sorted(zip(mean_entropies(policy, pairs), range(len(pairs)), strict=True)):
            replays.setdefault(pairs[i][1].problem, pairs[i][1])
        batch += [by_id[q] for q in drawn]
        return [batch[i] for i in rng.permutation(len(batch))], replays

    def remember(rollouts):
        """Let ExGRPO and ReLIFT see the batch's own samples; take ReLIFT's SFT step if it is due. Returns metrics."""
        groups, record = {}, {}
        for r in rollouts:
            if not r.n_teacher_tokens:
                groups.setdefault(r.problem, []).append(r)
        if replay_share:
            successes.observe(groups)
            record |= {"replay/questions": len(successes.samples), "replay/retired": len(successes.retired)}
        if sft_buffer:
            failed.observe({q: rows for q, rows in groups.items() if by_id[q].teacher})
            if due := [by_id[q] for q in failed.take(sft_buffer)]:
                pairs = [(p.prompt_ids, Rollout(p.id, p.teacher[0], len(p.teacher[0]), [], "teacher")) for p in due]
                micro_batches = [b.to(policy.hf.device) for _, b in spread(pairs, micro_tokens, RANK, WORLD)]
                if result := step_or_skip(sft_optimizer, micro_batches, sft_grad_clip, sft_terms):
                    record |= {"relift/sft_loss": means(result[0])["loss"], "relift/grad_norm": result[1]}
            record["relift/waiting"] = len(failed.queue)
        return record

    def grade(rollout):
        """Hand a rollout that is whole to the verifier."""
        text = response_text(tokenizer, rollout.response_ids)
        at_verifier.append((rollout, verifier.submit(text, by_id[rollout.problem].answer)))

    def finish(step):
        """What follows a step's updates, and step 0: canary, evaluation, its line in metrics.jsonl."""
        nonlocal tail
        record = dict(tail)
        if engine and step and canary_interval and step % canary_interval == 0:
            sync()
            record["mismatch/canary"] = canary(policy, engine, problems[0], n_updates)
        if held_out and (eval_greedy or eval_k) and (step in (0, max_steps) or (eval_interval and step % eval_interval == 0)):
            record |= evaluation(step)
        unwritten.append(record)
        if write(write_metrics, folder, unwritten):
            unwritten.clear()
        if log == "wandb" and RANK == 0:
            to_wandb(record)
        tail = None

    guard.on_stop = save_boundary
    verifier.tick = guard.tick
    if engine:  # ranks that share an engine must step alike
        engine.tick = guard.tick if tensor_parallel == 1 else guard.progress
        sync()
        gap = canary(policy, engine, problems[0], n_updates)
        print0(f"canary: engine and trainer agree to {gap:.1e} in mean |log-prob| (limit {canary_limit})")
        if not begun:
            tail["mismatch/canary"] = gap
    print0(f"process {os.getpid()}: SIGUSR1 saves a checkpoint, SIGTERM and SIGINT save and end")
    if tail:
        finish(done)
        if begun and done == max_steps:
            saved = None
            save_boundary()
    start, first, late = time.time(), done, False
    for step in range(done + 1, max_steps + 1):
        reseed(step)
        phases = Phases(lambda name, step=step: guard.phase(step, name))
        # 1. The engine takes over the policy's weights.
        phases.begin("sync")
        sync()
        # 2. Roll out: own samples from the engine, traces or replays beside them. Each engine has its own prompts.
        phases.begin("rollout")
        batch, replays = next_batch(step)
        share = teacher_share + (teacher_share_end - teacher_share) * (step - 1) / max(1, max_steps - 1)
        with guard.interruptible():
            rollouts = roll_out(engine, mine(batch), n_rollouts, n_teacher, temperature, max_tokens, seed, step, n_updates,
                                share, replays, grade)  # fmt: skip
            if engine:
                engine.sleep()
            # 3. Reward: the verifier grades samples and traces alike, most of them while others are still sampled.
            phases.begin("reward")
            for (r, _), v in zip(at_verifier, verifier.collect([handle for _, handle in at_verifier]), strict=True):
                r.reward, r.reason = v.reward, v.reason
            at_verifier.clear()
        place = {p.id: i for i, p in enumerate(batch)}  # from here every rank knows the whole batch
        rollouts = sorted(gather_engines(rollouts), key=lambda r: place[r.problem])
        phases.begin("update")
        # 4. Advantage: reward minus the mean of the group, teacher included.
        rewards, groups = torch.tensor([r.reward for r in rollouts]), torch.tensor([r.problem for r in rollouts])
        is_own = torch.tensor([r.n_teacher_tokens == 0 for r in rollouts])
        advantages = group_advantages(rewards, groups, use_std, is_own if baseline == "own" else None)
        for r, a in zip(rollouts, advantages.tolist(), strict=True):
            r.advantage = a
        trained = worth_training(rollouts)
        # 5. Pack: each update's sequences are spread over the ranks by tokens, and cut into as many micro-batches
        # on every rank.
        updates, cuts = [], []
        for u in range(update_batches):
            pairs = [(by_id[r.problem].prompt_ids, r) for r in trained if place[r.problem] * update_batches // len(batch) == u]
            if pairs:
                cut = [(i, b.to(policy.hf.device)) for i, b in spread(pairs, micro_tokens, RANK, WORLD)]
                updates.append([b for _, b in cut])
                cuts.append((pairs, cut))
        # 6. Old log-probs, for the updates that will find the policy moved; the first is its own. And the teacher
        # model's opinion of every token.
        with torch.no_grad():
            for micro_batch in (b for micro_batches in updates[1:] for b in micro_batches):
                guard.safe_point()
                micro_batch.old_logp, _ = policy(micro_batch)
        terms["ce_coef"] = ce_coef * max(0.0, 1 - (step - 1) / ce_steps) if ce_steps else ce_coef
        if updates and (kl_coef or terms["ce_coef"]):
            ask(teacher, [b for micro_batches in updates for b in micro_batches], terms["ce_coef"] > 0, len(tokenizer))
        # 7. Update, and what methods with memory do after it.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step)
        results = [step_or_skip(optimizer, micro_batches, grad_clip, terms) for micro_batches in updates]
        record = {"step": step, **rollout_metrics(rollouts), "groups/trained": len(trained) / len(rollouts)}
        guard.droppable = False  # also where no group was worth an update
        record |= remember(rollouts)
        phases.end()
        # 8. Log.
        record["updates/skipped"] = results.count(None)
        if results := [r for r in results if r]:  # none, if every group was left out
            record |= means(merge([s for s, _ in results]))
            record["grad_norm"] = sum(n for _, n in results) / len(results)
        record |= {"micro_batches": sum(map(len, updates)), "lr": group["lr"], **phases.record}
        if rollout_interval and step % rollout_interval == 0:
            note_teacher_logps(cuts)
            write(write_rollouts, folder, step, rollouts, by_id, tokenizer)
        curve += [record["reward/own"]] if "reward/own" in record else []
        for warning in (*batch_warnings(rollouts), *collapse(curve)):
            print0(f"warning: {warning}")
        print0(step_line(record, max_steps, (time.time() - start) / (step - first) * (max_steps - step)))
        if step == first + 1:
            print0(phases.ledger())
        gap = record.get("mismatch/abs", math.nan)  # missing where it is not finite
        if "ratio/own" in record and not gap <= canary_limit:
            raise RuntimeError(f"engine and trainer disagree by {gap:.3g} in mean |log-prob| over a batch,"
                               f" canary_limit is {canary_limit}: the engine does not hold the policy's weights")  # fmt: skip
        # 9. The step is a whole. Canary, evaluation, checkpoint.
        done, stood, tail, guard.droppable = step, order.state(), finite(record), True
        finish(step)
        guard.agree()
        late = late or step == max_steps or guard.save_now or (save_interval > 0 and step % save_interval == 0)
        if late:
            save_boundary(must=step == max_steps)
            late = saved != step
    print0(f"done in {time.time() - start:.0f} s: {folder}")


def schedule(step):
    """The learning rate's factor: a linear warm-up, then constant, or a cosine's half that ends at zero."""
    if step <= warmup_steps:
        return step / warmup_steps
    if lr_schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))


def worth_training(rollouts):
    """The rollouts to train on: all, or without those that DAPO leaves out."""
    if skip_equal_groups:
        rewards = {}
        for r in rollouts:
            rewards.setdefault(r.problem, set()).add(r.reward)
        rollouts = [r for r in rollouts if len(rewards[r.problem]) > 1]
    return [r for r in rollouts if not (skip_truncated and r.finish_reason == "length")]


def note_teacher_logps(cuts):
    """Let the rollouts know, on all ranks, how probable the policy found the teacher's tokens. cuts: of each update
    (pairs, [(indices into pairs, Packed), ...])."""
    found = []
    for u, (pairs, cut) in enumerate(cuts):
        for rows, batch in cut:
            logps, ends = batch.logp.tolist(), batch.cu_seqlens.tolist()
            for i, end in zip(rows, ends[1:], strict=False):
                r = pairs[i][1]
                first = end - len(r.response_ids)
                if r.n_teacher_tokens:
                    found.append((u, i, logps[first : first + r.n_teacher_tokens]))
    for u, i, logps in gather(found):
        cuts[u][0][i][1].teacher_logps = logps


@torch.no_grad()
def mean_entropies(policy, pairs):
    """The policy's mean entropy over each response, a list in the order of pairs. All ranks share the work."""
    found = []
    for cut, batch in spread(pairs, micro_tokens, RANK, WORLD):
        _, entropy = policy(batch.to(policy.hf.device))
        ends = batch.cu_seqlens.tolist()
        for i, start, end in zip(cut, ends, ends[1:], strict=False):
            found.append((i, entropy[start:end].sum().item() / len(pairs[i][1].response_ids)))
    return [value for _, value in sorted(gather(found))]


@torch.no_grad()
def ask(teacher, micro_batches, want_top1, n_tokens):
    """Put the teacher model's log-probs into the batches, and its first choices if wanted; a choice that is no token of
    ours, n_tokens in all, counts as none."""
    device = micro_batches[0].input_ids.device
    if teacher_offload and shard != "fsdp":
        teacher.to(device)
    for batch in micro_batches:
        batch.teacher_logp, top1 = teacher.judge(batch)
        if want_top1:
            batch.top1 = torch.where(top1 < n_tokens, top1, -1)
    if teacher_offload and shard != "fsdp":
        teacher.to("cpu")


def reseed(step):
    """Whatever draws from python's, numpy's or torch's own generators draws the same in a run that was resumed. Nothing
    here does: orders and samples have seeds of their own."""
    key = request_seed(seed, "step", step, RANK)
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key)


# Knobs that may change in a run that is resumed: of its length, of what it shows, of the machine; and paths, because what
# they lead to is compared.
FREE = """data eval_data model teacher_model grader out_dir resume max_steps max_skipped min_teacher_pass preflight_traces
    eval_interval eval_greedy eval_k eval_temperature eval_max_problems save_interval keep_last keep_every rollout_interval log
    shard recompute tensor_parallel teacher_offload micro_tokens gpu_memory reward_workers canary_interval canary_limit
    hang_timeout plan_gpus plan_gib"""


def identify(problems, kind, begun):
    """What two runs must share to be one, and whose they are."""
    own, inputs = repo_path(grader), {}
    if RANK == 0:  # it reads every file whole
        inputs = {"data": fingerprint(repo_path(data)), "grader": fingerprint(own) if os.path.isfile(own) else grader}
        for name, folder in (("model", model), ("teacher_model", teacher_model)):
            if folder:  # one that is gone, or the hub's, is not needed to go on
                there = not begun or os.path.isdir(repo_path(folder))
                inputs[name] = weights_digest(model_path(folder)) if there else begun["inputs"].get(name)
    return {
        "knobs": {**config, "sampler": "vllm" if wants_vllm(sampler) else "torch", "dtype": kind},
        "inputs": {**gather([inputs])[0], "problems": len(problems)},
        "world_size": WORLD,
        "written_by": provenance(),
    }


def open_folder(begun):
    """Make out_dir, moving a run found there aside unless this one goes on from it, and write config.json."""
    folder = repo_path(out_dir)
    if RANK == 0:
        if not begun and os.path.isdir(folder) and os.listdir(folder):
            n = 1
            while os.path.exists(f"{folder}.{n}"):
                n += 1
            try:
                os.rename(folder, f"{folder}.{n}")
            except OSError as e:
                raise UserError(
                    f"{folder} is not empty and cannot be moved aside ({e.strerror}): take another out_dir"
                ) from None
            print0(f"{folder} is not empty: moved to {folder}.{n}")
        make_folder(os.path.join(folder, "rollouts"))
        try:
            if begun:
                put_aside(folder, begun["step"])
            write_json(os.path.join(folder, "config.json"), {**config, "world_size": WORLD, **provenance()})
        except OSError as e:
            raise UserError(f"out_dir {folder} cannot be written: {e.strerror}") from None
    if WORLD > 1:
        dist.barrier()
    return folder


if __name__ == "__main__":
    code = run(main)
    # gloo's threads may still hold tensors, and then abort a process whose interpreter is shutting down. With a tensor
    # parallel engine on CPUs the lesser evil is to let it: vLLM's shared memory is only removed on the way.
    if WORLD > 1 and tensor_parallel == 1:
        sys.stdout.flush()
        os._exit(code or 0)
    sys.exit(code)
