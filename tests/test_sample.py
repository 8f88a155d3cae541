"""sample.py answers what it is asked, from the newest checkpoint or another model, and explains mistakes."""

import os
import subprocess
import sys

import pytest
from helpers import BASE

from configurator import ROOT, UserError


@pytest.fixture
def ask(script, capsys):
    """Run sample.py in this process on the torch sampler. Returns what it printed."""

    def call(*argv):
        module = script("sample", ["--sampler=torch", "--max_tokens=40", *argv])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def test_the_newest_checkpoint_answers(ask, tmp_path):
    """Through out_dir's link `latest`. The base is right in its first, chance-like way: 12>46 at once, greedily."""
    os.symlink(BASE, tmp_path / "latest")
    out = ask("--question=12+34=?", f"--out_dir={tmp_path}", "--temperature=0")
    assert out == "--- 12+34=? (1 of 1: 11 tokens)\n<think>\n12>46</think>\\boxed{46}\n"


def test_verdicts_and_the_answer_without_its_thought(ask):
    out = ask("--question=12+34=?", f"--model={BASE}", "--answer=46", "--k=8", "--temperature=1", "--thought=False")
    heads = [line for line in out.splitlines() if line.startswith("--- 12")]
    right = [line for line in heads if line.endswith(" tokens, correct)")]
    assert [h.partition("(")[2][:6] for h in heads] == [f"{i} of 8" for i in range(1, 9)]
    assert out.count("\\boxed{46}") == len(right) > 0 and f"--- {len(right)} of 8 correct\n" in out
    assert "<think>" not in out and ">46" not in out
    assert ask("--question=12+34=?", f"--model={BASE}", "--answer=47", "--temperature=0").endswith("--- 0 of 1 correct\n")


def test_a_seed_decides_the_samples(ask):
    argv = ["--question=12+34+56=?", f"--model={BASE}", "--k=4", "--temperature=2"]
    one, other = ask(*argv), ask(*argv, "--seed=1")
    assert ask(*argv) == one != other
    assert len({text.partition("tokens")[2] for text in one.split("---")[1:]}) > 1  # not one sample four times


def test_a_thought_that_is_cut_off(ask):
    out = ask("--question=12+34=?", f"--model={BASE}", "--max_tokens=3", "--thought=False", "--answer=46")
    assert "(1 of 1: 3 tokens, cut off, no_think)\n(its thought did not close)\n" in out


def test_a_file_of_questions(ask, tmp_path):
    (tmp_path / "questions.txt").write_text("12+34=?\n\n 11+11=? \n")
    out = ask(f"--question=FILE:{tmp_path / 'questions.txt'}", f"--model={BASE}", "--temperature=0", "--template=no")
    assert [line.partition(" (")[0] for line in out.splitlines() if line.startswith("---")] == ["--- 12+34=?", "--- 11+11=?"]
    assert "<think>\n1" not in out  # this template opens no thought


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--question= "], "question=' ' asks nothing: write --question="),
        (["--question=FILE:EMPTY"], "asks nothing"),
        (["--question=1+1=?", "--k=2", "--temperature=0"], "k=2 samples are all the same with temperature=0"),
        (["--question=1+1=?", "--out_dir=NOWHERE"], "there is no checkpoint"),
        (["--question=1+1=?", "--model=NOWHERE"], "there is no model folder"),
        (["--question=1+1=?", f"--model={BASE}", "--template=nope"], "template='nope': choose one of own, qwen"),
        (["--question=" + "1" * 300, f"--model={BASE}"], "a question has 302 tokens, its template counted, and the model's"),
        (["--question=1+1=?", f"--model={BASE}", "--answer=2", "--grader=NOWHERE"], "nowhere"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(ask, tmp_path, argv, words):
    (tmp_path / "empty.txt").write_text("\n \n")
    argv = [a.replace("NOWHERE", str(tmp_path / "nowhere")).replace("EMPTY", str(tmp_path / "empty.txt")) for a in argv]
    with pytest.raises(UserError) as e:
        ask(*argv)
    assert words in str(e.value) and str(e.value).count("\n") == 0


@pytest.mark.slow
def test_the_command():
    """As a process: the exit code, and a missing file in one line."""
    argv = [sys.executable, os.path.join(ROOT, "sample.py"), "--question=FILE:nowhere.txt"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {os.path.join(ROOT, 'nowhere.txt')}: No such file or directory\n")
