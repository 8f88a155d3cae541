r"""
Answers on which a grader and a mathematician disagree: the table of docs/evaluate.md.

    python measure/surprises.py

Prints the table as Markdown. A test compares it with the page, so put the output there when a grader or a row changes. Rows on
which all agree are errors: the page would name a quirk that is gone.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from reward import GRADERS, grade

ISSUE = "https://github.com/huggingface/Math-Verify/issues/"
ROWS = [  # what it is about, the ground truth, the graded text, is it right to a mathematician?, issues of math-verify
    ("percent", "50", r"\boxed{50\%}", False, [67]),
    ("units", r"12\text{ cm}", r"\boxed{12\text{ km}}", False, [36]),
    ("units", r"12\text{ cm}^2", r"\boxed{12\text{ cm}^3}", False, [36]),
    ("an approximation", "5", r"\boxed{5\approx6}", False, []),
    ("an approximation", r"\frac{8}{3}", r"\boxed{2.666667}", False, [21]),
    ("an approximation", "5.5", r"\boxed{5.50000001}", False, [21]),
    ("an equation that is false", "3", r"\boxed{2=3}", False, []),
    ("bases", "204_5", r"\boxed{204}", False, []),
    ("bases", "204_5", r"\boxed{54}", True, []),
    ("a set and a pair", "(1,2)", r"\boxed{\{1,2\}}", False, []),
    ("a set and a pair", r"\{1,2\}", r"\boxed{(1,2)}", False, []),
    ("an order that may matter", "2,3,4", r"\boxed{2,4,3}", False, []),
    ("a repeated element", "2,2", r"\boxed{2}", False, []),
    ("another variable", "x=5", r"\boxed{y=5}", False, []),
    ("two boxes close together", "3", r"First \boxed{2}, then \boxed{3}", True, [57]),
    ("no box", "3", "The answer is 3.", True, []),
    ("numbers below 1e-15", r"\frac{1}{2^{99}}", r"\boxed{\frac{1}{2^{98}}}", False, [14]),
    ("numbers below 1e-6", "0.00000000139", r"\boxed{0.00000000361}", False, [21]),
    ("powers of ten", "6.5e-2", r"\boxed{6.5\times10^{-2}}", True, []),
    ("powers of ten", "6.5e-2", r"\boxed{0.065}", True, []),
    ("powers of ten", "3e8", r"\boxed{3\times10^8}", True, []),
    ("powers of ten", "3e8", r"\boxed{24e}", False, []),
    ("a letter with text", "C", r"\boxed{C.}", True, []),
    ("a letter with text", "C", r"\boxed{\textbf{(C)}\ 12}", True, []),
    ("a full stop", "7", r"\boxed{7.}", True, []),
    ("a mixed number", "7.75", r"\boxed{7 3/4}", True, []),
]


def table():
    """The lines of the Markdown table."""
    words = {True: "right", False: "wrong"}
    named = " | ".join(f"`{name}`" for name in GRADERS)
    lines = [f"| what | ground truth | answer | a mathematician | {named} | known as |", "|---" * (len(GRADERS) + 5) + "|"]
    for what, gold, text, right, issues in ROWS:
        verdicts = [bool(grade(grader, text, gold, 20.0)[0]) for grader in GRADERS.values()]
        if verdicts == [right] * len(verdicts):
            raise AssertionError(f"all agree on {text!r} for {gold!r}: take the row out")
        marked = [words[v] if v == right else f"**{words[v]}**" for v in verdicts]
        known = ", ".join(f"[#{n}]({ISSUE}{n})" for n in issues)
        lines.append(f"| {what} | `{gold}` | `{text}` | {words[right]} | {' | '.join(marked)} | {known} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
