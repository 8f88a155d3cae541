"""
Advantages and losses: pure tensor functions, no configuration, no torch.distributed.

A group is the rollouts of one prompt. LUFFY's has seven samples of the policy and one teacher trace. The verifier
gives each a reward r in {0, 1}. Per token, with p = pi(token) and rho = pi / pi_old of the policy pi:

    advantage       A = r - mean of the group                          no division by the std
    own token       -A * rho                                           no clip in LUFFY; PPO's or CISPO's is optional
    teacher token   -A * f(p),   f(p) = p / (p + gamma)                policy shaping, gradient through f

The behaviour policy pi_phi of a teacher token is unknown: LUFFY takes pi_phi := 1, so rho = p. The token's
gradient is -A * f'(p) * p * grad log p, so f decides how much an unlikely token weighs: p without shaping, and
gamma * p / (p + gamma)^2 with it, ten times as much where p << gamma = 0.1. Own and teacher tokens together
make up the policy term. Every method's loss is a weighted sum of it and four other terms, each averaged over
the tokens it names:

    loss = policy_coef  * sum over policy tokens / loss_constant       or / their number: own, replayed, teacher
         - entropy_coef * mean entropy                                 all response tokens
         - sft_coef     * mean log p, or f(p), of teacher tokens       they then leave the policy term
         + kl_coef      * mean (log p - log p_T)^2 / 2 of own tokens   reverse KL to a teacher model's p_T
         - ce_coef      * mean log pi(y*) at own tokens                y* is the teacher model's top-1 token

Source: LUFFY, arXiv 2504.14945, and its released code where the paper is silent; KDRL, arXiv 2506.02208, for
kl_coef; TGPO, arXiv 2605.13230, for y*; ExGRPO, arXiv 2510.02245, for replayed tokens; CHORD, arXiv 2508.11408,
for phi; MiniMax-M1, arXiv 2506.13585, for CISPO. Shapes: B rollouts of a batch, T tokens of a packed micro-batch;
index t is of token t given the tokens before it: logp[t] = log pi(t | < t).
"""

import math

import torch


def group_advantages(rewards, group, use_std=False, baseline=None):
    """A = r - mean_group(r), divided by (std_group + 1e-6) if use_std (GRPO; LUFFY and Dr.GRPO do not).

    rewards (B,) float; group (B,) int, any labels; baseline (B,) bool: the rows whose mean and unbiased std
    are used, by default the whole group. A zero std counts as 1. With a single baseline row the mean is 0
    and the std 1, as in the released code, so advantages are rewards. Returns (B,).
    Raises ValueError if a group has no baseline row.
    """
    if baseline is None:
        baseline = torch.ones_like(rewards, dtype=torch.bool)
    advantages = torch.empty_like(rewards)
    for label in group.unique():
        members = group == label
        base = rewards[members & baseline]
        if len(base) == 0:
            raise ValueError(f"group {label.item()} has no baseline row to take the mean of")
        mean = base.mean() if len(base) > 1 else 0.0
        advantages[members] = rewards[members] - mean
        if use_std and len(base) > 1 and (std := base.std()) > 0:
            advantages[members] /= std + 1e-6
    return advantages


def shape(p, how="luffy", gamma=0.1):
    """f(p), what a teacher token contributes; p any shape, in [0, 1]. gamma's role depends on `how`:

    how      f(p)               weight of grad log p
    none     p                  p
    luffy    p / (p + gamma)    gamma p / (p + gamma)^2
    sqrt     p^.5               p^.5 / 2
    pow      p^gamma            gamma p^gamma
    log      gamma log p        gamma
    p_log    gamma log p + p    gamma + p
    phi      p - p^2 / 2        p (1 - p)
    """
    if how == "none":
        return p
    if how == "luffy":
        return p / (p + gamma)
    if how == "phi":
        return p - p**2 / 2
    p = p.clamp_min(torch.finfo(p.dtype).tiny)  # if p underflows to 0, the slopes below are infinite
    if how == "sqrt":
        return p.sqrt()
    if how == "pow":
        return p**gamma
    if how == "log":
        return gamma * p.log()
    if how == "p_log":
        return gamma * p.log() + p
    raise ValueError(f"unknown shaping '{how}': choose none, luffy, sqrt, pow, log, p_log or phi")


def token_loss(logp, old_logp, advantage, off_policy, shaping="luffy", gamma=0.1, clip_low=0.0, clip_high=0.0,
               behaviour_logp=0.0, shape_own=False, cispo=False):  # fmt: skip
    """The policy term per token, unreduced: (T,), differentiable in logp.

    logp, old_logp, advantage (T,) float; off_policy (T,) bool: tokens of a teacher, and replayed ones (ExGRPO). f is
    taken of pi / pi_phi there, behaviour_logp (T,) being log pi_phi: 0 for LUFFY's teacher, the log-prob that a replayed
    token was sampled with. old_logp is read only at own tokens, behaviour_logp only at the others.
    PPO's clip of own tokens is max(-A rho, -A clamp(rho, 1 - clip_low, 1 + clip_high)); 0 switches a side off.
    CISPO's is -A clamp(rho, ...) log p with the clamp detached, so that a token beyond the clip keeps a gradient.
    shape_own: the ratio of own tokens is f(p) / f(p_old), for an f above zero.
    """
    ratio = torch.where(off_policy, 0.0, logp - old_logp).exp()
    if shape_own:
        f = lambda x: shape(x.exp().clamp_min(torch.finfo(x.dtype).tiny), shaping, gamma)
        ratio = f(logp) / f(torch.where(off_policy, logp.detach(), old_logp))
    own = -advantage * ratio
    if clip_low or clip_high:
        clipped = ratio.clamp(1 - (clip_low or 1), 1 + (clip_high or math.inf))  # a side that is off: 0 or infinity
        own = -advantage * clipped.detach() * logp if cispo else torch.maximum(own, -advantage * clipped)
    other = -advantage * shape(torch.where(off_policy, logp - behaviour_logp, 0.0).exp(), shaping, gamma)
    return torch.where(off_policy, other, own)


def batch_loss(logp, entropy, top1_logp, batch, counts, shaping="luffy", gamma=0.1, clip_low=0.0, clip_high=0.0,
               loss_constant=0.0, policy_coef=1.0, entropy_coef=0.0, by_likelihood=False, sft_coef=0.0, kl_coef=0.0,
               ce_coef=0.0, tis_cap=0.0, sft_per_sequence=False, shape_own=False, sft_shaping="log",
               teacher_top_entropy=1.0, cispo=False, top1_bonus=0.0):  # fmt: skip
    """One micro-batch's share of the optimizer step's loss: a scalar, to be summed over micro-batches and ranks.

    logp, entropy (T,) from the policy, and top1_logp (T,), log pi(y*), if ce_coef or top1_bonus; batch: a data.Packed.
    counts: the numbers of response tokens (all, a teacher's, own) and of traces in the WHOLE optimizer batch over all
    ranks, so that the loss does not depend on the cut into micro-batches. A response token is exactly one of own, teacher
    (batch.is_teacher; of a cut trace the part that was given) and replay (batch.is_replay). batch.behaviour_logp: the
    log-prob under whoever wrote the token: the sampler's (of a replay, then), the teacher's if the data has it, else 0.

    loss_constant        0: the mean over the policy term's tokens
    by_likelihood        teacher tokens leave the policy term, also in a step whose schedule has sft_coef at 0
    sft_shaping          f of the likelihood term, with the same gamma; log is log p itself
    sft_per_sequence     its mean is that over the traces of each one's mean
    teacher_top_entropy  of each trace this share of tokens, the highest entropies, keeps its advantage; others count with 0
    tis_cap              own tokens times min(pi_old / pi_sampler, cap): truncated importance sampling; 0: off
    top1_bonus           own tokens' A grows by it times (1[token = y*] - pi(y*)), whose policy gradient is that of pi(y*)
    """
    mask, teacher, own = batch.loss_mask, batch.loss_mask & batch.is_teacher, batch.is_own
    n, n_teacher, n_own, n_traces = counts
    share = lambda x, where, count: (x * where).sum() / (count or 1)
    advantage = batch.advantage
    if teacher_top_entropy < 1:
        rank = batch.ranks(entropy.detach(), teacher)
        advantage = advantage.masked_fill(teacher & (rank >= teacher_top_entropy * batch.trace_lengths), 0.0)
    if top1_bonus:  # pi(y*) is a baseline: alone, as TGPO's tipo_adv adds it, it would have no expected effect
        bonus = (batch.input_ids[0] == batch.top1).float() - top1_logp.detach().exp()
        advantage = advantage + top1_bonus * bonus * (own & (batch.top1 >= 0))

    loss = -entropy_coef * share(entropy, mask, n)
    # Until the first optimizer step after a rollout the policy has not moved: its log-probs are the old ones.
    old_logp = logp.detach() if batch.old_logp is None else batch.old_logp
    if policy_coef:
        policy_term = token_loss(
            logp, old_logp, advantage, batch.is_teacher | batch.is_replay, shaping=shaping, gamma=gamma, clip_low=clip_low,
            clip_high=clip_high, behaviour_logp=batch.behaviour_logp, shape_own=shape_own, cispo=cispo,
        )  # fmt: skip
        if tis_cap:
            policy_term = policy_term * torch.where(own, (old_logp - batch.behaviour_logp).exp().clamp(max=tis_cap), 1.0)
        tokens, count = (mask & ~teacher, n - n_teacher) if by_likelihood else (mask, n)
        loss = loss + policy_coef * share(policy_term, tokens, loss_constant or count)
    if sft_coef:
        learnt = logp if sft_shaping == "log" else shape(logp.exp(), sft_shaping, gamma)
        if sft_per_sequence:
            loss = loss - sft_coef * share(learnt / batch.trace_lengths.clamp(min=1), teacher, n_traces)
        else:
            loss = loss - sft_coef * share(learnt, teacher, n_teacher)
    if kl_coef:  # k2: its gradient, (log p - log p_T) * grad log p, is that of KL(pi || pi_T) in expectation; k1's is zero
        loss = loss + kl_coef * share((logp - batch.teacher_logp).square() / 2, own, n_own)
    if ce_coef:
        loss = loss - ce_coef * share(top1_logp, own & (batch.top1 >= 0), n_own)  # -1: not a token of the policy's
    return loss
