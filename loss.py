"""
Advantages and losses: pure tensor functions, no configuration, no torch.distributed.

A group is the rollouts of one prompt, LUFFY's being seven own samples and one teacher trace, each with a
verifier's reward r in {0, 1}. Per token, with p = pi_theta(token) and rho = pi_theta / pi_old:

    advantage       A = r - mean of the group                          no division by the std
    own token       -A * rho                                           LUFFY; PPO's clip is a switch
    teacher token   -A * f(p),   f(p) = p / (p + gamma)                policy shaping, not detached
    loss            sum over tokens / loss_constant - entropy_coef * mean entropy + sft_coef * mean teacher NLL

A teacher token has no ratio to a behaviour policy: LUFFY takes pi_phi := 1. Its gradient is
-A * f'(p) * p * grad log p, so f decides how much an unlikely token weighs: p for the identity, but
gamma * p / (p + gamma)^2 when shaped, ten times as much where p << gamma = 0.1.

Source: LUFFY, arXiv 2504.14945, and its released code where the paper is silent. Shapes: B rollouts of a
batch, T tokens of a packed micro-batch; index t holds what belongs to token t given the tokens before it.
"""

import torch


def group_advantages(rewards, group, use_std=False, baseline=None):
    """A = r - mean_group(r), divided by (std_group + 1e-6) if use_std (GRPO; LUFFY and Dr.GRPO do not).

    rewards (B,) float; group (B,) int, any labels; baseline (B,) bool: the rows whose mean and unbiased std
    are used, by default the whole group. A zero std counts as 1. A group with one baseline row has mean 0
    and std 1, as in the released code: alone, its advantage is its reward. Returns (B,).
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
    """f(p), what a teacher token contributes; p any shape, in [0, 1]. gamma's role depends on `how`.

    With weight on grad log p:  none p: p | luffy p/(p+gamma): gamma p/(p+gamma)^2 | sqrt: p^.5 / 2
    | pow p^gamma: gamma p^gamma | log gamma*log p: gamma | p_log gamma*log p + p: gamma + p
    """
    if how == "none":
        return p
    if how == "luffy":
        return p / (p + gamma)
    p = p.clamp_min(torch.finfo(p.dtype).tiny)  # an underflowed p would have an infinite slope below
    if how == "sqrt":
        return p.sqrt()
    if how == "pow":
        return p**gamma
    if how == "log":
        return gamma * p.log()
    if how == "p_log":
        return gamma * p.log() + p
    raise ValueError(f"unknown shaping '{how}': choose none, luffy, sqrt, pow, log or p_log")


def token_loss(logp, old_logp, advantage, is_teacher, shaping="luffy", gamma=0.1, clip_low=0.0, clip_high=0.0):
    """The policy term per token, unreduced: (T,), differentiable in logp.

    logp, old_logp, advantage (T,) float; is_teacher (T,) bool. old_logp is not read at teacher tokens.
    PPO's clip on own tokens, each side standing alone, 0 being off: max(-A rho, -A clamp(rho, 1-low, 1+high)).
    """
    ratio = (logp - torch.where(is_teacher, logp.detach(), old_logp)).exp()
    own = -advantage * ratio
    if clip_low or clip_high:
        clipped = ratio.clamp(1 - clip_low if clip_low else None, 1 + clip_high if clip_high else None)
        own = torch.maximum(own, -advantage * clipped)
    teacher = -advantage * shape(logp.exp(), shaping, gamma)
    return torch.where(is_teacher, teacher, own)


def batch_loss(logp, entropy, batch, n_tokens, n_teacher_tokens, shaping="luffy", gamma=0.1, clip_low=0.0,
               clip_high=0.0, loss_constant=0.0, entropy_coef=0.0, sft_coef=0.0):  # fmt: skip
    """One micro-batch's share of the optimizer step's loss: a scalar, to be summed over micro-batches and ranks.

    logp, entropy (T,) from the policy; batch: a data.Packed. n_tokens and n_teacher_tokens count the response
    tokens, and the teacher's among them, of the WHOLE optimizer batch over all ranks, so the cut into
    micro-batches cannot matter. loss_constant 0 means the token mean (n_tokens). With sft_coef > 0 teacher
    tokens leave the policy term and are learnt by likelihood instead.
    """
    mask, teacher = batch.loss_mask, batch.loss_mask & batch.is_teacher
    # The policy has not moved before the first step after a rollout: its own log-probs are the old ones.
    old_logp = logp.detach() if batch.old_logp is None else batch.old_logp
    policy = token_loss(logp, old_logp, batch.advantage, batch.is_teacher, shaping, gamma, clip_low, clip_high)
    policy_mask = mask & ~teacher if sft_coef else mask
    loss = (policy * policy_mask).sum() / (loss_constant or n_tokens)
    loss = loss - entropy_coef * (entropy * mask).sum() / n_tokens
    return loss - sft_coef * (logp * teacher).sum() / max(n_teacher_tokens, 1)
