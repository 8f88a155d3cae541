"""
The policy: a Hugging Face causal LM that takes packed sequences and returns each token's log-prob and the
entropy of the distribution at its place. Logits are materialised for one chunk of tokens at a time.

Either FSDP2 shards it, one decoder layer per unit, or each rank holds it whole (DDP, or one process). In both
cases the weights are fp32 and matrix products run in `dtype`.
"""

import contextlib
import functools
import inspect
import os

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from configurator import UserError, first_line
from data import spread, unpack
from runtime.plan import HEAD_CHUNK
from runtime.ranks import RANK, WORLD, gather
from runtime.tensors import load_whole, read_parameter, tensor_files

disable_progress_bar()  # the bars of loading and saving would break up the log


# ---------------------------------------------------------------- attention within packed sequences
# Each backend takes query (1, H, T, D), key and value (1, H_kv, T, D) and data.packing_of()'s `packing`, and returns ((1, T,
# H, D), None) as transformers expects. No backend builds a T x T mask. Here T counts a shared prompt only once; each sequence
# attends to it as if it were its own. Heads are always said to be grouped (GQA): while a layer is compiled, a comparison of
# H and H_kv would be a symbol, which the kernels do not take; and where H = H_kv it costs nothing.


def packed_sdpa(module, query, key, value, attention_mask, scaling=None, packing=None, **kwargs):
    """torch's SDPA over the sequences as rows of a right-padded batch. Under a causal mask no token sees the
    padding that follows it, so there is nothing to mask."""
    slots, tokens = packing["slots"], packing["tokens"]
    rows = lambda x: x[0].transpose(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        rows(query), rows(key), rows(value), is_causal=True, scale=scaling, enable_gqa=True
    )  # (n, H, L, D)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, tokens)[None], None


def packed_varlen(module, query, key, value, attention_mask, scaling=None, packing=None, **kwargs):
    """torch's own variable-length attention (a flash kernel; GPUs, half precision). Only keys and values are picked for
    every sequence: where a sequence has fewer queries than keys, the causal mask is aligned at its end."""
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (T, H, D)
    if packing["where"] is not None:
        k, v = (Repeat.apply(x, *(packing[name] for name in ("where", "computed", "copied", "copies"))) for x in (k, v))
    options = {"scale": scaling, "window_size": (-1, 0)}
    if VARLEN_TAKES_GQA:  # torch 2.11 takes grouped heads without being told
        options["enable_gqa"] = True
    lengths = packing["cu_queries"], packing["cu_seqlens"], packing["longest_query"], packing["longest"]
    return varlen_attn(q, k, v, *lengths, **options)[None], None


VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

for name, function in (("packed_sdpa", packed_sdpa), ("packed_varlen", packed_varlen)):
    AttentionInterface.register(name, function)


class Repeat(torch.autograd.Function):
    """x (computed tokens, ...) -> (all tokens, ...): each shared token once for each of its copies. The gradients of the copies
    are summed in fp32 and always in the same order; index_select's own backward would do neither on a GPU."""

    @staticmethod
    def forward(ctx, x, where, computed, copied, copies):
        ctx.save_for_backward(computed, copied, copies)
        return x.index_select(0, where)

    @staticmethod
    def backward(ctx, grad):
        computed, copied, copies = ctx.saved_tensors
        there = (copies >= 0).view(*copies.shape, *[1] * (grad.dim() - 1))
        total = (grad[copies.clamp_min(0)].float() * there).sum(1).to(grad.dtype)
        return grad.index_select(0, computed).index_copy(0, copied, total), None, None, None, None


def attention_backends(device, dtype):
    """The backends that work here, the fastest first."""
    return ["packed_varlen", "packed_sdpa"] if device == "cuda" and dtype != torch.float32 else ["packed_sdpa"]


def use_flash_kernel(choice):
    """Let varlen_attn run torch's own kernel, "FA2", or an installed package's: "FA3" is flash-attn-3, "FA4" flash-attn-4.
    "auto" is the newest that there is, on a Hopper card or a newer one. Returns its name. Raises UserError if it is missing."""
    if choice == "FA2" or (choice == "auto" and torch.cuda.get_device_capability() < (9, 0)):
        return "FA2"
    for name in ("FA4", "FA3") if choice == "auto" else (choice,):
        try:
            torch.nn.attention.activate_flash_attention_impl(name)
            return name
        except (ImportError, RuntimeError, ValueError) as e:
            if choice != "auto":
                raise UserError(f"flash_kernel={choice} does not load: {first_line(e)}: set flash_kernel=auto") from None
    return "FA2"


def pick(x, indices, dim=0):
    return x if indices is None else x.index_select(dim, indices)


# ---------------------------------------------------------------- the head, a chunk of tokens at a time


def chunk_of(hidden, weight):
    """The number of tokens whose logits are materialised together. HEAD_CHUNK is enough to fill a GPU. For a CPU an
    eighth is enough; with a small vocabulary it takes more, as many as fit its cache."""
    return HEAD_CHUNK if hidden.is_cuda else max(HEAD_CHUNK // 8, 2**20 // len(weight))


def compiled_on_gpu(function):
    """One or two kernels instead of one per operation, made at the first call with a tensor on a GPU. On a CPU the function
    as it is."""
    compiled = functools.cache(lambda: torch.compile(function))
    return lambda first, *rest: (compiled() if first.is_cuda else function)(first, *rest)


@compiled_on_gpu
def statistics(logits, targets):
    """(n, V), (n, k) -> logsumexp (n, 1), the targets' log-probs (n, k), entropy (n, 1); at least fp32. fp32 logits are
    overwritten."""
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = logp.logsumexp(-1, keepdim=True)
    logp = logp.sub_(normaliser)
    return normaliser, logp.gather(-1, targets), -logp.exp().mul_(logp).sum(-1, keepdim=True)


def slope_(logp, entropy, grad, grad_entropy):
    """The gradient of a logit that is no target, -p (grad + grad_entropy (log p + entropy)), in place of log p. grad (n, 1) is
    the sum over the row's targets. With logits z: d log p_t / dz = onehot_t - p, d entropy / dz = -p (log p + entropy)."""
    p = logp.exp()
    return logp.add_(entropy).mul_(grad_entropy).add_(grad).mul_(p).neg_()


@compiled_on_gpu
def to_slope(logits, normaliser, entropy, grad, grad_entropy):
    """slope_() in place of logits."""
    logp = logits.to(normaliser.dtype).sub_(normaliser)
    logits.copy_(slope_(logp, entropy, grad, grad_entropy))


class Head(torch.autograd.Function):
    """(n, d), (V, d), (n, k) -> (n, k + 1), at least fp32: the targets' log-probs, and the entropy.

    Products have hidden's dtype, and so have the logits, in one buffer for a chunk of tokens; all else is fp32. The weight
    may have another dtype, which its gradient gets, too. Backward computes a chunk's logits again and turns them into their
    gradient in place, so nothing of the vocabulary's width is kept between the two.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        weight, dtype = weight.to(hidden.dtype), weight.dtype
        n = chunk_of(hidden, weight)
        logits = hidden.new_empty(min(n, len(hidden)), len(weight))
        out = hidden.new_empty(len(hidden), targets.size(1) + 1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        normaliser = torch.empty_like(out[:, :1])
        for start in range(0, len(hidden), n):
            rows = slice(start, start + n)
            z = torch.mm(hidden[rows], weight.T, out=logits[: len(hidden[rows])])
            normaliser[rows], out[rows, :-1], out[rows, -1:] = statistics(z, targets[rows])
        ctx.save_for_backward(hidden, weight, targets, normaliser, out)
        ctx.dtype = dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, normaliser, out = ctx.saved_tensors
        n = chunk_of(hidden, weight)
        logits = hidden.new_empty(min(n, len(hidden)), len(weight))
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=out.dtype)
        for start in range(0, len(hidden), n):
            rows = slice(start, start + n)
            h, t, g, logp = hidden[rows], targets[rows], grad[rows, :-1], out[rows, :-1]
            common = out[rows, -1:], g.sum(-1, keepdim=True), grad[rows, -1:]
            z = torch.mm(h, weight.T, out=logits[: len(h)])
            to_slope(z, normaliser[rows], *common)
            # A target's column has its own gradient, too. Summed before it is rounded, because near p = 1 they cancel; and
            # a token may be a target twice.
            same = t[:, :, None] == t[:, None, :]
            z.scatter_(-1, t, ((same * g[:, None, :]).sum(-1) + slope_(logp.clone(), *common)).to(z.dtype))
            torch.mm(z, weight, out=grad_hidden[rows])
            if z.dtype == out.dtype:
                grad_weight.addmm_(z.T, h)
            elif z.is_cuda:
                torch.addmm(grad_weight, z.T, h, out_dtype=out.dtype, out=grad_weight)
            else:  # a product in the lower precision, a sum in the higher one
                grad_weight += z.T @ h
        return grad_hidden, grad_weight.to(ctx.dtype), None


# ---------------------------------------------------------------- the policy


class Policy(torch.nn.Module):
    """forward(Packed) -> logp, entropy: (T,) fp32 each, zero where loss_mask is False. If the batch has top1, there
    is a third result: the log-probs of those tokens in the same places.

    All come from logits / temperature, the distribution that was sampled from. autocast: the dtype of matrix
    products; under FSDP leave it at fp32, because FSDP's mixed precision casts the weights instead.
    """

    def __init__(self, hf, temperature=1.0, autocast=torch.float32):
        super().__init__()
        self.hf, self.temperature, self.autocast = hf, temperature, autocast

    def forward(self, batch):
        hidden, rows = self.hidden_states(batch), batch.packing["response"]
        targets = batch.input_ids[0, rows, None]
        if batch.top1 is not None:
            targets = torch.cat([targets, batch.top1[rows, None].clamp_min(0)], -1)
        # Inside forward, because outside it FSDP's head weight is a shard.
        # Not index_select: a shared prompt's last token predicts several, and their gradients must be summed in one order.
        found = Head.apply(self.before_head(hidden[batch.packing["before"]]), self.hf.lm_head.weight, targets)
        zeros = (0.0 * hidden[0, 0].float()).expand(batch.input_ids.size(1))  # with a gradient also on a rank without tokens
        *logps, entropy = (zeros.index_put((rows,), column) for column in found.unbind(-1))
        return logps[0], entropy, *logps[1:]

    @torch.no_grad()
    def judge(self, batch):
        """For a teacher model: its log-prob of each response token, (T,) fp32, and its most likely token in that
        place, (T,) int; 0 and -1 where loss_mask is False."""
        hidden, rows, before = self.hidden_states(batch), batch.packing["response"], batch.packing["before"]
        logp, top1 = torch.zeros_like(batch.input_ids[0], dtype=torch.float32), torch.full_like(batch.input_ids[0], -1)
        weight = self.hf.lm_head.weight.to(self.product)
        n = chunk_of(hidden, weight)
        for r, b in zip(rows.split(n), before.split(n), strict=True):
            logits = self.before_head(hidden[b]) @ weight.T
            top1[r] = logits.argmax(-1)
            logp[r] = statistics(logits, batch.input_ids[0, r, None])[1][:, 0]
        return logp, top1

    def hidden_states(self, batch):
        """(computed tokens, d)."""
        packing = batch.packing
        with self.precision(batch.input_ids):
            return self.hf.get_decoder()(
                input_ids=pick(batch.input_ids, packing["computed"], 1),
                position_ids=pick(batch.position_ids, packing["computed"], 1),
                packing=packing,
                use_cache=False,  # with a cache transformers would let packed documents attend to each other
            ).last_hidden_state[0]

    def before_head(self, hidden):
        """What the head takes: divided by the temperature here, where it costs d products a token and not V."""
        return (hidden / self.temperature).to(self.product)

    @property
    def product(self):
        """The dtype of the head's products: autocast's, or under FSDP that of the gathered weights."""
        return self.autocast if self.autocast != torch.float32 else self.hf.lm_head.weight.dtype

    def precision(self, tensor):
        return torch.autocast(tensor.device.type, self.autocast, enabled=self.autocast != torch.float32)


# ---------------------------------------------------------------- load


def load_policy(model, temperature=1.0, dtype=torch.float32, device="cpu", shard=False, recompute=False, compiled=False,
                frozen=False, offload=False):  # fmt: skip
    """A Policy from a folder in Hugging Face format or a hub name.

    shard       FSDP2 over all ranks. Each rank reads only its own rows of each tensor, so no process ever holds
                the whole model
    recompute   activation checkpointing, see recompute_layers()
    compiled    the decoder layers by torch.compile, see compile_layers()
    frozen      weights in `dtype` instead of fp32, without gradients
    offload     the weights stay on the host; FSDP moves them when they are needed, without FSDP the caller does

    Raises UserError if no model loads.
    """
    backend, weight_dtype = attention_backends(device, dtype)[0], dtype if frozen else torch.float32
    try:
        if shard:
            policy = load_sharded(
                model, temperature, dtype=dtype, device=device, backend=backend, weight_dtype=weight_dtype, offload=offload
            )
        else:
            hf = load_whole(model, dtype=weight_dtype, attn_implementation=backend)
            policy = Policy(hf, temperature, dtype).to("cpu" if offload else device)
        policy.hf.lm_head, policy.hf.get_decoder().layers
    except Exception as e:
        raise UserError(f"no causal LM loads from model {model}: {first_line(e)}") from None
    if recompute:
        recompute_layers(policy)
    if compiled:
        compile_layers(policy.hf)
    return policy.requires_grad_(not frozen)


def recompute_layers(policy):
    """Activation checkpointing, one decoder layer at a time. These models have no dropout, so there is no random state to keep,
    and train mode, outside of which transformers does not recompute, changes nothing else."""
    options = {"use_reentrant": False, "preserve_rng_state": False}
    policy.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    policy.train()


def compile_layers(hf):
    """Compile the decoder layers, which share their graphs, at their first call. Sizes are symbols from the start, so that
    sequences of other lengths need no other graph. A handful of variants come of recomputation, shared prompts, and calls
    without gradients; 16 are allowed."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each layer's graph where one of DDP's buckets ends
    # torch 2.11 has no such argument. The config's limit is each thread's own, and backward runs in another on a GPU.
    limit = {"recompile_limit": 16} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
    for layer in hf.get_decoder().layers:
        layer.compile(fullgraph=True, dynamic=True, **limit)


def shard_policy(policy, dtype, offload=False):
    """Shard a policy by FSDP2. Each decoder layer is a unit; embedding, head and final norm belong to the root.
    Gradients are reduced in fp32."""
    precision = MixedPrecisionPolicy(param_dtype=dtype if dtype != torch.float32 else None, reduce_dtype=torch.float32)
    options = {"mp_policy": precision}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for layer in policy.hf.get_decoder().layers:
        fully_shard(layer, **options)
    # The root is resharded, too: gathered after a forward without backward, its weights would be in compute precision.
    fully_shard(policy, **options, reshard_after_forward=True)
    register_fsdp_forward_method(policy, "judge")
    return policy


def load_sharded(model, temperature, dtype, device, backend, weight_dtype, offload):
    """load_policy's FSDP2 case. Raises OSError for weights that are missing."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, attn_implementation=backend, dtype=weight_dtype)
    policy = shard_policy(Policy(hf, temperature), dtype, offload)
    policy.to_empty(device="cpu" if offload else device)
    hf.tie_weights()
    with contextlib.suppress(OSError):  # it may be missing; from_config() does not read it, and it names where responses end
        hf.generation_config = GenerationConfig.from_pretrained(model)
    decoder = hf.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)  # its buffers are in no checkpoint
    files = tensor_files(model) if os.path.isdir(model) else {}
    if not files:
        raise OSError("sharded loading needs model.safetensors, or its index, in a local folder")
    for name, tensor in (*hf.named_parameters(), *hf.named_buffers()):
        if "rotary_emb" not in name:
            read_parameter(files, name, tensor)
    return policy.eval()


# ---------------------------------------------------------------- a policy applied to rollouts


@torch.no_grad()
def mean_entropies(policy, rollouts, micro_tokens):
    """The policy's mean entropy over each response, as a list. The ranks share the work."""
    micro_batches = spread(rollouts, micro_tokens, RANK, WORLD)
    entropies = [policy(b.to(policy.hf.device))[1] for b in micro_batches]
    found = sorted(gather([(row, sum(values) / len(values)) for row, values in unpack(micro_batches, entropies)]))
    return [entropy for _, entropy in found]


@torch.no_grad()
def ask_teacher(teacher, micro_batches, want_top1, n_tokens, offload):
    """Write the teacher model's log-probs into the micro-batches, and with want_top1 its most likely tokens. An id
    from n_tokens on is no token of the policy's and counts as none. offload: the teacher's weights are on the host
    between calls."""
    if offload:
        teacher.to(micro_batches[0].input_ids.device)
    for batch in micro_batches:
        batch.teacher_logp, top1 = teacher.judge(batch)
        if want_top1:
            batch.top1 = torch.where(top1 < n_tokens, top1, -1)
    if offload:
        teacher.to("cpu")
