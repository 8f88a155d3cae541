"""
Checks before step 1, so that mistakes are found before a GPU is used and before anything is written. They raise UserError,
which names the knob or the file, and the remedy. k: all knobs of train.py, as attributes.
"""

import contextlib
import importlib.util
import os
import time
from itertools import compress

import torch

from configurator import UserError
from data import Order
from runtime.files import load_config, model_path
from runtime.plan import count_parameters, print_plan
from runtime.ranks import WORLD, gather_engines, mine, number, print0
from runtime.rows import count_rows, data_path
from runtime.tokenizer import check_same_tokens, load_tokenizer, response_text

CORES, QUOTA = "/proc/stat", "/sys/fs/cgroup/cpu.max"  # what Linux tells of the cores, and of a container's share of them


def warn_of_busy_cores(device):
    """On a CPU: print one line if this machine's ranks have more threads than there are cores free for them. Threads wait for
    each other at the end of each product, so one that finds no core stops all. The load average would not do: it lags a minute
    behind, and counts the run that has just ended. Linux only."""
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        return
    with contextlib.suppress(OSError):
        cores = os.sched_getaffinity(0)
        before, _, after = core_times(cores), time.sleep(0.25), core_times(cores)
        spent = [[b - a for a, b in zip(*looks, strict=True)] for looks in zip(before, after, strict=True)]
        others = sum(busy / max(1, busy + idle) for busy, idle in spent)
        usable = min(len(cores), cpu_quota())
        if (ours := threads * number("LOCAL_WORLD_SIZE", 1)) > min(usable, len(cores) - others) + 0.5:
            print0(
                f"warning: {ours} threads for {usable:g} cores, and other processes keep {others:.1f} of them busy: a step may"
                " take 20 times as long; set OMP_NUM_THREADS=1, or have the machine to yourself"
            )


def core_times(cores):
    """[(busy, idle), ...] in clock ticks since the start of the machine, of the cores with these numbers."""
    with open(CORES) as f:
        rows = [line.split() for line in f if line.startswith("cpu")]
    times = [list(map(int, times[:8])) for name, *times in rows if name[3:].isdecimal() and int(name[3:]) in cores]
    return [(sum(t) - t[3] - t[4], t[3] + t[4]) for t in times]  # user nice system idle iowait irq softirq steal


def cpu_quota():
    """How many cores this container may use; infinity without a limit."""
    try:
        with open(QUOTA) as f:
            quota, period = f.read().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no container, or "max"
        return float("inf")


def check_knobs(k, n_ranks, shape):
    """Check knobs against each other and against the number of processes. shape: loss.shape, which knows the shapings."""
    for how in (k.shaping, k.sft_shaping):
        try:
            shape(torch.ones(()), how, k.gamma)
        except ValueError as e:
            raise UserError(str(e)) from None
    if k.shape_own and k.shaping in ("log", "p_log"):
        raise UserError(f"shape_own divides by f, which is not above 0 with shaping={k.shaping}: choose luffy, sqrt or pow")
    if k.cispo and (k.shape_own or not (k.clip_low or k.clip_high)):
        raise UserError("cispo is a way to clip the ratio: set clip_high or clip_low, and shape_own=False")
    if n_ranks % k.tensor_parallel:
        raise UserError(f"tensor_parallel={k.tensor_parallel} must divide the {n_ranks} process(es) that torchrun started")
    n_engines = n_ranks // k.tensor_parallel
    if k.prompts_per_step % k.update_batches or k.prompts_per_step % n_engines:
        raise UserError(
            f"prompts_per_step={k.prompts_per_step} must be a multiple of update_batches={k.update_batches} and of the number"
            f" of engines, {n_engines}"
        )
    if k.shard == "none" and n_ranks > 1:
        raise UserError(f"shard={k.shard!r} with {n_ranks} process(es): choose ddp or fsdp, or none for one process")
    if k.n_teacher > k.n_rollouts:
        raise UserError(f"n_teacher={k.n_teacher} must lie between 0 and n_rollouts={k.n_rollouts}")
    if k.max_prompt_tokens + max(k.max_tokens, k.max_teacher_tokens) > k.micro_tokens:
        raise UserError(f"micro_tokens={k.micro_tokens} cannot hold a prompt and its response at their limits: raise it")
    if k.log != "jsonl" and not k.dry_run and not getattr(importlib.util.find_spec(k.log), "origin", None):
        # A folder named wandb, which the package creates where it runs, has a spec, but no origin.
        raise UserError(f"log={k.log!r} needs its package: pip install {k.log}, or set log=jsonl; metrics.jsonl is always"
                        " written")  # fmt: skip
    if k.baseline == "own" and k.n_teacher == k.n_rollouts:
        raise UserError(f"baseline='own' needs own samples, but n_teacher={k.n_teacher} leaves none: set baseline='group'")
    if not k.sft_coef and (k.sft_mix or k.sft_warmup_steps or k.sft_decay_steps or k.sft_coef_end or k.sft_shaping != "log"):
        raise UserError(
            "sft_shaping, sft_mix, sft_warmup_steps, sft_decay_steps and sft_coef_end have no effect with sft_coef=0: set it"
        )
    if k.sft_mix and not k.n_teacher:
        raise UserError("sft_mix gives a share of the policy term to the traces, and n_teacher=0 has none: set n_teacher, or"
                        " sft_mix=False")  # fmt: skip
    if k.sft_coef_end and not k.sft_decay_steps:
        raise UserError(f"sft_coef_end={k.sft_coef_end} is never reached with sft_decay_steps=0: set sft_decay_steps")
    if k.sft_mix and max(k.sft_coef, k.sft_coef_end) > 1:
        raise UserError(f"sft_mix gives the policy term 1 - sft_coef, which is negative with {max(k.sft_coef, k.sft_coef_end)}:"
                        " set sft_coef and sft_coef_end to at most 1")  # fmt: skip
    shares = k.teacher_share, k.teacher_share_end, k.teacher_share_low
    if not k.train_teacher and (k.sft_coef or k.sft_buffer or k.teacher_top_entropy < 1):
        raise UserError("train_teacher=False leaves no trace to learn: set sft_coef=0, sft_buffer=0 and teacher_top_entropy=1")
    if not k.train_teacher and k.n_teacher and min(shares) == 1:
        raise UserError(
            "train_teacher=False trains what the policy writes behind a cut trace, and none is cut: lower teacher_share"
        )
    if k.sft_coef and k.teacher_top_entropy < 1:
        raise UserError(
            "teacher_top_entropy chooses who carries the advantage, and with sft_coef no trace does: set one of them"
        )
    if k.teacher_gate >= 0 and not k.n_teacher:
        raise UserError(f"teacher_gate={k.teacher_gate} has no effect with n_teacher=0: set n_teacher, or teacher_gate=-1")
    if k.teacher_gate >= max(0, k.n_rollouts - k.n_teacher):
        raise UserError(
            f"teacher_gate={k.teacher_gate} must be below n_rollouts - n_teacher = {k.n_rollouts - k.n_teacher}, so that there"
            " are wrong samples whose places the traces take"
        )
    if k.teacher_gate >= 0 and k.sft_coef and k.baseline == "own":
        raise UserError("teacher_gate with sft_coef leaves some groups no own sample: set baseline='group', which is the mean"
                        " of own samples wherever there is one")  # fmt: skip
    if k.teacher_gate >= 0 and k.sft_coef and min(shares) < 1:
        raise UserError("teacher_gate with sft_coef leaves the trace alone in its group, so what the policy writes behind a cut"
                        " one has no baseline: set teacher_share=1")  # fmt: skip
    if k.teacher_share_low < 1 and k.teacher_share_low > max(k.teacher_share, k.teacher_share_end):
        raise UserError(f"teacher_share_low={k.teacher_share_low} is above teacher_share and teacher_share_end: lower it, or"
                        " set it to 1 for shares that are not random")  # fmt: skip
    if k.replay_share and k.n_teacher:
        raise UserError("replay_share puts a replayed sample in the place of a trace: set n_teacher=0")
    if k.n_teacher == k.n_rollouts and min(shares) < 1:
        raise UserError(
            f"teacher_share below 1 lets the policy continue a trace, but with n_teacher={k.n_teacher} nothing is sampled:"
            " lower n_teacher"
        )
    if k.sft_buffer and k.replay_share:
        raise UserError("sft_buffer (ReLIFT) and replay_share (ExGRPO) are two methods: set one of them to 0")
    asks_teacher = k.kl_coef or k.ce_coef or k.top1_bonus
    if k.ce_steps and not (k.ce_coef or k.top1_bonus):
        raise UserError(f"ce_steps={k.ce_steps} has no effect without ce_coef or top1_bonus: set one of them, or ce_steps=0")
    if k.top1_bonus and not k.policy_coef:
        raise UserError("top1_bonus is part of the advantage, and policy_coef=0 leaves it out of the loss: set one of them")
    if asks_teacher and k.n_teacher == k.n_rollouts:
        raise UserError(
            f"kl_coef, ce_coef and top1_bonus are of own samples, and n_teacher={k.n_teacher} leaves none: lower it"
        )
    if k.teacher_model and not asks_teacher:
        raise UserError("teacher_model has no effect without kl_coef, ce_coef or top1_bonus: set one of them, or leave it out")
    if asks_teacher and not k.teacher_model and not k.dry_run:
        raise UserError("kl_coef, ce_coef and top1_bonus need a teacher model: set --teacher_model=FOLDER (for the toy task, a"
                        " checkpoint of config/method/sft_verified.py)")  # fmt: skip


def dry_run(k):
    """Print the plan, from the models' configs only. Returns the exit code."""
    teacher_config = load_config(model_path(k.teacher_model)) if k.teacher_model else None
    n_problems = count_rows(data_path(k.data))
    print_plan(vars(k), load_config(model_path(k.model)), n_problems, k.plan_gpus, on_gpu=True, gpu_gib=k.plan_gib, log=print0,
               teacher_config=teacher_config)  # fmt: skip
    if (k.kl_coef or k.ce_coef or k.top1_bonus) and not k.teacher_model:
        print0("the teacher model is not counted: set --teacher_model=FOLDER")
    return 0


def show_plan(k, model_config, teacher_config, problems, device):
    """Print the plan of this run on this machine."""
    gpu_gib = torch.cuda.mem_get_info()[1] / 2**30 if device == "cuda" else 0
    print_plan(vars(k), model_config, len(problems), WORLD, on_gpu=device == "cuda", gpu_gib=gpu_gib, log=print0,
               teacher_config=teacher_config)  # fmt: skip


def check_architecture(name, config, needed):
    """Raise UserError for what model.py does not compute: attention over a window that sequences of `needed` tokens may exceed,
    or by another rule; capped or scaled logits; quantized weights."""
    get = lambda field: getattr(config, field, None)
    kinds, window = {*(get("layer_types") or ())}, get("sliding_window")
    other = kinds - {"full_attention", "sliding_attention"}
    if other or (window and needed > window and kinds != {"full_attention"}):
        what = (
            f"has layers of {', '.join(sorted(other))}" if other else f"attends over the last {window} of up to {needed} tokens"
        )
        raise UserError(f"{name} {what}, which training does not compute: choose a model of full attention")
    for field in ("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale"):
        if get(field) not in (None, 1):
            raise UserError(f"{name} has {field}={get(field)}, which training does not compute: choose another model")
    if get("quantization_config"):
        raise UserError(f"the weights of {name} are quantized: choose the model in bfloat16")


def check_models(k, base, tokenizer, model_config):
    """Check the models' contexts, vocabularies and heads. base: the policy's name. Returns the teacher model's config, or
    None without one."""
    teacher_config = load_config(model_path(k.teacher_model)) if k.teacher_model else None
    needed, context = k.max_prompt_tokens + max(k.max_tokens, k.max_teacher_tokens), model_config.max_position_embeddings
    if needed > context:
        raise UserError(
            f"a prompt and its response may take {needed} tokens, the context of {base} is {context}: lower "
            "max_prompt_tokens and max_tokens, or raise max_position_embeddings (and rope_theta) in its config.json"
        )
    check_architecture(base, model_config, needed)
    if teacher_config:
        check_architecture(k.teacher_model, teacher_config, needed)
    parameters = count_parameters(model_config)
    if parameters.active < parameters.all:
        raise UserError(f"{base} is a mixture of experts, which only a teacher model may be: choose a dense model")
    if teacher_config and teacher_config.max_position_embeddings < needed:
        context = teacher_config.max_position_embeddings
        raise UserError(f"sequences may take {needed} tokens, the teacher model's context is {context}: choose another teacher")
    if teacher_config:
        check_same_tokens(tokenizer, load_tokenizer(model_path(k.teacher_model)))
    if teacher_config and teacher_config.vocab_size < model_config.vocab_size:
        raise UserError(
            f"the policy may sample any of its {model_config.vocab_size} embeddings, the teacher model has only"
            f" {teacher_config.vocab_size}: pad it by prepare.py align"
        )
    if model_config.num_attention_heads % k.tensor_parallel:
        raise UserError(f"tensor_parallel={k.tensor_parallel} must divide the model's {model_config.num_attention_heads} heads")
    return teacher_config


def check_traces(k, problems, tokenizer, verifier):
    """Grade teacher traces as the model's answers are graded, and raise UserError if too few pass: with a wrong template or
    verifier a run would learn to avoid the teacher's answers. For an on-policy run it is a check of the verifier. Returns
    the problems to train on, with verified_only without the traces that fail."""
    traced = [p for p in problems if p.teacher]
    if not traced and k.n_teacher:
        raise UserError(f"{k.data} has no teacher trace within max_teacher_tokens={k.max_teacher_tokens}: add a 'target' "
                        "column, raise the limit, or train without traces (--n_teacher=0)")  # fmt: skip
    if not traced:
        return problems
    n = len(traced) if k.verified_only or not k.preflight_traces else min(k.preflight_traces, len(traced))
    chosen = mine([traced[i] for i in Order(len(traced), k.seed).take(n)], k.tensor_parallel)
    rows = [(p, i, response_text(tokenizer, ids)) for p in chosen for i, ids in enumerate(p.teacher)]
    verdicts = verifier.score([text for _, _, text in rows], [p.answer for p, _, _ in rows])
    graded = [(p.id, i, p.answer, v, text[-60:]) for (p, i, text), v in zip(rows, verdicts, strict=True)]
    graded = gather_engines(graded, k.tensor_parallel)
    failed = sorted(g for g in graded if g[3].reason != "correct")
    share = 1 - len(failed) / len(graded)
    print0(f"teacher traces: {len(graded)} graded, {share:.1%} verified (min_teacher_pass {k.min_teacher_pass:.0%})")
    if share < k.min_teacher_pass:
        shown = "; ".join(
            f"row {id}: {v.reason}, reward {v.reward:g}, answer {answer!r}, trace ends {tail!r}"
            for id, _, answer, v, tail in failed[:3]
        )
        raise UserError(f"only {share:.1%} of the teacher traces in {k.data} verify, min_teacher_pass is"
                        f" {k.min_teacher_pass:.0%}: check template and answers.\n{shown}")  # fmt: skip
    if k.verified_only:
        bad = {(id, i) for id, i, *_ in failed}
        for p in traced:
            kept = [(p.id, i) not in bad for i in range(len(p.teacher))]
            p.teacher, p.teacher_logps = list(compress(p.teacher, kept)), list(compress(p.teacher_logps, kept))
    return [p for p in problems if p.teacher] if k.n_teacher == k.n_rollouts else problems


def check_ids(problems, tokenizer, model_config):
    """Check that every token has an embedding."""
    top = max(max(ids) for p in problems for ids in (p.prompt_ids, *p.teacher))
    if top >= model_config.vocab_size:
        raise UserError(f"the token {tokenizer.decode([top])!r} has the id {top}, the model only {model_config.vocab_size}"
                        " embeddings: take the model's own tokenizer, or make room with resize_token_embeddings")  # fmt: skip


def check_problems(k, problems):
    """Check that there are enough problems."""
    traced = sum(bool(p.teacher) for p in problems)
    if k.sft_buffer > traced:
        raise UserError(
            f"sft_buffer={k.sft_buffer} but {k.data} has only {traced} problems with a trace, so no SFT step would be due:"
            " lower it"
        )
    if k.prompts_per_step > len(problems):
        raise UserError(
            f"prompts_per_step={k.prompts_per_step} but {k.data} has only {len(problems)} usable problems: lower it"
        )
