"""prepare.py gsm8k, on rows in GSM8K's format that are our own."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from configurator import UserError
from data import load_problems, load_templates
from reward import Verifier
from runtime.preflight import check_traces
from runtime.tokenizer import load_tokenizer

ROWS = [  # question, answer as GSM8K writes it, the trace's thought, the ground truth
    ("Ada has 3 bags of 12 nuts. How many nuts?", "She has 3*12=<<3*12=36>>36 nuts.\n#### 36", "She has 3*12=36 nuts.", "36"),
    ("A car costs $9,000, a van twice that. Both?", "The van costs 9000*2=$<<9000*2=18000>>18,000\nBoth cost"
     " $<<9000+18000=27000>>27,000\n#### 27,000", "The van costs 9000*2=$18,000\nBoth cost $27,000", "27000"),
    ("It is 4 degrees and falls by 9. What is it?", "4 < 9, so it is 4-9=<<4-9=-5>>-5.\n#### -5",
     "4 < 9, so it is 4-9=-5.", "-5"),
]  # fmt: skip


def lines(path, rows=ROWS):
    path.write_text("".join(json.dumps({"question": r[0], "answer": r[1]}) + "\n" for r in rows))
    return path


def table(path, rows=ROWS):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{"question": r[0], "answer": r[1]} for r in rows]), path)
    return path


def call(src, out):
    prepare.main(prepare.parse(["gsm8k", f"--src={src}", f"--out={out}"]))
    return pq.read_table(out).to_pylist()


def authors(folder):
    """The folder of the authors' repository: other files are beside the two."""
    lines(folder / "train.jsonl")
    lines(folder / "test.jsonl", ROWS[:1])
    (folder / "train_socratic.jsonl").write_text("not read")
    return folder


def hub(folder):
    """A clone of the hub's data set: two configs."""
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        table(folder / "main" / f"{split}-00000-of-00001.parquet", rows)
        table(folder / "socratic" / f"{split}-00000-of-00001.parquet", [])
    return folder


@pytest.mark.parametrize("source", [authors, hub])
def test_solutions_become_traces(tmp_path, capsys, source):
    (tmp_path / "src").mkdir()
    out = tmp_path / "d" / "gsm8k.parquet"
    rows = call(source(tmp_path / "src"), out)
    assert sorted(os.listdir(out.parent)) == ["gsm8k.parquet", "gsm8k.test.parquet"]
    assert pq.read_schema(out) == prepare.SCHEMA
    for row, (question, _, thought, answer) in zip(rows, ROWS, strict=True):
        system, user = row["prompt"]
        assert system == {"role": "system", "content": load_templates()["system"]}
        assert user == {"role": "user", "content": question} and row["reward_model"]["ground_truth"] == answer
        assert [m["content"] for m in row["target"]] == [f"<think>\n{thought}\n</think>\n\\boxed{{{answer}}}"]
    (test,) = pq.read_table(out.parent / "gsm8k.test.parquet").to_pylist()
    assert test["target"] is None and {**test, "target": 0} == {**rows[0], "target": 0, "extra_info": test["extra_info"]}
    shown = capsys.readouterr().out
    assert "train: 3 questions; the verifier accepts 3 of 3 solutions" in shown and "test: 1 questions" in shown


@pytest.mark.parametrize("make", [lines, table])
def test_one_file_is_the_training_set(tmp_path, make):
    rows = call(make(tmp_path / "any.name"), tmp_path / "d" / "x.parquet")
    assert len(rows) == 3 and os.listdir(tmp_path / "d") == ["x.parquet"]


def test_training_takes_the_traces(tmp_path, byte_model, script):
    """As train.py reads them, all verify before its first step."""
    call(lines(tmp_path / "rows.jsonl"), tmp_path / "x.parquet")
    tokenizer, shown = load_tokenizer(byte_model), []
    problems = load_problems(tmp_path / "x.parquet", tokenizer, log=shown.append)
    assert "3 problems, 3 with a teacher trace; dropped: none" in shown[0]
    knobs = prepare.argparse.Namespace(**script("train", ["--min_teacher_pass=0.99"]).config)
    with Verifier(1) as verifier:
        check_traces(knobs, problems, tokenizer, verifier)


def test_a_trace_that_the_verifier_rejects_is_counted(tmp_path, capsys):
    rows = [*ROWS, ("What?", "No idea.\n#### }", "", "")]
    call(lines(tmp_path / "rows.jsonl", rows), tmp_path / "x.parquet")
    assert "the verifier accepts 3 of 4 solutions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer", ["She has 36.", "She has 36.\n####", "#### 36", "<<3*12=36>> \n#### 36", "", None]
)  # fmt: skip
def test_a_row_of_another_kind_ends_it(tmp_path, answer):
    src = lines(tmp_path / "rows.jsonl", [*ROWS, ("What?", answer, "", "")])
    with pytest.raises(UserError, match=r"rows\.jsonl row 3: its answer ends in .*, not in '#### 72'"):
        call(src, tmp_path / "d" / "x.parquet")
    assert os.listdir(tmp_path / "d") == []


def test_mistakes(tmp_path):
    out = tmp_path / "x.parquet"
    src = authors(tmp_path)
    for source, words in (("/no/such", "there is no data file /no/such"), ("openai/gsm8k:main", "name the data set alone"),
                          ("openai/gsm8k", "datasets loads no openai/gsm8k:main:"), (out.parent / "empty", "has no row"),
                          (tmp_path / "x", "none of main/train-")):  # fmt: skip
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "empty").write_text("")
        with pytest.raises(UserError, match=words) as error:
            call(source, out)
        assert "\n" not in str(error.value)
    (src / "test.jsonl").unlink()
    with pytest.raises(UserError, match="none of main/test-"):
        call(src, out)
    with pytest.raises(UserError, match=r"ends in \.parquet"):
        call(src, tmp_path / "x.jsonl")
    lines(src / "test.jsonl")
    (tmp_path / "x.test.parquet").write_text("mine")
    with pytest.raises(UserError, match=r"x\.test\.parquet exists"):
        call(src, out)
    assert (tmp_path / "x.test.parquet").read_text() == "mine" and not out.exists()
