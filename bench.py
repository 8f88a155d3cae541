"""
Measure speed and memory of update, attention backends, head, weight sync and rollout, for a model shape with random weights.

    python bench.py                                                    a tiny shape, on a CPU
    python bench.py --size=1.5b --tokens=32768 --shortest=2048 --longest=8192    one GPU
    python bench.py peers --trl=trl/bin/python                         compare a step with TRL's (measure/peers/)
    torchrun --nproc_per_node=8 bench.py --size=7b --shard=fsdp --tokens=32768 --shortest=2048 --longest=8192

MFU is the model's FLOP/s (6 FLOPs per weight and token; attention and head are included, recomputation is not)
over the FLOP/s of a matrix product, measured in the same run; and, for comparison with others' figures, over what the card's
datasheet promises. HFU includes recomputation in backward. Where liger-kernel is installed, its fused linear cross-entropy,
which has no entropy, is measured beside our head on a GPU.
"""

import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial

from runtime.process import begin

if __name__ == "__main__":
    begin()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch loads; see README, Troubleshooting

# ---------------------------------------------------------------- what to measure
size = "tiny"  # the model's shape; the last three are Qwen2.5's [tiny | toy | 0.5b | 1.5b | 7b]
tokens = 2048  # packed tokens per micro-batch; an update has two, so that gradients exist when activations peak [> 0]
shortest = 64  # tokens of the shortest sequence [> 0]
longest = 256  # tokens of the longest sequence [> 0]
recompute = True  # activation checkpointing
compile = "auto"  # decoder layers, by torch.compile; auto: a GPU and 100 M parameters [auto | yes | no]
shard = "none"  # none: one process; fsdp: FSDP2 over all processes, also over one; each has its own tokens [none | fsdp]
repeats = 5  # timed updates, after one untimed update [> 0]
syncs = 5  # weight reloads into the engine; 0 skips the engine
rollout_prompts = "32"  # samples to generate at once; comma-separated, each is measured
rollout_tokens = 64  # tokens of each sample [> 0]
device = "auto"  # the GPU if there is one, and vLLM is not the one for CPUs [auto | cpu | cuda]
dtype = "auto"  # of matrix products; auto is bfloat16 on a GPU, else float32 [auto | float32 | bfloat16]
sampler = "auto"  # auto: vllm where it is installed [auto | vllm | torch]
gpu_memory = 0.4  # share of the GPU's memory that vLLM may take [> 0]
out = ""  # a file to append the result to, as a line of JSON

from configurator import UserError, configure, provenance, repo_path, run

if __name__ == "__main__":
    if sys.argv[1:2] == ["peers"]:
        from measure.peers.compare import main

        sys.exit(run(lambda: main(sys.argv[2:])))
    config = run(lambda: configure(globals(), sys.argv[1:], __file__))

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from data import Rollout, pack
from loss import batch_loss
from model import Head, Policy, attention_backends, compile_layers, recompute_layers, shard_policy, use_flash_kernel
from rollout import choose_sampler, open_sampler, pick_device
from runtime.files import make_folder
from runtime.plan import count_parameters, measured_memory, show, training_memory, worth_compiling
from runtime.ranks import RANK, WORLD, barrier, print0, start_processes

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied head
SHAPES = {
    "tiny": (256, 1024, 4, 4, 2, 4096, False),
    "toy": (64, 128, 3, 2, 2, 32, False),
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
}
# Dense bf16 TFLOP/s of the datasheets, by a part of the name that CUDA gives a card; the first match counts.
DATASHEET = {"H200 NVL": 835.5, "H100 NVL": 835.5, "H100 PCIe": 756, "H200": 989.5, "H100": 989.5, "H800": 989.5, "A100": 312,
             "A800": 312, "L40S": 362}  # fmt: skip


def model_config(shape):
    d, f, layers, heads, kv_heads, vocabulary, tied = shape
    return Qwen2Config(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip


def samples_at_once():
    """The numbers in the knob rollout_prompts."""
    try:
        found = [int(n) for n in rollout_prompts.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UserError(f"rollout_prompts={rollout_prompts!r}: write numbers above zero, such as 32 or 1,32,256")
    return found


def check_knobs():
    samples_at_once()
    if shortest > longest or min(shortest, tokens) < 32:
        raise UserError(f"shortest={shortest}, longest={longest}, tokens={tokens}: take 32 or more, and shortest <= longest")
    if WORLD > 1 and shard == "none":
        raise UserError(f"shard='none' is for one process, and torchrun started {WORLD}: set shard=fsdp")
    choose_sampler(sampler)
    if out:
        make_folder(os.path.dirname(repo_path(out)))


def sequences(vocabulary):
    """Random sequences with `tokens` tokens in total. Their lengths are uniform from shortest to longest; a sixteenth
    of each is its prompt."""
    lengths, g = [], torch.Generator().manual_seed(0)
    while sum(lengths) < tokens:
        lengths.append(int(torch.randint(shortest, longest + 1, (), generator=g)))
    lengths[-1] -= sum(lengths) - tokens
    if lengths[-1] < 32:  # too short to be a sequence: add it to the one before
        lengths[-2:] = [sum(lengths[-2:])] if len(lengths) > 1 else lengths
    rollouts = []
    for n in lengths:
        ids = torch.randint(2, vocabulary, (n,), generator=g).tolist()
        prompt = max(1, n // 16)
        rollouts.append(Rollout(0, ids[:prompt], ids[prompt:], sampler_logps=[0.0] * (n - prompt), advantage=0.5))
    return rollouts


def flops(c, lengths, n_response, with_recomputation):
    """FLOPs of forward and backward over packed sequences, with or without what backward computes again."""
    n, n_embedding, *_ = count_parameters(c)
    body = n - n_embedding * (1 if c.tie_word_embeddings else 2)  # an embedding lookup is no matrix product
    attention = sum(4 * (length / 2) * length * c.hidden_size for length in lengths) * c.num_hidden_layers  # forward, causal
    forward = 2 * body * sum(lengths) + attention
    head = 2 * c.vocab_size * c.hidden_size * n_response
    return 3 * (forward + head) + (forward * recompute + head) * with_recomputation


def datasheet_rate(machine, dtype):
    """FLOP/s that a card's datasheet promises; None for a card that is not in DATASHEET, a part of a card, or fp32."""
    if dtype != torch.bfloat16 or "MIG" in machine:
        return None
    return next((1e12 * rate for name, rate in DATASHEET.items() if name in machine), None)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device, n):
    """Median seconds of n calls, after one uncounted call."""
    times = []
    for _ in range(n + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[n // 2]


def measure_matrix_product(c, device, dtype):
    """FLOP/s of (tokens, d) x (d, 4d), forward only, in the dtype the update runs in."""
    a = torch.randn(tokens, c.hidden_size, device=device, dtype=dtype)
    b = torch.randn(c.hidden_size, 4 * c.hidden_size, device=device, dtype=dtype)
    calls = 20
    t = seconds(lambda: [a @ b for _ in range(calls)], device, repeats) / calls
    return 2 * tokens * c.hidden_size * 4 * c.hidden_size / t, [tokens, c.hidden_size, 4 * c.hidden_size]


def measure_update(c, policy, backend, device):
    """Seconds and peak bytes of one optimizer step: forward, backward, clip, AdamW."""
    policy.hf.set_attn_implementation(backend)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
    rollouts = sequences(c.vocab_size)
    batch = pack(rollouts).to(device)
    n = batch.loss_mask.sum().item()

    def step():
        optimizer.zero_grad()
        for _ in range(2):
            logp, entropy = policy(batch)
            batch_loss(logp, entropy, None, batch, (2 * n, 0, 2 * n, 0), entropy_coef=0.005, loss_constant=65536.0).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

    measured_memory()
    t = seconds(step, device, repeats)
    peak = measured_memory()[0] if device == "cuda" else None  # a CPU process holds much else
    return t, peak, [len(r.prompt_ids) + len(r.response_ids) for r in rollouts], n


def measure_head(c, device, dtype):
    """{name: [seconds, bytes]} of forward and backward of the head alone over `tokens` hidden states. The bytes are those above
    what hidden states, weight and their gradients take; None on a CPU. The weight is in fp32, as under autocast."""
    hidden = torch.randn(tokens, c.hidden_size, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(c.vocab_size, c.hidden_size, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(c.vocab_size, (tokens,), device=device)

    def ours():
        found = Head.apply(hidden, weight, targets[:, None])
        return -found[:, 0].mean() - 0.005 * found[:, 1].mean()

    heads = {"ours": ours}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        heads["liger"] = lambda: LigerFusedLinearCrossEntropyLoss()(weight.to(dtype), hidden, targets)

    def once(head):
        hidden.grad = weight.grad = None
        head().backward()

    found = {}
    for name, head in heads.items():
        once(head)
        measured_memory()
        start, _ = measured_memory()  # a peak over no time: what is in use
        t = seconds(partial(once, head), device, repeats)
        found[name] = [t, measured_memory()[0] - start if device == "cuda" else None]
    return found


def measure_engine(c, policy, dtype):
    """Measure weight syncs into the engine (seconds, temporary memory, memory that stays), and rollouts by it."""
    prompts = [[2 + i % 29] * 16 for i in range(max(samples_at_once()))]
    folder = os.path.join(tempfile.gettempdir(), f"bench_{size}_{os.environ.get('MASTER_PORT', os.getpid())}")
    try:
        if RANK == 0:  # the torch sampler reads only the config: load() brings its weights
            vllm = choose_sampler(sampler) == "vllm"
            (AutoModelForCausalLM.from_config(c, dtype=dtype) if vllm else c).save_pretrained(folder)
        barrier()
        name = str(dtype).removeprefix("torch.")
        engine = open_sampler(folder, [1], 16 + rollout_tokens, sampler=sampler, dtype=name, gpu_memory=gpu_memory)
        barrier()  # every rank has read the folder
    finally:
        if RANK == 0:
            shutil.rmtree(folder, ignore_errors=True)
    engine.load(policy.hf, 0)  # the first allocates what later ones reuse
    times, after, passing = [], [], 0
    for i in range(1, syncs + 1):
        _, now = measured_memory()
        allocated = torch.cuda.memory_allocated() if torch.cuda.is_available() else now
        start = time.perf_counter()
        engine.load(policy.hf, i)
        synchronize(policy.hf.device.type)
        times.append(time.perf_counter() - start)
        peak, now = measured_memory()
        passing, after = max(passing, peak - allocated), [*after, now]
    # Single readings of resident memory fluctuate with the allocator: compare the medians of the two halves.
    growth = statistics.median(after[len(after) // 2 :]) - statistics.median(after[: max(1, len(after) // 2)])
    rates = {}
    for n in samples_at_once():
        generate = partial(engine.generate, prompts[:n], list(range(n)), 1.0, rollout_tokens, syncs)
        generate()
        start = time.perf_counter()
        total = sum(len(s.ids) for s in generate())
        rates[n] = total / (time.perf_counter() - start)
    engine.close()
    _, n_embedding, n_layer, _ = count_parameters(c)
    return {"engine": type(engine).__name__, "sync_s": statistics.median(times), "syncs": syncs,
            "sync_growth_mib": growth / 2**20, "sync_passing_mib": passing / 2**20,
            "largest_module_mib": max(n_embedding, n_layer) * dtype.itemsize / 2**20,
            "rollout_tokens_per_s": rates}  # fmt: skip


def main():
    device, precision = pick_device(config["device"], config["dtype"])
    dtype = getattr(torch, precision)
    c = model_config(SHAPES[size])
    check_knobs()
    start_processes(device, shard, config)
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(c, attn_implementation="packed_sdpa", dtype=torch.float32)
    policy = shard_policy(Policy(hf), dtype) if shard == "fsdp" else Policy(hf, 1.0, dtype)
    if recompute:
        recompute_layers(policy)
    compiled = worth_compiling(compile, c)
    if compiled:
        compile_layers(hf)
    rate, shape = measure_matrix_product(c, device, dtype)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    product = " x ".join(map(str, shape))
    promised = datasheet_rate(machine, dtype)
    beside = f" ({promised / 1e12:.1f} in the card's datasheet)" if promised else ""
    speed = f"{rate / 1e12:.3f} TFLOP/s" if rate > 1e12 else f"{rate / 1e9:.1f} GFLOP/s"
    print0(f"{machine}, {str(dtype).removeprefix('torch.')}: matrix product {product} at {speed}{beside}")
    result = {"size": size, "tokens": tokens, "machine": machine, "ranks": WORLD, "shard": shard, "recompute": recompute,
              "compiled": compiled, "matrix_flops": rate, "datasheet_flops": promised, "update": {}}  # fmt: skip
    forecast = training_memory(
        c, tokens, n_gpus=WORLD, shard=shard == "fsdp", compute_bytes=dtype.itemsize, recompute=recompute
    )
    forecast = sum(forecast.values())
    print0(
        f"{size}: {count_parameters(c).all / 1e6:.1f} M parameters, {WORLD} rank(s), shard={shard}; the plan forecasts"
        f" {show(forecast)} per rank at the update's peak"
    )
    for backend in attention_backends(device, dtype):
        kernel = f" ({use_flash_kernel('auto')})" if backend == "packed_varlen" else ""
        t, peak, lengths, n = measure_update(c, policy, backend, device)
        mfu, hfu = (2 * flops(c, lengths, n, with_recomputation) / t / rate for with_recomputation in (False, True))
        of_datasheet = f" ({mfu * rate / promised:.1%} of the datasheet's)" if promised else ""
        row = {
            "tokens_per_s": 2 * tokens / t,
            "mfu": mfu,
            "hfu": hfu,
            "seconds": t,
            "peak_bytes": peak,
            "sequences": len(lengths),
        }
        result["update"][backend] = row
        memory = f"{show(peak)} ({peak / forecast:.2f} of the forecast)" if peak else "not measured on a CPU"
        print0(
            f"update, {backend}{kernel}: {t:.3f} s, {2 * tokens / t:.0f} tokens/s per rank, MFU {mfu:.1%}{of_datasheet},"
            f" HFU {hfu:.1%}, peak {memory}"
        )
    policy.zero_grad()
    result["head"] = measure_head(c, device, dtype)
    for name, (t, n_bytes) in result["head"].items():
        memory = f"{show(n_bytes)} above the start" if n_bytes is not None else "memory not measured on a CPU"
        print0(f"head, {name}: {tokens} x {c.hidden_size} x {c.vocab_size} in {1000 * t:.1f} ms, {memory}")
    if syncs:
        r = measure_engine(c, policy, dtype)
        result |= r
        share = r["sync_passing_mib"] / r["largest_module_mib"]
        rates = ", ".join(f"{rate:.0f} tokens/s of {n} at once" for n, rate in r["rollout_tokens_per_s"].items())
        print0(f"{r['engine']}: rollout {rates}; weight sync {r['sync_s']:.3f} s")
        print0(
            f"memory of a sync: {r['sync_passing_mib']:.1f} MiB for a moment, {share:.2f} of the largest module;"
            f" {r['sync_growth_mib']:+.1f} MiB from the first half to the last half of {syncs} syncs"
        )
    if out and RANK == 0:
        with open(repo_path(out), "a") as f:
            f.write(json.dumps({**result, **provenance()}) + "\n")


if __name__ == "__main__":
    run(main)
