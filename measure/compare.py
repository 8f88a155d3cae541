"""
Is a step of the toy slower in this tree than in another? Nine pairs of runs; the two take turns to go first.

    python measure/compare.py OTHER_TREE

No test asserts times: they depend on the machine and on what else it does.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def step_seconds(tree, out):
    """The median seconds of a step in a run of 20 steps, without the first two."""
    argv = ["--max_steps=20", "--eval_data=", "--reward_workers=1", f"--out_dir={out}"]
    subprocess.run([sys.executable, "train.py", *argv], cwd=tree, check=True, capture_output=True)
    with open(os.path.join(out, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f][3:]
    return statistics.median(sum(v for k, v in r.items() if k.startswith("time/")) for r in rows)


ratios = []
for i in range(9):
    seconds = {}
    for tree in (sys.argv[1], ROOT) if i % 2 == 0 else (ROOT, sys.argv[1]):
        with tempfile.TemporaryDirectory() as out:
            seconds[tree] = step_seconds(tree, os.path.join(out, "run"))
    ratios.append(seconds[ROOT] / seconds[sys.argv[1]])
    print(f"pair {i}: other {seconds[sys.argv[1]]:.3f} s, this {seconds[ROOT]:.3f} s, ratio {ratios[-1]:.3f}", flush=True)
print(f"ratio: median {statistics.median(ratios):.3f}, min {min(ratios):.3f}, max {max(ratios):.3f}")
