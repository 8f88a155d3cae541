"""
Seconds until the first step is done, and what the engine alone takes of them: import, construction and a first generation.
Also those of `train.py --help`.

    python measure/start_up.py [REPEATS]          the default is 5; the two take turns
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENGINE = """
from data import load_problems
from runtime.tokenizer import load_tokenizer
from rollout import VLLMSampler
tokenizer = load_tokenizer("toy/base")
engine = VLLMSampler("toy/base", [tokenizer.eos_token_id], 104)
prompts = [p.prompt_ids for p in load_problems("toy/train.parquet", tokenizer, 64, 40, True, print)[:16] for _ in range(8)]
engine.generate(prompts, list(range(128)), 1.0, 40, "toy/base")
print("step", flush=True)
"""


def seconds(*command):
    """Seconds until the command prints a line that begins with "step", or ends without one."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("step"):
                break
        found = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        sys.exit(f"{command[0]} failed with {process.returncode}")
    return found


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(repeats=5):
    helps, runs, engines = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats):
            helps.append(seconds("train.py", "--help"))
            turns = [lambda i=i: runs.append(seconds("train.py", "--eval_data=", "--max_steps=1", f"--out_dir={folder}/{i}")),
                     lambda: engines.append(seconds("-c", ENGINE))]  # fmt: skip
            for turn in turns if i % 2 else turns[::-1]:
                turn()
    print(f"median (least to most) of {repeats}, seconds")
    print(f"train.py --help                      {spread(helps)}")
    print(f"engine alone, to its first samples   {spread(engines)}")
    print(f"train.py, to the end of step 1       {spread(runs)}")
    print(f"ratio                                {spread([a / b for a, b in zip(runs, engines, strict=True)])}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
