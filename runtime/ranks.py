"""
The processes that torchrun started, and what they exchange. Without torchrun there is one process, and nothing is sent.
"""

import contextlib
import glob
import hashlib
import ipaddress
import json
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

from configurator import ROOT, UserError, provenance
from runtime.process import die_with_parent


def number(name, default):
    """A variable of the environment as a number; the default if it is none, which start_processes() refuses."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


RANK, WORLD = number("RANK", 0), max(1, number("WORLD_SIZE", 1))
LOCAL_RANK, MACHINES = number("LOCAL_RANK", 0), number("GROUP_WORLD_SIZE", 1)
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it tells every process
ROLL_CALL = 300.0  # seconds that a rank waits for those of other machines to start


def start_processes(device, shard, knobs):
    """Join torchrun's process group. Call it before an engine starts, which would make a group of its own. knobs: all of
    them, {name: value}; several machines must have the same ones. Raises UserError, see roll_call(), and if the environment
    has only some of TORCHRUN, or values that torchrun does not set."""
    found, missing = ([n for n in TORCHRUN[:3] if n in os.environ], [n for n in TORCHRUN if n not in os.environ])
    remedy = f"unset {' '.join(found)}, or start by torchrun"
    if found and missing:
        raise UserError(f"{found[0]} is set in the environment, but {missing[0]} is not: {remedy}")
    for name in [n for n in TORCHRUN if found and n != "MASTER_ADDR"]:
        if not os.environ[name].isdecimal():
            raise UserError(f"{name} is {os.environ[name]!r} in the environment, which is no number: {remedy}")
    if found and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):  # the others would wait for rank 0, 1, ...
        raise UserError(f"RANK={RANK} in the environment must be below WORLD_SIZE={os.environ['WORLD_SIZE']}: {remedy}")
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        die_with_parent()  # torchrun ends its ranks, unless it is killed itself
        if MACHINES > 1:
            roll_call(knobs)
        if device == "cuda":
            if torch.cuda.device_count() <= int(os.environ["LOCAL_RANK"]):
                raise UserError(
                    f"each process needs its own GPU, and this machine has {torch.cuda.device_count()}: start as many"
                )
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    elif shard == "fsdp":  # FSDP needs a process group even for one process
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def roll_call(knobs):
    """Meet the ranks of the other machines at torchrun's store, before anything else is exchanged. Raises UserError, on
    every rank the same, if one does not come, cannot be reached, or has other knobs, code or packages."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"roll call {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    packages = {name: version for name, version in provenance().items() if name not in ("git", "edited", "python")}
    here = [socket.gethostname(), can_be_reached(), {**knobs, **source(), **packages}]
    found = [json.loads(text) for text in meet(store, "start", json.dumps(here))]
    with contextlib.suppress(UserError, RuntimeError):  # who leaves with an error may take the store along: all must have read
        meet(store, "read", "")
    hidden = [host for host, reached, _ in found if not reached]
    if hidden and len({host for host, *_ in found}) > 1:
        raise UserError(f"the name {hidden[0]} is the loopback or nothing on that machine (/etc/hosts), so the others cannot"
                        " reach it: set GLOO_SOCKET_IFNAME=INTERFACE on every machine (such as eth0)")  # fmt: skip
    compare([(host, values) for host, _, values in found])


def meet(store, name, text):
    """Leave a text in the store, and wait for those of all ranks: a list. Raises UserError for a rank that does not come."""
    store.set(f"{name}/{RANK}", text)
    end = time.monotonic() + ROLL_CALL
    while missing := [rank for rank in range(WORLD) if not store.check([f"{name}/{rank}"])]:
        if time.monotonic() > end:
            raise UserError(f"rank {missing[0]} did not start within {ROLL_CALL:g} s: see what its machine printed")
        time.sleep(0.2)
    return store.multi_get([f"{name}/{rank}" for rank in range(WORLD)])


def can_be_reached():
    """Whether other machines reach the address where gloo listens: the first of this machine's own name that is here."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return True
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as s:
                s.bind(address)
                return not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    return False


def source():
    """{file: digest} of the code that trains and evaluates."""
    found = {}
    for path in sorted(glob.glob("*.py", root_dir=ROOT) + glob.glob("runtime/*.py", root_dir=ROOT)):
        with open(os.path.join(ROOT, path), "rb") as f:
            found[path] = f"sha256 {hashlib.file_digest(f, 'sha256').hexdigest()[:8]}"
    return found


def compare(found):
    """found: of each rank, its machine's name and {what: value}. Raises UserError for the first value that is not rank 0's."""
    home, first = found[0]
    for host, values in found:
        for name, value in values.items():
            if value != first.get(name):
                there, here = (repr(v) if len(repr(v)) < 60 else f"{repr(v)[:60]}..." for v in (value, first.get(name)))
                raise UserError(f"{name} is {there} on {host}, but {here} on {home}: several machines need the same knobs,"
                                " code, packages and files")  # fmt: skip


def check_same_on_machines(values):
    """Raise UserError if {what: value} differs between machines. A collective; only each machine's first rank is asked."""
    compare(all_ranks((socket.gethostname(), values if LOCAL_RANK == 0 else {})))


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


def agreed(item, what):
    """`item`, which must be the same on all ranks. Otherwise raises UserError, which names it by `what`."""
    if any(other != item for other in all_ranks(item)):
        raise UserError(f"{what} is not the same on all ranks: did it change while they started? Start again")
    return item


def gather(items):
    """The lists of all ranks as one list, the same on every rank."""
    return [x for part in all_ranks(items) for x in part]


def mine(items, tensor_parallel=1):
    """The share of a list that this rank's engine works on. tensor_parallel consecutive ranks share one engine."""
    return items[RANK // tensor_parallel :: WORLD // tensor_parallel]


def gather_engines(items, tensor_parallel=1):
    """gather() from one rank of each engine: the ranks that share an engine hold the same list."""
    return gather(items if RANK % tensor_parallel == 0 else [])
