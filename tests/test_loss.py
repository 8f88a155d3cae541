import itertools
import math

import pytest
import torch
from helpers import packed

from data import pack
from loss import batch_loss, group_advantages, shape, token_loss

SHAPES = ("none", "luffy", "sqrt", "pow", "log", "p_log", "phi")


def by_hand(logp, old, advantage, teacher, shaping, gamma, low, high):
    """LUFFY's token term again, in plain floats."""
    if teacher:
        p = math.exp(logp)
        f = {"none": p, "luffy": p / (p + gamma), "sqrt": math.sqrt(p), "pow": p**gamma,
             "log": gamma * logp, "p_log": gamma * logp + p, "phi": p - p * p / 2}[shaping]  # fmt: skip
        return -advantage * f
    ratio = math.exp(logp - old)
    clipped = ratio
    if low:
        clipped = max(clipped, 1 - low)
    if high:
        clipped = min(clipped, 1 + high)
    return max(-advantage * ratio, -advantage * clipped) if low or high else -advantage * ratio


def random_tokens(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(n, generator=g, dtype=torch.float64)
    old = logp + 0.6 * torch.randn(n, generator=g, dtype=torch.float64)
    return logp, old, torch.randn(n, generator=g, dtype=torch.float64), torch.rand(n, generator=g) < 0.5


@pytest.mark.parametrize("shaping", SHAPES)
@pytest.mark.parametrize("low,high", [(0, 0), (0.2, 0.2), (0.2, 0), (0, 0.28)])
def test_token_loss_is_the_formula(shaping, low, high):
    logp, old, advantage, teacher = random_tokens()
    got = token_loss(logp, old, advantage, teacher, shaping, 0.1, low, high)
    want = [
        by_hand(*row, shaping, 0.1, low, high)
        for row in zip(*(x.tolist() for x in (logp, old, advantage, teacher)), strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shaping", SHAPES)
@pytest.mark.parametrize("low,high", [(0, 0), (0.2, 0.2), (0.2, 0), (0, 0.28)])
def test_gradient_is_the_finite_difference(shaping, low, high):
    logp, old, advantage, teacher = random_tokens(seed=1)
    logp.requires_grad_(True)
    f = lambda x: token_loss(x, old, advantage, teacher, shaping, 0.1, low, high)
    assert torch.autograd.gradcheck(f, (logp,))


def test_gradient_weights():
    """A teacher token weighs p without shaping, gamma p / (p + gamma)^2 with LUFFY's and p (1 - p) with CHORD's phi. An own
    token at ratio 1 weighs 1."""
    p = torch.tensor([1e-4, 0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    one, yes = torch.ones_like(p), torch.ones(5, dtype=torch.bool)
    for shaping, weight in (("none", p), ("luffy", 0.1 * p / (p + 0.1) ** 2), ("phi", p * (1 - p))):
        logp = p.log().requires_grad_(True)
        token_loss(logp, logp.detach(), one, yes, shaping).sum().backward()
        torch.testing.assert_close(logp.grad, -weight)
    logp = p.log().requires_grad_(True)
    token_loss(logp, logp.detach(), one, ~yes).sum().backward()
    torch.testing.assert_close(logp.grad, -one)


def test_cispo_weighs_log_p_by_the_clipped_ratio():
    """Within the clip its gradient is that of -A rho; beyond it, where PPO's is zero, a token keeps the weight of the bound."""
    logp, old, advantage, teacher = random_tokens()
    ratio = (logp - old).exp()
    outside = ~teacher & (ratio > 1.3)
    assert outside.sum() > 5 and (outside & (advantage > 0)).any() and (outside & (advantage < 0)).any()
    gradient = {}
    for name, options in (("cispo", dict(cispo=True, clip_high=0.3)), ("ppo", dict(clip_high=0.3)), ("free", {})):
        x = logp.clone().requires_grad_(True)
        token_loss(x, old, advantage, teacher, **options).sum().backward()
        gradient[name] = x.grad
    torch.testing.assert_close(gradient["cispo"][~teacher], (-advantage * ratio.clamp(max=1.3))[~teacher])
    torch.testing.assert_close(gradient["cispo"][~outside], gradient["free"][~outside])
    assert (gradient["ppo"][outside & (advantage > 0)] == 0).all()
    both = token_loss(logp, old, advantage, teacher, clip_low=0.2, clip_high=0.3, cispo=True)
    torch.testing.assert_close(both[~teacher], (-advantage * ratio.clamp(0.8, 1.3) * logp)[~teacher])
    batch = packed(64, old_logp=old, advantage=advantage, is_teacher=teacher, behaviour_logp=torch.zeros(64).double())
    total = batch_loss(logp, logp, None, batch, batch.counts, loss_constant=1.0, clip_low=0.2, clip_high=0.3, cispo=True)
    torch.testing.assert_close(total, both.sum())


@pytest.mark.parametrize("shaping", ["none", "luffy", "sqrt", "pow"])
def test_own_tokens_may_be_shaped_too(shaping):
    """shape_own: f(p) / f(p_old) in place of the ratio. It is 1 where the policy has not moved, and leaves teacher's tokens."""
    logp, old, advantage, teacher = random_tokens()
    loss = lambda new, old, **clip: token_loss(new, old, advantage, teacher, shaping=shaping, shape_own=True, **clip)
    f = lambda p: shape(p, shaping, 0.1)
    torch.testing.assert_close(loss(logp, old)[~teacher], (-advantage * f(logp.exp()) / f(old.exp()))[~teacher])
    torch.testing.assert_close(loss(logp, old)[teacher], token_loss(logp, old, advantage, teacher, shaping=shaping)[teacher])
    clipped = (f(logp.exp()) / f(old.exp())).clamp(0.8, 1.2) * -advantage
    assert (loss(logp, old, clip_low=0.2, clip_high=0.2) >= clipped - 1e-12)[~teacher].all()
    here = logp.clone().requires_grad_(True)
    loss(here, logp).sum().backward()
    p = logp.exp()
    weight = {"none": torch.ones_like(p), "luffy": 0.1 / (p + 0.1), "sqrt": 0.5, "pow": 0.1}[shaping]
    torch.testing.assert_close(here.grad[~teacher], (-advantage * weight)[~teacher])
    far = torch.full((3,), -200.0, requires_grad=True)  # p and p_old are 0 in float32
    own = torch.zeros(3, dtype=torch.bool)
    token_loss(far, far.detach(), torch.ones(3), own, shaping=shaping, shape_own=True).sum().backward()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("shaping", SHAPES)
def test_hopeless_tokens_stay_finite(shaping):
    """A teacher token of probability e^-200 underflows in fp32. An absurd old_logp there must not matter."""
    logp = torch.tensor([-200.0, -1.0], requires_grad=True)
    old, teacher = torch.tensor([-1e4, -1.0]), torch.tensor([True, False])
    token_loss(logp, old, torch.ones(2), teacher, shaping).sum().backward()
    assert logp.grad.isfinite().all()


def test_unknown_shaping():
    with pytest.raises(ValueError, match="luffy"):
        shape(torch.ones(1), "lufy")


def test_advantages_of_luffys_groups():
    none_right = torch.tensor([0.0] * 7 + [1.0])
    torch.testing.assert_close(
        group_advantages(none_right, torch.zeros(8, dtype=torch.long)), torch.tensor([-1 / 8] * 7 + [7 / 8])
    )
    teacher_wrong = torch.tensor([1.0] * 2 + [0.0] * 6)
    a = group_advantages(teacher_wrong, torch.full((8,), 5))
    assert a[0] == 6 / 8 and a[7] == -2 / 8
    assert group_advantages(torch.ones(8), torch.zeros(8, dtype=torch.long)).eq(0).all()


def test_advantages_with_std_baseline_and_any_labels():
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0])
    group = torch.tensor([7, -2, 7, -2, 7, -2])
    a = group_advantages(rewards, group, use_std=True)
    for label in (7, -2):
        r = rewards[group == label]
        torch.testing.assert_close(a[group == label], (r - r.mean()) / (r.std() + 1e-6))
    assert group_advantages(torch.ones(4), torch.zeros(4, dtype=torch.long), use_std=True).eq(0).all()
    own = torch.tensor([True, True, False])  # RL with an SFT loss takes the mean over own rows only
    a = group_advantages(torch.tensor([1.0, 0, 1]), torch.zeros(3, dtype=torch.long), baseline=own)
    assert a.tolist() == [0.5, -0.5, 0.5]
    with pytest.raises(ValueError, match="baseline"):
        group_advantages(torch.ones(2), torch.tensor([0, 1]), baseline=torch.tensor([True, False]))
    assert group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 1])).tolist() == [1.0, 0.0]


def test_batch_loss_does_not_depend_on_the_cut():
    """For every combination of terms: the loss of the whole batch is the sum over its parts, and it is the formula's."""
    g = torch.Generator().manual_seed(3)
    n = 60
    rand = lambda: torch.rand(n, generator=g, dtype=torch.float64)
    logp, old, advantage, teacher = random_tokens(n)
    mask, entropy, top1_logp, teacher_logp = rand() < 0.8, rand(), -rand(), -rand()
    replay = ~teacher & (rand() < 0.4)
    behaviour_logp = torch.where(teacher, 0.0, old + 0.2 * rand())
    top1 = torch.where(rand() < 0.7, (rand() < 0.5).long(), -1)
    fields = dict(loss_mask=mask, is_teacher=teacher, is_replay=replay, advantage=advantage, behaviour_logp=behaviour_logp,
                  old_logp=old, teacher_logp=teacher_logp, top1=top1)  # fmt: skip

    def batch(a, b):
        return packed(b - a, **{name: value[a:b] for name, value in fields.items()})

    own, replayed, theirs = mask & ~teacher & ~replay, mask & replay, mask & teacher
    assert min(own.sum(), replayed.sum(), theirs.sum()) > 5
    counts = [*(where.sum().item() for where in (mask, theirs, own)), 1]
    coefficients = itertools.product(
        (0.0, 512.0), (0.0, 1.0), (0.0, 0.3), (0.0, 1.0), (0.0, 0.2), (0.0, 0.4), (0.0, 1.1), (0.0, 0.5)
    )
    for constant, policy_coef, entropy_coef, sft_coef, kl_coef, ce_coef, cap, bonus in coefficients:
        options = dict(loss_constant=constant, policy_coef=policy_coef, entropy_coef=entropy_coef, by_likelihood=sft_coef > 0,
                       sft_coef=sft_coef, kl_coef=kl_coef, ce_coef=ce_coef, tis_cap=cap, top1_bonus=bonus,
                       clip_low=0.2)  # fmt: skip
        loss = lambda a, b: batch_loss(logp[a:b], entropy[a:b], top1_logp[a:b], batch(a, b), counts, **options)  # noqa: B023
        whole = loss(0, n)
        torch.testing.assert_close(loss(0, 7) + loss(7, 8) + loss(8, n), whole)
        raised = advantage + bonus * own * (top1 >= 0) * ((top1 == 0).double() - top1_logp.exp())  # the tokens are all 0
        tokens = token_loss(logp, old, raised, teacher, clip_low=0.2)
        tokens = torch.where(replay, -advantage * shape((logp - behaviour_logp).exp()), tokens)
        if cap:
            tokens = tokens * torch.where(own, (old - behaviour_logp).exp().clamp(max=cap), 1.0)
        where = own | replayed if sft_coef else mask
        want = policy_coef * tokens[where].sum() / (constant or where.sum()) - entropy_coef * entropy[mask].mean()
        want = want - sft_coef * logp[theirs].mean() + kl_coef * ((logp - teacher_logp)[own] ** 2 / 2).mean()
        torch.testing.assert_close(whole, want - ce_coef * (top1_logp * (top1 >= 0))[own].mean())


def test_only_own_tokens_have_an_importance_weight_and_a_kl():
    """With tis_cap and kl_coef the gradients at a teacher's token and at a replayed one are those of f alone."""
    logp = torch.tensor([-1.0, -1.5, -2.0], dtype=torch.float64, requires_grad=True)
    teacher, replay = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    batch = packed(3, is_teacher=teacher, is_replay=replay, advantage=torch.ones(3),
                   behaviour_logp=torch.tensor([0.0, -3.0, -2.5]), teacher_logp=torch.full((3,), -9.0))  # fmt: skip
    batch_loss(logp, -logp, None, batch, (3, 1, 1, 1), tis_cap=2.0, kl_coef=0.1).backward()
    weight = lambda w: 0.1 * w / (w + 0.1) ** 2
    want = [-weight(math.exp(-1.0)) / 3, -weight(math.exp(1.5)) / 3, -math.exp(0.5) / 3 + 0.1 * (-2.0 + 9.0)]
    torch.testing.assert_close(logp.grad, torch.tensor(want, dtype=torch.float64))


def test_likelihood_is_for_the_teachers_tokens_and_replayed_ones_stay_in_the_policy_term():
    """by_likelihood moves the teacher's tokens out of the policy term. A replayed token is the policy's own and stays."""
    logp = torch.tensor([-1.0, -1.5, -2.0], dtype=torch.float64, requires_grad=True)
    teacher, replay = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    batch = packed(3, is_teacher=teacher, is_replay=replay, advantage=torch.tensor([5.0, 1.0, -1.0]),
                   behaviour_logp=torch.tensor([0.0, -1.5, -2.0]))  # fmt: skip
    batch_loss(logp, -logp, None, batch, (3, 1, 1, 1), sft_coef=0.5, by_likelihood=True).backward()
    want = [-0.5, -0.1 / 1.1**2 / 2, 1 / 2]  # two tokens are left in the policy term
    torch.testing.assert_close(logp.grad, torch.tensor(want, dtype=torch.float64))


def test_a_mean_per_sequence_does_not_depend_on_the_cut():
    """sft_per_sequence: every trace counts alike, however long it is, in one micro-batch or in several."""
    rows = [(2, 3, 0), (1, 0, 4), (2, 9, 0), (0, 1, 0), (1, 4, 2)]  # tokens of the prompt, of the trace, and own ones behind it
    starts = [0, *itertools.accumulate(map(sum, rows))]
    logp = random_tokens(starts[-1])[0].requires_grad_(True)

    def batch(*chosen):
        kinds = [kind for i in chosen for kind, n in zip("pto", rows[i], strict=True) for _ in range(n)]
        ends = torch.tensor([0, *itertools.accumulate(sum(rows[i]) for i in chosen)], dtype=torch.int32)
        response, trace = torch.tensor([k != "p" for k in kinds]), torch.tensor([k == "t" for k in kinds])
        return packed(len(kinds), loss_mask=response, is_teacher=trace, cu_seqlens=ends)

    def loss(*chosen):
        mine = torch.cat([logp[starts[i] : starts[i + 1]] for i in chosen])
        options = dict(policy_coef=0.0, sft_coef=2.0, sft_per_sequence=True)
        return batch_loss(mine, -mine, None, batch(*chosen), (23, 17, 6, 4), **options)

    assert batch(2, 1).trace_lengths.tolist() == [9] * 11 + [0] * 5 and batch(3, 4).trace_lengths.tolist() == [1] + [4] * 7
    assert batch(*range(5)).counts == (23, 17, 6, 4) and pack([]).counts == (0, 0, 0, 0)  # the dummy of an idle rank
    whole = loss(*range(5))
    torch.testing.assert_close(loss(0, 2) + loss(1) + loss(4, 3), whole)
    traces = [logp[start + n : start + n + m] for start, (n, m, _) in zip(starts, rows, strict=False) if m]
    torch.testing.assert_close(whole, -2.0 * sum(trace.mean() for trace in traces) / 4)


def test_the_top_tokens_of_a_trace_do_not_depend_on_the_cut():
    """teacher_top_entropy ranks within each trace: prompts, own tokens and other rows of the micro-batch do not count."""
    g = torch.Generator().manual_seed(5)
    rows = [
        (2, 9, 3),
        (0, 0, 6),
        (3, 1, 0),
        (1, 20, 2),
        (2, 5, 0),
    ]  # tokens of the prompt, of the trace, and own ones behind it
    starts = [0, *itertools.accumulate(map(sum, rows))]
    logp, entropy = -3 * torch.rand(starts[-1], generator=g), torch.rand(starts[-1], generator=g).mul(8).round()  # with ties
    advantage = torch.randn(starts[-1], generator=g)

    def loss(*chosen):
        kinds = [kind for i in chosen for kind, n in zip("pto", rows[i], strict=True) for _ in range(n)]
        ends = torch.tensor([0, *itertools.accumulate(sum(rows[i]) for i in chosen)], dtype=torch.int32)
        response, trace = torch.tensor([k != "p" for k in kinds]), torch.tensor([k == "t" for k in kinds])
        x, h, a = (torch.cat([x[starts[i] : starts[i + 1]] for i in chosen]) for x in (logp, entropy, advantage))
        batch = packed(len(kinds), loss_mask=response, is_teacher=trace, cu_seqlens=ends, advantage=a)
        return batch_loss(x, h, None, batch, (46, 35, 11, 4), loss_constant=1.0, teacher_top_entropy=0.3)

    want = 0.0
    for start, (n, m, k) in zip(starts, rows, strict=False):
        trace = range(start + n, start + n + m)
        top = sorted(trace, key=lambda i: -entropy[i])[: math.ceil(0.3 * m)]
        want = want - sum(advantage[i] * shape(logp[i].exp()) for i in top) - advantage[start + n + m : start + n + m + k].sum()
    torch.testing.assert_close(loss(*range(5)), want)
    torch.testing.assert_close(loss(3, 1) + loss(2) + loss(4, 0), want)


def test_without_old_logp_the_ratio_is_one():
    logp, _, advantage, _ = random_tokens(10)
    batch = packed(10, advantage=advantage, behaviour_logp=logp)
    torch.testing.assert_close(batch_loss(logp, logp, None, batch, (10, 0, 10, 0), loss_constant=1.0), -advantage.sum())
