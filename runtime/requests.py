"""
What the two samplers share: the sample they return, the error for stale weights, and the checks of a request.
"""

from typing import NamedTuple

MAX_ROWS = 256  # sequences that a sampler works on at a time


class Sample(NamedTuple):
    ids: list  # token ids of the response, with the stop token if there was one
    logps: list  # log-prob of each token under softmax(logits / temperature)
    finish_reason: str  # "stop": it ended with a stop token; "length": it was cut off


class StaleWeights(RuntimeError):
    """The sampler holds other weights than those the caller wants to sample from."""


def check_stamp(held, wanted):
    """Raise StaleWeights unless the stamp of the weights that the sampler holds is the wanted one."""
    if held != wanted:
        raise StaleWeights(f"the sampler holds the weights stamped {held!r}, not {wanted!r}: load() them first")


def check_requests(prompts, max_model_len, vocab_size):
    """Raise ValueError for the first prompt that would break an engine, which must not be used after an error."""
    for i, p in enumerate(prompts):
        if not 0 < len(p) < max_model_len:
            raise ValueError(f"request {i} has a prompt of {len(p)} tokens, the engine takes 1 to {max_model_len - 1}")
        if not 0 <= min(p) <= max(p) < vocab_size:
            token = max(p, key=abs)
            raise ValueError(f"request {i} has the token {token}, the engine takes 0 to {vocab_size - 1}")


def per_prompt(limit, prompts):
    """max_tokens as a list with one number per prompt, whether one number or a list was given."""
    return list(limit) if isinstance(limit, list) else [limit] * len(prompts)
