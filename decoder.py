"""
The forward pass behind TorchSampler: models of Llama's shape, a token per sequence at a time, with a KV cache.

Decoding is products of a few rows with every weight, and hundreds of small operations in between. So what has the same input
is one matrix, on a CPU each matrix lies as oneDNN reads it fastest, and nothing is copied that can stay where it is.
"""

from itertools import groupby

import torch
import torch.nn.functional as F

from configurator import UserError
from model import whole_tensors

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")


def linear(weights, *names):
    """Those named as one function, (..., in) -> (..., the sum of their outs)."""
    weight = torch.cat([weights[f"{name}.weight"] for name in names])
    bias = torch.cat([weights[f"{name}.bias"] for name in names]) if f"{names[0]}.bias" in weights else None
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


class Layer:
    """A decoder layer's functions and weights, from {Hugging Face's name: tensor}."""

    def __init__(self, weights, n_heads, n_kv_heads):
        self.norm_1, self.norm_2 = (weights[f"{at}_layernorm.weight"].clone() for at in ("input", "post_attention"))
        self.qkv = linear(weights, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = linear(weights, "self_attn.o_proj")
        self.gate_up, self.down = linear(weights, "mlp.gate_proj", "mlp.up_proj"), linear(weights, "mlp.down_proj")
        self.norm_qk = None  # of each head, (heads + key-value heads, D)
        if "self_attn.q_norm.weight" in weights:  # Qwen3
            q, k = weights["self_attn.q_norm.weight"], weights["self_attn.k_norm.weight"]
            self.norm_qk = torch.cat([q.expand(n_heads, -1), k.expand(n_kv_heads, -1)])


class Decoder:
    """load(hf); then for every batch start(), forward() for the prompts, and forward() for each token.

    Raises UserError for a model's config that is none of FAMILIES'.
    """

    def __init__(self, config):
        windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        windows = windows or (config.model_type == "mistral" and config.sliding_window)
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if config.model_type not in FAMILIES or windows or config.hidden_act != "silu" or rope not in ROPES:
            raise UserError(f"the torch sampler computes {', '.join(FAMILIES)} with SiLU, full attention and {', '.join(ROPES)}"
                            f" RoPE, and this {config.model_type} is another kind: install vLLM")  # fmt: skip
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.n_heads
        self.eps, self.tied = config.rms_norm_eps, config.tie_word_embeddings

    @torch.no_grad()
    def load(self, hf, dtype, max_positions):
        """Copy a Hugging Face module's weights, a layer at a time; under FSDP a collective."""
        self.layers = []
        module = lambda item: ".".join(item[0].split(".")[:3])  # model.layers.0, model.norm.weight, lm_head.weight
        for name, tensors in groupby(whole_tensors(hf.named_parameters(), dtype), module):
            weights = {key.removeprefix(name + "."): t for key, t in tensors}
            if name.startswith("model.layers."):
                self.layers.append(Layer(weights, self.n_heads, self.n_kv_heads))
            elif name == "model.norm.weight":
                self.norm = weights[name].clone()
            else:  # the embedding; the head, which may be the same
                if name == "model.embed_tokens.weight":
                    self.embedding = weights[name].clone()
                if name == "lm_head.weight" or self.tied:
                    self.head = linear({"head.weight": weights[name]}, "head")
        # Rotary embedding: rotate_half(x) is x rolled by a half, the first half negated, which the sine's table takes over.
        cos, sin = hf.get_decoder().rotary_emb(self.norm, torch.arange(max_positions, device=hf.device)[None])
        half = self.head_dim // 2
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)  # (positions, D)

    def start(self, n_rows):
        """Begin with n_rows sequences and nothing cached."""
        self.length = 0  # tokens of each row so far, padding included
        self.cache = [self.norm.new_empty(2, n_rows, self.n_kv_heads, 0, self.head_dim) for _ in self.layers]

    def keep(self, rows):
        """Go on with these rows alone; one may come twice."""
        self.cache = [cache[:, rows, :, : self.length] for cache in self.cache]

    def forward(self, ids, positions, mask):
        """ids, positions (B, W), the next W tokens of each row; mask (B, 1, W, cached + W), True where a token sees another, or
        None if every token sees all. Returns the logits after the last token, (B, V)."""
        start, self.length = self.length, self.length + ids.size(1)
        x = F.embedding(ids, self.embedding)  # (B, W, d)
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]  # (B, W, 1, D)
        for i, layer in enumerate(self.layers):
            if self.length > self.cache[i].size(-2):  # twice the room, so that few tokens have to move what is there
                old, room = self.cache[i], 2 * self.length
                self.cache[i] = old.new_empty(*old.shape[:-2], room, self.head_dim)
                self.cache[i][..., :start, :] = old[..., :start, :]
            keys, values = self.cache[i]
            heads = layer.qkv(self.rms_norm(x, layer.norm_1)).unflatten(-1, (-1, self.head_dim))
            qk, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], 2)
            if layer.norm_qk is not None:
                qk = self.rms_norm(qk, None) * layer.norm_qk
            qk = qk * cos + qk.roll(self.head_dim // 2, -1) * sin
            q, k = qk.transpose(1, 2).split([self.n_heads, self.n_kv_heads], 1)  # (B, heads, W, D)
            keys[:, :, start : self.length], values[:, :, start : self.length] = k, v.transpose(1, 2)
            seen = F.scaled_dot_product_attention(q, keys[:, :, : self.length], values[:, :, : self.length], mask,
                                                  enable_gqa=self.n_heads != self.n_kv_heads)  # fmt: skip
            x = x + layer.out(seen.transpose(1, 2).flatten(2))
            gate, up = layer.gate_up(self.rms_norm(x, layer.norm_2)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        return self.head(self.rms_norm(x[:, -1], self.norm))

    def rms_norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)
