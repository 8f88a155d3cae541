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
from itertools import chain

import torch

from configurator import printable
from data import unpack
from runtime.files import write_lines
from runtime.plan import measured_memory
from runtime.ranks import all_reduce, gather
from runtime.tokenizer import response_text

# ---------------------------------------------------------------- numbers


def token_metrics(logp, entropy, batch, shaped, clip_low, clip_high):
    """{name: (sum, count)} over this micro-batch's tokens, tensors on its device: nothing here waits for a GPU. logp, entropy
    (T,), detached; shaped (T,): f of each teacher token, or None if they are not shaped."""
    teacher, own = batch.loss_mask & batch.is_teacher, batch.is_own
    old_logp = logp if batch.old_logp is None else batch.old_logp
    ratio = (logp - old_logp).exp()
    outside = (ratio < 1 - clip_low if clip_low else ratio < 0) | (ratio > 1 + clip_high if clip_high else ratio < 0)
    mean = lambda x, mask: (torch.where(mask, x, 0).sum(dtype=torch.float64), mask.sum(dtype=torch.float64))
    found = {"teacher/f": mean(shaped, teacher)} if shaped is not None else {}
    if batch.teacher_logp is not None:
        found["teacher_model/kl"] = mean(logp - batch.teacher_logp, own)
    if batch.top1 is not None:
        found["teacher_model/agrees"] = mean((batch.top1 == batch.input_ids[0]).float(), own)
    return {
        **found,
        "entropy/own": mean(entropy, own),
        "entropy/teacher": mean(entropy, teacher),
        "teacher/p": mean(logp.exp(), teacher),
        "ratio/own": mean(ratio, own),
        "ratio/outside_clip": mean(outside.float(), own),
        "mismatch/abs": mean((old_logp - batch.behaviour_logp).abs(), own),
    }


def merge(sums):
    """[{name: (sum, count)}, ...] -> one."""
    merged = {}
    for part in sums:
        for name, (total, count) in part.items():
            old = merged.get(name, (0, 0))
            merged[name] = old[0] + total, old[1] + count
    return merged


def to_host(scalars, sums):
    """Tensors with one number each, and {name: (sum, count)} of tensors, as Python's numbers: in one transfer."""
    numbers = iter(torch.stack([x.double() for x in [*scalars, *chain.from_iterable(sums.values())]]).tolist())
    return [next(numbers) for _ in scalars], {name: (next(numbers), next(numbers)) for name in sums}


def means(sums):
    """{name: (sum, count)} of this rank -> {name: mean over all ranks}. Names whose count is zero, and means that are not
    finite, are left out. A collective."""
    totals, counts = all_reduce([s for s, _ in sums.values()]), all_reduce([n for _, n in sums.values()])
    return {k: t / n for k, t, n in zip(sums, totals, counts, strict=True) if n and math.isfinite(t)}


def rollout_metrics(rollouts, trained):
    """Means over the whole batch, which every rank has. A metric without rows is left out. trained: those of the rollouts
    that an update trains on."""
    own, replayed, teacher = ([r for r in rollouts if r.source == who] for who in ("own", "replay", "teacher"))
    groups, taught = {}, {r.problem for r in trained if r.source == "teacher"}
    for r in own:
        groups.setdefault(r.problem, []).append(r.solved)
    columns = {
        "reward/own": [r.reward for r in own],
        "reward/teacher": [r.reward for r in teacher],
        "reward/replayed": [r.reward for r in replayed],
        "groups/none_solved": [not any(g) for g in groups.values()],
        "groups/all_solved": [all(g) for g in groups.values()],
        "groups/with_trace": [p in taught for p in dict.fromkeys(r.problem for r in rollouts)] if teacher else [],
        "length/own": [len(r.response_ids) for r in own],
        "length/teacher": [len(r.response_ids) for r in teacher],
        "own/truncated": [r.finish_reason == "length" for r in own],
        "own/no_think": [r.reason == "no_think" for r in own],
        "own/timeout": [r.reason == "timeout" for r in own],
        "own/error": [r.reason == "error" for r in own],
    }
    found = {name: sum(column) / len(column) for name, column in columns.items() if column}
    return {**found, "groups/trained": len(trained) / len(rollouts)}


def update_metrics(results, sft=None):
    """Means over the updates that were not skipped, and the SFT step's metrics if there was one. results: train.Update's. A
    collective."""
    taken = [r for r in results if r.stepped]
    record = {"updates/skipped": len(results) - len(taken)}
    if taken:  # it is empty if every group was left out
        mean = lambda values: sum(values) / len(values)
        record |= means(merge([r.sums for r in taken]))
        record |= {"loss": mean([r.loss for r in taken]), "grad_norm": mean([r.norm for r in taken])}
    if sft and sft.stepped:
        record |= {"sft/loss": sft.loss, "sft/grad_norm": sft.norm}
    return record


def check_mismatch(record, limit):
    """Raise RuntimeError if engine and trainer disagree over the batch: the canary looks at one prompt only."""
    gap = record.get("mismatch/abs", math.nan)  # missing if it is not finite
    if "ratio/own" in record and not gap <= limit:
        raise RuntimeError(f"engine and trainer disagree by {gap:.3g} in mean |log-prob| over a batch,"
                           f" canary_limit is {limit}: the engine does not hold the policy's weights")  # fmt: skip


def logps_of_given_tokens(rollouts, parts, updates, results):
    """{index of a rollout: the update's log-probs of the tokens that this step's policy did not sample}, on every rank.
    parts: the rollouts of each update; updates: this rank's micro-batches of each; results: what each update returned."""
    found = []
    for u, (micro_batches, result) in enumerate(zip(updates, results, strict=True)):
        found += [(u, row, values) for row, values in unpack(micro_batches, result.logps) if parts[u][row].source != "own"]
    index, logps = {id(r): i for i, r in enumerate(rollouts)}, {}
    for u, row, values in gather(found):
        r = parts[u][row]
        n_given = len(values) if r.source == "replay" else len(values) - len(r.sampler_logps)  # 0 if they are not trained
        logps[index[id(r)]] = values[:n_given]
    return logps


class Phases:
    """Measures the phases of a step. `record` gets time/NAME in seconds, memory/NAME, the phase's peak in GiB, and
    memory/NAME_after, the GiB in use at its end (plan.measured_memory defines both). The peak is without what a sampler that
    slept all the time had given back (engine.given_back), which torch counts nevertheless. Before a phase begins,
    guard.phase(step, NAME) and hook(step, NAME, record) are called; their time counts in no phase."""

    def __init__(self, step, guard, hook, engine=None):
        self.step, self.guard, self.hook, self.record, self.name = step, guard, hook, {}, None
        self.given_back = lambda: engine.given_back if engine else 0

    def begin(self, name):
        self.end()
        self.guard.phase(self.step, name)
        self.hook(self.step, name, self.record)
        self.name, self.start, self.asleep = name, time.time(), self.given_back()
        measured_memory()

    def end(self):
        if self.name:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # or the phase's last kernels would count in the next
            peak, in_use = measured_memory()
            self.record[f"time/{self.name}"] = time.time() - self.start
            peak -= min(self.asleep, self.given_back())
            self.record |= {f"memory/{self.name}": peak / 2**30, f"memory/{self.name}_after": in_use / 2**30}
        self.name = None


def memory_ledger(record):
    names = [key.removeprefix("time/") for key in record if key.startswith("time/")]
    show = lambda n: f"{n} {record[f'memory/{n}']:.2f} / {record[f'memory/{n}_after']:.2f}"
    return "memory in GiB, peak / at the end of the phase: " + ", ".join(map(show, names))


def batch_warnings(rollouts, skip_truncated=False):
    """Warnings about a batch in which all own samples fail for the same reason, or with skip_truncated most never end, and
    where to look: a list of lines."""
    own = [r for r in rollouts if r.source == "own"]
    n_cut = sum(r.finish_reason == "length" for r in own)
    all_cut, at_no_cost = 0 < n_cut == len(own), skip_truncated and 2 * n_cut > len(own)
    every = lambda reason: bool(own) and all(r.reason == reason for r in own)
    found = {
        "most samples of this batch were cut off at max_tokens, and under skip_truncated not ending costs nothing: raise"
        " max_tokens, or set skip_truncated=False": at_no_cost,
        "every sample of this batch was cut off at max_tokens: raise it, or see in rollouts/ why no answer ends": all_cut
        and not at_no_cost,
        "every sample of this batch ran into reward_timeout: see the answers in rollouts/, or raise it": every("timeout"),
        "every sample of this batch lacks </think>: do template and require_think fit the model?": every("no_think"),
        "every sample of this batch failed in the grader or killed its worker: is there memory left?": every("error"),
    }
    return [words for words, holds in found.items() if holds]


def collapse(rewards, window=20):
    """[a warning] if the mean reward over the last `window` steps is less than half of that over the best earlier `window`
    steps, else []. Checked at every window-th step. rewards: reward/own of all steps."""
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
    """The record without NaN and infinity, which JSON does not have."""
    return {k: v for k, v in record.items() if math.isfinite(v)}


def write_metrics(folder, records):
    """Append a line per record to metrics.jsonl: all lines or none."""
    at_once = lambda path, flags: os.open(path, flags | os.O_NONBLOCK, 0o666)  # a pipe in its place is not waited for
    with open(os.path.join(folder, "metrics.jsonl"), "ab", buffering=0, opener=at_once) as f:
        end = f.tell()
        try:
            written = f.write(lines := "".join(json.dumps(finite(r)) + "\n" for r in records).encode())
            os.fsync(f.fileno())  # a checkpoint must not be ahead of its metrics
            if written < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f.name)
        except OSError:
            f.truncate(end)
            raise


def rewind(folder, step, evaluated):
    """Remove what a run wrote after `step`: lines of metrics.jsonl, files of rollouts and of evaluations. Unless the step is
    `evaluated` already, its own line is removed too, because it is written again. Returns the remaining lines, as dicts."""
    path, rows = os.path.join(folder, "metrics.jsonl"), []
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):  # the last may be cut short
                rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and row.get("step", math.inf) <= (step if evaluated else step - 1)]
    write_lines(path, rows)
    for name in (*os.listdir(folder), *glob.glob("rollouts/*", root_dir=folder)):
        number = re.fullmatch(r"(?:rollouts/step_(0|[1-9][0-9]*)\.jsonl|eval_(0|[1-9][0-9]*)\.json)", name)
        if number and int(number[1] or number[2]) > step and not os.path.isdir(file := os.path.join(folder, name)):
            os.remove(file)
    return rows


def rollout_row(problem, r, update_logps, tokenizer):
    """One rollout as a line of rollouts/step_N.jsonl."""
    return {
        "problem": problem.id,
        "source": problem.source,
        "prompt": tokenizer.decode(problem.prompt_ids),
        "answer": problem.answer,
        "written_by": r.source,
        "response": response_text(tokenizer, r.response_ids),
        "teacher_tokens": r.n_teacher_tokens,
        "reward": r.reward,
        "reason": r.reason,
        "advantage": r.advantage,
        "finish_reason": r.finish_reason,
        "response_ids": r.response_ids,
        "sampler_logps": r.sampler_logps,
        "update_logps": update_logps,
        "target_logps": r.teacher_logps,
    }


def eval_report(table, rows):
    """An evaluation as text, a list of lines: a row per source, and the ends of a best and a worst answer. table: {source:
    its numbers}; rows: evaluate()'s, of the sampled answers if there are any."""
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


def write_rollouts(folder, step, rollouts, update_logps, by_id, tokenizer):
    """Write rollouts/step_N.jsonl, a line per rollout; whole or not at all. update_logps: from logps_of_given_tokens, for the
    trace page; by_id: {id: Problem}."""
    path = os.path.join(folder, "rollouts", f"step_{step}.jsonl")
    os.makedirs(os.path.dirname(path), exist_ok=True)  # somebody may have removed the folder
    rows = (rollout_row(by_id[r.problem], r, update_logps.get(i, []), tokenizer) for i, r in enumerate(rollouts))
    write_lines(path, rows)


def best_and_worst(rows):
    """Two lines: the end of a best answer, the shortest if there are several, and of a worst answer, the longest."""
    answers = [
        (reward, -length, i, j)
        for i, r in enumerate(rows)
        for j, (reward, length) in enumerate(zip(r["reward"], r["length"], strict=True))
    ]
    lines = []
    for word, (reward, _, i, j) in (("best", max(answers)), ("worst", min(answers))):
        r = rows[i]
        tail = printable(r["response"][j][-80:].replace("\n", " "))
        lines.append(f"  {word:<5} reward {reward:g}, {r['length'][j]} tokens, answer {printable(r['answer'][:30])}: ...{tail}")
    return lines
