"""
The plan's forecast of memory beside what the real forward and backward passes would hold, counted with fake tensors: any
shape, on a laptop, in a minute. bfloat16 autocast, activation checkpointing, no sharding, two micro-batches.

    python measure/track_memory.py 1.5b 32768
    python measure/track_memory.py 0.5b 16384

SDPA stands in for an attention kernel that keeps no scores.
"""

import os
import sys
import weakref
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AttentionInterface, AutoModelForCausalLM

import bench
import model
from runtime.plan import count_parameters, show, training_memory


class Storages(TorchDispatchMode):
    """Counts the bytes of all live storages."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor):
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata in self.alive:
            return
        self.alive.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key, n_bytes):
        self.alive.discard(key)
        self.now -= n_bytes


def attention(module, q, k, v, mask, scaling=None, packing=None, **kwargs):
    q, k, v = (x.to(v.dtype) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2), None


bench.size, tokens = sys.argv[1], int(sys.argv[2])
config = bench.model_config()
AttentionInterface.register("counted", attention)
# As on a GPU: chunks of the same size, and compiled kernels, which hold nothing between logits and results.
model.chunk_of = lambda hidden, weight: model.HEAD_CHUNK
model.statistics = lambda logits, targets: [torch.empty(len(logits), n) for n in (1, targets.size(1), 1)]
model.to_slope = lambda logits, *rest: None
with FakeTensorMode(allow_non_fake_inputs=True):
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="counted", dtype=torch.float32)
    policy = model.Policy(hf, 1.0, torch.bfloat16)
    model.recompute_layers(policy)
    rows = torch.arange(1, tokens)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    packing = {"computed": None, "where": None, "response": rows, "before": rows - 1}
    batch = SimpleNamespace(input_ids=ids, position_ids=ids, top1=None, packing=packing)
    with Storages() as storages:
        for p in policy.parameters():
            storages.add(p.untyped_storage())
        storages.now += 8 * count_parameters(config).all  # Adam's two moments
        for i in range(2):
            logp, entropy = policy(batch)
            (logp.sum() - entropy.sum()).backward()
            del logp, entropy
            print(f"{sys.argv[1]}, {tokens} tokens, micro-batch {i + 1}: peak {show(storages.peak)}", flush=True)
items = training_memory(config, tokens, n_gpus=1, shard=False, compute_bytes=2, recompute=True)
forecast = sum(items.values())
print(f"the plan forecasts {show(forecast)}, {forecast / storages.peak:.3f} of it")
