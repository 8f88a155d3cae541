"""The expected gradient of each estimator by enumeration: a tabular policy of three tokens and two steps, where every
sequence is weighted by its probability. And a run of every overlay."""

import functools
import glob
import itertools
import json
import math
import os
import random
import re
from dataclasses import dataclass

import build
import pytest
import torch
from helpers import LLAMA_8B, QWEN3_30B_A3B, QWEN_05B, QWEN_7B, a_row, build_mixture, launch, packed, rollouts_of, run, write
from safetensors.torch import load_file
from transformers import Gemma2Config, GraniteConfig, MixtralConfig, Qwen2Config, Qwen3MoeConfig, Qwen3NextConfig

from configurator import ROOT, UserError
from data import Rollout, pack
from loss import batch_loss, group_advantages, token_loss
from model import load_policy
from replay import Successes
from rollout import TorchSampler
from runtime.preflight import check_architecture
from runtime.tokenizer import check_same_tokens, load_tokenizer

V = 3
SEQUENCES = list(itertools.product(range(V), repeat=2))


def table(seed):
    """Logits of four states: the start, and after each first token."""
    return torch.randn(V + 1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(y):
    return torch.tensor([0, 1 + y[0]])


def sampled(y, advantage=0.0, **fields):
    """A sequence without a prompt, as batch_loss sees it: two tokens that the policy sampled."""
    advantage = torch.full((2,), float(advantage), dtype=torch.float64)
    return packed(2, input_ids=torch.tensor([y]), advantage=advantage, **fields)


OWN = (2, 0, 2, 0)  # response tokens: all, the teacher's, own; traces
TRACE = (1, 2)


def expected_gradient(theta, loss, behaviour=None):
    """sum over sequences of probability x gradient of loss(y, logp, entropy, logprobs of both states)."""
    theta = theta.clone().requires_grad_(True)
    total = 0
    for y in SEQUENCES:
        rows = theta.log_softmax(-1)[states(y)]
        logp = rows[torch.arange(2), list(y)]
        sampler = (theta if behaviour is None else behaviour).detach().log_softmax(-1)
        p = sampler[states(y)][torch.arange(2), list(y)].sum().exp()
        total = total + p * loss(y, logp, -(rows.exp() * rows).sum(-1), rows)
    return torch.autograd.grad(total, theta)[0]


def gradient_over_states(theta, f):
    """Gradient of the sum over states of their (fixed) visiting probability x f(log-probs there, state)."""
    theta = theta.clone().requires_grad_(True)
    logprobs = theta.log_softmax(-1)
    visits = torch.cat([torch.ones(1), logprobs[0].exp().detach()])
    total = sum(v * f(logprobs[s], s) for s, v in enumerate(visits))
    return torch.autograd.grad(total, theta)[0]


THETA, TEACHER = table(0), table(1)
T_LOGPROBS = TEACHER.log_softmax(-1)


def test_policy_term_is_the_policy_gradient():
    reward = {y: float(y[0] + 2 * y[1] == 4) for y in SEQUENCES}
    got = expected_gradient(
        THETA, lambda y, logp, h, _: batch_loss(logp, h, None, sampled(y, reward[y]), OWN, loss_constant=1.0)
    )
    theta = THETA.clone().requires_grad_(True)
    logprobs = theta.log_softmax(-1)
    value = sum(r * (logprobs[0, y[0]] + logprobs[1 + y[0], y[1]]).exp() for y, r in reward.items())
    torch.testing.assert_close(got, -torch.autograd.grad(value, theta)[0])


def kl_term(y, logp, h, _):
    teacher_logp = T_LOGPROBS[states(y)][torch.arange(2), list(y)]
    return batch_loss(logp, h, None, sampled(y, teacher_logp=teacher_logp), OWN, policy_coef=0.0, kl_coef=2.0)


def test_kl_term_is_reverse_kl():
    """The gradient of the k2 estimate over the policy's own samples is the gradient of KL(pi || pi_T) in each state."""
    want = gradient_over_states(THETA, lambda logprobs, s: (logprobs.exp() * (logprobs - T_LOGPROBS[s])).sum())
    torch.testing.assert_close(expected_gradient(THETA, kl_term), want)  # kl_coef 2 over 2 tokens


def test_the_k1_estimate_would_teach_nothing():
    """Why the loss does not use k1 = log p - log p_T: its gradient does not depend on the teacher and is zero on average."""
    k1 = lambda y, logp, h, _: (logp - T_LOGPROBS[states(y)][torch.arange(2), list(y)]).sum()
    torch.testing.assert_close(expected_gradient(THETA, k1), torch.zeros(V + 1, V, dtype=torch.float64))


def test_kl_term_has_the_right_sign():
    """A step against its gradient moves the policy towards the teacher. The released KDRL moves away from it."""
    kl = lambda theta: (theta.softmax(-1) * (theta.log_softmax(-1) - T_LOGPROBS)).sum(-1)
    after = THETA - 0.1 * expected_gradient(THETA, kl_term)
    assert (kl(after) < kl(THETA)).all()


def ce_term(y, logp, h, rows):
    top1 = T_LOGPROBS[states(y)].argmax(-1)
    return batch_loss(logp, h, rows[torch.arange(2), top1], sampled(y, top1=top1), OWN, policy_coef=0.0, ce_coef=2.0)


def test_ce_term_is_cross_entropy_along_own_samples():
    want = gradient_over_states(THETA, lambda logprobs, s: -logprobs[T_LOGPROBS[s].argmax()])
    got = expected_gradient(THETA, ce_term)
    torch.testing.assert_close(got, want)
    after = (THETA - 0.1 * got).log_softmax(-1)
    first = T_LOGPROBS.argmax(-1)
    assert (after.gather(-1, first[:, None]) > THETA.log_softmax(-1).gather(-1, first[:, None])).all()


def test_tokens_without_a_first_choice_count_for_nothing():
    y = (1, 2)
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    loss = lambda top1: batch_loss(logp, -logp, logp, sampled(y, top1=torch.tensor(top1)), OWN, policy_coef=0.0, ce_coef=1.0)
    assert loss([-1, -1]) == 0 and loss([0, -1]) == 0.5 and loss([0, 0]) == 1.5


def test_a_probability_is_no_advantage():
    """The released tipo_adv adds pi(y*) to the advantage. That is a baseline: it has no expected effect. 1[y = y*] has one."""
    first = T_LOGPROBS.argmax(-1)

    def with_advantage(advantage):
        return lambda y, logp, h, rows: token_loss(
            logp, logp.detach(), advantage(y, rows), torch.zeros(2, dtype=torch.bool)
        ).sum()

    as_released = with_advantage(lambda y, rows: rows.detach().exp()[torch.arange(2), first[states(y)]])
    torch.testing.assert_close(expected_gradient(THETA, as_released), torch.zeros(V + 1, V, dtype=torch.float64))
    indicator = with_advantage(lambda y, rows: (torch.tensor(y) == first[states(y)]).double())
    want = gradient_over_states(THETA, lambda logprobs, s: -logprobs[first[s]].exp())
    torch.testing.assert_close(expected_gradient(THETA, indicator), want)


def test_the_bonus_for_the_first_choice_raises_its_probability():
    """What tgpo_adv does instead: its gradient is that of pi(y*) in each state, on-policy and from another sampler's tokens,
    and nothing where y* is no token of the policy's."""

    def bonus_term(behaviour, known=True):
        def one(y, logp, h, rows):
            top1 = T_LOGPROBS[states(y)].argmax(-1)
            old = behaviour.log_softmax(-1)[states(y)][torch.arange(2), list(y)]
            batch = sampled(y, top1=top1 if known else torch.full((2,), -1), old_logp=old)
            return batch_loss(logp, h, rows[torch.arange(2), top1], batch, OWN, top1_bonus=2.0, loss_constant=2.0)

        return one

    first = T_LOGPROBS.argmax(-1)
    # The sampler decides how often the second step's states are visited, so it differs in the last step's choices only.
    other = torch.cat([THETA[:1], table(2)[1:]])
    want = gradient_over_states(THETA, lambda logprobs, s: -logprobs[first[s]].exp())
    torch.testing.assert_close(expected_gradient(THETA, bonus_term(THETA)), want)
    torch.testing.assert_close(expected_gradient(THETA, bonus_term(other), other), want)
    assert not expected_gradient(THETA, bonus_term(THETA, known=False)).any()


def test_entropy_and_sft_terms():
    got = expected_gradient(
        THETA, lambda y, logp, h, _: batch_loss(logp, h, None, sampled(y), OWN, policy_coef=0.0, entropy_coef=2.0)
    )
    torch.testing.assert_close(got, gradient_over_states(THETA, lambda logprobs, s: (logprobs.exp() * logprobs).sum()))
    logp, teacher = torch.tensor([-1.0, -2.0], dtype=torch.float64), sampled((0, 1), advantage=1.0)
    teacher.is_teacher = torch.tensor([True, True])
    loss = batch_loss(logp, -logp, None, teacher, (2, 2, 0, 1), by_likelihood=True, sft_coef=0.5)
    assert loss == 0.75  # the policy term has no token left


@pytest.mark.parametrize("how", ["log", "none", "phi", "luffy"])
def test_the_shape_of_the_likelihood(how):
    """The gradient at a trace's token is minus its weight x grad log p: 1 for SFT, p for DFT, p (1 - p) for CHORD-phi. No
    advantage and no gamma of log count, and DFT's term is minus the mean probability."""
    theta = THETA.clone().requires_grad_(True)
    logp = theta.log_softmax(-1)[states(TRACE)][torch.arange(2), list(TRACE)]
    batch = sampled(TRACE, advantage=-3.0, is_teacher=torch.tensor([True, True]))
    loss = batch_loss(logp, -logp, None, batch, (2, 2, 0, 1), by_likelihood=True, sft_coef=0.7, sft_shaping=how)
    p = logp.exp().detach()
    weight = {"log": 1 + 0 * p, "none": p, "phi": p * (1 - p), "luffy": 0.1 * p / (p + 0.1) ** 2}[how]
    got, want = (torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (loss, -(0.7 / 2) * (weight * logp).sum()))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    if how == "none":
        torch.testing.assert_close(loss, -0.7 * logp.exp().mean(), rtol=0, atol=1e-15)


def test_only_the_uncertain_tokens_of_a_trace_carry_its_advantage():
    """teacher_top_entropy: of a trace's two tokens the one of the higher entropy has a gradient, and both their share in n."""
    theta = THETA.clone().requires_grad_(True)
    rows = theta.log_softmax(-1)[states(TRACE)]
    logp, entropy = rows[torch.arange(2), list(TRACE)], -(rows.exp() * rows).sum(-1)
    batch = sampled(TRACE, advantage=0.7, is_teacher=torch.tensor([True, True]))
    loss = lambda share, **terms: batch_loss(logp, entropy, None, batch, (2, 2, 0, 1), teacher_top_entropy=share, **terms)
    high = int(entropy.argmax())
    assert abs(entropy[0] - entropy[1]) > 0.05
    token = lambda i, how: -0.7 * {"log": logp[i], "luffy": logp[i].exp() / (logp[i].exp() + 0.1)}[how]
    for how, gamma in (("log", 1.0), ("luffy", 0.1)):  # log with gamma 1 is Prefix-RFT's first update: -A rho
        both = token(0, how) + token(1, how)
        for share, want in ((0.5, token(high, how)), (0.2, token(high, how)), (0.6, both), (1.0, both), (0.0, 0 * both)):
            got = loss(share, shaping=how, gamma=gamma)
            pair = (torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (got, want / 2))
            torch.testing.assert_close(*pair, rtol=0, atol=1e-12)


def test_truncated_importance_sampling():
    """Samples of another policy, one step each: weighted by pi_old / pi_sampler they give the on-policy gradient, until the
    cap limits the weights."""
    sampler = table(2)
    reward = lambda y: float(y[0] == 1)

    def loss(cap):
        def one(y, logp, h, rows):
            behaviour_logp = sampler.log_softmax(-1)[states(y)][torch.arange(2), list(y)]
            batch = sampled(y, reward(y), behaviour_logp=behaviour_logp)
            batch.loss_mask = torch.tensor([True, False])
            return batch_loss(logp, h, None, batch, (1, 0, 1, 0), loss_constant=1.0, tis_cap=cap)

        return one

    on_policy = expected_gradient(THETA, loss(0.0))
    torch.testing.assert_close(expected_gradient(THETA, loss(1e9), sampler), on_policy)
    assert not torch.allclose(expected_gradient(THETA, loss(0.0), sampler), on_policy)
    w = (THETA.log_softmax(-1) - sampler.log_softmax(-1))[0, 1].exp()
    torch.testing.assert_close(expected_gradient(THETA, loss(w.item() / 2), sampler), on_policy / 2)


def test_cispos_expected_gradient():
    """Over samples of the old policy: the sum of min(rho, 1 + clip_high) x reward x grad log p, also where PPO's clip gives
    none. With a bound that nothing reaches it is that of the plain ratio."""
    old = table(2)
    reward = lambda y: float(y[0] != 1)

    def loss(**clip):
        def one(y, logp, h, rows):
            old_logp = old.log_softmax(-1)[states(y)][torch.arange(2), list(y)]
            return batch_loss(logp, h, None, sampled(y, reward(y), old_logp=old_logp), OWN, loss_constant=1.0, **clip)

        return one

    theta = THETA.clone().requires_grad_(True)
    want = 0
    for y in SEQUENCES:
        at = states(y), list(y)
        logp, old_logp = theta.log_softmax(-1)[at], old.log_softmax(-1)[at]
        weight = (logp.detach() - old_logp).exp().clamp(max=1.2)
        want = want - old_logp.sum().exp() * reward(y) * (weight * logp).sum()
    got = expected_gradient(THETA, loss(cispo=True, clip_high=0.2), old)
    torch.testing.assert_close(got, torch.autograd.grad(want, theta)[0], rtol=0, atol=1e-12)
    assert not torch.allclose(got, expected_gradient(THETA, loss(clip_high=0.2), old), atol=0.01)
    torch.testing.assert_close(*(expected_gradient(THETA, loss(**c), old) for c in (dict(cispo=True, clip_high=1e9), {})))


def test_replayed_tokens_are_weighted_by_their_ratio():
    """ExGRPO: f(w) with w = pi / pi_then. At w = 1 the gradient is gamma / (1 + gamma)^2 = 0.0826, a twelfth of a fresh
    token's."""
    w = torch.tensor([1.0, 0.1, 2.0], dtype=torch.float64)
    then = torch.tensor([-2.0, -1.0, -3.0], dtype=torch.float64)
    logp = (then + w.log()).requires_grad_(True)
    one, yes = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    token_loss(logp, then, one, yes, behaviour_logp=then).sum().backward()
    torch.testing.assert_close(-logp.grad, 0.1 * w / (w + 0.1) ** 2)
    assert -logp.grad[0] == pytest.approx(0.0826, abs=1e-4) and -logp.grad[1] == pytest.approx(0.25)
    replayed = packed(3, is_replay=yes, advantage=one, behaviour_logp=then)  # and the same through a batch
    again = logp.detach().requires_grad_(True)
    batch_loss(again, -again, None, replayed, (3, 0, 0, 0), loss_constant=1.0).backward()
    torch.testing.assert_close(again.grad, logp.grad)


# ---------------------------------------------------------------- the gate: traces join only where the policy fails


def rows_of(pair):
    """A group before the gate: the policy's two samples, of which the sequence (0, 1) is right, and a right trace."""
    own = [Rollout(0, [], list(y), reward=float(y == (0, 1)), reason="correct" if y == (0, 1) else "wrong") for y in pair]
    return [*own, Rollout(0, [], list(TRACE), "teacher", 2, reward=1.0, reason="correct")]


def loss_of_group(theta, rows, **terms):
    """batch_loss of a group of sequences without a prompt."""
    rewards = torch.tensor([r.reward for r in rows], dtype=torch.float64)
    advantage = group_advantages(rewards, torch.zeros(len(rows), dtype=torch.long)).repeat_interleave(2)
    teacher = torch.tensor([r.source == "teacher" for r in rows]).repeat_interleave(2)
    ys = [tuple(r.response_ids) for r in rows]
    logprobs = theta.log_softmax(-1)
    logp = torch.cat([logprobs[states(y)][torch.arange(2), list(y)] for y in ys])
    ends = torch.arange(0, 2 * len(rows) + 1, 2, dtype=torch.int32)
    batch = packed(len(logp), input_ids=torch.tensor([sum(ys, ())]), advantage=advantage, is_teacher=teacher, cu_seqlens=ends)
    return batch_loss(logp, -logp, None, batch, batch.counts, loss_constant=1.0, **terms)


@pytest.mark.parametrize("sft_coef", [0.7, 0.0], ids=["HPT", "AMPO"])
def test_the_expected_gradient_behind_the_gate(script, sft_coef):
    """All 81 pairs of samples, each with its probability. Where both fail, HPT learns the trace by likelihood and AMPO puts it
    in a sample's place; all other pairs are GRPO's."""
    gated = script("train", ["--teacher_gate=0", "--n_rollouts=2", f"--sft_coef={sft_coef}"]).gated
    theta = THETA.clone().requires_grad_(True)
    seq = lambda y: theta.log_softmax(-1)[states(y)][torch.arange(2), list(y)]
    p = lambda y: seq(y).sum().exp().detach()
    pairs = list(itertools.product(SEQUENCES, repeat=2))
    terms = dict(by_likelihood=sft_coef > 0, sft_coef=sft_coef)
    got = sum(p(a) * p(b) * loss_of_group(theta, gated(rows_of((a, b))), **terms) for a, b in pairs)

    fails = {y: p(y) for y in SEQUENCES if y != (0, 1)}
    both_fail = sum(fails.values()) ** 2
    if sft_coef:
        want = both_fail * -sft_coef * seq(TRACE).mean()
    else:  # the trace and one of the failures; their mean reward is 1/2
        f = seq(TRACE).exp()
        failure = sum(q * 0.5 * seq(y).sum() for y, q in fails.items())
        want = both_fail * -0.5 * (f / (f + 0.1)).sum() + sum(fails.values()) * failure
    one_right = 2 * p((0, 1)) * sum(q * 0.5 * (seq(y) - seq((0, 1))).sum() for y, q in fails.items())
    torch.testing.assert_close(*(torch.autograd.grad(x, theta)[0] for x in (got, want + one_right)), rtol=0, atol=1e-12)


def test_who_is_in_a_group_behind_the_gate(script):
    def group(rewards, n_traces, *argv):
        own = [Rollout(0, [2], [i], reward=r, reason="correct" if r >= 1 else "wrong") for i, r in enumerate(rewards)]
        traces = [Rollout(0, [2], [10 + i], "teacher", 1) for i in range(n_traces)]
        train = script("train", list(argv))
        return [r.response_ids[0] for r in train.worth_training(train.gated([*own, *traces]))]

    few, ampo, hpt = (1, 0, 0, 1, 0), ("--teacher_gate=2", "--n_teacher=2"), ("--teacher_gate=2", "--sft_coef=1.0")
    assert group(few, 1) == [0, 1, 2, 3, 4, 10]  # without a gate all that was sampled
    assert group(few, 2, *ampo) == [0, 3, 1, 10, 11]  # right samples keep their places
    assert group(few, 1, *hpt) == [10] and group((0, 0), 2, *hpt) == [10, 11]
    assert group(few, 0, *hpt) == group(few, 0, *ampo) == [0, 1, 2, 3, 4]  # nothing to put in
    for argv in (ampo, hpt):
        assert group((1, 0, 1, 1, 0), 1, *argv) == [0, 1, 2, 3, 4]
    assert group(few, 1, "--teacher_gate=1") == [0, 1, 2, 3, 4]
    assert group((0,) * 5, 1, *ampo) == [0, 1, 2, 3, 10]  # one trace takes one place
    half, full = (0.5,) * 5, (6.0, 0, 0, 0, 0)  # rewards of a grader of one's own: right is what solved_at says
    assert group(half, 1, "--teacher_gate=0") == [0, 1, 2, 3, 10] and group(full, 1, "--teacher_gate=1") == [0, 1, 2, 3, 10]
    # A trace that is learnt by likelihood is alone, and of no use to DAPO's filter, which looks for unequal rewards.
    assert group((0, 0), 1, *hpt, "--skip_equal_groups=True") == [10] and group((0, 0), 0, "--skip_equal_groups=True") == []


def test_a_gate_that_never_opens_is_grpo(script, tmp_path, easy_data):
    """Where every group has a right answer, losses, norms and weights are those of a run without traces, bit by bit."""
    argv = [f"--data={easy_data}", "--temperature=1.8", "--prompts_per_step=4", "--update_batches=2", "--max_steps=1"]
    names = {"hpt": ["--teacher_gate=0", "--sft_coef=1.0"], "grpo": ["--n_teacher=0"]}
    a, b = (run(script, tmp_path, name, *argv, *more)[1] for name, more in names.items())
    assert b["groups/none_solved"] == 0 and b["groups/all_solved"] < 1 and b["grad_norm"] > 0
    assert a["groups/with_trace"] == 0 and a["reward/teacher"] == 1
    assert all(a[key] == b[key] for key in ("loss", "grad_norm", "reward/own", "entropy/own", "ratio/own"))
    x, y = (load_file(tmp_path / name / "ckpt_1" / "model.safetensors") for name in names)
    assert all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize("argv", [["--teacher_gate=0"], ["--teacher_gate=0", "--sft_coef=1.0"]], ids=["AMPO", "HPT"])
def test_the_gate_in_a_run(script, tmp_path, argv):
    """The base fails every question but by luck: traces join, metrics and files still have all that was sampled."""
    rows = run(script, tmp_path, "x", *argv, "--max_steps=1")
    dumped = rollouts_of(tmp_path / "x", 1)
    assert len(dumped) == 16 * 9 and rows[1]["groups/with_trace"] == rows[1]["groups/none_solved"] > 0.8
    for start in range(0, len(dumped), 9):
        *own, trace = dumped[start : start + 9]
        assert trace["written_by"] == "teacher" and all(r["written_by"] == "own" for r in own)
        joined = not any(r["reward"] for r in own)
        assert bool(trace["update_logps"]) == joined
        if joined and len(argv) == 1:  # seven failures and the trace
            assert [r["advantage"] for r in own] == pytest.approx([-trace["reward"] / 8] * 7 + [0])
    n_joined = round(16 * rows[1]["groups/with_trace"])
    assert rows[1]["groups/trained"] == (n_joined * (1 if len(argv) == 2 else 8) + (16 - n_joined) * 8) / (16 * 9)


# ---------------------------------------------------------------- runs of the overlays

OVERLAYS = sorted(os.path.basename(p)[:-3] for p in glob.glob(os.path.join(ROOT, "config", "method", "*.py")))
WITH_TEACHER = ("rkl", "kdrl", "tgpo", "tgpo_adv")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A teacher model of other code and size: a mixture of 4 experts in each of 2 layers, and 40 embeddings for 21 tokens."""
    folder = build_mixture(tmp_path_factory.mktemp("mixture"), vocab_size=40)
    load_tokenizer("toy/base").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A teacher model: the toy's base with flatter choices."""
    policy, folder = load_policy("toy/base"), str(tmp_path_factory.mktemp("teacher") / "model")
    with torch.no_grad():
        policy.hf.lm_head.weight.mul_(0.5)
    policy.hf.save_pretrained(folder)
    load_tokenizer("toy/base").save_pretrained(folder)
    return folder


def glossary():
    """The names in docs/metrics.md's table."""
    text = open(os.path.join(ROOT, "docs", "metrics.md")).read()
    names = {
        name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    return (names - {"_after"}) | {f"{name}_after" for name in names if name.startswith("memory/")}


def test_the_glossary_names_nothing_else():
    files = ["train.py", "replay.py", *sorted(glob.glob("runtime/*.py", root_dir=ROOT))]
    code = "".join(open(os.path.join(ROOT, name)).read() for name in files)
    phases = {f"{kind}/{p}{end}" for p in ("sync", "rollout", "reward", "update") for kind, end in PHASE_METRICS}
    for name in glossary() - phases:
        assert f'"{name}"' in code or name in ("eval/greedy", "eval/avg@k"), name
    assert all(f'begin("{p.split("/")[1]}")' in code for p in phases if p.startswith("time/"))


PHASE_METRICS = (("time", ""), ("memory", ""), ("memory", "_after"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_runs(script, tmp_path, name, other_model):
    argv = [f"config/method/{name}.py", "--max_steps=2", *([f"--teacher_model={other_model}"] if name in WITH_TEACHER else [])]
    rows = run(script, tmp_path, name, *argv)
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert {key for row in rows for key in row} <= glossary()
    if name in WITH_TEACHER:
        assert rows[1]["teacher_model/kl"] > 0.01
    if name in ("tgpo", "tgpo_adv"):
        assert 0 < rows[1]["teacher_model/agrees"] < 1
    if name == "relift":
        assert rows[1]["sft/loss"] > 0 and rows[1]["relift/waiting"] < 16  # the base fails every question
    if name == "exgrpo":
        assert rows[2]["replay/questions"] == 0  # and so nothing starts
    if name == "luffy_partial":
        samples = rollouts_of(tmp_path / name, 2)
        assert not any(s["teacher_tokens"] for s in samples)  # the share has fallen to zero


def test_partial_traces_are_continued(script, tmp_path):
    run(script, tmp_path, "x", "--max_steps=1", "--teacher_share=0.5", "--teacher_share_end=0.5")
    cut = [r for r in rollouts_of(tmp_path / "x", 1) if r["teacher_tokens"]]
    assert len(cut) == 16
    for r in cut:
        assert r["written_by"] == "teacher"
        assert 0 < r["teacher_tokens"] < len(r["response_ids"]) == r["teacher_tokens"] + len(r["sampler_logps"])
        assert r["finish_reason"] in ("stop", "length") and len(r["response_ids"]) <= 40


def test_a_prefix_that_is_only_read_has_no_gradient(script, tmp_path, problems):
    """train_teacher=False: the loss and its gradient are those of the continuation alone, behind a longer prompt."""
    policy, p = load_policy("toy/base"), problems[0]
    ids, n = p.teacher[0], len(p.teacher[0]) // 2
    rest = dict(advantage=0.6, sampler_logps=[0.0] * (len(ids) - n))
    cut = Rollout(p.id, p.prompt_ids, ids, "teacher", n, **rest)
    alone = Rollout(p.id, [*p.prompt_ids, *ids[:n]], ids[n:], **rest)
    found = []
    for rollout, train_teacher in ((cut, False), (alone, True), (cut, True)):
        batch = pack([rollout], train_teacher=train_teacher)
        logp, entropy = policy(batch)
        loss = batch_loss(logp, entropy, None, batch, batch.counts, entropy_coef=0.1)
        found.append([loss, *torch.autograd.grad(loss, list(policy.parameters()))])
    for x, y in zip(*found[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[0][0], found[2][0])
    rows = run(
        script, tmp_path, "x", "--train_teacher=False", "--teacher_share=0.5", "--teacher_share_end=0.5", "--max_steps=1"
    )
    assert "teacher/p" not in rows[1] and rows[1]["ratio/own"] == 1 and rows[1]["groups/with_trace"] == 1
    traces = [r for r in rollouts_of(tmp_path / "x", 1) if r["teacher_tokens"]]
    assert len(traces) == 16 and not any(r["update_logps"] for r in traces) and all(r["sampler_logps"] for r in traces)


@pytest.mark.parametrize(
    "argv,words",
    [
        (["config/method/kdrl.py"], "need a teacher model"),
        (["config/method/kdrl.py", "--teacher_model=nowhere"], "there is no model folder"),
        (["--baseline=own", "--n_rollouts=1"], "baseline='own' needs own samples"),
        (["--replay_share=0.5"], "set n_teacher=0"),
        (["--teacher_gate=7"], "teacher_gate=7 must be below n_rollouts - n_teacher = 7"),
        (["--teacher_gate=0", "--n_teacher=8"], "teacher_gate=0 must be below n_rollouts - n_teacher = 0"),
        (["--teacher_gate=0", "--n_teacher=0"], "has no effect with n_teacher=0"),
        (["--teacher_gate=0", "--sft_coef=1.0", "--baseline=own"], "leaves some groups no own sample"),
        (["--teacher_gate=-2"], "lie between -1 and 1024"),
        (["--teacher_share=1.5"], "between zero and one"),
        (["--lr_schedule=linear"], "choose constant or cosine"),
        (["--sft_coef=0.5", "--teacher_top_entropy=0.2"], "with sft_coef no trace does"),
        (["--train_teacher=False"], "none is cut: lower teacher_share"),
        (["--train_teacher=False", "--teacher_share=0.5", "--sft_coef=1.0"], "leaves no trace to learn"),
        (["--cispo=True"], "cispo is a way to clip the ratio"),
        (["--sft_shaping=lgo"], "unknown shaping 'lgo'"),
        (["--sft_shaping=phi"], "have no effect with sft_coef=0"),
        (["--sft_mix=True"], "have no effect with sft_coef=0"),
        (["--sft_mix=True", "--sft_coef=0.5", "--n_teacher=0"], "gives a share of the policy term to the traces"),
        (["config/method/hpt.py", "--teacher_share=0.5"], "has no baseline"),
        (["--teacher_share=0.3", "--teacher_share_end=0.3", "--teacher_share_low=0.8"], "is above teacher_share"),
        (["--sft_decay_steps=9"], "have no effect with sft_coef=0"),
        (["--sft_coef=1.5", "--sft_mix=True"], "1 - sft_coef, which is negative with 1.5"),
        (["--sft_coef=0.5", "--sft_coef_end=0.1"], "sft_coef_end=0.1 is never reached"),
        (["--shape_own=True", "--shaping=log"], "shape_own divides by f, which is not above 0"),
        (["config/method/sft.py", "--teacher_share=0.5"], "teacher_share below 1 lets the policy continue a trace"),
        (["config/method/relift.py", "--sft_buffer=5000"], "has only 512 problems with a trace"),
        (["config/method/exgrpo.py", "--sft_buffer=16"], "are two methods"),
        (["--teacher_model=toy/base"], "has no effect without kl_coef, ce_coef or top1_bonus"),
        (["--ce_steps=200"], "ce_steps=200 has no effect without ce_coef or top1_bonus"),
        (["config/method/tgpo_adv.py", "--policy_coef=0"], "top1_bonus is part of the advantage, and policy_coef=0"),
        (["config/method/tgpo.py", "--n_teacher=8"], "are of own samples, and n_teacher=8 leaves none"),
        (["--model={mixture}"], "is a mixture of experts, which only a teacher model may be: choose a dense model"),
    ],
)
def test_method_knobs_are_checked(script, tmp_path, argv, words, mixture):
    argv = [a.format(mixture=mixture) for a in argv]
    with pytest.raises(UserError, match=words):
        run(script, tmp_path, "bad", *argv)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "config,words",
    [
        (
            Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=0),
            "attends over the last 16 of up to 80 tokens",
        ),
        (MixtralConfig(sliding_window=16), "attends over the last 16 of up to 80 tokens"),
        (Gemma2Config(), "has attn_logit_softcapping=50.0"),
        (GraniteConfig(logits_scaling=8.0), "has logits_scaling=8.0"),
        (Qwen3NextConfig(), "has layers of linear_attention"),
        (Qwen3MoeConfig(quantization_config={"quant_method": "fp8"}), "are quantized: choose the model in bfloat16"),
    ],
)
def test_what_training_does_not_compute_is_refused(config, words):
    """Policy or teacher model: attention and head would be computed as if the config did not say so."""
    with pytest.raises(UserError, match=words):
        check_architecture("it", config, needed=80)
    for plain in (Qwen2Config(sliding_window=16), MixtralConfig(sliding_window=80), QWEN3_30B_A3B, LLAMA_8B, GraniteConfig()):
        check_architecture("it", plain, needed=80)


def test_teacher_tokenizers_must_agree(tokenizer, byte_model):
    check_same_tokens(tokenizer, load_tokenizer("toy/base"))
    with pytest.raises(UserError, match=r"differs in \d+ of 21 tokens: id 0 is '<pad>' for the policy"):
        check_same_tokens(tokenizer, load_tokenizer(byte_model))
    other = load_tokenizer("toy/base")
    other.eos_token = "<think>"
    with pytest.raises(UserError, match=r"EOS is '<eos>' \(1\), the teacher model's '<think>'"):
        check_same_tokens(tokenizer, other)


def test_the_learning_rates_schedule(script):
    module = script("train", ["--lr_schedule=cosine", "--warmup_steps=4", "--max_steps=20"])
    factors = [module.schedule(step) for step in range(1, 21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[11] == pytest.approx(0.5) and factors[19] == pytest.approx(0)
    floored = script("train", ["--lr_schedule=cosine", "--lr_floor=0.1", "--warmup_steps=4", "--max_steps=20"])
    factors = [floored.schedule(step) for step in range(1, 21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[11] == pytest.approx(0.55) and factors[19] == pytest.approx(0.1)
    constant = script("train", ["--warmup_steps=0", "--lr_floor=0.1"])
    assert {constant.schedule(step) for step in range(1, 61)} == {1.0}


def test_the_likelihoods_schedule(script):
    """CHORD's mu: linear from 0 to its peak, a cosine's half to its valley, and there it stays. Steps are counted from 0."""
    argv = ["--sft_coef=0.5", "--sft_warmup_steps=4", "--sft_decay_steps=8", "--sft_coef_end=0.02"]
    mu = [script("train", argv).sft_weight(step) for step in range(1, 21)]
    assert mu[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5], abs=1e-15)
    assert mu[8] == pytest.approx((0.5 + 0.02) / 2) and mu[12:] == pytest.approx([0.02] * 8)
    assert mu[6] == pytest.approx(0.02 + 0.48 * 0.5 * (1 + math.cos(math.pi / 4)))
    steady = script("train", ["--sft_coef=0.3"])
    assert {steady.sft_weight(step) for step in range(1, 61)} == {0.3} and script("train", []).sft_weight(1) == 0.0
    module = script("train", [*argv, "--sft_mix=True", "--policy_coef=2.0"])
    assert all(module.loss_terms(s)["policy_coef"] == 2 * (1 - module.sft_weight(s)) for s in range(1, 21))


def test_the_ends_of_the_mix_are_sft_and_grpo(script):
    """With mu = 1 the gradient is that of SFT, with mu = 0 that of GRPO on own tokens alone: the traces are never shaped."""

    def gradient(module, step, rows):
        theta = THETA.clone().requires_grad_(True)
        terms = {**module.loss_terms(step), "loss_constant": 0.0}
        seqs = [(0, 1), TRACE][:rows]
        logp = torch.cat([theta.log_softmax(-1)[states(y)][torch.arange(2), list(y)] for y in seqs])
        teacher = torch.tensor([False, False, True, True])[: 2 * rows]
        batch = packed(2 * rows, is_teacher=teacher, advantage=torch.tensor([0.5, 0.5, 0.9, 0.9]).double()[: 2 * rows])
        return torch.autograd.grad(batch_loss(logp, -logp, None, batch, batch.counts, **terms), theta)[0]

    mixed = script("train", ["--sft_coef=1.0", "--sft_warmup_steps=3", "--sft_mix=True"])
    sft, grpo = script("train", ["config/method/sft.py", "--policy_coef=0.0"]), script("train", ["config/method/grpo.py"])
    assert torch.equal(gradient(mixed, 4, rows=2), gradient(sft, 1, rows=2))
    assert torch.equal(gradient(mixed, 1, rows=2), gradient(grpo, 1, rows=1))
    half = (gradient(mixed, 3, rows=2) * 3 - gradient(sft, 1, rows=2) * 2, gradient(grpo, 1, rows=1))
    torch.testing.assert_close(*half, rtol=0, atol=1e-12)


def test_the_range_of_the_shares(script):
    """By default a share, linear between first and last step; Prefix-RFT's range has a low end that falls along a cosine."""
    ranges = lambda *argv: [script("train", ["--max_steps=11", *argv]).share_range(step) for step in (1, 2, 6, 11)]
    assert ranges() == [(1.0, 1.0)] * 4
    assert ranges("--teacher_share_end=0.0") == [(s, s) for s in (1.0, 0.9, 0.5, 0.0)]
    prefix_rft = ["--teacher_share=0.95", "--teacher_share_end=0.95", "--teacher_share_low=0.05"]
    cosine = 0.95 - 0.9 * 0.5 * (1 - math.cos(math.pi / 10))
    for schedule, second in (("linear", 0.86), ("cosine", cosine)):
        low, high = zip(*ranges(*prefix_rft, f"--teacher_share_schedule={schedule}"), strict=True)
        assert low == pytest.approx([0.95, second, 0.5, 0.05]) and high == (0.95,) * 4
    assert script("train", ["--max_steps=1"]).share_range(1) == (1.0, 1.0)


def test_what_dapo_leaves_out(script):
    groups = [(0, "stop", 0.0), (0, "stop", 0.0), (1, "stop", 1.0), (1, "length", 0.0)]
    rows = [Rollout(q, [2], [i], finish_reason=how, reward=r) for i, (q, how, r) in enumerate(groups)]
    kept = lambda *argv: [r.response_ids[0] for r in script("train", list(argv)).worth_training(rows)]
    assert kept() == [0, 1, 2, 3]
    assert kept("--skip_equal_groups=True") == [2, 3]
    assert kept("--skip_equal_groups=True", "--skip_truncated=True") == [2]


@pytest.fixture(scope="module")
def easy_data(tmp_path_factory):
    """Sums of two numbers. The base knows them, so samples at a high temperature are right now and then."""
    rng, rows = random.Random(0), []
    for i in range(64):
        numbers = build.sample_numbers(rng, 2)
        trace = build.response(build.running_totals(numbers), build.add(*numbers))
        rows.append({"data_source": "two", "prompt": [{"role": "user", "content": build.question(numbers)}],
                     "target": [{"role": "assistant", "content": "<think>\n" + trace}], "ability": "math",
                     "reward_model": {"ground_truth": f"{build.add(*numbers):02d}", "style": "rule"},
                     "extra_info": {"index": i, "split": "train"}})  # fmt: skip
    return write(tmp_path_factory.mktemp("easy") / "two.parquet", rows)


def test_replay_starts_and_fills_half_the_batch(script, tmp_path, easy_data):
    rows = run(script, tmp_path, "x", "config/method/exgrpo.py", f"--data={easy_data}", "--temperature=1.6", "--max_steps=4",
               "--save_interval=4")  # fmt: skip
    assert "reward/replayed" not in rows[1] and rows[1]["replay/questions"] == 0 and rows[1]["reward/own"] > 0.35
    assert rows[2]["replay/questions"] > 4 and "reward/replayed" not in rows[2]  # it stores now, and replays in the next step
    assert rows[3]["reward/replayed"] == 1.0  # graded again, and right again
    dumped = rollouts_of(tmp_path / "x", 3)
    replayed = [r for r in dumped if r["written_by"] == "replay"]
    assert len(dumped) == 128 and len({r["problem"] for r in dumped}) == 16 and 4 < len(replayed) <= 8
    earlier = {tuple(r["response_ids"]): r for n in (1, 2) for r in rollouts_of(tmp_path / "x", n)}
    for r in replayed:  # ids and log-probs are those with which it was sampled
        assert earlier[tuple(r["response_ids"])]["sampler_logps"] == pytest.approx(r["sampler_logps"], abs=1e-6)
    memory = load_file(tmp_path / "x" / "ckpt_4" / "state" / "memory.safetensors")
    assert memory["question"].numel() >= rows[4]["replay/questions"]
    load_policy(str(tmp_path / "x" / "ckpt_4"))  # the memory beside the weights does no harm


def test_relift_interleaves(script, tmp_path):
    """Every question of the toy is failed, except by luck: one SFT step for each 16 that wait, by an optimizer of its own."""
    rows = run(script, tmp_path, "x", "config/method/relift.py", "--max_steps=4")
    fired = ["sft/loss" in r for r in rows[1:]]
    waiting = 0
    for r, f in zip(rows[1:], fired, strict=True):
        waiting += round(16 * r["groups/none_solved"]) - 16 * f
        assert r["relift/waiting"] == waiting and (waiting < 16)
    assert sum(fired) >= 3
    losses = [r["sft/loss"] for r in rows[1:] if "sft/loss" in r]
    assert losses[-1] < losses[0]
    assert load_file(tmp_path / "x" / "ckpt_4" / "state" / "memory.safetensors")["queue"].numel() == waiting


@dataclass
class Update:
    """One optimizer step, as it was seen from outside."""

    optimizer: int
    lr: float
    max_norm: float
    terms: dict  # batch_loss's keywords
    batches: list


@pytest.fixture
def spied(script, tmp_path, monkeypatch):
    """A function that loads train.py and notes its optimizer steps and the stamps of the weights that the sampler took:
    (module, updates, stamps). The run goes to tmp_path / "x"."""

    def load(*argv):
        updates, stamps, calls, norms = [], [], [], []
        real_loss, real_clip = batch_loss, torch.nn.utils.clip_grad_norm_
        real_step, real_load = torch.optim.AdamW.step, TorchSampler.load

        @functools.wraps(real_loss)  # train.py reads its keywords
        def spy_loss(logp, entropy, top1_logp, batch, counts, **terms):
            calls.append((batch, terms))
            return real_loss(logp, entropy, top1_logp, batch, counts, **terms)

        def spy_clip(parameters, max_norm, **options):
            norms.append(max_norm)
            return real_clip(parameters, max_norm, **options)

        def spy_step(optimizer):
            batches, terms = [b for b, _ in calls], calls[-1][1]
            updates.append(Update(id(optimizer), optimizer.param_groups[0]["lr"], norms[-1], dict(terms), batches))
            calls.clear()
            return real_step(optimizer)

        def spy_load(sampler, hf, stamp):
            stamps.append(stamp)
            real_load(sampler, hf, stamp)

        monkeypatch.setattr("loss.batch_loss", spy_loss)
        monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", spy_clip)
        monkeypatch.setattr("torch.optim.AdamW.step", spy_step)
        monkeypatch.setattr(TorchSampler, "load", spy_load)
        argv = ["--sampler=torch", f"--out_dir={tmp_path / 'x'}", "--eval_data=", "--reward_workers=1", *argv]
        return script("train", argv), updates, stamps

    return load


def test_relifts_step_is_its_own(spied):
    """ReLIFT's SFT step has an AdamW, a learning rate, a clip and terms of its own, and the sampler gets its weights."""
    module, updates, stamps = spied("config/method/relift.py", "--max_steps=3", "--sft_learning_rate=0.0005",
                                    "--sft_grad_clip=0.9", "--canary_interval=0")  # fmt: skip
    module.main()
    rl, sft = [u for u in updates if u.terms["policy_coef"]], [u for u in updates if not u.terms["policy_coef"]]
    assert len(rl) == 3 and len(sft) >= 2
    assert {u.optimizer for u in rl}.isdisjoint(u.optimizer for u in sft)
    assert all((u.lr, u.max_norm) == (0.0005, 0.9) for u in sft) and all(u.max_norm == 0.7 for u in rl)
    for u in sft:  # likelihood and an entropy term, nothing else
        used = {name: value for name, value in u.terms.items() if name.endswith("_coef") and value}
        assert used == {"sft_coef": 1.0, "entropy_coef": 1e-4} and u.terms["policy_coef"] == 0
    assert all(b.is_teacher[b.loss_mask].all() for u in sft for b in u.batches)
    assert stamps[-1] >= 3  # two RL updates and at least one SFT step before the last rollout


def test_tgpos_weight_falls_to_zero(spied, other_model):
    argv = ["config/method/tgpo.py", f"--teacher_model={other_model}", "--ce_coef=0.5", "--ce_steps=2", "--max_steps=3"]
    module, updates, _ = spied(*argv)
    module.main()
    assert [u.terms["ce_coef"] for u in updates] == [0.5, 0.25, 0.0]
    assert [u.batches[0].top1 is None for u in updates] == [False, False, True]  # with a weight of zero it is not asked


def test_chords_weights_reach_the_loss(spied):
    argv = ["--sft_coef=0.9", "--sft_coef_end=0.1", "--sft_decay_steps=2", "--sft_mix=True", "--max_steps=3"]
    module, updates, _ = spied(*argv, "--prompts_per_step=4", "--canary_interval=0")
    module.main()
    assert [u.terms["sft_coef"] for u in updates] == pytest.approx([0.9, 0.5, 0.1])
    assert [u.terms["policy_coef"] for u in updates] == pytest.approx([0.1, 0.5, 0.9])


def test_replays_are_the_surest_and_never_retired(spied, tmp_path, easy_data, monkeypatch):
    """Of a question's stored successes the one with the lowest entropy goes into the group. Batches are whole and their
    questions differ. Replays do not count as successes. Retired questions are not served while others are left."""
    asked, pools = [], []
    entropies = lambda rollouts: [(i * 7) % 5 + i / 100 for i in range(len(rollouts))]
    real_batch, real_observe = Successes.next_batch, Successes.observe

    def next_batch(memory, order, n, rng, mean_entropies):
        return real_batch(memory, order, n, rng, lambda rollouts: asked.append(rollouts) or entropies(rollouts))

    def observe(memory, rollouts):
        pools.append((set(memory.retired), {r.problem for r in rollouts if r.source == "own"}))
        real_observe(memory, rollouts)

    monkeypatch.setattr(Successes, "next_batch", next_batch)
    monkeypatch.setattr(Successes, "observe", observe)
    module, *_ = spied("config/method/exgrpo.py", f"--data={easy_data}", "--temperature=2.0", "--max_steps=6",
                       "--prompts_per_step=8")  # fmt: skip
    module.main()
    assert len(asked) >= 3 and any(len(rollouts) > 4 for rollouts in asked)
    steps = [rollouts_of(tmp_path / "x", n) for n in range(1, 7)]
    assert all(len(rows) == 64 and len({r["problem"] for r in rows}) == 8 for rows in steps)
    replayed = [[r for r in rows if r["written_by"] == "replay"] for rows in steps]
    for rollouts, rows in zip(asked, filter(None, replayed), strict=True):
        entropy = entropies(rollouts)
        for r in rows:
            same = [i for i, stored in enumerate(rollouts) if stored.problem == r["problem"]]
            assert rollouts[min(same, key=entropy.__getitem__)].response_ids == r["response_ids"]
    assert all(not retired & served for retired, served in pools)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_method_plans_at_7b(script, tmp_path, name, capsys):
    """Each overlay over luffy_7b prints its memory, from config.json files alone; a teacher model's included."""
    for folder, model in (("student", QWEN_7B), ("teacher", QWEN_05B)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(model.to_dict()))
    argv = ["config/luffy_7b.py", f"config/method/{name}.py", "--dry_run=True", f"--model={tmp_path / 'student'}"]
    script("train", argv).main()
    plain = capsys.readouterr().out
    assert "fits in 80 GiB: yes" in plain
    assert ("the teacher model is not counted" in plain) == (name in WITH_TEACHER)
    if name in WITH_TEACHER:
        script("train", [*argv, f"--teacher_model={tmp_path / 'teacher'}"]).main()
        assert "teacher model's weights" in capsys.readouterr().out


def test_prefixes_of_random_length_reach_a_run(script, tmp_path):
    """Prefix-RFT's share is 0.95 in the first step and in a range from 0.05 in the last."""
    run(script, tmp_path, "x", "config/method/prefix_rft.py", "--max_steps=2")
    given = [[r["teacher_tokens"] for r in rollouts_of(tmp_path / "x", s) if r["written_by"] == "teacher"] for s in (1, 2)]
    assert len(given[0]) == 16 and min(given[0]) >= 20 and min(given[1]) < 12 and len(set(given[1])) > 5


def test_several_traces_in_a_group(script, tmp_path):
    """n_teacher = 2: six own samples, both traces of a problem that has two, and the only one of a problem that has one."""
    one = {"content": "<think>\n49>36</think>\\boxed{36}", "role": "assistant"}
    rows = [a_row(target=[one, {**one, "content": "<think>\n36</think>\\boxed{36}"}]), a_row(target=[one])]
    data = write(tmp_path / "two.parquet", [{**r, "reward_model": {"ground_truth": "36", "style": "rule"}} for r in rows])
    run(script, tmp_path, "x", f"--data={data}", "--prompts_per_step=2", "--n_teacher=2", "--max_steps=1")
    dumped = rollouts_of(tmp_path / "x", 1)
    by_problem = {p: [r["teacher_tokens"] > 0 for r in dumped if r["problem"] == p] for p in (0, 1)}
    assert by_problem == {0: [False] * 6 + [True] * 2, 1: [False] * 7 + [True]}
    group = [r for r in dumped if r["problem"] == 0]
    mean = sum(r["reward"] for r in group) / 8
    assert all(r["advantage"] == pytest.approx(r["reward"] - mean) for r in group)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,more",
    [
        ("relift", []),
        ("exgrpo", ["--data={easy}", "--temperature=1.6"]),
        ("tgpo", ["--teacher_model={other}", "--teacher_offload=True", "--ce_coef=0.5"]),
        ("kdrl", ["--teacher_model={other}", "--kl_coef=0.1"]),
        ("grpo_std", []),
        ("luffy", []),
        ("rkl", ["--teacher_model={mixture}"]),
        ("kdrl", ["--teacher_model={mixture}", "--kl_coef=0.1"]),
        ("tgpo", ["--teacher_model={mixture}", "--ce_coef=0.5", "--update_batches=2"]),
        ("tgpo_adv", ["--teacher_model={mixture}", "--teacher_offload=True", "--top1_bonus=0.5", "--update_batches=2"]),
        ("sft_released", []),
        ("hpt", ["--data={easy}", "--temperature=2.0", "--update_batches=2"]),
        ("hpt", []),
        ("ampo", ["--data={easy}", "--temperature=2.0", "--update_batches=2"]),
        ("chord_mu", ["--sft_decay_steps=3", "--update_batches=2"]),
        ("chord_phi", []),
        ("prefix_rft", ["--update_batches=2"]),
        ("dft", []),
        ("cispo", ["--data={easy}", "--temperature=1.6", "--update_batches=4", "--clip_high=0.1"]),
    ],
)
def test_methods_on_two_sharded_ranks(tmp_path, name, more, easy_data, other_model, mixture):
    """Memory and teacher models are the same in one process and on two FSDP2 ranks, and so are four steps."""
    argv = [f"config/method/{name}.py", "--max_steps=4", "--sampler=torch", "--eval_data=",
            *(m.format(easy=easy_data, other=other_model, mixture=mixture) for m in more)]  # fmt: skip
    one = launch(tmp_path, "one", 1, *argv)
    two = launch(tmp_path, "two", 2, *argv, "--shard=fsdp")
    kinds = ("loss", "grad_norm", "reward", "replay", "relift", "teacher_model", "entropy")
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.split("/")[0] in kinds:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), (a["step"], key)
