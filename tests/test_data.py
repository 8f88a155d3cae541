from dataclasses import replace

import build
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from configurator import UserError
from data import Order, Rollout, bins_needed, load_problems, load_tokenizer, pack, partition, response_text, set_aside


def write(path, rows, schema=build.SCHEMA):
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return str(path)


def a_row(**changes):
    return {
        "data_source": "toy",
        "prompt": [{"content": "12+34=?", "role": "user"}],
        "target": [{"content": "<think>\n12>46</think>\\boxed{46}", "role": "assistant"}],
        "ability": "math",
        "reward_model": {"ground_truth": "46", "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
        **changes,
    }


def load(path, tokenizer, **options):
    lines = []
    problems = load_problems(path, tokenizer, log=lines.append, **options)
    return problems, lines[0]


def test_token_in_token_out(tokenizer, problems):
    """A trace's ids are those of its text after the prompt, plus EOS; decoded, they are that text again."""
    table = pq.read_table(build.HERE + "/train.parquet").to_pylist()
    for problem, row in zip(problems[:50], table[:50], strict=True):
        prompt = row["prompt"][0]["content"] + "<think>\n"
        trace = row["target"][0]["content"].removeprefix("<think>\n")
        assert tokenizer.decode(problem.prompt_ids) == prompt
        assert problem.prompt_ids + problem.teacher[0] == [*tokenizer.encode(prompt + trace), tokenizer.eos_token_id]
        assert response_text(tokenizer, problem.teacher[0]) == trace
        assert problem.answer == row["reward_model"]["ground_truth"] and problem.source == "toy"


def test_null_and_several_traces(tmp_path, tokenizer):
    several = [*a_row()["target"], {"content": "46</think>\\boxed{46}", "role": "assistant"}]
    path = write(tmp_path / "a.parquet", [a_row(target=None), a_row(target=several), a_row(target=[])])
    problems, line = load(path, tokenizer)
    assert [len(p.teacher) for p in problems] == [0, 2, 0]
    assert tokenizer.decode(problems[1].teacher[1]) == "46</think>\\boxed{46}<eos>"
    assert "3 problems, 1 with a teacher trace" in line


def test_limits_and_empty_rows_are_counted(tmp_path, tokenizer):
    rows = [a_row(), a_row(prompt=[]), a_row(reward_model={"ground_truth": "", "style": "rule"}), a_row(reward_model=None),
            a_row(prompt=[{"content": "1" * 80, "role": "user"}])]  # fmt: skip
    path = write(tmp_path / "a.parquet", rows)
    problems, line = load(path, tokenizer, max_prompt_tokens=64, max_teacher_tokens=10)
    assert len(problems) == 1 and problems[0].id == 0 and problems[0].teacher == []
    assert "3 without prompt or answer, 1 prompts over 64 tokens, 1 traces over 10 tokens" in line
    with pytest.raises(UserError, match="no usable row"):
        load(path, tokenizer, max_prompt_tokens=2)


def test_bad_files(tmp_path, tokenizer):
    good = (tmp_path / "good.parquet", [a_row()] * 2000)
    whole = open(write(*good), "rb").read()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.parquet").write_bytes(b"")
    # Damage inside the data, the footer being whole.
    (tmp_path / "damaged.parquet").write_bytes(whole[:8] + b"\xff" * 200 + whole[208:])
    pq.write_table(pa.table({"question": ["?"], "answer": ["!"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"prompt": ["?"], "reward_model": ["!"]}), tmp_path / "flat.parquet")
    for name, words in {
        "missing.parquet": "no data file",
        "cut.parquet": "not a whole parquet",
        "empty.parquet": "not a whole parquet",
        "damaged.parquet": "damaged|not a whole",
        "other.parquet": "lacks the column 'prompt'",
        "flat.parquet": "column 'prompt' is string",
    }.items():
        with pytest.raises(UserError, match=words) as e:
            load(str(tmp_path / name), tokenizer)
        assert name in str(e.value)
    for column, value in {
        "prompt": ["What?"],
        "target": ["</think>1"],
        "reward_model": {"ground_truth": 3},
        "data_source": 7,
    }.items():
        table = pa.Table.from_pylist([{**a_row(), column: value}])
        pq.write_table(table, tmp_path / "odd.parquet")
        with pytest.raises(UserError, match=f"odd.parquet: column '{column}' is .*, not LUFFY's"):
            load(str(tmp_path / "odd.parquet"), tokenizer)
    write(tmp_path / "none.parquet", [])
    with pytest.raises(UserError, match="no usable row"):
        load(str(tmp_path / "none.parquet"), tokenizer)


def test_the_prompt_must_open_a_thought(tmp_path):
    tokenizer = build.build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n", "")
    path = write(tmp_path / "a.parquet", [a_row()])
    with pytest.raises(UserError, match="require_think"):
        load(path, tokenizer)
    problems, _ = load(path, tokenizer, require_think=False)
    assert tokenizer.decode(problems[0].teacher[0]).startswith("<think>\n")  # nothing is stripped then


def test_a_failing_template_names_the_row(tmp_path):
    tokenizer = build.build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match=r"a.parquet row 0: the model's chat template fails on it: no such role"):
        load(write(tmp_path / "a.parquet", [a_row()]), tokenizer)


def test_model_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    tokenizer = build.build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "mute")
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(tmp_path / "mute"))


def test_order_is_resumable():
    order = Order(10, seed=3)
    first = [order.take(4) for _ in range(4)]
    assert len(set(first[0] + first[1])) == 8  # within an epoch all differ
    resumed = Order(10, 3, **order.state())
    assert [resumed.take(4) for _ in range(5)] == [order.take(4) for _ in range(5)]
    assert Order(10, 3).take(10) != Order(10, 4).take(10)
    assert Order(10, 3, epoch=1).take(10) != Order(10, 3).take(10)
    epoch = Order(10, 3)
    assert sorted(epoch.take(5) + epoch.take(5)) == list(range(10))


def test_partition_keeps_the_budget_and_every_sequence():
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 17, 200):
        lengths = torch.randint(1, 500, (n,), generator=g).tolist()
        bins = partition(lengths, bins_needed(lengths, 600))
        assert sorted(i for b in bins for i in b) == list(range(n))
        assert max(sum(lengths[i] for i in b) for b in bins) <= 600
    assert bins_needed([], 600) == 1
    with pytest.raises(UserError, match="micro_tokens=600"):
        bins_needed([700, 3], 600)


def test_pack_layout():
    own = Rollout(0, [5, 6, 1], 0, [-0.1, -0.2, -0.3], "stop", advantage=-0.125)
    mixed = Rollout(1, [7, 8, 9, 1], 3, [-0.4], "stop", advantage=0.875)  # a trace continued by the model
    b = pack([([2, 3], own), ([4], mixed)])
    assert b.input_ids.tolist() == [[2, 3, 5, 6, 1, 4, 7, 8, 9, 1]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert b.cu_seqlens.tolist() == [0, 5, 10]
    assert b.loss_mask.tolist() == [False, False, True, True, True, False, True, True, True, True]
    assert b.is_teacher.tolist() == [False] * 6 + [True] * 3 + [False]
    torch.testing.assert_close(b.advantage, torch.tensor([0, 0] + [-0.125] * 3 + [0] + [0.875] * 4))
    nan = float("nan")
    want = torch.tensor([nan, nan, -0.1, -0.2, -0.3, nan, nan, nan, nan, -0.4])
    torch.testing.assert_close(b.sampler_logp, want, equal_nan=True)
    assert not pack([]).loss_mask.any()


def test_set_aside(tokenizer, problems):
    """The same questions whatever the order of the file; repeats of a question go with it; nothing in both halves."""
    twice = [*problems, *problems[:50]]
    left, held = set_aside(twice, 20)
    ids = {tuple(p.prompt_ids) for p in held}
    assert len(held) == len(ids) == 20 and {p.source for p in held} == {"holdout"}
    assert not ids & {tuple(p.prompt_ids) for p in left}
    assert len(left) == sum(tuple(p.prompt_ids) not in ids for p in twice)
    again = set_aside(twice[::-1], 20)[1]
    assert [p.prompt_ids for p in again] == [p.prompt_ids for p in held]
    assert [p.prompt_ids for p in set_aside(twice, 10)[1]] == [p.prompt_ids for p in held[:10]]
    assert set_aside(twice, 0) == (twice, [])
    other = [replace(p, prompt_ids=[7, *p.prompt_ids]) for p in twice]  # another chat template
    assert [p.key for p in set_aside(other, 20)[1]] == [p.key for p in held]
    with pytest.raises(UserError, match="holdout=100000 leaves nothing to train on: the file has"):
        set_aside(twice, 100000)


def test_a_problems_key_is_its_own(tmp_path, tokenizer):
    """Of source, question and answer as the file has them, wherever the row stands and whatever renders it."""
    rows = [a_row(), a_row(data_source="b"), a_row(reward_model={"ground_truth": "47", "style": "rule"}),
            a_row(prompt=[{"content": "12+35=?", "role": "user"}]), a_row(extra_info={"index": 9, "split": "b"})]  # fmt: skip
    keys = [p.key for p in load(write(tmp_path / "a.parquet", rows), tokenizer)[0]]
    assert len(set(keys)) == 4 and keys[4] == keys[0]
    turned = write(tmp_path / "b.parquet", rows[::-1])
    other = load_problems(
        turned, tokenizer, log=lambda line: None, render=lambda m, a, s: (m[0]["content"] + "+<think>\n", "x")
    )
    assert [p.key for p in other] == keys[::-1] and {p.answer for p in other} == {"x"}
    assert tokenizer.decode(other[-1].prompt_ids) == "12+34=?+<think>\n"
