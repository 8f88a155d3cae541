"""
Every method on the toy worlds, three seeds each, as one table and one picture.

    make table            half an hour on two cores; finished runs are not repeated

Each row is train.py with an overlay from config/method/, the torch sampler and the world's config. Runs are kept in
out/table/WORLD/METHOD_SEED/. The table is written to docs/toy.md, between the lines that mark its place.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "toy")]

from runtime.process import protect_output

FOUR = ["grpo", "sft", "mixed", "luffy"]
ALL = ["grpo", "grpo_noclip", "grpo_std", "grpo_token_mean", "dapo", "sft", "sft_verified", "rl_sft_loss", "sft_then_rl",
       "mixed", "mixed_clip", "luffy", "luffy_partial", "relift", "exgrpo", "hpt", "ampo", "prefix_rft", "chord_mu",
       "chord_phi", "dft", "cispo", "rkl", "kdrl", "tgpo", "tgpo_adv"]  # fmt: skip
WORLDS = {
    "imperfect": ([], ALL),
    "clean": (["config/toy/clean.py"], FOUR),
    "shaping": (["config/toy/shaping.py", "--save_interval=10", "--keep_last=0"], FOUR),  # draw_fork reads each checkpoint
}
# The ratio differs from 1 only after an optimizer step. So methods with a clip take two steps per rollout: with one step
# the clip has no effect.
CLIPPED = {"grpo", "grpo_std", "grpo_token_mean", "dapo", "mixed_clip", "sft_then_rl", "ampo", "prefix_rft", "chord_mu",
           "chord_phi", "cispo", "kdrl", "tgpo", "tgpo_adv"}  # fmt: skip
STEPS = (10, 20, 60)
DRAWN = ["grpo", "sft", "rl_sft_loss", "mixed", "luffy", "relift", "rkl"]  # with all methods nothing could be seen


def arguments(out, world, method, seed):
    """train.py's arguments for one run."""
    configs, _ = WORLDS[world]
    extra = ["--update_batches=2"] if method in CLIPPED else []
    if method == "sft_then_rl":
        extra.append(f"--model={out}/{world}/sft_{seed}/ckpt_60")
    if method == "chord_mu":  # its own 200 steps would end with mu at 0.73
        extra.append("--sft_decay_steps=60")
    if method in ("rkl", "kdrl", "tgpo", "tgpo_adv"):  # its teacher model is SFT's, which copies mistakes
        extra.append(f"--teacher_model={out}/{world}/sft_0/ckpt_60")
    return [*configs, f"config/method/{method}.py", f"--seed={seed}", "--sampler=torch", "--reward_workers=1", *extra]


def train(out, world, method, seed):
    """One run, unless it is there already. The file cpu_seconds in its folder is written when it has finished."""
    folder = os.path.join(out, world, f"{method}_{seed}")
    if os.path.exists(os.path.join(folder, "cpu_seconds")):
        return
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    command = [sys.executable, os.path.join(ROOT, "train.py"), *arguments(out, world, method, seed), f"--out_dir={folder}"]
    with open(folder + ".log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{world} {method} {seed} failed: see {folder}.log")
    with open(os.path.join(folder, "cpu_seconds"), "w") as f:
        f.write(f"{usage.ru_utime + usage.ru_stime:.1f}")
    print(f"{world:<10} {method:<16} seed {seed}: {final(folder)['eval/greedy']:.3f} greedy", flush=True)


def final(folder, step=60):
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return next(r for r in map(json.loads, f) if r["step"] == step)


def kept_skill(folder):
    """Greedy accuracy on two numbers, where every base starts at 1.0."""
    from build import greedy_accuracy
    from transformers import AutoModelForCausalLM

    from runtime.tokenizer import load_tokenizer

    checkpoint = os.path.join(folder, "ckpt_60")
    return greedy_accuracy(AutoModelForCausalLM.from_pretrained(checkpoint), load_tokenizer(checkpoint), 2)


def by_source(folder, step):
    """Greedy accuracy by the problems' source."""
    with open(os.path.join(folder, f"eval_{step}.json")) as f:
        return {source: entry["greedy"] for source, entry in json.load(f).items()}


def row(out, world, method, seeds):
    """One line of the table, as cells: mean and standard deviation over the seeds."""
    folders = [os.path.join(out, world, f"{method}_{s}") for s in seeds]

    def cell(values, digits=2):
        sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{sd}"

    source, other = "toy", lambda f: final(f)["eval/avg@k"]
    if world == "shaping":
        source, other = "hard", lambda f: by_source(f, 60)["easy"]
    greedy = [cell([by_source(f, step)[source] for f in folders]) for step in STEPS]
    entropies = [final(f)["entropy/own"] for f in folders if "entropy/own" in final(f)]
    seconds = [float(open(os.path.join(f, "cpu_seconds")).read()) for f in folders]
    return [method, *greedy, cell([other(f) for f in folders]), cell([kept_skill(f) for f in folders]),
            cell(entropies, 3) if entropies else "-", cell(seconds, 0)]  # fmt: skip


def markdown(out, seeds):
    lines = []
    for world, (_, methods) in WORLDS.items():
        columns = ("hard @10", "easy @60") if world == "shaping" else ("greedy @10", "T=1 @60")
        lines += [f"**{world}**", "", f"| method | {columns[0]} | @20 | @60 | {columns[1]} | 2 numbers @60 | entropy | CPU s |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        lines += ["| " + " | ".join(row(out, world, m, seeds)) + " |" for m in methods] + [""]
    return "\n".join(lines)


def fork_probability(checkpoint):
    """The policy's probability of the fork token `*` as the first token of a hard problem's response: the mean over the
    held-out problems of the shaping world."""
    import torch
    from transformers import AutoModelForCausalLM

    from data import load_problems
    from runtime.tokenizer import load_tokenizer

    tokenizer, hf = load_tokenizer(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    problems = load_problems(os.path.join(ROOT, "toy", "shaping", "test.parquet"), tokenizer, log=lambda line: None)
    ids = torch.tensor([p.prompt_ids for p in problems if p.source == "hard"])
    with torch.no_grad():
        return hf(ids).logits[:, -1].softmax(-1)[:, tokenizer.convert_tokens_to_ids("*")].mean().item()


def draw_table(out, seeds):
    """Draw the curves of the imperfect world."""
    import plot

    folders = [os.path.join(out, "imperfect", f"{m}_{s}") for m in DRAWN for s in seeds]
    plot.draw(plot.by_method(folders), [os.path.join(out, "table.png")], plot.OUTCOMES)


def draw_fork(out, seeds):
    """Draw what happens at the shaping world's fork."""
    import plot

    methods, base = {}, fork_probability(os.path.join(ROOT, "toy", "shaping", "base"))
    for m in ("grpo", "mixed", "luffy"):
        for s in seeds:
            folder = os.path.join(out, "shaping", f"{m}_{s}")
            run = plot.read_run(folder)
            for r in run:
                if os.path.exists(os.path.join(folder, f"eval_{r['step']}.json")):
                    r["hard"] = by_source(folder, r["step"])["hard"]
                    r["p/fork"] = fork_probability(os.path.join(folder, f"ckpt_{r['step']}")) if r["step"] else base
            methods.setdefault(m, []).append(run)
    panels = [
        ("hard problems, greedy", "share", {"hard": ""}),
        ("entropy of own samples", "linear", {"entropy/own": ""}),
        ("probability of the fork", "log", {"p/fork": ""}),
    ]
    plot.draw(methods, [os.path.join(out, "shaping.png")], panels)


def draw_paper(out, seeds):
    """Draw the panels of the paper's Figs. 2, 5 and 6 for the toy worlds. Above: reward, entropy and p in the shaping world.
    Below: reward, length and entropy in the imperfect world."""
    import plot

    methods = {}
    for m in ("grpo", "mixed", "luffy"):
        for s in seeds:
            runs = [plot.read_run(os.path.join(out, world, f"{m}_{s}")) for world in ("shaping", "imperfect")]
            rows = [dict(a) | {f"below/{key}": value for key, value in b.items()} for a, b in zip(*runs, strict=True)]
            methods.setdefault(m, []).append(rows)
    panels = [
        ("shaping world: training reward", "share", {"reward/own": ""}),
        ("entropy of own samples", "linear", {"entropy/own": ""}),
        ("probability of the teacher's tokens", "linear", {"teacher/p": ""}),
        ("demo's world: training reward", "share", {"below/reward/own": ""}),
        ("tokens per response", "linear", {"below/length/own": "own samples", "below/length/teacher": "teacher"}),
        ("entropy of own samples", "linear", {"below/entropy/own": ""}),
    ]
    plot.draw(methods, [os.path.join(out, "paper.png")], panels)


def put(path, text):
    """Replace the text between the two marks in a file."""
    marks = ("<!-- make table -->", "<!-- end of make table -->")
    with open(path) as f:
        old = f.read()
    new = re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: f"{marks[0]}\n{text}\n{marks[1]}", old, flags=re.S)
    with open(path + ".partial", "w") as f:
        f.write(new)
    os.replace(path + ".partial", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 (default 3)")
    parser.add_argument("--out", default=os.path.join(ROOT, "out", "table"), help="folder of the runs (default out/table)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument("--only_print", action="store_true", help="print the table, leave docs/toy.md alone")
    args = parser.parse_args()
    start = time.time()
    jobs = [(w, m, s) for w, (_, methods) in WORLDS.items() for m in methods for s in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:  # SFT first: other methods use its checkpoint
        for stage in ([j for j in jobs if j[1] == "sft"], [j for j in jobs if j[1] != "sft"]):
            list(pool.map(lambda job: train(args.out, *job), stage))
    for draw in (draw_table, draw_fork, draw_paper):
        draw(args.out, range(args.seeds))
    table = markdown(args.out, range(args.seeds))
    print(f"\n{table}\n{time.time() - start:.0f} s")
    if not args.only_print:
        for name in ("table.png", "shaping.png", "paper.png"):
            shutil.copy(os.path.join(args.out, name), os.path.join(ROOT, "toy", name))
        put(os.path.join(ROOT, "docs", "toy.md"), table)


if __name__ == "__main__":
    protect_output()
    main()
