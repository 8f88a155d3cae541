"""The code in docs/data.md and README.md runs as it is printed there."""

import json
import os
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from helpers import build_model, rollouts_of, run

from configurator import ROOT
from data import load_problems
from reward import Verifier
from runtime.tokenizer import load_tokenizer


def code_under(heading, page="docs/data.md", language="python"):
    text = open(os.path.join(ROOT, page)).read()
    section = text[text.index(f"## {heading}\n") :]
    return re.search(rf"```{language}\n(.*?)```", section, re.S)[1]


def test_own_questions_and_own_reward_in_ten_lines(tmp_path):
    """README's two questions are read, its grader finds the trace right and another answer wrong."""
    part = "Your own questions, your own reward"
    questions, grader = code_under(part, "README.md", "json"), code_under(part, "README.md")
    assert grader == "# mine.py\n" + code_under("Your own reward")
    assert sum(line != "" for line in (questions + grader.partition("\n")[2]).splitlines()) <= 10
    (tmp_path / "mine.jsonl").write_text(questions)
    (tmp_path / "mine.py").write_text(grader)
    tokenizer = load_tokenizer(str(build_model(tmp_path / "model")))
    tokenizer.chat_template = "{{ messages[-1].content + '<think>\n' }}"
    one, two = load_problems(str(tmp_path / "mine.jsonl"), tokenizer)
    trace = tokenizer.decode(one.teacher[0]).removesuffix(tokenizer.eos_token)
    with Verifier(1, 5.0, True, str(tmp_path / "mine.py")) as verifier:
        verdicts = verifier.score([trace, trace], [one.answer, two.answer])
    assert [v.reward for v in verdicts] == [1.0, 0.0] and two.teacher == []


def test_questions_with_a_hint(script, tmp_path):
    """QuestA's file drops questions whose answer is not in the text; it can be trained on. POPE's has each question twice."""
    code, names = code_under("Questions with a hint"), {}
    assert sum(line != "" for line in code.splitlines()) <= 11
    exec(code, names)
    source = os.path.join(ROOT, "toy", "train.parquet")
    rows = pq.read_table(source).to_pylist()
    chain = lambda trace: trace.removeprefix("<think>\n")
    right = [r for r in rows if f"{{{r['reward_model']['ground_truth']}}}" in r["target"][0]["content"]]
    for both, name in ((False, "questa"), (True, "pope")):
        out = tmp_path / f"{name}.parquet"
        names["add_hints"](source, str(out), 0.5, mark="", solution=chain, both=both)
        made = pq.read_table(out).to_pylist()
        assert len(right) <= len(made) / (1 + both) < len(rows)
        for i, row in enumerate(made):
            text, question = chain(row["target"][0]["content"]), row["prompt"][-1]["content"]
            assert question.partition("?")[2] == ("" if both and i % 2 == 0 else text[: len(text) // 2])
    run(script, tmp_path, "x", f"--data={tmp_path / 'questa.parquet'}", "--n_teacher=0", "--max_steps=1")
    prompts = [r["prompt"] for r in rollouts_of(tmp_path / "x", 1)]
    assert len(prompts) == 128 and all("=?" in p and ">" in p.partition("=?")[2].partition("<think>")[0] for p in prompts)


@pytest.mark.slow
def test_own_questions_and_own_reward(tmp_path):
    """A file of JSON lines, and a verifier of ten lines; training and evaluation accept both."""
    assert sum(line != "" for line in code_under("Your own reward").splitlines()) <= 10
    rows = pq.read_table(os.path.join(ROOT, "toy", "train.parquet")).to_pylist()[:40]
    with open(tmp_path / "questions.jsonl", "w") as f:
        for i, row in enumerate(rows):
            trace = {"trace": row["target"][0]["content"]} if i % 2 else {}
            line = {
                "question": row["prompt"][0]["content"],
                "answer": int(row["reward_model"]["ground_truth"]),
                "data_source": "mine",
            }
            f.write(json.dumps(line | trace) + "\n")
    (tmp_path / "mine.py").write_text(code_under("Your own reward"))
    common = [f"--grader={tmp_path / 'mine.py'}", "--sampler=torch", "--max_tokens=40"]
    file = tmp_path / "questions.jsonl"

    def call(script, *argv):
        done = subprocess.run([sys.executable, os.path.join(ROOT, script), *argv, *common], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    out = call(
        "train.py",
        f"--data={file}",
        "--eval_data=",
        "--max_steps=2",
        "--prompts_per_step=4",
        "--min_teacher_pass=0.4",
        f"--out_dir={tmp_path / 'run'}",
    )
    assert "40 problems, 20 with a teacher trace" in out
    rollouts = [json.loads(line) for line in open(tmp_path / "run" / "rollouts" / "step_1.jsonl")]
    grade = {}
    exec(code_under("Your own reward"), grade)
    assert len(rollouts) == 32
    for r in rollouts:  # the page's verdict, not math-verify's
        text = r["response"].removesuffix("<eos>").split("</think>")[1:2]
        assert r["reward"] == (float(grade["grade"](text[0], r["answer"])) if text else 0.0)
    out = call("eval.py", f"--data={file}", f"--model={tmp_path / 'run' / 'ckpt_2'}", f"--out_dir={tmp_path / 'eval'}", "--k=2")
    assert json.load(open(tmp_path / "eval" / "eval.json"))["mine"]["n"] == 40
