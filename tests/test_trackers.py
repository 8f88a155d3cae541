"""Weights & Biases and TensorBoard, as a user has them: the packages, offline."""

import importlib.machinery
import json
import math
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import metrics

from configurator import ROOT, UserError
from runtime.folder import OutputFolder
from runtime.run import Run
from runtime.trackers import TensorBoard, WandB, fault_of

# The package's own dependencies come behind ours, as pip would have it in one environment.
START = "import runpy, sys; sys.path.append(sys.argv.pop(1)); sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_its_package_is_asked_for_before_any_work(script, monkeypatch, tmp_path, name):
    module = script("train", [f"--log={name}", f"--out_dir={tmp_path / 'run'}"])
    folder = importlib.machinery.ModuleSpec(name, None, is_package=True)  # what the package leaves behind where it ran
    for found in (None, folder):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        with pytest.raises(UserError, match=f"pip install {name}, or set log=jsonl"):
            module.main()
    assert not (tmp_path / "run").exists()


def raises(*arguments, **keywords):
    raise OSError("the network is gone\nand more")


@pytest.mark.parametrize(("fails", "words"), [(raises, "OSError: the network is gone"), (sys.exit, "SystemExit"),
                                              (lambda *a, **k: time.sleep(60), "no answer for 0.2 s")])  # fmt: skip
def test_a_run_goes_on_without_it(tmp_path, monkeypatch, capsys, fails, words):
    """wandb.log fails: one warning, and it is never asked again. (The package itself is played here; below it is real.)"""
    calls = []
    package = SimpleNamespace(init=lambda **k: SimpleNamespace(id="x"), log=lambda *a, **k: calls.append(a) or fails(),
                              finish=calls.append, teardown=lambda code: None)  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(fault_of, "__kwdefaults__", {"limit": 0.2})
    run = Run(OutputFolder(str(tmp_path / "out"), "train.py").__enter__(), {}, WandB({"out_dir": "out"}))
    for step in (0, 1):
        run.advance(step, {}, {"step": step})
        run.write_line({})
    run.track("end", 0)
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


def curves(folder):
    """{name: [(step, value), ...]} as TensorBoard shows a run's folder."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def write_steps(folder, steps, value, spoil=lambda step: None):
    """What a run does at these steps, in a process of its own."""
    with OutputFolder(str(folder), "train.py") as output:
        run = Run(output, {}, TensorBoard(output.path))
        for step in steps:
            spoil(step)
            run.advance(step, {}, {"step": step, "loss": value + step, "norm": math.nan if step == 1 else 2})
            run.write_line({})
        run.track("end", 0)


def test_a_resumed_run_has_each_step_once(tmp_path):
    """A process wrote steps 0 to 4 and died; its checkpoint was of step 2."""
    pytest.importorskip("tensorboard")
    write_steps(tmp_path / "out", range(5), 0.0)
    assert curves(tmp_path / "out")["norm"] == [(0, 2.0), (2, 2.0), (3, 2.0), (4, 2.0)]  # JSON has no NaN, and so here
    write_steps(tmp_path / "out", (3, 4, 5), 100.0)
    assert curves(tmp_path / "out")["loss"] == [(0, 0), (1, 1), (2, 2), (3, 103), (4, 104), (5, 105)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("at", [0, 1])
def test_a_run_goes_on_without_tensorboard(tmp_path, capsys, at):
    """Its folder cannot be made, or is gone in the middle of the run."""
    pytest.importorskip("tensorboard")
    folder = tmp_path / "out" / "tensorboard"

    def spoil(step):
        if step == at:
            shutil.rmtree(folder, ignore_errors=True)
            folder.write_text("")

    write_steps(tmp_path / "out", range(3), 0.0, spoil)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [0, 1, 2]
    shown = capsys.readouterr().out
    assert shown.count("warning: tensorboard: ") == 1 and "the run goes on without it; metrics.jsonl has all" in shown


@pytest.mark.slow
def test_tensorboard_has_every_metric(tmp_path):
    pytest.importorskip("tensorboard")
    argv = ["--log=tensorboard", "--sampler=torch", "--reward_workers=1", "--eval_max_problems=20", "--eval_k=0",
            "--resume=auto", f"--out_dir={tmp_path / 'run'}"]  # fmt: skip
    for steps in (2, 4):
        command = [sys.executable, os.path.join(ROOT, "train.py"), *argv, f"--max_steps={steps}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    rows, shown = metrics(tmp_path / "run"), curves(tmp_path / "run")
    assert [row["step"] for row in rows] == [*range(5)] and set(shown) == set().union(*rows)
    for name, points in shown.items():
        assert [step for step, _ in points] == [row["step"] for row in rows if name in row]
        assert [value for _, value in points] == pytest.approx([row[name] for row in rows if name in row], rel=1e-6)
