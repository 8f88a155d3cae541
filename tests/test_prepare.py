import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import build
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import BAD, build_model, killed_runs, lines_of, openr1_row, openr1_trace, write_openr1
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

import prepare
from configurator import ROOT, UserError
from data import load_problems, load_templates
from reward import graded_text
from rollout import TorchSampler
from runtime.files import load_config
from runtime.preflight import check_models
from runtime.rows import read_rows
from runtime.tensors import tensor_files
from runtime.tokenizer import load_tokenizer, render_prompt, response_text

SYSTEM = load_templates()["system"]


def command(*argv, code=0):
    """Run prepare.py as a user does. Returns its stdout, or after a mistake its stderr."""
    done = subprocess.run([sys.executable, "prepare.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") <= 2, done.stderr
    return done.stderr if code else done.stdout


def call(*argv):
    """The same in this process, for speed."""
    prepare.main(prepare.parse([str(a) for a in argv]))


# ---------------------------------------------------------------- openr1

ROWS = [  # rows as OpenR1 has them, and some that no file should have
    openr1_row("plain", [openr1_trace(100), openr1_trace(90)]),  # 0
    openr1_row("second", [openr1_trace(100), openr1_trace(90)], correct=[False, True]),  # 1
    openr1_row("incomplete", [openr1_trace(100)], complete=False),  # 2
    openr1_row("both", [openr1_trace(100)], correct=False, complete=[False]),  # 3
    openr1_row(None, [openr1_trace(50)]),  # 4
    openr1_row("  \u200b\n", [openr1_trace(50)]),  # 5
    openr1_row("no answer", [openr1_trace(50)], answer=None),  # 6
    openr1_row("no answer", [openr1_trace(50)], answer=" "),  # 7
    openr1_row("no answer", [openr1_trace(50)]),  # 8: the first usable row of this problem
    openr1_row("null list", None),  # 9
    openr1_row("empty list", []),  # 10
    openr1_row("no flags", [openr1_trace(50)], correct=None, correctness_math_verify=None),  # 11
    openr1_row("few flags", [openr1_trace(50), openr1_trace(50)], complete=[True]),  # 12
    openr1_row("null trace", [None, openr1_trace(60)]),  # 13
    openr1_row("null flags", [openr1_trace(60)], correct=[None]),  # 14
    openr1_row("limit", [openr1_trace(199)]),  # 15: 200 with EOS
    openr1_row("over", [openr1_trace(200), openr1_trace(201)]),  # 16
    openr1_row("huge", ["<think>\n" + "y" * 500_000 + "</think>"]),  # 17
    openr1_row(f"bad {BAD}", [openr1_trace(50)]),  # 18
    openr1_row("bad answer", [openr1_trace(50)], answer=BAD),  # 19
    openr1_row("bad trace", [f"<think>\n{BAD}</think>", openr1_trace(70)]),  # 20
    openr1_row("plain", [openr1_trace(40)]),  # 21: a duplicate
    openr1_row("open", ["<think>\nforever", ""]),  # 22
    openr1_row("bare", ["so</think>\\boxed{1}"]),  # 23
    openr1_row("glued", [" <think>so</think>\\boxed{1}"]),  # 24
    openr1_row("Größe \u2028 \x00 ∞?", [openr1_trace(100)]),  # 25
    openr1_row("ends", ["<think>\na<|endoftext|>b</think>", "<think>\u200b</think>", "So <think>\n1</think>",
                        openr1_trace(80) + "<|endoftext|>\n"]),  # 26
]  # fmt: skip
KEPT = {0: [100], 1: [90], 8: [50], 13: [60], 15: [199], 20: [70], 23: [27], 24: [27], 25: [100], 26: [80]}  # row: tokens
WITHOUT = [2, 3, 9, 10, 11, 12, 14, 16, 17, 22]


def test_every_odd_row_is_counted(tmp_path, byte_model):
    source = write_openr1(tmp_path / "raw.parquet", ROWS, row_group_size=5)
    out = tmp_path / "d" / "openr1.parquet"
    shown = command("openr1", f"--src={source}", f"--out={out}", f"--tokenizer={byte_model}", "--max_tokens=200")
    names = {
        f"openr1.{x}" for x in ("parquet", "complement.parquet", "easy.parquet", "hard.parquet", "sft.jsonl", "report.json")
    }
    assert set(os.listdir(out.parent)) == names
    report = json.loads((out.parent / "openr1.report.json").read_text())
    counts = report["counts"]
    want = {
        "rows read": 27, "rows in out": 10, "rows in easy": 10, "rows in hard": 10, "rows in complement": 10,
        "row without: no generations": 2, "row without: lists of different lengths": 2, "row without: no usable trace": 6,
        "row dropped: not UTF-8": 2, "row dropped: no problem": 2, "row dropped: no answer": 2,
        "row dropped: problem seen before": 1,
        "traces of rows not dropped": 28, "traces kept": 10, "traces behind the first usable one": 1,
        "trace dropped: lists of different lengths": 3, "trace dropped: null": 1, "trace dropped: not complete": 2,
        "trace dropped: not correct": 2, "trace dropped: not UTF-8": 1, "trace dropped: thought never closed": 2,
        "trace dropped: without text": 1,
        "trace dropped: with a control token inside": 1, "trace dropped: with a second <think>": 1,
        "trace dropped: too long": 3, "trace dropped: changed by the tokenizer": 0,
    }  # fmt: skip
    assert counts == want and tuple(counts) == prepare.COUNTS
    assert all(f"{what:<44}{n:>9,}" in shown for what, n in counts.items())
    assert report["max_tokens"] == 200 and report["src"] == str(source)
    rows_of = lambda prefix: sum(n for what, n in counts.items() if what.startswith(prefix))
    assert counts["rows read"] == counts["rows in out"] + counts["rows in complement"] + rows_of("row dropped")
    assert counts["rows in complement"] == rows_of("row without")
    traces = counts["traces kept"] + counts["traces behind the first usable one"] + rows_of("trace dropped")
    assert counts["traces of rows not dropped"] == traces

    rows = [row for _, row in read_rows(str(out))]
    assert pq.read_schema(out) == build.SCHEMA == prepare.SCHEMA
    table = pq.read_table(out).to_pylist()
    assert [row["extra_info"] for row in table] == [{"index": i, "split": "default"} for i in KEPT]
    for i, row in zip(KEPT, rows, strict=True):
        assert row["prompt"] == [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ROWS[i]["problem"]}]
        assert len(row["target"]) == 1 and row["reward_model"] == {"ground_truth": "1", "style": "rule"}
    assert rows[-4]["target"][0]["content"] == rows[-3]["target"][0]["content"] == "<think>\nso</think>\\boxed{1}"
    rest = pq.read_table(tmp_path / "d" / "openr1.complement.parquet").to_pylist()
    assert [row["extra_info"]["index"] for row in rest] == WITHOUT and all(row["target"] is None for row in rest)

    conversations = [line["messages"] for line in lines_of(tmp_path / "d" / "openr1.sft.jsonl")]
    assert conversations == [[*row["prompt"], *row["target"]] for row in rows]

    # Training uses every trace, whether the prompt opens the thought or not.
    tokenizer, shown = load_tokenizer(byte_model), []
    for template, stripped in ((tokenizer.chat_template, 8), ("{{ messages[-1].content }}", 0)):
        tokenizer.chat_template = template
        problems = load_problems(str(out), tokenizer, max_teacher_tokens=200, log=shown.append, require_think=bool(stripped))
        assert [[len(t) for t in p.teacher] for p in problems] == [[n + 1 - stripped for n in ns] for ns in KEPT.values()]
    assert len(shown) == 2 and all(line.endswith("10 with a teacher trace; dropped: none") for line in shown)
    held_out = str(tmp_path / "d" / "openr1.complement.parquet")
    complement = load_problems(held_out, tokenizer, log=shown.append, require_think=False)
    assert len(complement) == 10


def test_all_traces_and_subsets(tmp_path, byte_model):
    tokens = {"a": (2047, 3000, 9000, 30), "b": (2048, 10), "c": (4096, 8191), "d": (8192,)}
    rows = [openr1_row(problem, list(map(openr1_trace, lengths))) for problem, lengths in tokens.items()]
    (tmp_path / "raw").mkdir()
    write_openr1(tmp_path / "raw" / "train-0.parquet", rows[:2])
    write_openr1(tmp_path / "raw" / "train-1.parquet", rows[2:])
    lengths = {}
    for traces in ("first", "all"):
        out = tmp_path / f"{traces}.parquet"
        call("openr1", f"--src={tmp_path / 'raw'}", f"--out={out}", f"--tokenizer={byte_model}", f"--traces={traces}")
        for name in (traces, f"{traces}.easy", f"{traces}.hard"):
            rows = pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
            lengths[name] = {r["extra_info"]["index"]: [len(m["content"]) for m in r["target"]] for r in rows}
        assert (tmp_path / f"{traces}.sft.jsonl").read_text().count("\n") == sum(map(len, lengths[traces].values()))
    assert lengths["first"] == {0: [2047], 1: [2048], 2: [4096]} and lengths["first.easy"] == {0: [2047]}
    assert lengths["first.hard"] == {0: [2047], 1: [2048]}
    assert lengths["all"] == {0: [2047, 3000, 30], 1: [2048, 25], 2: [4096, 8191]}


@pytest.mark.parametrize("tags", ["drop", "open"])
def test_traces_without_tags(tmp_path, byte_model, tags):
    write_openr1(tmp_path / "raw.parquet", [openr1_row("a", [openr1_trace(40)])])
    out, want = tmp_path / "o.parquet", openr1_trace(40).removeprefix("<think>\n")
    call("openr1", f"--src={tmp_path / 'raw.parquet'}", f"--out={out}", f"--tokenizer={byte_model}", f"--tags={tags}")
    want = want.replace("</think>", "") if tags == "drop" else want
    (row,) = pq.read_table(out).to_pylist()
    assert row["target"] == [{"content": want, "role": "assistant"}]
    tokenizer = load_tokenizer(byte_model)
    tokenizer.chat_template = "{{ messages[-1].content }}"  # a prompt that opens no thought: the trace is learnt as it is
    (problem,) = load_problems(str(out), tokenizer, require_think=False, log=lambda line: None)
    assert [tokenizer.decode(ids[:-1]) for ids in problem.teacher] == [want]


def test_openr1_mistakes_leave_nothing(tmp_path, byte_model, monkeypatch):
    good, out = write_openr1(tmp_path / "good.parquet", ROWS[:1]), tmp_path / "out" / "a.parquet"
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-500])
    table = pq.read_table(good)
    pq.write_table(table.drop_columns("answer"), tmp_path / "lacks.parquet")
    flat = table.set_column(table.schema.get_field_index("generations"), "generations", pa.array(["</think>"]))
    pq.write_table(flat, tmp_path / "flat.parquet")
    (tmp_path / "none").mkdir()
    many = [openr1_row(str(i), [openr1_trace(90)]) for i in range(2000)]
    whole = write_openr1(tmp_path / "damaged.parquet", many, row_group_size=1000)
    content = bytearray(whole.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40_000] = b"\xff" * 40_000
    whole.write_bytes(content)
    asked = []
    monkeypatch.setattr(prepare, "snapshot_download", lambda name, **o: asked.append((name, o)) or str(tmp_path / "none"))
    (tmp_path / "taken.easy.parquet").touch()
    for src, changes, words in (
        ("missing.parquet", {}, "there is no data file .*missing.parquet"),
        ("cut.parquet", {}, "cut.parquet is not a whole parquet"),
        ("lacks.parquet", {}, "lacks.parquet: column 'answer' is missing"),
        ("flat.parquet", {}, "column 'generations' is string"),
        ("none", {}, "no parquet file in .*none"),
        ("damaged.parquet", {}, r"damaged.parquet is damaged after row \d+ "),
        ("good.parquet", {"out": tmp_path / "a.json"}, "ends in .parquet"),
        ("good.parquet", {"out": tmp_path / "taken.parquet"}, "taken.easy.parquet exists"),
        ("good.parquet", {"max_tokens": 20}, "no trace of .*good.parquet is usable"),
        ("good.parquet", {"max_tokens": 0}, "max_tokens=0 must be above zero"),
        ("good.parquet", {"tokenizer": tmp_path / "none"}, "none has no tokenizer"),
        ("good.parquet", {"tokenizer": tmp_path / "nowhere"}, "there is no model folder"),
    ):  # fmt: skip
        options = {"src": tmp_path / src, "out": out, "tokenizer": byte_model, **changes}
        with pytest.raises(UserError, match=words):
            call("openr1", *(f"--{key}={value}" for key, value in options.items()))
        assert not os.path.exists(out.parent) or not os.listdir(out.parent)
    assert not asked
    with pytest.raises(UserError, match="there is no data file .*none/data"):  # one slash and no such path: a name on the hub
        call("openr1", f"--tokenizer={byte_model}", f"--out={out}")
    assert asked == [("open-r1/OpenR1-Math-220k", {"repo_type": "dataset", "allow_patterns": "data/train-*.parquet"})]
    monkeypatch.setattr(prepare.json, "dump", lambda *args, **options: 1 / 0)  # interrupted at the very end
    with pytest.raises(ZeroDivisionError):
        call("openr1", f"--src={good}", f"--out={out}", f"--tokenizer={byte_model}")
    assert os.listdir(out.parent) == []
    assert not any(name.endswith(".partial") for _, _, names in os.walk(tmp_path) for name in names)


@pytest.mark.parametrize("links", [True, False])
def test_openr1_overwrites_nothing(tmp_path, byte_model, monkeypatch, links):
    """Neither a link that leads nowhere, nor a file that appears during the work, nor what another command is writing."""
    source = write_openr1(tmp_path / "raw.parquet", ROWS[:1])
    convert = lambda name: call("openr1", f"--src={source}", f"--out={tmp_path / 'd' / name}", f"--tokenizer={byte_model}")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    (tmp_path / "d").mkdir()
    os.symlink("nowhere", tmp_path / "d" / "y.hard.parquet")
    with pytest.raises(UserError, match="y.hard.parquet exists"):
        convert("y.parquet")
    os.remove(tmp_path / "d" / "y.hard.parquet")
    real, told = prepare.traces_of, []

    def traces_of(*arguments):
        if not told and (child := os.fork()) == 0:
            try:
                convert("y.easy.parquet")
            except UserError as e:
                os._exit("y.easy.parquet is in use by prepare.py, process" in str(e))
            os._exit(2)
        told.append(told or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return real(*arguments)

    monkeypatch.setattr(prepare, "traces_of", traces_of)
    convert("y.parquet")
    assert told[0] == 1 and sorted(os.listdir(tmp_path / "d"))[:2] == ["y.complement.parquet", "y.easy.parquet"]

    def appears(*arguments):
        (tmp_path / "d" / "z.parquet").write_text("mine")
        return real(*arguments)

    monkeypatch.setattr(prepare, "traces_of", appears)
    with pytest.raises(UserError, match="z.parquet exists"):
        convert("z.parquet")
    assert (tmp_path / "d" / "z.parquet").read_text() == "mine" and len(os.listdir(tmp_path / "d")) == 7


def test_a_full_disk_is_named(tmp_path, byte_model, monkeypatch):
    source, out = write_openr1(tmp_path / "raw.parquet", ROWS[:1]), tmp_path / "d" / "y.parquet"
    argv = ["openr1", f"--src={source}", f"--out={out}", f"--tokenizer={byte_model}"]
    full = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    for function in ("runtime.folder.Lock.sign", "prepare.pq.ParquetWriter.write_table"):
        with monkeypatch.context() as m, pytest.raises(UserError, match="No space left on device") as e:
            m.setattr(function, full)
            call(*argv)
        assert str(tmp_path / "d" / "y.") in str(e.value) and os.listdir(tmp_path / "d") == []


def test_the_command_line_answers_in_two_lines():
    assert "openr1" in command("--help") and "--max_tokens" in command("openr1", "--help")
    for argv, words in (
        ([], "arguments are required: COMMAND"),
        (["openr2"], "invalid choice: 'openr2'"),
        (["openr1"], "required: --tokenizer"),
        (["openr1", "--tokenizer=a/b", "--traces=two"], "invalid choice: 'two' \\(choose from"),
        (["openr1", "--tokenizer=a/b", "--max_tokens=many"], "invalid int value: 'many'"),
        (["model", "--model=a/b", "--out=c", "--rope=3"], "unrecognized arguments: --rope=3"),
    ):  # fmt: skip
        message = command(*argv, code=2)
        assert re.search(words, message), message


# ---------------------------------------------------------------- reanswer

GRADER = """
import re

def grade(text, answer):
    return 1.0 if int(re.findall(r"\\d+", text)[-1]) % 2 == 0 else 0.1
"""


@pytest.fixture
def reanswer(tmp_path):
    """Arguments for a teacher that is the toy's base, and a verifier that accepts even numbers; others get 0.1."""
    (tmp_path / "even.py").write_text(GRADER)
    rows = pq.read_table(os.path.join(ROOT, "toy", "train.parquet")).slice(0, 60)
    pq.write_table(rows, tmp_path / "old.parquet")
    common = [f"--model={ROOT}/toy/base", f"--data={tmp_path / 'old.parquet'}", f"--grader={tmp_path / 'even.py'}", "--k=3",
              "--chunk=12", "--max_tokens=40", "--temperature=1.0", "--sampler=torch"]  # fmt: skip
    return lambda out, *argv: ["reanswer", *common, f"--out={tmp_path / out}", *argv]


def test_the_settings_name_the_sampler_that_auto_is(tmp_path, reanswer, monkeypatch):
    """Samples of two samplers must not be mixed: a run under "auto" that continues where vLLM is missing is another."""
    noted = []
    monkeypatch.setattr(prepare, "choose_sampler", lambda knob: f"what {knob} is here")
    monkeypatch.setattr(prepare, "settings_of", lambda *a, sampler, **k: noted.append(sampler) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(*reanswer("new.parquet", "--sampler=auto"))
    assert noted == ["what auto is here"]


def test_new_traces_are_the_verified_samples(tmp_path, reanswer, tokenizer, capsys):
    call(*reanswer("new.parquet"))
    assert sorted(f for f in os.listdir(tmp_path) if f.startswith("new")) == [
        "new.complement.parquet",
        "new.parquet",
        "new.report.json",
    ]
    counts = json.loads((tmp_path / "new.report.json").read_text())["counts"]
    kept, rest = (pq.read_table(tmp_path / f"new{s}.parquet").to_pylist() for s in ("", ".complement"))
    old = pq.read_table(tmp_path / "old.parquet").to_pylist()
    assert counts["problems"] == 60 == len(kept) + len(rest) and counts["problems with a trace"] == len(kept)
    assert counts["samples"] == 180 and counts["samples kept"] == sum(len(r["target"]) for r in kept) and rest
    assert counts["samples"] - counts["samples kept"] == sum(
        n for kind, n in counts.items() if kind.startswith("sample dropped")
    )
    for row in kept + rest:
        before = old[row["extra_info"]["index"]]
        assert (row["prompt"], row["reward_model"], row["data_source"]) == (before["prompt"], before["reward_model"], "toy")
    for message in (m for r in kept for m in r["target"]):
        assert message["content"].startswith("<think>\n") and int(re.findall(r"\d+", message["content"])[-1]) % 2 == 0
    assert all(r["target"] is None for r in rest)
    problems = load_problems(str(tmp_path / "new.parquet"), tokenizer, log=print)
    assert all(ids[-1] == tokenizer.eos_token_id for p in problems for ids in p.teacher)
    with pytest.raises(UserError, match="new.parquet exists: remove it"):
        call(*reanswer("new.parquet"))


def test_unfinished_work_of_other_settings_is_kept_apart(tmp_path, reanswer, monkeypatch, capsys):
    """A run that stops half-way leaves no file. One with other settings starts anew and keeps the first one's work."""
    monkeypatch.setattr(prepare, "write_answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(*reanswer("new.parquet"))
    assert {f for f in os.listdir(tmp_path) if "new" in f} == {"new.work"}
    monkeypatch.undo()
    call(*reanswer("new.parquet", "--k=2"))
    assert "held work with other settings (k): moved to" in capsys.readouterr().out
    assert len(os.listdir(tmp_path / "new.work" / "before_1" / "samples")) == 15
    assert sorted(os.listdir(tmp_path / "new.work")) == [".lock", "before_1"]
    assert json.loads((tmp_path / "new.report.json").read_text())["counts"]["samples"] == 120


def test_what_a_resumed_run_must_notice(tmp_path, reanswer, monkeypatch, capsys):
    """Moved rows and an edited grader: the samples so far belong to something else."""

    def stop_and_change(change):
        monkeypatch.setattr(prepare, "write_answers", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(*reanswer("new.parquet"))
        change()
        capsys.readouterr()
        with pytest.raises(ZeroDivisionError):
            call(*reanswer("new.parquet"))
        monkeypatch.undo()
        return capsys.readouterr().out

    def shift():
        rows = pq.read_table(tmp_path / "old.parquet")
        empty = rows.slice(0, 1).to_pylist()[0] | {"reward_model": {"ground_truth": "", "style": "rule"}}
        pq.write_table(pa.concat_tables([pa.Table.from_pylist([empty], rows.schema), rows]), tmp_path / "old.parquet")

    assert "other settings (problems): moved" in stop_and_change(shift)
    assert "other settings (grader): moved" in stop_and_change(lambda: (tmp_path / "even.py").write_text(GRADER + "\n"))
    call(*reanswer("new.parquet"))
    written_rows = [r for s in ("", ".complement") for r in pq.read_table(tmp_path / f"new{s}.parquet").to_pylist()]
    assert sorted(r["extra_info"]["index"] for r in written_rows) == list(range(1, 61))


def test_rows_that_change_while_they_are_answered(tmp_path, reanswer, monkeypatch):
    """Their answers would stand beside other questions."""
    old, real = (tmp_path / "old.parquet").read_bytes(), prepare.work_through

    def swap(*arguments):
        real(*arguments)
        rows = pq.read_table(tmp_path / "old.parquet").to_pylist()
        pq.write_table(pa.Table.from_pylist(rows[::-1], build.SCHEMA), tmp_path / "old.parquet")

    monkeypatch.setattr(prepare, "work_through", swap)
    with pytest.raises(UserError, match="old.parquet has changed while it was answered: restore it, and the same command"):
        call(*reanswer("new.parquet"))
    assert not (tmp_path / "new.parquet").exists()
    monkeypatch.undo()
    (tmp_path / "old.parquet").write_bytes(old)
    call(*reanswer("new.parquet"))
    assert (tmp_path / "new.parquet").exists()


def test_files_of_others_are_never_overwritten(tmp_path, reanswer, monkeypatch):
    """Also not where unfinished work is found; except after a kill between the run's own two renames."""
    monkeypatch.setattr(prepare, "write_answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(*reanswer("new.parquet"))
    monkeypatch.undo()
    (tmp_path / "new.parquet").write_text("mine")
    with pytest.raises(UserError, match="new.parquet exists"):
        call(*reanswer("new.parquet"))
    assert (tmp_path / "new.parquet").read_text() == "mine"
    os.remove(tmp_path / "new.parquet")

    # Between the two calls for one file, and between two files.
    for function, at in (("remove", "new.work.complement.partial"), ("link", "new.work.out.partial")):
        real = getattr(os, function)

        def killed(path, *more, real=real, at=at):
            if str(path).endswith(at):
                raise KeyboardInterrupt
            real(path, *more)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(os, function, killed)
            call(*reanswer("new.parquet"))
    call(*reanswer("new.parquet"))
    call(*reanswer("other.parquet"))
    assert written(tmp_path, "new") == written(tmp_path, "other") and not os.path.exists(tmp_path / "new.work")


def test_what_appears_during_the_work_is_not_overwritten(tmp_path, reanswer, monkeypatch):
    """Nothing of the work is lost: once the file is away, the same command ends at once. With other settings it does not."""
    real = prepare.write_answers

    def write_answers(*arguments):
        (tmp_path / "new.parquet").write_text("mine")
        return real(*arguments)

    monkeypatch.setattr(prepare, "write_answers", write_answers)
    with pytest.raises(UserError, match="new.parquet exists"):
        call(*reanswer("new.parquet"))
    monkeypatch.setattr(prepare, "write_answers", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="new.parquet exists"):
        call(*reanswer("new.parquet"))
    assert (tmp_path / "new.parquet").read_text() == "mine"
    os.remove(tmp_path / "new.parquet")
    call(*reanswer("new.parquet"))
    assert pq.read_table(tmp_path / "new.parquet").num_rows and not os.path.exists(tmp_path / "new.work")


def test_two_at_once_share_no_file(tmp_path, reanswer, monkeypatch):
    """The one's complement is the other's --out: whoever is later keeps its work, and writes its own rows."""
    real = prepare.write_answers

    def write_answers(*arguments):
        counts = real(*arguments)
        monkeypatch.setattr(prepare, "write_answers", real)
        call(*reanswer("new.complement.parquet", "--k=1"))  # while the first one's files are half-way
        return counts

    monkeypatch.setattr(prepare, "write_answers", write_answers)
    with pytest.raises(UserError, match="new.complement.parquet exists"):
        call(*reanswer("new.parquet"))
    os.remove(tmp_path / "new.complement.parquet")
    call(*reanswer("new.parquet"))
    call(*reanswer("other.parquet"))
    assert written(tmp_path, "new") == written(tmp_path, "other")


def test_files_of_other_settings_are_not_overwritten(tmp_path, reanswer, monkeypatch):
    real = os.link
    monkeypatch.setattr(os, "link", lambda partial, path: 1 / 0 if path.endswith("new.parquet") else real(partial, path))
    with pytest.raises(ZeroDivisionError):
        call(*reanswer("new.parquet"))
    with pytest.raises(UserError, match="new.complement.parquet exists"):
        call(*reanswer("new.parquet", "--k=2"))


def test_nothing_kept_is_nothing_written(tmp_path, reanswer):
    (tmp_path / "even.py").write_text("def grade(text, answer):\n    return 0")
    with pytest.raises(UserError, match="no sample was kept, so nothing is written"):
        call(*reanswer("new.parquet"))
    assert {f for f in os.listdir(tmp_path) if "new" in f} == {"new.work"}


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--out=x.csv"], "--out=x.csv: name a file that ends in .parquet"),
        (["--k=0"], "k=0 must be above zero"),
        (["--data=nowhere.parquet"], "there is no data file"),
        (["--model=nowhere"], "there is no model folder"),
        (["--grader=foo"], "grader='foo'"),
        (["--tensor_parallel=2"], "tensor_parallel=2 must divide"),
    ],
)
def test_reanswers_mistakes_leave_nothing(tmp_path, reanswer, argv, words):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=words):
        call(*reanswer("new.parquet", *argv))
    assert sorted(os.listdir(tmp_path)) == before


def written(tmp_path, name):
    return [(tmp_path / f"{name}{s}.parquet").read_bytes() for s in ("", ".complement")]


@pytest.mark.slow
def test_two_ranks_write_the_same(tmp_path, reanswer):
    call(*reanswer("one.parquet"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "prepare.py"]
    subprocess.run([*launch, *reanswer("two.parquet")], cwd=ROOT, check=True, capture_output=True)
    assert written(tmp_path, "one") == written(tmp_path, "two")


@pytest.mark.slow
@pytest.mark.parametrize("sampler,kills", [("torch", 10), ("vllm", 3)])
def test_reanswer_killed_again_and_again(tmp_path, reanswer, sampler, kills):
    more = [f"--sampler={sampler}", f"--data={ROOT}/toy/train.parquet", "--chunk=24"]  # 512 problems, 64 chunks
    command(*reanswer("undisturbed.parquet", *more))
    line = [sys.executable, os.path.join(ROOT, "prepare.py"), *reanswer("killed.parquet", *more)]
    assert killed_runs(line, tmp_path / "killed.work" / "samples", 64, kills) == kills
    assert written(tmp_path, "undisturbed") == written(tmp_path, "killed")


# ---------------------------------------------------------------- model


def edit(folder, name="config.json", **changes):
    path = folder / name
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if (folder / name).is_file()}


@torch.no_grad()
def logits(folder, ids):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits


def test_a_qwen_gets_luffys_template_and_room(tmp_path):
    source, out = build_model(tmp_path / "base"), tmp_path / "deep" / "luffy"
    edit(source, rope_parameters=None, rope_theta=10000, transformers_version="4.40.0")  # as Qwen2.5-Math has it
    edit(source, "generation_config.json", eos_token_id=[258, 256])
    os.remove(source / "chat_template.jinja")
    edit(source, "tokenizer_config.json", chat_template="the old one")
    (source / "pytorch_model.bin").touch()
    (source / "original").mkdir()
    before = contents(source)
    shown = command("model", f"--model={source}", f"--out={out}", "--max_position=1024", "--round_trip=False")
    assert contents(source) == before
    assert "rope_theta 10000" in shown and "-> 40000" in shown and "positions 512 -> 1024" in shown and f"wrote {out}" in shown
    assert "responses end at '<|endoftext|>' (256) or '<|im_start|>' (258), traces in '<|endoftext|>' (256)" in shown
    after = contents(out)
    assert os.listdir(tmp_path / "deep") == ["luffy"]
    assert set(after) == set(before) - {"pytorch_model.bin"} | {"chat_template.jinja"}
    assert all(after[n] == before[n] for n in ("model.safetensors", "tokenizer.json", "generation_config.json"))
    old, new = (json.loads(x["config.json"]) for x in (before, after))
    assert list(new) == list(old) and new == old | {"rope_theta": 40000.0, "max_position_embeddings": 1024}
    config = json.loads(after["tokenizer_config.json"])
    assert config["model_max_length"] == 1024 and config["chat_template"].encode() == after["chat_template.jinja"]

    tokenizer = load_tokenizer(str(out))
    user = {"role": "user", "content": "1+1?"}
    text = render_prompt(tokenizer, [user])
    assert text == render_prompt(tokenizer, [{"role": "system", "content": SYSTEM}, user])
    assert text == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert (logits(source, ids) - logits(out, ids)).abs().max() > 0.01


def test_a_llama_gets_its_own_template(tmp_path):
    """The paper's Llama: no system turn, no thought, unchanged positions and scaled RoPE, bfloat16, a head that is not tied."""
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64, "rope_theta": 1e4}  # fmt: skip
    source = build_model(tmp_path / "base", LlamaConfig, (), False, torch.bfloat16, rope_parameters=scaled)
    out = tmp_path / "llama"
    shown = command("model", f"--model={source}", f"--out={out}", "--max_position=0", "--template=llama", "--round_trip=False")
    assert "note: its RoPE scaling stays as it is" in shown and "note: it does not open a thought" in shown
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"] == scaled | {"rope_theta": 40000.0} and "rope_theta" not in config
    assert config["max_position_embeddings"] == 512
    tokenizer = load_tokenizer(str(out))
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "1+1?"}]
    assert render_prompt(tokenizer, turns) == "<s>User: 1+1?\nAnswer: Let's think step by step."
    assert (logits(source, list(range(40))) - logits(out, list(range(40)))).abs().max() > 0.01


KEEP = ("--rope_theta=0", "--max_position=0", "--round_trip=False")


@pytest.mark.parametrize("kind,tags", [(Qwen2Config, False), (Qwen3Config, True)])
def test_a_qwen_base_thinks_whether_its_tags_are_tokens_or_text(tmp_path, kind, tags):
    """Qwen2.5 and Qwen3 as they come: enough positions, a template that opens no thought, and in Qwen3 a token for each tag,
    which is not special. Prompts, traces and what the verifier reads agree on the tags."""
    source, out = build_model(tmp_path / "base", kind), tmp_path / "think"
    if tags:
        tokenizer = load_tokenizer(str(source))
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
        tokenizer.save_pretrained(source)
    call("model", f"--model={source}", f"--out={out}", *KEEP)
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    tokenizer = load_tokenizer(str(out))
    assert not tokenizer.control.search("<think>x</think>")  # text, not a mark of the template's
    write_openr1(tmp_path / "raw.parquet", [openr1_row("1+1?", [openr1_trace(60)])])
    call("openr1", f"--src={tmp_path / 'raw.parquet'}", f"--out={tmp_path / 'o.parquet'}", f"--tokenizer={out}")
    (problem,) = load_problems(str(tmp_path / "o.parquet"), tokenizer, log=lambda line: None)
    opening, closing = (tokenizer.encode(tag, add_special_tokens=False) for tag in ("<think>\n", "</think>"))
    assert (len(opening), len(closing)) == ((2, 1) if tags else (8, 8))
    (trace,) = problem.teacher
    assert problem.prompt_ids[-len(opening) :] == opening and trace[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(problem.prompt_ids).count("<think>\n {thoughts} </think>\n") == 1  # in the system prompt
    assert graded_text(response_text(tokenizer, trace)) == "\\boxed{1}"


def test_a_llama_3_2_gets_the_papers_prompt(tmp_path):
    """A small base Llama as it comes: tied weights, RoPE's llama3 scaling, its own BOS, no chat template at all."""
    scaled = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64, "rope_theta": 5e5}  # fmt: skip
    source = build_model(tmp_path / "base", LlamaConfig, (), True, torch.bfloat16, rope_parameters=scaled)
    edit(source, "tokenizer_config.json", chat_template=None)
    os.remove(source / "chat_template.jinja")
    call("model", f"--model={source}", f"--out={tmp_path / 'simple'}", *KEEP, "--template=llama")
    assert json.loads((tmp_path / "simple" / "config.json").read_text())["rope_parameters"] == scaled
    tokenizer = load_tokenizer(str(tmp_path / "simple"))
    text = render_prompt(tokenizer, [{"role": "user", "content": "1+1?"}])
    assert text == "<s>User: 1+1?\nAnswer: Let's think step by step."
    assert tokenizer.encode(text, add_special_tokens=False).count(tokenizer.bos_token_id) == 1


def test_what_is_left_unchanged(tmp_path):
    source = build_model(tmp_path / "base")
    call("model", f"--model={source}", f"--out={tmp_path / 'kept'}", *KEEP, "--template=keep")
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }} ->")
    call("model", f"--model={source}", f"--out={tmp_path / 'empty'}", *KEEP, f"--template={tmp_path / 'own.jinja'}")
    for folder in ("kept", "empty"):
        assert json.loads((tmp_path / folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    user = [{"role": "user", "content": "1+1?"}]
    assert [render_prompt(load_tokenizer(str(tmp_path / f)), user) for f in ("kept", "empty")] == ["1+1?", "1+1? ->"]


@pytest.mark.parametrize("form", ["old", "new", "both", "scaling", "none"])
def test_rope_theta_takes_effect_wherever_the_file_has_it(tmp_path, form):
    source = build_model(tmp_path / "base")
    scaling = {"rope_type": "linear", "factor": 2.0}
    edit(source, **{
        "old": {"rope_parameters": None, "rope_theta": 10000.0},
        "new": {},
        "both": {"rope_theta": 10000.0},
        "scaling": {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": 10000.0},
        "none": {"rope_parameters": None},
    }[form])  # fmt: skip
    call("model", f"--model={source}", f"--out={tmp_path / 'out'}", "--round_trip=False")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 40000
    assert ("rope_theta" in config) == (form != "new") and ("rope_parameters" in config) == (form in ("new", "both"))
    assert config.get("rope_scaling") == (scaling if form == "scaling" else None)
    assert (logits(source, list(range(40))) - logits(tmp_path / "out", list(range(40)))).abs().max() > 0.01


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BROKEN = {  # what is done to the folder, and the message
    "ids": (lambda f: rewrite(f, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(250, 64)}))
            or edit(f, vocab_size=250), "the tokenizer's ids end at 259, the embedding has 250 rows"),
    "missing": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "lack 1 of .* tensors, model.norm.weight among"),
    "shape": (lambda f: edit(f, intermediate_size=97), "gate_proj.weight is .96, 64. in the weights, .97, 64. by config.json"),
    "untied": (lambda f: edit(f, tie_word_embeddings=False), "lack 1 of .*, lm_head.weight among them"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 9000), "no causal LM in safetensors"),
    "bin": (lambda f: os.rename(f / "model.safetensors", f / "pytorch_model.bin"), "no .*safetensors, .*save_pretrained"),
    "tokenizer": (lambda f: os.remove(f / "tokenizer.json") or os.remove(f / "tokenizer_config.json"), "has no tokenizer"),
    "config": (lambda f: os.remove(f / "config.json"), "no config loads from"),
    "json": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is missing or not JSON"),
    "kind": (lambda f: edit(f, model_type="t5"), "base is no causal LM"),
    "code": (lambda f: edit(f, model_type="mine", auto_map={"AutoConfig": "mine.Mine"}), "no config loads .* custom code"),
    "theta": (lambda f: edit(f, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
              "--rope_theta=40000 is below the model's own 1e.06: --rope_theta=0 keeps"),
    "positions": (lambda f: edit(f, max_position_embeddings=32768), "--max_position=16384 is below the model's own 32768"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_folders_leave_nothing(tmp_path, fault, capsys):
    source = build_model(tmp_path / "base")
    change, words = BROKEN[fault]
    change(source)
    before = contents(source)
    with pytest.raises(UserError, match=words) as e:
        call("model", f"--model={source}", f"--out={tmp_path / 'out'}", "--round_trip=False")
    assert os.listdir(tmp_path) == ["base"] and contents(source) == before and "partial" not in str(e.value)


def test_model_mistakes_of_the_command_line(tmp_path):
    source, out = build_model(tmp_path / "base"), tmp_path / "out"
    os.symlink("nowhere", tmp_path / "link")
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('no system turns') }}")
    plain = build_model(tmp_path / "plain", marks=())
    for changes, words in (
        ({"out": source}, "base exists and is not an empty folder"),
        ({"out": source / "config.json"}, "config.json exists"),
        ({"out": tmp_path / "link"}, "link exists"),
        ({"model": tmp_path / "none"}, "there is no model folder"),
        ({"model": "no/such"}, "there is no .*no/such, and the hub gives no no/such"),
        ({"template": "qwen"}, "--template=qwen: choose luffy, llama, plain, keep, or your own file"),
        ({"template": tmp_path / "bad.jinja"}, "the chat template fails on .*: no system turns"),
        ({"model": plain}, r"this model has no token <\|im_start\|>: choose --template=llama or your own file"),
        ({"model": "toy/base"}, "this model has no .*im_start"),  # whose tokenizer drops what it does not know
        ({"max_position": -1}, "max_position=-1 must be zero or more"),
    ):  # fmt: skip
        options = {"model": source, "out": out, "round_trip": False, **changes}
        with pytest.raises(UserError, match=words):
            call("model", *(f"--{key}={value}" for key, value in options.items()))
    assert sorted(os.listdir(tmp_path)) == ["bad.jinja", "base", "link", "plain"]
    assert "base exists and is not an empty folder" in command("model", f"--model={source}", f"--out={source}", code=2)


def test_round_trip_compares_with_the_engine(tmp_path, monkeypatch, capsys):
    """transformers stands in for the engine, once with the right RoPE and once with another."""
    source = build_model(tmp_path / "base")
    edit(source, "generation_config.json", repetition_penalty=20.0, do_sample=True)  # both sides must ignore it
    theta = 4e4

    class Engine:
        def __init__(self, folder, stop_ids, room, sampler, dtype, gpu_memory):
            assert folder.endswith(".partial") and (sampler, dtype) == ("vllm", "float32")
            config = AutoConfig.from_pretrained(folder)
            config.rope_parameters["rope_theta"] = theta
            hf = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
            self.sampler = TorchSampler(folder, stop_ids, room)
            self.sampler.load(hf, folder)

        def generate(self, *request):
            return self.sampler.generate(*request)

        def close(self):
            pass

    monkeypatch.setattr(prepare, "open_sampler", Engine)
    monkeypatch.setattr(prepare, "choose_sampler", lambda sampler: "vllm")
    call("model", f"--model={source}", f"--out={tmp_path / 'out'}")
    assert "by vLLM: 8 of 8 tokens are the same, log-probs differ by at most " in capsys.readouterr().out
    theta = 1e4
    with pytest.raises(UserError, match="transformers and vLLM differ by .* in log-prob, over 0.001"):
        call("model", f"--model={source}", f"--out={tmp_path / 'other'}")
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]
    monkeypatch.setattr(prepare, "choose_sampler", lambda sampler: "torch")
    call("model", f"--model={source}", f"--out={tmp_path / 'alone'}")
    assert "vLLM is not installed" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_round_trip_through_the_real_engine(tmp_path, kind):
    pytest.importorskip("vllm")
    dtype = torch.bfloat16 if kind is LlamaConfig else torch.float32
    source = build_model(tmp_path / "base", kind, dtype=dtype)
    shown = command("model", f"--model={source}", f"--out={tmp_path / 'out'}", "--max_position=2048")
    difference = float(re.search(r"by vLLM: \d of \d tokens are the same, log-probs differ by at most (\S+)", shown)[1])
    assert difference < (0.1 if kind is LlamaConfig else 1e-4)


# ---------------------------------------------------------------- align

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
THINKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")  # the teacher has two tokens more than the policy, as Qwen3 has
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
TEACHERS = {  # each has fewer rows than the policy, and another EOS
    "in one file": dict(kind=Qwen2Config, tied=False),
    "in many files": dict(kind=Qwen3Config, tied=False, shard="40KB", dtype=torch.bfloat16, head_dim=32),
    "tied": dict(kind=Qwen2Config, tied=True),
    "tied in many files": dict(kind=Qwen2Config, tied=True, shard="80KB"),
    "with experts": dict(kind=Qwen3MoeConfig, tied=False, shard="80KB", dtype=torch.bfloat16, **EXPERTS),
}


@pytest.fixture
def policy(tmp_path):
    """It ends in <|endoftext|>, 256, and has 320 rows."""
    policy = build_model(tmp_path / "policy", rows=320)
    edit(policy, "generation_config.json", eos_token_id=[256, 258])
    return policy


def build_teacher(folder, kind=Qwen2Config, **changes):
    """It ends in <|im_end|>, 259, and has 262 tokens and 288 rows."""
    teacher = build_model(folder, kind, **{"marks": THINKS, "eos": "<|im_end|>", **changes})
    edit(teacher, "generation_config.json", eos_token_id=[259, 256], temperature=0.6, do_sample=True)
    return teacher


def align(tmp_path, *argv):
    """Of two options of one name the latter counts. Returns the default of --out."""
    options = [f"--{name}={tmp_path / folder}" for name, folder in (("model", "teacher"), ("policy", "policy"), ("out", "out"))]
    call("align", *options, *argv)
    return tmp_path / "out"


def tensors(folder):
    """A model's tensors. tensor_files() raises where headers and index disagree."""
    return {name: load_file(file)[name] for name, file in tensor_files(str(folder)).items()}


def prompt_and_response(folder):
    """Ids with both ends, one in the prompt, where the template closes its turns, and one behind the response."""
    ids = load_tokenizer(str(folder)).encode("<|im_start|>1+1?<|im_end|>2<|endoftext|>", add_special_tokens=False)
    assert {256, 258, 259} <= set(ids)
    return ids


@pytest.mark.parametrize("kind", TEACHERS)
def test_an_aligned_teacher_ends_where_the_policy_does(tmp_path, policy, kind, capsys):
    """The same logits, with the two ends' columns swapped, and zeros for the rows that it lacked."""
    teacher = build_teacher(tmp_path / "teacher", **TEACHERS[kind])
    before = contents(teacher)
    out, shown = align(tmp_path), capsys.readouterr().out
    assert contents(teacher) == before and sorted(os.listdir(tmp_path)) == ["out", "policy", "teacher"]

    order = torch.arange(288)
    order[[256, 259]] = order[[259, 256]]
    old, new = (logits(folder, prompt_and_response(policy)) for folder in (teacher, out))
    torch.testing.assert_close(new[..., :288], old[..., order], rtol=0, atol=1e-5)
    assert new.shape[-1] == 320 and not new[..., 288:].any()
    assert (old[..., 256] - old[..., 259]).abs().min() > 0.01  # so the order matters

    old, new = tensors(teacher), tensors(out)
    assert new.keys() == old.keys() | {HEAD} and any("experts.3.up_proj" in name for name in new) == (kind == "with experts")
    for name in old:
        assert new[name].dtype == old[name].dtype and (name in (EMBEDDING, HEAD) or torch.equal(new[name], old[name]))
    assert torch.equal(new[EMBEDDING][:288], old[EMBEDDING]) and not new[EMBEDDING][288:].any()
    assert torch.equal(new[HEAD][:288], old.get(HEAD, old[EMBEDDING])[order]) and not new[HEAD][288:].any()

    changed = {os.path.basename(file) for name, file in tensor_files(str(out)).items() if name in (EMBEDDING, HEAD)}
    weights = {name for name in os.listdir(out) if name.endswith(".safetensors")}
    assert {name for name in weights if os.path.samefile(out / name, teacher / name)} == weights - changed
    assert (len(weights) > 2) == ("many" in kind or "experts" in kind) == (out / "model.safetensors.index.json").exists()
    if len(weights) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
        assert index["total_size"] == sum(t.nbytes for t in new.values())
        assert index["total_parameters"] == sum(t.numel() for t in new.values())
    assert "aligned: 260 tokens (the teacher's own tokenizer has 262); rows 288 -> 320; end '<|im_end|>' (259) -> " in shown
    assert "'<|endoftext|>' (256), their rows of the head swapped; " in shown
    assert f"; files of weights: {len(weights - changed)} linked, 0 copied, {len(changed)} rewritten\n" in shown

    ours, theirs = load_tokenizer(str(policy)), load_tokenizer(str(out))
    assert theirs.get_vocab() == ours.get_vocab() and theirs.chat_template == ours.chat_template
    assert theirs.stop_ids == ours.stop_ids == [256, 258]
    config = json.loads((out / "config.json").read_text())
    was = json.loads(before["config.json"])
    assert config == was | {"vocab_size": 320, "eos_token_id": [256, 258], "pad_token_id": 256, "bos_token_id": 257,
                            "tie_word_embeddings": False}  # fmt: skip
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6


def test_training_takes_the_aligned_teacher_only(tmp_path, policy):
    """Both errors name the command."""
    teacher = build_teacher(tmp_path / "teacher")
    tokenizer, config = load_tokenizer(str(policy)), load_config(str(policy))

    limits = dict.fromkeys(("max_prompt_tokens", "max_tokens", "max_teacher_tokens"), 64)

    def check(folder):
        k = SimpleNamespace(teacher_model=str(folder), tensor_parallel=1, **limits)
        return check_models(k, "policy", tokenizer, config)

    with pytest.raises(UserError, match=r"EOS is '<.endoftext.>' \(256\), the teacher model's '<.im_end.>' .*prepare.py align"):
        check(teacher)
    edit(teacher, "tokenizer_config.json", eos_token="<|endoftext|>")
    with pytest.raises(UserError, match=r"its 320 embeddings, the teacher model has only 288: .*prepare.py align"):
        check(teacher)
    edit(teacher, "tokenizer_config.json", eos_token="<|im_end|>")
    assert check(align(tmp_path)).vocab_size == 320


def test_align_changes_only_what_differs(tmp_path, policy, capsys):
    """Nothing is cut; what is tied stays so where only rows are missing; and the ends stay where the user says so."""
    build_teacher(tmp_path / "same", eos=None, rows=352, shard="40KB")
    out = align(tmp_path, f"--model={tmp_path / 'same'}")
    assert "; rows 352 -> 352; end '<|endoftext|>' (256) -> '<|endoftext|>' (256); files" in capsys.readouterr().out
    assert load_config(str(out)).vocab_size == 352
    weights = [name for name in os.listdir(out) if name.endswith(".safetensors")]
    assert len(weights) > 2 and all(os.path.samefile(out / name, tmp_path / "same" / name) for name in weights)
    index = [(folder / "model.safetensors.index.json").read_bytes() for folder in (out, tmp_path / "same")]
    assert index[0] == index[1]

    build_teacher(tmp_path / "tied", eos=None)
    align(tmp_path, f"--model={tmp_path / 'tied'}", f"--out={tmp_path / 'tied_out'}")
    new = tensors(tmp_path / "tied_out")
    assert HEAD not in new and new[EMBEDDING].shape == (320, 64)
    assert load_config(str(tmp_path / "tied_out")).tie_word_embeddings

    stored = build_teacher(tmp_path / "stored", shard="80KB")  # a tied head that is a tensor, too, in another file
    save_file({HEAD: tensors(stored)[EMBEDDING]}, stored / "model-head.safetensors")
    index = json.loads((stored / "model.safetensors.index.json").read_text())
    index["weight_map"][HEAD] = "model-head.safetensors"
    (stored / "model.safetensors.index.json").write_text(json.dumps(index))
    align(tmp_path, f"--model={stored}", f"--out={tmp_path / 'untied'}")
    new = tensors(tmp_path / "untied")
    assert torch.equal(new[EMBEDDING][256], new[HEAD][259]) and torch.equal(new[EMBEDDING][259], new[HEAD][256])
    assert torch.equal(load_file(tmp_path / "untied" / "model-head.safetensors")[HEAD], new[HEAD])

    build_teacher(tmp_path / "teacher")
    align(tmp_path, "--swap_ends=False", f"--out={tmp_path / 'named'}")
    old, new = (logits(tmp_path / folder, prompt_and_response(policy)) for folder in ("teacher", "named"))
    torch.testing.assert_close(new[..., :288], old, rtol=0, atol=1e-5)
    assert load_tokenizer(str(tmp_path / "named")).stop_ids == [256, 258] and HEAD not in tensors(tmp_path / "named")
    assert "end '<|im_end|>' (259) -> '<|endoftext|>' (256), in name only; " in capsys.readouterr().out


def test_align_links_what_a_hub_cache_links_to(tmp_path, policy, monkeypatch):
    """The file behind the link; a copy where the file system has no links. Nothing of the cache is written to."""
    teacher, blobs = build_teacher(tmp_path / "teacher", shard="40KB"), tmp_path / "blobs"
    blobs.mkdir()
    for i, name in enumerate(sorted(os.listdir(teacher))):
        os.rename(teacher / name, blobs / str(i))
        os.symlink(f"../blobs/{i}", teacher / name)
    before = contents(blobs)
    align(tmp_path)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    align(tmp_path, f"--out={tmp_path / 'copied'}")
    names = set(os.listdir(tmp_path / "out"))
    assert contents(tmp_path / "copied") == contents(tmp_path / "out") and contents(blobs) == before
    assert not any(os.path.islink(tmp_path / folder / name) for name in names for folder in ("out", "copied"))
    places = {folder: {os.stat(tmp_path / folder / name).st_ino for name in names} for folder in ("out", "copied")}
    blob_nodes = {e.inode() for e in os.scandir(blobs)}
    rewritten = {os.path.basename(tensor_files(str(tmp_path / "out"))[name]) for name in (EMBEDDING, HEAD)}
    assert len(places["out"] & blob_nodes) == sum(name.endswith(".safetensors") for name in names) - len(rewritten) > 2
    assert not places["copied"] & blob_nodes


def damaged(teacher):
    (teacher / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:9000])


UNALIGNABLE = {  # what is done to the teacher's folder, and the message
    "other tokens": (lambda f: build_teacher(f, marks=("<|im_end|>", "<|im_start|>"), eos=None),
                     r"differs in 2 of 260 tokens: id 258 is '<.im_start.>' for the policy and '<.im_end.>' for the teacher; "
                     "choose models of one family"),
    "fewer tokens": (lambda f: build_teacher(f, marks=("<|im_start|>",), eos=None), "1 of 260 .* and None for the teacher"),
    "no head": (lambda f: edit(f, tie_word_embeddings=False), "teacher is no causal LM .*: its weights lack lm_head.weight"),
    "cut": (damaged, "teacher is no causal LM in safetensors: model.safetensors is no whole"),
    "shape": (lambda f: edit(f, vocab_size=300), r"embed_tokens.weight is \[288, 64\] in the file, \[300, 64\] by config"),
    "few rows": (lambda f: build_teacher(f, rows=261), "teacher: the tokenizer's ids end at 261, the embedding has 261 rows"),
    "bin": (lambda f: os.rename(f / "model.safetensors", f / "pytorch_model.bin"), "teacher has no .*safetensors"),
    "no tokenizer": (lambda f: os.remove(f / "tokenizer.json"), "teacher has no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNALIGNABLE)
def test_teachers_that_cannot_be_aligned(tmp_path, policy, fault):
    teacher = build_teacher(tmp_path / "teacher")
    change, words = UNALIGNABLE[fault]
    change(teacher)
    before = contents(teacher)
    with pytest.raises(UserError, match=words) as e:
        align(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["policy", "teacher"] and contents(teacher) == before
    assert "partial" not in str(e.value) and str(e.value).count("\n") == 0


def test_align_overwrites_nothing_and_leaves_nothing(tmp_path, policy, monkeypatch):
    build_teacher(tmp_path / "teacher")
    for stop, error, words in (
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (SafetensorError("I/O error: No space left on device"), UserError, "out cannot be written: .*No space left"),
    ):  # fmt: skip
        with monkeypatch.context() as m, pytest.raises(error, match=words):
            m.setattr(prepare, "save_file", lambda *_, stop=stop: (_ for _ in ()).throw(stop))
            align(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["policy", "teacher"]
    for taken in ("policy", "teacher"):
        before = contents(tmp_path / taken)
        with pytest.raises(UserError, match=f"{taken} exists and is not an empty folder: remove it, or name another --out"):
            align(tmp_path, f"--out={tmp_path / taken}")
        assert contents(tmp_path / taken) == before
    with pytest.raises(UserError, match="there is no model folder"):
        align(tmp_path, f"--policy={tmp_path / 'none'}")
    assert sorted(os.listdir(tmp_path)) == ["policy", "teacher"]
