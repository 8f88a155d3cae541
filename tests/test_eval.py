import json
import os
import subprocess
import sys

import pytest
from test_data import a_row, write

from configurator import ROOT, UserError
from eval import summarize

SOURCES = ["aime", "aime25", "amc", "math", "minerva", "olympiad_bench"]


def benchmark(tmp_path):
    """A file as the released ones are: several sources, no target, some problems repeated row by row."""
    rows = []
    for s, source in enumerate(SOURCES):
        for i in range(3):
            prompt = [
                {"content": "Think first. Box the answer.", "role": "system"},
                {"content": f"{source}: 1+{i}?", "role": "user"},
            ]
            row = a_row(
                data_source=source, prompt=prompt, target=None, reward_model={"ground_truth": f"{1 + i}.0", "style": "rule"}
            )
            rows += [row] * (4 if s < 3 else 1)
    return write(tmp_path / "valid.parquet", rows)


def test_summary():
    rows = [
        {"source": "a", "reward": [1, 0, 0, 0]},
        {"source": "a", "reward": [0, 0, 0, 0]},
        {"source": "b", "reward": [1, 1, 1, 1]},
    ]
    table = summarize(rows, 4)
    assert table == {"a": {"n": 2, "k": 4, "avg@k": 0.125, "pass@k": 0.5}, "b": {"n": 1, "k": 4, "avg@k": 1.0, "pass@k": 1.0}}


@pytest.mark.parametrize("sampler", ["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def test_the_command(sampler, tmp_path, byte_model):
    """A byte-level model through the whole command: repeats count once, every source is there, text never matters."""
    out = tmp_path / "out"
    argv = [f"--model={byte_model}", f"--data={benchmark(tmp_path)}", f"--out_dir={out}", "--k=3", "--max_problems=2",
            "--max_tokens=12", f"--sampler={sampler}"]  # fmt: skip
    done = subprocess.run([sys.executable, os.path.join(ROOT, "eval.py"), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.load(open(out / "eval.json"))
    assert sorted(table) == SOURCES
    assert all(row["n"] == 2 and row["k"] == 3 and 0 <= row["avg@k"] <= row["pass@k"] <= 1 for row in table.values())
    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    assert len(samples) == 12 and all(len(s["response"]) == 3 == len(s["reason"]) for s in samples)
    assert all(len(set(s["response"])) == 3 for s in samples)  # each sample has its own seed
    assert json.load(open(out / "config.json"))["max_tokens"] == 12


@pytest.mark.parametrize(
    "argv,words",
    [
        ("--model={tmp}/model", "has no tokenizer"),
        ("--data=nowhere.parquet", "there is no data file"),
        ("--k=0", "k=0 must be above zero"),
        ("--reward_timeout=-1", "reward_timeout=-1.0 must be above zero"),
        ("--max_problems=-1", "max_problems=-1 must be zero or more"),
        ("--dtype=foo", "dtype='foo'"),
        ("--sampler=foo", "sampler='foo'"),
        ("--seed=-1", "seed=-1 must lie between"),
    ],
)
def test_bad_input(script, tmp_path, argv, words):
    os.makedirs(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match=words):
        script("eval", [argv.format(tmp=tmp_path), f"--out_dir={tmp_path / 'out'}"]).main()
    assert not (tmp_path / "out").exists()


def test_exit_code(tmp_path):
    argv = ["--data=nowhere.parquet", f"--out_dir={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, os.path.join(ROOT, "eval.py"), *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no data file") and done.stderr.count("\n") == 1
