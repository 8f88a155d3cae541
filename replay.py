"""
What a method remembers across steps: one small object each, with the same methods.

    batch, replays = memory.next_batch(order, n, rng, mean_entropies)
                                     the step's n problems; and of those that replay a stored success, {id: Rollout}.
                                     rng is the step's own, made from (seed, step). It must not change state_dict(): a
                                     signal may still drop the step, and the memory is saved as it is then
    memory.observe(rollouts)         look at the step's rollouts, graded: all ranks', before any are left out of the update
    traces = memory.sft_due()        traces, as Rollouts, for an SFT step that is due now; [] if none is due
    memory.metrics()                 its size, to log
    memory.state_dict()              {name: tensor} for the checkpoint, the same on every rank; {} without a memory
    memory.load_state_dict(state)

Fresh remembers nothing and serves all other methods. docs/methods.md lists what the released ReLIFT and ExGRPO do differently.
"""

import numpy as np
import torch

from configurator import UserError
from data import Rollout


def open_memory(k, problems):
    """The memory that train.py's knobs k ask for. problems: those to train on. Raises UserError if they ask for two."""
    memories = []
    if k.sft_buffer:
        memories.append(FailedQuestions(problems, k.sft_buffer))
    if k.replay_share:
        memories.append(Successes(problems, k.n_rollouts, k.replay_share, k.replay_start, k.replay_limit))
    if len(memories) > 1:
        names = " and ".join(type(memory).__name__ for memory in memories)
        raise UserError(f"the knobs ask for {names}, two methods with memory (replay.py): switch one of them off")
    return memories[0] if memories else Fresh(problems)


def fresh_problems(problems, order, n, skip=()):
    """The next n problems in the data's order, all different; ids in `skip` are left out."""
    batch = []
    while len(batch) < n:
        drawn = [problems[i] for i in order.take(n - len(batch))]
        batch += [p for p in drawn if p.id not in skip and p not in batch]
    return batch


def own_samples(rollouts):
    """{problem id: this step's own samples of it}, without replayed samples, which were chosen because they are right."""
    groups = {}
    for r in rollouts:
        if r.source == "own":
            groups.setdefault(r.problem, []).append(r)
    return groups


class Fresh:
    """No memory: a batch is the next n problems in the data's order."""

    def __init__(self, problems):
        self.problems = problems

    def next_batch(self, order, n, rng, mean_entropies):
        return fresh_problems(self.problems, order, n), {}

    def observe(self, rollouts):
        pass

    def sft_due(self):
        return []

    def metrics(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class FailedQuestions:
    """ReLIFT (arXiv 2506.07527): a question that no own sample solved waits for an SFT step on its trace. The step is
    due when `size` questions wait. FIFO without duplicates; a question leaves once it is solved."""

    def __init__(self, problems, size):
        self.problems, self.size, self.queue = problems, size, []
        self.traced = {p.id: p for p in problems if p.teacher}

    def next_batch(self, order, n, rng, mean_entropies):
        return fresh_problems(self.problems, order, n), {}

    def observe(self, rollouts):
        for question, samples in own_samples(rollouts).items():
            failed = not any(r.solved for r in samples)
            if failed and question in self.traced and question not in self.queue:
                self.queue.append(question)
            elif not failed and question in self.queue:
                self.queue.remove(question)

    def sft_due(self):
        if len(self.queue) < self.size:
            return []
        due, self.queue = [self.traced[q] for q in self.queue[: self.size]], self.queue[self.size :]
        return [Rollout(p.id, p.prompt_ids, p.teacher[0], "teacher", len(p.teacher[0])) for p in due]

    def metrics(self):
        return {"relift/waiting": len(self.queue)}

    def state_dict(self):
        return {"queue": torch.tensor(self.queue, dtype=torch.int64)}

    def load_state_dict(self, state):
        self.queue = [q for q in state["queue"].tolist() if q in self.traced]  # by force its trace may be gone


class Successes:
    """ExGRPO (arXiv 2510.02245): right answers by question. A question is in the bucket k if k samples solved it last time.

    In each batch, at most the share `share` of the questions replay a stored answer: the one over which the policy's
    mean entropy is lowest now. Answers are token ids (int32) with the log-probs they were sampled with (float32); the
    newest `limit` per question are kept. A question that every fresh sample solves is retired: it is never replayed
    again, and sampled again only when too few others are left. Storing starts after the first batch in which more than
    the share `start` of the samples is right: before that a success is mostly luck.
    """

    def __init__(self, problems, n_rollouts, share, start, limit):
        self.problems, self.n_rollouts, self.share, self.start, self.limit = problems, n_rollouts, share, start, limit
        self.by_id = {p.id: p for p in problems}
        self.active = False
        self.samples, self.bucket, self.retired = {}, {}, set()

    def next_batch(self, order, n, rng, mean_entropies):
        drawn = self.draw(int(n * self.share), rng)
        skip = self.retired | set(drawn)
        if len(self.problems) - len(skip) < n - len(drawn):
            skip = set(drawn)  # too few are left: sample retired questions again
        batch = fresh_problems(self.problems, order, n - len(drawn), skip)
        if not drawn:
            return batch, {}
        stored = [Rollout(q, self.by_id[q].prompt_ids, ids.tolist(), source="replay", sampler_logps=logps.tolist())
                  for q in drawn for ids, logps in self.samples[q]]  # fmt: skip
        replays = {}
        for _, i in sorted(zip(mean_entropies(stored), range(len(stored)), strict=True)):
            replays.setdefault(stored[i].problem, stored[i])
        batch += [self.by_id[q] for q in drawn]
        return [batch[i] for i in rng.permutation(n)], replays

    def observe(self, rollouts):
        groups = own_samples(rollouts)
        right = [r.solved for samples in groups.values() for r in samples]
        for question, samples in groups.items():
            solved = [r for r in samples if r.solved]
            if len(solved) == len(samples):
                self.retired.add(question)
                self.samples.pop(question, None)
                self.bucket.pop(question, None)
            elif solved and self.active and question not in self.retired:
                # Scaled to n_rollouts: beside a replay there are fewer fresh samples.
                k = round(len(solved) / len(samples) * self.n_rollouts)
                self.bucket[question] = min(self.n_rollouts - 1, max(1, k))
                kept = {ids.tobytes(): (ids, logps) for ids, logps in self.samples.get(question, [])}
                for r in solved:  # an answer that is stored already keeps its place
                    ids = np.array(r.response_ids, np.int32)
                    kept.setdefault(ids.tobytes(), (ids, np.array(r.sampler_logps, np.float32)))
                self.samples[question] = list(kept.values())[-self.limit :]
        self.active = self.active or sum(right) / max(1, len(right)) > self.start

    def sft_due(self):
        return []

    def metrics(self):
        return {"replay/questions": len(self.samples), "replay/retired": len(self.retired)}

    def draw(self, n, rng):
        """Draw at most n different questions: first a bucket k, with weight N(k; n_rollouts / 2, 1), among those that have
        questions left; then one of its questions, uniformly. k counts solved samples, as in the released code; the paper
        writes accuracy."""
        buckets = {}
        for question in sorted(self.samples):
            buckets.setdefault(self.bucket[question], []).append(question)
        drawn = []
        while len(drawn) < n and buckets:
            keys = sorted(buckets)
            weights = np.exp([-((k - self.n_rollouts / 2) ** 2) / 2 for k in keys])
            k = keys[rng.choice(len(keys), p=weights / weights.sum())]
            drawn.append(buckets[k].pop(rng.integers(len(buckets[k]))))
            if not buckets[k]:
                del buckets[k]
        return drawn

    def state_dict(self):
        rows = [(question, ids, logps) for question, kept in self.samples.items() for ids, logps in kept]
        flat = lambda parts, dtype: torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]))
        return {
            "active": torch.tensor(self.active),
            "retired": torch.tensor(sorted(self.retired), dtype=torch.int64),
            "bucket": torch.tensor([[q, k] for q, k in self.bucket.items()], dtype=torch.int64).reshape(-1, 2),
            "question": torch.tensor([q for q, *_ in rows], dtype=torch.int64),
            "length": torch.tensor([len(ids) for _, ids, _ in rows], dtype=torch.int64),
            "ids": flat([ids for _, ids, _ in rows], np.int32),
            "logps": flat([logps for *_, logps in rows], np.float32),
        }

    def load_state_dict(self, state):
        self.active = bool(state["active"])
        self.retired, self.bucket, self.samples = set(state["retired"].tolist()), dict(state["bucket"].tolist()), {}
        parts = zip(*(state[key].split(state["length"].tolist()) for key in ("ids", "logps")), strict=True)
        for question, (ids, logps) in zip(state["question"].tolist(), parts, strict=True):
            self.samples.setdefault(question, []).append((ids.numpy(), logps.numpy()))
