"""
What the two samplers share: the sample they return, and the checks of a request.
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
    """Raise StaleWeights unless the sampler holds the weights with the wanted stamp."""
    if held != wanted:
        raise StaleWeights(f"the sampler holds the weights stamped {held!r}, not {wanted!r}: load() them first")


def check_requests(prompts, max_model_len, vocab_size):
    """Raise ValueError for the first prompt that would break an engine, which must not be used
    after an error."""
    for i, p in enumerate(prompts):
        found = None
        if not 0 < len(p) < max_model_len:
            found, limits = f"a prompt of {len(p)} tokens", f"1 to {max_model_len - 1}"
        elif not 0 <= min(p) <= max(p) < vocab_size:
            found, limits = f"the token {max(p, key=abs)}", f"0 to {vocab_size - 1}"
        if found:
            raise ValueError(f"request {i} has {found}, the engine takes {limits}")


def per_prompt(limit, prompts):
    """max_tokens as a list with one number per prompt, whether one number or a list was given."""
    return list(limit) if isinstance(limit, list) else [limit] * len(prompts)
