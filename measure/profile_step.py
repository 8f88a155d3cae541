"""
Where the time of a step goes at one of the shapes of `bench.py peers`: torch's profiler over decoding and update, by kind of
operation.

    OMP_NUM_THREADS=2 python measure/profile_step.py [SHAPE]          the default is 25m-256
"""

import os
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch.profiler import ProfilerActivity, profile

from bench import seconds as seconds_of
from data import Rollout, pack
from loss import batch_loss
from measure.peers.compare import SHAPES, build
from model import load_policy
from rollout import TorchSampler

KINDS = {  # an operation is of the first kind with a word that its name contains
    "matrix products": "::mm addmm bmm linear_pointwise".split(),
    "attention": ["attention"],
    "elementwise": "mul add sub div exp log pow silu neg sqrt norm mean sum softmax lerp adam".split(),
    "copies": "copy cat index fill zero gather scatter roll clone".split(),
}


def by_kind(function):
    """Run it. Returns {kind: its share of the time spent in operations}, and the seconds of a run without the profiler."""
    function()
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    times = dict.fromkeys([*KINDS, "the rest"], 0)
    for event in found.key_averages():
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), "the rest")
        times[kind] += event.self_cpu_time_total
    return {kind: t / sum(times.values()) for kind, t in times.items()}, seconds


def main(shape="25m-256"):
    _, n_prompts, group, tokens, *_ = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        model = build(folder, shape)["model"]
        policy, sampler = load_policy(model), TorchSampler(model, [], tokens + 16)
    vocabulary, g = policy.hf.config.vocab_size, torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, vocabulary, (16,), generator=g).tolist() for _ in range(n_prompts)]
    prompts = [p for p in prompts for _ in range(group)]
    sampler.load(policy.hf, 0)
    decode = lambda: sampler.generate(prompts, list(range(len(prompts))), 1.0, tokens, 0)
    batch = pack([Rollout(0, p, s.ids, sampler_logps=s.logps, advantage=0.5) for p, s in zip(prompts, decode(), strict=True)])
    n_tokens = batch.loss_mask.sum().item()
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)

    def update():
        logp, entropy = policy(batch)
        batch_loss(logp, entropy, None, batch, (n_tokens, 0, n_tokens, 0), loss_constant=1e4).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    a, b = torch.randn(2048, 512), torch.randn(1280, 512)
    packed, vector, n = torch.ops.mkldnn._reorder_linear_weight(b), torch.randn(10**8), 2 * 2048 * 512 * 1280
    rate = lambda function, amount: amount / seconds_of(function, "cpu", 50) / 1e9
    product, by_onednn = lambda: a @ b.T, lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
    print(f"{shape}, {torch.get_num_threads()} thread(s); 2048 x 512 x 1280 at {rate(product, n):.0f} GFLOP/s, by oneDNN at"
          f" {rate(by_onednn, n):.0f}; memory read at {rate(lambda: vector @ vector, 4 * 10**8):.0f} GB/s")  # fmt: skip
    for name, function in (("decoding", decode), ("update", update)):
        shares, seconds = by_kind(function)
        print(f"{name} {seconds:.2f} s: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
