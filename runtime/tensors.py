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


def own_rows(tensor):
    """(this rank's rows of a tensor, the first one's number); all rows, and 0, unless FSDP2 shards it."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    size = -(-tensor.size(0) // dist.get_world_size())  # FSDP2 cuts dim 0 as torch.chunk does
    return tensor.to_local(), min(tensor.size(0), dist.get_rank() * size)


@torch.no_grad()
def read_rows_of(path, name, tensor):
    """Fill a tensor from a safetensors file; if FSDP2 shards it, only this rank's rows. Returns the tensor. Raises OSError
    for another shape."""
    local, start = own_rows(tensor)
    with safe_open(path, "pt") as f:
        rows = f.get_slice(name)
        if rows.get_shape() != list(tensor.shape):  # copy_ would repeat or cut rows
            raise misshapen(name, rows.get_shape(), tensor.shape)
        local.copy_(rows[start : start + local.size(0)])
    return tensor


# transformers stacks the experts of a layer into one tensor; files have each by itself (its conversion_mapping.py, qwen2_moe).
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@torch.no_grad()
def read_parameter(files, name, tensor):
    """Fill a model's parameter from {tensor name: file}, as read_rows_of does. The experts of a mixture, (experts, rows,
    columns), are read one by one if the files have them so. Raises OSError if a tensor is missing or has another shape."""
    experts, _, kind = name.rpartition(".")
    if name in files or not experts.endswith(".experts") or kind not in STACKED:
        if name not in files:
            renamed = ": files of this kind of model have other names, which only unsharded loading knows (--shard=ddp)"
            raise OSError(f"its weights lack {name}{renamed if '.experts.' in ' '.join(files) else ''}")
        read_rows_of(files[name], name, tensor)
        return
    local, first = own_rows(tensor)
    for i, whole in enumerate(local, start=first):
        for part, rows in zip(STACKED[kind], whole.chunk(len(STACKED[kind])), strict=True):
            one = f"{experts}.{i}.{part}.weight"
            if one not in files:
                raise OSError(f"its weights lack {one}")
            read_rows_of(files[one], one, rows)


def whole_tensors(named, dtype=None):
    """Yield (name, whole tensor) for (name, tensor) pairs, one at a time and in the same order on every rank: a
    collective under FSDP. Tensors are cast to dtype, if given, before they are gathered."""
    for name, t in named:
        t = t.detach() if dtype is None else t.detach().to(dtype)
        yield name, t.full_tensor() if isinstance(t, DTensor) else t
