"""
Train the toy for long, and watch what must not grow.

    python measure/soak.py                      2,000 steps through vLLM
    python measure/soak.py --max_steps=150      any knob of train.py

Prints the slope of resident memory after a warm-up of a fifth of the steps, by least squares, and the range of open files
and of child processes. Exit code 1 if memory grows by more than 10 MiB per 1,000 steps, if children come or go or files
stay open after the warm-up, or if a process is left when the run has ended.
"""

import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))


def resident(*pids):
    """MiB, of all together."""
    pages = [int(open(f"/proc/{p}/statm").read().split()[1]) for p in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def children(pid):
    """Started by any of its threads."""
    return [int(p) for t in os.listdir(f"/proc/{pid}/task") for p in open(f"/proc/{pid}/task/{t}/children").read().split()]


def with_argument(text):
    """Processes, zombies too, whose command line has a text in it; a zombie has none, so by their parent."""
    found = []
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{p}/cmdline", "rb").read().decode(errors="replace")
            state, parent = re.search(r"\) (\S) (\d+)", open(f"/proc/{p}/stat").read()).groups()
        except OSError:  # it ended meanwhile
            continue
        if text in line or (state == "Z" and int(parent) in (1, os.getpid())):
            found.append(f"{p} {state} {line[:80]}")
    return found


def main():
    before = with_argument("no such thing")
    with tempfile.TemporaryDirectory() as folder:
        # At the default rate the policy falls apart in step 1,600-odd and fills max_tokens, and memory follows the batch.
        argv = ["--sampler=vllm", "--max_steps=2000", "--learning_rate=2e-5", "--eval_k=1", "--eval_interval=50",
                "--save_interval=50", "--rollout_interval=50", f"--out_dir={folder}/run", *sys.argv[1:]]  # fmt: skip
        start = time.time()
        process = subprocess.Popen(
            [sys.executable, os.path.join(os.path.dirname(HERE), "train.py"), *argv], stdout=subprocess.PIPE, text=True
        )
        seen = []  # step, MiB, MiB of the children, open files, children
        for line in process.stdout:
            if m := re.match(r"step +(\d+)/.*len +([\d.]+)", line):
                pid, own = process.pid, children(process.pid)
                seen.append((int(m[1]), resident(pid), resident(*own), len(os.listdir(f"/proc/{pid}/fd")), len(own)))
                if seen[-1][0] % 100 == 0:
                    print(
                        "step {}: {:.0f} MiB, children {:.0f} MiB, {} files, {} children;".format(*seen[-1]),
                        f"length {m[2]}",
                        flush=True,
                    )
        code = process.wait()
        left = [p for p in with_argument(folder) if p not in before]
    steps, memory, kids_memory, files, kids = np.array(seen).T
    warm = steps > steps[-1] / 5
    slope, kids_slope = (np.polyfit(steps[warm], x[warm], 1)[0] * 1000 for x in (memory, kids_memory))
    span = lambda x: f"{int(x[warm].min())} to {int(x[warm].max())}"
    print(f"{int(steps[-1])} steps in {time.time() - start:.0f} s, exit code {code}")
    print(f"after step {int(steps[warm][0]) - 1}, MiB and slope in MiB per 1,000 steps:")
    for name, x, rise in (("the trainer and its engine", memory, slope), ("the verifier's workers", kids_memory, kids_slope)):
        print(
            f"  {name}: {x[warm][0]:.0f} to {x[warm][-1]:.0f}, least {x[warm].min():.0f}, most {x[warm].max():.0f}, {rise:+.2f}"
        )
    print(f"open files {span(files)}; children {span(kids)}; processes left: {left or 'none'}")
    # A file that is being written when the step's line appears is open for a moment; what stays open moves the median.
    early, late = np.array_split(files[warm], 2)
    steady = max(slope, kids_slope) < 10 and np.median(early) == np.median(late) and len(set(kids[warm])) == 1
    sys.exit(code or (0 if steady and not left else 1))


if __name__ == "__main__":
    main()
