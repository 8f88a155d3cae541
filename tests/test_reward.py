import os
import random
import signal
import subprocess
import sys
import time

import pytest

from configurator import ROOT, UserError
from reward import Verifier, fast_verdict, grade, graded_text


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, timeout=2.0) as v:
        v.score(["</think>x", "</think>y"], ["1", "2"])  # start the workers
        yield v


CASES = [
    ("so 2</think>\\boxed{2}", "2", 1, "correct"),
    ("so 2</think>The answer is 2.", "2", 1, "correct"),  # no box required
    ("so 2</think>\\boxed{3}", "2", 0, "wrong"),
    ("\\boxed{2}", "2", 0, "no_think"),  # the thought was never closed
    ("\\boxed{2}</think>\\boxed{3}", "2", 0, "wrong"),  # what the thought says does not count
    ("a</think>\\boxed{2}</think>\\boxed{3}", "2", 1, "correct"),  # graded between the first two </think>
    ("a</think>\\boxed{3}</think>\\boxed{2}", "2", 0, "wrong"),
    ("a</think>", "2", 0, "no_answer"),
    ("a</think>no number here", "2", 0, "no_answer"),
    ("a</think>\\boxed{\\frac{1}{2}}", "0.5", 1, "correct"),
    ("a</think>$x = \\sqrt{8}$", "2\\sqrt{2}", 1, "correct"),
    ("a</think>\\boxed{07}", "7", 1, "correct"),
    ("a</think>\\boxed{142}", "142.0", 1, "correct"),
    ("a</think>\\boxed{C}", "C", 1, "correct"),
    ("a</think>\\boxed{D}", "C", 0, "wrong"),
]


def test_the_rule(verifier):
    verdicts = verifier.score([c[0] for c in CASES], [c[1] for c in CASES])
    assert [(v.reward, v.reason) for v in verdicts] == [(float(c[2]), c[3]) for c in CASES]


def test_without_think_everything_is_graded():
    with Verifier(workers=1, timeout=2.0, require_think=False) as v:
        assert v.score(["the answer is $\\boxed{2}$"], ["2"])[0].reward == 1.0
    assert graded_text("a</think>b", require_think=False) == "a</think>b"


def test_fast_path_is_math_verifys_verdict():
    """On the inputs the fast path takes, math-verify says the same."""
    rng = random.Random(0)
    numbers = ["0", "7", "07", "007", "10", "100", "85", "58", "999999999999999"] + [
        f"{rng.randrange(100):02d}" for _ in range(15)
    ]
    for a in numbers:
        for b in rng.sample(numbers, 6) + [a]:
            for text in (f"\\boxed{{{a}}}", f" \n\\boxed{{{a}}} "):
                fast = fast_verdict(text, b)
                assert fast is not None and tuple(fast) == grade(text, b, 10.0), (text, b)
    for text, answer in (("\\boxed{1+1}", "2"), ("\\boxed{2}.", "2"), ("\\boxed{2}", "2.0"), ("\\boxed{-2}", "2"), ("2", "2")):
        assert fast_verdict(text, answer) is None
    signal.setitimer(signal.ITIMER_REAL, 0)


BOMBS = ["9^{9^{9^9}}", "10^{10^{10}}", "10^8!", "((9!)!)!", "\\binom{10^9}{5\\cdot 10^8}", "\\sum_{n=1}^{10^7} \\frac{1}{n}",
         "(x+1)^{1000}", "1.0000001^{9^{9^9}}", "\\frac{1}{" * 200 + "2" + "}" * 200, "(" * 5000 + ")" * 5000]  # fmt: skip


def test_bombs_cost_only_themselves(verifier):
    """Inputs that hang math-verify are given up after their time; every other answer keeps its verdict."""
    responses, answers = [], []
    for bomb in BOMBS:
        responses += [f"a</think>$\\boxed{{{bomb}}}$", "a</think>$\\frac{1}{2}$", "a</think>$\\frac{1}{3}$"]
        answers += ["12345", "0.5", "0.5"]
    start = time.time()
    verdicts = verifier.score(responses, answers)
    assert time.time() - start < len(BOMBS) * (2.0 + 2.0 + 3.0)  # soft and hard limits, and a new worker, one after the other
    assert all(v.reward == 0 for v in verdicts[0::3])
    assert {v.reason for v in verdicts[0::3]} <= {"timeout", "wrong", "no_answer", "error"}
    assert "timeout" in {v.reason for v in verdicts[0::3]}
    assert all(v == (1.0, "correct") for v in verdicts[1::3])
    assert all(v == (0.0, "wrong") for v in verdicts[2::3])


def test_a_worker_that_ignores_its_soft_limit_is_killed(verifier):
    worker = verifier.workers[0]
    verifier.score(["</think>$x^2$"] * 4, ["x"] * 4)
    before = worker.process.pid
    os.kill(before, signal.SIGSTOP)  # deaf to everything but SIGKILL, as C code is to Python's signals
    start = time.time()
    verdicts = verifier.score(["</think>$x^2$"] * 6, ["x^2"] * 6)
    assert time.time() - start < 2.0 + 2.0 + 8.0
    assert sorted(v.reason for v in verdicts) == ["correct"] * 5 + ["timeout"]
    again = verifier.score(["</think>$x^2$"] * 6, ["x^2"] * 6)
    assert [v.reason for v in again] == ["correct"] * 6 and worker.process.pid != before


def test_workers_killed_from_outside_are_replaced(verifier):
    for worker in verifier.workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    verdicts = verifier.score(["</think>$x^2$"] * 4, ["x^2"] * 4)
    assert [v.reason for v in verdicts] == ["correct"] * 4


def test_odd_text_is_data(verifier):
    odd = [
        "",
        "\x00\x1b[31m",
        "</think>" * 3,
        "</think>\\boxed{",
        "</think>" + "1" * 100_000,
        "</think>\ud800",
        "</think>\u202e\\boxed{2}",
    ]
    verdicts = verifier.score(odd, ["2"] * len(odd))
    assert [v.reward for v in verdicts[:-1]] == [0.0] * (len(odd) - 1)


def test_workers_are_limited(verifier):
    verifier.score(["</think>$x^2$"] * 4, ["x^2"] * 4)
    limits = open(f"/proc/{next(w.process.pid for w in verifier.workers if w.process)}/limits").read()
    assert f"Max address space         {4 << 30}" in limits


def test_a_worker_dies_with_its_trainer(tmp_path):
    """Killed outright in the middle of an answer that would take a minute, the trainer leaves no worker behind."""
    code = (
        "import threading, time, reward\n"
        "v = reward.Verifier(workers=1, timeout=60.0)\n"
        "v.score(['</think>$x$'], ['x'])\n"
        "threading.Thread(target=v.score, args=(['</think>$9^{9^{9^9}}$'], ['1']), daemon=True).start()\n"
        "print(v.workers[0].process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    assert os.path.exists(f"/proc/{pid}")
    parent.kill()
    parent.wait()
    for _ in range(50):
        time.sleep(0.1)
        if not os.path.exists(f"/proc/{pid}") or " Z " in open(f"/proc/{pid}/stat").read():
            return
    pytest.fail("the worker lives on")


def test_a_verifier_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Verifier(workers=1) as v, pytest.raises(UserError, match="does not start: ImportError: no antlr here"):
        v.score(["</think>$x$"], ["x"])


def test_no_process_is_left_behind():
    with Verifier(workers=2, timeout=1.0) as v:
        v.score(["</think>$x$"] * 4, ["x"] * 4)
        pids = [w.process.pid for w in v.workers if w.process]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
