"""bench.py peers: TRL's GRPOTrainer and train.py do the same work in turn."""

import json
import os
import subprocess
import sys
import sysconfig

import pytest

from configurator import ROOT

# What TRL needs besides the packages of .venv, which it shares, so that nothing large is installed twice.
OWN = "trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 dill multiprocess xxhash pandas httpx fsspec python-dateutil".split()


def command(*argv):
    return subprocess.run([sys.executable, os.path.join(ROOT, "bench.py"), "peers", *argv], capture_output=True, text=True)


def test_mistakes_are_named():
    for argv, words in (
        ([], "name the python of an environment with TRL"),
        ([f"--trl={sys.executable}", "--shapes=huge"], "'huge': choose shapes of toy"),
        ([f"--trl={sys.executable}"], "has no TRL"),
        (["--repeats=0"], "repeats=0 must be above zero"),
    ):
        done = command(*argv)
        assert done.returncode == 2 and words in done.stderr, done.stderr


@pytest.mark.slow
def test_both_sides_do_the_same_work(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "trl"], check=True)
    site = tmp_path / "trl" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (site / "ours.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, *OWN]
    subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
    out = tmp_path / "peers.jsonl"
    done = command(f"--trl={tmp_path}/trl/bin/python", "--shapes=toy", "--samplers=torch", "--repeats=2", f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TRL / ours: seconds " in done.stdout
    row = json.loads(out.read_text())
    for side in ("ours", "trl"):
        assert len(row[side]) == 2
        for step in row[side]:
            assert step["seconds"] > step["decode"] + step["update"] > 0
        assert [step["peak_bytes"] > step["update_bytes"] > 0 for step in row["memory"][side]] == [True, True]
