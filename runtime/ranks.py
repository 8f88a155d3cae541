"""
The processes that torchrun started, and what they exchange. Without torchrun there is one process, and nothing is sent.
"""

import os
import sys

import torch
import torch.distributed as dist

from runtime.process import die_with_parent

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(device, shard):
    """Join torchrun's process group. Call it before an engine starts, which would make a group of its own."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        die_with_parent()  # torchrun ends its ranks, unless it is killed itself
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    elif shard == "fsdp":  # FSDP needs a process group even for one process
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def end_processes(shard):
    """Leave the process group together: no rank ends while another still needs it. The engine's close() may have
    destroyed the group already."""
    if dist.is_initialized() and ("RANK" in os.environ or shard == "fsdp"):  # otherwise the group is vLLM's own
        barrier()
        dist.destroy_process_group()


def leave(code, tensor_parallel):
    """End this process with an exit code, as the last call of a script."""
    # gloo's threads may still hold tensors, and then abort the process while its interpreter shuts down, so skip the
    # shutdown. Not with a tensor-parallel engine on CPUs: vLLM removes its shared memory only in an orderly exit, and
    # memory that stays is worse than an abort.
    if WORLD > 1 and tensor_parallel == 1:
        sys.stdout.flush()
        os._exit(code or 0)
    sys.exit(code)


def print0(*args):
    """Print on rank 0, at once."""
    if RANK == 0:
        print(*args, flush=True)


def barrier():
    """Wait until every rank is here."""
    if WORLD > 1:
        dist.barrier()


def all_reduce(values, op=dist.ReduceOp.SUM):
    """A list of numbers, reduced over the ranks in float64."""
    if WORLD == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return tensor.tolist()


def all_ranks(item):
    """Every rank's item, in a list, on every rank."""
    found = [item] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, item)
    return found


def gather(items):
    """The lists of all ranks as one list, the same on every rank."""
    return [x for part in all_ranks(items) for x in part]


def mine(items, tensor_parallel=1):
    """The share of a list that this rank's engine works on. tensor_parallel consecutive ranks share one engine."""
    return items[RANK // tensor_parallel :: WORLD // tensor_parallel]


def gather_engines(items, tensor_parallel=1):
    """gather() from one rank of each engine: the ranks that share an engine hold the same list."""
    return gather(items if RANK % tensor_parallel == 0 else [])
