"""
The verifier under attack.

    python measure/hostile_answers.py [oat]

First 10,000 malformed answers, 20 of which would never return ("hangers"); then one hanger among 2,000 ordinary answers. Prints
how many malformed answers were called right (none may be), the largest memory of any worker (the limit is 4 GiB), and the
throughput of the ordinary answers with a hanger relative to that without: the median of three pairs of runs, at least 0.8.
"""

import glob
import os
import random
import statistics
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from reward import MEMORY, Verifier

HANGERS = [  # without a time limit math-verify takes more than five seconds for each of these
    "9^{9^{9^9}}", "9^{9^9}", "10^{10^{10}}", "2^{10^9}", "7^{10^7}", "10^{-999999999}", "(10^8)!", "(10^6)!", "((9!)!)!",
    r"\binom{10^9}{5\cdot 10^8}", r"\sum_{n=1}^{10000000}\frac{1}{n}", r"\int_0^1 e^{\sin(x^x)}dx", "(x+1)^{1000}",
    "1.0000001^{9^{9^9}}", r"\frac{" * 30 + "1" + "}{2}" * 30, r"\frac{" * 1000 + "1" + "}{2}" * 1000,
    "(" * 500 + "1" + ")" * 500, "1+" * 50_000 + "1", r"\{" + ",".join(map(str, range(3000))) + r"\}", "a" * 100_000,
]  # fmt: skip
OWNED = os.path.join(tempfile.mkdtemp(), "owned")  # this file appears if an answer is executed as a program
PIECES = [
    "\\boxed{", "{", "}", "(", ")", "[", "]", "\\frac", "\\sqrt", "\\text{", "\\left(", "\\right]", "^", "_", "+", "-", "/",
    "=", ",", "\\pi", "\\infty", "\\cup", "\\in", "\\{", "\\}", "$", "$$", "\\[", "\\]", "\\(", "%", "\\%", "x", "y", "e",
    "i", "n!", "7", "13", "0.25", "-1", "10", "and", "or", "the answer is ", "\\begin{pmatrix}", "\\end{pmatrix}", "&",
    "\\\\", "\n", " ", "\x00", "\x1b[2J", "\u202e", "\ud800", "\U0001f600", "\u00bd", "\u0663", "\uff1d", "<think>",
    f"__import__('os').system('touch {OWNED}')", "lambda: 0", "\\sin", "\\log", "\\lim_{x\\to 0}", "\\int", "\\sum_{k=1}^{3}",
    "1e5", "0x1F", "1_000", "NaN", "inf", "None",
]  # fmt: skip
GOLDS = ["104729.31", r"\frac{7919}{104729}", r"17\sqrt{7919}", "(7919, 104729)", r"x^2+7919x+104729", "7919", "8",
         r"\frac{2}{9}", "8x^2", "(8, 92]", "E", r"\text{blue}"]  # fmt: skip


def malformed(n, rng):
    """n pairs (answer, ground truth). Answers are random pieces; no ground truth is among the pieces."""
    pairs = []
    for _ in range(n):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 25)))
        if rng.random() < 0.5:
            text = f"\\boxed{{{text}}}"
        pairs.append(("</think>" + text, rng.choice(GOLDS)))
    return pairs


def ordinary(n, rng):
    """n pairs (solution, ground truth), of about 1,000 characters, with right and wrong final answers of common kinds."""
    steps = "Let $x$ be the number we look for. Then $x+1=3$ and $\\frac{x}{2}=1$, which is what we wanted to show first. "
    pairs = []
    for _ in range(n):
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        gold = rng.choice([f"\\frac{{{a}}}{{{b}}}", f"{a}\\sqrt{{{b}}}", f"{a}.5", f"({a}, {b}]", f"x^2+{a}x-{b}", f"{a}\\pi"])
        given = gold if rng.random() < 0.5 else gold.replace(str(a), str(a + 1))
        pairs.append((f"</think>{steps * 9}The answer is \\boxed{{{given}}}.", gold))
    return pairs


def watch(stop, peaks):
    """Collect the address spaces of this process's workers in `peaks`, in bytes."""
    while not stop.wait(0.02):
        for path in glob.glob(f"/proc/{os.getpid()}/task/*/children"):
            try:
                for pid in open(path).read().split():
                    line = next(x for x in open(f"/proc/{pid}/status") if x.startswith("VmPeak"))
                    peaks.append(int(line.split()[1]) * 1024)
            except (OSError, StopIteration):  # the worker has ended
                pass


def seconds(verifier, pairs):
    """Seconds that grading the pairs takes, and the verdicts."""
    start = time.time()
    verdicts = verifier.score(*zip(*pairs, strict=True))
    return time.time() - start, verdicts


def under_fire(grader):
    """Grade malformed answers. Returns how many were called right, and the largest worker's memory in bytes."""
    rng, stop, peaks = random.Random(0), threading.Event(), []
    thread = threading.Thread(target=watch, args=(stop, peaks))
    with Verifier(workers=2, grader=grader) as verifier:
        thread.start()
        pairs = malformed(10_000 - len(HANGERS), rng) + [(f"</think>\\boxed{{{h}}}", "7919") for h in HANGERS]
        rng.shuffle(pairs)
        taken, verdicts = seconds(verifier, pairs)
        stop.set()
        thread.join()
    right = [p for p, v in zip(pairs, verdicts, strict=True) if v.reason == "correct"]
    reasons = {r: sum(v.reason == r for v in verdicts) for r in sorted({v.reason for v in verdicts})}
    print(f"{grader}: {len(pairs)} malformed answers in {taken:.0f} s: {len(right)} called right, {reasons}")
    print(f"largest worker {max(peaks) / 2**30:.2f} GiB, limit {MEMORY / 2**30:.0f} GiB", flush=True)
    for p in right[:10]:
        print("called right:", ascii(p))
    return len(right), max(peaks)


def throughput(grader):
    """The throughput of ordinary answers with one hanger among them, relative to that without."""
    easy = ordinary(2000, random.Random(1))
    hard = [*easy[:700], (f"</think>$\\boxed{{{HANGERS[0]}}}$", "7919"), *easy[700:]]
    with Verifier(workers=2, grader=grader) as verifier:
        seconds(verifier, easy[:10])
        runs = [(seconds(verifier, easy)[0], seconds(verifier, hard)[0]) for _ in range(3)]
    ratio = statistics.median(a / b for a, b in runs)
    shown = ", ".join(f"{a:.2f} s, with a hanger {b:.2f} s" for a, b in runs)
    print(f"{len(easy)} ordinary answers: {shown}: {ratio:.2f} of the throughput")
    return ratio


if __name__ == "__main__":
    grader = sys.argv[1] if len(sys.argv) > 1 else "math_verify"
    right, peak = under_fire(grader)
    sys.exit(right > 0 or peak > MEMORY or os.path.exists(OWNED) or throughput(grader) < 0.8)
