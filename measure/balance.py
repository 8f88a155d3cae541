"""
How evenly spread() divides the work of an update: it balances tokens, while attention costs the square of a length. For random
lengths, the time that the slowest rank of each micro-batch needs, over the mean: under FSDP all wait for it.

    python measure/balance.py
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from data import bins_needed, partition

WORLD, MICRO_TOKENS, LONGEST = 8, 32768, 9216  # config/luffy_7b.py
SQUARE = 28 * 3584 / 6.5e9  # of Qwen2.5-7B: attention's FLOPs per token and token of its length, over all others per token


def slowest(lengths, by_cost):
    """Shares by tokens, as in data.spread, or by cost; micro-batches by tokens."""
    cost = [n + SQUARE * n * n for n in lengths]
    shares = partition(cost if by_cost else lengths, WORLD)
    n_micro = max(bins_needed([lengths[i] for i in share], MICRO_TOKENS) for share in shares)
    cuts = [partition([lengths[i] for i in share], n_micro) for share in shares]
    costs = np.array([[sum(cost[share[i]] for i in cut) for cut in cuts] for share, cuts in zip(shares, cuts, strict=True)])
    return costs.max(0).sum() / costs.sum() * WORLD


for n_sequences in (512, 64):
    for median, sigma in ((1000, 0.8), (2500, 0.7)):
        found = []
        for seed in range(20):
            lengths = np.random.default_rng(seed).lognormal(np.log(median), sigma, n_sequences).clip(50, LONGEST).astype(int)
            found.append([slowest(lengths.tolist(), by_cost) for by_cost in (False, True)])
        by_tokens, by_cost = np.mean(found, 0)
        print(f"{n_sequences} sequences, median {median} tokens: by tokens {by_tokens:.4f}, by cost {by_cost:.4f}")
