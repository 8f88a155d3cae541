"""
Is this tree's toy step slower than another's? Nine pairs of runs, alternating which goes first.

    python measure/compare.py OTHER_TREE

A soak script, run by hand into LOG.md: times are never asserted in a test.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def step_seconds(tree, out):
    """The median seconds of a step in a run of 20, without the first two."""
    argv = ["--max_steps=20", "--eval_data=", "--reward_workers=1", f"--out_dir={out}"]
    subprocess.run([sys.executable, "train.py", *argv], cwd=tree, check=True, capture_output=True)
    with open(os.path.join(out, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f][3:]
    return statistics.median(sum(v for k, v in r.items() if k.startswith("time/")) for r in rows)


ratios = []
for i in range(9):
    seconds = {}
    for tree in (sys.argv[1], HERE) if i % 2 == 0 else (HERE, sys.argv[1]):
        with tempfile.TemporaryDirectory() as out:
            seconds[tree] = step_seconds(tree, os.path.join(out, "run"))
    ratios.append(seconds[HERE] / seconds[sys.argv[1]])
    print(f"pair {i}: other {seconds[sys.argv[1]]:.3f} s, this {seconds[HERE]:.3f} s, ratio {ratios[-1]:.3f}", flush=True)
print(f"ratio: median {statistics.median(ratios):.3f}, min {min(ratios):.3f}, max {max(ratios):.3f}")
