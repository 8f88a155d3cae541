"""
The sampler for machines without vLLM: a decoding loop in plain torch, for models of Llama's shape.

TorchSampler follows the protocol in rollout.py: it batches requests, draws tokens and collects
samples. Decoder is the forward pass below it, one token per sequence at a time, with a KV cache.
Decoding multiplies a few rows with every weight matrix, with hundreds of small operations in
between. So matrices with the same input are joined into one, on a CPU each matrix is stored in the
layout that oneDNN reads fastest, and little is copied.
"""

from itertools import groupby

import torch
import torch.nn.functional as F

from configurator import UserError, first_line
from runtime.files import load_config
from runtime.process import heartbeat
from runtime.requests import MAX_ROWS, Sample, check_requests, check_stamp, per_prompt
from runtime.tensors import load_whole, whole_tensors

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")


# ---------------------------------------------------------------- the sampler


class TorchSampler:
    """A sampler (rollout.py has the protocol) that holds copies of the weights and runs on the GPU,
    if there is one.

    model: a folder in Hugging Face format, or a hub name. Its config is read at once, its weights
    only if generate() asks for them before the first load(). Raises UserError for a config that
    Decoder does not compute, and in generate() if the weights do not load.
    """

    def __init__(self, model, stop_ids, max_model_len, dtype="float32"):
        self.model, self.stop_ids, self.max_model_len = model, stop_ids, max_model_len
        self.config, self.dtype = load_config(model), getattr(torch, dtype)
        self.decoder = Decoder(self.config)
        self.stamp, self.tick, self.given_back = model, lambda: None, 0

    def load(self, hf, stamp):
        """Copy the weights of a Hugging Face module. Under FSDP a collective."""
        self.decoder.load(hf, self.dtype, self.max_model_len)
        self.stamp = stamp

    def load_folder(self):
        """Load the weights of the model that the sampler was made with."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            hf = load_whole(self.model, dtype=self.dtype)
        except Exception as e:
            raise UserError(f"no causal LM loads from model {self.model}: {first_line(e)}") from None
        self.load(hf.to("cuda" if torch.cuda.is_available() else "cpu"), self.model)

    def sleep(self):
        """Free the memory of the weights. The next load() brings new ones."""
        self.decoder, self.stamp = Decoder(self.config), None

    def close(self):
        pass

    @torch.no_grad()
    def generate(self, prompts, seeds, temperature, max_tokens, stamp, done=lambda i, sample: None):
        check_stamp(self.stamp, stamp)
        if not prompts:
            return []
        check_requests(prompts, self.max_model_len, self.config.vocab_size)
        if not self.decoder.layers:
            self.load_folder()
        samples, limits = {}, per_prompt(max_tokens, prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with heartbeat("torch samples", len(prompts)) as show:
            for start in range(0, len(prompts), MAX_ROWS):
                rows = by_length[start : start + MAX_ROWS]
                chosen = [[x[i] for i in rows] for x in (prompts, seeds, limits)]
                for row, sample in self.decode(*chosen, temperature):
                    samples[rows[row]] = sample
                    done(rows[row], sample)
                    show(len(samples))
        return [samples[i] for i in range(len(prompts))]

    def decode(self, prompts, seeds, limits, temperature):
        """Yield (row, Sample) for each prompt, as soon as it ends. B prompts, V vocabulary.

        Prompts are padded on the left, and equal prompts are computed once. Finished rows leave the
        batch when they are more than a quarter of it.
        """
        device, width = self.decoder.embedding.device, max(map(len, prompts))
        limits = [min(n, self.max_model_len - len(p)) for p, n in zip(prompts, limits, strict=True)]
        max_tokens, limit = max(limits), torch.tensor(limits, device=device)  # (B,)
        stop = torch.tensor(self.stop_ids, dtype=torch.long, device=device)
        # Inverse-CDF sampling: one uniform number per row and token, from the row's own generator.
        # Always max_model_len at once, because the numbers depend on how many are drawn at once.
        if temperature:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            draw = lambda g: torch.rand(self.max_model_len, generator=g, dtype=torch.float64)
            uniform = torch.stack([draw(g) for g in generators]).to(device)  # (B, max_model_len)

        # The prompts. P different ones, W tokens wide.
        places = {}  # {prompt: its row among the different prompts}
        prompt = [places.setdefault(tuple(p), len(places)) for p in prompts]
        prompt = torch.tensor(prompt, device=device)  # (B,)
        # (P,), the first column after the padding
        first = torch.tensor([width - len(p) for p in places], device=device)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in places], device=device)  # (P, W)
        column, padded = torch.arange(width, device=device), int(first.max()) > 0
        position = (column - first[:, None]).clamp_min(0)
        # (P, W, W). Padding sees itself, because a softmax over nothing is NaN.
        sees = (column <= column[:, None]) & ((column >= first[:, None, None]) | (column == column[:, None]))
        self.decoder.start(len(places))
        logits = self.decoder.forward(ids, position, sees[:, None])[prompt]  # (B, V)
        self.decoder.keep(prompt)

        # The responses. `rows` are the prompts that are still in the batch, `alive` marks those
        # that have not ended.
        position, first = position[prompt, -1:], first[prompt]
        rows = torch.arange(len(prompts), device=device)
        tokens = torch.zeros(len(prompts), max_tokens, dtype=torch.long, device=device)
        logps = torch.zeros(len(prompts), max_tokens, device=device)
        n_alive, alive = len(prompts), torch.ones(len(prompts), dtype=torch.bool, device=device)
        for t in range(max_tokens):
            self.tick()
            logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (B, V)
            if temperature:
                cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
                chosen = torch.searchsorted(cdf, uniform[rows, t, None] * cdf[:, -1:], right=True)[:, 0]
                chosen = chosen.clamp_max(logprobs.size(-1) - 1)
            else:
                chosen = logprobs.argmax(-1)
            tokens[rows, t] = chosen
            logps[rows, t] = logprobs.gather(-1, chosen[:, None])[:, 0]
            stopped = (chosen[:, None] == stop).any(-1)
            goes_on = alive & ~stopped & (t + 1 < limit[rows])
            ended, alive = rows[alive & ~goes_on].tolist(), goes_on
            n_alive -= len(ended)
            for i in ended:
                response = tokens[i, : t + 1].tolist()
                reason = "stop" if response[-1] in self.stop_ids else "length"
                yield i, Sample(response, logps[i, : t + 1].tolist(), reason)
            if not n_alive:
                break
            if n_alive < 0.75 * len(alive):
                keep = alive.nonzero()[:, 0]
                rows, alive, chosen = rows[keep], alive[keep], chosen[keep]
                position, first = position[keep], first[keep]
                self.decoder.keep(keep)
            # Rows that have ended stay for a while, and must not exceed the last position.
            position = (position + 1).clamp_max(self.max_model_len - 1)
            sees = None
            if padded:
                sees = (torch.arange(width + t + 1, device=device) >= first[:, None])[:, None, None]
            logits = self.decoder.forward(chosen[:, None], position, sees)


# ---------------------------------------------------------------- the forward pass


class Decoder:
    """Call load(hf) once; then for every batch start(), forward() for the prompts, and forward()
    for each token.

    layers is empty until load() is called. Raises UserError for a config whose model is not one of FAMILIES.
    """

    def __init__(self, config):
        windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        windows = windows or (config.model_type == "mistral" and config.sliding_window)
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if config.model_type not in FAMILIES or windows or config.hidden_act != "silu" or rope not in ROPES:
            raise UserError(
                f"the torch sampler computes {', '.join(FAMILIES)} with SiLU, full attention and"
                f" {', '.join(ROPES)} RoPE, and this {config.model_type} is another kind: install vLLM"
            )
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.n_heads
        self.eps, self.tied = config.rms_norm_eps, config.tie_word_embeddings
        self.layers = []

    @torch.no_grad()
    def load(self, hf, dtype, max_positions):
        """Copy a Hugging Face module's weights, one layer at a time. Under FSDP a collective."""
        self.layers = []
        # model.layers.0, model.norm.weight, lm_head.weight
        module = lambda item: ".".join(item[0].split(".")[:3])
        for name, tensors in groupby(whole_tensors(hf.named_parameters(), dtype), module):
            weights = {key.removeprefix(name + "."): t for key, t in tensors}
            if name.startswith("model.layers."):
                self.layers.append(Layer(weights, self.n_heads, self.n_kv_heads))
            elif name == "model.norm.weight":
                self.norm = weights[name].clone()
            else:  # the embedding, or the head, which may be the same tensor
                if name == "model.embed_tokens.weight":
                    self.embedding = weights[name].clone()
                if name == "lm_head.weight" or self.tied:
                    self.head = linear({"head.weight": weights[name]}, "head")
        # Rotary embedding: rotate_half(x) is x rolled by half its size, the first half negated. The
        # sine table has the sign already.
        positions = torch.arange(max_positions, device=hf.device)[None]
        cos, sin = hf.get_decoder().rotary_emb(self.norm, positions)
        half = self.head_dim // 2
        self.cos = cos[0]  # (positions, D)
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)

    def start(self, n_rows):
        """Begin with n_rows sequences and an empty cache."""
        self.length = 0  # tokens of each row so far, padding included
        empty = lambda: self.norm.new_empty(2, n_rows, self.n_kv_heads, 0, self.head_dim)
        self.cache = [empty() for _ in self.layers]

    def keep(self, rows):
        """Continue with these rows of the batch only; the same row may be given twice."""
        self.cache = [cache[:, rows, :, : self.length] for cache in self.cache]

    def forward(self, ids, positions, mask):
        """Read the next W tokens of each row. Returns the logits after the last one, (B, V).

        ids, positions: (B, W). mask: (B, 1, W, cached + W), True where a token sees another; None
        if every token sees all.
        """
        start, self.length = self.length, self.length + ids.size(1)
        x = F.embedding(ids, self.embedding)  # (B, W, d)
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]  # (B, W, 1, D)
        for i, layer in enumerate(self.layers):
            if self.length > self.cache[i].size(-2):  # double the room, so that copies are rare
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
            keys[:, :, start : self.length] = k
            values[:, :, start : self.length] = v.transpose(1, 2)
            seen = F.scaled_dot_product_attention(
                q, keys[:, :, : self.length], values[:, :, : self.length], mask,
                enable_gqa=self.n_heads != self.n_kv_heads,
            )  # fmt: skip
            x = x + layer.out(seen.transpose(1, 2).flatten(2))
            gate, up = layer.gate_up(self.rms_norm(x, layer.norm_2)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        return self.head(self.rms_norm(x[:, -1], self.norm))

    def rms_norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)


class Layer:
    """One decoder layer: its functions and weights. weights: {Hugging Face's name: tensor}."""

    def __init__(self, weights, n_heads, n_kv_heads):
        self.norm_1 = weights["input_layernorm.weight"].clone()
        self.norm_2 = weights["post_attention_layernorm.weight"].clone()
        self.qkv = linear(weights, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = linear(weights, "self_attn.o_proj")
        self.gate_up = linear(weights, "mlp.gate_proj", "mlp.up_proj")
        self.down = linear(weights, "mlp.down_proj")
        self.norm_qk = None  # one row per head, (heads + key-value heads, D)
        if "self_attn.q_norm.weight" in weights:  # Qwen3
            q, k = weights["self_attn.q_norm.weight"], weights["self_attn.k_norm.weight"]
            self.norm_qk = torch.cat([q.expand(n_heads, -1), k.expand(n_kv_heads, -1)])


def linear(weights, *names):
    """One function for these linear layers: (..., in) -> (..., their outputs side by side)."""
    weight, bias = torch.cat([weights[f"{name}.weight"] for name in names]), None
    if f"{names[0]}.bias" in weights:
        bias = torch.cat([weights[f"{name}.bias"] for name in names])
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if on_cpu and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)
