"""
Tensors in safetensors files and over ranks: find a tensor's file, read this rank's rows of it, gather whole tensors.
"""

import glob
import os

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor


def tensor_files(folder, names="*"):
    """{tensor name: file} of the safetensors files in a local folder. names: a glob for the files' names, without the
    ending."""
    files = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), names + ".safetensors"))):
        with safe_open(path, "pt") as f:
            files |= dict.fromkeys(f.keys(), path)
    return files


@torch.no_grad()
def read_rows_of(path, name, tensor):
    """Fill a tensor from a safetensors file; if FSDP2 shards it, only this rank's rows. Returns the tensor."""
    with safe_open(path, "pt") as f:
        rows, local, start = f.get_slice(name), tensor, 0
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            size = -(-tensor.size(0) // dist.get_world_size())  # FSDP2 cuts dim 0 as torch.chunk does
            start = min(tensor.size(0), dist.get_rank() * size)
        local.copy_(rows[start : start + local.size(0)])
    return tensor


def whole_tensors(named, dtype=None):
    """Yield (name, whole tensor) for (name, tensor) pairs, one at a time and in the same order on every rank: a
    collective under FSDP. Tensors are cast to dtype, if given, before they are gathered."""
    for name, t in named:
        t = t.detach() if dtype is None else t.detach().to(dtype)
        yield name, t.full_tensor() if isinstance(t, DTensor) else t
