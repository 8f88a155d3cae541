"""The trace page: what it shows is what was trained, and what a model wrote is text."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest
from test_train import run

from configurator import UserError
from data import load_tokenizer
from plot import token_texts, trace, write_trace

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&lt;\u2028"


def data_of(page):
    """The JSON in a page, which has no '<' of its own."""
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in text
    return json.loads(text)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from conftest import load_script

    folder = tmp_path_factory.mktemp("run")
    run(load_script, folder, "x", "--update_batches=2", "--micro_tokens=400")
    return folder / "x"


def test_the_probabilities_are_those_of_the_update(done, tmp_path, capsys):
    """Teacher tokens: their mean is the metric's. Own tokens: the sampler's."""
    rows = [json.loads(line) for line in open(done / "rollouts" / "step_2.jsonl")]
    ps = [math.exp(x) for r in rows for x in r["teacher_logps"]]
    record = [json.loads(line) for line in open(done / "metrics.jsonl")][2]
    assert sum(ps) / len(ps) == pytest.approx(record["teacher/p"], rel=1e-5)
    out = tmp_path / "page.html"
    trace([str(done), "--step=2", f"--problem={rows[0]['problem']}", f"--out={out}"])
    data = data_of(out.read_text())
    assert [r["by"] for r in data["rows"]] == ["policy"] * 7 + ["teacher"] and data["step"] == 2
    for shown, r in zip(data["rows"], rows[:8], strict=True):
        assert shown["ids"] == r["response_ids"] and (shown["reward"], shown["advantage"]) == (r["reward"], r["advantage"])
        want = [math.exp(x) for x in [*r["teacher_logps"], *r["sampler_logps"]]]
        assert shown["p"] == pytest.approx(want, rel=6e-3) and "".join(shown["tokens"]).removesuffix("<eos>") == r["response"]


@pytest.mark.parametrize("overlay", ["luffy_partial", "exgrpo", "sft", "grpo"])
def test_every_kind_of_row(script, tmp_path, overlay):
    """A trace that the policy goes on with, a replayed success, nothing but a trace, none at all."""
    more = ["--replay_start=0.0", "--learning_rate=1e-3", "--max_steps=4"] if overlay == "exgrpo" else []
    share = ["--teacher_share_end=0.5"] if overlay == "luffy_partial" else []
    run(script, tmp_path, "x", f"config/method/{overlay}.py", *more, *share)
    out = tmp_path / "page.html"
    trace([str(tmp_path / "x"), f"--out={out}"])
    data = data_of(out.read_text())
    assert all(len(r["p"]) == len(r["ids"]) == len(r["tokens"]) and all(0 < p <= 1 for p in r["p"]) for r in data["rows"])
    kinds = {r["by"] for r in data["rows"]}
    assert (
        kinds
        == {"luffy_partial": {"policy", "teacher"}, "exgrpo": {"policy", "replay"}, "sft": {"teacher"}, "grpo": {"policy"}}[
            overlay
        ]
    )


def test_wrong_arguments(done, tmp_path):
    for argv, words in (
        ([], "write: python plot.py trace RUN"),
        ([str(done), "--stpe=1"], "write: python plot.py trace RUN"),
        ([str(tmp_path)], "has no config.json"),
        ([str(done), "--step=9"], r"rollouts of the steps \[1, 2, 3\]"),
        ([str(done), "--step=two"], r"rollouts of the steps \[1, 2, 3\]"),
        ([str(done), "--problem=999999"], "step 3 has the problems"),
    ):
        with pytest.raises(UserError, match=words):
            trace(argv)


def test_tokens_that_share_a_character(byte_model):
    """A byte-level tokenizer cuts characters in pieces: the last piece has the character."""
    tokenizer = load_tokenizer(byte_model)
    text = "½ 東 \U0001f600 a"
    texts = token_texts(tokenizer, tokenizer.encode(text))
    assert "".join(texts) == text and texts[:2] == ["", "½"] and texts[3:6] == ["", "", "東"]
    assert len(token_texts(tokenizer, tokenizer.encode("\U0001f600")[:2])) == 2  # cut off in a character's midst


def large_page(folder, byte_model, n=8192):
    """Eight rows of n tokens, with what an attacker would write in every field that comes from data or model."""
    shutil.copytree(byte_model, folder / "latest")
    tokenizer = load_tokenizer(byte_model)
    text = (EVIL + " so x = 2\n") * (n // 100)
    ids = (tokenizer.encode(text) * 3)[:n]
    assert len(ids) == n
    row = {"problem": 1, "source": EVIL, "prompt": EVIL, "answer": EVIL, "reason": "wrong", "reward": 0.0, "advantage": -0.125,
           "finish_reason": "length", "response_ids": ids, "teacher_tokens": 0, "teacher_logps": [],
           "sampler_logps": [-0.001 * i for i in range(n)]}  # fmt: skip
    teacher = {
        **row,
        "teacher_tokens": n,
        "teacher_logps": row["sampler_logps"],
        "sampler_logps": [],
        "finish_reason": "teacher",
    }
    out = folder / "page.html"
    config = {"model": byte_model, "shaping": "luffy", "gamma": 0.1}
    write_trace(str(out), config, str(folder), 7, [row] * 7 + [teacher])
    return out


def test_long_traces_make_no_large_page_and_no_markup(tmp_path, byte_model):
    page = large_page(tmp_path, byte_model).read_text()
    assert len(page.encode()) < 5e6
    data = data_of(page)
    assert data["prompt"] == EVIL and page.count("<script") == 2 and page.count("<img") == 0


def browser():
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if not found:
        pytest.skip("no Chromium")
    return found


def render(page, tmp_path, *more):
    """The page's document after its script ran, as headless Chromium has it."""
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync""".split()
    flags.append(f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run([browser(), *flags, *more, f"file://{page}"], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.slow
def test_the_page_in_a_browser(done, tmp_path, byte_model):
    """Eight rows, a span a token, the numbers of the chosen token, and data that stay text."""
    out = tmp_path / "page.html"
    trace([str(done), "--step=1", f"--out={out}"])
    dom, data = render(out, tmp_path, "--dump-dom"), data_of(out.read_text())
    teacher = data["rows"][7]
    assert len(re.findall(r'<tr tabindex="0"', dom)) == 8
    spans = re.findall(r'<span data-i="\d+"[^>]*>([^<]*)</span>', dom)
    assert [html.unescape(s) for s in spans] == [t.replace("\n", "↵\n") or "·" for t in teacher["tokens"]]
    p = min(teacher["p"])
    numbers = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", dom))
    assert float(numbers["p"]) == pytest.approx(p, rel=0.05)  # it begins at the least probable
    assert float(numbers["f(p)"]) == pytest.approx(p / (p + 0.1), rel=0.05)
    assert float(numbers["weight w"]) == pytest.approx(0.1 * p / (p + 0.1) ** 2, rel=0.05)
    dom = render(large_page(tmp_path, byte_model), tmp_path, "--dump-dom")
    assert dom.count("<span data-i=") == 8192 and "<title>A group, token by token</title>" in dom and "<img" not in dom
