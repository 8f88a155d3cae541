r"""
How far the graders can be trusted on a benchmark: each ground truth, boxed, is graded against itself, against the same
answer in other forms, and against answers that are certainly wrong, some of them only just.

    python measure/gold.py FILE.parquet [FILE.parquet ...] [--published=PATH/oat_math_grader.py] [--every=N]

Prints the share of equal forms that each grader takes and of other answers that it refuses, kind by kind, then the golds that
are not accepted as they are, and every wrong answer that is. With the file of OAT's grader, as LUFFY's repository has it, that
one stands beside ours, and each equal form that it takes and `oat` refuses is printed: there should be none. It needs
pylatexenc (pip install --target=FOLDER pylatexenc, and PYTHONPATH=FOLDER). --every=10 takes every tenth ground truth.

Run by hand; the results are in LOG.md. Rows have LUFFY's schema. A pair of source and ground truth is graded once.
"""

import os
import re
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from reward import GRADERS, Verifier

# ---------------------------------------------------------------- reading a ground truth

UNIT = r"\s*(?:\^\{?\\circ\}?|\\?%|\\(?:text|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?)?"
POWER = r"\\times 10^{{{}}}"


def core(gold):
    """The ground truth without dollar signs around it and a full stop behind it."""
    s = gold.strip().removesuffix(".")
    return s.strip("$ ") if s.count("$") == 2 and s.startswith("$") and s.endswith("$") else s


def split(gold):
    """(dollar sign, number or what else it is, unit)"""
    money, s, unit = re.fullmatch(rf"(\\\$|)(.*?)({UNIT})", core(gold), re.S).groups()
    return money, s, unit


def value(s):
    """What a plain number is, as a Fraction: an integer, decimal, power of ten as in 6.5e-2, or a fraction. Otherwise None."""
    s = re.sub(r",(\\!\s*)?(?=\d{3}(?!\d))", "", s)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", s):
        return Fraction(s)
    ab = re.fullmatch(r"(-?)\$?(\d+)\.?/(\d+)\$?", s) or re.fullmatch(r"(-?)\\d?frac *(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}| *(\d))", s)
    if not ab:
        return None
    sign, a, b = (x for x in ab.groups() if x is not None)
    return Fraction(int(sign + a), int(b))


def decimal(v):
    """An exact decimal of at most 40 digits, or None."""
    for places in range(40):
        if (v * 10**places).denominator == 1:
            digits = str(abs(int(v * 10**places))).rjust(places + 1, "0")
            point = "." if places else ""
            return ("-" if v < 0 else "") + digits[: len(digits) - places] + point + digits[len(digits) - places :]
    return None


def science(v):
    """(mantissa, exponent) with one digit before the point, or None."""
    text = decimal(v) if v else None
    if text is None:
        return None
    digits = re.sub(r"\D", "", text).lstrip("0")
    whole = text.lstrip("-").partition(".")[0].lstrip("0")
    after = text.partition(".")[2]
    exponent = len(whole) - 1 if whole else -(len(after) - len(after.lstrip("0")) + 1)
    digits = digits.rstrip("0")
    return ("-" if v < 0 else "") + digits[0] + ("." + digits[1:] if digits[1:] else ""), exponent


def elements(gold):
    """The elements of a list without brackets or in braces, such as 1,2 or \\{1,2\\}; [] if it is none."""
    s = re.sub(r"\$\s*,\s*\$", ",", core(gold))
    s = s[2:-2] if s.startswith(r"\{") and s.endswith(r"\}") else s
    parts, depth, at = [], 0, 0
    for i, c in enumerate(s):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts, at = [*parts, s[at:i].strip()], i + 1
    parts.append(s[at:].strip())
    good = len(parts) > 1 and "$" not in s and value(s) is None and all(parts) and r"\pm" not in s
    return parts if good else []


def terms(s):
    """The terms of a plain sum, with their signs; [] if it is none."""
    if not re.fullmatch(r"[\w\s\\{}^.+\-]*", s) or re.search(r"\\(?!sqrt|pi|frac)[a-z]|\\.?frac\{[^{}]*\{|[_e]|\{[^{}]*[+-]", s):
        return []
    parts = re.findall(r"[+-]?[^+-]+", re.sub(r"\s+", "", s) if "\\" not in s else re.sub(r"\s*([+-])\s*", r"\1", s.strip()))
    return parts if len(parts) > 1 and "".join(parts).count("\\") == s.count("\\") else []


# ---------------------------------------------------------------- the same answer in other forms
# kind: ground truth -> forms that mean the same


def spacing(gold):
    s = core(gold)
    forms = [rf"\,{s}", rf"{s}\,", f" {s} ", rf"\ {s}\ ", f"{s}~", rf"\;{s}\:", rf"\quad {s}", rf"{s}\!", rf"\hspace{{1mm}}{s}",
             rf"\displaystyle {s}", f"{{{s}}}", f"\n{s}\n", f"\u00a0{s}\u2009"]  # fmt: skip
    if not re.search(r"\d,\d{3}", s):
        forms += [re.sub(r",\s*", gap, s) for gap in (",", ", ", r",\,", r",\ ", ",~", r",\;")]
    forms += [re.sub(r"(?<=[\w})])\s*([+=]|\\cup|\\pm)\s*", rf"{gap}\1{gap} ", s) for gap in (" ", r"\,", r"\ ", "~")]
    return forms


def delimiters(gold):
    s = core(gold)
    forms = [f"${s}$", rf"\left{{{s}\right}}" if s.startswith(r"\{") else s]
    bare = s.replace(r"\left", "").replace(r"\right", "")
    if re.fullmatch(r"[(\[][^()\[\]]*[)\]]", bare.replace(" ", "")):
        a, inner, b = bare.strip()[0], bare.strip()[1:-1].strip(), bare.strip()[-1]
        forms += [rf"\left{a}{inner}\right{b}", rf"\left{a} {inner} \right{b}", rf"\big{a}{inner}\big{b}",
                  rf"\bigl{a} {inner} \bigr{b}", rf"\Big{a}{inner}\Big{b}", f"{a} {inner} {b}", f"{a}{inner}{b}"]  # fmt: skip
    return forms


def full_stop(gold):
    s = core(gold)
    return [f"{s}."] if value(s) is not None or re.search(r"[\d})]$", s) and not word(gold) else []


def word(gold):
    """The word or letter of a ground truth in words, else None."""
    found = re.fullmatch(r"(?:\\text\{)?\s*(\(?[A-J]\)?|[A-Za-z]{3,})\s*\}?", core(gold))
    return found and found[1]


def words(gold):
    if not (w := word(gold)):
        return []
    forms = [w, *(rf"\{font}{{{w}}}" for font in ("text", "mathrm", "textbf", "mathbf", "textit", "mbox", "textrm", "rm"))]
    forms = [f for f in forms if not f.startswith(r"\rm")] + [rf"\text{{ {w} }}", rf"\,\text{{{w}}}", rf"\text{{{w}}}\,", rf"\mathrm{{~{w}}}"]
    letter = w.strip("()")
    if len(letter) == 1:
        return forms + [letter, f"({letter})", rf"\text{{({letter})}}", rf"\textbf{{({letter})}}", rf"\,\text{{({letter})}}",
                        rf"(\text{{{letter}}})", rf"\mathrm{{({letter})}}", rf"\left(\text{{{letter}}}\right)"]  # fmt: skip
    return forms + [w.capitalize(), w.lower(), rf"\text{{{w.capitalize()}}}"]


def fractions(gold):
    _, s, _ = split(gold)
    v, forms = value(s), []
    if "\\frac" in s or "\\dfrac" in s:
        plain = s.replace("dfrac", "frac")
        forms += [plain.replace("\\frac", f"\\{f}") for f in ("dfrac", "tfrac", "cfrac", "frac")]
        forms += [re.sub(r"\\frac\{(\w)\}\{(\w)\}", r"\\frac\1\2", plain), re.sub(r"\\frac\{(\w)\}", r"\\frac \1", plain)]
        forms += [re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\\frac{ \1 }{ \2 }", plain)]
    if v is not None and v.denominator > 1:
        a, b, minus = abs(v.numerator), v.denominator, "-" if v < 0 else ""
        if b < 10**6:
            forms += [rf"{minus}\frac{{{a}}}{{{b}}}", rf"\frac{{{minus}{a}}}{{{b}}}", f"{minus}{a}/{b}", f"{minus}{{{a}}}/{{{b}}}",
                      f"{minus}{a} / {b}", rf"{minus}\frac{{{2 * a}}}{{{2 * b}}}", rf"{minus}\dfrac{{{a}}}{{{b}}}"]  # fmt: skip
        if a > b and b < 1000:
            whole, rest = divmod(a, b)
            forms += [rf"{minus}{whole}\frac{{{rest}}}{{{b}}}", rf"{minus}{whole} \frac{{{rest}}}{{{b}}}"]
            forms += [f"{minus}{whole} {rest}/{b}"] if not minus else []
    return forms


def decimals(gold):
    _, s, _ = split(gold)
    v = value(s)
    text = v is not None and decimal(v)
    if not text or len(text) > 20:
        return []
    forms = [text, text + "0" if "." in text else text + ".0", text + "00" if "." in text else text + ".00", f"{{{text}}}"]
    if "." in text:
        forms += [re.sub(r"^(-?)0\.", r"\1.", text), text.replace("-", "\u2212")]
    return forms + [text.replace("-", "- ")]


def powers_of_ten(gold):
    _, s, _ = split(gold)
    v = value(s)
    found = v is not None and science(v)
    if not found or (-2 < found[1] < 4 and "e" not in s):
        return []
    m, k = found
    forms = [f"{m}{e}{x}" for e in "eE" for x in (k, f"{k:+03d}")] + [f"{m}{times} 10^{{{k}}}" for times in (r" \times", r" \cdot", " *")]
    forms += [rf"{m}\times10^{{{k}}}", rf"{m}\times{{10}}^{{{k}}}", rf"{m}\,\times\,10^{{{k}}}", rf"{m} \times 10^{{{k}}}".replace("-", "\u2212"),
              f"{m} \u00d7 10^{{{k}}}", rf"{m} \times 10^{k}" if 0 <= k < 10 else rf"{m} \times 10^{{ {k} }}"]  # fmt: skip
    forms += [rf"{m} \times 10^{{{k}}} \text{{ m}}", rf"{m} \times 10^{{{k}}} \, \text{{m/s}}", rf"{m}\times 10^{{{k}}}~\text{{kg}}",
              rf"{m} \times 10^{{{k}}} \mathrm{{~cm}}", f"{m}e{k} m", rf"{m} \times 10^{{{k}}}\ \mathrm{{erg}}"]  # fmt: skip
    forms += [f"{decimal(Fraction(m) * 10)}e{k - 1}", rf"{decimal(Fraction(m) * 10)} \times 10^{{{k - 1}}}", rf"{decimal(Fraction(m) / 10)} \times 10^{{{k + 1}}}"]
    forms += [f"10^{{{k}}}", rf"1 \times 10^{{{k}}}"] if m == "1" else [rf"{m}0 \times 10^{{{k}}}" if "." in m else rf"{m}.0 \times 10^{{{k}}}"]
    return forms + [decimal(v)] + ([rf"\frac{{{m}}}{{10^{{{-k}}}}}"] if k < 0 else [])


def thousands(gold):
    _, s, _ = split(gold)
    v = value(s)
    if v is None or v.denominator > 1 or not 1000 <= abs(v) < 10**15:
        return []
    commas = f"{int(v):,}"
    return [str(v), *(commas.replace(",", gap) for gap in (",", "{,}", r"\,", " ", r",\!", r",\! ", r"\;", "~", r"\ ", "{,}\\!"))]


def units(gold):
    _, s, unit = split(gold)
    if value(s) is None or unit or core(gold).startswith(r"\$"):
        return []
    return [rf"{s} \text{{ ft}}\,", rf"{s}\text{{ cm}}", rf"{s}\,\text{{cm}}", rf"{s}~\text{{m}}", rf"{s}\ \text{{units}}", rf"{s} \text{{ cm}}^2", rf"{s} \text{{ m}}^{{3}}",
            rf"{s}\;\text{{square units}}", rf"{s} \mathrm{{~cm}}", rf"{s}\,\mathrm{{m}}", rf"{s} \text{{ km/h}}", f"{s} cm", f"{s} hours", rf"{s}\mbox{{ inches}}"]  # fmt: skip


def degrees_percent_money(gold):
    money, s, unit = split(gold)
    if "circ" in unit or "degree" in unit:
        return [s, rf"{s}^\circ", rf"{s}^{{\circ}}", rf"{s}^{{\circ}}\,", rf"{s}\,^\circ", rf"{s}\text{{ degrees}}", f"{s} degrees", rf"{s}\,\text{{degrees}}", f"{s}\u00b0"]
    if "%" in unit:
        return [s, rf"{s}\%", f"{s}%", rf"{s}\,\%", rf"{s} \%", rf"{s}\text{{ percent}}", rf"{s}~\%", decimal(value(s) / 100)]
    if money:
        return [s, rf"\${s}", rf"\$ {s}", rf"\$\,{s}", rf"\${s}\,", rf"{s} \text{{ dollars}}", rf"\text{{\${s}}}"]
    if unit:
        return [s, rf"{s}\,{unit.strip()}", rf"{s}~{unit.strip()}", rf"{s}{unit}\,", rf"{s}\ {unit.strip()}", s + unit.replace("mbox", "text").replace("{", r"{\ ", 1)]
    return []


def names(gold):
    s = core(gold)
    if value(s) is not None:
        return [f"x={s}", f"x = {s}", rf"x\,=\,{s}", f"k = {s}", rf"x ={s}\,"]
    named = re.fullmatch(r"([a-zA-Z])\s*=\s*(-?[\d.]+)", s)
    return [named[2], f"{named[1]}={named[2]}", f"{named[1]} = {named[2]}"] if named else []


def orders(gold):
    own = elements(gold)
    if not own or not all(re.fullmatch(r"[-\d]+|[^=a-z]*(?:\\(?:frac|sqrt|pi)[^=a-z]*)*", e) for e in own):
        return []
    turned, back = own[1:] + own[:1], own[::-1]
    forms = [", ".join(turned), ",".join(back), r"\{" + ", ".join(back) + r"\}", r"\left\{" + ",".join(own) + r"\right\}", "{" + ",".join(own) + "}",
             r" \text{ and } ".join(own) if len(own) == 2 else ", ".join(back), r" \text{ or } ".join(back), " or ".join(own), r",\ ".join(own), r",\quad ".join(own),
             ", ".join(f"${e}$" for e in own), "; ".join(own) if False else ", ".join(own), r"\text{ and }".join([r",\, ".join(back[:-1]), back[-1]])]
    return forms


def plus_minus(gold):
    found = re.fullmatch(r"(\d+)\s*\\pm\s*([\d\\a-z{} ]+)", core(gold))
    if not found:
        return []
    a, b = found.groups()
    return [f"{a}+{b}, {a}-{b}", f"{a}-{b}, {a}+{b}", rf"\{{{a}-{b},{a}+{b}\}}", rf"{a}\pm{b}", rf"{a}+{b} \text{{ and }} {a}-{b}", rf"{a} \mp {b}", rf"x = {a} \pm {b}"]


def roots_and_products(gold):
    s = core(gold)
    forms = [re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", s), re.sub(r"\\sqrt ?(\d)", r"\\sqrt{\1}", s), re.sub(r"\\sqrt\{(\d+)\}", r"\\sqrt{ \1 }", s)] if "sqrt" in s else []
    if re.fullmatch(r"-?\d+ ?\\(?:sqrt\{?\d+\}?|pi)", s):
        a, b = re.fullmatch(r"(-?\d+) ?(.*)", s).groups()
        forms += [f"{a}{times}{b}" for times in (r"\cdot ", r"\times ", r"\,", " ", r"\;", "*", r"\ ", "~")]
        forms += [s.replace(r"\sqrt{", "sqrt(").replace("}", ")")] if "}" in s else []
        forms += [rf"{b}\cdot {a}", rf"{b} {a}"] if "sqrt" in b and a[0] != "-" and False else []
    if re.fullmatch(r"\d+[a-zA-Z]", s):
        forms += [rf"{s[:-1]}\cdot {s[-1]}", rf"{s[:-1]} {s[-1]}", rf"{s[:-1]}\,{s[-1]}"]
    return forms


def sums(gold):
    own = terms(core(gold))
    if not own:
        return []
    join = lambda parts: re.sub(r"^\+", "", "".join(p if p[0] in "+-" else f"+{p}" for p in parts))
    return [join(own[::-1]), join(own[1:] + own[:1]), re.sub(r"(?<!^)([+-])", r" \1 ", join(own))]


def matrices(gold):
    s = core(gold)
    if "pmatrix" not in s:
        return []
    return [s.replace("pmatrix", "bmatrix"), re.sub(r"\s", "", s), s.replace(r"\\", "\\\\\n"), re.sub(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", s),
            re.sub(r"(\d+)/(\d+)", r"\\dfrac{\1}{\2}", s), s.replace(r"\begin{pmatrix}", r"\left(\begin{array}{cc}").replace(r"\end{pmatrix}", r"\end{array}\right)")]


def bases(gold):
    found = re.fullmatch(r"(\d+)_\{?(\d)\}?", core(gold))
    return [f"{found[1]}_{found[2]}", f"{found[1]}_{{{found[2]}}}", rf"{found[1]}_{{\text{{{found[2]}}}}}"] if found else []


SAME = {"itself": lambda gold: [gold], "spacing": spacing, "delimiters": delimiters, "full stop": full_stop, "words": words, "fractions": fractions,
        "decimals": decimals, "powers of ten": powers_of_ten, "thousands": thousands, "units": units, "degree % $": degrees_percent_money,
        "names": names, "orders": orders, "plus-minus": plus_minus, "products": roots_and_products, "sums": sums, "matrices": matrices, "bases": bases}  # fmt: skip


# ---------------------------------------------------------------- other answers, some of them nearly the same

NUMBER = re.compile(r"\$?-?(\d|\.\d|\\d?frac|\\sqrt|\\pi)[^,=]*")  # a single number; unless it is zero, its negative differs


def digit(gold):
    """The first digit plus one; 8 for a 9."""
    return [re.sub(r"\d", lambda m: str(int(m[0]) + 1 if m[0] < "9" else 8), gold, count=1)]


def sign(gold):
    """The other sign, if the answer is a number."""
    if not NUMBER.fullmatch(gold) or re.fullmatch(r"[$\-0.]+", gold):
        return []
    return [re.sub(r"^(\$?)(-?)", lambda m: m[1] + ("" if m[2] else "-"), gold)]


def letter(gold):
    """Another option, if the answer is one."""
    found = re.fullmatch(r"(\\text\{)?(\(?)([A-J])(\)?\}?)", gold)
    return [f"{found[1] or ''}{found[2]}{other}{found[4]}" for other in "ABCDE" if other != found[3]] if found else []


def symbol(gold):
    """The first variable is renamed to the next letter."""
    if "=" in gold:
        return []  # x = 5 and y = 5 are the same answer
    return [re.sub(r"(?<![\\a-zA-Z])[a-y](?![a-zA-Z])", lambda m: chr(ord(m[0]) + 1), gold, count=1)]


def last_digit(gold):
    """The last digit of a decimal or an integer is one more or less, or the answer has one more or less; a fraction's ends are
    one more."""
    _, s, _ = split(gold)
    v = value(s)
    if v is None:
        return []
    text = decimal(v)
    if text is None or "frac" in s or "/" in s:
        a, b = v.numerator, v.denominator
        return [rf"\frac{{{a + 1}}}{{{b}}}", rf"\frac{{{a}}}{{{b + 1}}}"]
    step = Fraction(1, 10 ** len(text.partition(".")[2]))
    forms = [decimal(v + step), decimal(v - step), decimal(v + step / 10), decimal(v + step / 10**8)]
    return [f for f in forms if f and len(f) < 20] if "e" not in s else []


def exponent(gold):
    """A power of ten with another exponent or mantissa, or with its parts set apart."""
    _, s, _ = split(gold)
    v = value(s)
    if v is None or "e" not in s:
        return []
    m, k = science(v)
    near = f"{m}1" if "." in m else f"{m}.1"
    forms = [f"{m}e{k + 1}", f"{m}e{k - 1}", f"{m}e{-k}", f"{m}e1{abs(k)}", f"-{m}e{k}", f"{near}e{k}", rf"{m} \times 10^{{{k + 1}}}",
             rf"{m} \times 10^{{{-k}}}", rf"{near} \times 10^{{{k}}}", f"{m} e {k}", rf"{m} e - {abs(k)}", rf"{m} + 10^{{{k}}}",
             rf"{m}^{{{k}}}", rf"({m}, {k})", rf"{m} \times 10 {k}", decimal(v * 10), decimal(v / 10), decimal(v + v / 10**6)]  # fmt: skip
    return [f for f in forms if value(f) != v]


def rounded(gold):
    """A few digits of a number that has more."""
    _, s, _ = split(gold)
    v = value(s)
    return [f"{float(v):.{n}f}" for n in (2, 3, 6)] if v is not None and decimal(v) is None and abs(v) < 10**6 else []


def factor(gold):
    """Ten times, a tenth, a hundred times, a hundredth, or one over the number; that many millions."""
    _, s, unit = split(gold)
    v = value(s)
    if not v:
        return []
    other = [v * 10, v / 10, *([] if "%" in unit else [v * 100, v / 100]), 1 / v]
    return [decimal(w) or rf"\frac{{{w.numerator}}}{{{w.denominator}}}" for w in other if w != v and w.denominator < 10**15] + [rf"{s} \text{{ million}}"]


def brackets(gold):
    """An interval or tuple with another bracket, or with its two numbers changed round."""
    found = re.fullmatch(r"(?:\\left)?([(\[])([^()\[\],]*),([^()\[\],]*?)(\\right)?([)\]])", core(gold))
    if not found:
        return []
    a, b, left, right = found[2].strip(), found[3].strip(), found[1], found[5]
    other = {"(": "[", "[": "(", ")": "]", "]": ")"}
    return [f"{other[left]}{a},{b}{right}", f"{left}{a},{b}{other[right]}", *([f"{left}{b},{a}{right}", rf"\{{{a},{b}\}}"] if a != b else [])]


def one_element(gold):
    """A list with one element left out, changed, or too many."""
    own = elements(gold)
    return [",".join(own[1:]), ", ".join(own[:-1]), ", ".join([*own, "104729"]), ", ".join([*own[:-1], "104729"])] if own else []


def power(gold):
    """An expression or root with another exponent, or with a term too many."""
    s = core(gold)
    forms = [re.sub(r"\^\{?2\}?", "^{3}", s, count=1), s.replace(r"\sqrt{", r"\sqrt[3]{", 1), s.replace(r"\sqrt{", "{", 1), s.replace(r"\pi", r"\pi^2", 1)]
    return [f for f in forms if f != s] + ([f"{s}+1"] if terms(s) else [])


OTHER = {"digit": digit, "sign": sign, "letter": letter, "symbol": symbol, "last digit": last_digit, "exponent": exponent, "rounded": rounded,
         "factor": factor, "brackets": brackets, "one element": one_element, "power": power}  # fmt: skip


# ---------------------------------------------------------------- the graders

PUBLISHED = """import importlib.util
spec = importlib.util.spec_from_file_location("published", {path!r})
published = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published)

def grade(text, answer):
    return published.boxed_reward_fn(text, answer, fast=False)[1]
"""


def accepted(verifier, pairs, what):
    """list[(answer, gold)] -> list[bool]. Prints a line every half minute."""
    start = printed = time.time()
    verdicts = []
    for at in range(0, len(pairs), 64):
        part = pairs[at : at + 64]
        verdicts += verifier.score([f"</think>\\boxed{{{answer}}}" for answer, _ in part], [gold for _, gold in part])
        if time.time() - printed > 30:
            printed = time.time()
            print(f"  {what}: {len(verdicts)} of {len(pairs)}, {printed - start:.0f} s", flush=True)
    return [v.reason == "correct" for v in verdicts]


def read_golds(paths):
    """{source: [ground truth, ...]} and how many rows have each pair."""
    import pyarrow.parquet as pq

    rows, golds = Counter(), {}
    for path in paths:
        table = pq.read_table(path, columns=["data_source", "reward_model"]).to_pylist()
        rows.update((row["data_source"], row["reward_model"]["ground_truth"]) for row in table)
    for source, gold in sorted(rows):
        golds.setdefault(source, []).append(gold)
    return golds, rows


def questions(golds, every=1):
    """{kind: [(answer, gold), ...]} of equal forms and of other answers. A plain integer gets its equal forms one time in ten."""
    own = sorted({g for golds in golds.values() for g in golds})[::every]
    plain = [g for g in own if re.fullmatch(r"\d+(\.0)?", g)]
    special = [g for g in own if g not in set(plain)] + plain[::10]
    same = {kind: [(f, g) for g in (own if kind == "itself" else special) for f in dict.fromkeys(forms(g))] for kind, forms in SAME.items()}
    other = {kind: [(f, g) for g in own for f in dict.fromkeys(forms(g)) if f != g] for kind, forms in OTHER.items()}
    other["another gold"] = [(gs[(i + 1) % len(gs)], g) for gs in golds.values() for i, g in enumerate(gs) if len(gs) > 1][::every]
    return same, other


def main(argv):
    options = dict(a[2:].split("=", 1) for a in argv if a.startswith("--") and "=" in a)
    paths = [a for a in argv if not a.startswith("--")]
    if not paths or options.keys() - {"published", "every"} or len(options) + len(paths) < len(argv):
        sys.exit(__doc__)
    start = time.time()
    golds, rows = read_golds(paths)
    same, other = questions(golds, int(options.get("every", 1)))
    graders = {name: name for name in GRADERS}
    with tempfile.TemporaryDirectory() as folder:
        if "published" in options:
            graders = {"published": os.path.join(folder, "published.py"), **graders}
            with open(graders["published"], "w") as f:
                f.write(PUBLISHED.format(path=os.path.abspath(options["published"])))
        taken = {}  # (grader, answer, gold): is it called right?
        for name, grader in graders.items():
            pairs = list(dict.fromkeys(p for kinds in (same, other) for pairs in kinds.values() for p in pairs))
            with Verifier(grader=grader, timeout=5.0) as verifier:
                right = accepted(verifier, pairs, name)
            taken |= {(name, *p): ok for p, ok in zip(pairs, right, strict=True)}
    for title, kinds, wanted in (("equal forms, taken", same, True), ("other answers, refused", other, False)):
        print(f"\n{title:<24}{'n':>8}" + "".join(f"{name:>13}" for name in graders))
        for kind, pairs in (kinds | {"all": [p for pairs in kinds.values() for p in pairs]}).items():
            shares = [sum(taken[name, *p] == wanted for p in pairs) / max(1, len(pairs)) for name in graders]
            print(f"{kind:<24}{len(pairs):>8}" + "".join(f"{s:>13.2%}" for s in shares))
    for name in graders:
        print(f"\n{name}")
        for source, own in golds.items():
            lost = [g for g in own if not taken.get((name, g, g), True)]
            n, good = sum(rows[source, g] for g in own), sum(rows[source, g] for g in own if g not in lost)
            print(f"  {source:16} {n:5} rows  {len(own):4} golds  accepted {good:5} ({good / n:.2%})")
            for gold in lost:
                print(f"    rejected: {gold!r}")
        for kind, pairs in other.items():
            for answer, gold in pairs:
                if taken[name, answer, gold]:
                    print(f"    {kind}: accepted {answer!r} for {gold!r}")
    if "published" in graders:
        missed = [(kind, p) for kind, pairs in same.items() for p in pairs if taken["published", *p] and not taken["oat", *p]]
        print(f"\nequal forms that the published grader takes and oat refuses: {len(missed)}")
        for kind, (answer, gold) in missed:
            print(f"    {kind}: {answer!r} for {gold!r}")
    print(f"\n{time.time() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
