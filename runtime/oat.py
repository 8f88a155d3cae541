r"""
The rules of the `oat` grader: those of OAT's math_grader, which LUFFY's evaluation uses.

The last box is right if one of four comparisons says so: both are plain numbers, and equal as
fractions, exactly (rational); the strings are equal after the normalisation of Hendrycks et al. for
MATH (MATHD below); PRM800K's comparison (prm800k_equal); math-verify on what the box holds. All four
read one string, PLAIN: without LaTeX's spacing, and with powers of ten written out, so that 6.5e-2,
0.065 and 6.5\times10^{-2} are one number.

Accepted there, rejected here:
    1.39e-10 for 3.61e-10              there every number within 1e-7 of an integer is that integer, and
    5.00000001 for 5                   math-verify rounds to six places; here numbers are exact, but see places()
    5\text{ million} for 5             there the words are deleted as a unit
    1.2 e - 3 for 1.2e-3               there spaces are deleted first; here this is no number
    (c) for (a), c^2+b for a^2+b       there units of MathQA, a and c among them, are deleted
    1\text{ or }3 for 1\text{ or }2    there the rest is cut off
    -1 for -1./3                       there one number is enough of an unreadable ground truth
    1+\frac{x}{2} for \frac{1+x}{2}    there pylatexenc, not used here, makes them equal;
    \sqrt[3]{2} for \sqrt{2}           so it does with these
    73/4 for 7 3/4, -I(0) for I(0)
    3 for 3 \text{ or $8$}, and so 8   there each comparison looks for the answer in its own way: one finds
                                       the 3, one the 8
    8 for 3 \lor 8, 38 for 3 8         there the end of what cannot be parsed is enough, and what is deleted
                                       between two numbers joins them
Rejected there, accepted here:
    \boxed 5 and \fbox{5}              as in MATH's own code
    6.5\times10^{-2} \text{ m} for 6.5e-2  spacing, units and full stops are taken away from every form
    1\,234 for 1234, \frac34. for 3/4
There math-verify has a second of its own, and never sees a long repetition; here one time limit
holds for all.

math-verify and sympy are imported when they are needed, so that a verifier's worker starts quickly.
"""

import re
from fractions import Fraction


def by_oat(text, answer):
    """(text, ground truth) -> (right or not, what the last box holds); (0.0, None) without a box."""
    from math_verify import parse, verify

    read = last_boxed(text)
    if read is None:
        return 0.0, None
    given, gold = (rewrite(s, PLAIN) for s in (read, last_boxed(answer) or answer))
    ours, theirs = (rational(rewrite(s, MATHD)) for s in (given, gold))
    if ours == theirs:
        return True, read
    if any(SIDE_BY_SIDE.fullmatch(s) for s in (given, gold)):
        return False, read
    n = places(given)
    if isinstance(ours, Fraction) and isinstance(theirs, Fraction) and "%" not in given + gold:  # 50% is both 50 and 0.5
        return n < EXACT and not terminates(theirs) and ours == round(theirs, n), read
    if prm800k_equal(given, gold):
        return True, read
    how = dict(fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
    gold, found = (parse(f"${s}$", **how) for s in (gold, given))
    return verify(gold, found, float_rounding=n, timeout_seconds=None), read


def places(given):
    """The decimal places to which numbers are compared. Six places and six digits are enough for what has no end, 0.333333
    for 1/3 and 1.414214 for \\sqrt{2}, as for the published grader, which takes them because it rounds everything."""
    whole, _, rest = given.strip("+- ").partition(".")
    digits = whole + rest
    enough = digits.isdecimal() and min(len(rest), len(digits.lstrip("0"))) >= 6
    return len(rest) if enough else EXACT


def terminates(value):
    """Whether a fraction's decimal has an end."""
    return pow(10, value.denominator.bit_length(), value.denominator) == 0


def last_boxed(text):
    """What the last \\boxed{...} holds; also of "\\boxed 5", and of \\fbox if there is no \\boxed.
    None if there is neither, or if its brace is not closed."""
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


# ---------------------------------------------------------------- strings
# (pattern, replacement), applied in order

EXACT = 99  # places(): numbers that differ are not equal
LARGEST = 400  # the largest power of ten that is written out
DECIMAL = r"\d+(?:\.\d*)?|\.\d+"
ALONE = r"(?<![\w.^_/})])(?<![\w.^_/}] )(?<!\^\{)"  # before a number that is not the end of another, of a power or a quotient
UNICODE = {
    "\u2212": "-",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u00b0": r"^\circ ",
    "\u2205": r"\varnothing ",
}
MILLIONS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def written_out(m):
    """A match of a mantissa, or none, and an exponent of ten -> the same number as a plain decimal."""
    mantissa, *exponents = m.groups()
    exponent = "".join(filter(None, exponents)).replace(" ", "")
    if len(exponent) > 9 or abs(k := int(exponent)) > LARGEST:
        return m[0]
    whole, _, places = (mantissa or "1").partition(".")
    point = len(whole) + k
    digits = ("0" * -point + whole + places).ljust(point, "0")
    whole, places = digits[: max(point, 0)].lstrip("0"), digits[max(point, 0) :].rstrip("0")
    return (whole or "0") + (places and f".{places}")


MIXED = (r"(\d) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}")  # 7 3/4 is not 73/4
PLAIN = [  # what all comparisons and all votes read: none may see two numbers where another sees one
    # spacing, sizes and signs
    (f"[{''.join(UNICODE)}]", lambda m: UNICODE[m[0]]),
    # what only changes the looks
    (r"\\(?:operatorname\*?|rm)(?= *\{)", r"\\mathrm"),
    (r"\\(?:bm|boldsymbol|mathbf|underline|emph|ensuremath)(?![a-zA-Z]) *|\\(?:text)?color *\{[^{}]*\}|\\tag\*? *\{[^{}]*\}",
     ""),
    (r"\\(?:bf|rm|tt|it|sf|tiny|small|large|Large|LARGE|huge|Huge|nonumber|notag|hfill|therefore)(?![a-zA-Z])|\{ *\}"
     r"|\\(?:begin|end)\{(?:aligned|gathered|align\*?|equation\*?)\}", " "),
    (r"\\(?:nice|s)frac(?![a-z])", r"\\frac"),
    (r"\\([lr])brace(?![a-zA-Z])", lambda m: r"\{" if m[1] == "l" else r"\}"), (r"\\bar *(?=\{\d+\})", r"\\overline"),
    (r"\\(?:text)?degrees?(?![a-z])", r"^\\circ"), (r"\\\\ *\[\d[^\[\]]*\]", r"\\\\"),
    (r"^ *\\\[(.*)\\\] *$|^ *\\\((.*)\\\) *$", lambda m: m[1] or m[2] or ""),
    (r"(?i)^ *\\text *\{[^{}]*\banswer\b[^{}\d]*\}", ""),
    (r"\\(?:text|math)[a-z]* *\{[ $]*((?:[ei]|\\[a-z]+)(?:\{[^{}]*\})*)[ $]*\}", r" \1 "),  # no unit
    (r"\\(?:text|mbox)\{( *, *)\}", r"\1"),
    (r",(?:\\[,;: ]|[\s~]){0,3}\\!\s*|\{ *, *\}\\!", ","),  # 10,\!080
    (r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ""), (r"(?<![a-zA-Z])\{ *, *\}", ","),  # 1{,}234
    (r"\\!|[\u200b-\u200f\u2060\ufeff]", ""),
    (r"\\(?:display|text|script)style(?![a-z])|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", " "),
    (r"\\[hv]space\*?\{[^{}]*\}|\\(?:(?:thin|med|thick|en)space|q?quad)(?![a-z])|(?<!\\)(?:\\[,;:> ]|\$)|~|\s", " "),
    (r" +", " "), (r"(?:(?<=[(\[])|(?<=\\\{)) | (?=[)\]]|\\\})", ""),
    # Text with a digit or one of these words is part of the answer, not a unit.
    (r"\\(?:text|mbox|math)[a-z]*\s*\{(?=[^{}]*(?:\d|[,;=]|\b(?:or|and|if|not|thousand|(?:m|b|tr)illion)\b))([^{}]*)\}",
     r" \1 "),
    (r"\\emptyset(?![a-z])", r"\\varnothing"), (r"\\([lg]e)qslant(?![a-z])", r"\\\1"),
    (r"^ *\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\} *$", r"\1"),
    (r"^ *= *", ""),
    # a full stop, but C. is not C
    (r"^(?!\W*(?:(?:text|math|mbox)[a-z]*\W*)?[A-Ja-j]\W*$)(.*[^. ]) *(?:[.,;]|\\\\) *$", r"\1"),
    # numbers
    MIXED,
    (r"(?<![\d(\[{,.])\d{1,3}(?:,\d{3})+(?![\d)\]},])", lambda m: m[0].replace(",", "")),  # not in (1,234)
    # Not in 2^4 125, \log_2 125 or 4 125^2, which are products and functions.
    (r"(?<![\w.^}])(?<![\w.^}\\] )\d{1,3}(?: \d{3})+(?!\d| ?[\^_])", lambda m: m[0].replace(" ", "")),
    (rf"(?<=\d) *({'|'.join(MILLIONS)})(?![a-z])", lambda m: rf"\times 10^{{{MILLIONS[m[1]]}}}"),
    (rf"{ALONE}({DECIMAL})[eE]([+-]?\d+)(?!\w|\.\d)", written_out),  # 6.5e-2
    (r"(\\times|\\cdot|\*) *\{ *(10 *\^ *(?:\d|\{[^{}]*\})) *\}", r"\1 \2"),
    (rf"{ALONE}(?:({DECIMAL}) *(?:\\times|\\cdot|\*) *)?(?:10|\{{10\}}) *\^ *"  # 6.5\times10^{-2}
     r"(?:\{ *([+-]? *\d+) *\}|([+-]\d+)(?!\w|\.\d)|(\d)(?!\w|\.\d))", written_out),
]  # fmt: skip
MATHD = [
    (r"\\\\", r"\\"),
    (r"\^ *(?:\\circ|\{ *\\circ *\})|\\?[$%]", " "),
    (r"^\s*\\(?:text|math|mbox)[a-z]*\s*\{((?:[^{}]|\{[^{}]*\})+)\}\s*$", r"\1"),
    (r"(?<=\S)\s*(?:\\(?:text|mbox)\s*\{|\\mathrm\s*\{(?=\s|[^{}\\]{2})|\s\\mathrm\s*\{(?=[mgsJNKWVL]\}))"  # a unit
     r"[^{}\\]*\}(?:\^\{?[23]\}?)?\s*$", ""),
    (r"\\(?:[tdc](frac)|(ne|le|ge)q(?![a-z]))", r"\\\1\2"),
    (r"\{array\}(?:\{[^{}]*\})?|\{(?:b|small)matrix\}", "{pmatrix}"),
    (r"(^|[ {])\.(?=\d)", r"\g<1>0."), (r"(?<=\d)\.(?!\d)", ""),
    (r"^\s*[a-zA-Z]\s*=([^=]*)$", r"\1"), MIXED,
    (r"\\(sqrt|frac)\s*(\\pi|[^{\[\\\s])", r"\\\1{\2}"),  # \sqrt3, \frac1{72} and, with the next one, \frac12
    (r"(\\frac\s*\{[^{}]*\})\s*(\\pi|[^{\\\s])", r"\1{\2}"),
    (r"(?<!\d)\s+|\s+(?![\d\s])", ""),  # what was deleted between two numbers does not join them
    (r"^0\.5$", r"\\frac{1}{2}"), (r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}"),
    (r"^\((?:\\(?:text|math)[a-z]*\{)?([A-J])\}?\)$", r"\1"),
]  # fmt: skip
PRM800K = [
    (r"^[^(\[].*[^)\]]$", lambda m: re.sub(" (?:or|and) ", ",", m[0])),  # not (1 or 2), which is no tuple
    (r" (?:or|and) |\\\\", ";"),
    *MATHD,
    (r"(?:degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)"
     r"(?:es)?s?(?:\^[23])?(?!\d)", ""),
    (r"\\[{},;:]", ""), (r"\\(?:text|math|mbox)[a-z]*\{([^{}]*)\}", r"\1"), (r"([\^_])\{(\w+)\}", r"\1\2"),
    (r"(?<![\w/.^)}])(\d+)\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),
    # After / and ^ it would bind differently: it stays, and keeps sympy out.
    (r"(?<![/^])\\frac\{((?:[^{}]|\{[^{}]*\})*)\}(?=\{)", r"(\1)/"),
    (r"\{", "("), (r"\}", ")"), (r"\\(?:cdot|times)", "*"), (r"\\(?!frac)", ""),
]  # fmt: skip
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")


def rewrite(s, rules):
    """Apply a list of (pattern, replacement) in order."""
    for pattern, replacement in rules:
        s = re.sub(pattern, replacement, s)
    return s


def vote(read):
    """What an answer is counted as in a majority vote: its normalised string."""
    return integer(re.sub(r"([\^_])\{(\w)\}", r"\1\2", rewrite(rewrite(read, PLAIN), MATHD)))


def integer(s):
    """07, 1,000, 142.0 -> 7, 1000, 142. Any other string is returned unchanged."""
    whole = re.fullmatch(r"([+-]?)0*(\d+)(?:\.0*)?", THOUSANDS.sub("", s), re.ASCII)
    return s if not whole else whole[2] if whole[1] != "-" or whole[2] == "0" else "-" + whole[2]


def rational(s):
    """A decimal, a fraction or a mixed number, after MATHD, as a Fraction. Any other string is returned unchanged."""
    found = SIMPLE.fullmatch(s) if s and len(s) < 4 * LARGEST else None
    sign, whole, above, below = found.groups() if found else [None] * 4
    if not (whole or above) or (below and not Fraction(below)):
        return s
    value = Fraction(whole or 0) + (Fraction(above) / Fraction(below) if above else 0)
    return -value if sign == "-" else value


SIMPLE = re.compile(rf"([+-]?)({DECIMAL})?(?:\\frac\{{(-?(?:{DECIMAL}))\}}\{{((?:{DECIMAL}))\}})?", re.ASCII)
SIDE_BY_SIDE = re.compile(rf" *(?:{DECIMAL})(?: +(?:{DECIMAL}))+ *")  # 3 8 is neither 38 nor 24 nor a list
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
FRACTION = rf"{NUMBER}|[-+]?\d*\\frac\{{-?\d+\}}\{{-?\d+\}}|-?\d+/\d+"
UNIT = r"(?:[A-Za-z]+(?:\^[23])?)?"


def unevaluated(read, gold):
    """Is the ground truth a plain number, and the answer that was read (Verdict.answer) none, but something to compute? A
    number is an integer, a decimal or a fraction of integers, perhaps with a unit; for an integer a fraction is none. Of a
    chain of equations the end counts."""
    gold, read = (THOUSANDS.sub("", s) for s in (integer(rewrite(last_boxed(gold) or gold, MATHD)), read))
    wanted = NUMBER if re.fullmatch(r"-?\d+", gold) else FRACTION
    is_number = re.fullmatch(f"(?:{FRACTION}){UNIT}", gold)
    return bool(is_number) and not re.fullmatch(f"(?:{wanted}){UNIT}", read.rpartition("=")[2].strip("()"))


# ---------------------------------------------------------------- PRM800K's comparison, by sympy


def prm800k_equal(given, gold):
    """Are they equal strings, or tuples or intervals with the same brackets and equal elements?"""
    given, gold = (rewrite(s, PRM800K).lower() for s in (given, gold))
    elements = lambda s: s[1:-1].split(",") if re.fullmatch(r"[(\[][^()\[\]]+[)\]]", s) else [s]
    ours, theirs = elements(given), elements(gold)
    if not given or len(ours) != len(theirs):
        return False
    if len(theirs) > 1 and (given[0], given[-1]) != (gold[0], gold[-1]):
        return False
    return all(map(sympy_equal, ours, theirs))


def sympy_equal(a, b):
    """Is a - b zero? An integer equals only itself; so does text, and whatever sympy may hang on."""
    from sympy import simplify

    a, b = (s if "," in s else integer(s) for s in (a, b))  # PLAIN has read 1,000; this may be {1,234}
    difference = f"({a})-({b})"
    letters = set(re.findall("[a-z]", re.sub("sqrt|frac", "", difference)))
    hard = re.search(r"\*\*|\^\(|\^\d+\^|\^\d\d|[a-z]\(0\)|/\d+[a-z(]", difference)  # 1/2x may be x/2 or 1/(2x)
    odd = hard or not re.fullmatch(r"[a-z0-9+\-*/^().]+", difference)
    if a == b or len(letters) > 2 or odd or any(re.fullmatch(r"-?\d+", s) for s in (a, b)):
        return a == b
    try:
        return bool(simplify(expression(a) - expression(b)) == 0)
    except Exception:  # it does not parse
        return False


def expression(text):
    """A string as sympy_equal prepares it -> a sympy expression, by recursive descent: sympy's own
    parser evaluates Python.

    Letters are symbols, except in pi, sqrt( and ln(. Neighbours without an operator are multiplied.
    Raises IndexError or ValueError for what does not parse.
    """
    import sympy

    tokens = re.findall(r"\d+\.?\d*|\.\d+|sqrt(?=\()|ln(?=\()|pi|\S", text)
    tokens = [*tokens, ""][::-1]  # read from the end

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
