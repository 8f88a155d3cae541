"""
The statistics of an evaluation: avg@k and its interval, unbiased pass@k, maj@k, the papers' averages, and the paired
bootstrap that compares two evaluations. The functions take rows as eval.evaluate returns them.
"""

import json
import math
import os

import numpy as np

from configurator import UserError, repo_path
from runtime.oat import rational

AVERAGES = {  # the papers' averages: unweighted means over these sources
    "six benchmarks": ("aime", "aime25", "amc", "math", "minerva", "olympiad_bench"),
    "out of distribution": ("arc_c", "gpqa", "mmlu_pro"),
}
# Knobs of eval.py that should be the same when two models are compared.
PROTOCOL = set(
    "template system shuffle_options k temperature max_tokens grader require_think grade_unclosed answer_line"
    " refuse_unevaluated solved_at".split()
)


def summarize(rows):
    """{source: {n, k, avg@k and its 95 % interval, pass@k, pass (unbiased, for powers of two), maj@k, length, truncated,
    format, letter_with_text}} of evaluate's rows; length is in tokens, truncated and format are shares of the samples,
    letter_with_text is a count. avg@k is the mean reward;
    pass@k and maj@k count what the verifier calls correct (Verifier's solved_at). maj@k is left out if no answer has a vote,
    or most right ones have none: the grader does not say what it read."""
    table = {}
    for source in sorted({r["source"] for r in rows}):
        own = [r for r in rows if r["source"] == source]
        n, k = len(own), len(own[0]["reward"])
        mean = {name: float(np.mean([r[name] for r in own])) for name in ("reward", "length", "format")}
        right = [[reason == "correct" for reason in r["reason"]] for r in own]
        counts = [sum(x) for x in right]
        tries = sorted({k, *(2**i for i in range(k.bit_length()))})
        passed = {str(j): sum(pass_at(j, k, c) for c in counts) / n for j in tries if j <= k}
        voted = [is_right for r, x in zip(own, right, strict=True) for p, is_right in zip(r["prediction"], x, strict=True) if p]
        majorities = [majority(r["prediction"], x) for r, x in zip(own, right, strict=True)]
        table[source] = {
            "n": n,
            "k": k,
            "avg@k": mean["reward"],
            "avg@k_ci": interval(resample([np.mean([r["reward"] for r in own], 1)])),
            "pass@k": passed[str(k)],
            "pass": passed,
            **({"maj@k": sum(majorities) / n} if voted and 2 * sum(voted) >= sum(counts) else {}),
            "length": mean["length"],
            "truncated": sum(f == "length" for r in own for f in r["finish"]) / (n * k),
            "format": mean["format"],
            "letter_with_text": sum(map(sum, (r.get("letter_with_text", ()) for r in own))),
        }
    return table


def pass_at(j, k, c):
    """The probability that at least one of j samples is right, estimated from k samples of which c are right:
    1 - C(k-c, j) / C(k, j) (arXiv 2107.03374)."""
    return 1.0 - float(np.prod([1 - j / i for i in range(k - c + 1, k + 1)])) if k - c >= j else 1.0


def majority(predictions, right):
    """Is the most frequent prediction right? From 0 to 1: ties are averaged. Equal numbers are one prediction, as 0.25 and
    \\frac{1}{4}. Samples without a prediction have no vote. Without any vote it is 0."""
    votes = {}
    for prediction, is_right in zip(predictions, right, strict=True):
        if prediction:
            votes.setdefault(rational(prediction), []).append(is_right)
    most = max(map(len, votes.values()), default=0)
    winners = [sum(r) / len(r) for r in votes.values() if len(r) == most]
    return sum(winners) / len(winners) if winners else 0.0


def resample(scores, n_resamples=10_000):
    """The bootstrap. A resample draws as many problems per source as there are, with replacement, and takes the mean
    score per source, then the unweighted mean over sources. scores: an array (problems,) per source, or (problems, 2)
    for two paired runs, whose pairs stay together. Returns (n_resamples, ...)."""
    rng, total = np.random.default_rng(0), 0.0
    for x in scores:
        n, block = len(x), max(1, 2**20 // len(x))  # resamples at a time, because all together take gigabytes
        sizes = [min(block, n_resamples - i) for i in range(0, n_resamples, block)]
        total = total + np.concatenate([x[rng.integers(0, n, (size, n))].mean(1) for size in sizes]) / len(scores)
    return total


def interval(means):
    """The central 95 % of resampled means: [low, high]."""
    return [float(v) for v in np.quantile(means, (0.025, 0.975))]


def averages(rows, table):
    """{name: {n, sources, avg@k and its interval, pass@k, maj@k, length, truncated, format}} for each of AVERAGES whose
    sources are all in the table. n is the number of problems; every other figure is the unweighted mean over sources, and
    left out if one of them lacks it."""
    found = {}
    for name, members in AVERAGES.items():
        if all(m in table for m in members):
            scores = [np.array([np.mean(r["reward"]) for r in rows if r["source"] == m]) for m in members]
            columns = ("avg@k", "pass@k", "maj@k", "length", "truncated", "format")
            known = [column for column in columns if all(column in table[m] for m in members)]
            means = {column: sum(table[m][column] for m in members) / len(members) for column in known}
            found[name] = {"n": sum(map(len, scores)), "sources": members, **means, "avg@k_ci": interval(resample(scores))}
    return found


def paired_bootstrap(scores, n_resamples=1000):
    """scores: an array (problems, 2) per source -> the difference of the mean scores, the second minus the first, the
    ends of its 95 % interval, and its two-sided p-value: twice the share of resamples on the other side of zero."""
    resampled = resample(scores, n_resamples)
    differences = resampled[:, 1] - resampled[:, 0]
    difference = float(np.mean([x[:, 1].mean() - x[:, 0].mean() for x in scores]))
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return difference, *interval(differences), min(1.0, 2 * (tail + 1) / (n_resamples + 1))


# ---------------------------------------------------------------- compare two evaluations


def compare(paths):
    """Print the difference of two eval.json, the second minus the first, with its 95 % interval and the p-value of a
    paired bootstrap over problems (1000 resamples, as the paper), per source and average."""
    if len(paths) != 2:
        raise UserError("compare takes two files: python eval.py compare A/eval.json B/eval.json")
    (a, knobs_a), (b, knobs_b) = map(read_scores, paths)
    for name in sorted(knobs_a.keys() & knobs_b.keys() & PROTOCOL):
        if knobs_a[name] != knobs_b[name]:
            print(f"note: {name} is {knobs_a[name]!r} in A and {knobs_b[name]!r} in B: not only the models differ")
    pairs = {}
    for source in [*a, *(s for s in b if s not in a)]:
        ours, theirs = a.get(source, {}), b.get(source, {})
        if common := sorted(ours.keys() & theirs.keys()):
            pairs[source] = np.array([[ours[key], theirs[key]] for key in common])
        if len(common) < max(len(ours), len(theirs)):
            print(f"note: {source}: {len(common)} problems are in both, of {len(ours)} and {len(theirs)}")
    if not pairs:
        raise UserError(f"{paths[0]} and {paths[1]} have no problem in common: evaluate both models on the same data")
    rows = {s: [pairs[s]] for s in pairs}
    rows |= {name: [pairs[m] for m in members] for name, members in AVERAGES.items() if all(m in pairs for m in members)}
    print(f"A = {paths[0]}\nB = {paths[1]}\n{'source':<20}{'n':>6}{'A':>9}{'B':>9}{'B - A':>9}{'95 % interval':>20}{'p':>8}")
    for name, scores in rows.items():
        difference, low, high, p = paired_bootstrap(scores)
        mean = np.mean([x.mean(0) for x in scores], 0)
        print(f"{name:<20}{sum(map(len, scores)):>6}{mean[0]:>9.4f}{mean[1]:>9.4f}{difference:>+9.4f}"
              f"{f'[{low:+.4f}, {high:+.4f}]':>20}{p:>8.3f}")  # fmt: skip


def read_scores(path):
    """Read an eval.json: ({source: {problem's key: its mean reward}}, the knobs in the settings.json beside it, if there
    is one)."""
    path, knobs = repo_path(path), {}
    settings = os.path.join(os.path.dirname(path), "settings.json")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block
        raise UserError(f"{path} is no file")
    try:
        with open(path) as f:
            scores = {s: {key: float(x) for key, x in row["problems"].items()} for s, row in json.load(f).items()}
        if not all(math.isfinite(x) for row in scores.values() for x in row.values()):
            raise ValueError
        if os.path.isfile(settings):
            with open(settings) as f:
                knobs = dict(json.load(f)["knobs"])
        return scores, knobs
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{path} is not an eval.json that this eval.py wrote") from None
