"""
How many answers per second the verifier grades: each kind alone, and mixed.

    python measure/grading_speed.py [WORKERS [ANSWERS]]          default: 2 workers, 2000 answers

There are eight answers per question, each after a thought. Half of them are wrong. All wrong answers differ, and so do all
questions.
"""

import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from reward import Verifier

MIX = {  # kind: (an answer, the same answer written differently), made of two numbers
    "integers": lambda a, b: (f"{a}", f"{a}"),
    "fractions": lambda a, b: (f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{3 * a}}}{{{3 * b}}}"),
    "radicals": lambda a, b: (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}"),
    "intervals": lambda a, b: (f"[{-a}, {b})", f"[{-a},{b})"),
    "text": lambda a, b: (f"\\text{{case {a}}}", f"\\text{{case {a}}}"),
}
# How many ground truths of MATH-500 are of each kind. The other 74 are decimals, polynomials and the like.
MATH_500 = {"integers": 313, "fractions": 62, "radicals": 23, "intervals": 19, "text": 9}


def pairs(kind, n):
    """n pairs (response, ground truth)."""
    rng, rows = random.Random(kind), []
    questions, others = rng.sample(range(2, 10**4), -(-n // 8)), rng.sample(range(10**4, 10**5), n)
    for i in range(n):
        a, b = questions[i // 8], others[i]
        gold, right = MIX[kind](a, a + 1)
        wrong, _ = MIX[kind](b, a)
        thought = f"We try {b}, and then {a}: " + "so it must be that, as was to be shown. " * 20
        rows.append((f"{thought}</think>\nThe answer is $\\boxed{{{wrong if i % 2 else right}}}$.", gold))
    return rows


def main(workers=2, n=2000):
    print(f"{workers} workers")
    kinds = {kind: pairs(kind, n) for kind in MIX}
    equal = [row for rows in zip(*(rows[: n // len(MIX)] for rows in kinds.values()), strict=True) for row in rows]
    shared = [row for kind, share in MATH_500.items() for row in kinds[kind][: n * share // sum(MATH_500.values())]]
    random.Random(0).shuffle(shared)
    with Verifier(workers) as verifier:
        verifier.score(*zip(*[("</think>$x^2$", "x^2")] * 20 * workers, strict=True))  # start the workers; they import
        for name, rows in {**kinds, "as many of each": equal, "as in MATH-500": shared}.items():
            start = time.perf_counter()
            verdicts = verifier.score(*zip(*rows, strict=True))
            rate = len(rows) / (time.perf_counter() - start)
            right = sum(v.reward for v in verdicts) / len(rows)
            print(f"{name:<16} {len(rows):5} answers, {right:.0%} right: {rate:6.0f} per second", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
