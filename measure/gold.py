"""
How far the graders can be trusted on a benchmark: each ground truth, boxed, is graded against itself, and against answers
that are certainly wrong.

    python measure/gold.py FILE.parquet [FILE.parquet ...]

Run by hand; the results are in LOG.md. Rows have LUFFY's schema. A pair of source and ground truth is graded once, and
counts for all of its rows.
"""

import os
import re
import sys
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pyarrow.parquet as pq

from reward import GRADERS, Verifier

NUMBER = re.compile(r"\$?-?(\d|\.\d|\\d?frac|\\sqrt|\\pi)[^,=]*")  # a single number; unless it is zero, its negative differs


def digit(gold):
    """The first digit plus one; 8 for a 9."""
    return re.sub(r"\d", lambda m: str(int(m[0]) + 1 if m[0] < "9" else 8), gold, count=1)


def sign(gold):
    """The other sign, if the answer is a number."""
    if not NUMBER.fullmatch(gold) or re.fullmatch(r"[$\-0.]+", gold):
        return gold
    return re.sub(r"^(\$?)(-?)", lambda m: m[1] + ("" if m[2] else "-"), gold)


def letter(gold):
    """The next option, if the answer is one."""
    return re.sub(r"^(\\text\{)?(\(?)([A-J])(?=\)?\}?$)", lambda m: (m[1] or "") + m[2] + chr(ord(m[3]) + 1), gold)


def symbol(gold):
    """The first variable is renamed to the next letter."""
    if "=" in gold:
        return gold  # x = 5 and y = 5 are the same answer
    return re.sub(r"(?<![\\a-zA-Z])[a-y](?![a-zA-Z])", lambda m: chr(ord(m[0]) + 1), gold, count=1)


def accepted(verifier, pairs, what):
    """list[(answer, gold)] -> list[bool]. Prints a line every few seconds."""
    start = printed = time.time()
    verdicts = []
    for at in range(0, len(pairs), 32):
        part = pairs[at : at + 32]
        verdicts += verifier.score([f"</think>\\boxed{{{answer}}}" for answer, _ in part], [gold for _, gold in part])
        if time.time() - printed > 5:
            printed = time.time()
            print(f"  {what}: {len(verdicts)} of {len(pairs)}, {printed - start:.0f} s", flush=True)
    return [v.reason == "correct" for v in verdicts]


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    start = time.time()
    rows = Counter()
    for path in sys.argv[1:]:
        table = pq.read_table(path, columns=["data_source", "reward_model"]).to_pylist()
        rows.update((row["data_source"], row["reward_model"]["ground_truth"]) for row in table)
    golds = {}
    for source, gold in sorted(rows):
        golds.setdefault(source, []).append(gold)
    another = {(s, g): own[(i + 1) % len(own)] for s, own in golds.items() for i, g in enumerate(own)}
    kinds = {"digit": lambda s, g: digit(g), "sign": lambda s, g: sign(g), "letter": lambda s, g: letter(g),
             "symbol": lambda s, g: symbol(g), "another gold": lambda s, g: another[s, g]}  # fmt: skip
    for name in GRADERS:
        with Verifier(grader=name) as verifier:
            print(f"\n{name}")
            itself = accepted(verifier, [(g, g) for _, g in sorted(rows)], "gold")
            failed = [pair for pair, good in zip(sorted(rows), itself, strict=True) if not good]
            for source, own in golds.items():
                n, lost = sum(rows[source, g] for g in own), sum(rows[p] for p in failed if p[0] == source)
                print(f"  {source:16} {n:5} rows  {len(own):4} golds  accepted {n - lost:5} ({(n - lost) / n:.2%})")
            for source, gold in failed:
                print(f"    rejected: {source} {gold!r}")
            for kind, change in kinds.items():
                pairs = [(change(s, g), g) for s, g in sorted(rows)]
                pairs = [(answer, gold) for answer, gold in pairs if answer != gold]
                wrong = [p for p, good in zip(pairs, accepted(verifier, pairs, kind), strict=True) if good]
                print(f"  {kind:16} {len(pairs):5} wrong answers, accepted {len(wrong)}")
                for answer, gold in wrong:
                    print(f"    accepted: {answer!r} for {gold!r}")
    print(f"\n{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
