r"""
The rules of the `oat` grader: those of OAT's math_grader, which LUFFY's evaluation uses.

The last box is right if one of three comparisons says so: the strings are equal after the
normalisation of Hendrycks et al. for MATH (MATHD below), PRM800K's comparison (prm800k_equal), or
math-verify on what the box holds.

Accepted there, rejected here:
    1.39e-10 for 3.61e-10              there every number within 1e-7 of an integer is that integer
    (c) for (a), c^2+b for a^2+b       there units of MathQA, a and c among them, are deleted
    1\text{ or }3 for 1\text{ or }2    there the rest is cut off
    -1 for -1./3                       there one number is enough of an unreadable ground truth
    1+\frac{x}{2} for \frac{1+x}{2}    there pylatexenc, not used here, makes them equal;
    \sqrt[3]{2} for \sqrt{2}           so it does with these
    73/4 for 7 3/4, -I(0) for I(0)
Rejected there, accepted here:
    \boxed 5 and \fbox{5}              as in MATH's own code
There math-verify has a second of its own, and never sees a long repetition; here one time limit
holds for all three.

math-verify and sympy are imported when they are needed, so that a verifier's worker starts quickly.
"""

import re


def by_oat(text, answer):
    """(text, ground truth) -> (right or not, what the last box holds); (0.0, None) without a box."""
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

MATHD = [
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
    (r"(?<![/^])\\frac(?=\{)", ""),  # after / and ^ it would bind differently: it stays, and keeps sympy out
    (r"\}\{", ")/("), (r"\{", "("), (r"\}", ")"), (r"\\(?:cdot|times)", "*"), (r"\\(?!frac)", ""),
]  # fmt: skip
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")


def rewrite(s, rules):
    """Apply a list of (pattern, replacement) in order."""
    for pattern, replacement in rules:
        s = re.sub(pattern, replacement, s)
    return s


def integer(s):
    """07, 1,000, 142.0, 2.66e2 -> 7, 1000, 142, 266. Any other string is returned unchanged, as is
    an integer of 2**53 and more, which a float cannot hold."""
    try:
        x = float(THOUSANDS.sub("", s).replace("_", "?"))  # Python alone reads 1_0 as ten
    except ValueError:
        return s
    return str(int(x)) if x.is_integer() and abs(x) < 2**53 else s


# ---------------------------------------------------------------- PRM800K's comparison, by sympy


def prm800k_equal(given, gold):
    """Are they equal strings, or tuples or intervals with the same brackets and equal elements?"""
    given, gold = (THOUSANDS.sub("", integer(rewrite(s, PRM800K).lower())) for s in (given, gold))
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

    a, b = integer(a), integer(b)
    difference = f"({a})-({b})"
    letters = set(re.findall("[a-z]", re.sub("sqrt|frac", "", difference)))
    hard = re.search(r"\*\*|\^\(|\^\d+\^|\^\d\d|[a-z]\(0\)", difference)
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
