"""The committed shaping world has the properties that its claim depends on."""

import os
import random

import build
import pyarrow.parquet as pq
import pytest
import shaping
import torch

from data import Rollout, pack
from model import load_policy
from reward import Verifier
from rollout import TorchSampler, request_seed
from runtime.tokenizer import load_tokenizer

BASE = os.path.join(shaping.HERE, "base")


@pytest.fixture(scope="module")
def base():
    return load_policy(BASE), load_tokenizer(BASE)


def drawn(k, n, step):
    """n new problems of k numbers, and the teacher's traces."""
    rng = random.Random(100 + k)
    numbers = [build.sample_numbers(rng, k) for _ in range(n)]
    return numbers, [shaping.chain(step, x) for x in numbers]


def accuracy(base, k, step, n, temperature, given=0):
    """The share of right answers, given the first `given` characters of the trace, each of which is a token."""
    policy, tokenizer = base
    pairs = [build.encode(tokenizer, *pair) for pair in zip(*drawn(k, n, step), strict=True)]
    sampler = TorchSampler(BASE, [tokenizer.eos_token_id], 128)
    sampler.load(policy.hf, 0)
    prompts = [prompt + trace[:given] for prompt, trace in pairs]
    samples = sampler.generate(prompts, [request_seed(k, i) for i in range(n)], temperature, 44, 0)
    boxed = 5  # \boxed{ d d } <eos>
    return sum(s.ids[-boxed:] == trace[-boxed:] for s, (_, trace) in zip(samples, pairs, strict=True)) / n


def teacher_logps(base, k, step, n=100):
    """The policy's log-probs of n traces: (n, tokens of a trace)."""
    policy, tokenizer = base
    pairs = [build.encode(tokenizer, *pair) for pair in zip(*drawn(k, n, step), strict=True)]
    with torch.no_grad():
        batch = pack([Rollout(i, prompt, trace, source="teacher", n_teacher_tokens=len(trace))
                      for i, (prompt, trace) in enumerate(pairs)])  # fmt: skip
        logp, _ = policy(batch)
    return logp[batch.loss_mask].view(n, -1)


def test_the_base_does_easy_problems_half_the_time_and_hard_ones_never(base):
    assert 0.4 <= accuracy(base, shaping.EASY, build.add, 1000, 1.0) <= 0.6
    assert accuracy(base, shaping.HARD, shaping.subtract, 1000, 1.0) <= 0.02  # chance is 0.01
    assert accuracy(base, shaping.HARD, shaping.subtract, 200, 0.0) <= 0.03


def test_the_base_knows_technique_b_but_for_three_forks(base):
    logps = teacher_logps(base, shaping.HARD, shaping.subtract)
    forks = [0, *(3 * q for q in shaping.FORKS)]
    p = logps[:, forks].exp().mean(0)
    assert 0.8 <= p[0] / shaping.P_STAR <= 1.25  # the window is narrow, see LOG.md
    assert all(0.02 <= q <= 0.05 for q in p[1:])
    assert -12.5 <= logps.sum(1).mean() <= -10  # log-prob of a right trace, in nats
    logps[:, forks] = 0
    assert logps.sum(1).exp().mean() >= 0.95  # it knows all other tokens
    past = 1 + 3 * shaping.FORKS[-1]
    assert accuracy(base, shaping.HARD, shaping.subtract, 200, 0.0, given=past) >= 0.98
    assert accuracy(base, shaping.HARD, shaping.subtract, 200, 0.0, given=1) <= 0.05  # it fails at the next fork


def test_technique_a_is_of_no_use_on_hard_problems():
    numbers, traces = drawn(shaping.HARD, 1000, shaping.subtract)
    for n, chance in ((4, 0.01), (8, 0.04)):  # over all eight, sum and difference agree if twice the rest is 0 mod 10
        sums = [shaping.chain(build.add, x, n) for x in numbers]
        assert sum(s[-4:] == t[-4:] for s, t in zip(sums, traces, strict=True)) / len(sums) <= chance + 0.02


def test_by_hand():
    numbers = [49, 97, 53, 5, 33, 65, 62, 51]
    assert shaping.chain(shaping.subtract, numbers) == "*49>52>09>04>71>16>54>03</think>\\boxed{03}"
    assert shaping.chain(build.add, numbers, 4) == "49>36>89>84</think>\\boxed{84}"


def test_the_data_are_half_easy_half_hard_and_the_teacher_is_right():
    rng, seen = random.Random(12345), set()
    for split, n in (("train", 512), ("test", 200)):
        rows = pq.read_table(f"{shaping.HERE}/{split}.parquet").to_pylist()
        assert rows == shaping.build_rows(rng, n, split, seen)
        assert [r["data_source"] for r in rows] == ["easy", "hard"] * (n // 2)
        if split == "train":
            texts = [r["target"][0]["content"].removeprefix("<think>\n") for r in rows]
            with Verifier(workers=1) as verifier:
                assert all(v.reward for v in verifier.score(texts, [r["reward_model"]["ground_truth"] for r in rows]))
    assert len(seen) == 712  # no problem is in both splits, or twice in one


def test_its_config_fits_it(script, base):
    module = script("train", ["config/toy/shaping.py"])
    sequences = module.prompts_per_step * module.n_rollouts
    assert module.loss_constant == sequences * module.max_tokens
    numbers, traces = drawn(shaping.HARD, 1, shaping.subtract)
    prompt, trace = build.encode(base[1], numbers[0], traces[0])
    assert len(prompt) <= module.max_prompt_tokens and len(trace) <= module.max_teacher_tokens
