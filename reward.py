"""
The verifier: a grader behind a pool of worker processes that can be killed.

A response is what follows the generation prompt "<think>\\n". It must close its thought: graded is
the text between the first "</think>" and a second one, if any. There is no reward for format. A
grader is one of

    math_verify   the rule of LUFFY's training: math-verify on that text; no \\boxed{} required
    oat           the rule of LUFFY's evaluation: the last \\boxed{} alone (runtime/oat.py)
    FILE.py       your own: it defines grade(text, answer), which returns the reward, a bool or a
                  number; or a tuple of the reward and the answer it read, a string, for majority
                  votes (otherwise the vote is what is boxed). It is read once, when the Verifier is made

Some inputs (9^{9^{9^9}}, or 100000000! under gmpy2) never return, and some ignore signals. So a
worker has a soft time limit inside, and a hard one outside: then it is killed and replaced, and
only that one answer is lost.

A grader may run programs that the model wrote. They do not get the channel between verifier and
worker, and they end with the worker. They run as the same user, so they are not shut in.
"""

import json
import math
import os
import queue
import re
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from configurator import UserError, printable, repo_path
from runtime.latex import parse_in_two_stages
from runtime.oat import by_oat, last_boxed, unevaluated, vote
from runtime.process import die_with_parent, end_group_at_death, end_tree, heartbeat

START = 120.0  # seconds a worker may take to import math-verify
GRACE = 2.0  # seconds between the soft limit inside a worker and the hard one outside
MEMORY = 4 << 30  # bytes of a worker's address space
LONGEST = 10_000  # bytes of a worker's reply, which names at most 200 characters of an answer and 300 of an error
LARGEST = 1e6  # a reward's largest magnitude: float32 holds its square, summed over any batch
SHOWN = 3  # errors of a grader that are shown
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


def letter_with_text(text, answer):
    """Is the ground truth an option's letter, and does the last box hold this letter and more: C., C), C: 12 or (C) 12? The
    papers' graders call that wrong. A box with other letters, such as C or D, is none of these."""
    boxed = last_boxed(text) if re.fullmatch(r"\W*(?:\\text\{)?\W*[A-J]\W*", answer) else None
    found = LETTER.match(re.sub(r"\\(?:text|math|mbox)[a-z]*|\\[,;:! ]|[~$*]", " ", boxed)) if boxed else None
    return bool(found) and found[1] == re.search("[A-J]", answer)[0]


LETTER = re.compile(  # a letter that stands alone, but not the article of "A car", nor one of several
    r"[\s({\[]*([B-HJ]|[AI](?!\s+[a-z]))(?=[\s).:;,}\]\u2013\u2014])(?!\W*(?:or|and)?\W*[A-J]\b)"
)


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
    context if your own file fails, and in submit, score or collect if a worker cannot start or fails at every answer.
    """

    def __init__(self, workers=2, timeout=2.0, require_think=True, grader="math_verify",
                 grade_unclosed=False, answer_line=False, solved_at=1.0,
                 refuse_unevaluated=False):  # fmt: skip
        self.solved_at, self.refuse_unevaluated = solved_at, refuse_unevaluated
        self.require_think, self.grade_unclosed, self.answer_line = require_think, grade_unclosed, answer_line
        self.grader, self.source = grader, None  # source: the bytes of your own file
        if grader not in GRADERS:
            self.grader = repo_path(grader)
            self.source = read_grader(grader, self.grader)
        if self.source is None and solved_at > 1:
            raise UserError(f"solved_at={solved_at:g}: {grader}'s rewards are 0 and 1, so nothing would be solved; set 1")
        if grader not in GRADERS and refuse_unevaluated:
            raise UserError(f"refuse_unevaluated is for {' and '.join(GRADERS)}: let your own grader decide, and leave it out")
        self.tick = lambda: None  # to be set: called after each answer; what it raises ends collect()
        self.broken = None  # the error, if a worker did not start
        self.faults, self.n_shown = [], 0  # the grader's first errors, in words
        self.threads = ThreadPoolExecutor(workers)
        self.idle = queue.SimpleQueue()
        self.workers = [Worker(timeout, self.grader, self.source) for _ in range(workers)]
        for worker in self.workers:
            self.idle.put(worker)

    def __enter__(self):
        if self.source is not None:  # a mistake in your file shows now, not after hours of sampling
            self.workers[0].start()
        return self

    def __exit__(self, *_):
        self.broken = self.broken or UserError("the verifier was closed")  # what still waits is not graded
        # While the threads live: the kernel kills a worker when the thread that started it ends, and what a dead worker
        # started in other groups is not found.
        for done in [self.threads.submit(lambda: self.idle.get().kill()) for _ in self.workers]:
            done.result()
        self.threads.shutdown()

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
        new = self.faults[self.n_shown :]
        self.n_shown += len(new)
        for words in new:  # not from the threads, which would print into the bar
            print(printable(f"warning: {words}"), flush=True)
        return verdicts

    def verdict(self, response, answer):
        """Grade one response, in a thread of the pool."""
        if self.broken:
            raise self.broken
        text = graded_text(response, self.require_think, self.grade_unclosed)
        if text is None:
            return Verdict(0.0, "no_think")
        if self.answer_line and re.fullmatch("[A-J1-9]", answer) and "\\boxed" not in text:
            letters = ANSWER_LINE.findall("\n".join(text.splitlines()))  # a line may end in \r\n
            text = f"\\boxed{{{letters[-1]}}}" if letters else text
        if self.source is None and (fast := fast_verdict(text, answer)):
            return fast
        worker = self.idle.get()
        try:
            verdict, fault = worker.grade(text, answer)
            # An error is a verdict only if the worker can still grade: otherwise it is ours, and every answer would be wrong.
            if verdict.reason == "error" and self.source is None and not worker.works():
                raise UserError(f"the verifier's workers fail at every answer: {fault}{limits()}")
        except UserError as e:
            self.broken = e
            raise
        finally:
            self.idle.put(worker)
        if verdict.reason == "graded":
            if self.refuse_unevaluated and verdict.reward and unevaluated(verdict.answer, answer):
                verdict = verdict._replace(reward=0.0)
            verdict = verdict._replace(reason="correct" if verdict.reward >= self.solved_at else "wrong")
        if fault and len(self.faults) < SHOWN:
            what = f"ground truth {answer[:40]!r}, answer ending in {text[-80:]!r}"
            more = "; further errors are not shown" if len(self.faults) == SHOWN - 1 else ""
            self.faults.append(f"{self.grader}: {fault}; reward 0 for {what}{more}")
        return verdict


def read_grader(knob, path):
    """The bytes of your own grader's file. Raises UserError if they cannot be read."""
    if not os.path.isfile(path):
        words = f"write {', '.join(GRADERS)} or the path of a file that defines grade(text, answer)"
        raise UserError(f"grader={knob!r}: there is no file {path}; {words}")
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        raise UserError(f"grader={knob!r}: {path} cannot be read: {e.strerror}") from None


class Worker:
    """One child process, `python reward.py DESCRIPTOR`. It is started when it is needed, and replaced if it died or
    cannot be trusted any more.

    Requests and replies are lines "NUMBER JSON" on a socket that only these two processes hold. The first request names
    the grader. Each has a random number, which its reply repeats: a line that something else wrote is no verdict.
    """

    def __init__(self, timeout, grader, source):
        self.timeout, self.grader, self.source, self.process = timeout, grader, source, None

    def grade(self, text, answer):
        """-> the Verdict, and what went wrong, "" if nothing did"""
        for _ in range(2):  # one that was killed from outside shows only now: try a new one once
            if self.process is None:
                self.start()
            try:
                *fields, fault = self.ask([text, answer], self.timeout + GRACE)
            except TimeoutError:
                self.kill()
                return Verdict(0.0, "timeout"), ""
            except (OSError, ValueError):
                self.kill()
                continue
            verdict = Verdict(*fields)
            if verdict.reason == "timeout" and self.source is not None:
                self.kill()  # a program of that answer may still run, or talk to the grader out of turn
            return verdict, fault
        return Verdict(0.0, "error"), "its worker died twice, or something else wrote to the channel"

    def works(self):
        """Whether it can grade what any grader of ours can, if necessary after a new start."""
        for _ in range(2):
            if self.grade("$x$", "x")[0].reason != "error":
                return True
            self.kill()
        return False

    def ask(self, request, seconds):
        """The reply to a request. Raises TimeoutError after `seconds` in all, for writing and reading; OSError or
        ValueError if the worker died or its reply is none."""
        number, end = secrets.token_hex(8).encode(), time.monotonic() + seconds
        self.channel.settimeout(seconds)
        self.channel.sendall(b"%s %s\n" % (number, json.dumps(request).encode()))
        line = b""
        while b"\n" not in line:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.channel.settimeout(left)
            part = self.channel.recv(LONGEST)
            line += part
            if not part or len(line) > LONGEST:
                raise ConnectionError
        if not line.startswith(number + b" "):
            raise ConnectionError
        return json.loads(line[len(number) :])

    def start(self):
        self.channel, theirs = socket.socketpair()  # not pipes, which any process of this user can open through /proc
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        source = self.source if self.source is None else self.source.decode("latin-1")
        try:  # It says "ready", or why not. Its imports do not count against the first answer's time.
            reply = self.ask([self.timeout, self.grader, source], START)
        except TimeoutError:
            reply = f"no answer for {START:g} s"
        except (OSError, ValueError):
            reply = "it died"
        if reply != "ready":
            self.kill()
            reply += limits()
            if self.source is not None:
                reply += f"; {self.grader} must run and define grade(text, answer)"
            raise UserError(f"the verifier's worker does not start: {reply}")

    def kill(self):
        """End the worker, and the programs that its grader started."""
        if self.process:
            end_tree(self.process.pid)
            self.process.wait()
            self.channel.close()
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


def by_file(path, source):
    """The grader that your own file defines. Raises what the file raises."""
    module = sys.modules["grader"] = types.ModuleType("grader")
    module.__file__ = path
    exec(compile(source, path, "exec"), vars(module))
    function = vars(module)["grade"]

    def grade_by(text, answer):
        found = function(text, answer)
        reward, read = found if isinstance(found, tuple) and len(found) == 2 else (found, last_boxed(text))
        try:
            value = math.nan if isinstance(reward, (str, bytes)) else float(reward)  # also of numpy, or of a tensor
        except (TypeError, ValueError, OverflowError, RuntimeError):
            value = math.nan
        if not abs(value) <= LARGEST or not isinstance(read, (str, type(None))):
            raise ValueError(
                f"grade() returned {found!r:.100}, not a number between {-LARGEST:g} and {LARGEST:g}, or a pair of one and a"
                " string"
            )
        return value, read or ""

    return grade_by


GRADERS = {"math_verify": by_math_verify, "oat": by_oat}


# ---------------------------------------------------------------- inside a worker


class SoftTimeout(BaseException):
    """Not an Exception, because math-verify and sympy catch those."""


def grade(grader, text, answer, timeout, errors=None):
    """Call a grader with the soft time limit (seconds). Returns the fields of a Verdict; the reason is "graded" where the
    Verifier is to say whether the reward is enough. What the grader raises is appended to the list `errors`."""

    def alarm(*_):
        raise SoftTimeout

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        reward, read = grader(text, answer)
    except SoftTimeout:
        return 0.0, "timeout", ""
    except BaseException as e:  # a user's file may call sys.exit
        if errors is not None:
            errors.append(e)
        return 0.0, "error", ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    reason = "no_answer" if read is None else "graded"
    return float(reward), reason, vote((read or "")[:1000])[:200]  # cut first, because the timer is off


def at_most(value, limit):
    """The value, or the hard limit that this process inherited (ulimit) if that is lower."""
    hard = resource.getrlimit(limit)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def limits():
    """For an error: the limits under which a worker may die; "" if there are none."""
    kinds = {"bytes of memory (ulimit -v)": resource.RLIMIT_AS, "seconds of CPU (ulimit -t)": resource.RLIMIT_CPU}
    found = {what: resource.getrlimit(limit)[0] for what, limit in kinds.items()}
    return "".join(f"; this shell allows {n} {what}" for what, n in found.items() if n != resource.RLIM_INFINITY)


def in_words(error):
    """An exception in one line, even if it cannot be printed."""
    return " ".join(traceback.format_exception_only(error)[-1].split())[:300]


def load_grader(name, source):
    """The grader of this name, or the one that your file's source defines."""
    if source is not None:
        return by_file(name, source.encode("latin-1"))
    import math_verify  # noqa: F401

    parse_in_two_stages()
    return GRADERS[name]


def work(descriptor):
    """The worker's loop, see Worker: first [timeout, grader, source] in, "ready" or an error out; then [text, answer]
    in, [reward, reason, answer, error] out."""
    os.set_inheritable(descriptor, False)  # a program that the grader runs does not get the channel,
    null = os.open(os.devnull, os.O_RDWR)
    os.register_at_fork(after_in_child=lambda: os.dup2(null, descriptor, inheritable=False))  # nor does a fork of it
    die_with_parent()  # the trainer may be killed during an answer that never returns
    end_group_at_death()
    replies, grader = os.fdopen(descriptor, "wb", closefd=False), None
    for line in os.fdopen(descriptor, "rb"):
        number, request = line.split(b" ", 1)
        request = json.loads(request)
        if grader is None:
            timeout, name, source = request
            try:  # imports come before the memory limit
                grader, reply = load_grader(name, source), "ready"
            except BaseException as e:
                reply = in_words(e)
            memory = at_most(MEMORY, resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        else:
            # Above it the kernel kills the worker, even if it ignores signals and its parent is busy.
            cpu_seconds = math.ceil(time.process_time() + timeout + GRACE) + 1
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]  # not lowered: each answer raises the soft one
            resource.setrlimit(resource.RLIMIT_CPU, (at_most(cpu_seconds, resource.RLIMIT_CPU), hard))
            errors = []
            fields = grade(grader, *request, timeout, errors)
            reply = [*fields, in_words(errors[0]) if errors else ""]
        replies.write(b"%s %s\n" % (number, json.dumps(reply).encode()))
        replies.flush()


if __name__ == "__main__":
    work(int(sys.argv[1]))
