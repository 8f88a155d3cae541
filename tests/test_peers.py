"""bench.py peers: TRL's GRPOTrainer and train.py do the same work in turn."""

import json
import os
import subprocess
import sys
import sysconfig

import pytest

from configurator import ROOT
from measure.peers import compare

# What TRL needs besides the packages of .venv, which it shares, so that nothing large is installed twice.
OWN = "trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 dill multiprocess xxhash pandas httpx fsspec python-dateutil".split()


def command(*argv):
    return subprocess.run([sys.executable, os.path.join(ROOT, "bench.py"), "peers", *argv], capture_output=True, text=True)


def test_mistakes_are_named():
    for argv, words in (
        ([], "name the python of an environment with TRL"),
        ([f"--trl={sys.executable}", "--shapes=huge"], "'huge': choose shapes of toy"),
        ([f"--trl={sys.executable}", "--shapes=toy,"], "'': choose shapes of toy"),
        ([f"--trl={sys.executable}"], "has no TRL"),
        (["--repeats=0"], "repeats=0 must be above zero"),
    ):
        done = command(*argv)
        assert done.returncode == 2 and words in done.stderr, done.stderr


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """The python of an environment with TRL."""
    folder = tmp_path_factory.mktemp("trl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (site / "ours.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, *OWN]
    subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
    return folder / "bin" / "python"


def check(row, repeats):
    """A line of the result: both sides have times and memory that make sense."""
    for side in ("ours", "trl"):
        assert len(row[side]) == len(row["memory"][side]) == repeats
        for step in row[side]:
            assert step["seconds"] > step["decode"] + step["update"] > 0
        for step in row["memory"][side]:
            assert step["peak_bytes"] > step["update_bytes"] > 0
    assert row["packages"]["trl"] == "1.16.0"


@pytest.mark.slow
@pytest.mark.xdist_group("trl")
def test_both_sides_do_the_same_work(trl, tmp_path):
    out = tmp_path / "peers.jsonl"
    done = command(f"--trl={trl}", "--shapes=toy", "--samplers=torch", "--repeats=2", f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trl / ours: seconds " in done.stdout
    check(json.loads(out.read_text()), repeats=2)


@pytest.mark.slow
@pytest.mark.xdist_group("trl")
def test_what_differs_on_a_gpu(trl, tmp_path, monkeypatch, capsys):
    """All but the GPU and Liger's kernels: bf16 autocast, recomputation, TRL through vLLM, micro-batches, several peers beside
    one process of ours."""
    monkeypatch.setitem(compare.BY_DEVICE, "cpu", {**compare.BY_DEVICE["cuda"], "peers": ["trl", "trl"],
                                                  "turns": ["memory", "time"]})  # fmt: skip
    monkeypatch.setitem(compare.SHAPES, "mini", ((64, 128, 2, 2, 2, 288, True), 4, 2, 8, 4, (48, 56)))
    # A share of the memory is too little on one machine and too much on another: name TRL's cache in GiB.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    out = tmp_path / "peers.jsonl"
    compare.main([f"--trl={trl}", "--shapes=mini", "--repeats=1", "--gpu_memory=0.05", f"--out={out}"])
    assert "ours through vllm, trl\n" in capsys.readouterr().out
    first, second = map(json.loads, out.read_text().splitlines())
    for row in (first, second):
        check(row, repeats=1)
    assert first["ours"] != second["ours"]
