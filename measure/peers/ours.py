"""
Our side of `python bench.py peers`: train.py itself, stopped before each step until it is told to go on.

    python measure/peers/ours.py SPEC          SPEC: JSON, as peers/compare.py writes it
"""

import json
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from turns import resident, settle, tell, wait

import train
from configurator import configure


def main():
    spec = json.loads(sys.argv[1])
    n = spec["completion"]
    train.config = configure(vars(train), [
        f"--model={spec['model']}", f"--data={spec['parquet']}", "--eval_data=", f"--out_dir={spec['folder']}/ours",
        f"--sampler={spec['sampler']}", f"--n_rollouts={spec['group']}", "--n_teacher=0",
        f"--prompts_per_step={spec['prompts']}", f"--max_tokens={n}", f"--max_teacher_tokens={n}", "--max_prompt_tokens=64",
        "--clip_low=0.2", "--clip_high=0.2",
        f"--loss_constant={spec['prompts'] * spec['group'] * n}", "--require_think=False", f"--grader={ROOT}/peers/parity.py",
        f"--max_steps={10**6}", "--learning_rate=1e-6", "--warmup_steps=0", f"--micro_tokens={spec['micro_tokens']}",
        "--canary_interval=0", "--dtype=float32",
    ], train.__file__)  # fmt: skip
    # Both sides decode the same number of tokens: nothing that is sampled ends a completion.
    real_torch, real_vllm = train.TorchSampler, train.VLLMSampler
    train.TorchSampler = lambda config, eos, length, dtype: real_torch(config, -1, length, dtype)

    def endless(*arguments):
        engine = real_vllm(*arguments)
        import vllm  # not before the engine has set how

        real_params = vllm.SamplingParams
        vllm.SamplingParams = lambda **options: real_params(**{**options, "stop_token_ids": []})
        return engine

    train.VLLMSampler = endless
    records, start = [], None
    real_write, real_reseed = train.write_metrics, train.reseed

    def write_metrics(folder, rows):
        records.extend(dict(row) for row in rows)
        real_write(folder, rows)

    def reseed(step):  # the first thing in a step, and so the end of the one before
        nonlocal start
        if start is not None:
            seconds, m = time.perf_counter() - start, records[-1]
            assert m["length/own"] == n and m["own/truncated"] == 1, m
            tell({"seconds": seconds, "decode": m["time/sync"] + m["time/rollout"], "reward": m["time/reward"],
                  "update": m["time/update"], "update_bytes": m["memory/update"] * 2**30 - at_start,
                  "peak_bytes": max(m[f"memory/{name}"] for name in ("sync", "rollout", "update")) * 2**30})  # fmt: skip
        wait()
        start = time.perf_counter()
        real_reseed(step)

    train.write_metrics, train.reseed = write_metrics, reseed
    # The update's memory over what is there as it begins.
    real_begin, at_start = train.Phases.begin, 0

    def begin(phases, name):
        nonlocal at_start
        real_begin(phases, name)
        if name == "update":
            settle()
            at_start, _ = resident()

    train.Phases.begin = begin
    train.main()


if __name__ == "__main__":
    main()
