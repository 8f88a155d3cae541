"""What the two sides of `python bench.py peers` share: they wait for their turn, and tell how it went."""

import ctypes
import gc
import json
import os
import sys

out = os.fdopen(os.dup(1), "w")  # the libraries print into the other
os.dup2(2, 1)
turn = ""  # what counts of this step, once it is this side's turn


def tell(row):
    print(json.dumps(row), file=out, flush=True)


def wait():
    """Until it is this side's turn again, for a step whose "time" or whose "memory" counts; when there is none, end at once."""
    global turn
    turn = sys.stdin.readline().strip()
    if not turn:
        os._exit(0)
    settle()


def settle():
    """If the step's memory counts, give back what is free, so that an increment is one. To take it again takes time."""
    if turn == "memory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def resident():
    """Bytes that this process holds, and at most held since the last call."""
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
