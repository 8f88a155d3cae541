"""The trace page shows what was trained, and treats what a model wrote as text. And the curves of runs."""

import html
import json
import math
import os
import re
import shutil
import subprocess

import build
import pyarrow as pa
import pytest
from helpers import BASE, a_row, lines_of, load_script, metrics, rollouts_of, run, write

from configurator import ROOT, UserError
from plot import (
    PANELS,
    by_method,
    curve,
    draw,
    draw_panel,
    looks,
    main,
    plt,
    read_run,
    shaping_curve,
    table,
    token_texts,
    trace,
    write_trace,
)
from runtime.tokenizer import load_tokenizer

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&lt;\u2028"


def data_of(page):
    """The JSON in a page. It contains no '<'."""
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in text
    return json.loads(text)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(load_script, folder, "x", "--update_batches=2", "--micro_tokens=400")
    return folder / "x"


def test_the_probabilities_are_those_of_the_update(done, tmp_path, capsys):
    """Of teacher tokens the mean is the metric's; own tokens have the sampler's."""
    rows = rollouts_of(done, 2)
    ps = [math.exp(x) for r in rows for x in r["update_logps"]]
    assert sum(ps) / len(ps) == pytest.approx(metrics(done)[2]["teacher/p"], rel=1e-5)
    out = tmp_path / "page.html"
    trace([str(done), "--step=2", f"--problem={rows[0]['problem']}", f"--out={out}"])
    data = data_of(out.read_text())
    assert [r["by"] for r in data["rows"]] == ["policy"] * 7 + ["teacher"] and data["step"] == 2
    for shown, r in zip(data["rows"], rows[:8], strict=True):
        assert shown["ids"] == r["response_ids"] and (shown["reward"], shown["advantage"]) == (r["reward"], r["advantage"])
        want = [math.exp(x) for x in [*r["update_logps"], *r["sampler_logps"]]]
        assert shown["p"] == pytest.approx(want, rel=6e-3) and "".join(shown["tokens"]).removesuffix("<eos>") == r["response"]


@pytest.mark.parametrize("overlay", ["luffy_partial", "exgrpo", "sft", "grpo", "prefix_rft"])
def test_every_kind_of_row(script, tmp_path, overlay):
    """A trace that the policy continues, a replayed success, nothing but a trace, and no trace at all."""
    more = ["--replay_start=0.0", "--learning_rate=1e-3", "--max_steps=4"] if overlay == "exgrpo" else []
    share = ["--teacher_share_end=0.5"] if overlay == "luffy_partial" else []
    run(script, tmp_path, "x", f"config/method/{overlay}.py", *more, *share)
    out = tmp_path / "page.html"
    trace([str(tmp_path / "x"), f"--out={out}"])
    data = data_of(out.read_text())
    assert all(len(r["p"]) == len(r["ids"]) == len(r["tokens"]) and all(0 < p <= 1 for p in r["p"]) for r in data["rows"])
    assert data["likelihood"] == (overlay == "sft")
    for r in data["rows"]:
        assert ("ratio" in r) == (r["by"] == "replay") and len(r.get("ratio", r["ids"])) == len(r["ids"])
    kinds = {"exgrpo": {"policy", "replay"}, "sft": {"teacher"}, "grpo": {"policy"}}
    assert {r["by"] for r in data["rows"]} == kinds.get(overlay, {"policy", "teacher"})
    assert data["top"] == (0.2 if overlay == "prefix_rft" else 1.0) and not data["scheduled"]  # the page names them


@pytest.mark.parametrize("likelihood", [0.0, 0.5])
def test_the_weights_of_a_teacher_whose_log_probs_are_known(script, tmp_path, likelihood):
    """f is of p / pi_phi then, as in the loss; the likelihood term's is of p itself. Of a cut trace the given tokens count."""
    schema = build.SCHEMA.append(pa.field("target_logps", pa.list_(pa.list_(pa.float64()))))
    trace_ids = load_tokenizer(BASE).encode("12>46</think>\\boxed{46}")
    logps = [-0.1 * i for i in range(len(trace_ids) + 1)]  # EOS is the last
    rows = [a_row(target_logps=[logps])] * 4
    argv = [f"--data={write(tmp_path / 'x.parquet', rows, schema)}", "--prompts_per_step=4", "--max_steps=1"]
    run(script, tmp_path, "x", *argv, "--teacher_share=0.5", "--teacher_share_end=0.5", f"--sft_coef={likelihood}")
    written = rollouts_of(tmp_path / "x", 1)[:8]
    n = written[7]["teacher_tokens"]
    assert 0 < n < len(logps) and [r["target_logps"] for r in written] == [[]] * 7 + [logps[:n]]
    out = tmp_path / "page.html"
    trace([str(tmp_path / "x"), f"--problem={written[0]['problem']}", f"--out={out}"])
    shown = data_of(out.read_text())["rows"]
    assert not any("ratio" in r for r in shown[:7]) and ("ratio" in shown[7]) == (not likelihood)
    if not likelihood:
        want = [math.exp(now - then) for now, then in zip(written[7]["update_logps"], logps, strict=False)]
        assert shown[7]["ratio"] == pytest.approx(want, rel=6e-3) and len(want) == n < len(shown[7]["p"])


def test_the_curve_of_the_runs_own_shaping(done, tmp_path):
    """The page gets f and w = p f'(p) from loss.shape, so a fork's shaping is drawn as well."""
    trace([str(done), f"--out={tmp_path / 'x.html'}"])
    assert data_of((tmp_path / "x.html").read_text())["curve"] is None  # LUFFY's and none are the page's own
    curve, p = shaping_curve("sqrt", 0.1), [10 ** (-12 + i / 30) for i in range(451)]  # to 1000, where p / pi_phi may be
    assert curve["f"] == pytest.approx([x**0.5 for x in p], rel=1e-3)
    assert curve["w"] == pytest.approx([x**0.5 / 2 for x in p], rel=1e-3)


@pytest.mark.parametrize("how,weight", [(None, lambda p: 1.0), ("none", lambda p: p), ("phi", lambda p: p * (1 - p))])
def test_the_curve_of_a_likelihood(done, tmp_path, how, weight):
    """Where traces are learnt by likelihood, f is that term's, whatever the shaping of the policy term; log is log p itself."""
    config = json.load(open(done / "config.json")) | {"sft_coef": 0.5, "sft_shaping": how}
    if how is None:  # a run from before this knob
        del config["sft_shaping"]
    rows = rollouts_of(done, 2)[:8]
    write_trace(str(tmp_path / "x.html"), config, str(done), 2, rows)
    data = data_of((tmp_path / "x.html").read_text())
    assert data["likelihood"] == 0.5 and data["shaping"] == (how or "log")
    assert data["curve"]["w"] == pytest.approx([weight(10 ** (-12 + i / 30)) for i in range(451)], rel=1e-3, abs=1e-6)


def test_curves_of_runs(done, tmp_path, capsys, monkeypatch):
    """Seeds are one method. Folders with one name in two places are two. PNG and SVG are written, or what --out says."""
    for name in ("a_0", "a_1", "elsewhere/a_0"):
        shutil.copytree(done, tmp_path / name)
    folders = [str(tmp_path / name) for name in ("a_0", "a_1", "elsewhere/a_0")]
    methods = by_method(folders)
    assert [len(runs) for runs in methods.values()] == [2, 1] and all(name.endswith("a") for name in methods)
    monkeypatch.setattr("sys.argv", ["plot.py", *folders, f"--out={tmp_path / 'c'}"])
    main()
    assert "wrote " in capsys.readouterr().out
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    svg = (tmp_path / "c.svg").read_text()
    titles = [
        "held-out accuracy",
        "reward",
        "prompts solved by",
        "entropy",
        "tokens per response",
        "engine against trainer",
        "a step, by phase",
    ]
    assert all(f"<!-- {title} -->" in svg for title in titles)
    assert len(set(looks(dict.fromkeys(["mine", "luffy", "other", "grpo"])).values())) == 4
    monkeypatch.setattr("sys.argv", ["plot.py", folders[0], f"--out={tmp_path / 'd.svg'}"])
    main()
    assert (tmp_path / "d.svg").exists() and not (tmp_path / "d.png").exists()
    for argv, words in (
        ([], "write: python plot.py RUN"),
        ([folders[0], "--ou=x"], "write: python plot.py RUN"),
        ([folders[0], "--out=x.gif"], "ends in .png, .svg or .pdf"),
        ([str(tmp_path)], "does not exist: give folders that train.py wrote"),
    ):
        monkeypatch.setattr("sys.argv", ["plot.py", *argv])
        with pytest.raises(UserError, match=words):
            main()
    whole = '{"step": 0, "x": null}\n'
    for text, words in (
        ("", "is empty"),
        ('{"st', "is empty"),
        (whole + '{"st\n' + whole, "line 2 is not a step of a run"),
        (whole + "[1]\n", "line 2 is"),
        (whole + '{"x": 1}\n', "line 2 is"),
    ):
        (tmp_path / "a_0" / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=words):
            read_run(tmp_path / "a_0")
    (tmp_path / "a_0" / "metrics.jsonl").write_text(whole + '{"st')  # of a run that is still going
    assert read_run(tmp_path / "a_0") == [{"step": 0}]


def test_any_runs_can_be_drawn(tmp_path, monkeypatch):
    """Ten methods look different. Names with a $, rewards above 1, single points, seeds of unequal lengths, missing keys."""
    many = [f"m{i}" for i in range(10)]
    assert len(set(looks(dict.fromkeys(many)).values())) == 10
    for i, name in enumerate([*many, "lr$^$_0", "lr$^$_1", "fonts 東_0"]):
        rows = [{"step": step, "reward/own": 3.5 - i, "time/update": 1.0} for step in range(1 + i % 3)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = [str(tmp_path / name) for name in sorted(p.name for p in tmp_path.iterdir())]
    assert len(by_method([folders[0], folders[0] + "/"])["fonts 東"]) == 1  # the same folder is one seed
    monkeypatch.setattr("sys.argv", ["plot.py", *folders, f"--out={tmp_path / 'c.svg'}"])
    main()
    panel = plt.figure().add_subplot()
    draw_panel(panel, by_method(folders), "share", {"reward/own": ""})
    assert panel.get_ylim()[1] > 3 and sum(len(line.get_xdata()) > 0 for line in panel.lines) >= len(many) + 2
    monkeypatch.setattr("sys.argv", ["plot.py", folders[0], f"--out={tmp_path / 'no' / 'c.png'}"])
    with pytest.raises(UserError, match="cannot be written"):
        main()


def picture(folder, runs):
    """Draw runs, {folder's name: its lines of metrics.jsonl}, and return the figure as matplotlib holds it."""
    for name, rows in runs.items():
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods, shown = by_method([str(folder / name) for name in runs]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", shown.append)
        draw(methods, [str(folder / "c.png")], PANELS, phases=True)
    return shown[0]


@pytest.mark.parametrize("n,name", [(3, "sweep_" + 11 * "learning_rate1e-6_" + "gamma0.{}"), (30, "run{}x")])
def test_names_stay_inside_the_picture(tmp_path, n, name):
    """Long names, and many runs: each is in the legend, apart from the others, nothing leaves the picture, and the panels keep
    their height."""
    rows = [{"step": step, "reward/own": step / 9, "time/update": 1.0} for step in range(9)]
    figure = picture(tmp_path, {name.format(i): rows for i in range(n)})
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len({*texts}) == n and all(text.endswith(name[-3:].format(i)) for i, text in enumerate(texts))
    boxes = [legend.get_window_extent(), *(axis.get_tightbbox() for axis in figure.axes)]
    assert all(figure.bbox.x0 - 1 <= b.x0 and b.x1 <= figure.bbox.x1 + 1 for b in boxes)
    assert all(figure.bbox.y0 - 1 <= b.y0 and b.y1 <= figure.bbox.y1 + 1 for b in boxes)
    assert min(axis.bbox.height for axis in figure.axes) > 2 * figure.dpi
    labels = [label.get_window_extent() for label in figure.axes[-1].get_yticklabels()]
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[i + 1 :])


def test_one_and_two_points(tmp_path):
    """A single point has a marker, that of a seed too, and also if another seed has none yet. Steps are whole numbers."""
    rows = [{"step": step, "reward/own": 0.25 * step} for step in range(1, 5)]
    figure = picture(tmp_path, {"one": rows[:1], "two": rows[:2], "a_0": rows[2:3], "a_1": rows[3:], "b_0": rows[2:],
                                "b_1": [{"step": 0}]})  # fmt: skip
    panel = figure.axes[1]
    drawn = {(x, y) for line in panel.lines if line.get_marker() not in ("", "None", None) for x, y in line.get_xydata()}
    assert {(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)} <= drawn
    lines = [line.get_xydata().tolist() for line in panel.lines]
    assert [[3, 0.75], [4, 1.0]] in lines  # of b_0
    alone = plt.figure().add_subplot()
    draw_panel(alone, {"one": [rows[:1]]}, "share", {"reward/own": ""})
    low, high = alone.get_xlim()
    assert all(tick == round(tick) for tick in alone.get_xticks() if low <= tick <= high)


def test_the_tables_columns_stay_in_line():
    """However long a name is, and with many seeds."""
    row = {"step": 5, "eval/greedy": 0.5, "eval/greedy/easy": 0.25, "eval/avg@k": 0.125, "time/update": 2.0}
    lines = table({"a": [[row]], "a_long_name" * 4: [[row]] * 9}).splitlines()
    for column, number in (("greedy", "0.500"), ("sampled", "0.125")):
        assert {line.index(number) for line in lines if number in line} == {lines[0].index(column)}
    assert {len(line) for line in lines if "0.500" in line} == {len(lines[0])}
    assert {line.index("0.250") for line in lines if "easy" in line} == {lines[0].index("greedy")}


def test_the_verdict_is_in_words(done, tmp_path):
    """No codes: why an answer is not right, and whether it was cut off. A grader's own words stay. The question is open."""
    rows = rollouts_of(done, 2)[:8]
    for r, (reason, finish) in zip(rows, [("no_think", "length"), ("timeout", "stop"), ("my own", "stop")], strict=False):
        r["reason"], r["finish_reason"] = reason, finish
    write_trace(str(tmp_path / "x.html"), json.load(open(done / "config.json")), str(done), 2, rows)
    page = (tmp_path / "x.html").read_text()
    words = ["no </think>, cut off at max_tokens", "grading timed out", "my own"]
    assert [r["verdict"] for r in data_of(page)["rows"][:3]] == words
    assert "<details" not in page and page.index('<pre id="prompt">') < page.index("<table>")


def test_rows_that_were_not_trained_on_or_are_not_finite(done, tmp_path):
    """They are on the page all the same. What is not known is null."""
    shutil.copytree(done, tmp_path / "run")
    path = tmp_path / "run" / "rollouts" / "step_1.jsonl"
    rows = lines_of(path)
    rows[7]["update_logps"], rows[0]["sampler_logps"][0] = [], math.nan
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    trace([str(tmp_path / "run"), "--step=1", f"--problem={rows[0]['problem']}", f"--out={tmp_path / 'x.html'}"])
    shown = data_of((tmp_path / "x.html").read_text())["rows"]
    assert shown[7]["p"] == [None] * len(shown[7]["ids"]) and shown[0]["p"][0] is None and shown[0]["p"][1] > 0
    shutil.rmtree(tmp_path / "run" / "rollouts")
    with pytest.raises(UserError, match="has no rollouts"):
        trace([str(tmp_path / "run")])
    with pytest.raises(UserError, match="cannot be written"):
        trace([str(done), f"--out={tmp_path / 'no' / 'x.html'}"])


def test_damaged_rollouts(done, tmp_path):
    shutil.copytree(done, tmp_path / "run", symlinks=True)
    for text in ("[]\n", "3\n", "", "{", '{"x": 1}\n'):
        (tmp_path / "run" / "rollouts" / "step_2.jsonl").write_text(text)
        with pytest.raises(UserError, match="step_2.jsonl is damaged: choose another step"):
            trace([str(tmp_path / "run"), "--step=2", f"--out={tmp_path / 'page.html'}"])
    for text, words in (("{", "is damaged"), ("{}", "has no 'model': give a folder that train.py wrote")):
        (tmp_path / "run" / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"config.json {words}"):
            trace([str(tmp_path / "run"), f"--out={tmp_path / 'page.html'}"])


def test_rollouts_of_an_older_version(done, tmp_path):
    out = tmp_path / "old"
    shutil.copytree(done, out, symlinks=True)
    path = out / "rollouts" / "step_2.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "written_by"}) + "\n" for r in rows))
    with pytest.raises(UserError, match="an older version of this code"):
        trace([str(out), "--step=2", f"--out={tmp_path / 'page.html'}"])


def test_the_table_has_a_line_for_each_source():
    runs = {"a": [[{"step": 0, "eval/greedy": 0.5, "eval/greedy/easy": 1.0, "eval/greedy/hard": 0.0, "time/update": 2.0}]]}
    lines = table(runs).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["a", "0", "0.500"], ["easy", "1.000", "-"], ["hard", "0.000", "-"]]


def test_a_curve_is_what_every_seed_has():
    runs = [
        [{"step": 0, "x": 1.0}, {"step": 1}, {"step": 2, "x": 3.0}],
        [{"step": 0, "x": 2.0}, {"step": 1, "x": 9.0}, {"step": 2, "x": 5.0}],
    ]
    assert curve(runs, "x") == ([0, 2], [1.5, 4.0], [1.0, 3.0], [2.0, 5.0])
    assert curve(runs, "y")[0] == []


def test_the_template_is_never_overwritten(done, monkeypatch, tmp_path):
    template = open(os.path.join(ROOT, "trace.html")).read()
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="is the page's template"):
        trace([str(done), "--out=trace.html"])
    assert open(os.path.join(ROOT, "trace.html")).read() == template
    monkeypatch.setattr("plot.ROOT", str(tmp_path))
    (tmp_path / "trace.html").write_text("once filled")
    with pytest.raises(UserError, match="has no {{data}} any more"):
        trace([str(done), f"--out={tmp_path / 'x.html'}"])


def test_a_page_replaces_only_a_page(done, tmp_path):
    (tmp_path / "notes.html").write_text("<!doctype html><title>mine</title>")
    with pytest.raises(UserError, match="notes.html is there already and is no such page"):
        trace([str(done), f"--out={tmp_path / 'notes.html'}"])
    assert "mine" in (tmp_path / "notes.html").read_text()
    for step in (1, 2):
        trace([str(done), f"--step={step}", f"--out={tmp_path / 'x.html'}"])


def test_a_picture_replaces_only_a_picture_of_curves(tmp_path, monkeypatch):
    """In each format: one that was drawn here is drawn again, a user's is left alone, and then none is written."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward/own": 0.5}\n')
    monkeypatch.setattr("plot.PANELS", [])  # only the phases: it is quicker

    def draw(out):
        monkeypatch.setattr("sys.argv", ["plot.py", str(tmp_path), f"--out={tmp_path / out}"])
        main()

    for out in ("c", "c.pdf"):
        for _ in range(2):
            draw(out)
    plt.figure().savefig(tmp_path / "mine.svg")
    mine = (tmp_path / "mine.svg").read_bytes()
    with pytest.raises(UserError, match="mine.svg is there already and is no picture of curves: choose another name"):
        draw("mine")
    assert (tmp_path / "mine.svg").read_bytes() == mine and not (tmp_path / "mine.png").exists()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="folder.png cannot be written: Is a directory"):
        draw("folder.png")


def test_the_most_telling_group_is_shown_first(done, tmp_path):
    """Without --problem it is the group with the least probable teacher token."""
    trace([str(done), "--step=2", f"--out={tmp_path / 'x.html'}"])
    taught = [r for r in rollouts_of(done, 2) if r["update_logps"] and r["advantage"]]
    rarest = min(taught, key=lambda r: min(r["update_logps"]))
    assert data_of((tmp_path / "x.html").read_text())["problem"] == rarest["problem"]


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
    """A byte-level tokenizer cuts characters into pieces. The last piece shows the character."""
    tokenizer = load_tokenizer(byte_model)
    text = "½ 東 \U0001f600 a"
    texts = token_texts(tokenizer, tokenizer.encode(text))
    assert "".join(texts) == text and texts[:2] == ["", "½"] and texts[3:6] == ["", "", "東"]
    assert len(token_texts(tokenizer, tokenizer.encode("\U0001f600")[:2])) == 2  # cut off inside a character


def large_page(folder, byte_model, n=8192):
    """Eight rows of n tokens. Every field that comes from data or model holds what an attacker would write."""
    shutil.copytree(byte_model, folder / "latest")
    tokenizer = load_tokenizer(byte_model)
    text = (EVIL + " so x = 2\n") * (n // 100)
    ids = (tokenizer.encode(text) * 3)[:n]
    assert len(ids) == n
    row = {"problem": 1, "source": EVIL, "prompt": EVIL, "answer": EVIL, "reason": "no_think", "reward": 0.0,
           "advantage": -0.125, "written_by": "own", "finish_reason": "length", "response_ids": ids, "teacher_tokens": 0,
           "update_logps": [], "sampler_logps": [-0.001 * i for i in range(n)]}  # fmt: skip
    given = {"written_by": "teacher", "teacher_tokens": n, "update_logps": row["sampler_logps"], "sampler_logps": []}
    teacher = {**row, **given, "finish_reason": "stop"}
    out = folder / "page.html"
    config = {"model": byte_model, "shaping": "luffy", "gamma": 0.1, "sft_coef": 0.0}
    write_trace(str(out), config, str(folder), 7, [row] * 7 + [teacher])
    return out


def test_long_traces_make_a_small_page_without_markup(tmp_path, byte_model):
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
    """The page's document after its script has run in headless Chromium."""
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync""".split()
    flags.append(f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run([browser(), *flags, *more, f"file://{page}"], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.slow
def test_the_page_in_a_browser(done, tmp_path, byte_model):
    """Eight rows, one span per token, the numbers of the chosen token, and data that stay text."""
    out = tmp_path / "page.html"
    trace([str(done), "--step=1", f"--out={out}"])
    dom, data = render(out, tmp_path, "--dump-dom"), data_of(out.read_text())
    teacher = data["rows"][7]
    assert len(re.findall(r'<tr tabindex="0"', dom)) == 8
    spans = re.findall(r'<span data-i="\d+"[^>]*>([^<]*)</span>', dom)
    assert [html.unescape(s) for s in spans] == [t.replace("\n", "↵\n") or "·" for t in teacher["tokens"]]
    p = min(teacher["p"])
    numbers = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", dom))
    gained = 0.1 / (p + 0.1) ** 2
    assert float(re.search(r"shaped: \u00d7 (\S+)", numbers["w unshaped"])[1]) == pytest.approx(gained, rel=0.05)
    assert float(numbers["p"]) == pytest.approx(p, rel=0.05)  # the page begins at the least probable token
    assert float(numbers["f(p)"]) == pytest.approx(p / (p + 0.1), rel=0.05)
    assert float(numbers["weight w"]) == pytest.approx(0.1 * p / (p + 0.1) ** 2, rel=0.05)
    page = large_page(tmp_path, byte_model)
    dom = render(page, tmp_path, "--dump-dom")
    assert dom.count("<span data-i=") == 8192 and "<title>A group, token by token</title>" in dom and "<img" not in dom
    # Nothing is wider than the window or cut off, and nothing overlaps, on a desktop and on a phone, where the numbers of the
    # chosen token are a bar at the bottom.
    measure = """<script>
        const ids = ["bar", "tokens", "curve", ...innerWidth > 800 ? ["detail"] : []];
        const boxes = ids.map(id => document.getElementById(id).getBoundingClientRect());
        const over = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
        const pairs = boxes.flatMap((a, i) => boxes.slice(i + 1).map(b => over(a, b)));
        const whole = e => e.scrollWidth <= e.clientWidth;
        const fits = whole(document.documentElement) && [...document.querySelectorAll(".scroll, pre")].every(whole);
        document.title = [innerWidth, fits, pairs.some(x => x)];
    </script>"""
    (tmp_path / "measured.html").write_text(page.read_text() + measure)
    for width in (1280, 390):  # headless Chromium has no window narrower than 500, but a frame may be
        frame = tmp_path / "frame.html"
        frame.write_text(f"""<iframe src="measured.html" width={width} height=2000 onload="
            document.title = this.contentWindow.document.title"></iframe>""")
        dom = render(frame, tmp_path, "--dump-dom", "--allow-file-access-from-files", "--window-size=1400,2100")
        assert f"<title>{width},true,false</title>" in dom, dom[:300]
