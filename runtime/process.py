"""
A process that shows its progress, and that dies when its parent dies. It imports only the standard library, so that a
verifier's worker starts quickly.
"""

import contextlib
import ctypes
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


def die_with_parent():
    """Let the kernel kill this process when its parent dies: a parent that is killed by SIGKILL cannot do it. Linux
    only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
