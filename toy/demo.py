"""
LUFFY's claim in one picture: on-policy GRPO, SFT and LUFFY from the same base, with the same prompts and traces.

    make demo             seed 0
    make demo SEEDS=3     the acceptance run: exit code 1 if a margin is missed

Each run is train.py with one small overlay, with vLLM where it is installed. As many runs as there are cores run
at a time. Logs, metrics and checkpoints are kept in out/demo/.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from runtime.process import protect_output

METHODS = ["luffy", "grpo", "sft", "sft_verified"]  # the longest first
NOTES = """
What this shows, and what it does not:
- The base was built on purpose (toy/build.py): it can do the sum step by step but never starts to. Its 1 % is chance.
- 30 % of the teacher's traces stop one number early. SFT copies that mistake; LUFFY's verifier gives it advantage <= 0.
- SFT on only the verified traces reaches 1.0 too, and faster. LUFFY's gain is over unfiltered SFT, and over on-policy RL.
- It does not show that shaping beats no shaping, nor that the skill generalises to longer sums."""


printed = []  # lines that are printed only once


def train(folder, arguments):
    """Run train.py with these arguments into a folder. Prints its evaluations, and writes all output to FOLDER.log. Returns the
    folder; a failed run ends the program."""
    name = os.path.basename(folder)
    command = [sys.executable, "-u", os.path.join(ROOT, "train.py"), *arguments, f"--out_dir={folder}"]
    step = "0"
    with open(folder + ".log", "w") as log, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        for line in process.stdout:
            log.write(line)
            if found := re.match(r"step +(\d+)/", line):
                step = found[1]
            if line.startswith("  eval  "):  # the columns' names
                if not printed:
                    print(f"{'':<15}         {line.rstrip()}", flush=True)
                    printed.append(line)
            elif line.startswith(("  eval ", "  ...")):
                print(f"{name:<15} step {step:>2} {line.rstrip()}", flush=True)
    if process.returncode:
        with open(folder + ".log") as log:
            sys.exit(f"{name} failed; the end of {folder}.log:\n" + "".join(log.readlines()[-15:]))
    return folder


def judge(methods):
    """Check the margins, per seed and on average: [(claim, whether it holds)]."""
    final = {m: [next(x for x in reversed(r) if "eval/greedy" in x) for r in runs] for m, runs in methods.items()}
    greedy = {m: [x["eval/greedy"] for x in rows] for m, rows in final.items()}
    gaps = [a["eval/avg@k"] - b["eval/avg@k"] for a, b in zip(final["luffy"], final["sft"], strict=True)]
    mean = lambda values: sum(values) / len(values)
    show = lambda values: " ".join(f"{v:.3f}" for v in values)
    return [
        (f"GRPO stays at chance: greedy <= 0.05 ({show(greedy['grpo'])})", max(greedy["grpo"]) <= 0.05),
        (f"LUFFY solves it: greedy >= 0.9 each, >= 0.95 on average ({show(greedy['luffy'])})",
         min(greedy["luffy"]) >= 0.9 and mean(greedy["luffy"]) >= 0.95),
        (f"LUFFY beats unfiltered SFT at T=1 by >= 0.08 each, >= 0.15 on average ({show(gaps)})",
         min(gaps) >= 0.08 and mean(gaps) >= 0.15),
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N-1 (default 1)")
    parser.add_argument(
        "--out", default=os.path.join(ROOT, "out", "demo"), help="folder for runs and picture (default out/demo)"
    )
    args, arguments = parser.parse_known_args()  # the rest goes to train.py
    start = time.time()
    os.makedirs(args.out, exist_ok=True)
    print(f"{len(METHODS)} methods x {args.seeds} seed(s), 60 steps each, on the CPU; starting the engines takes a while")

    def run(job):
        method, seed = job
        common = ["--reward_workers=1", "--device=cpu", *arguments]
        return train(os.path.join(args.out, f"{method}_{seed}"), [f"config/method/{method}.py", f"--seed={seed}", *common])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = list(pool.map(run, [(m, s) for s in range(args.seeds) for m in METHODS]))

    import plot

    methods = plot.by_method([f for m in METHODS for f in folders if os.path.basename(f).rpartition("_")[0] == m])
    picture = os.path.join(args.out, "demo.png")
    plot.draw(methods, [picture], plot.OUTCOMES)
    print(f"\n200 held-out problems after 60 steps; sampled is T=1, 4 samples a problem\n{plot.table(methods)}\n")
    claims = judge(methods)
    for claim, holds in claims:
        print("holds " if holds else "MISSED", claim)
    print(NOTES)
    print(f"\npicture: {picture}\n{time.time() - start:.0f} s in total")
    sys.exit(not all(holds for _, holds in claims))


if __name__ == "__main__":
    protect_output()
    main()
