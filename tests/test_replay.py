import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import load_script
from safetensors.torch import load_file, save_file

from configurator import UserError
from data import Order, Problem, Rollout, pack
from replay import FailedQuestions, Fresh, Successes, open_memory


def problems(n, traces=()):
    """n of them. Those whose ids are in `traces` have a trace."""
    return [Problem(i, [2, i], str(i), [[i, 9]] if i in traces else [], "toy") for i in range(n)]


def graded(*fields, reward, **more):
    return Rollout(*fields, reward=reward, reason="correct" if reward >= 1 else "wrong", **more)


def group(question, *rewards):
    return [graded(question, [2, question], [i], sampler_logps=[0.0], reward=r) for i, r in enumerate(rewards)]


# ---------------------------------------------------------------- what all have in common


KNOBS = vars(load_script("train", []))  # train.py's defaults


def memories(n=20):
    """Each kind over n problems, by way of train.py's knobs."""
    changes = {"fresh": {}, "failed": {"sft_buffer": 3},
               "successes": {"replay_share": 0.5, "replay_start": 0.0, "replay_limit": 4}}  # fmt: skip
    return {name: open_memory(SimpleNamespace(**{**KNOBS, **c}), problems(n, range(n))) for name, c in changes.items()}


def test_drawing_a_batch_changes_nothing_that_is_saved():
    """A signal in the rollout drops the step: the memory is saved as next_batch left it, and the step is drawn again."""
    for memory in memories().values():
        order, rng = Order(20, 1), np.random.default_rng(0)
        for _ in range(6):
            before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
            batch, _ = memory.next_batch(order, 7, rng, lambda rollouts: list(range(len(rollouts))))
            after = memory.state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
            memory.observe([r for p in batch for r in group(p.id, float(p.id % 3 == 0), 0.0)])


def test_two_memories_are_one_too_many():
    with pytest.raises(UserError, match="FailedQuestions and Successes, two methods"):
        open_memory(SimpleNamespace(**{**KNOBS, "sft_buffer": 3, "replay_share": 0.5}), problems(20))


def test_the_knobs_choose_one():
    assert [type(memory) for memory in memories().values()] == [Fresh, FailedQuestions, Successes]
    assert memories()["failed"].size == 3
    successes = memories()["successes"]
    assert (successes.n_rollouts, successes.share, successes.start, successes.limit) == (8, 0.5, 0.0, 4)


def test_all_have_the_same_methods():
    def methods(kind):
        public = {name: f for name, f in vars(kind).items() if inspect.isfunction(f) and name[0] != "_"}
        return {name: list(inspect.signature(f).parameters) for name, f in public.items()}

    shared = methods(Fresh)
    assert set(shared) == {"next_batch", "observe", "sft_due", "metrics", "state_dict", "load_state_dict"}
    assert methods(FailedQuestions) == shared
    own = methods(Successes)
    assert own.pop("draw") == ["self", "n", "rng"] and own == shared


@pytest.mark.parametrize("kind", ["fresh", "failed", "successes"])
def test_a_batch_has_as_many_different_problems(kind):
    """Over several epochs whose ends cut a batch, and while the memory fills."""
    memory, order, rng = memories(20)[kind], Order(20, seed=1), np.random.default_rng(0)
    n_replayed = 0
    for _ in range(12):
        batch, replays = memory.next_batch(order, 7, rng, lambda stored: list(range(len(stored))))
        ids = [p.id for p in batch]
        assert len(ids) == len(set(ids)) == 7 and set(replays) <= set(ids)
        assert all(r.problem == q and r.source == "replay" for q, r in replays.items())
        n_replayed += len(replays)
        memory.observe([r for p in batch for r in rows(3, q=p.id)])  # some of each group are right
    assert (n_replayed > 10) == (kind == "successes")


@pytest.mark.parametrize("kind", ["fresh", "failed", "successes"])
def test_state_and_metrics_are_plain(kind):
    memory = memories()[kind]
    memory.observe(group(3, 0.0, 1.0) + group(4, 0.0, 0.0) + group(5, 1.0, 1.0))
    state = memory.state_dict()
    assert all(isinstance(t, torch.Tensor) for t in state.values()) and bool(state) == (kind != "fresh")
    assert all(isinstance(value, int) for value in memory.metrics().values())
    copy = memories()[kind]
    copy.load_state_dict(state)
    assert copy.metrics() == memory.metrics()


# ---------------------------------------------------------------- ReLIFT


def test_failed_questions_wait_in_turn():
    memory = FailedQuestions(problems(10, traces=(1, 5, 7, 8, 9)), 3)
    due = lambda: [r.problem for r in memory.sft_due()]
    assert due() == []  # nothing waits, and that is no error
    memory.observe(group(7, 0, 0, 0))
    memory.observe(group(8, 0, 1, 0))  # solved once: not failed
    memory.observe(group(7, 0, 0, 0))  # waits already
    assert memory.queue == [7] and due() == []
    memory.observe(group(2, 0, 0))  # it has no trace to learn from
    for q in (5, 9, 1):
        memory.observe(group(q, 0.0, 0.0))
    assert memory.metrics() == {"relift/waiting": 4}
    assert due() == [7, 5, 9] and memory.queue == [1] and due() == []
    memory.observe(group(1, 0, 1))  # solved while it waited
    assert memory.queue == []


def test_a_replay_or_a_trace_is_no_attempt():
    """Only the step's own samples say whether a question was failed."""
    memory = FailedQuestions(problems(10, traces=range(10)), 3)
    trace = graded(7, [2, 7], [7, 9], source="teacher", n_teacher_tokens=2, reward=1.0)
    memory.observe([*group(7, 0, 0), trace])
    assert memory.queue == [7]
    memory.observe([trace])
    assert memory.queue == [7]


def test_a_reward_below_solved_at_is_no_success():
    """0.1 for format: the question stays failed, and no memory keeps the answer as a right one."""
    memory = FailedQuestions(problems(10, traces=range(10)), 3)
    memory.observe(group(7, 0.1, 0.1, 0.9) + group(8, 0.1, 1.0))
    assert memory.queue == [7]
    memory = pool()
    memory.observe(group(1, *[0.9] * 8))
    assert not memory.active and not memory.retired
    memory = active(q3=1)
    memory.observe(group(1, *[0.1] * 8) + group(2, 0.1, 1.0, 0.1))
    assert memory.retired == set() and sorted(memory.samples) == [2, 3]
    assert [ids.tolist() for ids, _ in memory.samples[2]] == [[1]] and memory.bucket[2] == round(8 / 3)


def test_failed_questions_state():
    memory, copy = (FailedQuestions(problems(10, range(10)), 2) for _ in range(2))
    for q in (3, 1, 2):
        memory.observe(group(q, 0))
    copy.load_state_dict(memory.state_dict())
    for m in (memory, copy):
        m.observe(group(1, 1))
        assert [r.problem for r in m.sft_due()] == [3, 2] and m.queue == []
    copy.load_state_dict(FailedQuestions([], 2).state_dict())
    assert copy.queue == []


# ---------------------------------------------------------------- ExGRPO


def rows(solved, of=8, q=0):
    """A group's own samples, each with a text of its own. The first `solved` are right."""
    return [graded(q, [2, q], [q, i, 9], sampler_logps=[-0.1 * q, -1.0, -i / 8], reward=float(i < solved)) for i in range(of)]


def pool(n=100, share=0.5):
    return Successes(problems(n), 8, share, 0.35, 4)


def active(**groups):
    """A pool that has started and seen these groups: q1=3 is question 1, solved three times of eight."""
    memory = pool()
    memory.active = True
    memory.observe([r for q, k in groups.items() for r in rows(k, q=int(q[1:]))])
    return memory


def test_nothing_is_stored_before_the_start():
    memory = pool()
    memory.observe(rows(2, q=1) + rows(3, q=2) + rows(8, q=3))  # 13 of 24 right: it starts, with the next batch
    assert memory.active and not memory.samples and memory.retired == {3}
    memory = pool()
    memory.observe(rows(2, q=1) + rows(3, q=2))  # 5 of 16
    assert not memory.active


def test_buckets_and_retirement():
    memory = active(q1=1, q2=4, q3=7, q4=8, q5=0)
    assert memory.bucket == {1: 1, 2: 4, 3: 7} and memory.retired == {4}
    assert memory.metrics() == {"replay/questions": 3, "replay/retired": 1}
    assert [len(memory.samples[q]) for q in (1, 2, 3)] == [1, 4, 4]  # at most four a question
    memory.observe(rows(5, of=7, q=2))  # a replay took one place: 5 of 7 is 6 of 8
    assert memory.bucket[2] == 6
    memory.observe(rows(0, of=7, q=2))  # all wrong: its bucket stays
    assert memory.bucket[2] == 6
    memory.observe(rows(7, of=7, q=2))
    assert 2 in memory.retired and 2 not in memory.samples and 2 not in memory.bucket
    memory.observe(rows(3, of=8, q=2))  # retired is for good
    assert 2 not in memory.samples


def test_a_replay_is_not_counted_as_a_sample():
    """It was chosen because it is right: neither a start, nor a bucket, nor a retirement may follow from it."""
    replayed = lambda q: graded(q, [2, q], [q, 77, 9], source="replay", sampler_logps=[-1.0] * 3, reward=1.0)
    memory = pool()
    memory.observe([replayed(q) for q in range(10)])
    assert not memory.active and not memory.retired
    memory = active(q1=1)
    memory.observe([replayed(1), *rows(2, of=7, q=1)])
    assert memory.bucket[1] == 2 and not any(77 in ids for ids, _ in memory.samples[1])


def test_the_same_answer_is_stored_once():
    memory = active(q1=2)
    memory.observe(rows(3, q=1))
    assert [ids.tolist() for ids, _ in memory.samples[1]] == [[1, 0, 9], [1, 1, 9], [1, 2, 9]]
    more = [graded(1, [2, 1], [1, 40 + i, 9], sampler_logps=[0.0] * 3, reward=1.0) for i in range(3)]
    memory.observe(more + rows(0, q=1))
    assert [ids[1] for ids, _ in memory.samples[1]] == [2, 40, 41, 42]  # the newest four


def test_sampling_weights():
    """With every bucket filled, the first draw falls on them as N(k; 4, 1): .004 .054 .242 .399 .242 .054 .004."""
    memory = active(**{f"q{k}{i}": k for k in range(1, 8) for i in range(3)})
    rng, n = np.random.default_rng(0), 20_000
    drawn = [memory.draw(1, rng)[0] // 10 for _ in range(n)]
    shares = [drawn.count(k) / n for k in range(1, 8)]
    want = [0.0044, 0.0540, 0.2420, 0.3991, 0.2420, 0.0540, 0.0044]
    assert shares == pytest.approx(want, abs=0.011)
    assert len({q % 10 for q in (memory.draw(1, rng)[0] for _ in range(100))}) == 3  # any question of a bucket


def test_no_question_twice():
    memory = active(**{f"q{i}": 1 + i % 7 for i in range(1, 21)})
    for seed in range(20):
        drawn = memory.draw(12, np.random.default_rng(seed))
        assert len(drawn) == len(set(drawn)) == 12
    assert len(memory.draw(99, np.random.default_rng(0))) == 20  # all there are
    assert memory.draw(5, np.random.default_rng(1)) == memory.draw(5, np.random.default_rng(1))


def next_batch(memory, n, entropy=lambda r: 0.0, seed=0):
    order = Order(len(memory.problems), seed)
    return memory.next_batch(order, n, np.random.default_rng(seed), lambda stored: list(map(entropy, stored)))


def test_a_batch_replays_the_surest_of_the_stored_answers():
    """At most the share of the batch, one answer a question: that of the lowest mean entropy."""
    memory = active(**{f"q{i}": 4 for i in range(1, 21)})
    batch, replays = next_batch(memory, 10, lambda r: abs(r.response_ids[1] - 2))  # the third of each question's answers
    assert len(replays) == 5 and {r.response_ids[1] for r in replays.values()} == {2}
    places = [i for i, p in enumerate(batch) if p.id in replays]
    assert places != list(range(5, 10))  # shuffled, so that no update has all of them
    assert len(next_batch(memory, 3)[1]) == 1 and next_batch(memory, 1)[1] == {}  # the share is rounded down


def test_replayed_rollouts_keep_the_log_probs_of_their_sampling():
    """From observe() to the loss: ids, prompt and log-probs are those of the sample, and the tokens are nobody else's."""
    memory = active(q3=1, q8=2)
    _, replays = next_batch(memory, 8)
    assert set(replays) == {3, 8}
    for q, r in replays.items():
        (sample,) = [s for s in rows(2, q=q) if s.response_ids == r.response_ids]
        assert r.prompt_ids == sample.prompt_ids and r.sampler_logps == pytest.approx(sample.sampler_logps)
        packed = pack([r])
        assert packed.behaviour_logp.tolist() == pytest.approx([0.0, 0.0, *sample.sampler_logps])
        assert packed.is_replay.tolist() == packed.loss_mask.tolist() == [False, False, True, True, True]
        assert not packed.is_own.any() and not packed.is_teacher.any()


def test_retired_questions_serve_again_only_where_too_few_are_left():
    memory = pool(10)
    memory.observe([r for q in range(6) for r in rows(8, q=q)])
    assert memory.retired == set(range(6))
    assert {p.id for p in next_batch(memory, 4)[0]} == {6, 7, 8, 9}
    assert len({p.id for p in next_batch(memory, 5)[0]}) == 5


def test_problems_drawn_again_in_a_new_epoch_are_left_out():
    """Where retired questions are skipped, a batch may reach into the next epoch, which has its first problems again."""
    memory, order, rng = pool(10), Order(10, seed=0), np.random.default_rng(0)
    memory.observe([r for q in range(3) for r in rows(8, q=q)])
    for _ in range(30):
        ids = [p.id for p in memory.next_batch(order, 5, rng, None)[0]]
        assert len(set(ids)) == 5 and min(ids) > 2


def test_state_goes_through_a_file(tmp_path):
    memory, copy = active(q1=3, q2=8, q5=1), pool()
    save_file(memory.state_dict(), tmp_path / "replay.state")
    copy.load_state_dict(load_file(tmp_path / "replay.state"))
    for m in (memory, copy):
        m.observe(rows(5, of=7, q=1) + rows(2, q=6))
    assert (copy.active, copy.retired, copy.bucket) == (memory.active, memory.retired, memory.bucket)
    assert memory.draw(3, np.random.default_rng(0)) == copy.draw(3, np.random.default_rng(0))
    for q in memory.samples:
        for (ids, logps), (ids2, logps2) in zip(memory.samples[q], copy.samples[q], strict=True):
            assert (ids == ids2).all() and (logps == logps2).all()
    empty = pool()
    empty.load_state_dict(pool().state_dict())
    assert not empty.samples and isinstance(empty.state_dict()["ids"], torch.Tensor)
