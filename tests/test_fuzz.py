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
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sympy import parse_expr

from configurator import UserError, configure, printable
from data import Rollout, bins_needed, load_problems, partition, spread, unpack
from reward import fast_verdict, graded_text
from runtime.oat import MATHD, PLAIN, PRM800K, by_oat, expression, integer, last_boxed, prm800k_equal, rewrite
from runtime.tokenizer import load_tokenizer

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
    """What is read is whole and within the limits, what is not read is counted, and nothing else happens."""
    with tempfile.TemporaryDirectory() as folder:
        path, lines = os.path.join(folder, "d.parquet"), []
        try:
            table = pa.Table.from_pylist(rows, SCHEMA).drop_columns(sorted(without))
        except (pa.ArrowException, UnicodeEncodeError):  # a lone surrogate is no string to Arrow
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
    """Bytes flipped or cut: a UserError that names the file, or problems, and never anything else."""
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


def some_rollouts(lengths, seed):
    """One for each number of tokens, of every source, with some prompts that repeat and values that tell them apart."""
    rng, rollouts = np.random.default_rng(seed), []
    for i, n in enumerate(lengths):
        n_prompt = int(rng.integers(0, n))
        n_response = n - n_prompt
        source = ("own", "teacher", "replay")[rng.integers(3)]
        n_teacher = int(rng.integers(1, n_response + 1)) if source == "teacher" else 0
        logps = [float(-i - j / 64) for j in range(n_response - n_teacher)]
        response = [100 + (i + j) % 40 for j in range(n_response)]
        rollouts.append(Rollout(i, list(range(n_prompt)), response, source, n_teacher, logps, advantage=float(i)))
    return rollouts


CUTS = (LENGTHS, st.integers(1, 4), st.integers(60, 200), st.integers(0, 9))  # lengths, ranks, token budget, seed


@fuzz
@given(*CUTS)
def test_every_rollout_is_packed_once_and_every_rank_has_as_many(lengths, world, budget, seed):
    rollouts = some_rollouts(lengths, seed)
    shares = [spread(rollouts, budget, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    seen = []
    for batch in (batch for share in shares for batch in share):
        ends = batch.cu_seqlens.tolist()
        assert ends[-1] == batch.input_ids.numel() <= max(budget, 2) and len(ends) == max(1, len(batch.rows)) + 1
        for i, start, end in zip(batch.rows, ends, ends[1:], strict=False):
            seen.append(i)
            r = rollouts[i]
            n_prompt, first_own = len(r.prompt_ids), len(r.prompt_ids) + r.n_teacher_tokens
            part = lambda values: values[start:end].tolist()  # noqa: B023
            assert part(batch.input_ids[0]) == r.prompt_ids + r.response_ids
            assert part(batch.position_ids[0]) == list(range(end - start))
            assert part(batch.loss_mask) == [False] * n_prompt + [True] * len(r.response_ids)
            assert part(batch.is_teacher) == [n_prompt <= t < first_own for t in range(end - start)]
            assert part(batch.advantage) == [0.0] * n_prompt + [r.advantage] * len(r.response_ids)
            assert part(batch.behaviour_logp) == [0.0] * first_own + r.sampler_logps
            assert batch.is_replay[start:end].sum() == len(r.response_ids) * (r.source == "replay")
        if not batch.rows:
            assert not batch.loss_mask.any()  # the dummy weighs nothing
    assert sorted(seen) == list(range(len(rollouts)))


@fuzz
@given(*CUTS)
def test_own_teachers_and_replayed_tokens_partition_the_response(lengths, world, budget, seed):
    """Each response token is of exactly one kind, no other token is of any, and no number is NaN."""
    for batch in (b for rank in range(world) for b in spread(some_rollouts(lengths, seed), budget, rank, world)):
        teacher = batch.is_teacher & batch.loss_mask  # the dummy's token is a teacher's, and no response token
        kinds = teacher.int() + batch.is_replay.int() + batch.is_own.int()
        assert kinds.tolist() == batch.loss_mask.int().tolist()
        for name, value in vars(batch).items():
            assert not isinstance(value, torch.Tensor) or value.isfinite().all(), name


@fuzz
@given(*CUTS)
def test_unpack_is_the_inverse_of_spread(lengths, world, budget, seed):
    """Over all ranks, every row comes back exactly once, with the values of its own response tokens."""
    rollouts, found = some_rollouts(lengths, seed), []
    for rank in range(world):
        batches = spread(rollouts, budget, rank, world)
        found += unpack(batches, [batch.input_ids[0] + 1000 * batch.advantage for batch in batches])
    assert sorted(row for row, _ in found) == list(range(len(rollouts)))
    for row, values in found:
        assert values == [token + 1000 * row for token in rollouts[row].response_ids]


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
    for rules in (PLAIN, MATHD, PRM800K):
        assert isinstance(rewrite(text, rules), str)
    assert float(integer("12.0")) == 12 and isinstance(integer(text), str)


@fuzz
@given(st.text("0123456789+-*/^().xypisqrtln", max_size=12))
def test_expressions_parse_or_raise(text):
    """A hand-written parser: it ends, and raises nothing but its own errors. Its callers reject powers of powers first."""
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
    """sympy's parser evaluates Python. Here that is safe, and it is the measure of ours."""
    ours, theirs = expression(text), parse_expr(text.replace("^", "**"), transformations="implicit")
    difference = (ours - theirs).subs({"x": 0.37, "y": 0.71}).evalf()
    assert ours == theirs or abs(complex(difference)) < 1e-9, (ours, theirs)


@fuzz
@given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 99))
def test_equal_numbers_are_equal_and_others_are_not(a, b, c):
    assert prm800k_equal(f"\\frac{{{a * c}}}{{{b * c}}}", f"\\frac{{{a}}}{{{b}}}") or a % b == 0
    assert not prm800k_equal(f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{a + b}}}{{{b}}}")
    assert by_oat(f"\\boxed{{{a},000}}" if a > 0 else f"\\boxed{{{a}}}", f"{a}000" if a > 0 else str(a))[0]
