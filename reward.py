"""
The verifier: a grader behind a pool of worker processes that can be killed.

A response is what follows the generation prompt "<think>\\n". It must close its thought: graded is
the text between the first "</think>" and a second one, if any. There is no reward for format. A
grader is one of

    math_verify   the rule of LUFFY's training: math-verify on that text; no \\boxed{} required
    oat           the rule of LUFFY's evaluation: the last \\boxed{} alone (runtime/oat.py)
    FILE.py       your own: it defines grade(text, answer), which returns the reward, a bool or a
                  number; or a tuple of the reward and the answer it read, a string, for majority
                  votes (otherwise the vote is what is boxed)

Some inputs (9^{9^{9^9}}, or 100000000! under gmpy2) never return, and some ignore signals. So a
worker has a soft time limit inside, and a hard one outside: then it is killed and replaced, and
only that one answer is lost.
"""

import contextlib
import json
import math
import os
import queue
import re
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from configurator import UserError, repo_path
from runtime.latex import parse_in_two_stages
from runtime.oat import MATHD, by_oat, integer, last_boxed, rewrite, unevaluated
from runtime.process import die_with_parent, heartbeat

START = 120.0  # seconds a worker may take to import math-verify
GRACE = 2.0  # seconds between the soft limit inside a worker and the hard one outside
MEMORY = 4 << 30  # bytes of a worker's address space
ANSWER_LINE = re.compile(r"(?i:\banswer)[*_ ]*:[*_ $(]*([A-J1-9])[*_ $).]*$", re.MULTILINE)


class Verdict(NamedTuple):
    reward: float  # 0.0 or 1.0, or what your own grader returned
    reason: str  # correct (see solved_at), wrong, no_think, no_answer, timeout; error: grader or worker failed
    answer: str = ""  # the answer that was read, normalised, for majority votes; "" if none


def graded_text(response, require_think=True, grade_unclosed=False):
    """The part of a response that is graded, or None if its thought was never closed."""
    if not require_think:
        return response
    parts = response.split("</think>")
    return parts[1] if len(parts) > 1 else response if grade_unclosed else None


def fast_verdict(text, answer):
    """The verdict without a worker for one boxed plain integer against another, where math_verify
    and oat always agree. None for anything else."""
    boxed, gold = re.fullmatch(r"\s*\\boxed\{(\d{1,15})\}\s*", text), re.fullmatch(r"\d{1,15}", answer)
    if not (boxed and gold and text.isascii() and answer.isascii()):
        return None
    same = int(boxed[1]) == int(gold[0])
    return Verdict(float(same), "correct" if same else "wrong", str(int(boxed[1])))


class Verifier:
    """A pool of worker processes, as a context manager.

    workers: processes. timeout: seconds of grading per answer. grader: as above; a relative path
    starts at the repository. require_think=False grades the whole response. grade_unclosed grades a
    response without "</think>" as a whole, as LUFFY's evaluation does and its training does not.
    answer_line: where the ground truth is a letter A-J or a digit 1-9 and nothing is boxed, a last
    line "ANSWER: C" counts as \\boxed{C}; the released code rejects it. solved_at: the reason is
    "correct" if the reward is at least this. All that asks whether an answer is right asks for the
    reason, so a reward for format alone does not count as a right answer. refuse_unevaluated: where the
    ground truth is a plain number, the answer must be one too: \\binom{10}{3} is wrong for 120.

    score(responses, answers) keeps the order, and never raises for what a response contains.
    submit() and collect() are its halves, for a caller with other work in between. A worker starts
    with the first answer that needs it, and takes a second or two to import math-verify.

    Raises UserError at once for a grader that does not exist or cannot do what is asked, on entering the
    context if your own file fails, and in submit, score or collect if a worker cannot start.
    """

    def __init__(self, workers=2, timeout=2.0, require_think=True, grader="math_verify",
                 grade_unclosed=False, answer_line=False, solved_at=1.0,
                 refuse_unevaluated=False):  # fmt: skip
        self.solved_at, self.refuse_unevaluated = solved_at, refuse_unevaluated
        self.require_think, self.grade_unclosed, self.answer_line = require_think, grade_unclosed, answer_line
        self.grader = grader if grader in GRADERS else repo_path(grader)
        if grader not in GRADERS and not os.path.isfile(self.grader):
            words = f"write {', '.join(GRADERS)} or the path of a file that defines grade(text, answer)"
            raise UserError(f"grader={grader!r}: there is no file {self.grader}; {words}")
        if grader in GRADERS and solved_at > 1:
            raise UserError(f"solved_at={solved_at:g}: {grader}'s rewards are 0 and 1, so nothing would be solved; set 1")
        if grader not in GRADERS and refuse_unevaluated:
            raise UserError(f"refuse_unevaluated is for {' and '.join(GRADERS)}: let your own grader decide, and leave it out")
        self.tick = lambda: None  # to be set: called after each answer; what it raises ends collect()
        self.broken = None  # the error, if a worker did not start
        self.threads = ThreadPoolExecutor(workers)
        self.idle = queue.SimpleQueue()
        self.workers = [Worker(timeout, self.grader) for _ in range(workers)]
        for worker in self.workers:
            self.idle.put(worker)

    def __enter__(self):
        if self.grader not in GRADERS:  # a mistake in your file shows now, not after hours of sampling
            self.workers[0].start()
        return self

    def __exit__(self, *_):
        self.threads.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.kill()

    def score(self, responses, answers):
        """list[str], list[str] -> list[Verdict]"""
        return self.collect([self.submit(*pair) for pair in zip(responses, answers, strict=True)])

    def submit(self, response, answer):
        """Have a response graded in the background. Returns a handle for collect()."""
        if self.broken:  # say so now, not when all is sampled
            raise self.broken
        return self.threads.submit(self.verdict, response, answer)

    def collect(self, handles):
        """Wait for the handles' verdicts -> list[Verdict]"""
        verdicts = []
        with heartbeat("verifier grades", len(handles)) as show:
            for handle in handles:
                verdicts.append(handle.result())
                show(len(verdicts))
                self.tick()
        return verdicts

    def verdict(self, response, answer):
        """Grade one response, in a thread of the pool."""
        text = graded_text(response, self.require_think, self.grade_unclosed)
        if text is None:
            return Verdict(0.0, "no_think")
        if self.answer_line and re.fullmatch("[A-J1-9]", answer) and "\\boxed" not in text:
            letters = ANSWER_LINE.findall(text)
            text = f"\\boxed{{{letters[-1]}}}" if letters else text
        if self.grader in GRADERS and (fast := fast_verdict(text, answer)):
            return fast
        worker = self.idle.get()
        try:
            verdict = worker.grade(text, answer)
        except UserError as e:
            self.broken = e
            raise
        finally:
            self.idle.put(worker)
        if verdict.reason == "graded":
            if self.refuse_unevaluated and verdict.reward and unevaluated(verdict.answer, answer):
                verdict = verdict._replace(reward=0.0)
            verdict = verdict._replace(reason="correct" if verdict.reward >= self.solved_at else "wrong")
        return verdict


class Worker:
    """One child process, `python reward.py TIMEOUT GRADER`, that reads and writes JSON lines. It is
    started when it is needed, and replaced if it died."""

    def __init__(self, timeout, grader):
        self.timeout, self.grader, self.process = timeout, grader, None

    def grade(self, text, answer):
        for _ in range(2):  # one that was killed from outside shows only now: try a new one once
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
        """The worker's [reward, reason, answer]; "timeout" after the hard limit; None if it died."""
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
            [sys.executable, os.path.abspath(__file__), str(self.timeout), self.grader],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        # It says "ready", or why not. Its imports do not count against the first answer's time.
        spoke = select.select([self.process.stdout], [], [], START)[0]
        line = self.process.stdout.readline() if spoke else b"no answer"
        if line != b"ready\n":
            self.kill()
            why = line.decode(errors="replace").strip() or "it died"
            if self.grader not in GRADERS:
                why += f"; {self.grader} must run and define grade(text, answer)"
            raise UserError(f"the verifier's worker does not start: {why}")

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):  # close() flushes, and the pipe may be broken
                    pipe.close()
            self.process = None


# ---------------------------------------------------------------- graders
# (text, ground truth) -> (reward, the answer that was read; None if there is nothing to grade)


def by_math_verify(text, answer):
    """The rule of LUFFY's training: is what math-verify reads in the text the ground truth?"""
    from math_verify import parse, verify

    # Without math-verify's own limits: they are per pair of candidates, and mean "wrong".
    gold = parse(f"${answer}$", parsing_timeout=None)
    found = parse(text, parsing_timeout=None)
    if not found:
        return 0.0, None
    # The answer is the string beside math-verify's expression: printing the expression may hang.
    read = found[-1] if isinstance(found[-1], str) else ""
    return verify(gold, found, timeout_seconds=None), read


def by_file(path):
    """The grader that your own file defines. Raises what the file raises."""
    function = runpy.run_path(path, run_name="grader")["grade"]

    def grade_by(text, answer):
        found = function(text, answer)
        reward, read = found if isinstance(found, tuple) else (found, last_boxed(text))
        return float(reward), str(read or "")

    return grade_by


GRADERS = {"math_verify": by_math_verify, "oat": by_oat}


# ---------------------------------------------------------------- inside a worker


class SoftTimeout(BaseException):
    """Not an Exception, because math-verify and sympy catch those."""


def grade(grader, text, answer, timeout):
    """Call a grader with the soft time limit (seconds). Returns the fields of a Verdict; the reason is "graded" where the
    Verifier is to say whether the reward is enough."""

    def alarm(*_):
        raise SoftTimeout

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        reward, read = grader(text, answer)
        if not math.isfinite(reward):
            raise ValueError(reward)
    except SoftTimeout:
        return 0.0, "timeout", ""
    except BaseException:  # a user's file may call sys.exit
        return 0.0, "error", ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    reason = "no_answer" if read is None else "graded"
    vote = integer(rewrite((read or "")[:1000], MATHD))[:200]  # cut first, because the timer is off
    return float(reward), reason, vote


def work(timeout, name):
    """The worker's loop: a line {"text", "answer"} in, a line [reward, reason, answer] out."""
    die_with_parent()  # the trainer may be killed during an answer that never returns
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not break the protocol
    try:  # imports come before the memory limit
        if name in GRADERS:
            import math_verify  # noqa: F401

            parse_in_two_stages()
        grader = GRADERS.get(name) or by_file(name)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}".splitlines()[0], file=replies, flush=True)
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Above it the kernel kills the worker, even if it ignores signals and its parent is busy.
        cpu_seconds = math.ceil(time.process_time() + timeout + GRACE) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, resource.RLIM_INFINITY))
        verdict = grade(grader, request["text"], request["answer"], timeout)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    work(float(sys.argv[1]), sys.argv[2])
