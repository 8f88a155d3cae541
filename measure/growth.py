"""
How the seconds and the memory of a step grow with one quantity at a time, from a small model with random weights.

    python measure/growth.py [SAMPLER]          the default is torch

Each figure is the median of three steps. An exponent is the slope of a line through the points on logarithmic axes: 1 means
in proportion. Matrices grow with the square of the width. Every rank has prompts of its own, so 0 would be perfect for ranks.
A rank has one micro-batch with all its tokens. glibc's malloc returns memory at once here, so that it can be seen; that costs
time.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from configurator import ROOT
from measure.random_model import build_model, numbers, write_rows

BASE = {"group": 8, "tokens": 128, "vocabulary": 8192, "width": 256, "ranks": 1}
POINTS = {"group": (8, 16, 32), "tokens": (128, 256, 512), "vocabulary": (8192, 32768, 131072), "width": (256, 512, 1024),
          "ranks": (1, 2)}  # fmt: skip
# Large tensors return their memory at once, so that resident memory is memory in use.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def measure(folder, sampler, group, tokens, vocabulary, width, ranks):
    """[seconds of the rollout, seconds of the update, GiB that the update adds]"""
    model, out = os.path.join(folder, f"model_{width}_{vocabulary}"), os.path.join(folder, "run")
    if not os.path.isdir(model):
        heads = width // 64
        build_model(model, (width, 2 * width, 2, heads, heads, vocabulary, True))
    parquet = os.path.join(folder, "prompts.parquet")
    write_rows(parquet, numbers(64, 16, 16))
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    command = [
        sys.executable, *launcher, "train.py", f"--model={model}", f"--data={parquet}", "--eval_data=", f"--sampler={sampler}",
        f"--n_rollouts={group}", "--n_teacher=0", f"--prompts_per_step={ranks}", f"--max_tokens={tokens}",
        "--max_prompt_tokens=32", "--require_think=False", "--grader=measure/peers/parity.py", "--reward_workers=1",
        "--canary_interval=0", "--max_steps=4",
        f"--loss_constant={group * tokens}", f"--micro_tokens={group * (tokens + 32)}", "--warmup_steps=0", f"--out_dir={out}",
    ]  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    if found.returncode:
        sys.exit(found.stdout[-2000:] + found.stderr[-2000:])
    with open(os.path.join(out, "metrics.jsonl")) as f:
        steps = [json.loads(line) for line in f][2:]  # without step 0 and step 1, which allocates
    if min(s["length/own"] for s in steps) < 0.8 * tokens:
        sys.exit("samples ended early: the random model wrote its end-of-sequence token too often")
    columns = [[s["time/rollout"] for s in steps], [s["time/update"] for s in steps],
               [s["memory/update"] - s["memory/reward_after"] for s in steps]]  # fmt: skip
    return [statistics.median(column) for column in columns]


def exponent(xs, ys):
    x, y = [math.log(v) for v in xs], [math.log(max(v, 1e-6)) for v in ys]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main(sampler="torch"):
    print(f"from {', '.join(f'{k} {v}' for k, v in BASE.items())}; sampler {sampler}, one thread a rank\n")
    print("| of | rollout, s | exponent | update, s | exponent | update's memory, GiB | exponent |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = measure(folder, sampler, **BASE)
        for name, points in POINTS.items():
            rows = [base if p == BASE[name] else measure(folder, sampler, **{**BASE, name: p}) for p in points]
            cells = [f"{name} {', '.join(map(str, points))}"]
            for ys, form in zip(zip(*rows, strict=True), ("{:.2f}", "{:.2f}", "{:.3f}"), strict=True):
                cells += [", ".join(map(form.format, ys)), f"{exponent(points, ys):.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
