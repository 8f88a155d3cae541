r"""
Answers that hedge: two different ground truths, and one answer that holds both. No answer may be right for both.

    python measure/hedges.py [PAIRS [SEED]]          default: 5000 0

For each grader and each way to hedge it prints how many answers are right for none, for one and for both of the two. One is
allowed: the last of two boxes counts, and so does the end of a chain of equations. Of a composite answer, such as a set, it
is the composite that counts, and it is neither of the two. The exit code is 1 if any answer is right for both.
"""

import os
import random
import re
import sys
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from reward import GRADERS, Verifier

PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
WORDS = ("east", "west", "north", "south", "even", "odd", "yes", "no", "red", "blue", "Monday", "Friday")
GOLDS = {  # kind: a ground truth, made of two different primes p < q
    "integer": lambda p, q, rng: rng.choice([f"{p}", f"-{q}", f"{p},{q}0", f"{p * q}"]),
    "decimal": lambda p, q, rng: rng.choice([f"{p}.{q}", f"-0.{q}", f"{q}.0{p}"]),
    "fraction": lambda p, q, rng: rng.choice([rf"\frac{{{p}}}{{{q}}}", f"{p}/{q}", rf"-\frac{{{q}}}{{{p}}}"]),
    "expression": lambda p, q, rng: rng.choice([f"{p}x+{q}", rf"{p}\sqrt{{{q}}}", rf"{q}\pi", f"x^2-{p}x+{q}", f"2^{{{p}}}"]),
    "tuple": lambda p, q, rng: f"({p}, {q})",
    "interval": lambda p, q, rng: rng.choice([f"[{p}, {q})", rf"(-\infty, {p}]"]),
    "set": lambda p, q, rng: rng.choice([rf"\{{{p}, {q}\}}", f"{p}, {q}", rf"{p} \text{{ or }} {q}"]),
    "equation": lambda p, q, rng: rng.choice([f"x={p}", f"y={p}x+{q}"]),
    "text": lambda p, q, rng: rng.choice([r"\text{%s}", "%s"]) % WORDS[p % len(WORDS)],
    "letter": lambda p, q, rng: rng.choice(["%s", r"\text{(%s)}"]) % "ABCDEFGHIJ"[p % 10],
}
BOXED = {  # way to hedge: what the box holds, made of A and B
    "or": [r"A \text{ or } B", "A or B", r"A \text{ or $B$}", "$A$ or $B$", r"A \mathrm{ or } B", r"A \lor B", "A or $B$",
           r"A \text{ and } B", r"\text{A or B}", r"A\ \text{or}\ B", r"\text{either } A \text{ or } B", r"\text{$A$ or $B$}"],
    "the end is text": [r"A\text{ (or B)}", r"A\text{ or B}", r"A\mbox{ or B}", r"A \text{ units or $B$ units}", r"A\text{B}",
                        r"A \textbf{ or $B$}", r"A \text{, not $B$}", r"A \quad \text{(if not $B$)}", r"A \mathrm{B}",
                        r"A \text{ cm or } B \text{ cm}", r"A\text{$B$}", r"A \text{\$B\$}", r"A\text{ or }\text{B}"],
    "a list": ["A, B", "A; B", r"A \\ B", r"A \quad B", r"A\,B", r"A \& B", "A & B", "A\nB", "A | B", r"A \mid B", "A B", "A/B",
               r"A \ B", "A~B", r"A\!B", "A. B", "A: B", "$A$ $B$", "$A$$B$", "A$B$", "$A$B", "$A$, $B$", r"A \text{, } B"],
    "nested boxes": [r"\boxed{A} B", r"\boxed{A}\boxed{B}", r"A \fbox{B}", r"A \boxed{B}", r"\fbox{A} \fbox{B}", r"\fbox{A} B"],
    "a matrix": [r"\begin{pmatrix} A \\ B \end{pmatrix}", r"\begin{cases} A \\ B \end{cases}", r"{A \atop B}",
                 r"\begin{array}{c} A \\ B \end{array}", r"\begin{aligned} A \\ B \end{aligned}", r"\binom{A}{B}",
                 r"\begin{bmatrix} A & B \end{bmatrix}", r"\substack{A \\ B}"],
    "plus or minus": [r"A \pm B", r"\pm A, B", r"A \mp B", "+-A, B"],
    "a chain": ["A = B", "x = A = B", r"A \approx B", r"A \ne B", r"A \Rightarrow B", r"A \to B", r"A \equiv B", r"A \iff B",
                r"x = A \text{ or } x = B", "x=A, x=B", "x=A, y=B", r"A = $B$", r"A \text{ = } B", "f(A) = B", r"A \sim B"],
    "a set": [r"\{A, B\}", "[A, B]", "(A, B)", "A < x < B", r"x \in \{A, B\}", r"\{A\} \cup \{B\}", r"A \cup B", r"A \cap B",
              r"\{A\}\text{ or $\{B\}$}", r"A \setminus B", r"A \in \{A, B\}", r"\left(A, B\right]"],
    "units": [r"A \text{ cm} = B \text{ m}", r"A \text{ cm } B", r"A^\circ B", r"A\% \text{ or } B\%", r"\$A \$B", "A cm B",
              r"\$A \text{ or $B$}", r"A \text{ feet (}B\text{ inches)}", "A degrees B", r"A\text{ cm}^2, B\text{ cm}^2"],
    "unicode": ["A\u00a0B", "A \u2009or\u2009 B", "A\uff0cB", "A\u3001B", "A\u200bB", "A \u2228 B", "A\uff1bB", "A \uff1d B",
                "A \u2192 B", "A \u00b1 B", "A \u222a B", "\uff04A\uff04 B", "A \u043er B"],
    "decoration": ["A_{B}", "A^{B}", r"\underset{B}{A}", r"\overset{B}{A}", r"\cancel{A} B", r"\phantom{A} B", "A % B",
                   r"A \% B", r"\color{red}{A} B", r"A \tag{B}", r"A \hspace{B}", "A!B", r"\text{A}B", r"\overline{A}B",
                   r"A \label{B}"],
}  # fmt: skip
WHOLE = {  # the same for the whole response
    "two boxes": [r"\boxed{A} \boxed{B}", r"\boxed{A} or \boxed{B}", "\\boxed{A}\n\n\\boxed{B}", r"\boxed{A} $B$",
                  r"$\boxed{A}$ or $\boxed{B}$", r"$A$ \boxed{B}", r"\fbox{A} \boxed{B}", r"\boxed{A} \fbox{B}",
                  r"\boxed A or \boxed B", r"\boxed{A} \boxed B", r"\boxed{A}, B", r"$\boxed{A}$ and $\boxed{B}$, $\boxed{A}$",
                  r"\boxed{A} \boxed{", r"$\boxed{A} = \boxed{B}$", r"$$\boxed{A}$$ $$\boxed{B}$$"],
    "no box": ["$A$ or $B$", "$A$, $B$", "$$A$$ $$B$$", "The answer is A. The answer is B.", "answer: $A$, answer: $B$",
               "A or B", r"\(A\) or \(B\)", r"The final answer is $A$. I hope it is correct. \boxed{B}", "answer: A\n\n$B$",
               "$A$ and B",
               r"\[A\] \[B\]", "A\nB", "ANSWER: A\nANSWER: B", "A = B", "The final answer is A. $B$"],
    "the thought": [r"\boxed{A}</think>\boxed{B}", r"$A$</think>\boxed{B}</think>\boxed{A}", r"A</think>B</think>\boxed{A}",
                    r"\boxed{A}</think>", r"\boxed{A</think>B}", r"\boxed{A}</think>\boxed{B}<think>\boxed{A}"],
}  # fmt: skip


def ways():
    """[(way to hedge, response with A and B), ...]"""
    boxed = [(way, f"</think>\\boxed{{{form}}}") for way, forms in BOXED.items() for form in forms]
    return boxed + [
        (way, form if way == "the thought" else f"</think>{form}") for way, forms in WHOLE.items() for form in forms
    ]


def hedges(n, seed):
    """n of (way, gold, another gold, response). Most golds are two of a kind."""
    rng, forms, found = random.Random(seed), ways(), []
    while len(found) < n:
        way, form = forms[len(found) % len(forms)]
        p, q, r, s = rng.sample(PRIMES, 4)
        kind = rng.choice([*GOLDS, "integer", "integer"])
        other = kind if rng.random() < 0.7 else rng.choice([*GOLDS])
        a, b = GOLDS[kind](*sorted((p, q)), rng), GOLDS[other](*sorted((r, s)), rng)
        if bare(a) != bare(b):
            parts = re.split(r"(?<![A-Z])([AB])(?![A-Z])", form)
            found.append((way, a, b, "".join({"A": a, "B": b}.get(part, part) for part in parts)))
    return found


def bare(gold):
    return gold.replace(r"\text{", "").strip("()}")


def main(n=5000, seed=0):
    start, both = time.time(), 0
    rows = hedges(n, seed)
    for name in GRADERS:
        with Verifier(grader=name) as verifier:
            texts, golds = [text for *_, text in rows for _ in range(2)], [gold for _, a, b, _ in rows for gold in (a, b)]
            right = [v.reason == "correct" for v in verifier.score(texts, golds)]
        sums = [a + b for a, b in zip(right[::2], right[1::2], strict=True)]
        counts = Counter((row[0], k) for row, k in zip(rows, sums, strict=True))
        print(f"\n{name:<20}{'none':>8}{'one':>8}{'both':>8}")
        for way in (*dict.fromkeys(row[0] for row in rows), None):
            shown = [sum(m for (w, j), m in counts.items() if j == k and way in (w, None)) for k in range(3)]
            print(f"{way or 'all':<20}" + "".join(f"{m:>8}" for m in shown), flush=True)
        for (_, a, b, text), k in zip(rows, sums, strict=True):
            if k == 2:
                both += 1
                print(f"  right for {a!r} and for {b!r}: {text!r}")
    print(f"\n{len(rows)} pairs, {both} verdicts right for both, {time.time() - start:.0f} s")
    return both > 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
