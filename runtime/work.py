"""
Long work in chunks that survives a kill: each chunk's rows are one file, and the same command continues with the chunks
that are missing.
"""

import hashlib
import json
import os
import time

from configurator import ROOT, UserError, provenance
from data import digest
from runtime.files import make_folder, weights_digest, whole, write_json
from runtime.ranks import LOCAL_RANK, RANK, WORLD, agreed, barrier, check_same_on_machines, print0

WRITTEN = ("ready", "eval.json", "averages.json", "samples", "settings.json")  # moved in this order


def settings_of(knobs, problems, model, sampler, dtype, verifier):
    """What the samples depend on, so what must be the same to continue: knobs, questions and prompts, weights, and the
    code that samples and grades. Small enough for a JSON file."""
    names = ["data", "eval", "model", "reward", "rollout"]
    names += [f"runtime/{name}" for name in ("latex", "oat", "requests", "rows", "tensors", "tokenizer", "torch_sampler")]
    source = agreed(verifier.source, verifier.grader)
    agreed(os.path.basename(model), "model")  # where `latest` led each rank
    own = [open(os.path.join(ROOT, f"{name}.py"), "rb").read() for name in names]
    return {
        **knobs,
        "problems": digest([(p.id, p.key, p.prompt_ids, p.answer) for p in problems]),
        "weights": weights_digest(model) if LOCAL_RANK == 0 else None,  # once per machine: seconds per gigabyte
        "code": digest(own),
        "grader": verifier.grader if source is None else source.decode("latin-1"),  # exact, of any bytes
        "sampler": sampler,
        "dtype": dtype,
    }


def open_work(output, settings, knobs):
    """Prepare the work's OutputFolder. Samples made with the same settings are kept, those of other settings are moved
    aside. All ranks return together, so they agree on which chunks are missing: all of them or none must start vLLM."""
    check_same_on_machines(settings)
    folder = output.path
    path, settings = os.path.join(folder, "settings.json"), json.loads(json.dumps(settings))
    if RANK == 0:
        try:
            with open(path) as f:
                before = json.load(f)
            old, written_by = dict(before["settings"]), before["written_by"]
        except (OSError, ValueError, LookupError, TypeError):  # without settings the samples there cannot be trusted
            old, written_by = {}, {}
        if old != settings:
            move_aside(folder, [name for name in sorted(old.keys() | settings.keys()) if old.get(name) != settings.get(name)])
            write_json(path, {"settings": settings, "knobs": knobs, "written_by": provenance()})
        elif written_by != provenance():
            print0(f"note: {folder} was started by another commit or with other packages (settings.json names them)")
        make_folder(os.path.join(folder, "samples"))
    barrier()


def move_aside(folder, differ):
    """Move the results in the folder to the first free before_N inside it. settings.json is moved last: after a kill in
    between they are still recognised as those of other settings."""
    found = [name for name in WRITTEN if os.path.exists(os.path.join(folder, name))]
    if found:
        n = 1
        while os.path.exists(aside := os.path.join(folder, f"before_{n}")):
            n += 1
        os.mkdir(aside)
        for name in found:
            os.rename(os.path.join(folder, name), os.path.join(aside, name))
        print0(f"{folder} held work with other settings ({', '.join(differ)}): moved to {aside}")


def work_through(output, chunks, work, watch, tensor_parallel=1):
    """Call work(chunk) for each chunk whose file in the OutputFolder's samples/ is missing. Every engine takes its share of
    them. A file has a digest, then a JSON line per row, and is written whole or not at all. Returns when the files of all
    ranks exist. watch: a Watch, which is told where this rank is, and ends the process if the other ranks never come."""
    paths, start, rewards = chunk_files(output.path, chunks), time.time(), []
    for i in range(RANK // tensor_parallel, len(chunks), WORLD // tensor_parallel):
        if os.path.exists(paths[i]):
            continue
        watch.progress(f"chunk {i + 1} of {len(chunks)}")
        rows = work(chunks[i])
        if RANK % tensor_parallel == 0:
            output.check()
            write_chunk(paths[i], rows)
        rewards += [reward for row in rows for reward in row["reward"]]
        n_done, seconds = sum(map(os.path.exists, paths)), time.time() - start
        print0(
            f"  {n_done} of {len(chunks)} chunks, {seconds:.0f} s, mean reward on this rank {sum(rewards) / len(rewards):.3f}"
        )
    watch.progress("waiting for the other ranks' chunks")
    while not all(map(os.path.exists, paths)):  # another rank still works; if it dies, this machine's torchrun may not notice
        time.sleep(1)
    barrier()  # all ranks have seen the files: now the caller may move them


def chunk_files(folder, chunks):
    return [os.path.join(folder, "samples", f"{i:05d}.jsonl") for i in range(len(chunks))]


def write_chunk(path, rows):
    body = "".join(json.dumps(row) + "\n" for row in rows)
    with whole(path) as f:
        f.write(chunk_digest(path, body) + body)


def read_chunks(paths):
    """Yield the rows of chunks' files. Raises UserError for a file that is not what work_through() wrote there."""
    for path in paths:
        with open(path, errors="replace") as f:
            first, body = f.readline(), f.read()
        if first != chunk_digest(path, body):
            raise UserError(f"{path} is damaged: remove it, and the same command makes it again")
        yield from map(json.loads, body.splitlines())


def chunk_digest(path, body):
    """The first line of a chunk's file. It stands for the rows, for which chunk they are, and for the work's settings."""
    with open(os.path.join(os.path.dirname(path), "..", "settings.json")) as f:
        settings = json.load(f)["settings"]
    what = json.dumps([settings, os.path.basename(path), body], sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(what.encode()).hexdigest()}) + "\n"
