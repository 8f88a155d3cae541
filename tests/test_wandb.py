"""Weights & Biases, as a user has it: the package, offline."""

import importlib.machinery
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import metrics

from configurator import ROOT, UserError
from runtime.folder import OutputFolder
from runtime.metrics import fault_of
from runtime.run import Run

# The package's own dependencies come behind ours, as pip would have it in one environment.
START = "import runpy, sys; sys.path.append(sys.argv.pop(1)); sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


def test_its_package_is_asked_for_before_any_work(script, monkeypatch, tmp_path):
    module = script("train", ["--log=wandb", f"--out_dir={tmp_path / 'run'}"])
    folder = importlib.machinery.ModuleSpec("wandb", None, is_package=True)  # what the package leaves behind where it ran
    for found in (None, folder):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        with pytest.raises(UserError, match="pip install wandb"):
            module.main()
    assert not (tmp_path / "run").exists()


def raises(*arguments, **keywords):
    raise OSError("the network is gone\nand more")


@pytest.mark.parametrize(("fails", "words"), [(raises, "OSError: the network is gone"), (sys.exit, "SystemExit"),
                                              (lambda *a, **k: time.sleep(60), "no answer for 0.2 s")])  # fmt: skip
def test_a_run_goes_on_without_it(tmp_path, monkeypatch, capsys, fails, words):
    """wandb.log fails: one warning, and it is never asked again. (The package itself is played here; below it is real.)"""
    calls = []
    package = SimpleNamespace(log=lambda *a, **k: calls.append(a) or fails(), finish=calls.append, teardown=lambda code: None)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(fault_of, "__kwdefaults__", {"limit": 0.2})
    run = Run(OutputFolder(str(tmp_path / "out"), "train.py").__enter__(), {}, "wandb")
    for step in (0, 1):
        run.advance(step, {}, {"step": step})
        run.write_line({})
    run.end_wandb(0)
    assert len(calls) == 1 and [row["step"] for row in metrics(tmp_path / "out")] == [0, 1]
    shown = capsys.readouterr().out
    assert shown.count("warning: wandb:") == 1 and words in shown and "and more" not in shown


@pytest.mark.slow
def test_every_metric_arrives_and_a_resumed_run_is_the_same(tmp_path):
    folder = tmp_path / "wandb_package"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, "wandb==0.31.0"]
    subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
    argv = ["--log=wandb", "--sampler=torch", "--reward_workers=1", "--eval_max_problems=20", "--eval_k=0", "--resume=auto"]

    def train(steps, **environment):
        command = [sys.executable, "-c", START, folder, os.path.join(ROOT, "train.py"), *argv, f"--max_steps={steps}",
                   f"--out_dir={tmp_path / 'run'}"]  # fmt: skip
        environment = {"WANDB_DIR": str(tmp_path), "HOME": str(tmp_path), **environment}
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)

    assert "WANDB_MODE=offline" in train(2, WANDB_MODE="online", WANDB_API_KEY="").stderr  # nobody is logged in here
    for steps in (2, 4):
        done = train(steps, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr[-2000:]
    kept = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(kept) == 2 and kept[0].name == kept[1].name  # run-ID.wandb
    rows = metrics(tmp_path / "run")
    for file, part in zip(kept, (rows[:3], rows[3:]), strict=True):
        written = file.read_bytes()
        for row in part:
            for name, value in row.items():
                assert name.encode() in written and json.dumps(value).encode() in written
