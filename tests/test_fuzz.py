"""hypothesis looks for inputs that break what reads from outside: knobs, parquet, packing, answers."""

import math
import os
import re
import shutil
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sympy import parse_expr

from configurator import UserError, configure, printable
from data import Rollout, bins_needed, load_problems, load_tokenizer, partition, spread
from reward import MATHD, PRM800K, expression, fast_verdict, graded_text, integer, last_boxed, prm800k_equal, rewrite

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TEXT = st.text(max_size=40)

# ---------------------------------------------------------------- the configurator

DEFAULTS = {"steps": 10, "rate": 1e-3, "name": "toy", "flag": False}
VALUE = st.one_of(
    TEXT, st.integers().map(str), st.floats().map(str), st.sampled_from(["True", "False", "None", "[1]", "1e400", "-"])
)
ARGUMENT = st.one_of(
    TEXT.filter(lambda t: t not in ("-h", "--help") and "\x00" not in t),
    st.builds("--{}={}".format, st.sampled_from([*DEFAULTS, "stepz", "", "_own"]), VALUE),
)


@fuzz
@given(st.lists(ARGUMENT, max_size=4))
def test_arguments_set_a_knob_in_its_type_or_are_refused(argv):
    scope = dict(DEFAULTS)
    try:
        knobs = configure(scope, argv, __file__)
    except UserError as e:
        assert scope == DEFAULTS and len(printable(str(e)).split("\n")) <= 2 + "".join(argv).count("\n")
        return
    assert scope == knobs and knobs.keys() == DEFAULTS.keys()
    assert all(type(knobs[k]) is type(DEFAULTS[k]) for k in knobs) and math.isfinite(knobs["rate"])


@fuzz
@given(st.binary(max_size=80))
def test_a_config_file_of_any_bytes(content):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "c.py")
        with open(path, "wb") as f:
            f.write(content)
        scope = dict(DEFAULTS)
        try:
            configure(scope, [path], __file__)
        except UserError as e:
            assert scope == DEFAULTS and path in str(e)


# ---------------------------------------------------------------- parquet

MESSAGE = st.one_of(
    st.none(), st.fixed_dictionaries({"role": st.one_of(st.none(), TEXT), "content": st.one_of(st.none(), TEXT)})
)
ROW = st.fixed_dictionaries(
    {
        "prompt": st.one_of(st.none(), st.lists(MESSAGE, max_size=3)),
        "target": st.one_of(st.none(), st.lists(MESSAGE, max_size=3)),
        "reward_model": st.one_of(st.none(), st.fixed_dictionaries({"ground_truth": st.one_of(st.none(), TEXT)})),
        "data_source": st.one_of(st.none(), TEXT),
    }
)
MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
SCHEMA = pa.schema(
    {
        "prompt": MESSAGES,
        "target": MESSAGES,
        "reward_model": pa.struct({"ground_truth": pa.string()}),
        "data_source": pa.string(),
    }
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("toy/base")


@fuzz
@given(st.lists(ROW, max_size=5), st.sets(st.sampled_from(SCHEMA.names), max_size=2))
def test_any_rows_of_the_schema(tokenizer, rows, without):
    """What is read is within the limits and whole; what is not is counted; nothing else happens."""
    with tempfile.TemporaryDirectory() as folder:
        path, lines = os.path.join(folder, "d.parquet"), []
        try:
            table = pa.Table.from_pylist(rows, SCHEMA).drop_columns(sorted(without))
        except (pa.ArrowException, UnicodeEncodeError):  # a lone surrogate is no string of Arrow's
            return
        pq.write_table(table, path)
        try:
            problems = load_problems(path, tokenizer, 30, 20, log=lines.append)
        except UserError as e:
            assert path in str(e)
            return
    for p in problems:
        row = rows[p.id]
        assert 0 < len(p.prompt_ids) <= 30 and all(0 < len(t) <= 20 and t[-1] == tokenizer.eos_token_id for t in p.teacher)
        assert p.answer == row["reward_model"]["ground_truth"].strip() and p.answer and printable(p.source) == p.source
    assert len(lines) == 1


@fuzz
@given(st.data())
def test_a_damaged_file(tokenizer, data):
    """Bytes flipped or cut: a UserError that names the file, or problems; never anything else."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "d.parquet")
        shutil.copy("toy/shaping/test.parquet", path)
        content = bytearray(open(path, "rb").read())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
        open(path, "wb").write(content)
        try:
            load_problems(path, tokenizer, log=lambda line: None)
        except UserError as e:
            assert path in str(e)


# ---------------------------------------------------------------- packing

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@fuzz
@given(LENGTHS, st.integers(1, 9))
def test_partition(lengths, n):
    bins = partition(lengths, n)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths))) and len(bins) == n
    totals = [sum(lengths[i] for i in b) for b in bins]
    assert max(totals) - min(totals) <= max(lengths, default=0)


@fuzz
@given(LENGTHS, st.integers(1, 4), st.integers(60, 200))
def test_every_sequence_is_packed_once_and_every_rank_has_as_many(lengths, world, budget):
    rng = np.random.default_rng(len(lengths))
    pairs = []
    for i, n in enumerate(lengths):
        cut = int(rng.integers(0, n))
        response = list(range(100, 100 + n - cut))
        pairs.append((list(range(cut)), Rollout(i, response, n % 2 * len(response), [], "", advantage=float(i))))
    shares = [spread(pairs, budget, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    seen = []
    for cut, batch in (part for share in shares for part in share):
        ends = batch.cu_seqlens.tolist()
        assert ends[-1] == batch.input_ids.numel() <= max(budget, 2)
        for i, start, end in zip(cut, ends, ends[1:], strict=False):
            seen.append(i)
            prompt, r = pairs[i]
            assert batch.input_ids[0, start:end].tolist() == prompt + r.response_ids
            assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
            assert batch.loss_mask[start:end].tolist() == [False] * len(prompt) + [True] * len(r.response_ids)
            assert batch.is_teacher[start:end].sum() == r.n_teacher_tokens
            assert set(batch.advantage[start + len(prompt) : end].tolist()) <= {float(i)}
        if not cut:
            assert not batch.loss_mask.any()  # the dummy weighs nothing
    assert sorted(seen) == list(range(len(pairs)))


@fuzz
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_too_long_for_any_bin_is_an_error(lengths):
    if max(lengths) > 200:
        with pytest.raises(UserError, match=f"a sequence of {max(lengths)} tokens exceeds"):
            bins_needed(lengths, 200)
    else:
        n = bins_needed(lengths, 200)
        assert all(sum(lengths[i] for i in b) <= 200 for b in partition(lengths, n))


# ---------------------------------------------------------------- answers

PIECES = st.sampled_from(
    [
        "\\boxed{",
        "\\fbox{",
        "\\boxed ",
        "{",
        "}",
        "</think>",
        "<think>",
        "\\frac",
        "\\sqrt",
        "(",
        ")",
        "[",
        ",",
        "^",
        "1",
        "23",
        "x",
        " ",
    ]
)
MATH = st.one_of(TEXT, st.lists(PIECES, max_size=15).map("".join))


@fuzz
@given(MATH, MATH)
def test_answers_are_read_as_what_they_are(text, answer):
    graded = graded_text(text)
    assert graded is None if "</think>" not in text else ("</think>" not in graded and graded in text)
    box = last_boxed(text)
    if box is not None:
        assert box in text and (box.count("{") == box.count("}") or not text.rpartition("\\boxed")[2].lstrip().startswith("{"))
    fast = fast_verdict(text, answer)
    if fast is not None:
        assert fast.reward == float(int(re.search(r"\d+", text)[0]) == int(answer))
    for rules in (MATHD, PRM800K):
        assert isinstance(rewrite(text, rules), str)
    assert float(integer("12.0")) == 12 and isinstance(integer(text), str)


@fuzz
@given(st.text("0123456789+-*/^().xypisqrtln", max_size=12))
def test_expressions_parse_or_raise(text):
    """A parser by hand: it ends, and nothing but its errors gets out. Powers of powers are left out before it is asked."""
    if "^" in text:
        return
    try:
        expression(text)
    except Exception as e:
        assert isinstance(e, (IndexError, ValueError, TypeError))


LEAF = st.sampled_from(["2", "3", "x", "y", "pi", "1.5", "7", "10"])
EXPRESSION = st.recursive(
    LEAF,
    lambda e: st.one_of(
        *(
            st.tuples(e, e).map(lambda t, form=form: form.format(*t))
            for form in ("{}+{}", "{}-{}", "{}*{}", "({})/({})", "{}({})")
        ),
        *(e.map(form.format) for form in ("({})", "sqrt({})", "({})^2", "-{}")),
    ),
    max_leaves=5,
)


@fuzz
@given(EXPRESSION)
def test_expressions_are_read_as_sympy_reads_them(text):
    """Its own parser evaluates Python: here it may, as the measure of ours."""
    ours, theirs = expression(text), parse_expr(text.replace("^", "**"), transformations="implicit")
    difference = (ours - theirs).subs({"x": 0.37, "y": 0.71}).evalf()
    assert ours == theirs or abs(complex(difference)) < 1e-9, (ours, theirs)


@fuzz
@given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 99))
def test_equal_numbers_are_equal_and_others_are_not(a, b, c):
    assert prm800k_equal(f"\\frac{{{a * c}}}{{{b * c}}}", f"\\frac{{{a}}}{{{b}}}") or a % b == 0
    assert not prm800k_equal(f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{a + b}}}{{{b}}}")
    assert prm800k_equal(f"{a},000" if a > 0 else str(a), f"{a}000" if a > 0 else str(a))
