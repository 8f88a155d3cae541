"""Weights & Biases, as a user has it: the package, offline."""

import importlib.machinery
import json
import os
import subprocess
import sys

import pytest
from helpers import metrics

from configurator import ROOT, UserError

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
