"""What the two sides of `python bench.py peers` share: they wait for their turn, and report the result."""

import ctypes
import gc
import json
import os
import sys

out = os.fdopen(os.dup(1), "w")  # stdout for the reports; what the libraries print goes to stderr
os.dup2(2, 1)
turn = ""  # what is measured in this step: "time" or "memory"

import torch


def tell(row):
    """Report a step's measurements, as a line of JSON."""
    print(json.dumps(row), file=out, flush=True)


def wait():
    """Wait until it is this side's turn, and note whether "time" or "memory" is measured. Ends the process when there is no
    further turn."""
    global turn
    turn = sys.stdin.readline().strip()
    if not turn:
        os._exit(0)
    settle()


def settle():
    """In a step whose memory is measured, return free memory to the system, so that new allocations show. This costs time."""
    if turn == "memory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def synchronize():
    """Let a GPU finish what it was given: call it before reading the clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_use():
    """(bytes in use, the most that was in use since the last call): of torch's allocator on a GPU, of this process on a
    CPU."""
    if torch.cuda.is_available():
        found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
