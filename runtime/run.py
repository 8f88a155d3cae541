"""
One run: its folder, its progress, its identity (what must stay the same when it is resumed), and its checkpoints.
"""

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field

from configurator import UserError, printable, provenance, repo_path
from runtime.checkpoint import NotSaved, check_same, find, on_rank_0, prune, put_aside, restore, save, writer
from runtime.files import make_folder, model_path, weights_digest, write_json
from runtime.folder import OutputFolder
from runtime.metrics import (
    batch_warnings,
    collapse,
    finite,
    memory_ledger,
    rewind,
    step_line,
    write_metrics,
    write_rollouts,
)
from runtime.ranks import LOCAL_RANK, RANK, WORLD, agreed, all_ranks, barrier, check_same_on_machines, print0
from runtime.trackers import fault_of

PROGRESS = ("step", "order", "pending", "n_updates", "n_skipped")  # what a checkpoint's run.json holds of a Run


@dataclass
class Run:
    """Progress at the end of the last finished step, and what belongs to the folder."""

    output: OutputFolder
    identity: dict  # what must stay the same when it is resumed, see identify()
    tracker: object = None  # where metrics go beside metrics.jsonl, see trackers.py; None for nowhere
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
    warned: Counter = field(default_factory=Counter)  # how often this process has met each kind of warning

    @property
    def folder(self):
        return self.output.path

    def resume(self, checkpoint, policy, optimizers, memory):
        """Fill progress, optimizers and memory from a checkpoint, and remove what the folder holds of later steps."""
        print0(f"resuming after step {checkpoint.run['step']}: {checkpoint.path}")
        for name in PROGRESS:
            setattr(self, name, checkpoint.run[name])
        self.saved = self.step
        tensors = restore(checkpoint.path, checkpoint.run, policy, optimizers)
        self.fill(memory, tensors, checkpoint)
        rows = rewind(self.folder, self.step, evaluated=not self.pending) if RANK == 0 else []
        self.own_rewards = [row["reward/own"] for row in rows if "reward/own" in row]

    def fill(self, memory, tensors, checkpoint):
        """Fill the memory with a checkpoint's. Raises UserError if that is of another method, or of other problems."""
        wanted, (before, now) = memory.state_dict().keys(), (checkpoint.run["inputs"], self.identity["inputs"])
        other = tensors.keys() != wanted or any(before.get(name) != now[name] for name in ("data", "problems"))
        if tensors and wanted and other:
            raise UserError(
                f"{checkpoint.path} holds the memory of another method or of other data: resume with those, or start a new run"
                f" from its weights (--resume=no --model={checkpoint.path}, another out_dir)"
            )
        if tensors and wanted:
            memory.load_state_dict(tensors)
        elif tensors or wanted:
            print0("note: the memory starts empty" if wanted else "note: the checkpoint's memory is not used")

    def warning(self, kind, words):
        """[a line] the first, tenth, hundredth, ... time that this kind of warning is met, from the tenth on with the count;
        else []: the same line after every step would hide all others."""
        self.warned[kind] += 1
        n = self.warned[kind]
        return [f"warning: {words}" + (f" ({n} times so far)" if n > 1 else "")] if str(n).rstrip("0") == "1" else []

    def report(self, record, rollouts, max_steps, skip_truncated):
        """What the terminal shows of a step: warnings, its line, and once, after the first step, the memory of each phase."""
        step, now = record["step"], time.time()
        self.own_rewards += [record["reward/own"]] if "reward/own" in record else []
        lines = [line for words in batch_warnings(rollouts, skip_truncated) for line in self.warning(words, words)]
        lines += [f"warning: {words}" for words in collapse(self.own_rewards)]
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
        self.track("log", record)

    def track(self, what, argument):
        """Call a method of the tracker, if there is one: "log" a record, or "end" with an exit code. If it fails or does not
        return, it prints a warning, and the run continues without."""
        if (tracker := self.tracker) and (fault := fault_of(getattr(tracker, what), argument)):
            self.tracker = None
            fault_of(tracker.drop, limit=5.0)
            print(printable(f"warning: {tracker.name}: {fault}: the run goes on without it; metrics.jsonl has all"), flush=True)

    def try_to(self, function, *arguments):
        """Call a function that writes files for people, on rank 0. If writing fails, it prints a warning and the run
        continues. Returns True if it did not fail."""
        try:
            if RANK == 0:
                self.output.check()
                function(*arguments)
            return True
        except OSError as e:
            for line in self.warning(function.__name__, f"{function.__name__}: {e}"):
                print(line, flush=True)

    def save(self, policy, tokenizer, optimizers, memory, guard, keep_last, keep_every, must=True):
        """Write a checkpoint of the last finished step, unless there is one already. A collective. If writing fails: with
        `must` raises UserError, otherwise prints a warning and leaves the checkpoint due."""
        if self.saved == self.step:
            return
        guard.phase(self.step, "checkpoint")
        progress = {name: getattr(self, name) for name in PROGRESS}
        try:  # a checkpoint must not be ahead of its metrics
            on_rank_0(self.output.check)
            on_rank_0(write_metrics, self.folder, self.unwritten)
            self.unwritten.clear()
            save(
                self.folder, self.step, policy=policy, tokenizer=tokenizer, optimizers=optimizers, memory=memory.state_dict(),
                run={**progress, **self.identity}, tick=guard.progress,
            )  # fmt: skip
        except NotSaved as e:
            if must:
                raise UserError(f"{e}; --resume=auto continues from the checkpoint before") from None
            for line in self.warning("save", f"{e}; the next try is after the next step"):
                print0(line)
            return
        self.saved, self.save_due, guard.save_now = self.step, False, False
        self.try_to(prune, self.folder, self.step, keep_last, keep_every)


@dataclass
class Checkpoint:
    """A checkpoint to resume from."""

    path: str
    run: dict  # its run.json


def find_checkpoint(output, resume):
    """The newest checkpoint in an OutputFolder that verifies, or None if there is none or resume is "no"."""
    path, run = find(output.path, print0) if resume != "no" else (None, None)
    if not path:
        return output.check_movable()  # now, not after the models are loaded
    if os.path.lexists(lines := os.path.join(output.path, "metrics.jsonl")) and not os.path.isfile(lines):
        raise UserError(f"{lines} is no file, so no line can be written into it: move it away")
    wanted = (*PROGRESS, "files", "optimizer_steps", "knobs", "inputs", "world_size", "written_by")
    if missing := [name for name in wanted if name not in run]:
        raise UserError(
            f"{path} was written by another version of this code (run.json lacks {missing[0]!r}): resume it under"
            f" {writer(run)}, or take another out_dir"
        )
    return Checkpoint(path, run)


def identify(config, problems, read, sampler, dtype, verifier, checkpoint):
    """What must stay the same when a run is resumed; also which code wrote it, and how many ranks. config: all knobs; read:
    digests of the data and eval_data that were read; sampler, dtype: as resolved. All is compared by content, not by name;
    the grader's is what the verifier runs. A model folder that is gone is not compared, because resuming does not need it.
    Raises UserError if the files of another machine or rank differ."""
    source, inputs = agreed(verifier.source, config["grader"]), {}
    folders = [config[name] for name in ("model", "teacher_model") if config[name] and os.path.isdir(repo_path(config[name]))]
    agreed([os.path.basename(model_path(folder)) for folder in folders], "model")  # where `latest` led each rank
    if LOCAL_RANK == 0:  # only one rank of a machine, because the weights are read whole
        inputs = {"data": read["data"]}
        inputs["grader"] = config["grader"] if source is None else [len(source), hashlib.sha256(source).hexdigest()]
        for name in ("model", "teacher_model"):
            if folder := config[name]:
                there = not checkpoint or os.path.isdir(repo_path(folder))
                inputs[name] = weights_digest(model_path(folder)) if there else checkpoint.run["inputs"].get(name)
    check_same_on_machines(inputs | read)  # a resumed run may have another eval_data, but not some of its machines
    for name in read:
        agreed(read[name], config[name])
    return {
        "knobs": {**config, "sampler": sampler, "dtype": dtype},
        "inputs": {**all_ranks(inputs)[0], "problems": len(problems)},
        "world_size": WORLD,
        "written_by": provenance(),
    }


def check_same_run(checkpoint, identity, free, resume):
    """Raise UserError if the checkpoint is of another run; with resume="force" only log it."""
    check_same(checkpoint.path, before=checkpoint.run, now=identity, free=free, force=resume == "force", log=print0)


def open_run(output, config, identity, checkpoint, tracker, policy, optimizers, memory):
    """Prepare the output folder and write config.json. An earlier run found there is moved aside, unless its checkpoint is
    resumed. Returns a Run, and fills optimizers and memory from the checkpoint."""
    if RANK == 0:
        if not checkpoint:
            output.move_aside()
        make_folder(os.path.join(output.path, "rollouts"))
        try:
            if checkpoint:
                put_aside(output.path, checkpoint.run["step"])
            write_json(os.path.join(output.path, "config.json"), {**config, "world_size": WORLD, **provenance()})
        except OSError as e:
            raise UserError(f"out_dir {output.path} cannot be written: {e.strerror}") from None
    barrier()
    run = Run(output, identity, tracker)
    if checkpoint:
        run.resume(checkpoint, policy, optimizers, memory)
    return run
