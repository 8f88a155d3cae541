"""
Checkpoints: what a run needs to continue, written whole or not at all.

    out_dir/ckpt_N/          the policy in Hugging Face format, fp32; transformers and vLLM load it as it is
    out_dir/ckpt_N/state/    the rest: AdamW's moments, the memory of ReLIFT or ExGRPO, and run.json: step, order, knobs,
                             and the SHA-256 of every file. Without state/ the folder is a plain Hugging Face model
    out_dir/latest           a link to the newest checkpoint

Tensors are written whole, in safetensors, and the ranks share the writing, so any number of ranks can read them, under
any sharding. No file is a pickle, unlike those of torch.distributed.checkpoint. Several machines need a common folder
(OutputFolder checks that they have one).
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import UserError, first_line
from data import partition
from runtime.files import fingerprint, model_files, partial_name, read_run
from runtime.plan import show
from runtime.ranks import RANK, WORLD, all_ranks, print0
from runtime.tensors import read_rows_of, tensors_in, whole_tensors

FORMAT = 3  # of run.json; older ones name no format
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
NAME = "ckpt_(0|[1-9][0-9]*)"  # a checkpoint's
REPLACED = ".old.partial"  # what is added to the name of a checkpoint that is being replaced
FILE = 2 << 30  # about as many bytes of tensors per file; the ranks take turns in writing files


class NotSaved(Exception):
    """Writing failed. Nothing is left of the new checkpoint, and the older ones are untouched."""


def together(work, *arguments):
    """Call work on every rank. If writing failed on any, raise NotSaved on all. Returns what work returned."""
    result = error = None
    try:
        result = work(*arguments)
    except (OSError, SafetensorError) as e:
        error = f"{e.strerror}: {e.filename}" if isinstance(e, OSError) and e.filename else str(e)
    if errors := [e for e in all_ranks(error) if e]:
        raise NotSaved(errors[0])
    return result


def on_rank_0(work, *arguments):
    """together(), but only rank 0 calls work."""
    together(work if RANK == 0 else lambda *_: None, *arguments)


# ---------------------------------------------------------------- writing


def save(folder, step, policy, tokenizer, optimizers, memory, run, tick=lambda: None):
    """Write folder/ckpt_{step} and point folder/latest to it. All ranks call it.

    optimizers: {name: AdamW over policy's parameters}; memory: {name: tensor}, the same on every rank; run: what else
    run.json shall hold, in JSON's types. tick() is called after each tensor and file. Raises NotSaved.
    """
    final = os.path.join(folder, f"ckpt_{step}")
    partial = all_ranks(partial_name(final))[0]
    parameters = dict(policy.hf.named_parameters())
    tensors, optimizer_steps = {"model": parameters}, {}
    for name, optimizer in optimizers.items():
        optimizer_steps[name], moments = moments_of(optimizer, parameters)
        if moments:
            tensors[f"state/{name}"] = moments
    n_bytes = sum(t.numel() * t.element_size() for group in (*tensors.values(), memory) for t in group.values())
    try:
        on_rank_0(make_room, folder, partial, n_bytes)
        on_rank_0(write_small_files, partial, policy.hf, tokenizer, memory)
        for stem, group in tensors.items():
            together(write_shares, partial, gather_shares(stem, group, tick), tick)
        on_rank_0(write_index, partial)
        hashes = {path: found for part in all_ranks(together(flush_and_hash, partial, tick)) for path, found in part.items()}
        on_rank_0(write_run, partial, {**run, "optimizer_steps": optimizer_steps, "files": hashes})
        on_rank_0(publish, folder, partial, final)
        if RANK == 0:
            point_latest(folder, os.path.basename(final))
    except NotSaved as e:
        if RANK == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise NotSaved(f"{final} is not saved: {e}") from None


def moments_of(optimizer, parameters):
    """(steps taken, {"exp_avg.NAME": tensor, ...}) of an AdamW; (0, {}) before its first step."""
    states = {name: optimizer.state[p] for name, p in parameters.items() if p in optimizer.state}
    steps = int(next(iter(states.values()))["step"]) if states else 0
    return steps, {f"{m}.{name}": state[m] for m in MOMENTS for name, state in states.items()}


def make_room(folder, partial, n_bytes):
    """Remove what a kill left of earlier tries, check that n_bytes are free, and make the folder `partial`."""
    for left in [name for name in os.listdir(folder) if re.fullmatch(r"ckpt_[0-9]+(\.[0-9a-f]{8})?\.partial", name)]:
        shutil.rmtree(os.path.join(folder, left), ignore_errors=True)  # what cannot be removed is not in the way
    for step in steps_in(folder):
        drop_replaced(os.path.join(folder, f"ckpt_{step}"))
    usage = shutil.disk_usage(folder)
    if usage.total and n_bytes > (free := usage.free):  # some network file systems do not know
        raise OSError(f"it needs {show(n_bytes)}, {show(free)} are free, {show(n_bytes - free)} are missing")
    os.makedirs(os.path.join(partial, "state"))


def write_small_files(partial, hf, tokenizer, memory):
    """Write configs, tokenizer and memory: all but the tensors that the ranks share."""
    hf.config.save_pretrained(partial)
    hf.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if memory:
        write_tensors(partial, os.path.join("state", "memory.safetensors"), memory)


def write_tensors(partial, path, tensors):
    """Write a safetensors file. The library makes it readable for its owner only; it gets the mode of the other files."""
    save_file(tensors, os.path.join(partial, path), {"format": "pt"})
    with contextlib.suppress(OSError):  # a file system may have no modes
        shutil.copymode(os.path.join(partial, "config.json"), os.path.join(partial, path))


def write_shares(partial, shares, tick):
    """Write this rank's files: {path: {name: tensor}}."""
    for path, share in shares.items():
        write_tensors(partial, path, share)
        tick()


def write_index(partial):
    """Write what transformers and vLLM read if the model has several files."""
    paths = [os.path.join(partial, name) for name in os.listdir(partial) if name.endswith(".safetensors")]
    weight_map = {name: os.path.basename(path) for name, path in sorted(tensors_in(paths).items())}
    if len(set(weight_map.values())) > 1:
        with open(os.path.join(partial, "model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {}, "weight_map": weight_map}, f, indent=1)


def flush_and_hash(partial, tick):
    """Flush this rank's share of the files to disk. Returns {path: [bytes, SHA-256]}."""
    found = {}
    for path in files_below(partial)[RANK::WORLD]:
        to_disk(os.path.join(partial, path))
        found[path] = fingerprint(os.path.join(partial, path))
        tick()
    return found


def write_run(partial, run):
    """Write state/run.json: its SHA-256 in the first line, then the JSON."""
    path = os.path.join(partial, "state", "run.json")
    body = json.dumps({"format": FORMAT, **run}, indent=1, allow_nan=False)
    with open(path, "w") as f:
        f.write(hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
    for name in (path, os.path.dirname(path), partial):
        to_disk(name)


def publish(folder, partial, final):
    """Give the whole checkpoint its name. One of the same step, saved before its evaluation, stays until then: find() knows
    its other name, too."""
    again = is_own(final)
    if again:
        os.rename(final, final + REPLACED)
    elif os.path.lexists(final):
        set_aside(final)
    try:
        os.rename(partial, final)
    except OSError:
        if again:
            os.rename(final + REPLACED, final)
        raise
    to_disk(folder)
    drop_replaced(final)


def drop_replaced(final):
    """Remove the checkpoint that `final` replaced, if there is one. With something in it that no run wrote, it is kept."""
    if not os.path.isdir(old := final + REPLACED):
        return
    if name := foreign_in(old):
        os.rename(old, aside := free_name(final))
        print0(f"warning: {final} was written again; the one before is now {aside}, because no run wrote the {name} in it")
    else:
        shutil.rmtree(old, ignore_errors=True)


def point_latest(folder, name):
    """Point folder/latest to a checkpoint. The link is for people: the run needs none. If it cannot be made, a warning."""
    link, latest = os.path.join(folder, "latest.partial"), os.path.join(folder, "latest")
    try:
        if os.path.lexists(latest) and not os.path.islink(latest):
            raise FileExistsError(errno.EEXIST, "it is there and no link")
        if os.path.islink(link):  # a kill left it
            os.remove(link)
        os.symlink(name, link)
        os.replace(link, latest)
        to_disk(folder)
    except OSError as e:
        print0(f"warning: {latest} does not point to {name} ({e.strerror}); the checkpoint itself is saved")


def gather_shares(stem, tensors, tick):
    """Divide {name: tensor} into files, gather whole tensors on all ranks, and keep those that this rank writes. Returns
    {path: {name: tensor}}. A collective under FSDP."""
    sizes = [t.numel() * t.element_size() for t in tensors.values()]
    files = partition(sizes, -(-sum(sizes) // FILE))
    file_of = {i: j for j, file in enumerate(files) for i in file}
    shares = {}
    for i, (name, whole) in enumerate(whole_tensors(tensors.items())):
        j = file_of[i]
        if j % WORLD == RANK:
            path = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{j + 1:05d}-of-{len(files):05d}.safetensors"
            shares.setdefault(path, {})[name] = whole.cpu().contiguous()
        tick()
    return shares


def files_below(folder):
    """All files in a folder and its subfolders, as sorted relative paths."""
    return sorted(os.path.relpath(os.path.join(d, f), folder) for d, _, files in os.walk(folder) for f in files)


def to_disk(path):
    """Flush a file, or a folder's entries, so that they survive a crash of the machine; where the file system can. Some
    cannot for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(handle)


def is_own(path):
    """Whether it is a checkpoint that a run wrote, and not a link, a file, or a plain model."""
    return os.path.isfile(os.path.join(path, "state", "run.json")) and not os.path.islink(path)


def foreign_in(path):
    """The first file or folder in a checkpoint that its run.json does not name, so that no run wrote it; None if there is none.
    If run.json cannot be read, every file may be somebody's."""
    run, _ = read_run(path)
    files = {os.path.join("state", "run.json"), *(run or {}).get("files", {})}
    own = files | {os.path.dirname(name) for name in files}
    below = (os.path.relpath(os.path.join(d, n), path) for d, folders, names in os.walk(path) for n in (*names, *folders))
    return min((name for name in below if name not in own), default=None)


def discard(path):
    """Remove a checkpoint, unless it holds something that no run wrote. It is renamed first, so that what a kill leaves of it
    is not taken for a checkpoint."""
    if name := foreign_in(path):
        return say_kept(path, name)
    os.rename(path, partial := partial_name(path))
    shutil.rmtree(partial)


@functools.cache  # once per folder: it is met again whenever checkpoints are pruned
def say_kept(path, name):
    print0(f"warning: {path} is not pruned, because no run wrote the {name} in it: move that away, or remove the folder")


def prune(folder, step, keep_last, keep_every):
    """Remove old checkpoints among those up to `step`: keep the newest keep_last (0 keeps all), and those whose step is a
    multiple of keep_every (0: none). What no run wrote is not touched."""
    path_of = lambda n: os.path.join(folder, f"ckpt_{n}")
    for old in sorted(n for n in steps_in(folder) if n <= step and is_own(path_of(n)))[:-keep_last] if keep_last else ():
        if not keep_every or old % keep_every:
            discard(path_of(old))


def put_aside(folder, step):
    """Rename the checkpoints after `step`, the one that the run continues from, to ckpt_N.damaged."""
    for n in steps_in(folder):
        if n > step:
            set_aside(os.path.join(folder, f"ckpt_{n}"))


def set_aside(path):
    """Rename it to free_name(path)."""
    os.rename(path, free_name(path))


def free_name(path):
    """PATH.damaged, or the first free PATH.damaged.N."""
    aside, n = path + ".damaged", 1
    while os.path.lexists(aside):
        aside, n = f"{path}.damaged.{n}", n + 1
    return aside


# ---------------------------------------------------------------- reading


def steps_in(folder):
    """The steps N of the folders named ckpt_N."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [int(n[5:]) for n in names if re.fullmatch(NAME, n) and os.path.isdir(os.path.join(folder, n))]


def bring_back(folder):
    """Give a checkpoint its name again if a kill came before the one that replaces it had the name (publish)."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        final = os.path.join(folder, name.removesuffix(REPLACED))
        if re.fullmatch(NAME + re.escape(REPLACED), name) and not os.path.lexists(final) and read_run(final + REPLACED)[0]:
            os.rename(final + REPLACED, final)


def find(folder, log):
    """(path, run.json's content) of the newest checkpoint in the folder that verifies, or (None, None) if there is no
    checkpoint at all. All ranks call it. Raises UserError if there are checkpoints and none verifies, or if the newest that
    is whole is of another format or another step."""
    if RANK == 0:
        bring_back(folder)
    faults = []
    for step in sorted(all_ranks(steps_in(folder))[0], reverse=True):  # a network file system may show them late elsewhere
        path = os.path.join(folder, f"ckpt_{step}")
        run, fault = read_run(path)
        if run:
            check_format(path, run)
            if (real := run.get("step")) != step:
                raise UserError(
                    f"{path} is the checkpoint of step {real}, says its run.json: name it ckpt_{real} or move it away"
                )
            fault = fault_in(path, run.get("files", {}))
        if not (found := [f for f in all_ranks(fault) if f]):
            return path, run
        log(f"warning: {path} does not verify ({found[0]}): skipped")
        faults.append(f"{path}: {found[0]}")
    if faults:
        raise UserError(f"no checkpoint verifies ({faults[0]}): copy it again, or start anew in another out_dir")
    return None, None


def check_format(path, run):
    """Raise UserError if another version of this code wrote the checkpoint."""
    if (found := run.get("format", "none")) != FORMAT:
        raise UserError(
            f"{path} was written by another version of this code (run.json has format {found}, this code reads {FORMAT}):"
            f" resume it under {writer(run)}, or take another out_dir"
        )


def writer(run):
    """The commit that wrote a checkpoint."""
    return run.get("written_by", {}).get("git") or "an unknown commit"


def fault_in(path, files):
    """Compare this rank's share of a checkpoint's files with {name: [bytes, SHA-256]}. Returns what is wrong, or None."""
    for name in sorted(files)[RANK::WORLD]:
        try:
            if not os.path.isfile(file := os.path.join(path, name)):
                return f"{name} is missing"
            if fingerprint(file) != files[name]:
                return f"{name} is damaged"
        except OSError as e:
            return f"{name}: {e.strerror}"
    try:  # with a file that transformers prefers to those that were written, they would not be read
        return next((f"{name} was put beside it" for name in model_files(path) if name not in files), None)
    except OSError as e:
        return str(e)


def check_same(path, before, now, free, force, log):
    """Compare what must be the same when a run is resumed (run.identify). Raises UserError for the first knob or input
    that differs; with `force` it logs them instead. The knobs in `free` may differ. So may the number of ranks and the
    versions, which are logged."""
    for part in ("knobs", "inputs"):
        for name in sorted(before[part].keys() | now[part].keys()):
            old, new = before[part].get(name), now[part].get(name)
            if old == new or (part == "knobs" and name in free):
                continue
            what = f"{name}={new!r} now, {old!r} then" if part == "knobs" else f"{name} has another content now"
            if not force:
                raise UserError(f"{path} is of another run ({what}): restore it, set --resume=force, or choose another out_dir")
            log(f"note: {path} is of another run ({what}), resumed by force")
    for name in ("world_size", "written_by"):
        if before[name] != now[name]:
            log(f"note: {path} was written under another {name}: {before[name]}; it is {now[name]} now")
    if before["knobs"]["max_steps"] != now["knobs"]["max_steps"]:
        log("note: max_steps changed; schedules that end with it (cosine, teacher_share_end and _low) change from here")


def restore(path, run, policy, optimizers):
    """Fill the optimizers' moments from a checkpoint; each rank reads its own rows. The policy was loaded from path
    already. Only files that run.json names are opened. Returns the memory, {name: tensor}; {} if there is none. Raises
    UserError for what is missing."""
    try:
        for name, optimizer in optimizers.items():
            own = rf"state/{name}(-[0-9]+-of-[0-9]+)?\.safetensors"
            files = tensors_in([os.path.join(path, file) for file in run["files"] if re.fullmatch(own, file)])
            steps = run["optimizer_steps"][name]
            for n, p in policy.hf.named_parameters() if steps else ():
                if lacking := [m for m in MOMENTS if f"{m}.{n}" not in files]:
                    raise OSError(f"the moment {lacking[0]}.{n} of the optimizer {name} is missing")
                moments = {m: read_rows_of(files[f"{m}.{n}"], f"{m}.{n}", torch.zeros_like(p)) for m in MOMENTS}
                optimizer.state[p] = {"step": torch.tensor(float(steps), device=p.device), **moments}
        memory = "state/memory.safetensors"
        return load_file(os.path.join(path, memory)) if memory in run["files"] else {}
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} cannot be resumed: {first_line(e)}: copy it again, or take another out_dir") from None
