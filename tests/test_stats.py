"""The statistics, checked against closed forms, enumeration and scipy."""

import itertools
import json
import math
import os

import numpy as np
import pytest
import scipy.stats

from configurator import UserError
from runtime.metrics import eval_report
from runtime.stats import AVERAGES, averages, compare, interval, majority, paired_bootstrap, pass_at, resample, summarize


def a_row(rewards, source="a", key=0, **changes):
    k = len(rewards)
    reasons = ["correct" if r >= 1 else "wrong" for r in rewards]
    return {"source": source, "key": key, "reward": rewards, "reason": reasons, "prediction": [str(r) for r in rewards],
            "length": [10] * k, "finish": ["stop"] * k, "format": [True] * k, **changes}  # fmt: skip


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_pass_at_is_the_share_of_subsets_with_a_right_sample(k):
    for c in range(k + 1):
        samples = [1] * c + [0] * (k - c)
        for j in range(1, k + 1):
            subsets = list(itertools.combinations(samples, j))
            assert pass_at(j, k, c) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
            assert pass_at(j, k, c) == pytest.approx(1 - math.comb(k - c, j) / math.comb(k, j), abs=1e-12)


def test_pass_at_is_unbiased():
    """Over draws of 32 samples, each right with probability 0.1, its mean is 1 - 0.9^8."""
    counts = np.random.default_rng(0).binomial(32, 0.1, 4000)
    estimates = [pass_at(8, 32, int(c)) for c in counts]
    assert np.mean(estimates) == pytest.approx(1 - 0.9**8, abs=4 * np.std(estimates) / math.sqrt(4000))


def test_majority():
    assert majority(["1", "2", "2"], [1.0, 0.0, 0.0]) == 0.0
    assert majority(["1", "1", "2"], [1.0, 1.0, 0.0]) == 1.0
    assert majority(["1", "2"], [1.0, 0.0]) == 0.5  # of a tie each answer counts in part: nothing is random
    assert majority(["", "", "", "2"], [0.0, 0.0, 0.0, 1.0]) == 1.0  # no answer, no vote
    assert majority(["", ""], [0.0, 0.0]) == 0.0
    assert majority(["1"], [1.0]) == 1.0


def test_the_interval_is_scipys():
    x = np.random.default_rng(3).binomial(8, 0.3, 60) / 8
    ours = interval(resample([x]))
    theirs = scipy.stats.bootstrap((x,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    normal = scipy.stats.norm.interval(0.95, x.mean(), x.std() / math.sqrt(60))
    spread = 0.1 * (normal[1] - normal[0])  # of the resampling itself
    for end in (0, 1):
        assert ours[end] == pytest.approx(theirs[end], abs=spread) and ours[end] == pytest.approx(normal[end], abs=spread)
    assert interval(resample([x])) == ours  # the same every time


def test_the_interval_of_an_average():
    """For two sources it is that of the unweighted mean, whose variance is (s1^2/n1 + s2^2/n2) / 4."""
    rng = np.random.default_rng(5)
    x, y = rng.binomial(1, 0.4, 400).astype(float), rng.binomial(1, 0.7, 100).astype(float)
    resampled = resample([x, y])
    assert resampled.mean() == pytest.approx((x.mean() + y.mean()) / 2, abs=0.002)
    assert resampled.std() == pytest.approx(math.sqrt(x.var() / 400 + y.var() / 100) / 2, rel=0.03)


def test_blocks_make_no_difference():
    """More numbers than fit into one block of the resampling."""
    x = np.random.default_rng(6).random(3000)
    resampled = resample([x], 1000)
    assert resampled.shape == (1000,) and resampled.std() == pytest.approx(x.std() / math.sqrt(3000), rel=0.1)


def test_the_paired_p_value_is_near_the_t_tests():
    rng = np.random.default_rng(7)
    for shift in (0.0, 0.03, 0.06, 0.3):
        a = rng.binomial(32, 0.4, 80) / 32
        b = np.clip(a + rng.normal(shift, 0.2, 80), 0, 1)
        difference, low, high, p = paired_bootstrap([np.stack([a, b], 1)], 50_000)
        t = scipy.stats.ttest_rel(b, a)
        assert difference == pytest.approx((b - a).mean())
        assert low <= difference <= high and p == pytest.approx(t.pvalue, abs=0.015)
        assert (p < 0.05) == (not low <= 0 <= high)
        ends = t.confidence_interval(0.95)
        assert (low, high) == pytest.approx((ends.low, ends.high), abs=0.003)


def test_pairs_stay_together():
    """Two runs that differ by a constant differ by it in every resample, however much the problems differ."""
    a = np.random.default_rng(8).random(50)
    _, low, high, p = paired_bootstrap([np.stack([a, a + 0.01], 1)])
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01) and p == pytest.approx(2 / 1001)
    assert paired_bootstrap([np.stack([a, a], 1)])[3] == 1.0


def test_summary():
    rows = [a_row([1.0, 0.0, 0.0, 0.0], prediction=["2", "3", "3", ""], length=[10, 20, 30, 40],
                  finish=["stop", "stop", "stop", "length"], format=[True, True, False, False]),
            a_row([0.0] * 4, prediction=[""] * 4), a_row([1.0] * 4, "b")]  # fmt: skip
    table = summarize(rows)
    assert list(table) == ["a", "b"]
    a, b = table["a"], table["b"]
    assert (a["n"], a["k"], a["avg@k"], a["pass@k"], a["maj@k"]) == (2, 4, 0.125, 0.5, 0.0)
    assert (a["length"], a["truncated"], a["format"]) == (17.5, 0.125, 0.75)
    assert a["pass"] == {"1": 0.125, "2": 0.25, "4": 0.5} and a["avg@k_ci"] == [0.0, 0.25]
    assert (b["avg@k"], b["pass@k"], b["maj@k"], b["avg@k_ci"]) == (1.0, 1.0, 1.0, [1.0, 1.0])


def test_a_reward_below_solved_at_is_not_passed():
    """0.1 for format counts in the mean reward alone."""
    a = summarize([a_row([0.1] * 4), a_row([0.1, 0.1, 0.1, 1.0]), a_row([2.0] * 4)])["a"]
    assert a["avg@k"] == pytest.approx((0.1 + 0.325 + 2) / 3)
    assert a["pass"] == {"1": pytest.approx(1.25 / 3), "2": pytest.approx(1.5 / 3), "4": pytest.approx(2 / 3)}
    assert a["maj@k"] == pytest.approx(1 / 3)


def test_without_votes_there_is_no_majority():
    """A grader that returns a bool names no answer, so nothing can be compared. That is no 0: maj@k is left out, also where a
    few answers are boxed by chance and none is right, and from an average with such a source. Grading that found nothing
    right among the votes that there are is a 0."""
    none, boxed = [""] * 4, ["", "", "", "3"]
    right, wrong = [1.0, 1.0, 1.0, 0.0], [0.0] * 4
    silent = [a_row(right, "a", prediction=none), a_row(wrong, "b", prediction=none), a_row(right, "c", prediction=boxed)]
    assert not any("maj@k" in row for row in summarize(silent).values())
    shown = dict(response=["x"] * 4, answer="3")
    assert "maj@k" not in "\n".join(eval_report(summarize(silent), [row | shown for row in silent]))
    voted = [a_row(wrong, "a", prediction=boxed), a_row([1.0, 1.0, 0.0, 1.0], "b", prediction=["", "2", "3", "2"])]
    assert [row["maj@k"] for row in summarize(voted).values()] == [0.0, 1.0]
    rows = [a_row(right, s, prediction=none if s == "amc" else ["2"] * 4) for s in AVERAGES["six benchmarks"]]
    average = averages(rows, summarize(rows))["six benchmarks"]
    assert average["pass@k"] == 1.0 and "maj@k" not in average


def test_averages_are_unweighted_and_whole():
    names = ["aime", "aime25", "amc", "math", "minerva", "olympiad_bench"]
    rows = [a_row([float(i >= j)], s, key=i) for j, s in enumerate(names) for i in range(6 + 4 * j)]
    table = summarize(rows)
    found = averages(rows, table)
    assert list(found) == ["six benchmarks"]
    assert found["six benchmarks"]["avg@k"] == pytest.approx(np.mean([table[s]["avg@k"] for s in names]))
    low, high = found["six benchmarks"]["avg@k_ci"]
    assert low < found["six benchmarks"]["avg@k"] < high
    assert found["six benchmarks"]["n"] == len(rows) and found["six benchmarks"]["length"] == 10
    assert averages(rows[6:], summarize(rows[6:])) == {}  # five of the six give no average


def evaluation(tmp_path, name, scores):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({source: {"n": len(p), "problems": p} for source, p in scores.items()}))
    return str(path)


def test_compare(tmp_path, capsys):
    first = {str(i): float(i % 3 == 0) for i in range(60)}
    a = evaluation(tmp_path, "a.json", {"math": first, "amc": {"1": 0.5, "2": 0.25}})
    better = {key: min(1.0, x + 0.5) for key, x in first.items()}
    b = evaluation(tmp_path, "b/eval.json", {"math": better, "amc": {"2": 0.25}, "gpqa": {"9": 1.0}})
    for folder, grader in ((tmp_path, "oat"), (tmp_path / "b", "math_verify")):
        (folder / "settings.json").write_text(json.dumps({"knobs": {"grader": grader, "temperature": 0.6, "seed": grader}}))
    compare([a, b])
    out = capsys.readouterr().out
    assert "note: amc: 1 problems are in both, of 2 and 1" in out and "note: gpqa: 0 problems are in both, of 0 and 1" in out
    assert "note: grader is 'oat' in A and 'math_verify' in B" in out and "seed" not in out
    line = next(line for line in out.splitlines() if line.startswith("math"))
    assert line.split()[1:5] == ["60", "0.3333", "0.6667", "+0.3333"] and line.split()[-1] == "0.002"


@pytest.mark.parametrize(
    "paths,words",
    [
        (["a.json"], "compare takes two files"),
        (["a.json", "none.json"], "none.json: No such file"),
        (["a.json", "bad.json"], "is not an eval.json that this"),
        (["a.json", "old.json"], "is not an eval.json that this"),
        (["a.json", "c.json"], "no problem in common"),
        (["a.json", "list.json"], "is not an eval.json that this"),
        (["a.json", "d.json"], "no problem in common"),
        (["a.json", "nan.json"], "is not an eval.json that this"),
        (["a.json", "large.json"], "is not an eval.json that this"),
        (["a.json", "deep.json"], "is not an eval.json that this"),
        (["a.json", "pipe.json"], "pipe.json is no file"),
        (["a.json", "."], "is no file"),
    ],
)
def test_compare_refuses(tmp_path, paths, words):
    evaluation(tmp_path, "a.json", {"math": {"1": 1.0}})
    evaluation(tmp_path, "c.json", {"amc": {"1": 1.0}})
    evaluation(tmp_path, "d.json", {"math": {"2": 1.0}})
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text('{"math": {"problems": [1]}}')
    (tmp_path / "old.json").write_text('{"math": {"n": 1}}')
    for name, score in (("nan", "NaN"), ("large", "1" + "0" * 400), ("deep", "[" * 100_000)):
        (tmp_path / f"{name}.json").write_text(f'{{"math": {{"problems": {{"1": {score}}}}}}}')
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=words):
        compare([str(tmp_path / p) for p in paths])
