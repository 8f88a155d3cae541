"""
The policy: a Hugging Face causal LM that takes packed sequences and returns, per token, the log-probability
the policy gives it and the entropy of its choice. Logits for the whole micro-batch never exist at once.
"""

import contextlib
import os

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from configurator import UserError, repo_path
from data import first_line

CHUNK = 4096  # tokens whose logits exist together; 4096 x 152,064 in fp32 is 2.3 GiB


def packed_attention(module, query, key, value, attention_mask, scaling=None, packing=None, **kwargs):
    """Causal attention within each packed sequence. query (1, H, T, D), key and value (1, H_kv, T, D).

    The sequences are laid out as rows of a right-padded batch: under a causal mask no token sees the padding
    that follows it, so no mask is needed and no T x T matrix exists. packing = (slots, tokens) from
    `padded_layout`. Returns ((1, T, H, D), None) as transformers expects.
    """
    slots, tokens = packing
    rows = lambda x: x[0].transpose(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        rows(query), rows(key), rows(value), is_causal=True, scale=scaling, enable_gqa=query.size(1) != key.size(1)
    )  # (n, H, L, D)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, tokens)[None], None


AttentionInterface.register("packed", packed_attention)
disable_progress_bar()  # loading and saving take a moment; their bars would break up the log


def padded_layout(cu_seqlens):
    """(n+1,) offsets -> slots (n, L): the token in each padded slot; tokens (T,): the slot of each token."""
    start, lengths = cu_seqlens[:-1, None].long(), cu_seqlens.diff()[:, None].long()
    column = torch.arange(int(lengths.max()), device=cu_seqlens.device)
    inside = column < lengths  # (n, L)
    slots = start + torch.where(inside, column, 0)  # a padding slot repeats its row's first token, and is dropped
    return slots, inside.flatten().nonzero()[:, 0]


class Policy(torch.nn.Module):
    """forward(Packed) -> logp, entropy: (T,) fp32 each, zero where loss_mask is False.

    Both come from logits / temperature, the distribution that was sampled from. dtype is what matrix products
    run in; weights stay fp32.
    """

    def __init__(self, hf, temperature=1.0, dtype=torch.float32):
        super().__init__()
        self.hf, self.temperature, self.dtype = hf, temperature, dtype

    def forward(self, batch):
        with torch.autocast(batch.input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.hf.get_decoder()(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                packing=padded_layout(batch.cu_seqlens),
                use_cache=False,  # with a cache transformers would let packed documents attend to each other
            ).last_hidden_state[0]  # (T, d)
        rows = batch.loss_mask.nonzero()[:, 0]  # a response token is never the first: index t - 1 predicts it
        targets = batch.input_ids[0, rows]
        parts = [
            checkpoint(self.head, hidden[r - 1], t, use_reentrant=False)
            for r, t in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
        logp, entropy = (torch.cat(p) for p in zip(*parts, strict=True))
        zeros = 0.0 * hidden[:, 0].float()  # tied to the graph, so that a rank without tokens still runs backward
        return zeros.index_put((rows,), logp), zeros.index_put((rows,), entropy)

    def head(self, hidden, targets):
        """(n, d), (n,) -> log-prob of the targets and entropy, (n,) each. Recomputed in backward."""
        with torch.autocast(hidden.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.hf.lm_head(hidden)
        logits = logits.float() / self.temperature
        logprobs = logits.log_softmax(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def model_path(model):
    """The folder a `model` knob names, or the hub name it is (one slash, no folder). Raises UserError if neither."""
    path = repo_path(model)
    if os.path.isdir(path):
        return path
    if model.count("/") == 1 and model[0] not in "./~":
        return model
    raise UserError(f"there is no model folder {path}")


def load_policy(model, temperature=1.0, dtype=torch.float32, device="cpu"):
    """A Policy from a folder in Hugging Face format or a hub name. Raises UserError if none loads."""
    try:
        hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="packed")
    except Exception as e:
        raise UserError(f"no causal LM loads from model {model}: {first_line(e)}") from None
    return Policy(hf, temperature, dtype).to(device)


def context_length(model):
    """The longest sequence the model's config allows, in tokens. Raises UserError if there is no config."""
    try:
        return AutoConfig.from_pretrained(model).max_position_embeddings
    except Exception as e:
        raise UserError(f"no config loads from model {model}: {first_line(e)}") from None


def save_policy(policy, tokenizer, folder):
    """Write folder in Hugging Face format, whole or not at all."""
    partial = folder + ".partial"
    policy.hf.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)


@contextlib.contextmanager
def attention(hf, implementation):
    """Run a block under another of transformers' attention implementations; a KV cache needs its own masks."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation(implementation)
    try:
        yield
    finally:
        hf.set_attn_implementation(before)
