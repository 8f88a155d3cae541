import json
import math
from dataclasses import replace

import build
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import BASE, a_row, write

from configurator import UserError
from data import Order, Rollout, bins_needed, load_benchmark, load_problems, pack, partition, set_aside, spread, unpack
from runtime.tokenizer import load_tokenizer, response_text


def load(path, tokenizer, **options):
    lines = []
    problems = load_problems(path, tokenizer, log=lines.append, **options)
    return problems, lines[0]


def test_token_in_token_out(tokenizer, problems):
    """A trace's ids are those of its text after the prompt, and EOS. Decoded, they are that text again."""
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


def test_a_teachers_log_probs(tmp_path, tokenizer):
    """`target_logps`: a list of floats beside each trace, one per token, EOS included. A trace that has others is dropped."""
    target = a_row()["target"]
    n = len(load(write(tmp_path / "plain.parquet", [a_row()]), tokenizer)[0][0].teacher[0])
    good, other = [-0.5] * (n - 1) + [0.0], [-1.0] * n
    cases = [(target, [good]), (target, None), (target, [None]), (target * 3, [good, other, None]),
             (target * 2, [good[:-1], good]), (target, [[*good, 0.0]]), (target, [[*good[:-1], 0.1]]),
             (target, [[*good[:-1], -math.inf]]), ([None, *target], [other, good])]  # fmt: skip
    schema = build.SCHEMA.append(pa.field("target_logps", pa.list_(pa.list_(pa.float64()))))
    path = write(tmp_path / "a.parquet", [a_row(target=t, target_logps=logps) for t, logps in cases], schema)
    problems, line = load(path, tokenizer)
    assert [p.teacher_logps for p in problems] == [[good], [[]], [[]], [good, other, []], [good], [], [], [], [good]]
    assert all(len(p.teacher) == len(p.teacher_logps) for p in problems)
    assert "dropped: 4 traces whose log-probs do not fit their tokens" in line
    assert "9 problems, 6 with a teacher trace, 4 with its log-probs" in line
    (tmp_path / "a.jsonl").write_text(json.dumps(a_row(target_logps=[good])))
    assert load(str(tmp_path / "a.jsonl"), tokenizer)[0][0].teacher_logps == [good]
    for wrong in (["-0.5"], [[good]], -0.5, [good, good], [[True] * n]):
        (tmp_path / "b.jsonl").write_text(json.dumps(a_row(target_logps=wrong)))
        with pytest.raises(UserError, match="b.jsonl row 0: 'target_logps' is .*, not a list of numbers for each of"):
            load(str(tmp_path / "b.jsonl"), tokenizer)
    left, held = set_aside([replace(problems[0], prompt_ids=[9]), problems[0]], 1)
    assert left[0].teacher_logps == [good] and held[0].teacher == held[0].teacher_logps == []


def test_limits_and_empty_rows_are_counted(tmp_path, tokenizer):
    rows = [a_row(), a_row(prompt=[]), a_row(reward_model={"ground_truth": "", "style": "rule"}), a_row(reward_model=None),
            a_row(prompt=[{"content": "1" * 80, "role": "user"}])]  # fmt: skip
    path = write(tmp_path / "a.parquet", rows)
    problems, line = load(path, tokenizer, max_prompt_tokens=64, max_teacher_tokens=10)
    assert len(problems) == 1 and problems[0].id == 0 and problems[0].teacher == []
    assert "1 prompts over 64 tokens, 3 rows without prompt or answer, 1 traces over 10 tokens" in line
    with pytest.raises(UserError, match="no usable row"):
        load(path, tokenizer, max_prompt_tokens=2)


def test_bad_files(tmp_path, tokenizer):
    good = (tmp_path / "good.parquet", [a_row()] * 2000)
    whole = open(write(*good), "rb").read()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.parquet").write_bytes(b"")
    # Damage inside the data; the footer is whole.
    (tmp_path / "damaged.parquet").write_bytes(whole[:8] + b"\xff" * 200 + whole[208:])
    pq.write_table(pa.table({"problem": ["?"], "answer": ["!"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"question": ["?"], "solution": ["!"]}), tmp_path / "short.parquet")
    pq.write_table(pa.table({"prompt": ["?"], "reward_model": ["!"]}), tmp_path / "flat.parquet")
    for name, words in {
        "missing.parquet": "no data file",
        "cut.parquet": "not a whole parquet",
        "empty.parquet": "not a whole parquet",
        "damaged.parquet": "damaged|not a whole",
        "other.parquet": "lacks the column 'prompt'",
        "short.parquet": "lacks the column 'answer'",
        "flat.parquet": "row 0: 'prompt' is '\\?', not a list of {role, content}",
    }.items():
        with pytest.raises(UserError, match=words) as e:
            load(str(tmp_path / name), tokenizer)
        assert name in str(e.value)
    for changes, words in (
        ({"prompt": ["What?"]}, "'prompt' is \\['What"),
        ({"prompt": [{"role": "user", "content": ["What?"]}]}, "the content in 'prompt' is \\['What"),
        ({"target": ["</think>1"]}, "'target' is "),
        ({"target": [{"role": "assistant", "content": "2", "reasoning_content": "1"}]}, "'target' has a message with 'reas"),
        ({"target": [{"role": "user", "content": "1"}]}, "a role in 'target' is 'user', not assistant"),
        *(({"prompt": [{"role": role, "content": "1"}]}, f"a role in 'prompt' is {role!a}, not system or user or assistant")
          for role in (None, 5, "human", "<|im_end|>")),
        ({"prompt": [{"content": "1"}]}, "a role in 'prompt' is None, not system"),
        ({"reward_model": {"ground_truth": "3", "style": 1}}, "the style in 'reward_model' is 1, not text"),
        ({"reward_model": "3"}, "'reward_model' is '3'"),
        ({"reward_model": {"ground_truth": ["3"]}}, "the ground truth is "),
        ({"data_source": 7}, "'data_source' is 7, not text"),
    ):  # fmt: skip
        pq.write_table(pa.Table.from_pylist([a_row(), {**a_row(), **changes}][1:]), tmp_path / "odd.parquet")
        with pytest.raises(UserError, match=f"odd.parquet row 0: {words}"):
            load(str(tmp_path / "odd.parquet"), tokenizer)
    write(tmp_path / "none.parquet", [])
    with pytest.raises(UserError, match="no usable row"):
        load(str(tmp_path / "none.parquet"), tokenizer)


def test_the_prompt_must_open_a_thought(tmp_path):
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n", "")
    path = write(tmp_path / "a.parquet", [a_row()])
    with pytest.raises(UserError, match=r"append {{ '<think>\\n' }} to .*require_think"):
        load(path, tokenizer)
    problems, _ = load(path, tokenizer, require_think=False)
    assert tokenizer.decode(problems[0].teacher[0]).startswith("<think>\n")  # nothing is stripped then


def test_a_failing_template_names_the_row(tmp_path):
    tokenizer = load_tokenizer(BASE)
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


def test_every_rank_gets_as_many_micro_batches():
    """Or a collective of the backward pass would never end. Every sequence is on one rank, and no micro-batch is too long."""
    g = torch.Generator().manual_seed(0)
    for n in (1, 3, 8, 50, 200):
        rollouts = [Rollout(i, [2], [5] * m) for i, m in enumerate(torch.randint(1, 500, (n,), generator=g).tolist())]
        for world in (1, 2, 8):
            shares = [spread(rollouts, 600, rank, world) for rank in range(world)]
            assert len({len(share) for share in shares}) == 1
            assert sorted(row for share in shares for b in share for row in b.rows) == list(range(n))
            assert max(b.input_ids.numel() for share in shares for b in share) <= 600


def some_rollouts():
    """One of each source. The teacher's has an end that the policy wrote."""
    own = Rollout(0, [2, 3], [5, 6, 1], sampler_logps=[-0.1, -0.2, -0.3], advantage=-0.125)
    continued = Rollout(1, [4], [7, 8, 9, 1], source="teacher", n_teacher_tokens=3, sampler_logps=[-0.4], advantage=0.875)
    replayed = Rollout(2, [4, 2], [8, 1], source="replay", sampler_logps=[-0.5, -0.6], advantage=0.5)
    return [own, continued, replayed]


def test_pack_layout():
    b = pack(some_rollouts())
    assert b.input_ids.tolist() == [[2, 3, 5, 6, 1, 4, 7, 8, 9, 1, 4, 2, 8, 1]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert b.cu_seqlens.tolist() == [0, 5, 10, 14] and b.rows == [0, 1, 2] and b.packing["where"] is None
    tokens = lambda *where: [i in where for i in range(14)]
    assert b.loss_mask.tolist() == tokens(2, 3, 4, 6, 7, 8, 9, 12, 13)
    assert b.is_teacher.tolist() == tokens(6, 7, 8)
    assert b.is_replay.tolist() == tokens(12, 13)
    assert b.is_own.tolist() == tokens(2, 3, 4, 9) and b.counts == (9, 3, 4, 1)
    assert b.packing["response"].tolist() == [2, 3, 4, 6, 7, 8, 9, 12, 13]
    assert b.packing["before"].tolist() == [1, 2, 3, 5, 6, 7, 8, 11, 12]
    torch.testing.assert_close(b.advantage, torch.tensor([0, 0] + [-0.125] * 3 + [0] + [0.875] * 4 + [0, 0] + [0.5] * 2))
    behaviour = torch.tensor([0, 0, -0.1, -0.2, -0.3, 0, 0, 0, 0, -0.4, 0, 0, -0.5, -0.6])  # a teacher's: log 1
    torch.testing.assert_close(b.behaviour_logp, behaviour)
    assert pack(some_rollouts(), [7, 3, 5]).rows == [7, 3, 5]
    known = some_rollouts()
    known[1].teacher_logps = [-0.7, -0.8, -0.9]
    behaviour[6:9] = torch.tensor([-0.7, -0.8, -0.9])
    torch.testing.assert_close(pack(known).behaviour_logp, behaviour)


def test_a_prefix_that_is_only_read():
    """Without train_teacher a teacher's tokens have no loss, like the prompt's; the rest of the row stays as it is."""
    b, trained = pack(some_rollouts(), train_teacher=False), pack(some_rollouts())
    assert b.loss_mask.tolist() == [m and not t for m, t in zip(trained.loss_mask, trained.is_teacher, strict=True)]
    assert b.counts == (6, 0, 4, 0) and b.packing["response"].tolist() == [2, 3, 4, 9, 12, 13]
    for name in ("input_ids", "position_ids", "is_own", "is_replay", "advantage", "behaviour_logp"):
        assert torch.equal(getattr(b, name), getattr(trained, name)), name
    assert pack([], train_teacher=False).counts == (0, 0, 0, 0)


def test_equal_prompts_are_computed_once():
    """Tokens 10 and 11, and 14 and 15, are those of the first prompt again."""
    own, continued, replayed = some_rollouts()
    again = replace(replayed, prompt_ids=[2, 3])
    p = pack([own, continued, again, again]).packing
    assert p["computed"].tolist() == [*range(10), 12, 13, 16, 17]
    assert p["where"].tolist() == [*range(10), 0, 1, 10, 11, 0, 1, 12, 13]
    assert p["before"].tolist() == [1, 2, 3, 5, 6, 7, 8, 1, 10, 1, 12]
    assert (p["cu_seqlens"].tolist(), p["longest"]) == ([0, 5, 10, 14, 18], 5)
    assert (p["cu_queries"].tolist(), p["longest_query"]) == ([0, 5, 10, 12, 14], 5)
    assert (p["copied"].tolist(), p["copies"].tolist()) == ([0, 1], [[0, 10, 14], [1, 11, 15]])


def test_one_shared_token_is_listed_twice():
    """So that the compiled layers are the same as for several."""
    short = [Rollout(0, [2], [5, 1], sampler_logps=[0.0, 0.0]) for _ in range(3)]
    p = pack(short).packing
    assert (p["copied"].tolist(), p["copies"].tolist()) == ([0, 0], [[0, 3, 6]] * 2)


def test_a_gpu_shares_no_prompt_for_little(monkeypatch):
    """One token of 13 is too little there. A CPU shares any."""
    own, continued, replayed = some_rollouts()
    where = lambda: pack([replace(own, prompt_ids=[4]), continued, replayed]).packing["where"]
    assert where() is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert where() is None


def test_nothing_packed_weighs_nothing():
    b = pack([])
    assert b.rows == [] and b.input_ids.numel() == 2
    assert not (b.loss_mask.any() or b.is_own.any() or b.is_replay.any() or b.advantage.any() or b.behaviour_logp.any())
    assert unpack([b], [torch.ones(2)]) == []


def test_unpack_is_the_way_back():
    rollouts = some_rollouts()
    batches = [pack(rollouts[1:], [1, 2]), pack([]), pack(rollouts[:1], [0])]
    found = unpack(batches, [b.input_ids[0] for b in batches])
    assert found == [(1, [7, 8, 9, 1]), (2, [8, 1]), (0, [5, 6, 1])]


def test_set_aside(tokenizer, problems):
    """The same questions whatever the order of the file. Repeats of a question go with it. Nothing is in both halves."""
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


def test_a_problems_key_depends_on_its_content_alone(tmp_path, tokenizer):
    """On source, question and answer as the file has them; not on the row's place, nor on the template."""
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


def test_a_benchmark_has_each_question_once(tmp_path, tokenizer):
    """Repeated rows of a source count once. Then the first max_problems of each source are taken; 0 takes all."""
    question = lambda n: [{"content": f"{n}+1=?", "role": "user"}]
    rows = [a_row(data_source=source, prompt=question(n), target=None) for source in "ab" for n in (1, 2, 1, 3)]
    path, lines = write(tmp_path / "a.parquet", rows), []
    found = lambda n: [(p.source, p.id) for p in load_benchmark(path, tokenizer, n, 64, True, lines.append)]
    assert found(0) == [("a", 0), ("a", 1), ("a", 3), ("b", 4), ("b", 5), ("b", 7)]
    assert found(2) == [("a", 0), ("a", 1), ("b", 4), ("b", 5)]
    assert lines[-1].endswith("4 distinct problems to evaluate, of a, b")
