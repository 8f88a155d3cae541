import numpy as np
import pytest
import torch

from data import Rollout
from replay import FailedQuestions, Successes


def group(question, *rewards):
    return {question: [Rollout(question, [i], 0, [0.0], "stop", reward=r) for i, r in enumerate(rewards)]}


def test_failed_questions_wait_in_turn():
    buffer = FailedQuestions()
    assert buffer.take(2) == []  # empty: nothing to take, and no error
    buffer.observe(group(7, 0, 0, 0))
    buffer.observe(group(8, 0, 1, 0))  # solved once: not failed
    buffer.observe(group(7, 0, 0, 0))  # waits already
    assert buffer.queue == [7] and buffer.take(2) == []
    for q in (5, 9, 1):
        buffer.observe(group(q, 0.0, 0.0))
    assert buffer.take(3) == [7, 5, 9] and buffer.queue == [1]
    assert buffer.take(1) == [1] and buffer.take(1) == []  # exactly drained
    buffer.observe(group(7, 0))
    buffer.observe(group(7, 1))  # solved while it waited
    assert buffer.queue == []


def test_failed_questions_state():
    buffer, copy = FailedQuestions(), FailedQuestions()
    for q in (3, 1, 2):
        buffer.observe(group(q, 0))
    copy.load_state_dict(buffer.state_dict())
    for b in (buffer, copy):
        b.observe(group(1, 1))
    assert buffer.take(2) == copy.take(2) == [3, 2]


def rows(solved, of=8, q=0):
    """A group's samples: the first `solved` are right, each its own text."""
    return [Rollout(q, [q, i, 9], 0, [-0.1 * q, -1.0, -i / 8], "stop", reward=float(i < solved)) for i in range(of)]


def active(**groups):
    pool = Successes(8, 0.35, 4)
    pool.active = True
    pool.observe({int(q[1:]): rows(k, q=int(q[1:])) for q, k in groups.items()})
    return pool


def test_nothing_is_stored_before_the_start():
    pool = Successes(8, 0.35, 4)
    pool.observe({1: rows(2), 2: rows(3), 3: rows(8)})  # 13 of 24 right: it starts, but with the next batch
    assert pool.active and not pool.samples and pool.retired == {3}
    pool = Successes(8, 0.35, 4)
    pool.observe({1: rows(2), 2: rows(3)})  # 5 of 16
    assert not pool.active


def test_buckets_and_retirement():
    pool = active(q1=1, q2=4, q3=7, q4=8, q5=0)
    assert pool.bucket == {1: 1, 2: 4, 3: 7} and pool.retired == {4}
    assert [len(pool.samples[q]) for q in (1, 2, 3)] == [1, 4, 4]  # at most four a question
    pool.observe({2: rows(5, of=7, q=2)})  # a replay took one place: 5 of 7 is 6 of 8
    assert pool.bucket[2] == 6
    pool.observe({2: rows(0, of=7, q=2)})  # all wrong: it stays where it was
    assert pool.bucket[2] == 6
    pool.observe({2: rows(7, of=7, q=2)})
    assert 2 in pool.retired and 2 not in pool.samples and 2 not in pool.bucket
    pool.observe({2: rows(3, of=8, q=2)})  # retired is for good
    assert 2 not in pool.samples


def test_the_same_answer_is_stored_once():
    pool = active(q1=2)
    pool.observe({1: rows(3, q=1)})
    assert [ids.tolist() for ids, _ in pool.samples[1]] == [[1, 0, 9], [1, 1, 9], [1, 2, 9]]
    more = [Rollout(1, [1, 40 + i, 9], 0, [0.0] * 3, "stop", reward=1.0) for i in range(3)]
    pool.observe({1: more + rows(0, q=1)})
    assert [ids[1] for ids, _ in pool.samples[1]] == [2, 40, 41, 42]  # the newest four


def test_sampling_weights():
    """With every bucket there, the first draw falls on them as N(k; 4, 1): .004 .054 .242 .399 .242 .054 .004."""
    pool = active(**{f"q{k}{i}": k for k in range(1, 8) for i in range(3)})
    rng, n = np.random.default_rng(0), 20_000
    drawn = [pool.draw(1, rng)[0] // 10 for _ in range(n)]
    shares = [drawn.count(k) / n for k in range(1, 8)]
    want = [0.0044, 0.0540, 0.2420, 0.3991, 0.2420, 0.0540, 0.0044]
    assert shares == pytest.approx(want, abs=0.011)
    assert len({q % 10 for q in (pool.draw(1, rng)[0] for _ in range(100))}) == 3  # any of a bucket's


def test_no_question_twice():
    pool = active(**{f"q{i}": 1 + i % 7 for i in range(1, 21)})
    for seed in range(20):
        drawn = pool.draw(12, np.random.default_rng(seed))
        assert len(drawn) == len(set(drawn)) == 12
    assert len(pool.draw(99, np.random.default_rng(0))) == 20  # all there are
    assert pool.draw(5, np.random.default_rng(1)) == pool.draw(5, np.random.default_rng(1))


def test_state_goes_through_a_file(tmp_path):
    from safetensors.torch import load_file, save_file

    pool, copy = active(q1=3, q2=8, q5=1), Successes(8, 0.35, 4)
    save_file(pool.state_dict(), tmp_path / "replay.state")
    copy.load_state_dict(load_file(tmp_path / "replay.state"))
    for p in (pool, copy):
        p.observe({1: rows(5, of=7, q=1), 6: rows(2, q=6)})
    assert (copy.active, copy.retired, copy.bucket) == (pool.active, pool.retired, pool.bucket)
    assert pool.draw(3, np.random.default_rng(0)) == copy.draw(3, np.random.default_rng(0))
    for q in pool.samples:
        for (ids, logps), (ids2, logps2) in zip(pool.samples[q], copy.samples[q], strict=True):
            assert (ids == ids2).all() and (logps == logps2).all()
    empty = Successes(8, 0.35, 4)
    empty.load_state_dict(Successes(8, 0.35, 4).state_dict())
    assert not empty.samples and isinstance(empty.state_dict()["ids"], torch.Tensor)
