"""
A process that shows its progress, that dies when its parent dies, and that leaves nothing behind. It imports only the
standard library, so that a verifier's worker starts quickly.
"""

import contextlib
import ctypes
import glob
import os
import signal
import sys
import threading
import time


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
