"""
What a run measures, writes and shows: the metrics of a batch, the phases of a step, the line per step, and the files
metrics.jsonl and rollouts/step_N.jsonl.
"""

import contextlib
import errno
import glob
import json
import math
import os
import re
import time

from configurator import UserError
from data import response_text
from eval import best_and_worst, write_lines
from loss import shape
from plan import measured_memory


def token_metrics(logp, entropy, batch, shaping, gamma, clip_low, clip_high):
    """{name: (sum, count)} over this micro-batch's tokens. shaping "": teacher tokens are not shaped."""
    teacher = batch.loss_mask & batch.is_teacher & batch.sampler_logp.isnan()  # without what is replayed
    own = batch.loss_mask & ~batch.is_teacher
    old_logp = logp if batch.old_logp is None else batch.old_logp
    ratio = (logp - old_logp).exp()
    outside = (ratio < 1 - clip_low if clip_low else ratio < 0) | (ratio > 1 + clip_high if clip_high else ratio < 0)
    mean = lambda x, mask: (x[mask].sum().item(), mask.sum().item())
    judged = {"teacher/f": mean(shape(logp.exp(), shaping, gamma), teacher)} if shaping else {}
    if batch.teacher_logp is not None:
        judged["teacher_model/kl"] = mean(logp - batch.teacher_logp, own)
    if batch.top1 is not None:
        judged["teacher_model/agrees"] = mean((batch.top1 == batch.input_ids[0]).float(), own)
    return {
        **judged,
        "entropy/own": mean(entropy, own),
        "entropy/teacher": mean(entropy, teacher),
        "teacher/p": mean(logp.exp(), teacher),
        "ratio/own": mean(ratio, own),
        "ratio/outside_clip": mean(outside.float(), own),
        "mismatch/abs": mean((old_logp - batch.sampler_logp).abs(), own),
    }


def rollout_metrics(rollouts):
    """Means over the whole batch, which every rank has; none where the method has no such rows."""
    own = [r for r in rollouts if not r.n_teacher_tokens]
    replayed = [r for r in rollouts if r.finish_reason == "replay"]
    teacher = [r for r in rollouts if r.n_teacher_tokens and r.finish_reason != "replay"]
    groups = {}
    for r in own:
        groups.setdefault(r.problem, []).append(r.reward)
    columns = {
        "reward/own": [r.reward for r in own],
        "reward/teacher": [r.reward for r in teacher],
        "reward/replayed": [r.reward for r in replayed],
        "groups/none_solved": [max(g) == 0 for g in groups.values()],
        "groups/all_solved": [min(g) == 1 for g in groups.values()],
        "length/own": [len(r.response_ids) for r in own],
        "length/teacher": [len(r.response_ids) for r in teacher],
        "own/truncated": [r.finish_reason == "length" for r in own],
        "own/no_think": [r.reason == "no_think" for r in own],
        "own/timeout": [r.reason == "timeout" for r in own],
        "own/error": [r.reason == "error" for r in own],
    }
    return {name: sum(column) / len(column) for name, column in columns.items() if column}


class Phases:
    """What each phase of a step takes: seconds as time/NAME, its peak of memory in GiB as memory/NAME, and as
    memory/NAME_after what is in use at its end (plan.measured_memory says of what). told(NAME) is called as it begins."""

    def __init__(self, told):
        self.record, self.told, self.name = {}, told, None

    def begin(self, name):
        self.end()
        self.name, self.start = name, time.time()
        measured_memory()
        self.told(name)

    def end(self):
        if self.name:
            peak, in_use = measured_memory()
            self.record[f"time/{self.name}"] = time.time() - self.start
            self.record |= {f"memory/{self.name}": peak / 2**30, f"memory/{self.name}_after": in_use / 2**30}
        self.name = None

    def ledger(self):
        names = [key.removeprefix("time/") for key in self.record if key.startswith("time/")]
        show = lambda n: f"{n} {self.record[f'memory/{n}']:.2f} / {self.record[f'memory/{n}_after']:.2f}"
        return "memory in GiB, peak / at the end of the phase: " + ", ".join(map(show, names))


def batch_warnings(rollouts):
    """What is wrong with a batch of which nothing can be learnt, and where to look: a list of lines."""
    own = [r for r in rollouts if not r.n_teacher_tokens]
    every = lambda holds: bool(own) and all(map(holds, own))
    found = {
        "was cut off at max_tokens: raise it, or see in rollouts/ why no answer ends": every(
            lambda r: r.finish_reason == "length"
        ),
        "ran into reward_timeout: see the answers in rollouts/, or raise it": every(lambda r: r.reason == "timeout"),
        "lacks </think>: do template and require_think fit the model?": every(lambda r: r.reason == "no_think"),
        "killed its verifier: is there memory left?": every(lambda r: r.reason == "error"),
    }
    return [f"every sample of this batch {words}" for words, holds in found.items() if holds]


def collapse(rewards, window=20):
    """[] or [a warning]: at every window-th step, if the mean reward over the last `window` steps is less than half of what
    it was over that many before. rewards: reward/own of all steps."""
    if len(rewards) % window or len(rewards) < 2 * window:
        return []
    *before, last = [sum(rewards[i : i + window]) / window for i in range(0, len(rewards), window)]
    if last >= max(before) / 2:
        return []
    return [
        f"reward/own is {last:.3f} over the last {window} steps, it was {max(before):.3f}: look at entropy/own, length/own,"
        " own/truncated and mismatch/abs, and at the answers in rollouts/"
    ]


def step_line(m, max_steps, eta):
    """One aligned line; a dash where the method has no such number."""
    show = lambda key, spec: format(m[key], spec) if key in m else "-".rjust(int(spec.split(".")[0]))
    seconds = lambda key: f"{m[key]:6.{2 if m[key] < 100 else 0}f}"
    minutes, rest = divmod(int(eta), 60)
    left = f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    return (
        f"step {m['step']:>4}/{max_steps}  reward {show('reward/own', '6.3f')}  teacher {show('reward/teacher', '6.3f')}"
        f"  unsolved {show('groups/none_solved', '5.2f')}  len {show('length/own', '7.1f')}  p {show('teacher/p', '5.3f')}"
        f"  ent {show('entropy/own', '5.3f')}  norm {show('grad_norm', '8.2g')}  mism {show('mismatch/abs', '7.1e')}"
        f"  gen {seconds('time/rollout')} s  upd {seconds('time/update')} s  ETA {left}"
    )


def finite(record):
    """Without what JSON cannot say."""
    return {k: v for k, v in record.items() if math.isfinite(v)}


def write_metrics(folder, records):
    """Append a line for each to metrics.jsonl, all or none."""
    with open(os.path.join(folder, "metrics.jsonl"), "ab", buffering=0) as f:
        end = f.tell()
        try:
            written = f.write(lines := "".join(json.dumps(finite(r)) + "\n" for r in records).encode())
            os.fsync(f.fileno())  # a checkpoint must not be ahead of its curve
            if written < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f.name)
        except OSError:
            f.truncate(end)
            raise


def start_wandb(name, config, run_id):
    """Begin a run at Weights & Biases, or go on with run_id's; the package's own environment variables have the say over
    project, mode and place. Returns the run's id. Raises UserError where it does not let us in."""
    import wandb

    try:
        project = os.environ.get("WANDB_PROJECT", "nano-luffy")
        return wandb.init(project=project, name=name, config=config, id=run_id, resume="allow").id
    except wandb.errors.Error as e:
        raise UserError(f"log='wandb': {e}: see 'wandb login', or set WANDB_MODE=offline") from None


def to_wandb(record):
    """A step's metrics. What a resumed run does again is there already, and is not taken twice."""
    import wandb

    wandb.log(finite(record), step=record["step"])


def end_wandb(exit_code):
    """Wait until all is sent."""
    import wandb

    wandb.finish(exit_code)


def rewind(folder, step, evaluated):
    """Remove what a run left of later steps, lines of metrics.jsonl and files of rollouts and evaluations; and of this one,
    if it shall be evaluated again, its line. Returns the lines that stay, as dicts."""
    path, rows = os.path.join(folder, "metrics.jsonl"), []
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):  # the last may be cut short
                rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and row.get("step", math.inf) <= (step if evaluated else step - 1)]
    write_lines(path, rows)
    for file in (*glob.glob(os.path.join(glob.escape(folder), "rollouts", "step_*.jsonl")),
                 *glob.glob(os.path.join(glob.escape(folder), "eval_*.json"))):  # fmt: skip
        number = re.search(r"_(\d+)\.jsonl?$", file)
        if number and int(number[1]) > step:
            os.remove(file)
    return rows


def row(problem, r, tokenizer):
    """One rollout as a line of rollouts/step_N.jsonl."""
    return {
        "problem": problem.id,
        "source": problem.source,
        "prompt": tokenizer.decode(problem.prompt_ids),
        "answer": problem.answer,
        "response": response_text(tokenizer, r.response_ids),
        "teacher_tokens": r.n_teacher_tokens,
        "reward": r.reward,
        "reason": r.reason,
        "advantage": r.advantage,
        "finish_reason": r.finish_reason,
        "response_ids": r.response_ids,
        "sampler_logps": r.sampler_logps,
        "teacher_logps": r.teacher_logps,
    }


def eval_report(table, rows):
    """An evaluation for people, a list of lines: a row per source, and the tails of a best and a worst answer. table:
    {source: its numbers}; rows: evaluate()'s, of the sampled answers if there are any."""
    columns = {"greedy": "7.3f", "avg@k": "7.3f", "pass@k": "7.3f", "maj@k": "7.3f", "length": "7.0f", "truncated": "10.3f"}
    columns = {name: form for name, form in columns.items() if any(name in row for row in table.values())}
    width = lambda form: int(form.split(".")[0])
    wide = max(16, *map(len, table)) if table else 16
    lines = [f"  eval {'':<{wide}}{'n':>6}" + "".join(f"{name:>{width(form) + 2}}" for name, form in columns.items())]
    for source, row in table.items():
        cells = (f"{row[c]:>{width(form) + 2}{form[form.index('.') :]}}" if c in row else "-".rjust(width(form) + 2)
                 for c, form in columns.items())  # fmt: skip
        lines.append(f"  eval {source:<{wide}}{row['n']:>6}" + "".join(cells))
    return lines + best_and_worst(rows)


def write_rollouts(folder, step, rollouts, by_id, tokenizer):
    """rollouts/step_N.jsonl, a line per rollout; whole or not at all."""
    path = os.path.join(folder, "rollouts", f"step_{step}.jsonl")
    write_lines(path, (row(by_id[r.problem], r, tokenizer) for r in rollouts))
