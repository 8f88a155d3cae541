"""
What ends a run early: signals, and ranks that die or hang.

SIGTERM and SIGINT ask the run to save and end, SIGUSR1 to save and go on; a second SIGTERM or SIGINT ends the
process at once. A handler only sets a flag. It is looked at where all ranks can agree on what they saw, so that none
leaves while another waits for it. A thread counts what the ranks get done, and ends the run when none gets on.
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

EVERY = 1.0  # seconds between two looks at the other ranks


class Stopped(Exception):
    """A signal asked for the end. Raised on all ranks alike, or inside interruptible()."""


class Guard:
    """A context manager around training. hang_timeout: seconds without progress on any rank after which the run ends."""

    def __init__(self, hang_timeout):
        self.hang_timeout = hang_timeout
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.received, self.agreed = 0, 0  # the signal to end, as this rank got it and as all know it
        self.save_asked = False
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
        elif self.received:
            os._exit(128 + number)
        else:
            self.received = number
            os.write(2, f"rank {self.rank}: {signal.Signals(number).name}: saving; once more ends it now\n".encode())

    def agree(self):
        """All ranks together: raise Stopped on each if any has the signal; and let save_asked be what any was asked."""
        flags = torch.tensor([self.received, self.save_asked], dtype=torch.int64)
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.agreed, self.save_asked = int(flags[0]), self.save_asked or bool(flags[1])
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
        # A connection of its own: another thread's may be waiting. torchrun's agent holds the store.
        store, since, told = None, time.monotonic(), None
        if self.world > 1:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        while not self.ended.wait(EVERY):
            self.seen[self.rank] = f"{self.count} {self.where}"
            with contextlib.suppress(RuntimeError):  # without a store torchrun is gone, and this process is next
                for rank in range(self.world) if store else ():
                    if rank == self.rank:
                        store.set(f"guard/{rank}", self.seen[rank])
                    elif store.check([f"guard/{rank}"]):
                        self.seen[rank] = store.get(f"guard/{rank}").decode()
            if self.seen != told:
                told, since = dict(self.seen), time.monotonic()
            elif time.monotonic() - since > self.hang_timeout:
                if store and store.add("guard/reports", 1) > 1:
                    time.sleep(2 * EVERY)  # another rank speaks
                else:
                    print(f"error: no rank got on for {self.hang_timeout:g} s (hang_timeout): {self.places()}", file=sys.stderr)
                    faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(1)

    def places(self):
        return "; ".join(f"rank {rank}: {place.partition(' ')[2]}" for rank, place in sorted(self.seen.items()))
