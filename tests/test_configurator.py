import glob
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import read_config, resolve

import configurator
from configurator import ROOT, UserError, configure, free_knobs
from loss import shape
from runtime import preflight

SCRIPT = '''
"""A script."""
# ---- files
data = "d"  # where it is
# ---- numbers
rate = 0.5  # how fast
steps = 10  # how many
flag = False  # whether
'''


RANGES = '''
"""A script."""
# ---- the run
rate = 0.5  # how fast [> 0]
share = 1.0  # of the batch [0, 1]
beta = 0.9  # AdamW (its first) [0, 1)
shift = 0.0  # any number [any]
heat = 1.0  # zero, or not near it [0 or 0.01, 100]
warm = -1.5  # between two others [-2, 0.5]
steps = 10  # how many
seed = 0  # of all [0, 4294967295]
dtype = "auto"  # of the weights [auto | float32 | bfloat16]
# ==== how it is run: free on resume
# ---- system
workers = 2  # processes [> 0]
name = "a  # b [c"  # a text without a range (é)
'''


def script_of(tmp_path, source):
    """configure() for a script of this text: a function of the arguments."""
    path = tmp_path / "script.py"
    path.write_text(source)

    def run(*argv):
        scope = {}
        exec(source, scope)
        return configure(scope, list(argv), str(path))

    return run


@pytest.fixture
def knobs(tmp_path):
    return script_of(tmp_path, SCRIPT)


@pytest.fixture
def ranged(tmp_path):
    return script_of(tmp_path, RANGES)


def config_file(tmp_path, text, name="c.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_left_to_right(knobs, tmp_path, capsys):
    a = config_file(tmp_path, "rate = 1\nsteps = 20\n", "a.py")
    b = config_file(tmp_path, "import math\n_half = math.ceil(steps / 2)\nsteps = _half\n", "b.py")
    got = knobs(a, b, "--flag=True", "--data=x=y=z")
    assert got == {"data": "x=y=z", "rate": 1.0, "steps": 10, "flag": True}
    assert type(got["rate"]) is float  # an int where a float is meant
    out = capsys.readouterr().out
    assert "rate = 1.0  (default 0.5, set by " in out and "data = 'x=y=z'" in out
    assert "steps" not in out  # set, but to its default: the printed diff is against the defaults
    assert knobs(a, "--steps=3")["steps"] == 3 and knobs("--steps=3", a)["steps"] == 20
    assert knobs("--data=10")["data"] == "10"


@pytest.mark.parametrize(
    "argument,words",
    [
        ("--stesp=3", "no knob 'stesp'; did you mean 'steps'"),
        ("--steps=ten", "'steps' must be int, not str 'ten'; the default is 10"),
        ("--steps=1.5", "must be int, not float"),
        ("--steps=True", "must be int, not bool"),
        ("--flag=1", "must be bool, not int"),
        ("--flag", "--flag=VALUE"),
        ("nowhere.py", "no config file"),
        ("--rate=nan", "must be float, not str"),
        ("--rate=1e999", "must be float and finite, not float inf"),
        ("--steps=" + "9" * 5000, "must be int"),
        ("--steps=" + "-" * 100_000, "'steps' must be int, not str '-----"),
        ("--steps=" + "[" * 100_000, "'steps' must be int, not str '[[[[["),
        (f"--steps={2**53}", "'steps' must be below 2**53"),
    ],
)
def test_mistakes_on_the_command_line(knobs, argument, words):
    with pytest.raises(UserError, match=re.escape(words)):
        knobs(argument)


@pytest.mark.parametrize(
    "text,words",
    [
        ("steps = 'ten'", "c.py: 'steps' must be int, not str 'ten'"),
        ("stepz = 3", "c.py: there is no knob 'stepz'; did you mean 'steps'"),
        ("steps = = 3", "c.py, line 1: SyntaxError"),
        ("steps = 1 / 0", "c.py: ZeroDivisionError"),
        ("steps = 3.0", "must be int, not float"),
        ("rate = float('nan')", "must be float and finite"),
        ("raise SystemExit", "c.py: SystemExit"),
        ("raise ValueError('one\\ntwo')", "c.py: ValueError: one"),
        ("half = 5", "a config's local names start with _"),
        ("include('config/nowhere.py')", "c.py: there is no config file"),
        ("include(5)", "c.py: TypeError"),
        ("data = 'a\\0b'", "c.py: 'data' is 'a\\x00b', which no path and no text may be"),
        ("data = '\\ud800'", "c.py: 'data' is '\\ud800', which no path"),
        ("include = 5", "c.py: there is no knob 'include'"),
    ],
)
def test_mistakes_in_a_file(knobs, tmp_path, text, words):
    with pytest.raises(UserError, match=re.escape(words)) as e:
        knobs(config_file(tmp_path, text))
    assert len(str(e.value).splitlines()) <= 2


@pytest.mark.parametrize("wrong", ["--nope=1", "--rate=-1", "nowhere.py"])
def test_nothing_is_set_when_something_is_wrong(tmp_path, wrong):
    scope = {"steps": 10, "rate": 1.0}
    (tmp_path / "script.py").write_text("steps = 10\nrate = 1.0\n")
    with pytest.raises(UserError):
        configure(scope, ["--steps=3", wrong], str(tmp_path / "script.py"))
    assert scope == {"steps": 10, "rate": 1.0}


# ---------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    "argument,words",
    [
        ("--rate=0", "rate=0.0 must be above zero (set by --rate)"),
        ("--rate=-1", "rate=-1.0 must be above zero"),
        ("--share=-0.1", "share=-0.1 must lie between zero and one"),
        ("--share=1.1", "share=1.1 must lie between zero and one"),
        ("--beta=1", "beta=1.0 must be at least zero and below one"),
        ("--beta=-0.1", "beta=-0.1 must be at least zero and below one"),
        ("--heat=1e-320", "heat=1e-320 must be zero, or lie between 0.01 and 100"),
        ("--heat=101", "heat=101.0 must be zero, or lie between 0.01 and 100"),
        ("--warm=0.6", "warm=0.6 must lie between -2 and 0.5"),
        ("--steps=-1", "steps=-1 must be zero or more"),
        ("--seed=-1", "seed=-1 must lie between zero and 4294967295"),
        ("--seed=4294967296", "seed=4294967296 must lie between"),
        ("--dtype=x", "dtype='x': choose auto, float32 or bfloat16 (set by --dtype)"),
        ("--dtype=", "dtype='': choose"),
        ("--workers=0", "workers=0 must be above zero"),
    ],
)
def test_a_value_out_of_range(ranged, argument, words):
    with pytest.raises(UserError, match=re.escape(words)):
        ranged(argument)


def test_values_at_the_ends_of_their_ranges(ranged):
    for argument in (
        "--rate=1e-9 --share=0 --share=1 --beta=0 --beta=0.999 --shift=-5 --warm=-2 --warm=0.5 --steps=0 --seed=0"
        " --heat=0 --heat=0.01 --heat=100 --seed=4294967295 --dtype=float32 --dtype=bfloat16 --workers=1 --name=x"
    ).split():
        ranged(argument)


def test_only_the_final_values_count_and_a_config_file_is_named(ranged, tmp_path):
    wrong = config_file(tmp_path, "rate = -1\ndtype = 'x'\n")
    assert ranged(wrong, "--rate=2", "--dtype=auto")["rate"] == 2.0
    with pytest.raises(UserError, match=re.escape(f"rate=-1.0 must be above zero (set by {wrong})")):
        ranged(wrong)


@pytest.mark.parametrize(
    "line",
    [
        'share = 0.5  # [0 1]', 'share = 0.5  # [> zero]', 'share = 0.5  # [>= 0]', 'share = 0.5  # [0, 1',
        'share = 0.5  # (0, 1]', 'share = 0.5  # []', 'share = 0.5  # [0 | 1]', 'share = 1  # [Any]',
        'share = "a"  # [> 0]', 'share = "a"  # [any]', 'share = "a"  # [a, b]', 'share = "a"  # [a |b]',
        'share = "a"  # [a]', 'share = True  # [True | False]',
    ],
)  # fmt: skip
def test_a_malformed_range_is_a_mistake_in_the_script(tmp_path, line):
    with pytest.raises(ValueError, match="the knob 'share'"):
        script_of(tmp_path, line + "\n")()


def test_text_in_brackets_that_is_not_at_the_end_is_no_range(tmp_path):
    run = script_of(tmp_path, 'rate = 0.5  # as in [1, 2] of the paper\nname = "a"  # x[0] (see [> 0] there)\n')
    assert run("--rate=7", "--name=b") == {"rate": 7.0, "name": "b"}


# ---------------------------------------------------------------- two blocks


def test_knobs_below_the_marker_are_free(tmp_path):
    (tmp_path / "a.py").write_text(RANGES)
    (tmp_path / "b.py").write_text(SCRIPT)
    (tmp_path / "c.py").write_text(RANGES + "\nfrom configurator import configure\nlater = 3\n")
    assert free_knobs(tmp_path / "a.py") == free_knobs(tmp_path / "c.py") == {"workers", "name"}
    assert free_knobs(tmp_path / "b.py") == set()


def test_help_shows_ranges_headings_and_the_marker(ranged, capsys):
    with pytest.raises(SystemExit):
        ranged("--help")
    out = capsys.readouterr().out
    assert re.search(r"^  --rate=0.5 +how fast \[> 0\]$", out, re.M)
    assert "A script.\n\nthe run\n  --rate" in out
    assert "\n\n==== how it is run: free on resume\n\nsystem\n  --workers" in out
    assert re.search(r"^  --name='a  # b \[c' +a text without a range \(é\)$", out, re.M)


# ---------------------------------------------------------------- include


def test_include_runs_another_config_in_the_same_namespace(knobs, tmp_path, capsys):
    base = config_file(tmp_path, "_n = 3\nrate = 2.0\nsteps = 7\ndata = 'base'\n", "base.py")
    middle = config_file(tmp_path, f"include({base!r})\nsteps = steps + _n\n", "middle.py")
    top = config_file(tmp_path, f"include({middle!r})\nif steps == 10 + 0:\n    steps = steps * 2\nflag = True\n", "top.py")
    assert knobs(top, "--data=x") == {"data": "x", "rate": 2.0, "steps": 20, "flag": True}
    out = capsys.readouterr().out.splitlines()
    assert f"rate = 2.0  (default 0.5, set by {base})" in out  # the file that really set it
    assert f"steps = 20  (default 10, set by {top})" in out
    assert f"flag = True  (default False, set by {top})" in out
    assert "data = 'x'  (default 'd', set by --data)" in out
    assert knobs("--rate=3", top)["rate"] == 2.0 and knobs(top, base)["steps"] == 7


def test_a_mistake_in_an_included_file_names_that_file(knobs, tmp_path):
    inner = str(tmp_path / "inner.py")
    outer = config_file(tmp_path, f"include({inner!r})\n", "outer.py")
    for text, words in (
        (None, f"{outer}: there is no config file {inner}"),
        ("steps = = 3", f"{inner}, line 1: SyntaxError"),
        ("steps = 1 / 0", f"{inner}: ZeroDivisionError"),
        ("raise SystemExit", f"{inner}: SystemExit"),
        ("stepz = 3", f"{inner}: there is no knob 'stepz'"),
        ("steps = 'ten'", f"{inner}: 'steps' must be int"),
        ("steps = -1", f"steps=-1 must be zero or more (set by {inner})"),
        (f"include({outer!r})", f"{inner}: include({outer!r}) would never end"),
        (f"include({inner!r})", f"{inner}: include({inner!r}) would never end"),
    ):
        if text:
            config_file(tmp_path, text, "inner.py")
        with pytest.raises(UserError, match=re.escape(words)) as e:
            knobs(outer)
        assert len(str(e.value).splitlines()) <= 2 and "outer.py: UserError" not in str(e.value)


def test_a_file_may_be_included_twice(knobs, tmp_path):
    a = config_file(tmp_path, "steps = steps + 1\n", "a.py")
    assert knobs(config_file(tmp_path, f"include({a!r})\ninclude({a!r})\n"))["steps"] == 12


# ---------------------------------------------------------------- our own scripts and configs


def test_relative_paths_count_from_the_repository(knobs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert configurator.repo_path("config/method/luffy.py") == os.path.join(ROOT, "config/method/luffy.py")
    for path in ("config/method/luffy.py", config_file(tmp_path, "include('config/method/luffy.py')")):
        with pytest.raises(UserError, match="^config/method/luffy.py: there is no knob 'n_teacher'"):  # found, from elsewhere
            knobs(path)


@pytest.mark.parametrize("script", ["train.py", "eval.py", "bench.py", "sample.py"])
def test_help_explains_every_knob(script):
    out = subprocess.run(
        [sys.executable, os.path.join(ROOT, script), "--help"], capture_output=True, text=True, check=True
    ).stdout
    source = open(os.path.join(ROOT, script)).read().split("from configurator")[0]
    knobs = re.findall(r"^(\w+) = ", source, re.M)
    assert len(knobs) > 10
    for knob in knobs:
        line = re.search(rf"^  --{knob}=(\S+) +(.*)$", out, re.M)
        assert line and len(line[2]) > 3, f"{knob} has no comment"


def test_a_mistake_is_two_lines_and_exit_code_2():
    for arguments in (["--learning_rat=1"], ["config/nowhere.py"], ["--max_steps=many"]):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) <= 2 and done.stdout == ""


# What a reader must see in a real model's config, because it changes the science: nothing of the toy's is inherited.
SCIENCE = """
    data eval_data holdout eval_interval eval_greedy eval_k eval_temperature model n_rollouts n_teacher verified_only
    temperature max_tokens max_prompt_tokens max_teacher_tokens use_std shaping gamma clip_low clip_high loss_constant
    entropy_coef sft_coef max_steps prompts_per_step update_batches learning_rate warmup_steps beta1 beta2 weight_decay
    grad_clip seed require_think reward_timeout min_teacher_pass
"""


CONFIGS = sorted(glob.glob(os.path.join(ROOT, "config", "**", "*.py"), recursive=True))


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(ROOT, "config", "*.py"))), ids=os.path.basename)
def test_real_configs_leave_nothing_of_the_toys(path):
    names, included = read_config(path)
    for other in included:
        names |= read_config(other)[0]
    assert not set(SCIENCE.split()) - names
    assert resolve("train.py", path)["min_teacher_pass"] >= 0.9


@pytest.mark.parametrize("path", [p for p in CONFIGS if read_config(p)[1]], ids=os.path.basename)
def test_a_config_with_an_include_says_only_what_differs(path):
    names, included = read_config(path)
    script = "eval.py" if os.path.basename(os.path.dirname(path)) == "eval" else "train.py"
    before, after = resolve(script, *included), resolve(script, path)
    assert not {name for name in names if before[name] == after[name]}


def test_every_method_overlay_stacks_on_every_base():
    is_method = lambda path: "sft_7b" in path or any("method" in p for p in read_config(path)[1])
    bases = [p for p in glob.glob(os.path.join(ROOT, "config", "*.py")) if not is_method(p)]
    assert len(bases) >= 8
    for base in ([], *([p] for p in bases)):
        for method in glob.glob(os.path.join(ROOT, "config", "method", "*.py")):
            teacher = (
                ["--teacher_model=a/b"] if os.path.basename(method) in ("rkl.py", "kdrl.py", "tgpo.py", "tgpo_adv.py") else []
            )
            preflight.check_knobs(SimpleNamespace(**resolve("train.py", *base, method, *teacher)), 8, shape)


def test_provenance_is_json():
    p = configurator.provenance()
    assert len(p["git"]) in (0, 40) and p["torch"] and json.dumps(p)


def test_readme_names_every_overlay():
    text = open(os.path.join(ROOT, "README.md")).read()
    for path in glob.glob(os.path.join(ROOT, "config", "method", "*.py")):
        assert f"`{os.path.basename(path)[:-3]}`" in text, path


def test_an_error_of_the_system_that_names_a_file_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        configurator.run(lambda: open(tmp_path))
    assert e.value.code == 2 and capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"
    with pytest.raises(OSError, match="no file"):  # not the user's: its traceback is needed
        configurator.run(lambda: (_ for _ in ()).throw(OSError("no file")))
