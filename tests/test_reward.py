import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sympy import simplify

from configurator import ROOT, UserError
from measure import forms, grading_speed, hedges
from reward import Verifier, by_math_verify, fast_verdict, grade, graded_text, letter_with_text
from runtime.latex import parse_in_two_stages
from runtime.oat import by_oat, expression, unevaluated, vote
from runtime.run import identify
from runtime.stats import majority
from runtime.work import settings_of


def started(grader):
    with Verifier(workers=2, timeout=2.0, grader=grader) as v:
        v.score(["</think>\\boxed{x}", "</think>\\boxed{y}"], ["1", "2"])  # start the workers
        yield v


@pytest.fixture(scope="module")
def verifier():
    yield from started("math_verify")


@pytest.fixture(scope="module")
def oat():
    yield from started("oat")


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


# The text after </think>, the ground truth, and whether oat and math_verify accept it.
BOTH = [
    # which box
    (r"\boxed{1} so \boxed{2}", "2", 1, 0),  # math-verify reads the set {1, 2}
    (r"\boxed{2} or \boxed{3}", "2", 0, 0),
    (r"\boxed{2}, and 3 is too many", "2", 1, 1),
    (r"the answer is 2", "2", 0, 1),
    (r"\boxed{2", "2", 0, 0),
    (r"\boxed{3} and \boxed{2", "3", 0, 1),
    (r"\boxed 2, as we said", "2", 1, 1),
    (r"\fbox{2}", "2", 1, 0),
    (r"\boxed{}", "2", 0, 0),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt{2}}{2}", 1, 1),  # nested braces
    (r"\boxed{\dfrac34}", r"\boxed{\frac{3}{4}}", 1, 1),
    # choices and words
    (r"\boxed{\text{C}}", "C", 1, 1),
    (r"\boxed{(C)}", r"\text{C}", 1, 1),
    (r"\boxed{C}", r"\text{(C)}", 1, 1),
    (r"\boxed{c}", "C", 1, 1),
    (r"\boxed{C. foo}", "C", 0, 0),
    (r"\boxed{D}", "C", 0, 0),
    ("ANSWER: C", "C", 0, 0),
    (r"\boxed{west}", r"\text{east}", 0, 0),
    (r"\boxed{East}", r"\text{east}", 1, 1),
    # numbers
    (r"\boxed{142}", "142.0", 1, 1),
    (r"\boxed{142.5}", "142.0", 0, 0),
    (r"\boxed{5.}", "5", 1, 0),
    (r"\boxed{07}", "7", 1, 1),
    (r"\boxed{-7}", "7", 0, 0),
    (r"\boxed{1,000}", "1000", 1, 1),
    (r"\boxed{10,\!080}", "10080", 1, 1),
    (r"\boxed{1,000}", "1,001", 0, 0),
    (r"\boxed{2.66e2}", "266", 1, 0),
    (r"\boxed{3.61e-10}", "1.39e-10", 0, 0),
    (r"\boxed{12345678901234567890}", "12345678901234567891", 0, 0),
    (r"\boxed{1/2}", r"\frac12", 1, 1),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1, 1),
    (r"\boxed{\frac 12}", ".5", 1, 1),
    (r"\boxed{2/4}", "1/2", 1, 1),
    (r"\boxed{1/3}", r"\frac{2}{3}", 0, 0),
    (r"\boxed{0.33}", r"\frac13", 0, 0),
    (r"\boxed{-\frac{1}{3}}", "-1./3", 1, 0),
    (r"\boxed{-1}", "-1./3", 0, 1),  # math-verify cannot read this ground truth and takes the -1
    (r"\boxed{7 3/4}", "7.75", 1, 0),
    (r"\boxed{7\frac34}", "7.75", 1, 1),
    (r"\boxed{73/4}", "7 3/4", 0, 0),
    (r"\boxed{-7 3/4}", "-6.25", 0, 0),
    (r"\boxed{1+1}", "2", 1, 1),
    (r"\boxed{1/\frac{3}{2}}", r"\frac{1}{6}", 0, 0),
    (r"\boxed{2^\frac{1}{2}}", "1", 0, 0),
    # units and names
    (r"\boxed{50\%}", "50", 1, 1),
    (r"\boxed{50\%}", "0.5", 1, 1),
    (r"\boxed{51\%}", r"50\%", 0, 0),
    (r"\boxed{12\text{ km}}", "12", 1, 1),
    (r"\boxed{13\text{ km}}", "12", 0, 0),
    (r"\boxed{12 cm^2}", "12", 1, 0),
    (r"\boxed{3 hours}", "3", 1, 1),
    (r"\boxed{90}", r"90^\circ", 1, 1),
    (r"\boxed{\$18.9}", r"\$18.90", 1, 1),
    (r"\boxed{5 million}", r"5\text{ million}", 1, 0),
    (r"\boxed{5 billion}", "5 million", 0, 0),
    (r"\boxed{k = 5}", "5", 1, 1),
    (r"\boxed{x>=5}", "5", 0, 0),
    # tuples, intervals, sets, matrices
    (r"\boxed{(1,2]}", "(1, 2]", 1, 1),
    (r"\boxed{(1,2)}", "[1,2]", 0, 0),
    (r"\boxed{(1,2)}", "(1, 2.0)", 1, 1),
    (r"\boxed{(1,\frac12)}", "(1, 0.5)", 1, 1),
    (r"\boxed{(2,1)}", "(1,2)", 0, 0),
    (r"\boxed{(1,2,3)}", "(1,2)", 0, 0),
    (r"\boxed{\left(3,\tfrac\pi2\right)}", r"\left( 3, \frac{\pi}{2} \right)", 1, 0),
    (r"\boxed{(-\infty,2)\cup(3,\infty)}", r"(-\infty, 2) \cup (3, \infty)", 1, 1),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", 1, 1),
    (r"\boxed{2\text{ or }1}", "1,2", 1, 1),
    (r"\boxed{1\text{ or }3}", r"1\text{ or }2", 0, 0),
    (r"\boxed{\begin{bmatrix} 1 \\ 2 \end{bmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1, 1),
    (r"\boxed{\begin{pmatrix} 1 \\ 23 \end{pmatrix}}", r"\begin{pmatrix} 12 \\ 3 \end{pmatrix}", 0, 0),
    # algebra
    (r"\boxed{2\sqrt2}", r"\sqrt{8}", 1, 1),
    (r"\boxed{16sqrt(3)}", r"16\sqrt{3}", 1, 1),
    (r"\boxed{2\sqrt{3}}", r"3\sqrt{2}", 0, 0),
    (r"\boxed{\sqrt[3]{2}}", r"\sqrt{2}", 0, 0),
    (r"\boxed{2(k+1)}", "2k+2", 1, 1),
    (r"\boxed{1+\frac{x}{2}}", r"\frac{1+x}{2}", 0, 0),
    (r"\boxed{q-p}", "p-q", 0, 0),
    (r"\boxed{c^2+b}", "a^2+b", 0, 0),
    (r"\boxed{(a)}", "(c)", 0, 0),
    (r"\boxed{-I(0)}", "I(0)", 0, 0),
]


def test_two_graders_side_by_side():
    for text, answer, *wanted in BOTH:
        got = [grade(grader, text, answer, 20.0)[0] for grader in (by_oat, by_math_verify)]
        assert got == wanted, (text, answer)


POWERS = {  # a ground truth: right answers, and wrong ones
    "6.5e-2": (["0.065", r"6.5\times10^{-2}", r"6.5 \cdot 10^{-2}", "6.5e-2", "6.5E-02", ".065", "65e-3",
                r"0.65 \times 10^{-1}", "6.5 \u00d7 10^{\u22122}", r"6.5 \times 10^{-2} \text{ m}", r"6.5\times{10}^{-2}",
                r"6.5\,\times\,10^{-2}\,\mathrm{m/s}", r"\frac{13}{200}", r"6.5 * 10^-2", "x = 6.5e-2", "6.50e-2."],
               ["6.5e2", "-6.5e-2", "6.5 e - 2", "6.5 e -2", r"6.5-2", r"6.5^{-2}", "0.0650001", r"6.5\times10^{-3}",
                "(6.5, -2)", r"6.5 + 10^{-2}", r"6.5 \times 10 - 2"]),
    "1.39e-10": (["0.000000000139", r"1.39 \times 10^{-10} \text{ m}"],
                 ["3.61e-10", "0", "1.39e-11", r"3.61\times 10^{-10}", r"3.61 \times 10^{-10} \text{ m}", "3.61e-10 m",
                  "1.390001e-10"]),
    "1.2e-3": (["0.0012"], ["1.2 e - 3", "1.2 e -3", "1.2e - 3", "1.2-3", "1.2e-3.5"]),
    "1e11": (["10^{11}", r"10^{11} \text{ Hz}", "100,000,000,000", r"100{,}000{,}000{,}000", r"1 \times 10^{11}"],
             ["10^{12}", "11"]),
    "4.6e-24": ([r"4.6 \times 10^{-24}"], ["4.7e-24", "4.6e-23", "0"]),
    "3e8": ([r"3.0\times10^8", "300000000", "300 million", r"300 \text{ million}"], ["24e", "3e", "3", "8", "3000000000"]),
    "5": ([r"5 \text{ cm}"], [r"5 \text{ million}", "5.00000001", r"5 \text{ thousand}"]),
    r"\frac{8}{3}": (["8/3", r"2\frac{2}{3}", "2.666667", "2.66666666667"], ["2.67", "2.66667", "2.666666", "2.6666667001"]),
    r"\sqrt{2}": (["1.414214", "1.41421356"], ["1.41421", "1.414213", "1.4142135"]),
    "0.1234567": ([], ["0.123457"]),
    "(10^{2},10^{-1})": (["(100, 0.1)"], ["(10^{3},10^{-1})"]),
    "(1.39e-10, 1)": ([r"(1.39\times10^{-10}, 1)"], ["(3.61e-10, 1)"]),
    "x^{2000}": ([], [r"x^2\times10^3"]),
    r"\frac{1}{2000}": ([], [r"1/2\times10^3"]),
}  # fmt: skip


def test_powers_of_ten_are_exact():
    for gold, (right, wrong) in POWERS.items():
        for given in (gold, *right, *wrong):
            assert grade(by_oat, f"\\boxed{{{given}}}", gold, 20.0)[0] == (given not in wrong), (gold, given)
    for given in [*POWERS["1e11"][0], *POWERS["6.5e-2"][0]]:  # either side
        gold = "1e11" if given in POWERS["1e11"][0] else "6.5e-2"
        assert grade(by_oat, f"\\boxed{{{gold}}}", given, 20.0)[0] == 1.0, given


SPACED = [  # ways to write one answer, for comparisons and for votes
    ["12", r"12 \text{ ft}\,", r"12\,\text{ft}", "12.", r"\;12~", r"12\ \text{units}", r"\displaystyle 12", r"\quad12", "{12}",
     r"\hspace{2pt}12\hspace*{1mm}", "\u00a012", r"12\thinspace", r"x\,=\,12", r"12\,\mathrm{cm}"],
    ["C", r"\,\text{(C)}", r"(\text{C})", r"\textbf{(C)}", r"\left(\mathrm{C}\right)", r"\text{ C }"],
    [r"\varnothing", r"\emptyset", "\u2205", r"\,\emptyset"],
    ["1234", "1{,}234", "1,234", r"1\,234", r"1,\!234", r"1, \!234", "1~234", r"1{,}\!234", "1 234.0"],
    ["5", r"5\,\text{cm}", r"5\text{cm}", r"5\ \mathrm{cm}", "5.0"],
    ["0.065", "6.5e-2", r"6.5 \times 10^{-2}", "6.50E-2"],
    ["(1,2)", r"\left( 1,\,2 \right)", r"\big(1 , 2\big)", r"\bigl(1,~2\bigr)."],
    [r"\frac{1}{3}", r"\dfrac13", r"\cfrac{1}{3}", "1/3", r"\tfrac{ 1 }{ 3 }.", r"\displaystyle\frac 13"],
    [r"90^\circ", "90", r"90^{\circ}", "90\u00b0", r"90\,^\circ"],
    [r"k\geslant2", r"k \geq 2", r"k\,\ge\,2", r"k \geqslant 2"][1:],
]  # fmt: skip


def test_spacing_and_words_do_not_matter():
    for ways in SPACED:
        for given in ways:
            right, _, read = grade(by_oat, f"\\boxed{{{given}}}", ways[0], 20.0)
            assert right and read == vote(ways[0]), (ways[0], given, read)
            assert grade(by_oat, f"\\boxed{{{ways[0]}}}", given, 20.0)[0], (given, ways[0])
    assert majority(["0.25", r"\frac{1}{4}", "7", "7", r"\frac{2}{8}"], [True, True, False, False, True]) == 1.0


WRITTEN = {  # ground truth -> other ways to write it, and answers that are wrong
    "5": ([r"\log_2 32", r"5 \text{,}", "=5"], ["5 5", r"5\,5", r"5\quad 5", r"5\mathrm{\sqrt{2}}", r"5\mathrm{i}",
        r"5\mathrm{e}", r"5\text{ $\pi$}"]),
    r"\log_2 3": ([r"\log_2(3)", r"\frac{\ln 3}{\ln 2}"], []),
    "144": (["2^4 3^2", "2^4 9"], []),
    r"2^{4}\cdot3^{2}": ([r"2^4\,3^2"], []),
    "2000": (["2^4 125", r"2\times{10^{3}}"], []),
    r"3\sqrt{2}": ([r"\sqrt2 3"], []),
    r"\frac{1}{2} \cdot 3": ([r"\frac12 3"], []),
    r"\frac{3 \sqrt{3}}{4}": ([r"\frac{3 3^{1/2}}{4}"], []),
    r"$\frac{4 \cdot 999^{4}}{27}$": ([r"\frac{4\,999^4}{27}", r"\frac{2^2 999^4}{27}"], []),
    "6.5e-2": ([r"6.5\times{10^{-2}}"], []),
    "3e8": ([r"3\times{10^8}"], []),
    r"\{1,2,3\}": ([r"1\text{, }2\text{, }3"], []),
    "10080": ([r"10\text{,}080"], []),
    r"12\pi": ([r"12\mathrm{\pi}"], []),
    "e^{2}": ([r"\mathrm{e}^{2}"], []),
    r"\frac{e^{2 i t}}{(2+2 i)}": ([r"\frac{e^{2 \mathrm{i} t}}{(2+2 \mathrm{i})}"], []),
    r"\frac{4 A}{3+3 i} e^{i t}": ([r"\frac{4 A}{3+3 \mathrm{i}} e^{\mathrm{i} t}"], []),
    "42": ([r"\boldsymbol{42}", r"\textcolor{blue}{42}", r"\emph{42}", r"\ensuremath{42}", r"\bf{42}", r"{\bf 42}",
        r"{\rm 42}", r"\tt 42", r"{\Large 42}", r"\small{42}", r"\hfill 42", "42{}", "{}42", r"42\nonumber",
        r"\begin{aligned}42\end{aligned}", r"42\tag{1}", r"42\\", "42,", "42;", r"\therefore 42", r"\[42\]",
        r"\text{Answer: }42", r"\text{The answer is }42"], []),
    "-7": ([r"\bm{-7}"], []),
    "C": ([r"\underline{C}", r"\operatorname{C}", "=C"], []),
    r"\{1,2\}": ([r"\lbrace 1,2\rbrace"], []),
    r"\frac{1}{2}": ([r"\nicefrac{1}{2}"], []),
    "90": ([r"90{}^\circ"], []),
    r"90^\circ": ([r"90\textdegree", r"90\degree"], []),
    "4": ([r"4\operatorname{cm}", r"4\,\rm{cm}"], []),
    r"0.\overline{3}": ([r"0.\bar{3}"], []),
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": ([r"\begin{pmatrix}1&2\\[4pt]3&4\end{pmatrix}"], []),
    "1234": (["1 234"], []),
    "12345": ([r"12\,345"], []),
    "-1234": ([r"-1\ 234"], []),
    "2^4 3^2": ([], ["9, 16", r"\{16,9\}"]),
    "2^{4125}": ([], ["2^4 125"]),
    "12": ([], [r"12\mathrm{\pi}"]),
    "2": ([], [r"2\mathrm{\pi}"]),
    "38": ([], ["3 8"]),
    "24": ([], ["3 8"]),
    "3 8": ([], ["8"]),
}  # fmt: skip


def test_what_only_changes_the_looks_does_not_matter():
    for gold, (right, wrong) in WRITTEN.items():
        for given in right + wrong:
            assert grade(by_oat, f"\\boxed{{{given}}}", gold, 20.0)[0] == (given in right), (gold, given)


FORMED = ["6.5e-2", "1e11", "58,500", r"$-\frac{35}{9}$", r"\$18.90", r"106^\circ", "17.5%", r"\text{(C)}", r"\text{east}",
          "(3,4]", "2,-1,7", r"3 \pm 2 \sqrt{2}", r"11\sqrt2", "2k+2", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", "204_5",
          "x=5", ".35625", r"15\mbox{ cm}^2", r"11,\! 111,\! 111,\! 100"]  # fmt: skip


def test_reading_a_long_answer_takes_no_time():
    """Each rule takes time in proportion to the answer's length, whatever is repeated in it."""
    for unit in (
        r"\,",
        ",",
        "1,",
        "{",
        "}{",
        r"\text{",
        r"\text{a} ",
        "1e5 ",
        "10^{3}",
        " .",
        r"\mathrm{ab}",
        "( ",
        r"1\times10^{",
        " ",
        "{ ",
        r"\\[",
        r"\text{ $",
        r"\times{ ",
        r"\text{answer",
        r"\color{",
    ):
        start = time.time()
        vote((unit * 20_000)[:20_000])
        assert time.time() - start < 2, unit


def test_oat_takes_other_forms_and_refuses_other_answers():
    """Of measure/forms.py, which has more for the benchmarks' ground truths."""
    same, other = forms.questions({"": FORMED})
    assert all(same.values()) and all(other[kind] for kind in other)
    units = [(r"15\mbox{ cm}^{3}", r"15\mbox{ cm}^2")]  # units are not compared
    rng = random.Random(0)
    for kinds, right in ((same, True), (other, False)):
        for kind, pairs in kinds.items():
            for given, gold in rng.sample(pairs, min(len(pairs), 25)):
                if (given, gold) not in units:
                    assert grade(by_oat, f"\\boxed{{{given}}}", gold, 20.0)[0] == right, (kind, given, gold)


def test_the_forms_are_equal_and_the_others_are_not():
    for gold in ("6.5e-2", "1e11", "-0.5", "58,500", r"$-\frac{35}{9}$", "7"):
        v = forms.number(gold)
        for kinds, equal in ((forms.SAME, True), (forms.OTHER, False)):
            plain = [forms.value(form) for made in kinds.values() for form in made(gold) if equal or form != gold]
            assert all((x == v) == equal for x in plain if x is not None), gold


def test_oat_needs_a_box(oat):
    verdicts = oat.score(["</think>2", "\\boxed{2}</think>2", "</think>\\boxed{2}"], ["2"] * 3)
    assert [v[:2] for v in verdicts] == [(0.0, "no_answer"), (0.0, "no_answer"), (1.0, "correct")]


def test_what_was_read_for_votes():
    """Different ways to write an answer are the same vote."""
    for grader in (by_oat, by_math_verify):
        for ways, wanted in (
            (("\\boxed{07}", "\\boxed{7.0}", "$\\boxed{7}$."), "7"),
            (("\\boxed{1,000}", "\\boxed{1000}", "\\boxed{\\$1000}"), "1000"),
            (("\\boxed{C}", "\\boxed{\\text{C}}", "\\boxed{(C)}", "\\boxed{\\mathrm{C}}"), "C"),
            (("\\boxed{\\frac12}", "\\boxed{1/2}", "\\boxed{.5}", "\\boxed{\\dfrac 1 2}", "\\boxed{x = 0.5}"), "\\frac{1}{2}"),
            (("\\boxed{( 1, 2 )}", "\\boxed{\\left(1,2\\right)}"), "(1,2)"),
            (("", "\\boxed{"), ""),
        ):
            assert [grade(grader, way, "5", 20.0)[2] for way in ways] == [wanted] * len(ways), (grader, ways)
    assert grade(by_math_verify, "the answer is 7", "5", 20.0) == (0.0, "graded", "7")
    assert len(grade(by_oat, f"\\boxed{{{'x+' * 5000}y}}", "5", 20.0)[2]) == 200


def test_a_thought_that_is_not_closed():
    responses, answers = ["so \\boxed{2}", "\\boxed{2}</think>\\boxed{3}", "so 2"], ["2"] * 3
    with Verifier(workers=1, timeout=2.0, grader="oat", grade_unclosed=True) as v:
        assert [x.reason for x in v.score(responses, answers)] == ["correct", "wrong", "no_answer"]
    with Verifier(workers=1, timeout=2.0, grader="oat") as v:
        assert [x.reason for x in v.score(responses, answers)] == ["no_think", "wrong", "no_think"]
    assert graded_text("a", grade_unclosed=True) == "a" and graded_text("a") is None


ANSWER_LINES = [
    ("ANSWER: C", "C", 1),
    ("Because of B.\nAnswer: (C)", "C", 1),
    ("**ANSWER: C**", "C", 1),
    ("**Answer:** $C$.", "C", 1),
    ("The answer: C", "C", 1),
    ("ANSWER: B\nNo.\nANSWER: C\nDone.", "C", 1),  # the last one
    ("ANSWER: C\nANSWER: B", "C", 0),
    ("ANSWER: C. foo", "C", 0),
    ("ANSWER: c", "C", 0),
    ("ANSWER: 3", "3", 1),
    ("ANSWER: 35", "3", 0),
    ("ANSWER: C, so \\boxed{B}", "C", 0),  # a box comes first
    ("\\boxed{C}\nANSWER: B", "C", 1),
    ("ANSWER: 12", "12", 0),  # not a multiple-choice question
    ("Answer: C\r", "C", 1),
    ("Answer: C\r\nDone.\r\n", "C", 1),
    ("Answer: B\rAnswer: C\r", "C", 1),
    ("Answer: C\r2", "C", 1),
    ("Answer: C 2\r", "C", 0),
]


def test_the_answer_line_of_a_multiple_choice_question():
    texts, golds = [f"</think>{c[0]}" for c in ANSWER_LINES], [c[1] for c in ANSWER_LINES]
    with Verifier(workers=1, timeout=2.0, grader="oat", answer_line=True) as v:
        verdicts = v.score(texts, golds)
        assert [x.reward for x in verdicts] == [c[2] for c in ANSWER_LINES] and verdicts[0].answer == "C"
    with Verifier(workers=1, timeout=2.0, answer_line=True) as v:
        assert v.score(texts[:3], golds[:3])[0] == (1.0, "correct", "C")
    with Verifier(workers=1, timeout=2.0) as v:  # off by default, as in the released code
        assert v.score(texts[:3], golds[:3])[0].reward == 0.0


LETTERS = {  # what is boxed for the ground truth C: is it the letter with text?
    "C.": True, "C)": True, "C: 12": True, r"\textbf{(C)}\ 12": True, r"\text{C. foo}": True, r"(C) \frac12": True,
    "**C**. foo": True, "C because": True, "D.": False, "Cat": False, "C or D": False, "C, D": False, "C^2": False,
    "C=5": False, "B and C": False, "12": False, "": False,
}  # fmt: skip


def test_a_letter_with_text():
    """The papers' graders call it wrong, so ours do; it can be counted."""
    for boxed, wanted in LETTERS.items():
        text = f"\\boxed{{{boxed}}}"
        for gold in ("C", r"\text{(C)}"):
            assert letter_with_text(text, gold) == wanted, boxed
            assert [grade(grader, text, gold, 20.0)[0] for grader in (by_oat, by_math_verify)] == [0, 0], boxed
    assert not letter_with_text(r"\boxed{A car}", "A") and letter_with_text(r"\boxed{A. car}", "A")
    assert not letter_with_text("C.", "C") and not letter_with_text(r"\boxed{C.}", "12")


OWN = """
import time
def grade(text, answer):
    print("a word on stdout")
    if text == "hang":
        time.sleep(600)
    if text == "deaf":
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass
    if text == "exit":
        raise SystemExit
    if text == "read":
        return True, "x = 7"
    return {"half": 0.5, "nan": float("nan"), "none": None, "minus": -1}.get(text, answer in text)
"""


def test_your_own_grader(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    texts = ["2 \\boxed{1/2}", "3", "half", "minus", "nan", "none", "exit", "hang", "deaf", "\\boxed{2}", "read"]
    with Verifier(workers=2, timeout=0.5, grader=str(tmp_path / "own.py")) as v:
        verdicts = v.score([f"</think>{t}" for t in texts], ["2"] * len(texts))
    assert verdicts[:2] == [(1.0, "correct", "\\frac{1}{2}"), (0.0, "wrong", "")]
    assert [v[:2] for v in verdicts[2:4]] == [(0.5, "wrong"), (-1.0, "wrong")]
    assert [v.reason for v in verdicts[4:]] == ["error", "error", "error", "timeout", "timeout", "correct", "correct"]
    assert verdicts[-1] == (1.0, "correct", "7")  # normalised, so that x = 7 and 7 are the same vote


def test_what_counts_as_solved(tmp_path):
    """The knob solved_at alone says it: neither 0.1 for format nor any other reward below it is a right answer."""
    (tmp_path / "own.py").write_text("def grade(text, answer):\n    return float(text)")
    rewards = ["-1", "0", "0.1", "0.5", "0.999", "1", "2"]
    for knobs, n_solved in (({}, 2), ({"solved_at": 0.5}, 4), ({"solved_at": 2.0}, 1)):
        with Verifier(workers=1, grader=str(tmp_path / "own.py"), **knobs) as v:
            verdicts = v.score([f"</think>{r}" for r in rewards], ["2"] * 7)
        assert [x.reward for x in verdicts] == [float(r) for r in rewards]
        assert [x.reason for x in verdicts] == ["wrong"] * (7 - n_solved) + ["correct"] * n_solved
    with pytest.raises(UserError, match="solved_at=1.5: oat's rewards are 0 and 1"):
        Verifier(grader="oat", solved_at=1.5)


# A grader under attack: what the text says happens in it, or in a program that it runs. NOTES is a folder.
ATTACKED = """
import ctypes, multiprocessing, os, signal, subprocess, sys, threading, time

FORGED = b'[1.0, "correct", "x"]\\n[1.0, "correct", "x", ""]\\n"ready"\\n'
FORGE = f'''
import os, sys, time
forged = {FORGED!r}
for pid in ("self", os.getppid()):
    for fd in range(21):
        try:
            out = os.open(f"/proc/{{pid}}/fd/{{fd}}", os.O_WRONLY | os.O_NONBLOCK)
            os.write(out, forged)
            os.close(out)
        except OSError:
            pass
for fd in range(21):
    try:
        os.write(fd, forged)
    except OSError:
        pass
time.sleep(float(sys.argv[1]))
'''

def forge(tail=FORGED):
    for fd in range(3, 21):
        try:
            os.write(fd, tail)
        except OSError:
            pass

def sleeper(name, **options):
    process = subprocess.Popen(["sleep", "1000"], **options)
    open(f"NOTES/{name}", "w").write(str(process.pid))
    return process

def deaf():
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass

def fork(do):
    if not os.fork():
        do()
        os._exit(0)
    time.sleep(0.2)

def grade(text, answer):
    word = text.split()[0]
    if word == "program":
        subprocess.run([sys.executable, "-c", FORGE, "0"], close_fds=False)
    if word == "later":
        subprocess.Popen([sys.executable, "-c", FORGE, "0"], pass_fds=())
        time.sleep(0.2)
    if word == "reader":
        subprocess.Popen(["cat"])
    if word == "print":
        print(FORGED.decode(), flush=True)
        os.write(1, FORGED)
    if word == "fork":
        fork(forge)
    if word == "twins" and not os.fork():
        return True
    if word == "process":
        process = multiprocessing.get_context("fork").Process(target=forge)
        process.start()
        process.join()
    if word == "thread":
        threading.Thread(target=forge).start()
        time.sleep(0.2)
    if word == "endless":
        forge(b"[1.0")
        deaf()
    if word == "long":
        forge(b"[" * 9000)
        forge(b"[" * 9000)
    if word == "close":
        os.closerange(3, 100)
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if word == "sleeper":
        sleeper("plain")
    if word == "session":
        sleeper("session", start_new_session=True)
    if word == "hang":
        sleeper("hang")
        time.sleep(1000)
    return word == answer
"""
FORGERIES = ["program", "later", "reader", "print", "fork", "twins", "process", "thread", "long", "close", "die"]


def attacked(tmp_path, **options):
    (tmp_path / "attacked.py").write_text(ATTACKED.replace("NOTES", str(tmp_path)))
    return Verifier(grader=str(tmp_path / "attacked.py"), require_think=False, **options)


def ends(pid):
    """Whether a process is gone, or goes within five seconds."""
    for _ in range(50):
        if not os.path.exists(f"/proc/{pid}") or ") Z " in open(f"/proc/{pid}/stat").read():
            return True
        time.sleep(0.1)


def test_no_verdict_is_forged_or_shifted(tmp_path, capsys):
    """Whatever happens in one answer, none gets the reward of another, and the next answers get their own."""
    texts = [text for attack in FORGERIES for text in (attack, "right", "wrong")]
    with attacked(tmp_path, workers=1, timeout=20.0) as v:
        verdicts = v.score(texts, ["right"] * len(texts))
    for attack, *found in zip(FORGERIES, *(verdicts[i::3] for i in range(3)), strict=True):
        assert [x.reward for x in found] == [0, 1, 0] and [x.reason for x in found[1:]] == ["correct", "wrong"], (attack, found)
    harmless = ("program", "later", "reader", "print", "fork", "process", "twins")
    assert [verdicts[3 * i].reason for i, attack in enumerate(FORGERIES) if attack in harmless] == ["wrong"] * len(harmless)
    assert "something else wrote to the channel; reward 0 for ground truth 'right'" in capsys.readouterr().out


def test_nothing_blocks_a_request(tmp_path):
    """Not a line without an end, and not 600 kB, which do not fit into the socket of a worker that is stopped."""
    with attacked(tmp_path, workers=1, timeout=0.5) as v:
        for text in ("endless", "stop", "wrong " * 100_000):
            v.score(["right"], ["right"])
            if len(text) > 100:
                os.kill(v.workers[0].process.pid, signal.SIGSTOP)
            start = time.time()
            found = v.score([text, "right"], ["right"] * 2)
            assert [x.reason for x in found] == ["timeout", "correct"] and time.time() - start < 0.5 + 2 + 10


def test_what_a_grader_started_ends_with_its_worker(tmp_path, monkeypatch):
    class Pool(ThreadPoolExecutor):  # its threads have surely ended when it returns
        def shutdown(self, **options):
            super().shutdown(**options)
            time.sleep(0.3)

    monkeypatch.setattr("reward.ThreadPoolExecutor", Pool)
    pid_of = lambda name: int((tmp_path / name).read_text())
    with attacked(tmp_path, workers=1, timeout=0.5) as v:
        v.score(["hang"], ["right"])  # a soft timeout
        assert ends(pid_of("hang"))
        v.score(["sleeper", "stop"], ["right"] * 2)  # a hard one
        assert ends(pid_of("plain"))
        v.score(["sleeper", "die"], ["right"] * 2)
        assert ends(pid_of("plain"))
        v.score(["sleeper"], ["right"])
        os.kill(v.workers[0].process.pid, signal.SIGKILL)  # as the kernel does for memory, or for a dead trainer
        assert ends(pid_of("plain"))
        v.score(["sleeper", "session"], ["right"] * 2)
        assert os.path.exists(f"/proc/{pid_of('plain')}") and os.path.exists(f"/proc/{pid_of('session')}")
    assert ends(pid_of("plain")) and ends(pid_of("session"))


OWN_BYTES = b"# coding: latin-1\ndef grade(text, answer):\n    return text == answer, __file__[-6:] + '\xe4'\n"


def test_a_grader_is_read_once(tmp_path, monkeypatch):
    """A worker that starts later runs the text that the verifier read, even if the file has changed or is gone. So a run's
    identity and the settings of samples name that text."""
    path = tmp_path / "own.py"
    path.write_bytes(OWN_BYTES)
    with Verifier(workers=1, grader=str(path), require_think=False) as v:
        path.write_text("def grade(text, answer): return 0.5")
        assert v.score(["a"], ["a"]) == [(1.0, "correct", "own.py\xe4")]
        config = {"grader": str(path), "data": str(path), "model": "", "teacher_model": "", "eval_data": ""}
        inputs = identify(config, [], {"data": "1"}, "torch", "float32", v, None)["inputs"]
        assert inputs["grader"] == [len(OWN_BYTES), hashlib.sha256(OWN_BYTES).hexdigest()] != inputs["data"]
        settings = settings_of({}, [], os.path.join(ROOT, "toy", "base"), "torch", "float32", v)
        assert settings["grader"].encode("latin-1") == OWN_BYTES
        monkeypatch.setattr("runtime.ranks.all_ranks", lambda item: [item, path.read_bytes()])  # what another rank read
        with pytest.raises(UserError, match="own.py is not the same on all ranks"):
            identify(config, [], {"data": "1"}, "torch", "float32", v, None)
        os.remove(path)
        v.workers[0].kill()
        assert v.score(["a"], ["a"]) == [(1.0, "correct", "own.py\xe4")]
    path.write_text("import os\nos.closerange(3, 40)\nprint('ready')\ndef grade(text, answer): return 1")
    with pytest.raises(UserError, match="does not start: it died; .*own.py must run"), Verifier(workers=1, grader=str(path)):
        pytest.fail("it starts")


RETURNED = {  # what a grader returns, and the verdict's reward and answer; None for an error
    "True": (1, "b"), "0.25": (0.25, "b"), "-1e6": (-1e6, "b"), "(True, 'x')": (1, "x"), "(2, '')": (2, ""),
    "(0, None)": (0, ""), "np.float32(0.5)": (0.5, "b"), "np.bool_(True)": (1, "b"), "np.array([3])": (3, "b"),
    "Fraction(1, 4)": (0.25, "b"),
    "None": None, "'1'": None, "float('nan')": None, "float('inf')": None, "1e39": None, "1.1e6": None, "10**400": None,
    "(1,)": None, "(1, 'x', 2)": None, "(1, 7)": None, "[1, 'x']": None, "np.array([1, 2])": None, "1j": None, "1 / 0": None,
    "sys.exit()": None, "Unprintable()": None, "exec('raise Unprintable')": None,
}  # fmt: skip


def test_what_a_grader_may_return(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "import sys\nfrom fractions import Fraction\nimport numpy as np\n"
        "class Unprintable(Exception):\n    __repr__ = __str__ = lambda self: 1 / 0\n"
        "def grade(text, answer): return eval(answer)"
    )
    with Verifier(workers=1, timeout=10.0, grader=str(tmp_path / "own.py"), require_think=False) as v:
        for returned, wanted in RETURNED.items():
            reward, answer = wanted or (0, "")
            verdict = v.score(["\x1b[31m\n\\boxed{b}"], [returned])[0]
            assert verdict[::2] == (reward, answer), returned
            assert verdict.reason == ("error" if wanted is None else "correct" if reward >= 1 else "wrong"), returned
    first, *_, last = lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.isprintable() for line in lines)
    assert "own.py: ValueError: grade() returned None, not a number between -1e+06 and 1e+06, or a pair" in first
    assert "ground truth 'None', answer ending in '\\x1b[31m\\n\\\\boxed{b}'" in first
    assert "returned nan" in last and last.endswith("further errors are not shown")


UNEVALUATED = [  # ground truth, what equals it and is a number, what equals it and is to be computed
    ("120", (r"120", r"120.0", r"\$120", r"120\text{ cm}^2", "x=120", r"120^\circ"),
     (r"\binom{10}{3}", "100+20", "5!", r"\frac{240}{2}", "240/2", r"\sqrt{14400}", r"60\cdot 2")),
    ("1,024", ("1,024", "1024"), ("2^{10}", r"\sum_{k=0}^{9} 2^k+1")),
    (r"\frac{1}{2}", (r"\frac12", "0.5", "1/2", r"\dfrac{2}{4}"), ("2^{-1}", r"1-\frac12", r"\frac{1+1}{4}")),
    (r"-7.75", ("-7.75", r"-\frac{31}{4}"), ("-8+0.25", r"-7-\frac{3}{4}")),
    (r"2\sqrt{2}", (r"\sqrt{8}", r"2\sqrt2"), ()),  # not a plain number: all is as ever
]  # fmt: skip


def test_unevaluated_answers_are_refused_on_request():
    for gold, numbers, computed in UNEVALUATED:
        for grader in (by_oat, by_math_verify):
            for given in numbers + computed:
                reward, _, read = grade(grader, f"\\boxed{{{given}}}", gold, 20.0)
                assert reward == 1.0 and unevaluated(read, gold) == (given in computed), (grader, gold, given)
    assert unevaluated("120=5!", "120") and not unevaluated("x=5!=120", "120")  # the end of a chain counts
    with Verifier(workers=1, refuse_unevaluated=True) as v:
        texts = [f"</think>\\boxed{{{given}}}" for given in (r"\binom{10}{3}", "120.0", "120", "121")]
        assert [x[:2] for x in v.score(texts, ["120"] * 4)] == [(0.0, "wrong"), *[(1.0, "correct")] * 2, (0.0, "wrong")]
        v.refuse_unevaluated = False  # off by default
        assert v.score(texts[:1], ["120"])[0][:2] == (1.0, "correct")
    with pytest.raises(UserError, match="refuse_unevaluated is for math_verify and oat"):
        Verifier(grader=os.path.join("measure", "peers", "parity.py"), refuse_unevaluated=True)


def test_an_answer_that_hedges_is_not_right_for_both():
    """Each way to hedge of measure/hedges.py; it has more pairs of ground truths."""
    for _, a, b, response in hedges.hedges(len(hedges.ways()), seed=1):
        text = graded_text(response) or ""
        for grader in (by_oat, by_math_verify):
            assert not all(grade(grader, text, gold, 20.0)[0] for gold in (a, b)), (grader, a, b, text)


HEDGES = [  # for oat each of these was right for all of the ground truths
    (r"3 \text{ or $8$}", ("3", "8")), (r"3 \text{ units or $8$ units}", ("3", "8")), ("3 8", ("38", "11")),
    (r"3\,8", ("38", "11")), (r"3^\circ 8", ("38", "11")), (r"3 \% 8", ("38", "0.24")),
    (r"1\text{ or }234", ("1234", r"\{1,234\}")),
    ("1/2x", (r"\frac{x}{2}", r"\frac{1}{2x}")),
    (r"\sqrt{3}{8}", (r"8\sqrt3", r"\frac{\sqrt3}{8}")), ("{3}{8}", ("11", r"\frac38")), ("(1,234)", ("1234", "(1,234)")),
]  # fmt: skip


def test_all_comparisons_of_oat_read_the_same():
    for given, golds in HEDGES:
        assert sum(grade(by_oat, f"\\boxed{{{given}}}", gold, 20.0)[0] for gold in golds) <= 1, given
    for given, gold in (("1 000", "1000"), (r"10\,080", "10080"), ("7 3/4", "7.75"), (r"\frac 1 2", "0.5"), ("$5$", "5")):
        assert grade(by_oat, f"\\boxed{{{given}}}", gold, 20.0)[0] == 1.0, given


def test_a_grader_that_cannot_be_used(tmp_path):
    for grader in ("mathverify", str(tmp_path / "missing.py"), str(tmp_path)):
        with pytest.raises(UserError, match="there is no file .*; write math_verify, oat or the path of a file"):
            Verifier(grader=grader)
    for code, why in (("def score(): pass", "KeyError: 'grade'"), ("import nothing", "No module named 'nothing'"),
                      ("def", "SyntaxError"), ("raise SystemExit", "SystemExit")):  # fmt: skip
        (tmp_path / "own.py").write_text(code)
        why = f"does not start: .*{why}.*own.py must run and define grade"
        with pytest.raises(UserError, match=why) as e, Verifier(workers=1, grader=str(tmp_path / "own.py")):
            pytest.fail("it starts")
        assert "\n" not in str(e.value)


def test_without_think_everything_is_graded():
    with Verifier(workers=1, timeout=2.0, require_think=False) as v:
        assert v.score(["the answer is $\\boxed{2}$"], ["2"])[0].reward == 1.0
    assert graded_text("a</think>b", require_think=False) == "a</think>b"


@pytest.mark.parametrize("grader", [by_math_verify, by_oat])
def test_fast_path_is_the_graders_verdict(grader):
    """On the inputs that the fast path accepts, the grader says the same."""
    rng = random.Random(0)
    numbers = ["0", "7", "07", "007", "10", "100", "85", "58", "999999999999999"] + [
        f"{rng.randrange(100):02d}" for _ in range(15)
    ]
    for a in numbers:
        for b in rng.sample(numbers, 6) + [a]:
            for text in (f"\\boxed{{{a}}}", f" \n\\boxed{{{a}}} "):
                fast = fast_verdict(text, b)
                reward, reason, vote = grade(grader, text, b, 10.0)
                wanted = (reward, "correct" if reward else "wrong", vote)
                assert fast == wanted and reason == "graded", (text, b)
    for text, answer in (("\\boxed{1+1}", "2"), ("\\boxed{2}.", "2"), ("\\boxed{2}", "2.0"), ("\\boxed{-2}", "2"), ("2", "2")):
        assert fast_verdict(text, answer) is None
    signal.setitimer(signal.ITIMER_REAL, 0)


BOMBS = ["9^{9^{9^9}}", "10^{10^{10}}", "10^8!", "((9!)!)!", "\\binom{10^9}{5\\cdot 10^8}", "\\sum_{n=1}^{10^7} \\frac{1}{n}",
         "(x+1)^{1000}", "1.0000001^{9^{9^9}}", "\\frac{1}{" * 200 + "2" + "}" * 200, "(" * 5000 + ")" * 5000]  # fmt: skip


def test_bombs_cost_only_themselves(verifier):
    """Inputs that hang math-verify end at the time limit; every other answer keeps its verdict."""
    survives(verifier, BOMBS)


def test_bombs_cost_oat_only_themselves(oat):
    survives(oat, [*BOMBS[:3], "(" * 12 + "9" + "^9)" * 12])  # the last one hangs sympy before math-verify sees it


def survives(verifier, bombs):
    responses, answers = [], []
    for bomb in bombs:
        responses += [f"a</think>$\\boxed{{{bomb}}}$", "a</think>\\boxed{\\frac{1}{2}}", "a</think>\\boxed{\\frac{1}{3}}"]
        answers += ["1234.5", "0.5", "0.5"]
    start = time.time()
    verdicts = verifier.score(responses, answers)
    assert time.time() - start < len(bombs) * (2.0 + 2.0 + 3.0)  # soft limit, hard limit and a new worker, in sequence
    assert all(v.reward == 0 for v in verdicts[0::3])
    assert {v.reason for v in verdicts[0::3]} <= {"timeout", "wrong", "no_answer", "error"}
    assert "timeout" in {v.reason for v in verdicts[0::3]}
    assert all(v[:2] == (1.0, "correct") for v in verdicts[1::3])
    assert all(v[:2] == (0.0, "wrong") for v in verdicts[2::3])


def test_a_worker_that_ignores_its_soft_limit_is_killed(verifier):
    worker = verifier.workers[0]
    verifier.score(["</think>$x^2$"] * 4, ["x"] * 4)
    before = worker.process.pid
    os.kill(before, signal.SIGSTOP)  # it reacts to SIGKILL only, as C code ignores Python's signals
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
    assert 5 <= int(re.search(r"Max cpu time +(\d+)", limits)[1]) < 60  # of this answer; it is raised with each


def limited(limit, value):
    """Grade an answer that needs a worker in a process with a hard limit. Returns what it prints, in one string."""
    code = (
        "import configurator, resource, reward\n"
        "def main():\n"
        f"    resource.setrlimit(resource.{limit}, ({value}, {value}))\n"
        "    with reward.Verifier(1, grader='oat', require_think=False) as v: print(v.score(['so \\\\boxed{12}'], ['12']))\n"
        "configurator.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_limits_of_the_shell():
    """A worker lives under a limit that is low, and one that is too low is named."""
    assert "reward=1.0, reason='correct'" in limited("RLIMIT_CPU", 30)
    assert "reward=1.0, reason='correct'" in limited("RLIMIT_AS", 3 << 30)
    words = f"error: the verifier's worker does not start: .*; this shell allows {50 << 20} bytes of memory \\(ulimit -v\\)\n"
    assert re.fullmatch(words, limited("RLIMIT_AS", 50 << 20))


def test_an_error_of_ours_is_no_verdict(capsys, monkeypatch):
    """One answer on which the grader fails is wrong, and shown. A worker that fails at any answer ends the work."""
    with Verifier(workers=1, grader="oat", require_think=False) as v:
        ask, broken = v.workers[0].ask, {"bad"}

        def failing(request, seconds):
            return [0.0, "error", "", "ValueError: no"] if request[0] in broken else ask(request, seconds)

        v.workers[0].ask = failing
        assert [x.reason for x in v.score(["bad", "so \\boxed{12}"], ["12", "12"])] == ["error", "correct"]
        assert (
            capsys.readouterr().out == "warning: oat: ValueError: no; reward 0 for ground truth '12', answer ending in 'bad'\n"
        )
        broken.add("$x$")
        with pytest.raises(UserError, match="the verifier's workers fail at every answer: ValueError: no"):
            v.score(["bad"], ["12"])


def test_expressions():
    """What sympy is asked about, parsed without Python's eval."""
    for text, value in (("3sqrt(2)/2-sqrt(9/2)", 0), ("-2^2", -4), ("2^-1-0.5", 0), ("1/2x-x/2", 0), ("xy-yx", 0),
                        ("2(x+1)(x-1)-2x^2", -2), ("1.5-3/2", 0), ("--2", 2), ("8/4/2", 1), ("2pi-pi-pi", 0)):  # fmt: skip
        assert simplify(expression(text)) == value, text
    for text in ("2+", "(2", "2)", "*2", "2^^2", "", "__import__(os)", "2;3", "7)-(0", "1.5.2"):
        with pytest.raises((ValueError, IndexError)):
            print(expression(text))


def test_a_worker_dies_with_its_trainer(tmp_path):
    """A trainer that is killed during an answer of a minute leaves no worker behind."""
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
    pytest.fail("the worker is still there")


def test_a_verifier_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Verifier(workers=1) as v, pytest.raises(UserError, match="does not start: ImportError: no antlr here"):
        v.score(["</think>$x$"], ["x"])


def test_parsing_in_two_stages_reads_the_same(monkeypatch):
    """Expressions and errors are those of LL: for each kind of answer in grading_speed.py, for odd ones, for bad LaTeX."""
    from latex2sympy2_extended import latex2sympy2
    from math_verify import parser

    def read(text):
        parser.parse_latex_cached.cache_clear()
        try:
            return repr(parser.parse(text, parsing_timeout=None))
        except Exception as e:
            return type(e).__name__

    golds = [gold for kind in grading_speed.MIX for _, gold in grading_speed.pairs(kind, 40)[::8]]
    golds += [gold for _, gold, *_ in CASES + BOTH]
    golds += ["(1, 2]\\cup[3, \\infty)", "\\{1, 2\\}", "x = 2 or 3", "2 < x \\le 5", "1,234", "\\frac{1", "3 \\frac", "|x|"]
    golds += ["\\begin{pmatrix}1 & 2\\\\3 & 4\\end{pmatrix}", "f(x) = x^2", "50\\%", "a_1 + b!"]
    texts = [f"so it is ${gold}$, or $\\boxed{{{gold}}}$" for gold in golds]
    parser_class = latex2sympy2._Latex2Sympy
    monkeypatch.setattr(parser_class, "create_parser", parser_class.create_parser)  # restored at the end
    before = [read(text) for text in texts]
    parse_in_two_stages()
    assert [read(text) for text in texts] == before
    assert len(set(before)) > 60


def test_answers_are_graded_while_others_are_written():
    with Verifier(workers=1, timeout=1.0) as v:
        handles = [v.submit("</think>$x^2$", "x^2"), v.submit("</think>$x^3$", "x^2"), v.submit("x", "x")]
        deadline = time.time() + 60
        while not all(handle.done() for handle in handles) and time.time() < deadline:
            time.sleep(0.05)  # nobody collects yet
        assert all(handle.done() for handle in handles)
        assert [(x.reward, x.reason) for x in v.collect(handles)] == [(1.0, "correct"), (0.0, "wrong"), (0.0, "no_think")]


def test_a_worker_that_cannot_start_ends_the_sampling(tmp_path, monkeypatch):
    """The next answer that is submitted raises the error; sampling does not have to finish."""
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Verifier(workers=1) as v:
        handle = v.submit("</think>$x$", "x")
        assert isinstance(handle.exception(timeout=60), UserError)
        with pytest.raises(UserError, match="does not start: ImportError: no antlr here"):
            v.submit("</think>$y$", "y")


def test_no_process_is_left_behind():
    with Verifier(workers=2, timeout=1.0) as v:
        v.score(["</think>$x$"] * 4, ["x"] * 4)
        pids = [w.process.pid for w in v.workers if w.process]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
