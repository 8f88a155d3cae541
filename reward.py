"""
The verifier: LUFFY's rule, math-verify behind a pool of worker processes that can be killed.

A response is what follows the generation prompt "<think>\\n". It must close its thought; graded is the text
between the first "</think>" and a second one, if any, by math-verify, ground truth first: 0 or 1. No format
reward, and no \\boxed{} required. Some inputs (9^{9^{9^9}}, 100000000! under gmpy2) never return and defy
signals, so a worker has a soft time limit inside and a hard one outside, after which it is killed and
replaced, and nothing but that one answer is lost.
"""

import contextlib
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from configurator import UserError

START = 120.0  # seconds a worker may take to import math-verify
GRACE = 2.0  # seconds between the soft limit inside a worker and the hard one outside
MEMORY = 4 << 30  # a worker's address space, bytes


class Verdict(NamedTuple):
    reward: float  # 0.0 or 1.0
    reason: str  # correct, wrong, no_think, no_answer (nothing to grade), timeout, or error (the worker died)


def graded_text(response, require_think=True):
    """The part of a response that counts, or None if its thought was never closed."""
    if not require_think:
        return response
    parts = response.split("</think>")
    return parts[1] if len(parts) > 1 else None


def fast_verdict(text, answer):
    """The verdict where math-verify cannot disagree: one boxed plain integer against another, else None."""
    boxed, gold = re.fullmatch(r"\s*\\boxed\{(\d{1,15})\}\s*", text), re.fullmatch(r"\d{1,15}", answer)
    if not (boxed and gold and text.isascii() and answer.isascii()):
        return None
    return Verdict(1.0, "correct") if int(boxed[1]) == int(gold[0]) else Verdict(0.0, "wrong")


class Verifier:
    """A context manager around `workers` processes; `timeout` seconds of grading per answer.

    score(responses, answers) keeps the order and never raises for what a response contains. A worker starts
    with the first answer that needs it and takes a second or two to import math-verify; if it cannot, that is
    a UserError.
    """

    def __init__(self, workers=2, timeout=5.0, require_think=True):
        self.timeout, self.require_think = timeout, require_think
        self.threads = ThreadPoolExecutor(workers)
        self.idle = queue.SimpleQueue()
        self.workers = [Worker(timeout) for _ in range(workers)]
        for worker in self.workers:
            self.idle.put(worker)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.kill()

    def score(self, responses, answers):
        """list[str], list[str] -> list[Verdict]"""
        return list(self.threads.map(self.verdict, responses, answers))

    def verdict(self, response, answer):
        text = graded_text(response, self.require_think)
        if text is None:
            return Verdict(0.0, "no_think")
        if fast := fast_verdict(text, answer):
            return fast
        worker = self.idle.get()
        try:
            return worker.grade(text, answer)
        finally:
            self.idle.put(worker)


class Worker:
    """One child process, `python reward.py TIMEOUT`, talking JSON lines. Started when needed, replaced when lost."""

    def __init__(self, timeout):
        self.timeout, self.process = timeout, None

    def grade(self, text, answer):
        for _ in range(2):  # a worker that was killed from outside while idle shows only now: try a new one once
            if self.process is None or self.process.poll() is not None:
                self.start()
            reply = self.ask({"text": text, "answer": answer})
            if reply == "timeout":
                self.kill()
                return Verdict(0.0, "timeout")
            if reply is not None:
                return Verdict(*reply)
            self.kill()
        return Verdict(0.0, "error")

    def ask(self, request):
        """The worker's [reward, reason], "timeout" past the hard limit, or None if the worker died."""
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], self.timeout + GRACE)[0]:
                return "timeout"
            line = self.process.stdout.readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None

    def start(self):
        self.kill()
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(self.timeout)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        # "ready", or why not: its imports do not count against the first answer's time.
        line = self.process.stdout.readline() if select.select([self.process.stdout], [], [], START)[0] else b"no answer"
        if line != b"ready\n":
            self.kill()
            raise UserError(f"the verifier's worker does not start: {line.decode(errors='replace').strip() or 'it died'}")

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):  # closing flushes, into a pipe that may be broken
                    pipe.close()
            self.process = None


# ---------------------------------------------------------------- inside a worker


class SoftTimeout(BaseException):
    """Not an Exception: math-verify and sympy swallow those."""


def grade(text, answer, timeout):
    from math_verify import parse, verify

    def alarm(*_):
        raise SoftTimeout

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:  # math-verify's own limits are off: they are per candidate pair, in whole seconds, and read as "wrong"
        gold = parse(f"${answer}$", parsing_timeout=None)
        prediction = parse(text, parsing_timeout=None)
        if not prediction:
            return 0.0, "no_answer"
        return (1.0, "correct") if verify(gold, prediction, timeout_seconds=None) else (0.0, "wrong")
    except SoftTimeout:
        return 0.0, "timeout"
    except (Exception, RecursionError, MemoryError):
        return 0.0, "error"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def work(timeout):
    import ctypes
    import resource

    if sys.platform == "linux":  # if the trainer is killed in the middle of an answer that never returns
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        import math_verify  # noqa: F401  before the limit on memory
    except Exception as e:
        print(f"{type(e).__name__}: {e}".splitlines()[0], flush=True)
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not break the protocol
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(grade(request["text"], request["answer"], timeout)), file=replies, flush=True)


if __name__ == "__main__":
    work(float(sys.argv[1]))
