"""
The plan of a run: parameters, memory per GPU item by item, KV cache, micro-batches. It is computed from the
model's config only, so it runs on a laptop. measured_memory() is what a run really takes; train.py prints it
after its first step.
"""

import contextlib
import re
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from configurator import UserError
from runtime.requests import MAX_ROWS

GIB = 2**30
# Logits are materialised for so many tokens at a time on a GPU, in the products' dtype: 0.6 GiB in bfloat16 for a vocabulary
# of 152,064. On an H200 4,096 were 3 % faster and took 0.6 GiB more (LOG.md).
HEAD_CHUNK = 2048


class Parameters(NamedTuple):
    """Numbers of parameters of a model."""

    all: int
    embedding: int
    layer: int  # the largest decoder layer
    active: int  # at work for one token: all, or of a mixture of experts those that the router takes


def count_parameters(config):
    """The Parameters of the model that a transformers config describes. Raises UserError if it is not a decoder like Llama or
    Qwen2."""
    try:
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config)
        layers = hf.get_decoder().layers
    except (AttributeError, ValueError):
        raise UserError(f"{config.model_type} models are not supported: choose a decoder like Llama or Qwen2") from None
    size = lambda module: sum(p.numel() for p in module.parameters())
    experts = [p for name, p in hf.named_parameters() if ".experts." in name]  # stacked: (experts, rows, columns)
    idle = sum(p.numel() // len(p) * (len(p) - getattr(config, "num_experts_per_tok", len(p))) for p in experts)
    return Parameters(size(hf), size(hf.get_input_embeddings()), max(map(size, layers)), size(hf) - idle)


def worth_compiling(choice, config):
    """The knobs `compile` and `cuda_graphs` -> True or False. On an H200 vLLM took 60 s to compile and capture for a toy that
    then trained for 7 s, so "auto" is only for models above 100 M parameters, on a GPU."""
    return choice == "yes" or (choice == "auto" and torch.cuda.is_available() and count_parameters(config).all > 100e6)


def per_token(config):
    """Multiplications of one token with weights, forward: every parameter at work but the embedding's, which are only read."""
    p = count_parameters(config)
    return p.active if config.tie_word_embeddings else p.active - p.embedding


def training_memory(config, micro_tokens, n_gpus, shard, compute_bytes, recompute):
    """{item: bytes} of one rank at the peak of an optimizer step, while the engine sleeps: in the backward pass of the
    second or a later micro-batch, when the gradients exist already.

    Persistent: fp32 weights, gradients and two Adam moments (16 bytes per parameter), divided by n_gpus if sharded.
    Temporary: weights gathered in compute precision, activations, and either the head's chunk of logits or one layer.
    """
    n, n_embedding, n_layer, _ = count_parameters(config)
    layers, d, f = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    n_head = n_embedding if config.tie_word_embeddings else 2 * n_embedding  # the embedding's and the head's together
    share = n_gpus if shard else 1
    # Per token and layer: norms, q, k, v, attention out, gate, up, their product, and the residual stream twice.
    layer = micro_tokens * (6 * d + 3 * heads * head_dim + 4 * f) * compute_bytes
    residual = micro_tokens * d * layers * (compute_bytes if shard else 4)  # autocast leaves the stream between layers in fp32
    if shard:  # the root's weights and two layers'; a gradient is whole, in fp32, while it is reduced
        gathered, reduced = (n_head + 2 * n_layer) * compute_bytes, max(n_layer, n_head) * 4
    else:  # autocast's copies; with recomputation only the current module's
        gathered, reduced = (n_embedding if recompute else n) * compute_bytes * (compute_bytes < 4), 0
    # A chunk of logits; the head's gradient in fp32, and for FSDP in compute precision.
    chunk = min(HEAD_CHUNK, micro_tokens) * config.vocab_size * compute_bytes + n_embedding * (4 + compute_bytes * shard)
    return {
        "weights, gradients, Adam (fp32)": 16 * n // share,
        "weights in compute precision": gathered,
        "activations kept for backward": residual if recompute else layer * layers,
        "hidden states around the head": 4 * micro_tokens * d * 4,
        "one chunk of logits, or one layer": max(chunk, (layer if recompute else 0) + reduced),
    }


def kv_cache(config, engine_bytes, tensor_parallel, dtype_bytes):
    """(bytes for the KV cache, tokens that fit into it) of an engine that may take engine_bytes per GPU. Its weights, and
    2 GiB for the engine itself, are subtracted."""
    n = count_parameters(config).all
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = max(1, config.num_key_value_heads // tensor_parallel)  # each GPU has at least one
    per_token = 2 * config.num_hidden_layers * kv_heads * head_dim * dtype_bytes
    left = engine_bytes - n * dtype_bytes / tensor_parallel - 2 * GIB
    return left, max(0, int(left / per_token))


def checkpoint_bytes(n, k):
    """Bytes of a checkpoint of n parameters: fp32 weights and Adam's two moments. ReLIFT has two more moments."""
    return 4 * n * (5 if k["sft_buffer"] else 3)


def checkpoints_kept(k):
    """How many checkpoints are on the disk at most: a new one is written before an old one is removed."""
    times = [k["max_steps"] // every if every else 0 for every in (k["save_interval"], k["keep_every"])]
    return 1 + (min(times[0], k["keep_last"] + times[1]) if k["keep_last"] else times[0])


def show(n_bytes):
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes > GIB else f"{n_bytes / 2**20:.1f} MiB"


def measured_memory():
    """(peak, now) in bytes. On a GPU: the peak of torch's allocations since the last call, and the memory in use on the
    whole device, the engine included. torch counts a sleeping engine in the peak; the device does not. On a CPU: the
    same for this process's resident memory; NaN without /proc."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak, total - free
    try:
        with open("/proc/self/status") as f:
            kib = dict(re.findall(r"(VmHWM|VmRSS):\s+(\d+) kB", f.read()))
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # resets the peak to the memory that is resident now
        return int(kib["VmHWM"]) * 1024, int(kib["VmRSS"]) * 1024
    except OSError:
        return float("nan"), float("nan")


def print_plan(k, config, n_problems, world, on_gpu, gpu_gib, log, teacher_config=None):
    """Print the plan of a run. k: its knobs (a dict); config: the model's; n_problems: 0 if unknown; gpu_gib: the
    memory of one GPU; teacher_config: of the teacher model, if there is one. On a GPU the last line says whether the
    run fits. Returns whether it fits; on a CPU True."""
    own, size = k["n_rollouts"] - k["n_teacher"], k["prompts_per_step"] * k["n_rollouts"]
    group = f"{own} own + {k['n_teacher']} teacher"
    if k["teacher_gate"] >= 0:
        own, group = k["n_rollouts"], f"{k['n_rollouts']} own, teacher where at most {k['teacher_gate']} are right"
    log(
        f"batch: {k['prompts_per_step']} prompts x ({group}) = {size} sequences a step,"
        f" {k['update_batches']} update(s) of {size // k['update_batches']}, {world} rank(s)"
    )
    epoch = (
        f"{n_problems // k['prompts_per_step']} per epoch of {n_problems} problems"
        if n_problems
        else "per epoch an unknown number, because there is no data file"
    )
    log(f"length: {k['max_steps']} steps, {epoch}")
    rows = -(-size // k["update_batches"] // world)
    longest = k["max_prompt_tokens"] + max(k["max_tokens"], k["max_teacher_tokens"])
    n_micro = [-(-rows * longest // share // k["micro_tokens"]) for share in (1, 4)]
    most = min(k["micro_tokens"], max(rows, -(-k["sft_buffer"] // world)) * longest)  # a small update does not fill one
    log(
        f"micro-batches of at most {most} tokens: {rows} sequences per rank and update make about {n_micro[0]} if each has"
        f" {longest} tokens, {n_micro[1]} at a quarter of that"
    )
    dtype_bytes = 2 if on_gpu and k["dtype"] != "float32" else 4
    items = training_memory(
        config, most, n_gpus=world, shard=k["shard"] == "fsdp", compute_bytes=dtype_bytes, recompute=k["recompute"]
    )
    sharded = world if k["shard"] == "fsdp" else 1
    if k["sft_buffer"]:
        items["the SFT step's own moments"] = 8 * count_parameters(config).all // sharded
    offloaded = k["teacher_offload"] and on_gpu
    teacher_bytes = count_parameters(teacher_config).all * dtype_bytes // sharded if teacher_config else 0
    if teacher_config and not offloaded:
        items["teacher model's weights"] = teacher_bytes
    peak = sum(items.values())
    n = count_parameters(config).all
    log(f"memory per rank, {n / 1e6:.2f} M parameters, shard={k['shard']}, recompute={k['recompute']}:")
    for item, n_bytes in (*items.items(), ("total, at the update's peak", peak)):
        log(f"  {item:<34}{show(n_bytes):>12}")
    if teacher_config:
        theirs = count_parameters(teacher_config)
        cost = per_token(teacher_config) / per_token(config) / (3 + k["recompute"])  # backward is twice the forward
        log(
            f"teacher model: {theirs.all / 1e6:.2f} M parameters, {theirs.active / 1e6:.2f} M at work for a token;"
            f" to ask it adds {cost:.0%} to the products of a step's updates"
            + (f", and each micro-batch takes {show(teacher_bytes)} from the host" if offloaded and sharded > 1 else "")
        )
    each = checkpoint_bytes(n, k)
    log(f"checkpoints: {show(each)} each, {show(each * checkpoints_kept(k))} at most")
    if not on_gpu:
        return True
    flop = 6 * per_token(config) * size * longest  # backward is twice the forward; what recompute=True repeats is left out
    log(
        f"work of a step: at most {size * longest} tokens and {flop / 1e15:.2g} PFLOP in its updates (attention's own products"
        f" left out), {k['prompts_per_step'] * own * k['max_tokens']} tokens to sample at most; hours: not measured"
    )
    share, length = k["gpu_memory"] * gpu_gib * GIB, k["max_prompt_tokens"] + k["max_tokens"]
    left, tokens = kv_cache(config, share, k["tensor_parallel"], dtype_bytes)
    log(
        f"engine: {show(share)}, of which {left / GIB:.1f} GiB for the KV cache: {tokens} tokens,"
        f" {min(2 * MAX_ROWS, tokens / length):.1f} sequences of {length} at once"
    )
    # The gradients are freed before the rollout, except under DDP, whose buckets hold them.
    freed = 0 if k["shard"] == "ddp" and world > 1 else items["weights, gradients, Adam (fp32)"] // 4
    staying = ("weights, gradients, Adam (fp32)", "the SFT step's own moments", "teacher model's weights")
    between = sum(items.get(name, 0) for name in staying) - freed
    asking, told = 0, ""
    if teacher_config:  # sharded, two layers, embedding and head are gathered; else an offloaded one comes whole
        theirs = count_parameters(teacher_config)
        ends = theirs.embedding * (1 if teacher_config.tie_word_embeddings else 2)
        asking = between + ((2 * theirs.layer + ends) * dtype_bytes if sharded > 1 else teacher_bytes * offloaded)
        told = f", asking the teacher model {show(asking)}"
    fits = max(peak, between + share, asking) + GIB <= gpu_gib * GIB and tokens >= length  # 1 GiB: CUDA itself
    log(
        f"fits in {gpu_gib:.0f} GiB: {'yes' if fits else 'NO'}: the update takes {show(peak)}, the rollout"
        f" {show(between + share)}{told}, CUDA itself about 1 GiB (arithmetic, not a measurement)"
    )
    return fits
