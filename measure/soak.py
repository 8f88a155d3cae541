"""
Train the toy for a long time and watch what must not grow.

    python measure/soak.py                      2,000 steps through vLLM
    python measure/soak.py --max_steps=150      any knob of train.py

After a warm-up of a fifth of the steps it prints the slope of resident memory, by least squares, and the range of open files
and of child processes. The exit code is 1 if memory grows by more than 10 MiB per 1,000 steps, if the number of children
changes, if files stay open, or if a process is left after the end of the run.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def resident(*pids):
    """MiB of all these processes together."""
    pages = [int(open(f"/proc/{p}/statm").read().split()[1]) for p in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def children(pid):
    """The child processes that any of its threads started."""
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            found += map(int, open(f"/proc/{pid}/task/{thread}/children").read().split())
    return found


def with_argument(text):
    """Processes whose command line contains a text. Zombies have no command line, so those of this process count, too."""
    found = []
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{p}/cmdline", "rb").read().decode(errors="replace")
            state, parent = re.search(r"\) (\S) (\d+)", open(f"/proc/{p}/stat").read()).groups()
        except OSError:  # it has ended meanwhile
            continue
        if text in line or (state == "Z" and int(parent) in (1, os.getpid())):
            found.append(f"{p} {state} {line[:80]}")
    return found


def main():
    before = with_argument("no such thing")
    with tempfile.TemporaryDirectory() as folder:
        # At the default learning rate the policy breaks down near step 1,600: it fills max_tokens, and memory grows with that.
        argv = ["--sampler=vllm", "--max_steps=2000", "--learning_rate=2e-5", "--eval_k=1", "--eval_interval=50",
                "--save_interval=50", "--rollout_interval=50", f"--out_dir={folder}/run", *sys.argv[1:]]  # fmt: skip
        start = time.time()
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *argv], stdout=subprocess.PIPE, text=True)
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
    # A file that is just being written is open for a moment. One that stays open raises the median.
    early, late = np.array_split(files[warm], 2)
    steady = max(slope, kids_slope) < 10 and np.median(early) == np.median(late) and len(set(kids[warm])) == 1
    sys.exit(code or (0 if steady and not left else 1))


if __name__ == "__main__":
    main()
