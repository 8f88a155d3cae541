"""
One run: its folder, how far it is, what it may be resumed as, and its checkpoints.
"""

import os
from dataclasses import dataclass, field

from configurator import UserError, provenance, repo_path
from runtime.checkpoint import NotSaved, check_same, find, prune, put_aside, restore, save, together
from runtime.files import fingerprint, make_folder, model_path, weights_digest, write_json
from runtime.metrics import rewind, start_wandb, to_wandb, write_metrics
from runtime.ranks import RANK, WORLD, barrier, gather, print0

PROGRESS = ("step", "order", "pending", "n_updates", "n_skipped")  # what a checkpoint's run.json holds of a Run


@dataclass
class Run:
    """Progress at the end of the last finished step, and what belongs to the folder."""

    folder: str
    identity: dict  # what two runs must share to be one, see identify()
    log: str  # "jsonl", or "wandb" for both
    step: int = 0  # the last finished step
    order: dict = field(default_factory=dict)  # the data order's position at its end
    pending: dict | None = field(default_factory=lambda: {"step": 0})  # its metrics, until canary and evaluation are in
    n_updates: int = 0  # optimizer steps taken: the version of the weights
    n_skipped: int = 0  # updates skipped in a row
    saved: int | None = None  # the step whose end the newest checkpoint holds
    save_due: bool = False  # a checkpoint was due and is not written yet
    unwritten: list = field(default_factory=list)  # lines of metrics.jsonl that the disk refused
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

    def advance(self, step, order, record):
        """A step is finished: from here on a checkpoint may hold it. Its line follows with write_line()."""
        self.step, self.order, self.pending = step, order, record

    def write_line(self, more):
        """Write the last step's metrics, and `more` of them. A disk that refuses the line gets it with the next one."""
        record, self.pending = {**self.pending, **more}, None
        self.unwritten.append(record)
        if self.try_to(write_metrics, self.folder, self.unwritten):
            self.unwritten.clear()
        if self.log == "wandb" and RANK == 0:
            to_wandb(record)

    def try_to(self, function, *arguments):
        """On rank 0, write what is for people: a disk that refuses it does not end the run. Returns whether it did."""
        try:
            if RANK == 0:
                function(*arguments)
            return True
        except OSError as e:
            return print(f"warning: {function.__name__}: {e}", flush=True)

    def save(self, policy, tokenizer, optimizers, memory, guard, keep_last, keep_every, must=True):
        """Write the end of the last finished step as a checkpoint, unless it is written already. A collective. Where the disk
        refuses it, raises UserError if it must be written, else warns and leaves it due."""
        if self.saved == self.step:
            return
        guard.phase(self.step, "checkpoint")
        progress = {name: getattr(self, name) for name in PROGRESS}
        try:  # a checkpoint must not be ahead of its curve
            together(lambda: write_metrics(self.folder, self.unwritten) if self.unwritten and RANK == 0 else None)
            self.unwritten.clear()
            save(
                self.folder, self.step, policy, tokenizer, optimizers, memory.state_dict(), {**progress, **self.identity},
                tick=guard.progress,
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
    return Checkpoint(path, run) if path else None


def identify(config, problems, sampler, dtype, checkpoint):
    """What two runs must share to be one, and which code and ranks wrote it. config: all knobs; sampler, dtype: as resolved.
    The content of files counts, not their names; one that is gone is not needed to resume."""
    own, inputs = repo_path(config["grader"]), {}
    if RANK == 0:  # it reads every file whole
        inputs = {"data": fingerprint(repo_path(config["data"]))}
        inputs["grader"] = fingerprint(own) if os.path.isfile(own) else config["grader"]
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
    """Raise UserError if this would be another run than the checkpoint's; with resume="force" only say so."""
    check_same(checkpoint.path, checkpoint.run, identity, free, resume == "force", print0)


def open_run(config, identity, checkpoint, policy, optimizers, memory):
    """Make out_dir and write config.json. A run found there is moved aside, unless this one resumes its checkpoint. Returns a
    Run; optimizers and memory are filled from the checkpoint."""
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
