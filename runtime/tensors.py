"""
Tensors in safetensors files and over ranks: find a tensor's file, read this rank's rows of it, gather whole tensors.
"""

import os

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from runtime.files import load_config, read_index, weight_files


def tensor_files(folder):
    """{tensor name: file} of a model's safetensors files; empty if its weights are in another format. Only headers are
    read. Raises OSError unless the files are whole, and agree with the index, if there is one, and on a tied head."""
    names = weight_files(folder)
    files = tensors_in([os.path.join(folder, name) for name in names if name.endswith(".safetensors")])
    for index in [name for name in names if name.endswith(".safetensors.index.json")]:
        wanted, found = read_index(folder, index), {tensor: os.path.basename(file) for tensor, file in files.items()}
        for tensor in sorted(wanted.keys() | found.keys()):
            if wanted.get(tensor) != found.get(tensor):
                there, by = found.get(tensor, "no file"), wanted.get(tensor, "no file")
                raise OSError(f"{tensor} is in {there}, and in {by} by {index}: use files of one model")
    embedding, head = (files.get(f"{name}.weight") for name in ("model.embed_tokens", "lm_head"))
    if embedding and head and load_config(folder).tie_word_embeddings:
        with safe_open(embedding, "pt") as a, safe_open(head, "pt") as b:
            if not torch.equal(a.get_tensor("model.embed_tokens.weight"), b.get_tensor("lm_head.weight")):
                # transformers would use this head, vLLM and a sharded policy the embedding
                raise OSError("the weights have a head of their own: set tie_word_embeddings to false in config.json")
    return files


def tensors_in(paths):
    """{tensor name: file} of safetensors files. Raises OSError for one that does not open, and for a tensor in two."""
    files = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as f:
                names = list(f.keys())
        except (OSError, SafetensorError) as e:
            raise OSError(f"{os.path.basename(path)} is no whole safetensors file ({str(e)[:100]}): copy it again") from None
        if twice := [name for name in names if name in files]:
            both = " and in ".join(os.path.basename(file) for file in (files[twice[0]], path))
            raise OSError(f"{twice[0]} is in {both}: use files of one model")
        files |= dict.fromkeys(names, path)
    return files


def load_whole(model, **options):
    """A Hugging Face causal LM with the weights of a folder or hub name. Raises OSError unless they are the config's."""
    if os.path.isdir(model):
        tensor_files(model)
    hf, found = AutoModelForCausalLM.from_pretrained(
        model, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
    )
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise OSError(f"its weights lack {len(missing)} tensor(s), {missing[0]} among them")
    for name, there, wanted in sorted(found["mismatched_keys"]):  # and these
        raise misshapen(name, there, wanted)
    return hf


def misshapen(name, there, wanted):
    return OSError(f"{name} is {list(there)} in the file, {list(wanted)} by config.json: use files of one model")


@torch.no_grad()
def read_rows_of(path, name, tensor):
    """Fill a tensor from a safetensors file; if FSDP2 shards it, only this rank's rows. Returns the tensor. Raises OSError
    for another shape."""
    with safe_open(path, "pt") as f:
        rows, local, start = f.get_slice(name), tensor, 0
        if rows.get_shape() != list(tensor.shape):  # copy_ would repeat or cut rows
            raise misshapen(name, rows.get_shape(), tensor.shape)
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
