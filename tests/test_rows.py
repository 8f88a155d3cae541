import gzip
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from subprocess import run
from typing import ClassVar
from urllib.parse import parse_qs, unquote

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import TRAIN, a_row, write
from test_data import load

import prepare
from configurator import ROOT, UserError
from runtime.files import model_path
from runtime.rows import count_rows, data_path, read_rows

TRACE = "<think>\n12>46</think>\\boxed{46}"
SHORT = {"question": "12+34=?", "answer": "46", "trace": TRACE}


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_every_form_gives_the_same_problems(tmp_path, tokenizer):
    long = {k: v for k, v in a_row(data_source="mine").items() if k != "extra_info"}
    short = {**SHORT, "data_source": "mine"}
    forms = [
        write(tmp_path / "long.parquet", [a_row(data_source="mine")]),
        lines(tmp_path / "long.jsonl", [long]),
        lines(tmp_path / "short.jsonl", [short]),
        lines(tmp_path / "number.json", [{**short, "answer": 46}]),
        lines(tmp_path / "named.parquet", [{**short, "trace": [TRACE]}]),  # content counts, not the name
    ]
    pq.write_table(pa.Table.from_pylist([short]), forms[0].replace("long", "short"))
    for name, head in (("bom.txt", b"\xef\xbb\xbf\r\n"), ("bom.parquet", b"\xef\xbb\xbf"), ("blank.parquet", b"\r\n" * 400)):
        (tmp_path / name).write_bytes(head + json.dumps(short).encode() + b"\r\n\r\n")
        forms.append(str(tmp_path / name))
    for path in (*forms, forms[0].replace("long", "short")):
        assert load(path, tokenizer)[0] == load(forms[0], tokenizer)[0], path
        assert count_rows(path) == 1, path


@pytest.mark.parametrize("column", ["data_source", "answer", "question", "trace"])
def test_a_category_column_is_read(tmp_path, tokenizer, column):
    """pandas writes its categories as a dictionary type."""
    table = pa.Table.from_pylist([{**SHORT, "data_source": "mine"}] * 3)
    at = table.column_names.index(column)
    table = table.set_column(at, column, table[column].dictionary_encode())
    pq.write_table(table, tmp_path / "a.parquet")
    problems, _ = load(str(tmp_path / "a.parquet"), tokenizer)
    assert [(p.source, p.answer, len(p.teacher)) for p in problems] == [("mine", "46", 1)] * 3


def test_rows_without_a_trace_and_with_several(tmp_path, tokenizer):
    rows = [{**SHORT, "trace": None}, {k: SHORT[k] for k in ("question", "answer")}, {**SHORT, "trace": [TRACE, TRACE, None]},
            {**SHORT, "trace": []}, {**SHORT, "answer": None}, {**SHORT, "question": ""}, {**SHORT, "answer": "\u200b"},
            {**SHORT, "prompt": None}]  # fmt: skip
    problems, line = load(lines(tmp_path / "a.jsonl", rows), tokenizer)
    assert [len(p.teacher) for p in problems] == [0, 0, 2, 0, 1] and "3 rows without prompt or answer" in line


@pytest.mark.parametrize(
    "content, words",
    [
        (b'[{"question": "1", "answer": "1"}]', "line 1 is '.*, no object: write one {...} per line"),
        (b"[\n  {\n", "line 1 cannot be read as JSON"),
        (b'{"question": "1", "answer": "1"}\n{"question": ', "line 2 cannot be read as JSON"),
        (b'{"question": "1", "answer": "1"}\n{"prompt": []}', "line 2 lacks the column 'reward_model'"),
        (b'{"problem": "1"}', "line 1 lacks the column 'prompt', it has .'problem'."),
        (b'{"question": ["1"], "answer": "1"}', "row 0: the content in 'prompt' is "),
        (b'{"question": "1", "answer": NaN}', "row 0: the ground truth is nan, not text"),
        (b'{"question": "1", "answer": -Infinity}', "row 0: the ground truth is -inf, not text"),
        (b'{"question": "1", "answer": 1E400}', r"row 0: the ground truth is .*1E.400.*, not text"),
        (b'{"question": "1", "answer": 1e-999999999}', "row 0: the ground truth is .*, not text"),
        (b'{"question": "1", "answer": 1e99999999999999999999}', "line 1 cannot be read"),
        (b'{"question": "1", "answer": true}', "row 0: the ground truth is True, not text"),
        (b'{"question": "1", "answer": "1", "trace": {"text": "1"}}', "row 0: the content in 'target' is "),
        (b'{"question": "\\ud800", "answer": "1"}', r"row 0: the content in 'prompt' is '\\ud800', not text"),
        (b'{"question": "1", "answer": "1", "target": [{"content": "1"}]}', "row 0 has 'target' beside 'question'"),
        (b'{"prompt": [{"role": "\\ud800", "content": "1"}], "reward_model": {}}', "row 0: a role in 'prompt' is .*ud800"),
        (b'{"prompt": [], "reward_model": {}, "trace": "1"}', "row 0 has 'trace' beside 'prompt': write it in one form"),
        (b'{"question": "1", "answer": "1", "traces": ["1"]}', "line 1 has 'traces', which is 'trace' here: rename it"),
        (b"question,answer\n1,1\n", "line 1 cannot be read as JSON"),
        (b"[" * 100_000, r"line 1 cannot be read as JSON .*recursion"),
        (b'{"question": "1", "answer": %s}' % (b"1" * 5000), r"line 1 cannot be read as JSON .*digits"),
        (gzip.compress(b"{}", mtime=0), "does not hold the data itself: gunzip makes it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "does not hold the data itself: git lfs pull makes it"),
        ("{}".encode("utf-16"), "neither a parquet file nor JSON lines in UTF-8: iconv"),
        (b'{"question": "1", "answer": "1", "answer": "2"}', "line 1 cannot be read as JSON .a key stands twice in"),
        (b"null", "line 1 is 'null', no object"),
        (b"", "no usable row"),
        (b"\n\n", "no usable row"),
    ],
)
def test_what_is_no_row(tmp_path, tokenizer, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words) as e:
        load(str(tmp_path / "a.jsonl"), tokenizer)
    assert "a.jsonl" in str(e.value) and "\n" not in str(e.value) and "parquet file (" not in str(e.value)


@pytest.mark.parametrize(
    "number, text",
    [("0.00001", "0.00001"), ("1E-5", "0.00001"), ("12345678901234567.0", "12345678901234567.0"),
     ("1e22", "1" + "0" * 22), ("-46", "-46"), ("0.10", "0.10"), ("1" * 400, "1" * 400)],
)  # fmt: skip
def test_a_number_keeps_its_digits(tmp_path, number, text):
    (tmp_path / "a.jsonl").write_text(f'{{"question": "1", "answer": {number}}}')
    ((_, row),) = read_rows(str(tmp_path / "a.jsonl"))
    assert row["reward_model"]["ground_truth"] == text


@pytest.mark.parametrize(
    "values, text",
    [(pa.array([0.1], pa.float32()), "0.1"), (pa.array([1e-5]), "0.00001"), (pa.array([1e20]), "1" + "0" * 20)],
)
def test_a_column_of_floats(tmp_path, values, text):
    pq.write_table(pa.table({"question": ["1"], "answer": values}), tmp_path / "a.parquet")
    ((_, row),) = read_rows(str(tmp_path / "a.parquet"))
    assert row["reward_model"]["ground_truth"] == text


def test_json_where_parquet_is_wanted(tmp_path):
    path = lines(tmp_path / "a.parquet", [SHORT])
    with pytest.raises(UserError, match=f"^{path} is no parquet file, but JSON$"):
        prepare.openr1_files(path)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["Elliott/Openr1-Math-46k-8192", "openai/gsm8k:main:test[:100]", "a/b:train", "hf://datasets/a/b/c.parquet"]
)
def test_names_on_the_hub(name):
    assert data_path(name) == name


@pytest.mark.parametrize(
    "name", ["toy/train.parquet", "toy/none", "data/a.jsonl", "nowhere/a.parquet", "./a/b", "../a/b", "a/b/c", "/a/b"]
)
def test_names_of_files(name):
    assert os.path.isabs(data_path(name))


@pytest.mark.parametrize(
    "name", ["hf://a/b", "hf://datasets", "Elliott/X@main", "a/b:train+test", "a/b:c:d:e", "gsm8k", "toy/*.parquet",
             "https://huggingface.co/datasets/a/b", "x.parquet:train[:10]"]
)  # fmt: skip
def test_names_of_nothing(name):
    last = re.escape(name.split("/")[-1])
    with pytest.raises(UserError, match=f"^there is no data file .*{last}; a dataset on the hub is USER"):
        list(read_rows(data_path(name)))


def test_a_model_that_is_missing_here_is_not_asked_for_on_the_hub():
    assert model_path("Qwen/Qwen2.5-Math-7B") == "Qwen/Qwen2.5-Math-7B"
    for name in ("models/Qwen2.5-Math-7B-16k-think", "toy/bass", "Qwen/", "./a/b", "config/x"):
        with pytest.raises(UserError, match=r"there is no model folder /.*: python prepare.py model makes one"):
            model_path(name)


def test_a_link_to_a_model_is_followed_once(tmp_path):
    """What is loaded is what the digest was taken of, even if a live run moves its `latest` in between."""
    for n in (4, 5):
        (tmp_path / f"ckpt_{n}").mkdir()
        os.symlink(f"ckpt_{n}", tmp_path / f"link_{n}")
        os.replace(tmp_path / f"link_{n}", tmp_path / "latest")
        assert model_path(str(tmp_path / "latest")) == str(tmp_path / "ckpt_4")


# ---------------------------------------------------------------- datasets


def test_a_folder_and_its_splits(tmp_path, tokenizer):
    lines(tmp_path / "train.jsonl", [SHORT] * 3)
    problems, _ = load(str(tmp_path), tokenizer)
    assert [p.id for p in problems] == [0, 1, 2] and problems[0].answer == "46"
    lines(tmp_path / "train.jsonl", [{"problem": "1"}])
    with pytest.raises(UserError, match="lacks the column 'prompt'"):
        load(str(tmp_path), tokenizer)
    with pytest.raises(UserError, match="there is no /.*/Elliott/None, and datasets loads no Elliott/None: "):
        list(read_rows("Elliott/None"))


def test_a_folder_whose_rows_have_several_types(tmp_path, tokenizer):
    lines(tmp_path / "train.jsonl", [SHORT, {**SHORT, "trace": [TRACE, TRACE]}])
    problems, line = load(str(tmp_path), tokenizer)
    assert [len(p.teacher) for p in problems] == [1, 2] and problems[0].teacher[0] == problems[1].teacher[0]
    assert line.startswith(f"{tmp_path} (train.jsonl): 2 problems")
    lines(tmp_path / "train-2.jsonl", [{"problem": "1"}])
    with pytest.raises(UserError, match=r"datasets loads no .*\(.*(column|cast|schema)"):
        load(str(tmp_path), tokenizer)


@pytest.mark.parametrize("in_folder", [True, False])
def test_class_labels_are_their_names(tmp_path, in_folder):
    features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["A", "B", "C"])})
    table = datasets.Dataset.from_dict({"question": ["1", "2"], "answer": ["C", None]}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    rows = read_rows(str(tmp_path if in_folder else tmp_path / "train.parquet"))
    assert [row["reward_model"]["ground_truth"] for _, row in rows] == ["C", None]


def test_csv_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("question,answer\n1,007\n")
    with pytest.raises(UserError, match="holds files of the kind 'csv', which may turn 007 into 7: write JSON"):
        list(read_rows(str(tmp_path)))


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as `datasets` asks for: one repository, me/sums, of a few files."""

    files: ClassVar = {}  # {path: content}
    sha = "0" * 40

    def entries(self, folder, recursive):
        """The files and folders in a folder."""
        found = {}
        for path, content in self.files.items():
            rest = path.removeprefix(f"{folder}/" if folder else "")
            if rest != path or not folder:
                name, _, below = rest.partition("/")
                inner = f"{folder}/{name}".strip("/")
                if below:
                    found[inner] = {"type": "directory", "path": inner, "oid": self.sha, "size": 0}
                if not below or recursive:
                    found[path] = {"type": "file", "path": path, "oid": self.sha, "size": len(content)}
        return list(found.values())

    def do_GET(self):
        path, _, query = unquote(self.path).partition("?")
        api, content = "/api/datasets/me/sums", None
        if path.startswith(f"{api}/tree/"):
            content = json.dumps(self.entries(*path.split("/", 7)[7:] or [""], recursive="recursive=true" in query.lower()))
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "me/sums", "sha": self.sha, "siblings": siblings, "private": False, "tags": []})
        elif path.startswith("/datasets/me/sums/resolve/"):
            content = self.files.get(path.split("/", 6)[6])
        self.answer(content)

    do_HEAD = do_GET

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.answer(json.dumps([e for e in self.entries("", recursive=True) if e["path"] in asked]))

    def answer(self, content):
        data = content.encode() if isinstance(content, str) else content
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("X-Repo-Commit", self.sha)
        if data is None:
            self.send_header("X-Error-Code", "RepoNotFound" if "/me/sums" not in self.path else "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data or b"")

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_dataset_on_the_hub(tmp_path):
    """Through the real `datasets` and huggingface_hub, from a server of ours."""
    Hub.files = {
        "data/train-00000-of-00001.parquet": open(TRAIN, "rb").read(),
        "data/test-00000-of-00001.parquet": open(f"{ROOT}/toy/test.parquet", "rb").read(),
        "README.md": b"---\nlicense: mit\n---\n",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
    }
    code = "import sys; from runtime.rows import read_rows; print(*(sum(1 for _ in read_rows(n)) for n in sys.argv[1:]))"
    names = ["me/sums", "me/sums:test", "me/sums:train[:100]", "hf://datasets/me/sums/data/test-00000-of-00001.parquet"]
    done = run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=env, cwd=ROOT)
    n_train, n_test = (pq.read_metadata(f"{ROOT}/toy/{name}.parquet").num_rows for name in ("train", "test"))
    assert done.stdout.split() == [str(n) for n in (n_train, n_test, 100, n_test)], done.stderr
    for name, words in (("me/none", "datasets loads no me/none"), ("me/sums:dev", "Unknown split")):
        done = run([sys.executable, "train.py", f"--data={name}", "--min_teacher_pass=0", f"--out_dir={tmp_path / 'out'}"],
                   capture_output=True, text=True, env=env, cwd=ROOT)  # fmt: skip
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) <= 2, done.stderr
    server.shutdown()
