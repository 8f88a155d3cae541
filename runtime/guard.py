"""
What ends a run early: signals, and ranks that die or hang.

The signals in ENDING ask the run to save and end, SIGUSR1 to save and continue; a second one in ENDING ends the process
at once. A handler only sets a flag. The flag is read where all ranks can agree on it, so that no rank leaves while
another waits for it. A thread follows the progress of all ranks, and ends the run when none makes any.
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
from runtime.process import tell
from runtime.ranks import RANK, WORLD

# What a scheduler, Ctrl-C, a closed terminal, or a batch system that warns sends.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)
EVERY = 1.0  # seconds between two checks of the ranks' progress


class Stopped(Exception):
    """A signal asked the run to end. Raised on all ranks together, or inside interruptible()."""


class Watch:
    """A context manager around work of all ranks: a thread ends the process when none of them makes progress. hang_timeout:
    seconds without progress on any rank after which it does."""

    def __init__(self, hang_timeout):
        self.hang_timeout = hang_timeout
        self.rank, self.world = RANK, WORLD
        self.count, self.where = 0, "start"
        self.seen, self.ended = {}, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.follow, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def progress(self, where=None):
        """Note progress, and what this rank does from now on, if that is given."""
        self.count, self.where = self.count + 1, where or self.where

    def follow(self):
        """End the process when no rank makes progress. Another thread talks to torchrun's store, which never answers if
        its machine froze."""
        if self.world > 1:
            threading.Thread(target=self.exchange, daemon=True).start()
        last, quiet = None, 0  # checks without progress: a clock would go on while the process is stopped (Ctrl-Z)
        while not self.ended.wait(EVERY):
            self.seen[self.rank] = f"{self.count} {self.where}"
            patience = self.hang_timeout + EVERY * self.rank  # so that one rank reports before torchrun ends them all
            if self.seen != last:
                last, quiet = dict(self.seen), 0
            elif (quiet := quiet + 1) * EVERY > patience:
                words = f"error: no rank made progress for {self.hang_timeout:g} s (hang_timeout): {self.places()}"
                print(words, file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(1)

    def exchange(self):
        """Share the ranks' progress through torchrun's store, over a connection of its own: another thread may block
        the other one."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            while not self.ended.wait(EVERY):
                store.set(f"guard/{self.rank}", f"{self.count} {self.where}")
                for rank in range(self.world):
                    if rank != self.rank and store.check([f"guard/{rank}"]):
                        self.seen[rank] = store.get(f"guard/{rank}").decode()

    def places(self):
        return "; ".join(f"rank {rank}: {place.partition(' ')[2]}" for rank, place in sorted(dict(self.seen).items()))


class Guard(Watch):
    """A Watch around training, which handles signals and errors as well."""

    def __init__(self, hang_timeout):
        super().__init__(hang_timeout)
        self.received, self.agreed = 0, 0  # the signal to end: received by this rank, and agreed on by all ranks
        self.save_asked, self.save_now = False, False  # the same for SIGUSR1
        self.droppable = True  # no optimizer step was taken since the last finished step
        self.inside = False  # whether interruptible() is active
        self.on_stop = lambda: None  # called when all ranks agreed to stop

    # ------------------------------------------------------------ signals

    def __enter__(self):
        ours = {signal.SIGUSR1, *ENDING}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup it stays so
            ours.remove(signal.SIGHUP)
        self.before = {s: signal.signal(s, self.handle) for s in ours}
        return super().__enter__()

    def __exit__(self, error_type, error, trace):
        try:
            if isinstance(error, Stopped):
                self.on_stop()
            elif error and not isinstance(error, UserError):
                self.fail(error)
        finally:
            super().__exit__()
            for number, handler in self.before.items():
                signal.signal(number, handler)
        return isinstance(error, Stopped)

    def fail(self, error):
        others = f"; last seen: {self.places()}" if self.world > 1 else ""
        print(f"rank {self.rank} failed in {self.where}{others}", file=sys.stderr, flush=True)
        if self.world > 1:  # the others wait for this rank, and an orderly exit could wait for them
            traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(1)

    def handle(self, number, frame):
        if number == signal.SIGUSR1:
            self.save_asked = True
        elif not self.received:
            self.received, self.received_at = number, time.monotonic()
            tell(f"rank {self.rank}: {signal.Signals(number).name}: saving; a second signal ends it at once")
        elif time.monotonic() - self.received_at > 1:  # within a second it is the same signal, sent twice
            os._exit(128 + number)

    def agree(self):
        """A collective. Raise Stopped on all ranks if any received a signal to end; set save_now if any was asked to
        save."""
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
        """A context for one rank's own work without collectives. After a signal tick() ends it early; at its end all
        ranks agree."""
        self.inside = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self.inside = False
        self.agree()

    # ------------------------------------------------------------ progress

    def phase(self, step, name):
        """Note progress, and what this rank does from now on."""
        self.progress(f"step {step}, {name}")

    def tick(self):
        """Note progress. Inside interruptible() it raises Stopped after a signal."""
        self.count += 1
        if self.inside and self.received:
            raise Stopped

    def safe_point(self):
        """Note progress, on all ranks at the same point. As long as the step may be dropped it raises Stopped after a
        signal, on all ranks together."""
        self.count += 1
        if self.droppable:
            self.agree()


def canary(policy, engine, problem, temperature, max_tokens, stamp, limit):
    """Compare the log-probs that the engine gives to the tokens of one answer with those of the trainer. Returns their
    mean |difference|; raises RuntimeError if it is above the limit. A collective under FSDP."""
    sample = engine.generate([problem.prompt_ids], [0], temperature, max_tokens, stamp)[0]
    batch = pack([Rollout(problem.id, problem.prompt_ids, sample.ids, sampler_logps=sample.logps)]).to(policy.hf.device)
    with torch.no_grad():
        logp, _ = policy(batch)
    gap = (logp - batch.behaviour_logp)[batch.loss_mask].abs().mean().item()
    if not gap <= limit:
        raise RuntimeError(f"rank {RANK}: engine and trainer disagree by {gap:.3g} in mean |log-prob|, canary_limit is"
                           f" {limit}: the engine does not hold the policy's weights")  # fmt: skip
    return gap
