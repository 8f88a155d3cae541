"""
Compare a step of ours with a step of TRL's GRPOTrainer, alternately in one run: `python bench.py peers --trl=PYTHON`.

    python -m venv trl && trl/bin/pip install -r requirements-bench.txt        once; nothing here installs anything
    python bench.py peers --trl=trl/bin/python
    python bench.py peers --trl=trl/bin/python --shapes=toy --samplers=torch,vllm --repeats=9

Both do the same work: model and data from the same files, prompts, group size, completions of a forced length, reward
function, torch's fused AdamW, fp32, threads; no GPU, even if there is one. TRL has no teacher rows, so ours has none here.
TRL samples with transformers' generate, because its vLLM does not run on a CPU. Its activation checkpointing, on by default,
is off, as is ours. Its head works on tiles, as ours does on chunks, but its kernels need a GPU; on a CPU it falls back to whole
tiles, so its memory here says nothing about a GPU.

Memory added is what the update adds to the memory that the process holds when the update begins. The peak is that of the
process in the whole step; on our side it includes the sampler, but not the reward workers. Our decoding time includes loading
the weights into the sampler.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
# ---------------------------------------------------------------- what to compare
trl = ""  # the python of an environment made from requirements-bench.txt
shapes = "toy,25m-256,25m-512,152k"  # comma-separated
samplers = "torch,vllm"  # ours, each against TRL; vllm only where it is installed
repeats = 5  # steps per side, in turn, whose memory is measured; then as many whose time is measured [> 0]
threads = 2  # per side; only one side works at a time [> 0]
out = ""  # a file to append the results to, as lines of JSON

from configurator import UserError, configure, provenance, repo_path

# hidden, intermediate, layers, heads, vocabulary; prompts, completions of each, tokens of a completion
SHAPES = {
    "toy": (None, 16, 8, 40),
    "25m-256": ((512, 1280, 8, 8, 4096), 1, 8, 256),
    "25m-512": ((512, 1280, 8, 8, 4096), 1, 8, 512),
    "152k": ((256, 512, 2, 4, 152064), 1, 4, 512),
}


def build(folder, shape):
    """Build the model and the prompts of a shape: a random Qwen2 over bytes, with a vocabulary filled up to its size, and
    prompts of 16 tokens; or the toy's own. Returns what a side needs, as a dict."""
    import pyarrow.parquet as pq

    dimensions, prompts, group, completion = SHAPES[shape]
    if dimensions is None:
        model = os.path.join(ROOT, "toy", "base")
        rows = pq.read_table(os.path.join(ROOT, "toy", "train.parquet")).to_pylist()
        parquet = write_prompts(folder, [r["prompt"][0]["content"] for r in rows])
    else:
        model, parquet = os.path.join(folder, "model"), write_prompts(folder)
        build_model(model, *dimensions)
    return {"folder": folder, "model": model, "parquet": parquet, "prompts": prompts, "group": group,
            "completion": completion, "micro_tokens": prompts * group * (64 + completion)}  # fmt: skip


def write_prompts(folder, questions=tuple(f"{i * 7919:016d}" for i in range(64))):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"data_source": "peers", "prompt": [{"role": "user", "content": q}], "reward_model": {"ground_truth": "1"}}
            for q in questions]  # fmt: skip
    parquet = os.path.join(folder, "prompts.parquet")
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    return parquet


def build_model(folder, width, intermediate, layers, heads, vocabulary):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    pieces = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"w{i}" for i in range(vocabulary - len(pieces))]  # no text has these, but the model may write them
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    c = Qwen2Config(
        hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(c).save_pretrained(folder)


class Side:
    """One side, ours or TRL's, in a process of its own. It works only when it is its turn."""

    def __init__(self, name, python, script, spec):
        self.name, self.log = name, os.path.join(spec["folder"], f"{name}.log")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                       "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([python, os.path.join(HERE, script), json.dumps(spec)], env=environment, text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)  # fmt: skip

    def step(self, what):
        with contextlib.suppress(BrokenPipeError):
            print(what, file=self.process.stdin, flush=True)
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


def compare(shape, sampler):
    """Measure one shape with one of our samplers, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {**build(folder, shape), "sampler": sampler}
        sides = []
        try:
            sides.append(Side("ours", sys.executable, "ours.py", spec))
            sides.append(Side("trl", trl, "with_trl.py", spec))
            memory, rows = ({side.name: [] for side in sides} for _ in range(2))
            for found, what in ((memory, "memory"), (rows, "time")):
                for side in sides:
                    side.step("time")  # the first step makes first allocations and is not counted
                for i in range(repeats):
                    for side in sides if i % 2 == 0 else sides[::-1]:
                        found[side.name].append(side.step(what))
        finally:
            for side in sides:
                side.close()
    n_tokens = spec["prompts"] * spec["group"] * spec["completion"]
    print(f"\n{shape}: {spec['prompts']} x {spec['group']} completions of {spec['completion']} tokens, ours through {sampler}")
    names = "".join(f"{name:<26}" for name in ("step", "decode", "reward", "update", "rest"))
    print(f"  {'seconds':<8}{names}{'tokens/s':>9}{'added MiB':>11}{'peak':>7}")
    for name, steps in rows.items():
        for s in steps:
            s["rest"] = s["seconds"] - s["decode"] - s["reward"] - s["update"]
        cells = "".join(
            f"{spread([s[key] for s in steps], '{:.3f}'):<26}" for key in ("seconds", "decode", "reward", "update", "rest")
        )
        rate = n_tokens / statistics.median(s["seconds"] for s in steps)
        added, peak = (statistics.median(s[key] for s in memory[name]) / 2**20 for key in ("update_bytes", "peak_bytes"))
        print(f"  {name:<8}{cells}{rate:>9.0f}{added:>11.0f}{peak:>7.0f}")
    over = lambda found, key: [b[key] / a[key] for a, b in zip(found["ours"], found["trl"], strict=True)]
    ratios = {key: over(rows, key) for key in ("seconds", "decode", "update")}
    ratios |= {key: over(memory, key) for key in ("update_bytes", "peak_bytes")}
    print(
        "  TRL / ours: " + ", ".join(f"{key.replace('_', ' ')} {spread(values)}" for key, values in ratios.items()), flush=True
    )
    if out:
        with open(repo_path(out), "a") as f:
            row = {"shape": shape, "sampler": sampler, "threads": threads, **rows, "memory": memory, **provenance()}
            f.write(json.dumps(row) + "\n")


def main(argv):
    configure(globals(), argv, __file__)
    unknown = [s for s in shapes.split(",") if s not in SHAPES]
    if unknown := unknown + [s for s in samplers.split(",") if s not in ("torch", "vllm")]:
        raise UserError(f"{unknown[0]!r}: choose shapes of {', '.join(SHAPES)} and samplers of torch, vllm")
    if not os.path.isfile(trl):
        raise UserError(f"--trl={trl!r}: name the python of an environment with TRL (pip install -r requirements-bench.txt)")
    ask = "import importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in ('trl', 'torch', 'transformers')), sep=', ')"
    found = subprocess.run([trl, "-c", ask], capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"{trl} has no TRL: pip install -r requirements-bench.txt in its environment")
    own = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    print(f"{found.stdout.strip()}; ours: {own}")
    print(f"{threads} thread(s) each; median (smallest to largest) of {repeats} steps")
    from rollout import choose_sampler  # here, because it takes seconds

    for shape in shapes.split(","):
        for sampler in samplers.split(","):
            if sampler == "torch" or choose_sampler("auto") == "vllm":
                compare(shape, sampler)
            else:
                print(f"\n{shape}, ours through vllm: not measured, vLLM is not installed")
