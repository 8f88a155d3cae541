"""
What ends a run early: signals, and ranks that die or hang.

SIGTERM and SIGINT ask the run to save and end, SIGUSR1 to save and go on; a second SIGTERM or SIGINT ends the
process at once. A handler only sets a flag. It is looked at where all ranks can agree on what they saw, so that none
leaves while another waits for it. A thread counts what the ranks get done, and ends the run when none makes progress.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

from configurator import UserError
from data import Rollout, pack
from runtime.ranks import RANK, WORLD

EVERY = 1.0  # seconds between two looks at the other ranks


class Stopped(Exception):
    """A signal asked for the end. Raised on all ranks alike, or inside interruptible()."""


class Guard:
    """A context manager around training. hang_timeout: seconds without progress on any rank after which the run ends."""

    def __init__(self, hang_timeout):
        self.hang_timeout = hang_timeout
        self.rank, self.world = RANK, WORLD
        self.received, self.agreed = 0, 0  # the signal to end, as this rank got it and as all know it
        self.save_asked, self.save_now = False, False  # the same of SIGUSR1
        self.droppable = True  # no optimizer step since the last boundary
        self.inside = False  # interruptible()
        self.on_stop = lambda: None  # what to do when all ranks agreed to stop
        self.count, self.where = 0, "start"
        self.seen, self.ended = {}, threading.Event()

    # ------------------------------------------------------------ signals

    def __enter__(self):
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        try:
            if isinstance(error, Stopped):
                self.on_stop()
            elif error and not isinstance(error, UserError):
                self.fail(error)
        finally:
            self.ended.set()
            self.thread.join()
            for number, handler in self.before.items():
                signal.signal(number, handler)
        return isinstance(error, Stopped)

    def fail(self, error):
        others = f"; last seen: {self.places()}" if self.world > 1 else ""
        print(f"rank {self.rank} failed in {self.where}{others}", file=sys.stderr, flush=True)
        if self.world > 1:  # the others wait for this rank, and an orderly exit might wait for them
            traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(1)

    def handle(self, number, frame):
        if number == signal.SIGUSR1:
            self.save_asked = True
        elif not self.received:
            self.received, self.received_at = number, time.monotonic()
            os.write(2, f"rank {self.rank}: {signal.Signals(number).name}: saving; once more ends it now\n".encode())
        elif time.monotonic() - self.received_at > 1:  # what comes at once is the same signal by another way
            os._exit(128 + number)

    def agree(self):
        """All ranks together: raise Stopped on each if any has the signal, and set save_now if any was asked to save."""
        asked = self.save_asked  # read once: a handler may set it at any time
        flags = torch.tensor([self.received, asked], dtype=torch.int64)
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.save_asked = self.save_asked and not asked
        self.agreed, self.save_now = int(flags[0]), self.save_now or bool(flags[1])
        if self.agreed:
            raise Stopped(signal.Signals(self.agreed).name)

    @contextlib.contextmanager
    def interruptible(self):
        """Around one rank's own work, without collectives: tick() ends it early, then all ranks agree."""
        self.inside = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self.inside = False
        self.agree()

    # ------------------------------------------------------------ progress

    def progress(self):
        """Something got done."""
        self.count += 1

    def phase(self, step, name):
        self.count, self.where = self.count + 1, f"step {step}, {name}"

    def tick(self):
        """Something got done. Raises Stopped inside interruptible(), if a signal came."""
        self.count += 1
        if self.inside and self.received:
            raise Stopped

    def safe_point(self):
        """Something got done, on all ranks. Raises Stopped on all alike if the step may still be dropped."""
        self.count += 1
        if self.droppable:
            self.agree()

    def watch(self):
        """End the process when no rank makes progress. The clock asks nobody: a store whose machine froze never answers."""
        if self.world > 1:
            threading.Thread(target=self.tell_and_ask, daemon=True).start()
        told, since = None, time.monotonic()
        while not self.ended.wait(EVERY):
            self.seen[self.rank] = f"{self.count} {self.where}"
            if self.seen != told:
                told, since = dict(self.seen), time.monotonic()
            elif (
                time.monotonic() - since > self.hang_timeout + EVERY * self.rank
            ):  # one of them speaks before torchrun ends all
                words = f"error: no rank made progress for {self.hang_timeout:g} s (hang_timeout): {self.places()}"
                print(words, file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(1)

    def tell_and_ask(self):
        """Through torchrun's store, by a connection of its own, because another thread's may be waiting."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            while not self.ended.wait(EVERY):
                store.set(f"guard/{self.rank}", f"{self.count} {self.where}")
                for rank in range(self.world):
                    if rank != self.rank and store.check([f"guard/{rank}"]):
                        self.seen[rank] = store.get(f"guard/{rank}").decode()

    def places(self):
        return "; ".join(f"rank {rank}: {place.partition(' ')[2]}" for rank, place in sorted(dict(self.seen).items()))


def canary(policy, engine, problem, temperature, max_tokens, stamp, limit):
    """Does the engine give its own tokens the log-probs that the trainer gives them? Returns the mean |difference| over one
    answer; raises RuntimeError if it is above the limit. A collective under FSDP."""
    sample = engine.generate([problem.prompt_ids], [0], temperature, max_tokens, stamp)[0]
    batch = pack([Rollout(problem.id, problem.prompt_ids, sample.ids, sampler_logps=sample.logps)]).to(policy.hf.device)
    with torch.no_grad():
        logp, _ = policy(batch)
    gap = (logp - batch.behaviour_logp)[batch.loss_mask].abs().mean().item()
    if not gap <= limit:
        raise RuntimeError(f"rank {RANK}: engine and trainer disagree by {gap:.3g} in mean |log-prob|, canary_limit is"
                           f" {limit}: the engine does not hold the policy's weights")  # fmt: skip
    return gap
