"""
One run: its folder, its progress, its identity (what must stay the same when it is resumed), and its checkpoints.
"""

import os
import time
from dataclasses import dataclass, field

from configurator import UserError, printable, provenance, repo_path
from runtime.checkpoint import NotSaved, check_same, find, prune, put_aside, restore, save, together
from runtime.files import fingerprint, make_folder, model_path, weights_digest, write_json
from runtime.metrics import (
    batch_warnings,
    collapse,
    drop_wandb,
    end_wandb,
    fault_of,
    finite,
    memory_ledger,
    rewind,
    start_wandb,
    step_line,
    to_wandb,
    write_metrics,
    write_rollouts,
)
from runtime.ranks import RANK, WORLD, barrier, gather, print0

PROGRESS = ("step", "order", "pending", "n_updates", "n_skipped")  # what a checkpoint's run.json holds of a Run


@dataclass
class Run:
    """Progress at the end of the last finished step, and what belongs to the folder."""

    folder: str
    identity: dict  # what must stay the same when it is resumed, see identify()
    log: str  # "jsonl", or "wandb" for both
    step: int = 0  # the last finished step
    order: dict = field(default_factory=dict)  # the data order's position at its end
    pending: dict | None = field(default_factory=lambda: {"step": 0})  # its metrics, while canary and evaluation are missing
    n_updates: int = 0  # optimizer steps taken: the version of the weights
    n_skipped: int = 0  # updates skipped in a row
    saved: int | None = None  # the step of the newest checkpoint
    save_due: bool = False  # a checkpoint is due and not written yet
    unwritten: list = field(default_factory=list)  # lines of metrics.jsonl that could not be written yet
    first: tuple | None = None  # the first step that this process takes, and when it began
    own_rewards: list = field(default_factory=list)  # reward/own of every step so far

    def resume(self, checkpoint, policy, optimizers, memory):
        """Fill progress, optimizers and memory from a checkpoint, and remove what the folder holds of later steps."""
        print0(f"resuming after step {checkpoint.run['step']}: {checkpoint.path}")
        for name in PROGRESS:
            setattr(self, name, checkpoint.run[name])
        self.saved = self.step
        if tensors := restore(checkpoint.path, checkpoint.run, policy, optimizers):
            memory.load_state_dict(tensors)
        rows = rewind(self.folder, self.step, evaluated=not self.pending) if RANK == 0 else []
        self.own_rewards = [row["reward/own"] for row in rows if "reward/own" in row]

    def report(self, record, rollouts, max_steps):
        """What the terminal shows of a step: warnings, its line, and once, after the first step, the memory of each phase."""
        step, now = record["step"], time.time()
        self.own_rewards += [record["reward/own"]] if "reward/own" in record else []
        lines = [f"warning: {words}" for words in (*batch_warnings(rollouts), *collapse(self.own_rewards))]
        self.first = self.first or (step, now - sum(v for k, v in record.items() if k.startswith("time/")))
        eta = (now - self.first[1]) / (step - self.first[0] + 1) * (max_steps - step)
        lines.append(step_line(record, max_steps, eta))
        return "\n".join(lines if step > self.first[0] else [*lines, memory_ledger(record)])

    def write_rollouts(self, step, *what):
        """metrics.write_rollouts into this run's folder."""
        self.try_to(write_rollouts, self.folder, step, *what)

    def advance(self, step, order, record):
        """Note that a step is finished: from here on a checkpoint may hold it. write_line() writes its metrics."""
        self.step, self.order, self.pending = step, order, finite(record)

    def write_line(self, more):
        """Write the last step's metrics and `more` as a line of metrics.jsonl. If that fails, the line is written together
        with the next one."""
        record, self.pending = {**self.pending, **more}, None
        self.unwritten.append(record)
        if self.try_to(write_metrics, self.folder, self.unwritten):
            self.unwritten.clear()
        self.try_wandb(to_wandb, record)

    def end_wandb(self, exit_code):
        """Send to Weights & Biases what is not sent yet, and say with which code the run ends."""
        self.try_wandb(end_wandb, exit_code)

    def try_wandb(self, function, argument):
        """Call a function that talks to Weights & Biases, on rank 0 and if it is asked for. If it fails or does not return,
        it prints a warning, and the run continues without."""
        if self.log == "wandb" and RANK == 0 and (fault := fault_of(function, argument)):
            self.log = "jsonl"
            fault_of(drop_wandb, limit=5.0)
            print(printable(f"warning: wandb: {fault}: the run goes on without it; metrics.jsonl has all"), flush=True)

    def try_to(self, function, *arguments):
        """Call a function that writes files for people, on rank 0. If writing fails, it prints a warning and the run
        continues. Returns True if it did not fail."""
        try:
            if RANK == 0:
                function(*arguments)
            return True
        except OSError as e:
            return print(f"warning: {function.__name__}: {e}", flush=True)

    def save(self, policy, tokenizer, optimizers, memory, guard, keep_last, keep_every, must=True):
        """Write a checkpoint of the last finished step, unless there is one already. A collective. If writing fails: with
        `must` raises UserError, otherwise prints a warning and leaves the checkpoint due."""
        if self.saved == self.step:
            return
        guard.phase(self.step, "checkpoint")
        progress = {name: getattr(self, name) for name in PROGRESS}
        try:  # a checkpoint must not be ahead of its metrics
            together(lambda: write_metrics(self.folder, self.unwritten) if self.unwritten and RANK == 0 else None)
            self.unwritten.clear()
            save(
                self.folder, self.step, policy=policy, tokenizer=tokenizer, optimizers=optimizers, memory=memory.state_dict(),
                run={**progress, **self.identity}, tick=guard.progress,
            )  # fmt: skip
        except NotSaved as e:
            if must:
                raise UserError(f"{e}; --resume=auto continues from the checkpoint before") from None
            return print0(f"warning: {e}; the next try is after the next step")
        self.saved, self.save_due, guard.save_now = self.step, False, False
        self.try_to(prune, self.folder, self.step, keep_last, keep_every)


@dataclass
class Checkpoint:
    """A checkpoint to resume from."""

    path: str
    run: dict  # its run.json


def find_checkpoint(out_dir, resume):
    """The newest checkpoint in out_dir that verifies, or None if there is none or resume is "no"."""
    path, run = find(repo_path(out_dir), print0) if resume != "no" else (None, None)
    if not path:
        return None
    if missing := [name for name in PROGRESS if name not in run]:
        commit = run.get("written_by", {}).get("git") or "an unknown commit"
        raise UserError(
            f"{path} was written by another version of this code (run.json lacks {missing[0]!r}): resume it under {commit}, or"
            " take another out_dir"
        )
    return Checkpoint(path, run)


def identify(config, problems, sampler, dtype, checkpoint):
    """What must stay the same when a run is resumed; also which code wrote it, and how many ranks. config: all knobs;
    sampler, dtype: as resolved. Files are compared by content, not by name. A model folder that is gone is not compared,
    because resuming does not need it."""
    grader, inputs = repo_path(config["grader"]), {}
    if RANK == 0:  # only one rank, because every file is read whole
        inputs = {"data": fingerprint(repo_path(config["data"]))}
        inputs["grader"] = fingerprint(grader) if os.path.isfile(grader) else config["grader"]
        for name in ("model", "teacher_model"):
            if folder := config[name]:
                there = not checkpoint or os.path.isdir(repo_path(folder))
                inputs[name] = weights_digest(model_path(folder)) if there else checkpoint.run["inputs"].get(name)
    return {
        "knobs": {**config, "sampler": sampler, "dtype": dtype},
        "inputs": {**gather([inputs])[0], "problems": len(problems)},
        "world_size": WORLD,
        "written_by": provenance(),
    }


def check_same_run(checkpoint, identity, free, resume):
    """Raise UserError if the checkpoint is of another run; with resume="force" only log it."""
    check_same(checkpoint.path, before=checkpoint.run, now=identity, free=free, force=resume == "force", log=print0)


def open_run(config, identity, checkpoint, policy, optimizers, memory):
    """Make out_dir and write config.json. An earlier run found there is moved aside, unless its checkpoint is resumed. Returns
    a Run, and fills optimizers and memory from the checkpoint."""
    folder = repo_path(config["out_dir"])
    if RANK == 0:
        if not checkpoint and os.path.isdir(folder) and os.listdir(folder):
            move_aside(folder)
        make_folder(os.path.join(folder, "rollouts"))
        try:
            if checkpoint:
                put_aside(folder, checkpoint.run["step"])
            write_json(os.path.join(folder, "config.json"), {**config, "world_size": WORLD, **provenance()})
        except OSError as e:
            raise UserError(f"out_dir {folder} cannot be written: {e.strerror}") from None
    barrier()
    run = Run(folder, identity, config["log"])
    if checkpoint:
        run.resume(checkpoint, policy, optimizers, memory)
    return run


def move_aside(folder):
    """Rename a folder to the first free NAME.N."""
    n = 1
    while os.path.exists(f"{folder}.{n}"):
        n += 1
    try:
        os.rename(folder, f"{folder}.{n}")
    except OSError as e:
        raise UserError(f"{folder} is not empty and cannot be moved aside ({e.strerror}): take another out_dir") from None
    print0(f"{folder} is not empty: moved to {folder}.{n}")


def open_wandb(config, identity, checkpoint):
    """Start Weights & Biases on rank 0 if it is asked for, and remember the run's id for a later resume."""
    if config["log"] == "wandb" and RANK == 0:
        name, before = os.path.basename(repo_path(config["out_dir"])), checkpoint.run if checkpoint else {}
        identity["wandb_id"] = start_wandb(name, config, before.get("wandb_id"))
