"""
From rows to packed tokens: the three dataclasses that cross files, problems and teacher traces as token ids,
the order of the problems and the cut into micro-batches.

Token in, token out: a prompt and a teacher trace are tokenised once, here; a response is never decoded and
tokenised again. Text exists only for the verifier and for people.
"""

import hashlib
import math
import os
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import compress, repeat

import numpy as np
import torch

from configurator import ROOT, UserError, first_line, printable
from runtime.rows import files_in_words, read_rows
from runtime.tokenizer import gives_back, render_prompt

THINK = "<think>\n"
# What a reader does not see: white space, and Unicode's control and format characters, such as a zero-width space.
BLANK = r"[\s\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
OPENINGS = re.compile(rf"{BLANK}*(?:<think>{BLANK}*)*")  # of a trace, as people write it
EMPTY = re.compile(rf"(?:{BLANK}|</?think>)*+")  # a text that says nothing


@dataclass
class Problem:
    id: int  # the row in its file
    prompt_ids: list  # rendered by the chat template, up to and including the generation prompt
    answer: str  # the ground truth
    teacher: list  # token-id lists, each ending in EOS; may be empty
    source: str  # the benchmark's name
    key: int = 0  # a digest of source, question and answer: the same in every file and order
    teacher_logps: list = field(default_factory=list)  # for each of `teacher` a list of its tokens' log-probs; [] if unknown

    def __post_init__(self):
        self.teacher_logps = self.teacher_logps or [[] for _ in self.teacher]


@dataclass
class Rollout:
    """One row of a group, from its creation to its line in rollouts/step_N.jsonl."""

    problem: int  # Problem.id
    prompt_ids: list  # the problem's
    response_ids: list
    source: str = "own"  # who wrote it: "own", "teacher" (the model may have written the end), "replay" (an earlier own sample)
    n_teacher_tokens: int = 0  # response tokens that the teacher wrote; the model wrote the rest
    sampler_logps: list = field(default_factory=list)  # one per token the model wrote, as the sampler saw it
    finish_reason: str = "stop"  # "stop" (it ended by itself) or "length" (it was cut off)
    reward: float = 0.0
    reason: str = ""  # the verifier's
    advantage: float = 0.0
    teacher_logps: list = field(default_factory=list)  # one per token that the teacher wrote, as it saw it; [] if unknown

    @property
    def solved(self):
        """Is it right? The verifier says so (Verifier's solved_at); a reward above zero may be for format alone."""
        return self.reason == "correct"


@dataclass
class Packed:
    """One micro-batch: concatenated sequences, T tokens in total. Index t holds what belongs to token t given the
    tokens before it. A sequence's first token has none before it and is masked. Inputs only: functions return
    what they compute from it."""

    rows: list  # which rollouts these are: indices into the list that spread() cut
    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T), restarting at 0 with each sequence
    cu_seqlens: torch.Tensor  # (n + 1,) int32: sequence i is tokens cu_seqlens[i] to cu_seqlens[i+1]
    loss_mask: torch.Tensor  # (T,) bool: response tokens
    is_teacher: torch.Tensor  # (T,) bool: response tokens that a teacher wrote
    is_replay: torch.Tensor  # (T,) bool: response tokens that an earlier policy wrote
    advantage: torch.Tensor  # (T,)
    behaviour_logp: torch.Tensor  # (T,) log-prob under the policy that sampled the token, now or earlier; 0 for an unknown one
    old_logp: torch.Tensor | None = None  # (T,) log-probs before the update; None while the policy has not moved
    teacher_logp: torch.Tensor | None = None  # (T,) log-probs of the teacher model, if there is one
    top1: torch.Tensor | None = None  # (T,) int: the teacher model's most likely token in each place; -1 for none
    packing: dict = field(default_factory=dict)  # where the tokens lie, see packing_of()
    counts: tuple = ()  # how many response tokens it has: all, a teacher's, this step's policy's own; and how many traces

    def to(self, device):
        move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x
        moved = {k: move(v) for k, v in vars(self).items()}
        return Packed(**{**moved, "packing": {k: move(v) for k, v in self.packing.items()}})

    @property
    def is_own(self):
        """(T,) bool: response tokens that the policy of this step wrote."""
        return self.loss_mask & ~self.is_teacher & ~self.is_replay

    @property
    def trace_lengths(self):
        """(T,) int: for each token, how many tokens of its sequence a teacher wrote."""
        ends, before = self.cu_seqlens.long(), torch.nn.functional.pad((self.loss_mask & self.is_teacher).cumsum(0), (1, 0))
        return (before[ends[1:]] - before[ends[:-1]]).repeat_interleave(ends.diff(), output_size=len(self.loss_mask))

    def ranks(self, values, where):
        """(T,) int: for each token of `where` (T,) bool, how many others of its sequence have a higher value (or the same, and
        come first). It looks at nothing outside the sequence. values (T,); ranks elsewhere mean nothing."""
        lengths = self.cu_seqlens.diff().long()
        start = self.cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=len(where))
        falling = values.masked_fill(~where, -torch.inf).argsort(descending=True, stable=True)
        order = falling[start[falling].argsort(stable=True)]  # sequence by sequence, the highest value first
        return torch.empty_like(order).scatter(0, order, torch.arange(len(where), device=order.device) - start)


# ---------------------------------------------------------------- templates


def load_templates():
    """config/templates.toml: {"system": text, "chat": {name: Jinja}, "eval": {name: {"user" or "prompt": text}}}."""
    with open(os.path.join(ROOT, "config", "templates.toml"), "rb") as f:
        return tomllib.load(f)


# ---------------------------------------------------------------- problems


class Unusable(Exception):
    """Why a row or a trace is dropped, in words that are counted."""


def load_problems(path, tokenizer, max_prompt_tokens=1024, max_teacher_tokens=8192, require_think=True, log=print,
                  render=None, content=None, evaluated=False):  # fmt: skip
    """Read the rows of a file or dataset (runtime/rows.py). Returns a list of Problem. render(messages, answer, source)
    returns the text before the response, and the answer to grade against; by default the chat template's text, and
    the answer unchanged. content: a hash object that is fed the rows.

    Prompts and traces over their limits (in tokens, EOS included) are dropped, and so are rows without an answer or whose
    prompt does not end in a question of the user's, prompts whose messages hold a control token such as <|im_end|>, traces
    that plain_trace() refuses, and texts that the tokenizer cannot give back; `log` gets one line that counts them by kind.
    With `evaluated` a prompt is kept, and counted, whatever the tokenizer makes of it, so that a benchmark has as many
    problems for one as for another.

    Raises UserError if the file is missing, damaged or of another schema, if no row is usable, or if require_think is set
    and the rendered prompt does not end in "<think>\n".
    """
    problems, dropped, kept = [], Counter(), Counter()
    for index, row in read_rows(path, content):
        answer = (row["reward_model"]["ground_truth"] or "").strip()
        messages = row["prompt"]
        last = messages[-1] if messages else {"role": "user", "content": ""}
        if EMPTY.fullmatch(answer) or last["role"] != "user" or EMPTY.fullmatch(last["content"]):
            dropped["rows without prompt or answer"] += 1
            continue
        if found := [c[0] for m in messages if (c := tokenizer.control.search(m["content"]))]:
            (kept if evaluated else dropped)[f"prompts with a control token such as {found[0]}"] += 1
            if not evaluated:
                continue
        source, raw_answer = row["data_source"] or "unknown", answer
        try:
            text, answer = render(messages, answer, source) if render else (render_prompt(tokenizer, messages), answer)
        except Exception as e:
            raise UserError(f"{path} row {index}: the model's chat template fails on it: {first_line(e)}") from None
        thinks = text.endswith(THINK)
        if require_think and not thinks:
            raise UserError(
                f"{path}: the rendered prompt ends in {text[-20:]!r}, not in {THINK!r}: append {{{{ {THINK!r} }}}} to the "
                "generation prompt in the model's chat template (its last line break is lost), or set require_think=False"
            )
        prompt_ids = tokenizer.encode(text, add_special_tokens=False)
        if not gives_back(tokenizer, prompt_ids, text):
            (kept if evaluated else dropped)["prompts changed by the tokenizer"] += 1
            if not evaluated:
                continue
        if len(prompt_ids) > max_prompt_tokens:
            dropped[f"prompts over {max_prompt_tokens} tokens"] += 1
            continue
        teacher, teacher_logps = [], []
        for trace, logps in zip([m["content"] for m in row["target"]], row.get("target_logps", repeat([])), strict=False):
            try:
                trace = plain_trace(trace, tokenizer.control, opened=thinks)
                ids = tokenizer.encode(trace, add_special_tokens=False)
                if len(ids) >= max_teacher_tokens:
                    raise Unusable(f"over {max_teacher_tokens} tokens")
                if not gives_back(tokenizer, ids, trace):
                    raise Unusable("changed by the tokenizer")
                if logps and not (len(logps) == len(ids) + 1 and all(-math.inf < x <= 0.001 for x in logps)):
                    raise Unusable("whose log-probs do not fit their tokens")
                teacher.append([*ids, tokenizer.eos_token_id])
                teacher_logps.append(logps or [])
            except Unusable as e:
                dropped[f"traces {e}"] += 1
        key = digest(source, messages[-1]["content"], raw_answer)
        problems.append(Problem(index, prompt_ids, answer, teacher, printable(source), key, teacher_logps))
    in_words = lambda counts: ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "none"
    if not problems:
        raise UserError(f"{path} has no usable row (dropped: {in_words(dropped)}): check its columns and the length limits")
    traced, note = sum(bool(p.teacher) for p in problems), f"; kept: {in_words(kept)}" if kept else ""
    found = f"{len(problems)} problems, {traced} with a teacher trace"
    if known := sum(any(p.teacher_logps) for p in problems):
        found += f", {known} with its log-probs"
    log(f"{path}{files_in_words(path)}: {found}; dropped: {in_words(dropped)}{note}")
    return problems


def plain_trace(trace, control, opened):
    """A trace as it is learnt: without the control tokens at its end, because EOS is added to its ids, and, if the prompt has
    opened the thought, without its own opening. People write that as "<think>\n", with other white space, twice, or not at
    all; exactly "<think>\n" is cut off, so that what follows stays as it is, or else all white space around it goes, too.

    Raises Unusable for an empty trace, for one with a control token inside, because what follows EOS would be learnt, and for
    one that opens a second thought.
    """
    # One pass over all runs: a search for the run at the end would try each one to its end.
    runs = list(re.finditer(rf"(?:(?:{control.pattern}){BLANK}*+)++", trace))
    if runs and runs[-1].end() == len(trace):
        trace = trace[: runs[-1].start()]
    if opened:
        as_released = re.match(rf"<think>\n(?!{BLANK}*<think>)", trace)
        trace = trace[(as_released or OPENINGS.match(trace)).end() :]
    if EMPTY.fullmatch(trace):
        raise Unusable("without text")
    if control.search(trace):
        raise Unusable("with a control token inside")
    if opened and "<think>" in trace:
        raise Unusable("with a second <think>")
    return trace


def load_benchmark(path, tokenizer, max_problems, max_prompt_tokens, require_think, log=print, render=None,
                   content=None):  # fmt: skip
    """load_problems, without repeats of a question and answer, then at most max_problems per source (0: all)."""
    first = {}
    limits = dict(max_prompt_tokens=max_prompt_tokens, require_think=require_think)
    for p in load_problems(path, tokenizer, **limits, log=log, render=render, content=content, evaluated=True):
        first.setdefault(p.key, p)
    counts, kept = {}, []
    for p in first.values():
        counts[p.source] = counts.get(p.source, 0) + 1
        if not max_problems or counts[p.source] <= max_problems:
            kept.append(p)
    log(f"{path}: {len(kept)} distinct problems to evaluate, of {', '.join(sorted(counts))}")
    return kept


def digest(*key):
    """Hash values to a number below 2**63, by their repr; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def set_aside(problems, n):
    """Take n questions out of the training problems, with all rows that repeat them. Returns (problems left, held
    out). The choice depends only on the questions, not on their order, the seed or the chat template."""
    if not n:
        return problems, []
    by_prompt = {}
    for p in sorted(problems, key=lambda p: p.key):
        by_prompt.setdefault(tuple(p.prompt_ids), replace(p, source="holdout", teacher=[], teacher_logps=[]))
    chosen = dict(list(by_prompt.items())[:n])  # keys are digests, so their order is as good as random
    left = [p for p in problems if tuple(p.prompt_ids) not in chosen]
    if not left:
        raise UserError(f"holdout={n} leaves nothing to train on: the file has {len(by_prompt)} questions; lower it")
    return left, list(chosen.values())


class Order:
    """An endless shuffled order over n problems. Epoch e is a permutation drawn only from (seed, e), so (epoch,
    cursor) is the whole state. The rest of an epoch that does not fill a batch is skipped."""

    def __init__(self, n, seed, epoch=0, cursor=0):
        self.n, self.seed, self.epoch, self.cursor = n, seed, epoch, cursor

    def take(self, k):
        """The next k indices, all different."""
        assert k <= self.n
        if self.cursor + k > self.n:
            self.epoch, self.cursor = self.epoch + 1, 0
        permutation = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        self.cursor += k
        return permutation[self.cursor - k : self.cursor].tolist()

    def state(self):
        return {"epoch": self.epoch, "cursor": self.cursor}


# ---------------------------------------------------------------- packing


def partition(lengths, n_bins):
    """Spread sequences over bins: longest first, each into the emptiest bin. Returns n_bins lists of indices."""
    bins, totals = [[] for _ in range(n_bins)], [0] * n_bins
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        b = totals.index(min(totals))
        bins[b].append(i)
        totals[b] += lengths[i]
    return [sorted(b) for b in bins]


def bins_needed(lengths, budget):
    """The fewest bins for which partition() keeps every bin within `budget` tokens."""
    n = max(1, -(-sum(lengths) // budget))
    while any(sum(lengths[i] for i in b) > budget for b in partition(lengths, n)):
        if n >= len(lengths):
            raise UserError(f"a sequence of {max(lengths)} tokens exceeds micro_tokens={budget}: raise it")
        n += 1
    return n


def in_order(rollouts, problems):
    """Rollouts sorted by their problem's place in the batch, each group in its own order."""
    place = {p.id: i for i, p in enumerate(problems)}
    return sorted(rollouts, key=lambda r: place[r.problem])


def cut_into_updates(rollouts, problems, n):
    """Divide rollouts over n optimizer steps, by consecutive problems of the batch. Returns a list per step; steps
    without rollouts are left out."""
    update_of = {p.id: i * n // len(problems) for i, p in enumerate(problems)}
    parts = [[r for r in rollouts if update_of[r.problem] == u] for u in range(n)]
    return [part for part in parts if part]


def pays_to_share(n_saved, n):
    """Is it worth computing equal prompts once, if that saves n_saved of n tokens? On a CPU always; on a GPU, where picking
    keys and values costs time, too, from a tenth on."""
    return n_saved > (0.1 * n if torch.cuda.is_available() else 0)


def pack(rollouts, rows=None, train_teacher=True):
    """Rollouts -> one Packed. rows: their indices in a larger list, stored in it. Without train_teacher a teacher's tokens are
    only read, like the prompt. An empty list gives a dummy of two tokens that contribute nothing to the loss."""
    dummy = not rollouts
    if dummy:
        rollouts = [Rollout(-1, [0], [0], "teacher", n_teacher_tokens=1)]
    ids, positions, mask, teacher, replay, advantage, behaviour = [], [], [], [], [], [], []
    cu, stands_for, prompts = [0], [], {}
    for r in rollouts:
        n, m, k = len(r.prompt_ids), len(r.response_ids), r.n_teacher_tokens
        first = prompts.setdefault(tuple(r.prompt_ids), len(ids))
        stands_for += [*range(first, first + n), *range(len(ids) + n, len(ids) + n + m)]
        ids += [*r.prompt_ids, *r.response_ids]
        positions += range(n + m)
        mask += [False] * n + [train_teacher and not dummy] * k + [not dummy] * (m - k)
        teacher += [False] * n + [True] * k + [False] * (m - k)
        replay += [False] * n + [r.source == "replay"] * m
        advantage += [0.0] * n + [r.advantage] * m
        behaviour += [*[0.0] * n, *(r.teacher_logps or [0.0] * k), *r.sampler_logps]
        cu.append(len(ids))
    tensor = lambda values, dtype: torch.from_numpy(np.array(values, dtype))  # torch.tensor is slow on lists
    batch = Packed(
        rows=[] if dummy else list(range(len(rollouts)) if rows is None else rows),
        input_ids=tensor([ids], np.int64),
        position_ids=tensor([positions], np.int64),
        cu_seqlens=tensor(cu, np.int32),
        loss_mask=tensor(mask, bool),
        is_teacher=tensor(teacher, bool),
        is_replay=tensor(replay, bool),
        advantage=tensor(advantage, np.float32),
        behaviour_logp=tensor(behaviour, np.float32),
    )
    share = pays_to_share(len(ids) - len(set(stands_for)), len(ids))
    batch.packing = packing_of(batch.cu_seqlens, batch.loss_mask, tensor(stands_for, np.int64) if share else None)
    traces = batch.trace_lengths[batch.cu_seqlens[1:].long() - 1] > 0
    masks = batch.loss_mask, batch.loss_mask & batch.is_teacher, batch.is_own, traces
    batch.counts = tuple(mask.sum().item() for mask in masks)
    return batch


def packing_of(cu_seqlens, loss_mask, stands_for=None):
    """What attention and head must know of n packed sequences of T tokens, a dict. All that depends on the data is found here,
    on the CPU, so that a GPU never waits for it. stands_for (T,): for each token the index of the one that is computed in its
    place: itself, or the same token of an equal prompt before it. With None all are computed. C is how many are.

    response (R,)        the response tokens
    before (R,)          for each, the computed token that predicts it: the one before it
    computed (C,)        the computed tokens; None if all are
    where (T,)           for each token, which of the computed ones stands for it; None if all are computed
    slots (n, L)         the sequences as rows, padded on the right: the computed token in each slot
    tokens (C,)          the slot of each computed token
    cu_seqlens (n + 1,)  where each sequence begins and ends, all its tokens counted (keys and values)
    cu_queries (n + 1,)  the same, only computed tokens counted
    longest, longest_query   the most tokens of a sequence, and the most computed ones
    copied (P,)          the computed tokens that stand for several
    copies (P, m)        for each of them the tokens that it stands for, filled up with -1
    """
    start, lengths = cu_seqlens[:-1, None].long(), cu_seqlens.diff()[:, None].long()
    longest = int(lengths.max())
    column = torch.arange(longest)
    inside = column < lengths  # (n, L)
    slots = start + torch.where(inside, column, 0)  # a padding slot repeats its row's first token, and is dropped
    tokens, response = inside.flatten().nonzero()[:, 0], loss_mask.nonzero()[:, 0]
    found = {"response": response, "before": response - 1, "computed": None, "where": None, "slots": slots, "tokens": tokens,
             "cu_seqlens": cu_seqlens, "longest": longest, "cu_queries": cu_seqlens, "longest_query": longest}  # fmt: skip
    if stands_for is None:
        return found
    is_first = stands_for == torch.arange(len(stands_for))
    computed, where = is_first.nonzero()[:, 0], (is_first.cumsum(0) - 1)[stands_for]
    cu_queries = torch.nn.functional.pad(is_first.cumsum(0), (1, 0))[cu_seqlens.long()].int()
    n_copies = where.bincount()
    copied = (n_copies > 1).nonzero()[:, 0]
    if len(copied) == 1:
        copied = copied.repeat(2)  # for the compiler one row is another graph than several; twice the same does no harm
    order = where.argsort(stable=True)  # the tokens of each computed one, one after the other
    ends, column = n_copies.cumsum(0)[copied, None], torch.arange(int(n_copies.max()))
    place = ends - n_copies[copied, None] + column
    copies = torch.where(place < ends, order[place.clamp_max(len(order) - 1)], -1)
    return found | {"before": where[response - 1], "computed": computed, "where": where, "slots": where[slots],
                    "tokens": tokens[computed], "cu_queries": cu_queries, "longest_query": int(cu_queries.diff().max()),
                    "copied": copied, "copies": copies}  # fmt: skip


def unpack(micro_batches, values):
    """The inverse of pack, for a (T,) tensor per micro-batch: [(row, list of its response tokens' values), ...]."""
    found = []
    for batch, per_token in zip(micro_batches, values, strict=True):
        ends, per_token, mask = batch.cu_seqlens.tolist(), per_token.tolist(), batch.loss_mask.tolist()
        for row, start, end in zip(batch.rows, ends, ends[1:], strict=False):
            found.append((row, list(compress(per_token[start:end], mask[start:end]))))
    return found


def spread(rollouts, budget, rank, world, train_teacher=True):
    """Divide rollouts over the ranks by tokens, then each rank's share into micro-batches of at most `budget` tokens,
    the same number on every rank. All ranks pass the same list. Returns this rank's micro-batches, a list of Packed."""
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
    shares = partition(lengths, world)
    n_micro = max(bins_needed([lengths[i] for i in share], budget) for share in shares)
    cuts = [[shares[rank][i] for i in cut] for cut in partition([lengths[i] for i in shares[rank]], n_micro)]
    return [pack([rollouts[i] for i in cut], cut, train_teacher) for cut in cuts]
