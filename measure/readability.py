"""
How much a reader must hold in mind: train.py's loop, now and at another commit, and the lines of each file.

    python measure/readability.py              this tree
    python measure/readability.py fc75be8      beside the tree of a commit

Free names are the names that the loop reads and does not bind itself, without Python's builtins. Nested functions are those
of the function around the loop. A screen is 50 lines.
"""

import ast
import builtins
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout


def read(path, commit):
    if commit:
        return git("show", f"{commit}:{path}")
    with open(os.path.join(ROOT, path)) as f:
        return f.read()


def files(commit):
    names = git("ls-tree", "-r", "--name-only", commit) if commit else git("ls-files")
    apart = ("tests/", "measure/", "toy/", "config/", "peers/")
    return [n for n in names.split() if n.endswith(".py") and not n.startswith(apart)]


def training_loop(tree):
    """(the function around it, the loop): the longest `for step in ...`."""
    found = [
        (function, node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.For) and getattr(node.target, "id", "") == "step"
    ]
    return max(found, key=lambda pair: (pair[1].end_lineno - pair[1].lineno, -pair[0].lineno))


def measure(source):
    """{what: value} of train.py's loop and the function around it."""
    function, loop = training_loop(ast.parse(source))
    names = [node for node in ast.walk(loop) if isinstance(node, ast.Name)]
    bound = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {n.arg for n in ast.walk(loop) if isinstance(n, ast.arg)}
    free = {n.id for n in names if isinstance(n.ctx, ast.Load)} - bound - set(dir(builtins))
    nested = [n for n in ast.walk(function) if isinstance(n, ast.FunctionDef) and n is not function]
    nonlocals = {name for n in ast.walk(function) if isinstance(n, ast.Nonlocal) for name in n.names}
    lines = source.splitlines()[loop.lineno - 1 : loop.end_lineno]
    share = lambda holds: f"{sum(map(holds, lines)) / len(lines):.0%}"
    return {
        "the loop's first line": loop.lineno,
        "screens before it": loop.lineno // 50,
        "its lines": len(lines),
        "free names": len(free),
        "of which knobs": sum(f"\n{name} = " in source.partition("\ndef ")[0] for name in free),
        "nested functions": len(nested),
        "nonlocal names": len(nonlocals),
        "blank lines": share(lambda line: not line.strip()),
        "lines over 100 columns": share(lambda line: len(line) > 100),
        "lines of train.py": len(source.splitlines()),
    }


def main():
    commits = [*sys.argv[1:], None]
    columns = [measure(read("train.py", commit)) for commit in commits]
    print(f"{'train.py':<26}" + "".join(f"{commit or 'this tree':>12}" for commit in commits))
    for what in columns[0]:
        print(f"{what:<26}" + "".join(f"{column[what]!s:>12}" for column in columns))
    counts = [{path: len(read(path, commit).splitlines()) for path in files(commit)} for commit in commits]
    print(f"\n{'lines of':<26}")
    for path in sorted({path for column in counts for path in column}, key=lambda path: (path.count("/"), path)):
        print(f"{path:<26}" + "".join(f"{column.get(path, '-')!s:>12}" for column in counts))
    print(f"{'together':<26}" + "".join(f"{sum(column.values()):>12}" for column in counts))


if __name__ == "__main__":
    main()
