"""What the two sides of `python bench.py peers` share: they wait for their turn, and tell how it went."""

import ctypes
import gc
import json
import os
import sys

out = os.fdopen(os.dup(1), "w")  # the libraries print into the other
os.dup2(2, 1)


def tell(row):
    print(json.dumps(row), file=out, flush=True)


def wait():
    """Until it is this side's turn again: "time" or "memory", what counts of the step. When there is no turn, end at once."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return line.strip()


def settle():
    """Give back what is free, so that an increment of memory is one. To take it again takes time."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident():
    """Bytes that this process holds, and at most held since the last call."""
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
