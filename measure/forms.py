r"""
Other ways to write a ground truth, and answers that are nearly the same: the questions of measure/gold.py.

SAME has functions ground truth -> [forms that mean the same], OTHER has ground truth -> [answers that are wrong], by kind. A
function returns [] for a ground truth that is not of its kind. In the templates @ is the number, or whatever is being written.
"""

import re
from fractions import Fraction

UNIT = r"\s*(?:\^\{?\\circ\}?|\\?%|\\(?:text|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?)?"


def put(templates, s):
    return [template.replace("@", s) for template in templates]


# ---------------------------------------------------------------- reading a ground truth


def core(gold):
    """The ground truth without dollar signs around it and a full stop behind it."""
    s = gold.strip().removesuffix(".")
    return s.strip("$ ") if s.count("$") == 2 and s.startswith("$") and s.endswith("$") else s


def split(gold):
    """(dollar sign, number or what else it is, unit)"""
    return re.fullmatch(rf"(\\\$|)(.+?)({UNIT})", core(gold), re.S).groups()


def value(s):
    """What a plain number is, as a Fraction: an integer, decimal, power of ten as in 6.5e-2, or a fraction. Otherwise None."""
    s = re.sub(r",(\\!\s*)?(?=\d{3}(?!\d))", "", s)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", s):
        return Fraction(s)
    ab = re.fullmatch(r"(-?)(\d+)\.?/(\d+)", s)
    ab = ab or re.fullmatch(r"(-?)\\d?frac *(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}| *(\d))", s)
    if not ab:
        return None
    sign, a, b = (x for x in ab.groups() if x is not None)
    return Fraction(int(sign + a), int(b))


def number(gold):
    return value(split(gold)[1])


def decimal(v):
    """An exact decimal with at most 40 places, or None."""
    for places in range(40):
        if (v * 10**places).denominator == 1:
            digits = str(abs(int(v * 10**places))).rjust(places + 1, "0")
            whole, rest = digits[: len(digits) - places], digits[len(digits) - places :]
            return ("-" if v < 0 else "") + whole + ("." + rest if places else "")
    return None


def fraction(v):
    return rf"\frac{{{v.numerator}}}{{{v.denominator}}}"


def science(v):
    """(mantissa with one digit before the point, exponent of ten); None for zero and for what is no decimal."""
    if not v or decimal(v) is None:
        return None
    k = 0
    while abs(v) >= 10:
        v, k = v / 10, k + 1
    while abs(v) < 1:
        v, k = v * 10, k - 1
    return decimal(v), k


def elements(gold):
    """The elements of a list without brackets or in braces, such as 1,2 or \\{1,2\\}; [] if it is none."""
    s = re.sub(r"\$\s*,\s*\$", ",", core(gold))
    s = s[2:-2] if s.startswith(r"\{") and s.endswith(r"\}") else s
    parts, depth, at = [], 0, 0
    for i, c in enumerate(s + ","):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts, at = [*parts, s[at:i].strip()], i + 1
    good = len(parts) > 1 and all(parts) and "$" not in s and r"\pm" not in s and value(s) is None
    return parts if good else []


def terms(s):
    """The terms of a plain sum, with their signs; [] if it is none."""
    if not re.fullmatch(r"[\w\s\\{}^.+\-]*", s) or re.search(r"\\(?!sqrt|pi)|[_e]|\{[^{}]*[+-]", s):
        return []
    parts = re.findall(r"[+-]?[^+-]+", re.sub(r"\s*([+-])\s*", r"\1", s.strip()))
    return parts if len(parts) > 1 else []


def word(gold):
    """The word or the option's letter that is the ground truth, else None."""
    found = re.fullmatch(r"(?:\\text\{)?\s*(\(?[A-J]\)?|[A-Za-z]{3,})\s*\}?", core(gold))
    return found and found[1]


# ---------------------------------------------------------------- the same answer in other forms

SPACES = [r"\,@", r"@\,", " @ ", r"\ @\ ", "@~", r"\;@\:", r"\quad @", r"@\!", r"\hspace{1mm}@", r"\displaystyle @", "{@}",
          "\n@\n", "\u00a0@\u2009"]  # fmt: skip
SIZES = [r"\left%s@\right%s", r"\left%s @ \right%s", r"\big%s@\big%s", r"\bigl%s @ \bigr%s", r"\Big%s@\Big%s",
         "%s @ %s", "%s@%s"]  # fmt: skip
FONTS = ["@", r"\text{@}", r"\mathrm{@}", r"\textbf{@}", r"\mathbf{@}", r"\textit{@}", r"\mbox{@}", r"\textrm{@}",
         r"\text{ @ }", r"\,\text{@}", r"\text{@}\,", r"\mathrm{~@}"]  # fmt: skip
LETTERS = ["@", "(@)", r"\text{(@)}", r"\textbf{(@)}", r"\,\text{(@)}", r"(\text{@})", r"\mathrm{(@)}",
           r"\left(\text{@}\right)"]  # fmt: skip
UNITS = [r"@ \text{ ft}\,", r"@\text{ cm}", r"@\,\text{cm}", r"@~\text{m}", r"@\ \text{units}", r"@ \text{ cm}^2",
         r"@ \text{ m}^{3}", r"@\;\text{square units}", r"@ \mathrm{~cm}", r"@\,\mathrm{m}", r"@ \text{ km/h}", "@ cm",
         "@ hours", r"@\mbox{ inches}"]  # fmt: skip
DEGREES = [
    "@",
    r"@^\circ",
    r"@^{\circ}",
    r"@^{\circ}\,",
    r"@\,^\circ",
    r"@\text{ degrees}",
    "@ degrees",
    r"@\,\text{degrees}",
    "@\u00b0",
]
PERCENT = ["@", r"@\%", "@%", r"@\,\%", r"@ \%", r"@\text{ percent}", r"@~\%"]
DOLLARS = ["@", r"\$@", r"\$ @", r"\$\,@", r"\$@\,", r"@ \text{ dollars}", r"\text{\$@}"]
POWERS = [r"M \times 10^{K}", r"M \cdot 10^{K}", "M * 10^{K}", r"M\times10^{K}", r"M\times{10}^{K}", r"M\,\times\,10^{K}",
          r"M \times 10^{ K }", "M \u00d7 10^{K}", r"M \times 10^{K} \text{ m}", r"M \times 10^{K} \, \text{m/s}", "MeK", "MEK",
          r"M\times 10^{K}~\text{kg}", r"M \times 10^{K} \mathrm{~cm}", "MeK m", r"M \times 10^{K}\ \mathrm{erg}"]  # fmt: skip
THOUSANDS = [",", "{,}", r"\,", " ", r",\!", r",\! ", r"\;", "~", r"\ ", r"{,}\!", ""]
LISTS = [", ", ",", r",\ ", r",\quad ", r" \text{ or } ", " or "]


def spacing(gold):
    s = core(gold)
    commas = [re.sub(r",\s*", gap, s) for gap in (",", ", ", r",\,", r",\ ", ",~", r",\;")]
    signs = [re.sub(r"(?<=[\w})])\s*([+=]|\\cup|\\pm)\s*", rf"{gap}\1{gap} ", s) for gap in (" ", r"\,", r"\ ", "~")]
    return put(SPACES, s) + ([] if re.search(r"\d,\d{3}", s) else commas) + signs


def delimiters(gold):
    s = core(gold)
    found = re.fullmatch(r"([(\[])\s*([^()\[\]]*?)\s*([)\]])", s.replace(r"\left", "").replace(r"\right", "").strip())
    return [f"${s}$"] + (put([form % found.group(1, 3) for form in SIZES], found[2]) if found else [])


def full_stop(gold):
    s = core(gold)
    return [f"{s}."] if value(s) is not None or (re.search(r"[\d})]$", s) and not word(gold)) else []


def words(gold):
    w = word(gold) or ""
    letter = re.fullmatch(r"\(?([A-J])\)?", w)
    cases = [w.capitalize(), w.lower(), rf"\text{{{w.capitalize()}}}"]
    return (put(FONTS, w) + (put(LETTERS, letter[1]) if letter else cases)) if w else []


def fractions(gold):
    s = split(gold)[1]
    v, forms, plain = value(s), [], s.replace("dfrac", "frac")
    if "\\frac" in plain:
        forms = [plain.replace("\\frac", f"\\{f}") for f in ("dfrac", "tfrac", "cfrac", "frac")]
        forms += [re.sub(r"\\frac\{(\w)\}\{(\w)\}", r"\\frac\1\2", plain), re.sub(r"\\frac\{(\w)\}", r"\\frac \1", plain)]
        forms += [re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\\frac{ \1 }{ \2 }", plain)]
    if v is not None and 1 < v.denominator < 10**6:
        a, b, minus = abs(v.numerator), v.denominator, "-" if v < 0 else ""
        forms += [minus + f for f in (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b}}}")]
        forms += [minus + f for f in (f"{a}/{b}", f"{{{a}}}/{{{b}}}", f"{a} / {b}")] + [fraction(v)]
        if a > b and b < 1000:
            mixed = rf"{minus}{a // b}@\frac{{{a % b}}}{{{b}}}"
            forms += [mixed.replace("@", ""), mixed.replace("@", " "), *([] if minus else [f"{a // b} {a % b}/{b}"])]
    return forms


def decimals(gold):
    v = number(gold)
    text = v is not None and decimal(v)
    if not text or len(text) > 20:
        return []
    more = text if "." in text else text + "."
    forms = [text, more + "0", more + "00", f"{{{text}}}", text.replace("-", "- "), text.replace("-", "\u2212")]
    return forms + [re.sub(r"^(-?)0\.", r"\1.", text)]


def powers_of_ten(gold):
    found = science(number(gold))
    if not found or (-2 < found[1] < 4 and "e" not in split(gold)[1]):
        return []
    m, k = found
    write = lambda form, m, k: form.replace("M", m).replace("K", str(k))
    forms = [write(form, m, k) for form in POWERS] + [f"{m}e{k:+03d}", write(POWERS[0], m, k).replace("-", "\u2212")]
    for form in ("MeK", POWERS[0]):
        forms += [write(form, decimal(Fraction(m) * 10), k - 1), write(form, decimal(Fraction(m) / 10), k + 1)]
    forms += [f"10^{{{k}}}"] if m == "1" else [write(POWERS[0], f"{m}0" if "." in m else f"{m}.0", k)]
    forms += [rf"{m} \times 10^{k}"] if 0 <= k < 10 else []
    return forms + [decimal(number(gold))] + ([rf"\frac{{{m}}}{{10^{{{-k}}}}}"] if k < 0 else [])


def thousands(gold):
    v = number(gold)
    whole = v is not None and v.denominator == 1 and 1000 <= abs(v) < 10**15
    return [f"{int(v):,}".replace(",", gap) for gap in THOUSANDS] if whole else []


def units(gold):
    return put(UNITS, core(gold)) if value(core(gold)) is not None else []


def degrees_percent_money(gold):
    money, s, unit = split(gold)
    if "circ" in unit or "degree" in unit:
        return put(DEGREES, s)
    if "%" in unit:
        return [*put(PERCENT, s), decimal(value(s) / 100)]
    gap = unit.replace("mbox", "text").replace("{", r"{\ ", 1)
    own = [s, *(s + form.replace("@", unit.strip()) for form in (r"\,@", "~@", r"@\,", r"\ @")), s + gap] if unit else []
    return put(DOLLARS, s) if money else own


def names(gold):
    s = core(gold)
    named = re.fullmatch(r"([a-zA-Z])\s*=\s*(-?[\d.]+)", s)
    if named:
        return [named[2], f"{named[1]}={named[2]}", f"{named[1]} = {named[2]}"]
    return put(["x=@", "x = @", r"x\,=\,@", "k = @", r"x =@\,"], s) if value(s) is not None else []


def orders(gold):
    own = elements(gold)
    if not own or not all(re.fullmatch(r"[-\d]+|[^=a-z]*(?:\\(?:frac|sqrt|pi)[^=a-z]*)*", e) for e in own):
        return []
    back = own[::-1]
    forms = [gap.join(order) for gap in LISTS for order in (own[1:] + own[:1], back)]
    forms += [form.replace("@", ",".join(own)) for form in (r"\{@\}", r"\left\{@\right\}", "{@}", r"\{ @ \}")]
    forms += [", ".join(f"${e}$" for e in own), r"\text{ and }".join([r",\, ".join(back[:-1]), back[-1]])]
    return forms + ([r" \text{ and } ".join(own)] if len(own) == 2 else [])


def plus_minus(gold):
    found = re.fullmatch(r"(\d+)\s*\\pm\s*([\d\\a-z{} ]+)", core(gold))
    forms = ["A+B, A-B", "A-B, A+B", r"\{A-B,A+B\}", r"A\pm B", r"A+B \text{ and } A-B", r"A \mp B", r"x = A \pm B"]
    return [form.replace("A", found[1]).replace("B", found[2]) for form in forms] if found else []


def products(gold):
    s = core(gold)
    roots = [(r"\\sqrt\{(\d)\}", r"\\sqrt\1"), (r"\\sqrt ?(\d)", r"\\sqrt{\1}"), (r"\\sqrt\{(\d+)\}", r"\\sqrt{ \1 }")]
    forms = [re.sub(*rule, s) for rule in roots] if "sqrt" in s else []
    if found := re.fullmatch(r"(-?\d+) ?(\\sqrt\{?\d+\}?|\\pi)", s):
        forms += [f"{found[1]}{times}{found[2]}" for times in (r"\cdot ", r"\times ", r"\,", " ", r"\;", "*", r"\ ", "~")]
        forms += [s.replace(r"\sqrt{", "sqrt(").replace("}", ")")] if "}" in s else []
    if found := re.fullmatch(r"(\d+)([a-zA-Z])", s):
        forms += [f"{found[1]}{times}{found[2]}" for times in (r"\cdot ", " ", r"\,")]
    return forms


def sums(gold):
    own = terms(core(gold))
    join = lambda parts: "".join(p if p[0] in "+-" else f"+{p}" for p in parts).removeprefix("+")
    return [join(own[::-1]), join(own[1:] + own[:1]), re.sub(r"(?<!^)([+-])", r" \1 ", join(own))] if own else []


def matrices(gold):
    s = core(gold)
    forms = [s.replace("pmatrix", "bmatrix"), re.sub(r"\s", "", s), s.replace(r"\\", "\\\\\n")]
    forms += [re.sub(r"(\d+)/(\d+)", rf"\\{frac}{{\1}}{{\2}}", s) for frac in ("frac", "dfrac")]
    array = s.replace(r"\begin{pmatrix}", r"\left(\begin{array}{cc}").replace(r"\end{pmatrix}", r"\end{array}\right)")
    return [*forms, array] if "pmatrix" in s else []


def bases(gold):
    found = re.fullmatch(r"(\d+)_\{?(\d)\}?", core(gold))
    return put([f"@_{found[2]}", f"@_{{{found[2]}}}", rf"@_{{\text{{{found[2]}}}}}"], found[1]) if found else []


SAME = {
    "itself": lambda gold: [gold], "spacing": spacing, "delimiters": delimiters, "full stop": full_stop, "words": words,
    "fractions": fractions, "decimals": decimals, "powers of ten": powers_of_ten, "thousands": thousands, "units": units,
    "degree % $": degrees_percent_money, "names": names, "orders": orders, "plus-minus": plus_minus, "products": products,
    "sums": sums, "matrices": matrices, "bases": bases,
}  # fmt: skip


# ---------------------------------------------------------------- other answers, some of them nearly the same

SIGNED = re.compile(r"\$?-?(\d|\.\d|\\d?frac|\\sqrt|\\pi)[^,=]*")  # a single number; unless it is zero, its negative differs


def digit(gold):
    """The first digit plus one; 8 for a 9."""
    return [re.sub(r"\d", lambda m: str(int(m[0]) + 1 if m[0] < "9" else 8), gold, count=1)]


def sign(gold):
    """The other sign, if the answer is a number."""
    if not SIGNED.fullmatch(gold) or re.fullmatch(r"[$\-0.]+", gold):
        return []
    return [re.sub(r"^(\$?)(-?)", lambda m: m[1] + ("" if m[2] else "-"), gold)]


def letter(gold):
    """Another option, if the answer is one."""
    found = re.fullmatch(r"(\\text\{)?(\(?)([A-J])(\)?\}?)", gold)
    return [f"{found[1] or ''}{found[2]}{other}{found[4]}" for other in "ABCDE" if other != found[3]] if found else []


def symbol(gold):
    """The first variable is renamed to the next letter; not in an equation, because x = 5 and y = 5 are the same answer."""
    renamed = re.sub(r"(?<![\\a-zA-Z])[a-y](?![a-zA-Z])", lambda m: chr(ord(m[0]) + 1), gold, count=1)
    return [renamed] if "=" not in gold else []


def last_digit(gold):
    """One more or less in the last place, in the next and in the eighth after it; or one more above or below the line."""
    v = number(gold)
    if v is None or "e" in split(gold)[1]:
        return []
    text = decimal(v)
    if text is None or re.search(r"frac|/", split(gold)[1]):
        a, b = v.numerator, v.denominator
        return [rf"\frac{{{a + 1}}}{{{b}}}", rf"\frac{{{a}}}{{{b + 1}}}"]
    step = Fraction(1, 10 ** len(text.partition(".")[2]))
    return [f for f in (decimal(v + s) for s in (step, -step, step / 10, step / 10**8)) if len(f) < 20]


def exponent(gold):
    """A power of ten with another exponent or mantissa, or with its parts set apart."""
    v = number(gold)
    if v is None or "e" not in split(gold)[1]:
        return []
    m, k = science(v)
    near = f"{m}1" if "." in m else f"{m}.1"
    forms = [f"{m}e{k + 1}", f"{m}e{k - 1}", f"{m}e{-k}", f"{m}e1{abs(k)}", f"-{m}e{k}", f"{near}e{k}", f"{m} e {k}",
             f"{m} e - {abs(k)}", f"{m}^{{{k}}}", f"({m}, {k})", f"{m} + 10^{{{k}}}", rf"{m} \times 10 {k}"]  # fmt: skip
    forms += [rf"{a} \times 10^{{{b}}}" for a, b in ((m, k + 1), (m, -k), (near, k), (f"-{m}", k))]
    return forms + [decimal(w) for w in (v * 10, v / 10, v + v / 10**6)]


def rounded(gold):
    """A few digits of a number that has more: fewer than runtime/oat.py's places() takes."""
    v = number(gold)
    return [f"{float(v):.{n}f}" for n in (2, 3, 5)] if v is not None and decimal(v) is None and abs(v) < 10**6 else []


def factor(gold):
    """Ten times, a tenth, a hundred times, a hundredth, or one over the number; that many millions."""
    _, s, unit = split(gold)
    v = value(s)
    if not v:
        return []
    others = [v * 10, v / 10, 1 / v, *([] if "%" in unit else [v * 100, v / 100])]
    return [decimal(w) or fraction(w) for w in others if w != v] + [rf"{s} \text{{ million}}"]


def brackets(gold):
    """An interval or tuple with another bracket, or with its two numbers changed round."""
    found = re.fullmatch(r"(?:\\left)?([(\[])([^()\[\],]*),([^()\[\],]*?)(?:\\right)?([)\]])", core(gold))
    if not found or "infty" in gold:  # [-\infty is (-\infty
        return []
    left, a, b, right = (part.strip() for part in found.groups())
    other = {"(": "[", "[": "(", ")": "]", "]": ")"}
    forms = [f"{other[left]}{a},{b}{right}", f"{left}{a},{b}{other[right]}"]
    return forms + ([f"{left}{b},{a}{right}", rf"\{{{a},{b}\}}"] if a != b else [])


def one_element(gold):
    """A list with one element left out, changed, or too many."""
    own = elements(gold)
    forms = [own[1:], own[:-1], [*own, "104729"], [*own[:-1], "104729"]] if len(set(own)) == len(own) else []
    return [", ".join(form) for form in forms if own]


def power(gold):
    """An expression or root with another exponent, or with a term too many."""
    s = core(gold)
    forms = [re.sub(r"\^\{?2\}?", "^{3}", s, count=1), s.replace(r"\sqrt{", r"\sqrt[3]{", 1), s.replace(r"\sqrt{", "{", 1)]
    return [f for f in (*forms, s.replace(r"\pi", r"\pi^2", 1)) if f != s] + ([f"{s}+1"] if terms(s) else [])


OTHER = {
    "digit": digit, "sign": sign, "letter": letter, "symbol": symbol, "last digit": last_digit, "exponent": exponent,
    "rounded": rounded, "factor": factor, "brackets": brackets, "one element": one_element, "power": power,
}  # fmt: skip


def questions(golds, every=1):
    """{source: [ground truth, ...]} -> two dicts {kind: [(answer, ground truth), ...]}, of equal forms and of other answers.
    A plain integer gets its equal forms one time in ten. every: take every so manyth ground truth."""
    own = sorted({g for some in golds.values() for g in some})[::every]
    plain = [g for g in own if re.fullmatch(r"\d+(\.0)?", g)]
    special = sorted({*own} - {*plain}) + plain[::10]
    same = {kind: [(f, g) for g in (own if kind == "itself" else special) for f in dict.fromkeys(forms(g))]
            for kind, forms in SAME.items()}  # fmt: skip
    other = {kind: [(f, g) for g in own for f in dict.fromkeys(forms(g)) if f != g] for kind, forms in OTHER.items()}
    following = [(gs[(i + 1) % len(gs)], g) for gs in golds.values() for i, g in enumerate(gs) if len(gs) > 1]
    return same, other | {"another gold": following[::every]}
