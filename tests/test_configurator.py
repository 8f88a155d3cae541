import glob
import json
import os
import re
import subprocess
import sys

import pytest

import configurator
from configurator import ROOT, UserError, configure

SCRIPT = '''
"""A script."""
# ---- files
data = "d"  # where it is
# ---- numbers
rate = 0.5  # how fast
steps = 10  # how many
flag = False  # whether
'''


@pytest.fixture
def knobs(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*argv):
        scope = {}
        exec(SCRIPT, scope)
        return configure(scope, list(argv), str(tmp_path / "script.py"))

    return run


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
        ("half = 5", "a file's own names start with _"),
    ],
)
def test_mistakes_in_a_file(knobs, tmp_path, text, words):
    with pytest.raises(UserError, match=re.escape(words)) as e:
        knobs(config_file(tmp_path, text))
    assert len(str(e.value).splitlines()) <= 2


def test_nothing_is_set_when_something_is_wrong(tmp_path):
    scope = {"steps": 10}
    with pytest.raises(UserError):
        configure(scope, ["--steps=3", "--nope=1"], "")
    assert scope == {"steps": 10}


def test_relative_paths_count_from_the_repository(knobs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert configurator.repo_path("config/method/grpo.py") == os.path.join(ROOT, "config/method/grpo.py")
    with pytest.raises(UserError, match="no knob 'n_teacher'"):  # found, from elsewhere
        knobs("config/method/grpo.py")


@pytest.mark.parametrize("script", ["train.py", "eval.py", "bench.py"])
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


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(ROOT, "config", "*.py"))), ids=os.path.basename)
def test_real_configs_leave_nothing_of_the_toys(path, script):
    module = script("train", [path])
    text = open(path).read()
    missing = [k for k in SCIENCE.split() if not re.search(rf"^{k} = ", text, re.M)]
    assert not missing
    assert module.config["min_teacher_pass"] >= 0.9


def test_every_method_overlay_stacks_on_every_base(script):
    bases = [p for p in glob.glob(os.path.join(ROOT, "config", "*.py")) if not os.path.basename(p).startswith("sft")]
    for base in ([], *([p] for p in bases)):
        for method in glob.glob(os.path.join(ROOT, "config", "method", "*.py")):
            teacher = ["--teacher_model=a/b"] if os.path.basename(method) in ("rkl.py", "kdrl.py", "tgpo.py") else []
            module = script("train", [*base, method, *teacher])
            module.check_knobs(8)


def test_provenance_is_json():
    p = configurator.provenance()
    assert len(p["git"]) in (0, 40) and p["torch"] and json.dumps(p)


def test_readme_names_every_overlay():
    text = open(os.path.join(ROOT, "README.md")).read()
    for path in glob.glob(os.path.join(ROOT, "config", "method", "*.py")):
        assert f"`{os.path.basename(path)[:-3]}`" in text, path
