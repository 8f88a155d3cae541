"""
A process that no lost output and no stray signal ends, that shows its progress, that dies when its parent dies, and that
leaves nothing behind. It imports only the standard library, so that a command can call it first of all and a verifier's
worker starts quickly.
"""

import atexit
import contextlib
import ctypes
import glob
import io
import os
import signal
import sys
import threading
import time

# ---------------------------------------------------------------- how a command begins and ends


def begin():
    """What a command calls before its slow imports. From here on lost output does not end it, SIGUSR1 is ignored until
    there is something to save, Ctrl-C prints one line and ends the process at once, with exit code 130, and libraries print
    neither progress bars nor warnings that say nothing to a user."""
    protect_output()
    os.environ.setdefault("TQDM_DISABLE", "1")  # read at its import. vLLM would show bars while it captures graphs
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of NUMA binding, and of NCCL's process groups
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it was ignored from the start
        signal.signal(signal.SIGINT, end_now)
    atexit.register(drop_process_group)  # what is registered first runs last: vLLM cleans up before


def end_now(number, frame):
    """A handler that imports cannot swallow, unlike KeyboardInterrupt. The kernel ends the children: die_with_parent()."""
    if os.environ.get("RANK", "0") == "0":
        tell(f"interrupted by {signal.Signals(number).name}")
    os._exit(128 + number)


def unwind_on_signals():
    """From here on a signal that ends the process raises SystemExit, so that `finally` removes what is half written. A
    second one ends it at once."""

    def unwind(number, frame):
        signal.signal(number, end_now)
        tell(f"interrupted by {signal.Signals(number).name}")
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, unwind)


def tell(line):
    """Write a line to stderr from a signal's handler: print() may be in use."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def drop_process_group():
    """Destroy a process group that is left: NCCL warns of one. After an error on one rank the others may never come, so
    wait only some seconds."""
    if (dist := sys.modules.get("torch.distributed")) and dist.is_available() and dist.is_initialized():
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
        thread.start()
        thread.join(5)


# ---------------------------------------------------------------- output for people


class Unfailing(io.FileIO):
    """A file descriptor that drops what cannot be written: a reader that went away, a full disk. Later output is tried
    again."""

    fault = None  # why the last loss happened

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError as e:
            self.fault = e
            return len(data)


def protect_output():
    """Replace stdout and stderr by streams that raise no error: not when a write fails, not when they were closed from the
    start, and not for a character outside their encoding, which is escaped. Lines are written at once."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: without this the next file that is opened would get the number, and the output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if number and getattr(sys, name) is getattr(sys, f"__{name}__"):
            old = getattr(sys, name)
            with contextlib.suppress(AttributeError, OSError):
                old.flush()
            stream = io.TextIOWrapper(
                io.BufferedWriter(Unfailing(number, "w", closefd=False)), encoding=old.encoding if old else "utf-8",
                errors="backslashreplace", line_buffering=True,
            )  # fmt: skip
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def lost_output():
    """For a command whose product is its output: 1, after a line on stderr, if some could not be written; else 0. A reader
    that had enough is no loss."""
    fault = getattr(getattr(sys.stdout.buffer, "raw", None), "fault", None)
    if fault is None or isinstance(fault, BrokenPipeError):
        return 0
    print(f"error: output was lost: {fault.strerror}", file=sys.stderr)
    return 1


# ---------------------------------------------------------------- progress, parents


@contextlib.contextmanager
def heartbeat(what, total, every=30.0):
    """Show the progress of a long block on rank 0: a bar on a terminal, elsewhere a line every `every` seconds. Yields a
    function; call it with the number of items done, out of `total`."""
    ended, start, count, bar = threading.Event(), time.time(), [0], sys.stdout.isatty()

    def beat():
        while not ended.wait(0.2 if bar else every):
            seconds, filled = time.time() - start, 30 * count[0] // max(1, total)
            if not bar:
                print(f"  ... {what}: {count[0]} of {total}, {seconds:.0f} s", flush=True)
            elif seconds > 1:  # a short block shows nothing
                print(f"\r  {what} [{'#' * filled:<30}] {count[0]}/{total} {seconds:4.0f} s ", end="", flush=True)
        if bar:
            print("\r\033[K", end="", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    if os.environ.get("RANK", "0") == "0":
        thread.start()
    try:
        yield lambda n: count.__setitem__(0, n)
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()  # so that it prints nothing into the output that follows


def die_with_parent(number=signal.SIGKILL):
    """Let the kernel send this process a signal when its parent dies: a parent that is killed by SIGKILL cannot do it.
    Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def end_group_at_death():
    """Fork a process that waits for the death of this one, which leads its group, and then kills the group. Linux only."""
    parent = os.getpid()
    if sys.platform == "linux" and os.fork() == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        die_with_parent(signal.SIGTERM)
        if os.getppid() == parent:
            signal.sigwait([signal.SIGTERM])
        os.killpg(0, signal.SIGKILL)


def end_tree(pid):
    """Kill a process that leads its group, the group, and what it or its descendants started in other groups. Of one that
    is dead already only the group is found."""
    if_possible = contextlib.suppress(ProcessLookupError, PermissionError)
    with if_possible:
        os.kill(pid, signal.SIGSTOP)  # it starts nothing more
    for child in descendants(pid):
        with if_possible:
            os.kill(child, signal.SIGKILL)
    with if_possible:
        os.killpg(pid, signal.SIGKILL)


def descendants(pid):
    """The processes that a process started, and those that these started. Linux only: elsewhere []."""
    found = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(path) as f:  # it has ended
            for child in map(int, f.read().split()):
                found += [child, *descendants(child)]
    return found
