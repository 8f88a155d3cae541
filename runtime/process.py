"""
One process among others: it shows how far it is, and dies when its parent does. Standard library only, so that a verifier's
worker starts quickly.
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
    """Show on rank 0 how far a long block is: a bar on a terminal, elsewhere a line every so many seconds. Yields a function
    that takes how many of the total are done."""
    ended, start, count, bar = threading.Event(), time.time(), [0], sys.stdout.isatty()

    def beat():
        while not ended.wait(0.2 if bar else every):
            passed, filled = time.time() - start, 30 * count[0] // max(1, total)
            if not bar:
                print(f"  ... {what}: {count[0]} of {total}, {passed:.0f} s", flush=True)
            elif passed > 1:  # a short block shows nothing
                print(f"\r  {what} [{'#' * filled:<30}] {count[0]}/{total} {passed:4.0f} s ", end="", flush=True)
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
            thread.join()  # so that nothing is printed into what comes next


def die_with_parent():
    """Let the kernel kill this process when its parent dies, however that happens: a parent that is killed outright cannot
    do it. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
