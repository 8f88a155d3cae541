import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback

import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from helpers import a_row, build_model, killed_runs, lines_of, write
from tokenizers import processors

from configurator import ROOT, UserError
from data import load_templates
from eval import not_shuffled, options, renderer, samples_per_source, shuffled
from runtime import guard, work
from runtime.checkpoint import fault_in
from runtime.files import fingerprint, model_files, weights_digest
from runtime.folder import OutputFolder
from runtime.guard import Watch
from runtime.tokenizer import load_tokenizer

SOURCES = ["aime", "aime25", "amc", "math", "minerva", "olympiad_bench"]


def benchmark(tmp_path):
    """A file like the released ones: several sources, no target, the problems of some repeated row by row."""
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


ARC = """Which is the most likely effect?

A) Density will decrease.
B) Years will become longer.
C) Days will become shorter.
D) Gravity will become stronger.
"""


def by_label(text):
    return dict(re.findall(r"(?m)^(\w)\) (.*)$", text))


def test_shuffled_options_keep_the_answer():
    """Every order occurs, the answer stays the right text, and nothing else in the question changes."""
    orders = set()
    for seed in range(200):
        text, label = shuffled(ARC, "C", seed)
        assert by_label(text)[label] == "Days will become shorter."
        assert text.startswith("Which is the most likely effect?\n\nA) ") and text.endswith("\n") and len(text) == len(ARC)
        assert sorted(by_label(text)) == list("ABCD") and sorted(by_label(text).values()) == sorted(by_label(ARC).values())
        orders.add(text)
        assert shuffled(ARC, "C", seed) == (text, label)
    assert len(orders) == 24


def test_text_after_the_last_option_stays():
    text = "Which?\n(A) one\ntwo\n(B) three\n\nEnd with 'ANSWER: $LETTER'."
    found = {shuffled(text, "B", seed) for seed in range(20)}
    assert found == {(text, "B"), ("Which?\n(A) three\n(B) one\ntwo\n\nEnd with 'ANSWER: $LETTER'.", "A")}


@pytest.mark.parametrize(
    "text,answer",
    [
        ("What is 1+1?", "2"),
        (ARC, "5"),  # no label
        (ARC.replace("D) Gravity will become stronger.", "D) None of the above."), "D"),
        *(
            (ARC.replace("Gravity will become stronger.", words), "D")
            for words in (
                "Both A and B",
                "both (A) and (B)",
                "A or B",
                "A & B",
                "neither A nor B",
                "Option A",
                "the same as B",
                "Any of the previous",
                "None of the other options",
            )
        ),
        ("Steps:\n1. foo\n2. bar\n3. baz\nHow many of these hold?", "2"),
        (ARC.replace("B) ", "C) "), "C"),  # labels out of order
    ],
)
def test_what_cannot_be_shuffled_is_unchanged(text, answer):
    assert {shuffled(text, answer, seed) for seed in range(20)} == {(text, answer)}


STEMS = [  # a question with a list of its own, the answer, and the texts of its options in their order
    ("Tests:\nA. heat\nB. cold\nC. salt\nWhich two?\n\nA) A, B\nB) B, C\nC) C, A\n", "B", ["A, B", "B, C", "C, A"]),
    ("A) is a set, and\nB) is a ring. Then\n\nA) yes\nB) no\nC) maybe", "C", ["yes", "no", "maybe"]),
    ("1. first\n2. second\nWhich holds?\nA) 1\nB) 2", "A", ["1", "2"]),
    ("Of\nB) this\nwhich?\nA) one\nB) two\nC) three", "C", ["one", "two", "three"]),
    ("Which?\n(A) x\n(B) y\n\nA. The last line is no option.", "A", ["x", "y"]),
    ("Which?\nA) one\n  with i) and\n  1) parts\nB) two\n\nExplain.", "B", ["one\n  with i) and\n  1) parts", "two"]),
    ("Which?\r\nA) one\r\nB) two\r\nC) three\r\n\r\nEnd.", "C", ["one", "two", "three"]),
    ("Which?\n" + "\n".join(f"{c}. {ord(c)}" for c in "ABCDEFGHIJ"), "J", [str(ord(c)) for c in "ABCDEFGHIJ"]),
    ("  A: left\n  B: right", "B", ["left", "right"]),
]  # fmt: skip


@pytest.mark.parametrize("text,answer,texts", STEMS)
def test_the_last_run_of_labels_is_the_options(text, answer, texts):
    found = options(text, answer)
    assert [text[start:end] for _, start, end in found] == texts
    right = texts[[label for label, *_ in found].index(answer)]
    orders = set()
    for seed in range(30):
        changed, label = shuffled(text, answer, seed)
        now = options(changed, label)
        assert [changed[start:end] for name, start, end in now if name == label] == [right] and len(changed) == len(text)
        assert changed[: found[0][1]] == text[: found[0][1]] and changed[now[-1][2] :] == text[found[-1][2] :]
        orders.add(changed)
    assert len(orders) > 1


def test_questions_that_are_left_alone_are_named(byte_model):
    left_alone = {}
    render = renderer(load_tokenizer(byte_model), "no", "keep", ["arc_c", "gpqa"], 3, left_alone)
    for text, answer, source in ((ARC, "C", "arc_c"), (ARC, "C", "math"), ("A) 1 B) 2\x1b", "A", "gpqa"),
                                 ("What?", "A", "gpqa"), (ARC, "5", "arc_c"),
                                 (ARC.replace("Gravity", "Both A and B"), "D", "arc_c")):  # fmt: skip
        for _ in range(2):  # a row that is repeated counts once
            render([{"role": "user", "content": text}], answer, source)
    start = "'Which is the most likely effect? A) Density will decrease. B'"
    assert [*not_shuffled(left_alone)] == [
        f"shuffle_options: 1 questions of arc_c are left alone (an option refers to others): {start}",
        f"shuffle_options: 1 questions of arc_c are left alone (the ground truth is no option's label): {start}",
        "shuffle_options: 2 questions of gpqa are left alone (no options A, B, ... at the beginning of lines):"
        " 'A) 1 B) 2\\x1b'; 'What?'",
    ]


TURNS = [{"role": "system", "content": "SYS"}, {"role": "user", "content": "1+{1}?"}]


def test_templates(byte_model):
    tokenizer = load_tokenizer(byte_model)
    text = lambda template, system: renderer(tokenizer, template, system)(TURNS, "2", "math")
    assert text("own", "remove") == ("<user>1+{1}?\n<assistant><think>\n", "2")
    assert text("own", "keep") == ("<system>SYS\n<user>1+{1}?\n<assistant><think>\n", "2")
    suffix = "1+{1}?\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
    assert text("prime_sft", "remove") == (f"<user>{suffix}\n<assistant><think>\n", "2")
    for system in ("keep", "remove"):
        assert text("no", system) == ("1+{1}?", "2")
        qwen = "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        turn = "<|im_start|>user\n1+{1}?<|im_end|>\n<|im_start|>assistant\n"
        assert text("qwen", system) == (qwen + turn, "2")
        assert text("simplerl", system)[0].startswith(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1+{1}?\n"
        )
        prime = text("prime", system)[0]
        assert prime.startswith("A conversation between User and Assistant.") and prime.endswith(f"User: {suffix}. Assistant:")
    with pytest.raises(UserError, match="template='foo': choose one of own, qwen, simplerl, prime, prime_sft, no"):
        renderer(tokenizer, "foo", "keep")


def test_the_system_prompt_is_the_released_one():
    text = load_templates()["system"]
    assert hashlib.sha256(text.encode()).hexdigest() == "a8747f1674d341836ab8fae3c29263fee4dd555f07259cdbc6dadf4104ea8926"


def test_raw_prompts_begin_as_the_tokenizer_begins(byte_model):
    """With text, as in the released code, vLLM adds a BOS if the tokenizer does. A chat template has its own."""
    tokenizer = load_tokenizer(byte_model)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    assert renderer(tokenizer, "no", "keep")(TURNS, "2", "math")[0] == "1+{1}?"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert renderer(tokenizer, "no", "keep")(TURNS, "2", "math")[0] == "<bos>1+{1}?"
    assert renderer(tokenizer, "own", "remove")(TURNS, "2", "math")[0].startswith("<user>")


def test_only_named_sources_are_shuffled(byte_model):
    messages, render = [{"role": "user", "content": ARC}], renderer(load_tokenizer(byte_model), "no", "keep", ["arc_c"], 3)
    assert render(messages, "C", "math") == (ARC, "C")
    assert render(messages, "C", "arc_c") == shuffled(ARC, "C", 3) != (ARC, "C")


def test_k():
    assert samples_per_source("1, aime =32,amc=16", {"aime", "amc", "x"}) == {"aime": 32, "amc": 16, "x": 1}
    assert samples_per_source("8,x=2", {"x", "y"}) == {"x": 2, "y": 8}
    for wrong in ("", "0", "a", "aime=32", "8,aime=0", "8,9", "8,aime=x", "-1", "1,=3", "²", "1,aime=1=2"):
        with pytest.raises(UserError, match="k=.*: write a number above zero"):
            samples_per_source(wrong, {"aime"})
    with pytest.raises(UserError, match="there is no source 'aime24', the data has aime, math"):
        samples_per_source("1,aime24=32", {"math", "aime"})


def read(folder):
    """What an evaluation wrote, {file: bytes}, without settings.json and .lock, which name commit and process."""
    found = {}
    for root, _, files in os.walk(folder):
        found |= {os.path.relpath(os.path.join(root, f), folder): open(os.path.join(root, f), "rb").read() for f in files}
    return {name: content for name, content in found.items() if name not in ("settings.json", ".lock")}


def samples_of(folder):
    return [row for f in sorted(os.listdir(folder / "samples")) for row in lines_of(folder / "samples" / f)[1:]]


@pytest.mark.parametrize("sampler", ["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def test_the_command(sampler, tmp_path, byte_model):
    """The whole command with a byte-level model: repeats count once, every source is there, any text is graded."""
    out = tmp_path / "out"
    argv = [f"--model={byte_model}", f"--data={benchmark(tmp_path)}", f"--out_dir={out}", "--k=3", "--max_problems=2",
            "--max_tokens=12", f"--sampler={sampler}"]  # fmt: skip
    done = subprocess.run([sys.executable, os.path.join(ROOT, "eval.py"), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.load(open(out / "eval.json"))
    assert sorted(table) == SOURCES
    assert all(row["n"] == 2 and row["k"] == 3 and 0 <= row["avg@k"] <= row["pass@k"] <= 1 for row in table.values())
    assert all(0 < row["length"] <= 12 and row["truncated"] > 0 and len(row["problems"]) == 2 for row in table.values())
    assert all(row["letter_with_text"] == 0 for row in table.values())
    average = json.load(open(out / "averages.json"))["six benchmarks"]
    assert average["n"] == 12 and average["length"] == pytest.approx(sum(row["length"] for row in table.values()) / 6)
    samples = samples_of(out)
    assert len(samples) == 12 and all(len(s["response"]) == 3 == len(s["reason"]) for s in samples)
    assert all(len(set(s["response"])) == 3 for s in samples)  # each sample has its own seed
    assert json.load(open(out / "settings.json"))["settings"]["max_tokens"] == 12
    for line in ("aime25", "six benchmarks", "95 % interval", "6 of 6 chunks", "mean reward on this rank 0.000"):
        assert line in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["torch", "vllm"])
def test_a_response_ends_at_each_end_of_turn(sampler, tmp_path):
    """Of a model with two EOS ids, by generation_config.json. Before, a response ran on behind the second one."""
    model = str(build_model(tmp_path / "model"))
    argv = [f"--model={model}", f"--data={benchmark(tmp_path)}", "--k=16", "--require_think=False", "--max_tokens=100",
            f"--sampler={sampler}"]  # fmt: skip
    texts = {}
    for ends in ([256], [258, 256]):  # <|endoftext|>, <|im_start|>
        with open(f"{model}/generation_config.json", "w") as f:
            json.dump({"eos_token_id": ends}, f)
        out = tmp_path / f"{len(ends)}"
        done = subprocess.run([sys.executable, os.path.join(ROOT, "eval.py"), *argv, f"--out_dir={out}"], capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        texts[len(ends)] = [text for row in samples_of(out) for text in row["response"]]
        assert any(finish == "stop" for row in samples_of(out) for finish in row["finish"])
    assert "responses end at '<|endoftext|>' (256) or '<|im_start|>' (258), traces in '<|endoftext|>' (256)" in done.stdout
    assert any("<|im_start|>" in text for text in texts[1])
    assert not any("<|im_start|>" in text or "<|endoftext|>" in text for text in texts[2])
    assert texts[2] == [text.split("<|im_start|>")[0] for text in texts[1]]


@pytest.fixture
def run_eval(script, byte_model, tmp_path):
    """A function that runs eval.py in this process with the torch sampler and returns what it wrote."""

    def call(*argv, out="out"):
        module = script("eval", [f"--model={byte_model}", f"--out_dir={tmp_path / out}", "--max_tokens=12", "--sampler=torch",
                                 *argv])  # fmt: skip
        module.main()
        return read(tmp_path / out)

    return call


def test_repeated_rows_are_the_problem_once(run_eval, tmp_path):
    """The released layout with repeated rows, and one row per problem with k samples, give the same files, byte for byte."""
    repeated = benchmark(tmp_path)
    table = pq.read_table(repeated)
    once = str(tmp_path / "once.parquet")
    pq.write_table(table.take([i for i in range(len(table)) if i == 0 or table.slice(i, 1) != table.slice(i - 1, 1)]), once)
    assert pq.ParquetFile(once).metadata.num_rows == 18 < len(table)
    argv = ["--k=1,aime=4,aime25=4,amc=4", "--chunk=4"]
    first = run_eval(f"--data={repeated}", *argv, out="a")
    assert first == run_eval(f"--data={once}", *argv, out="b") and len(first) == 2 + 9 + 3
    scores = json.loads(first["eval.json"])
    assert [(scores[s]["n"], scores[s]["k"]) for s in SOURCES] == [(3, 4)] * 3 + [(3, 1)] * 3
    assert run_eval(f"--data={once},{repeated}", *argv, out="c") == first  # also over several files


def test_it_continues_where_it_stopped(run_eval, tmp_path, capsys):
    argv = [f"--data={benchmark(tmp_path)}", "--k=2", "--chunk=4"]
    whole = run_eval(*argv)
    shutil.rmtree(tmp_path / "out" / "samples")
    assert run_eval(*argv) == whole
    os.remove(tmp_path / "out" / "samples" / "00003.jsonl")
    os.remove(tmp_path / "out" / "eval.json")
    (tmp_path / "out" / "samples" / "00005.jsonl.0123abcd.partial").write_text('{"half": ')  # a kill's
    kept = os.stat(tmp_path / "out" / "samples" / "00002.jsonl").st_mtime_ns
    again = run_eval(*argv)
    assert again == whole
    assert os.stat(tmp_path / "out" / "samples" / "00002.jsonl").st_mtime_ns == kept
    capsys.readouterr()
    assert run_eval(*argv, "--reward_workers=1", f"--data={benchmark(tmp_path)},{benchmark(tmp_path)}") == again
    assert "chunks" not in capsys.readouterr().out  # there was nothing left to do


def test_other_settings_never_meet(run_eval, tmp_path, capsys):
    """A change of any setting that matters moves the old result aside, whole, and names the setting."""
    path = benchmark(tmp_path)
    first = run_eval(f"--data={path}", "--k=1", "--max_problems=1")
    (tmp_path / "out" / "mine.txt").write_text("kept")
    second = run_eval(f"--data={path}", "--k=2", "--max_problems=1")
    assert "held work with other settings (k): moved to" in capsys.readouterr().out
    assert read(tmp_path / "out" / "before_1") == first and second["mine.txt"] == b"kept"
    for number, (change, name) in enumerate([("--seed=1", "k, seed"), ("--max_problems=2", "problems, seed"),
                                             ("--grade_unclosed=True", "grade_unclosed, problems"),
                                             ("--template=prime_sft", "grade_unclosed, problems")], 2):  # fmt: skip
        run_eval(f"--data={path}", "--k=1", "--max_problems=1", change)
        assert f"other settings ({name}): moved to {tmp_path / 'out' / f'before_{number}'}" in capsys.readouterr().out


def test_samples_without_settings_are_void(run_eval, tmp_path, capsys):
    """After a kill while old files were moved aside, or an edit of settings.json, old samples are not used."""
    argv = [f"--data={benchmark(tmp_path)}", "--k=1", "--max_problems=1"]
    first = run_eval(*argv)
    for content in (None, "{", "{}", "[]", "null", '{"settings": {}, "written_by": {}}'):
        settings = tmp_path / "out" / "settings.json"
        settings.unlink() if content is None else settings.write_text(content)
        marked = tmp_path / "out" / "samples" / "00000.jsonl"
        forged = marked.read_text().replace('"reward": [0.0]', '"reward": [1.0]')
        marked.write_text(forged)
        assert '"reward": [1.0]' in forged
        again = run_eval(*argv)
        assert "held work with other settings" in capsys.readouterr().out
        assert {name: content for name, content in again.items() if not name.startswith("before")} == first


def test_a_changed_model_is_another_evaluation(byte_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(byte_model, folder)
    before = weights_digest(str(folder))
    assert weights_digest(byte_model) == before
    with open(folder / "model.safetensors", "r+b") as f:
        f.seek(-1000, os.SEEK_END)
        f.write(b"\x01")
    changed = weights_digest(str(folder))
    (folder / "chat_template.jinja").write_text("other")
    other = weights_digest(str(folder))
    assert len({before, changed, other}) == 3
    for name in ("pytorch_model.bin", "README.md", "extra.safetensors", "out.log"):  # no reader opens them
        (folder / name).write_bytes(b"0")
    assert weights_digest(str(folder)) == other


@pytest.mark.parametrize("file,key", [("additional_chat_templates", None), ("adapter_config.json", None),
                                      ("config.json", "configuration_files"),
                                      ("tokenizer_config.json", "fast_tokenizer_files")])  # fmt: skip
def test_what_leads_transformers_to_other_files(byte_model, tmp_path, file, key):
    """They replace the chat template, the weights, the config or the tokenizer, and no digest would tell."""
    folder = tmp_path / "ckpt_1"
    shutil.copytree(byte_model, folder)
    (folder / "state").mkdir()
    body = json.dumps({"files": {name: fingerprint(folder / name) for name in model_files(folder)}})
    (folder / "state" / "run.json").write_text(hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
    if key:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {key: []}))
    elif file.endswith(".json"):
        (folder / file).write_text("{}")
    else:
        (folder / file).mkdir()
    words = f"{file} names other files by '{key}'" if key else f"{file} would change the model"
    with pytest.raises(UserError, match=words):
        weights_digest(str(folder))
    assert words in fault_in(str(folder), {})  # on resume


def test_a_checkpoint_is_compared_with_its_run_json(byte_model, tmp_path):
    folder = tmp_path / "ckpt_1"
    shutil.copytree(byte_model, folder)
    (folder / "state").mkdir()
    body = json.dumps({"files": {name: fingerprint(folder / name) for name in model_files(folder)}})
    (folder / "state" / "run.json").write_text(hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
    assert weights_digest(str(folder)) == weights_digest(byte_model)
    (folder / "merges.txt").write_text("")
    with pytest.raises(UserError, match="merges.txt was put beside it: copy it again, or remove its state/"):
        weights_digest(str(folder))
    (folder / "merges.txt").unlink()
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(UserError, match="config.json is not the one that was written"):
        weights_digest(str(folder))
    (folder / "state" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="run.json is damaged"):
        weights_digest(str(folder))


def test_a_prompt_beyond_the_context_is_wrong(run_eval, tmp_path):
    """It is not left out: the number of problems of a benchmark does not depend on the model."""
    long = a_row(prompt=[{"content": "9" * 5000, "role": "user"}], target=None)
    table = json.loads(run_eval(f"--data={write(tmp_path / 'a.parquet', [a_row(), long])}", "--k=1")["eval.json"])
    assert (table["toy"]["n"], table["toy"]["truncated"]) == (2, 1.0) and table["toy"]["length"] <= 6


def test_damaged_samples_are_named(run_eval, tmp_path):
    argv = [f"--data={benchmark(tmp_path)}", "--k=1", "--max_problems=1"]
    run_eval(*argv)
    path, other = (tmp_path / "out" / "samples" / f"{i:05d}.jsonl" for i in (2, 3))
    first, text = path.read_text().split("\n", 1)
    another_temperature = run_eval(*argv, "--temperature=1", out="warm")["samples/00002.jsonl"].decode()
    whole = f"{first}\n{text}"
    for content in (whole[:-9], f"{first}\n", "", text, "3\n", "\ufeff", whole + text, other.read_text(), another_temperature,
                    whole.replace('"reward": [0.0]', '"reward": [1.0]')):  # fmt: skip
        assert content != whole
        path.write_text(content)
        with pytest.raises(UserError, match="00002.jsonl is damaged: remove it, and the same command makes it again"):
            run_eval(*argv)
    path.unlink()
    run_eval(*argv)
    assert path.read_text() == whole


def test_a_broken_grader_is_found_before_anything_is_sampled(run_eval, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def grade(text, answer) return 1")
    with pytest.raises(UserError, match="mine.py must run and define grade"):
        run_eval(f"--data={benchmark(tmp_path)}", f"--grader={tmp_path / 'mine.py'}")
    assert not (tmp_path / "out").exists()


def test_a_grader_without_votes_has_no_majority(run_eval, tmp_path, capsys):
    """One that returns a bool: maj@k is a dash beside a source that has it, and without one there is no column."""
    (tmp_path / "mine.py").write_text("def grade(text, answer): return (True, 'x') if answer == '7' else True")
    kinds = {"named": "7", "silent": "8"}
    rows = [a_row(data_source=source, target=None, reward_model={"ground_truth": answer}) for source, answer in kinds.items()]
    data = write(tmp_path / "a.parquet", rows)
    argv = [f"--data={data}", f"--grader={tmp_path / 'mine.py'}", "--grade_unclosed=True", "--k=2"]
    table = json.loads(run_eval(*argv)["eval.json"])
    assert table["named"]["maj@k"] == 1.0 == table["silent"]["pass@k"] and "maj@k" not in table["silent"]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = {words[0]: words for words in printed if words[:1] in (["source"], ["named"], ["silent"])}
    at = lines["source"].index("maj@k") - len(lines["source"])
    assert lines["named"][at] == "1.000" and lines["silent"][at] == "-"
    assert "maj@k" not in json.loads(run_eval(*argv, "--sources=silent", out="one")["eval.json"])["silent"]
    assert "maj@k" not in capsys.readouterr().out


def test_sweep(run_eval, tmp_path):
    written = run_eval(f"--data={benchmark(tmp_path)}", "--k=2", "--sources=aime,math", "--sweep=0,0.5,1.0")
    table = json.loads(written["sweep.json"])
    assert list(table) == ["0", "0.5", "1"] and all(list(t) == ["aime", "math"] for t in table.values())
    assert written["sweep.png"][:4] == b"\x89PNG"
    assert len({written[f"temperature_{t}/samples/00000.jsonl"] for t in table}) == 3


def test_letters_with_text_are_counted(run_eval, tmp_path, capsys, monkeypatch):
    """They get no reward, as in the papers; eval.json says how many they are."""
    words = ["C", "C.", "C)", "C: 12", "\\textbf{(C)}\\ 12", "D.", "Cat", "C or D"]
    prompts = [[{"content": f"{i}", "role": "user"}] for i in range(8)]
    rows = [a_row(data_source="arc_c", prompt=p, target=None, reward_model={"ground_truth": "C"}) for p in prompts]
    monkeypatch.setattr("runtime.tokenizer.response_text", lambda *_: f"</think>\\boxed{{{words.pop(0)}}}")
    table = json.loads(run_eval(f"--data={write(tmp_path / 'a.parquet', rows)}", "--k=1", "--grader=oat")["eval.json"])["arc_c"]
    assert not words and table["avg@k"] == 1 / 8 and table["letter_with_text"] == 4
    assert "arc_c: 4 of 8 samples box the right letter with more text, and count as wrong" in capsys.readouterr().out


def test_compare_the_command(run_eval, tmp_path):
    for out, seed in (("a", 0), ("b", 1)):
        run_eval(f"--data={benchmark(tmp_path)}", "--k=1", f"--seed={seed}", out=out)
    files = [str(tmp_path / out / "eval.json") for out in "ab"]
    done = subprocess.run([sys.executable, os.path.join(ROOT, "eval.py"), "compare", *files], capture_output=True, text=True)
    assert done.returncode == 0 and "six benchmarks" in done.stdout and done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["torch", "vllm"])
def test_ranks_share_the_work(sampler, run_eval, byte_model, tmp_path):
    """Two processes write what one writes, also where one of them has nothing left to do."""
    argv = [f"--data={benchmark(tmp_path)}", "--k=2", "--chunk=4", "--max_tokens=12", f"--sampler={sampler}"]
    alone = run_eval(*argv)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               os.path.join(ROOT, "eval.py"), f"--model={byte_model}", f"--out_dir={tmp_path / 'two'}", *argv]  # fmt: skip
    for lost in ("", "00000.jsonl"):
        if lost:
            os.remove(tmp_path / "two" / "samples" / lost)
            os.remove(tmp_path / "two" / "eval.json")
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert read(tmp_path / "two") == alone


def test_a_rank_that_never_comes_ends_the_evaluation(tmp_path, monkeypatch, capfd):
    """One that died on another machine, where no torchrun ends this one: it has done its own chunk, and waits."""
    for owner, name, value in ((work, "WORLD", 2), (guard, "EVERY", 0.05), (dist, "barrier", lambda: None)):
        monkeypatch.setattr(owner, name, value)
    with OutputFolder(str(tmp_path / "out"), "eval.py") as output:
        work.open_work(output, {"k": 1}, {})
        if (child := os.fork()) == 0:
            try:
                with Watch(hang_timeout=0.3) as watch:
                    work.work_through(output, ["its", "another's"], lambda chunk: [{"reward": [1.0], "of": chunk}], watch)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert os.listdir(tmp_path / "out" / "samples") == ["00000.jsonl"]
    words = "error: no rank made progress for 0.3 s (hang_timeout): rank 0: waiting for the other ranks' chunks"
    assert words in capfd.readouterr().err


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_evaluation_on_the_other(byte_model, tmp_path):
    """Two torchruns as on two machines. After the second is gone, the first ends within hang_timeout and says who is missing,
    and the same command on one machine does the rest."""
    rows = [a_row(prompt=[{"content": f"{i}+{i}=?", "role": "user"}], target=None) for i in range(48)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    front = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    argv = [os.path.join(ROOT, "eval.py"), f"--model={byte_model}", "--k=4", "--chunk=4", "--max_tokens=200",
            f"--data={write(tmp_path / 'a.parquet', rows)}", "--sampler=torch"]  # fmt: skip
    out, nodes = tmp_path / "out", []
    for i in range(2):
        line = [*front, "--nnodes=2", f"--node_rank={i}", f"--master_port={port}", *argv, f"--out_dir={out}"]
        nodes.append(
            subprocess.Popen([*line, "--hang_timeout=4"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    while not (out / "samples" / "00001.jsonl").exists():  # the second one's first
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.01)
    time.sleep(2.5 * guard.EVERY)  # until each has told the other where it is
    nodes[1].kill()  # its rank dies with it
    nodes[1].communicate()
    killed = time.time()
    _, err = nodes[0].communicate(timeout=120)
    assert nodes[0].returncode == 1 and time.time() - killed < 60, err[-3000:]
    assert re.search(r"no rank made progress for 4 s \(hang_timeout\): rank 0: waiting for .*; rank 1: chunk \d+ of 48", err)
    before = os.listdir(out / "samples")
    done = subprocess.run([sys.executable, *argv, f"--out_dir={out}"], capture_output=True, text=True)
    assert done.returncode == 0 and f"  {len(before) + 1} of 48 chunks" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("sampler,kills", [("torch", 10), ("vllm", 3)])
def test_killed_again_and_again(sampler, kills, byte_model, tmp_path):
    """kill -9 during the work, again and again: the files equal those of a run that was not disturbed."""
    rows = [a_row(prompt=[{"content": f"{i}+{i}=?", "role": "user"}], target=None) for i in range(120)]
    command = [sys.executable, os.path.join(ROOT, "eval.py"), f"--model={byte_model}", "--k=4", "--chunk=16",
               f"--data={write(tmp_path / 'a.parquet', rows)}", "--max_tokens=200", f"--sampler={sampler}"]  # fmt: skip
    subprocess.run([*command, f"--out_dir={tmp_path / 'undisturbed'}"], check=True, capture_output=True)
    folder = tmp_path / "killed"
    assert killed_runs([*command, f"--out_dir={folder}"], folder / "samples", 30, kills) == kills
    assert read(folder) == read(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "argv,words",
    [
        ("--model={tmp}/model", "has no tokenizer"),
        ("--data=nowhere.parquet", "there is no data file"),
        ("--data=", "data is empty: name a file"),
        ("--data= , ", "data is empty: name a file"),
        ("--k=0", "k='0': write a number above zero"),
        ("--template=foo", "template='foo': choose one of own"),
        ("--system=foo", "system='foo': choose keep or remove"),
        ("--sources=aime", "sources: the data has no 'aime', it has toy"),
        ("--shuffle_options=arc_c", "shuffle_options: the data has no 'arc_c', it has toy"),
        ("--sweep=nan", "sweep='nan': temperature=nan must be zero, or lie between 0.01 and 100"),
        ("--sweep=1,1.0000001", "sweep='1,1.0000001': 1 is there twice"),
        ("--temperature=1e-320", "temperature=1e-320 must be zero, or lie between 0.01 and 100"),
        ("--reward_timeout=1e10", "reward_timeout=10000000000.0 must lie between 0.01 and 86400"),
        (f"--reward_workers={10**12}", "reward_workers=1000000000000 must lie between one and 1024"),
        ("--sweep=0.1,x", "sweep='0.1,x': write temperatures"),
        ("--sweep=-1", "sweep='-1': temperature=-1.0 must be zero, or lie"),
        ("--chunk=0", "chunk=0 must be above zero"),
        ("--tensor_parallel=2", "tensor_parallel=2 must divide the 1 process"),
        ("--grader=foo", "grader"),
        ("--grader=nowhere.py", "nowhere.py"),
        ("--reward_timeout=-1", "reward_timeout=-1.0 must lie between"),
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
