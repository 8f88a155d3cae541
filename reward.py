"""
The verifier: a grader behind a pool of worker processes that can be killed.

A response is what follows the generation prompt "<think>\\n". It must close its thought; graded is the text
between the first "</think>" and a second one, if any. A grader is one of

    math_verify   training's rule, LUFFY's: math-verify on that text, ground truth first; no \\boxed{} required
    oat           the rule of LUFFY's evaluation: the last \\boxed{} alone, by three lenient comparisons
    FILE.py       your own: it defines grade(text, answer), which returns the reward, a bool or a number, or that
                  and the answer it read, a string, for majority votes (else what is boxed has the vote)

No format reward. Some inputs (9^{9^{9^9}}, 100000000! under gmpy2) never return and defy signals, so a worker
has a soft time limit inside and a hard one outside, after which it is killed and replaced, and nothing but that
one answer is lost.
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

from configurator import UserError, die_with_parent, heartbeat, repo_path

START = 120.0  # seconds a worker may take to import math-verify
GRACE = 2.0  # seconds between the soft limit inside a worker and the hard one outside
MEMORY = 4 << 30  # a worker's address space, bytes
ANSWER_LINE = re.compile(r"(?i:\banswer)[*_ ]*:[*_ $(]*([A-J1-9])[*_ $).]*$", re.MULTILINE)


class Verdict(NamedTuple):
    reward: float  # 0.0 or 1.0, or what your own grader returned
    reason: str  # correct (above 0), wrong, no_think, no_answer (nothing to grade), timeout, or error (grader or worker died)
    answer: str = ""  # what was read, normalised, to count votes by; "" where there is none


def graded_text(response, require_think=True, grade_unclosed=False):
    """The part of a response that counts, or None if its thought was never closed."""
    if not require_think:
        return response
    parts = response.split("</think>")
    return parts[1] if len(parts) > 1 else response if grade_unclosed else None


def fast_verdict(text, answer):
    """The verdict where math_verify and oat cannot disagree: one boxed plain integer against another, else None."""
    boxed, gold = re.fullmatch(r"\s*\\boxed\{(\d{1,15})\}\s*", text), re.fullmatch(r"\d{1,15}", answer)
    if not (boxed and gold and text.isascii() and answer.isascii()):
        return None
    same = int(boxed[1]) == int(gold[0])
    return Verdict(float(same), "correct" if same else "wrong", str(int(boxed[1])))


class Verifier:
    """A context manager around `workers` processes; `timeout` seconds of grading per answer.

    `grader` is described above; a relative path counts from the repository. With `grade_unclosed`, a response
    without "</think>" is graded as a whole, as LUFFY's evaluation does and its training does not. With
    `answer_line`, where the ground truth is a letter A-J or a digit 1-9 and nothing is boxed, a last "ANSWER: C"
    counts as \\boxed{C}; the released code calls it wrong.

    score(responses, answers) keeps the order and never raises for what a response contains. submit() and collect() are
    its halves, for a caller with something to do in between. A worker starts with the first answer that needs it and
    takes a second or two to import math-verify; if it cannot, or your file fails, that is a UserError. So is, at once, a
    grader that does not exist.
    """

    def __init__(self, workers=2, timeout=2.0, require_think=True, grader="math_verify",
                 grade_unclosed=False, answer_line=False):  # fmt: skip
        self.require_think, self.grade_unclosed, self.answer_line = require_think, grade_unclosed, answer_line
        self.grader = grader if grader in GRADERS else repo_path(grader)
        if grader not in GRADERS and not os.path.isfile(self.grader):
            words = f"write {', '.join(GRADERS)} or the path of a file that defines grade(text, answer)"
            raise UserError(f"grader={grader!r}: there is no file {self.grader}; {words}")
        self.tick = lambda: None  # called after each answer; what it raises ends score and collect
        self.broken = None  # why no worker starts
        self.threads = ThreadPoolExecutor(workers)
        self.idle = queue.SimpleQueue()
        self.workers = [Worker(timeout, self.grader) for _ in range(workers)]
        for worker in self.workers:
            self.idle.put(worker)

    def __enter__(self):
        if self.grader not in GRADERS:  # a mistake in your file shows now, and not after hours of sampling
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
        """Have an answer graded while the caller goes on: a handle for collect()."""
        if self.broken:  # known before all is sampled
            raise self.broken
        return self.threads.submit(self.verdict, response, answer)

    def collect(self, handles):
        """Wait for what was submitted -> list[Verdict]"""
        verdicts = []
        with heartbeat("verifier grades", len(handles)) as show:
            for handle in handles:
                verdicts.append(handle.result())
                show(len(verdicts))
                self.tick()
        return verdicts

    def verdict(self, response, answer):
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
            return worker.grade(text, answer)
        except UserError as e:
            self.broken = e
            raise
        finally:
            self.idle.put(worker)


class Worker:
    """One child process, `python reward.py TIMEOUT GRADER`, talking JSON lines. Started when needed, replaced when lost."""

    def __init__(self, timeout, grader):
        self.timeout, self.grader, self.process = timeout, grader, None

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
        """The worker's [reward, reason, answer], "timeout" past the hard limit, or None if the worker died."""
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
        # "ready", or why not: its imports do not count against the first answer's time.
        line = self.process.stdout.readline() if select.select([self.process.stdout], [], [], START)[0] else b"no answer"
        if line != b"ready\n":
            self.kill()
            why = line.decode(errors="replace").strip() or "it died"
            remedy = "" if self.grader in GRADERS else f"; {self.grader} must run and define grade(text, answer)"
            raise UserError(f"the verifier's worker does not start: {why}{remedy}")

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):  # closing flushes, into a pipe that may be broken
                    pipe.close()
            self.process = None


# ---------------------------------------------------------------- graders: (text, answer) -> (reward, what was read or None)


def by_math_verify(text, answer):
    """Training's rule. Read is the string beside math-verify's expression: to print the expression may hang."""
    from math_verify import parse, verify

    # math-verify's own limits are off: they are per candidate pair, in whole seconds, and read as "wrong"
    gold = parse(f"${answer}$", parsing_timeout=None)
    found = parse(text, parsing_timeout=None)
    if not found:
        return 0.0, None
    return verify(gold, found, timeout_seconds=None), found[-1] if isinstance(found[-1], str) else ""


def by_oat(text, answer):
    """The rule of OAT's math_grader, which LUFFY's evaluation uses: the last box is right if one of three says so, its
    string as Hendrycks et al. normalise answers to MATH, PRM800K's comparison, or math-verify on what it holds.

    Wrong here and right there: 1.39e-10 for 3.61e-10 (all within 1e-7 of an integer are that integer), (c) for (a) and
    c^2+b for a^2+b (the words of MathQA's units, a and c among them, are deleted wherever they stand), 1\\text{ or }3
    for 1\\text{ or }2 (the rest is cut), 73/4 for 7 3/4, -I(0) for I(0), -1 for -1./3 (of a ground truth that
    math-verify cannot read, one number counts), and what pylatexenc, not used here, makes the same: 1+\\frac{x}{2} and
    \\frac{1+x}{2}, \\sqrt[3]{2} and \\sqrt{2}. Right here and wrong there: \\boxed 5 and \\fbox{5}, as in MATH's own
    code. One time limit holds for all; there, math-verify has a second and sees no long repetition.
    """
    from math_verify import parse, verify

    given, gold = last_boxed(text), last_boxed(answer) or answer
    if given is None:
        return 0.0, None
    if rewrite(given, MATHD) == rewrite(gold, MATHD) or prm800k_equal(given, gold):
        return True, given
    how = dict(fallback_mode="no_fallback", parsing_timeout=None)
    gold = parse(gold if "$" in gold else f"${gold}$", extraction_mode="first_match", **how)
    found = parse(given if "$" in given else f"${given}$", **how)
    return verify(gold, found, timeout_seconds=None), given


def by_file(path):
    """The grader that a user's file defines. Raises what the file raises."""
    function = runpy.run_path(path, run_name="grader")["grade"]

    def grade_by(text, answer):
        found = function(text, answer)
        reward, read = found if isinstance(found, tuple) else (found, last_boxed(text))
        return float(reward), str(read or "")

    return grade_by


GRADERS = {"math_verify": by_math_verify, "oat": by_oat}


def last_boxed(text):
    """What the last \\boxed{...} holds, or "\\boxed 5", or \\fbox where nothing is boxed; None where no brace closes it."""
    _, box, rest = text.rpartition("\\boxed" if "\\boxed" in text else "\\fbox")
    rest, depth = rest.lstrip(), 0
    if not rest.startswith("{"):
        word = re.match(r"[^\s$]+", rest)
        return word[0].rstrip(".,") if box and word else None
    for brace in re.finditer("[{}]", rest):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return rest[1 : brace.start()] if box else None
    return None


MATHD = [  # (pattern, replacement), one after the other
    (r"\\\\", r"\\"),
    (r"\n|\\!|\\(?:left|right)(?![a-z])|\^ *(?:\\circ|\{ *\\circ *\})|\\?[$%]", ""),
    (r"^\s*\\(?:text|math|mbox)[a-z]*\s*\{(.+)\}\s*$", r"\1"),
    (r"(?<=\S)\s*\\(?:text|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", ""),  # a unit
    (r"\\(?:[td](frac)|(ne|le|ge)q(?![a-z]))", r"\\\1\2"),
    (r"\{array\}(?:\{[^{}]*\})?|\{bmatrix\}", "{pmatrix}"),
    (r"(^|[ {])\.(?=\d)", r"\g<1>0."), (r"(?<=\d)\.(?!\d)", ""),
    (r"^\s*[a-zA-Z]\s*=([^=]*)$", r"\1"), (r"(\d) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 7 3/4 is not 73/4
    (r"\s", ""),
    (r"\\(sqrt|frac)(\\pi|[^{\[\\])", r"\\\1{\2}"),  # \sqrt3, \frac1{72} and, with the next one, \frac12
    (r"(\\frac\{[^{}]*\})(\\pi|[^{\\])", r"\1{\2}"),
    (r"^0\.5$", r"\\frac{1}{2}"), (r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}"), (r"^\(([A-J])\)$", r"\1"),
]  # fmt: skip
PRM800K = [
    (" (?:or|and) ", ","), (r"\\\\", ";"),
    (r"\s*(?:\\text\{ *)?(m|b|tr)illion *\}?", lambda m: {"m": "*10^6", "b": "*10^9", "tr": "*10^12"}[m[1]]),
    *MATHD,
    (r"(?:degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(?:es)?s?(?:\^\d+)?", ""),
    (r"\\[{},;:]", ""), (r"([\^_])\{(\w+)\}|\\(?:text|math|mbox)[a-z]*\{([^{}]*)\}", r"\1\2\3"),
    (r"(?<![\w/.^)}])(\d+)\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![/^])\\frac(?=\{)", ""),  # after / and ^ it would bind otherwise and stays, so that sympy is not asked
    (r"\}\{", ")/("), (r"\{", "("), (r"\}", ")"), (r"\\(?:cdot|times)", "*"), (r"\\(?!frac)", ""),
]  # fmt: skip
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")


def rewrite(s, rules):
    for pattern, replacement in rules:
        s = re.sub(pattern, replacement, s)
    return s


def integer(s):
    """07, 1,000, 142.0, 2.66e2 -> 7, 1000, 142, 266; any other string, and what a float cannot hold, as it is."""
    try:
        x = float(THOUSANDS.sub("", s).replace("_", "?"))  # 1_0 is ten to Python alone
    except ValueError:
        return s
    return str(int(x)) if x.is_integer() and abs(x) < 2**53 else s


def prm800k_equal(given, gold):
    """Equal strings, or tuples and intervals with the same brackets and equal elements."""
    given, gold = (THOUSANDS.sub("", integer(rewrite(s, PRM800K).lower())) for s in (given, gold))
    ours, theirs = (s[1:-1].split(",") if re.fullmatch(r"[(\[][^()\[\]]+[)\]]", s) else [s] for s in (given, gold))
    if not given or len(ours) != len(theirs) or (len(theirs) > 1 and (given[0], given[-1]) != (gold[0], gold[-1])):
        return False
    return all(map(sympy_equal, ours, theirs))


def sympy_equal(a, b):
    """Is a - b zero? An integer equals only itself, as do text and what may hang."""
    from sympy import simplify

    a, b = integer(a), integer(b)
    difference = f"({a})-({b})"
    letters = set(re.findall("[a-z]", re.sub("sqrt|frac", "", difference)))
    odd = not re.fullmatch(r"[a-z0-9+\-*/^().]+", difference) or re.search(r"\*\*|\^\(|\^\d+\^|\^\d\d|[a-z]\(0\)", difference)
    if a == b or len(letters) > 2 or odd or any(re.fullmatch(r"-?\d+", s) for s in (a, b)):
        return a == b
    try:
        return bool(simplify(expression(a) - expression(b)) == 0)
    except Exception:  # it does not parse
        return False


def expression(text):
    """A string of sympy_equal's as a sympy expression, by recursive descent: sympy's own parser evaluates Python. Letters
    are symbols but for pi, sqrt( and ln(; what stands side by side is multiplied. Raises IndexError or ValueError."""
    import sympy

    tokens = [*re.findall(r"\d+\.?\d*|\.\d+|sqrt(?=\()|ln(?=\()|pi|\S", text), ""][::-1]  # the next one is the last

    def total():
        value = product()
        while tokens[-1] in ("+", "-"):
            value = value + product() if tokens.pop() == "+" else value - product()
        return value

    def product():
        value = signed()
        while tokens[-1] not in ("", "+", "-", ")", "^"):
            operator = tokens.pop() if tokens[-1] in ("*", "/") else "*"
            value = value / signed() if operator == "/" else value * signed()
        return value

    def signed():
        if tokens[-1] in ("+", "-"):
            return signed() if tokens.pop() == "+" else -signed()
        value = atom()
        if tokens[-1] == "^":
            tokens.pop()
            value = value ** signed()
        return value

    def atom():
        token = tokens.pop()
        if token in ("sqrt", "ln"):
            return getattr(sympy, token)(atom())
        if token == "(":
            value = total()
            if tokens.pop() != ")":
                raise ValueError(text)
            return value
        if token[:1].isdigit() or token[:1] == ".":
            if tokens[-1][:1] == ".":  # 1.5.2
                raise ValueError(text)
            return sympy.Rational(token)
        if not token.isalpha():
            raise ValueError(text)
        return sympy.pi if token == "pi" else sympy.Symbol(token)

    value = total()
    if tokens != [""]:
        raise ValueError(text)
    return value


# ---------------------------------------------------------------- inside a worker


def parse_in_two_stages():
    """Let latex2sympy, math-verify's parser, try ANTLR's SLL prediction before LL, which takes many times as long over an
    interval. What SLL accepts it parses as LL does (ANTLR's documentation of PredictionMode); what it refuses, LL is asked."""
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy as Parser

    create_parser = Parser.create_parser

    def create(self, latex):
        parser = create_parser(self, latex)
        parser._interp.predictionMode, math_of = PredictionMode.SLL, parser.math

        def in_two_stages():
            try:
                return math_of()
            except Exception:
                return create_parser(self, latex).math()

        parser.math = in_two_stages
        return parser

    Parser.create_parser = create


class SoftTimeout(BaseException):
    """Not an Exception: math-verify and sympy swallow those."""


def grade(grader, text, answer, timeout):
    """A Verdict's fields, by the function `grader`."""

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
    reason = "no_answer" if read is None else "correct" if reward > 0 else "wrong"
    return float(reward), reason, integer(rewrite((read or "")[:1000], MATHD))[:200]  # cut first: the timer is off


def work(timeout, name):
    die_with_parent()  # the trainer may be killed in the middle of an answer that never returns
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not break the protocol
    try:  # before the limit on memory
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
        # Beyond this the kernel kills the worker, also where no signal is heard and the parent cannot look.
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + timeout + GRACE) + 1, resource.RLIM_INFINITY))
        print(json.dumps(grade(grader, request["text"], request["answer"], timeout)), file=replies, flush=True)


if __name__ == "__main__":
    work(float(sys.argv[1]), sys.argv[2])
