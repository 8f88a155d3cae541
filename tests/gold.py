"""
How far the graders can be trusted on a benchmark: each ground truth, boxed, against itself, and against answers that are
certainly not it.

    python tests/gold.py FILE.parquet [FILE.parquet ...]

A soak script, run by hand into LOG.md. Rows of LUFFY's schema; a (source, ground truth) pair is graded once, and counts
for all of its rows.
"""

import os
import re
import sys
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pyarrow.parquet as pq

from reward import GRADERS, Verifier

NUMBER = re.compile(r"\$?-?(\d|\.\d|\\d?frac|\\sqrt|\\pi)[^,=]*")  # one value that is not zero: its negative differs


def digit(gold):
    """The first digit is one more, or 8 for a 9."""
    return re.sub(r"\d", lambda m: str(int(m[0]) + 1 if m[0] < "9" else 8), gold, count=1)


def sign(gold):
    if not NUMBER.fullmatch(gold) or re.fullmatch(r"[$\-0.]+", gold):
        return gold
    return re.sub(r"^(\$?)(-?)", lambda m: m[1] + ("" if m[2] else "-"), gold)


def letter(gold):
    """The next option, where the answer is one."""
    return re.sub(r"^(\\text\{)?(\(?)([A-J])(?=\)?\}?$)", lambda m: (m[1] or "") + m[2] + chr(ord(m[3]) + 1), gold)


def symbol(gold):
    """The first variable has the next letter's name."""
    if "=" in gold:
        return gold  # x = 5 is y = 5
    return re.sub(r"(?<![\\a-zA-Z])[a-y](?![a-zA-Z])", lambda m: chr(ord(m[0]) + 1), gold, count=1)


def accepted(verifier, pairs, what):
    """list[(answer, gold)] -> list[bool], with a line every few seconds."""
    start = said = time.time()
    verdicts = []
    for at in range(0, len(pairs), 32):
        part = pairs[at : at + 32]
        verdicts += verifier.score([f"</think>\\boxed{{{answer}}}" for answer, _ in part], [gold for _, gold in part])
        if time.time() - said > 5:
            said = time.time()
            print(f"  {what}: {len(verdicts)} of {len(pairs)}, {said - start:.0f} s", flush=True)
    return [v.reward > 0 for v in verdicts]


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
