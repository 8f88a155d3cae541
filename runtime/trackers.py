"""
Where metrics go beside metrics.jsonl: Weights & Biases, or TensorBoard. Both are packages that may fail or not answer; then a
run goes on without them (Run.track).
"""

import os
import threading

from configurator import UserError, first_line, repo_path
from runtime.metrics import finite


class WandB:
    """A run at Weights & Biases, or with run_id the continuation of that run. The package's own environment variables decide
    about project, mode and server. Raises UserError if the package fails, for example without a login."""

    name = "wandb"

    def __init__(self, config, run_id=None):
        import wandb

        self.wandb = wandb
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds; by default it would wait for the network for ever
        project, name = os.environ.get("WANDB_PROJECT", "nano-luffy"), os.path.basename(repo_path(config["out_dir"]))
        try:
            self.id = wandb.init(project=project, name=name, config=config, id=run_id, resume="allow").id
        except Exception as e:
            raise UserError(f"log='wandb': {e}: run 'wandb login', or set WANDB_MODE=offline") from None

    def log(self, record):
        """Send a step's metrics. Weights & Biases ignores the steps that it has already and that a resumed run repeats."""
        self.wandb.log(finite(record), step=record["step"])

    def end(self, exit_code):
        """Wait until everything is sent, but not for ever."""
        self.wandb.finish(exit_code)

    def drop(self):
        """Have nothing more to do with it: its own clean-up when the process ends would fail, or wait, once more."""
        self.wandb.teardown(1)


class TensorBoard:
    """Event files in the folder `tensorboard` of a run's own, one from each process that wrote there."""

    name = "tensorboard"

    def __init__(self, folder):
        self.folder, self.writer = os.path.join(folder, "tensorboard"), None

    def log(self, record):
        """Write a step's metrics. The first one says that whatever earlier files have of its step or later is void, because a
        resumed run repeats those steps."""
        if not self.writer:  # not before: a new run's folder is made anew
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder, purge_step=record["step"])
        for name, value in finite(record).items():
            self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()

    def end(self, exit_code):
        if self.writer:
            self.writer.close()

    def drop(self):
        """Nothing waits for its thread when the process ends."""


def open_tracker(config, identity, checkpoint, folder):
    """What the knob `log` asks for, on rank 0, or None. At Weights & Biases the run's id is noted in `identity`, for a later
    resume; checkpoint: the one that is resumed, or None; folder: the run's."""
    if config["log"] == "tensorboard":
        return TensorBoard(folder)
    if config["log"] == "wandb":
        tracker = WandB(config, checkpoint.run.get("wandb_id") if checkpoint else None)
        identity["wandb_id"] = tracker.id
        return tracker


def fault_of(function, *arguments, limit=90.0):
    """Call a function in a thread of its own. Returns what it raised, as text, or that it did not return within `limit`
    seconds; "" if all went well."""
    fault = [f"no answer for {limit:g} s"]

    def work():
        try:
            function(*arguments)
            fault[0] = ""
        except BaseException as e:  # a package may call sys.exit
            fault[0] = f"{type(e).__name__}: {first_line(e)}"

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit)
    return fault[0]
