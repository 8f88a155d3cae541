r"""
How far the graders can be trusted on a benchmark: each ground truth, boxed, is graded against itself, against the same
answer in other forms, and against answers that are certainly wrong, some of them only just.

    python measure/gold.py FILE.parquet [FILE.parquet ...] [--published=PATH/oat_math_grader.py] [--every=N]

Prints the share of equal forms that each grader takes and of other answers that it refuses, kind by kind, then the golds that
are not accepted as they are, and wrong answers that are. With the file of OAT's grader, as LUFFY's repository has it, that
one stands beside ours, and each equal form that it takes and `oat` refuses is printed: there should be none. It needs
pylatexenc (pip install --target=FOLDER pylatexenc, and PYTHONPATH=FOLDER). --every=10 takes every tenth ground truth.

Run by hand; the results are in LOG.md. Rows have LUFFY's schema. A pair of source and ground truth is graded once.
"""

import os
import sys
import tempfile
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from configurator import run
from measure.forms import questions
from reward import GRADERS, Verifier

SHOWN = 8  # wrong answers of a kind that are printed
PUBLISHED = """import importlib.util
spec = importlib.util.spec_from_file_location("published", {path!r})
published = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published)

def grade(text, answer):
    return published.boxed_reward_fn(text, answer, fast=False)[1]
"""


def accepted(verifier, pairs, what):
    """list[(answer, gold)] -> list[bool]. Prints a line every half minute."""
    start = printed = time.time()
    verdicts = []
    for at in range(0, len(pairs), 64):
        part = pairs[at : at + 64]
        verdicts += verifier.score([f"</think>\\boxed{{{answer}}}" for answer, _ in part], [gold for _, gold in part])
        if time.time() - printed > 30:
            printed = time.time()
            print(f"  {what}: {len(verdicts)} of {len(pairs)}, {printed - start:.0f} s", flush=True)
    return [v.reason == "correct" for v in verdicts]


def read_golds(paths):
    """{source: [ground truth, ...]} and how many rows have each pair."""
    import pyarrow.parquet as pq

    rows, golds = Counter(), {}
    for path in paths:
        table = pq.read_table(path, columns=["data_source", "reward_model"]).to_pylist()
        rows.update((row["data_source"], row["reward_model"]["ground_truth"]) for row in table)
    for source, gold in sorted(rows):
        golds.setdefault(source, []).append(gold)
    return golds, rows


def main(argv):
    options = dict(a[2:].split("=", 1) for a in argv if a.startswith("--") and "=" in a)
    paths = [a for a in argv if not a.startswith("--")]
    if not paths or options.keys() - {"published", "every"} or len(options) + len(paths) < len(argv):
        sys.exit(__doc__)
    start = time.time()
    golds, rows = read_golds(paths)
    same, other = questions(golds, int(options.get("every", 1)))
    graders = {name: name for name in GRADERS}
    with tempfile.TemporaryDirectory() as folder:
        if "published" in options:
            graders = {"published": os.path.join(folder, "published.py"), **graders}
            with open(graders["published"], "w") as f:
                f.write(PUBLISHED.format(path=os.path.abspath(options["published"])))
        taken = {}  # (grader, answer, gold): is it called right?
        for name, grader in graders.items():
            pairs = list(dict.fromkeys(p for some in (*same.values(), *other.values()) for p in some))
            with Verifier(grader=grader, timeout=5.0) as verifier:
                right = accepted(verifier, pairs, name)
            taken |= {(name, *p): ok for p, ok in zip(pairs, right, strict=True)}
    for title, kinds, wanted in (("equal forms, taken", same, True), ("other answers, refused", other, False)):
        print(f"\n{title:<24}{'n':>8}" + "".join(f"{name:>13}" for name in graders))
        every_kind = {**kinds, "all": [p for some in kinds.values() for p in some]}
        for kind, pairs in every_kind.items():
            shares = [sum(taken[name, *p] == wanted for p in pairs) / max(1, len(pairs)) for name in graders]
            print(f"{kind:<24}{len(pairs):>8}" + "".join(f"{s:>13.2%}" for s in shares))
    for name in graders:
        print(f"\n{name}")
        for source, own in golds.items():
            graded = [g for g in own if (name, g, g) in taken]
            lost = [g for g in graded if not taken[name, g, g]]
            n, wrong = (sum(rows[source, g] for g in some) for some in (graded, lost))
            print(f"  {source:16} {n:5} rows  {len(graded):4} golds  accepted {n - wrong:5} ({(n - wrong) / max(1, n):.2%})")
            for gold in lost:
                print(f"    rejected: {gold!r}")
        for kind, pairs in other.items():
            wrong = [pair for pair in pairs if taken[name, *pair]]
            for answer, gold in wrong[:SHOWN]:
                print(f"    {kind}: accepted {answer!r} for {gold!r}")
            if len(wrong) > SHOWN:
                print(f"    {kind}: and {len(wrong) - SHOWN} more")
    if "published" in graders:
        missed = [(kind, p) for kind, pairs in same.items() for p in pairs if taken["published", *p] and not taken["oat", *p]]
        print(f"\nequal forms that the published grader takes and oat refuses: {len(missed)}")
        for kind, (answer, gold) in missed:
            print(f"    {kind}: {answer!r} for {gold!r}")
    print(f"\n{time.time() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
