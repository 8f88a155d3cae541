"""The committed toy world has the properties that the demo's claim depends on."""

import random

import build
import pyarrow.parquet as pq
import pytest
import torch
from helpers import BASE

from data import Rollout, pack
from reward import Verifier
from rollout import TorchSampler, request_seed


def accuracy(policy, tokenizer, k, n, temperature):
    rng = random.Random(100 + k)
    problems = [build.sample_numbers(rng, k) for _ in range(n)]
    prompts = [build.encode(tokenizer, p, "")[0] for p in problems]
    sampler = TorchSampler(BASE, [tokenizer.eos_token_id], 128)
    sampler.load(policy.hf, 0)
    samples = sampler.generate(prompts, [request_seed(k, i) for i in range(n)], temperature, 40, 0)
    right = [
        tokenizer.decode(s.ids).endswith(f"\\boxed{{{build.running_totals(p)[-1]:02d}}}<eos>")
        for s, p in zip(samples, problems, strict=True)
    ]
    return sum(right) / n


def test_the_base_knows_the_facts_but_not_the_chain(policy, tokenizer, problems):
    assert accuracy(policy, tokenizer, 2, 500, 0.0) >= 0.99
    assert accuracy(policy, tokenizer, 8, 500, 0.0) <= 0.03  # chance is 0.01
    assert accuracy(policy, tokenizer, 8, 2000, 1.0) <= 0.03
    rollouts = []
    for p in problems[:200]:
        numbers = [int(x) for x in tokenizer.decode(p.prompt_ids)[: -len("=?<think>\n")].split("+")]
        totals = build.running_totals(numbers)
        _, ids = build.encode(tokenizer, numbers, build.response(totals, totals[-1]))
        rollouts.append(Rollout(p.id, p.prompt_ids, ids, source="teacher", n_teacher_tokens=len(ids)))
    with torch.no_grad():
        logp, _ = policy(pack(rollouts))
    assert logp.sum().item() / len(rollouts) <= -20  # log-prob of a right trace, in nats


def test_the_teacher_is_wrong_as_often_as_documented():
    train, test = (pq.read_table(f"{build.HERE}/{split}.parquet").to_pylist() for split in ("train", "test"))
    assert (len(train), len(test)) == (512, 200)
    assert not {r["prompt"][0]["content"] for r in train} & {r["prompt"][0]["content"] for r in test}
    texts = [r["target"][0]["content"].removeprefix("<think>\n") for r in train]
    golds = [r["reward_model"]["ground_truth"] for r in train]
    with Verifier(workers=1) as verifier:
        verdicts = verifier.score(texts, golds)
    wrong = [t for t, v in zip(texts, verdicts, strict=True) if not v.reward]
    assert len(wrong) == round(0.3 * 512)
    assert all(t.split("</think>")[0].count(">") == 6 for t in wrong)  # one of the seven totals is missing
    assert all(t.split("</think>")[0].count(">") == 7 for t in texts if t not in wrong)


def test_sums_by_hand():
    assert build.running_totals([49, 97, 53, 5, 33, 65, 62, 51]) == [49, 36, 89, 84, 17, 72, 34, 85]
    assert build.question([49, 7]) == "49+07=?"


@pytest.mark.slow
def test_the_build_script_still_makes_such_a_base(tokenizer):
    """A short build by the committed recipe learns. The full build is `make toy`."""
    model = build.build_base(tokenizer, steps=800, phase1=1.0)
    assert build.greedy_accuracy(model, tokenizer, 2) >= 0.9


def test_rebuilt_data_is_the_committed_data(tmp_path):
    rng, seen = random.Random(12345), set()
    for split, n, wrong in (("train", 512, 0.3), ("test", 200, 0.0)):
        assert build.build_rows(rng, n, split, seen, wrong) == pq.read_table(f"{build.HERE}/{split}.parquet").to_pylist()


def test_the_other_two_files():
    """clean.parquet has the same problems with right traces only, train.complement.parquet other problems without traces."""
    read = lambda name: pq.read_table(f"{build.HERE}/{name}.parquet").to_pylist()
    train, clean, test, complement = (read(name) for name in ("train", "clean", "test", "train.complement"))
    assert [r["prompt"] for r in clean] == [r["prompt"] for r in train]
    assert sum(a["target"] != b["target"] for a, b in zip(clean, train, strict=True)) == round(0.3 * 512)
    for r in clean:
        assert r["target"][0]["content"].endswith(f"\\boxed{{{r['reward_model']['ground_truth']}}}")
    questions = [r["prompt"][0]["content"] for r in [*train, *test, *complement]]
    assert len(set(questions)) == len(questions) == 512 + 200 + 512
    assert all(r["target"] is None for r in complement)
