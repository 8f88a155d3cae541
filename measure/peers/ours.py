"""
Our side of `python bench.py peers`: train.py itself, which waits before each step until it is its turn.

    python measure/peers/ours.py SPEC          SPEC: JSON, as measure/peers/compare.py writes it
"""

import json
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)

from turns import settle, synchronize, tell, wait

import train
from configurator import configure
from rollout import open_sampler
from runtime.plan import measured_memory

spec, seen = json.loads(sys.argv[1]), {}


def endless(model, **options):
    """A sampler in which no token ends a completion: both sides decode the same number of tokens."""
    seen["engine"] = open_sampler(model, **{**options, "stop_ids": []})
    return seen["engine"]


def hook(step, phase, record):
    """train.main calls it as each phase of a step begins, and at the step's end."""
    if phase == "sync":
        wait()
        synchronize()
        seen["start"] = time.perf_counter()
    elif phase == "update":  # its memory is measured from what is in use when it begins, which is a peak over no time
        settle()
        measured_memory()
        seen["in_use"] = measured_memory()[0] - seen["engine"].given_back  # the record's peaks are without it, too
    elif phase == "done":
        synchronize()
        seconds, m = time.perf_counter() - seen["start"], record
        assert m["length/own"] == spec["completion"] and m["own/truncated"] == 1, m
        peaks = [m[f"memory/{name}"] for name in ("sync", "rollout", "update")]
        tell({"seconds": seconds, "decode": m["time/sync"] + m["time/rollout"], "reward": m["time/reward"],
              "update": m["time/update"], "update_bytes": m["memory/update"] * 2**30 - seen["in_use"],
              "peak_bytes": max(peaks) * 2**30})  # fmt: skip


def main():
    n = spec["completion"]
    train.config = configure(vars(train), [
        f"--model={spec['model']}", f"--data={spec['parquet']}", "--eval_data=", f"--out_dir={spec['folder']}/ours",
        f"--sampler={spec['sampler']}", f"--n_rollouts={spec['group']}", "--n_teacher=0",
        f"--prompts_per_step={spec['prompts']}", f"--max_tokens={n}", f"--max_teacher_tokens={n}", "--max_prompt_tokens=64",
        "--clip_low=0.2", "--clip_high=0.2",
        f"--loss_constant={spec['prompts'] * spec['group'] * n}", "--require_think=False", f"--grader={HERE}/parity.py",
        f"--max_steps={10**6}", "--learning_rate=1e-6", "--warmup_steps=0", f"--micro_tokens={spec['micro_tokens']}",
        "--canary_interval=0", f"--device={spec['device']}", f"--dtype={spec['dtype']}", "--shard=none",
        f"--recompute={spec['recompute']}", f"--gpu_memory={spec['gpu_memory']}", "--hang_timeout=3600",
    ], train.__file__)  # fmt: skip
    train.main(open_sampler=endless, hook=hook)


if __name__ == "__main__":
    main()
