"""
The two methods with memory. ReLIFT keeps the questions it failed, ExGRPO the answers it got right; both are bounded,
the same on every rank, and part of the checkpoint. What the released versions do otherwise is listed in README.
"""

import numpy as np
import torch


class FailedQuestions:
    """ReLIFT (arXiv 2506.07527): questions that a whole group failed wait for an SFT step on their traces. First in,
    first out, each at most once; one that is solved meanwhile leaves."""

    def __init__(self):
        self.queue = []

    def observe(self, groups):
        """groups: {question: its own samples, Rollouts}."""
        for question, rollouts in groups.items():
            failed = not any(r.reward for r in rollouts)
            if failed and question not in self.queue:
                self.queue.append(question)
            elif not failed and question in self.queue:
                self.queue.remove(question)

    def take(self, n):
        """The n that wait longest; none while there are fewer."""
        if len(self.queue) < n:
            return []
        taken, self.queue = self.queue[:n], self.queue[n:]
        return taken

    def state_dict(self):
        return {"queue": torch.tensor(self.queue, dtype=torch.int64)}

    def load_state_dict(self, state):
        self.queue = state["queue"].tolist()


class Successes:
    """ExGRPO (arXiv 2510.02245): right answers by question, in buckets by how often the question was solved last.

    Stored as token ids (int32) with the log-probs they were sampled with (float32), the newest `limit` of a question. A
    question solved by every fresh sample is retired for good. Nothing is stored before a batch was solved to the share
    `start`: until then a success says more about luck than about the policy.
    """

    def __init__(self, n_rollouts, start, limit):
        self.n_rollouts, self.start, self.limit = n_rollouts, start, limit
        self.active = False
        self.samples, self.bucket, self.retired = {}, {}, set()

    def observe(self, groups):
        """groups: {question: its own samples, Rollouts}. A replayed one is not among them: it was right by choice."""
        rewards = [r.reward for rollouts in groups.values() for r in rollouts]
        for question, rollouts in groups.items():
            solved = [r for r in rollouts if r.reward]
            if len(solved) == len(rollouts):
                self.retired.add(question)
                self.samples.pop(question, None)
                self.bucket.pop(question, None)
            elif solved and self.active and question not in self.retired:
                # Of n_rollouts, also where a replay left room for fewer fresh samples.
                k = round(len(solved) / len(rollouts) * self.n_rollouts)
                self.bucket[question] = min(self.n_rollouts - 1, max(1, k))
                kept = {ids.tobytes(): (ids, logps) for ids, logps in self.samples.get(question, [])}
                for r in solved:  # an answer that is known already stays where it is
                    ids = np.array(r.response_ids, np.int32)
                    kept.setdefault(ids.tobytes(), (ids, np.array(r.sampler_logps, np.float32)))
                self.samples[question] = list(kept.values())[-self.limit :]
        self.active = self.active or sum(rewards) / max(1, len(rewards)) > self.start

    def draw(self, n, rng):
        """At most n different questions: a bucket k by weight N(k; n_rollouts / 2, 1) over those that have any left, in
        units of solved samples as the released code has it (the paper writes accuracy), then one of its questions evenly."""
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
