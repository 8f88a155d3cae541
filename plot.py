"""
Curves and a table from runs' metrics.jsonl.

    python plot.py out/demo/luffy_0 out/demo/grpo_0 --out=curves.png
    python plot.py trace out/demo/luffy_0 --step=5         a page that shows one group, token by token (trace.html)

Runs whose folders differ only in a trailing _SEED are one method: their mean is drawn, with a band from the
worst to the best seed.
"""

import json
import math
import os
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from configurator import ROOT, UserError, repo_path, run

PANELS = [
    ("eval/greedy", "held-out accuracy, greedy"),
    ("eval/avg@k", "held-out accuracy, sampled"),
    ("reward/own", "training reward of own samples"),
]
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
LINES = ["-", "-.", "--", (0, (1.5, 1.5))]  # where curves lie on each other, each stays visible


def read_run(folder):
    """metrics.jsonl as a list of dicts."""
    path = os.path.join(repo_path(folder), "metrics.jsonl")
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist: give folders that train.py wrote")
    with open(path) as f:
        return [json.loads(line) for line in f]


def by_method(folders):
    """{method: [run, ...]} in the order given."""
    methods = {}
    for folder in folders:
        name = re.sub(r"_\d+$", "", os.path.basename(os.path.normpath(folder)))
        methods.setdefault(name, []).append(read_run(folder))
    return methods


def curve(runs, key):
    """Steps, and the runs' mean, min and max at each step that all of them have."""
    series = [{m["step"]: m[key] for m in r if key in m} for r in runs]
    steps = sorted(set.intersection(*map(set, series)))
    values = [[s[step] for s in series] for step in steps]
    return steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def draw(methods, path, panels=PANELS):
    """One picture of the panels, (metric, title) each, of {method: [run, ...]}; a metric named p/... on a log scale."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for i, (color, (name, runs)) in enumerate(zip(COLORS * len(methods), methods.items(), strict=False)):
            steps, mean, low, high = curve(runs, key)
            if steps:
                axis.plot(steps, mean, color=color, label=name, linewidth=1.8, linestyle=LINES[i % len(LINES)])
                axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="step")
        if key.startswith("p/"):
            axis.set(yscale="log")
        elif not key.startswith("entropy/"):
            axis.set(ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_sweep(tables, path):
    """pass@k and avg@k against temperature, of {temperature: eval.json}: a line per source, and their unweighted mean, which
    for AIME24 and AMC is the paper's Fig. 12."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained", sharex=True)
    temperatures, sources = [float(t) for t in tables], list(next(iter(tables.values())))
    for axis, name in zip(axes, ("pass@k", "avg@k"), strict=True):
        for source, color in zip(sources, COLORS * len(sources), strict=False):
            rows = [table[source] for table in tables.values()]
            axis.plot(temperatures, [r[name] for r in rows], "o-", color=color, label=f"{source}, k = {rows[0]['k']}")
        if len(sources) > 1:
            means = [sum(table[s][name] for s in sources) / len(sources) for table in tables.values()]
            axis.plot(temperatures, means, "s--", color="black", label="mean")
        axis.set(xlabel="temperature", title=name)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- the trace page


def trace(argv):
    """Write a page of one group of one step: python plot.py trace RUN [--step=N] [--problem=ID] [--out=FILE.html]."""
    folders = [a for a in argv if not a.startswith("--")]
    options = dict(a[2:].partition("=")[::2] for a in argv if a.startswith("--"))
    if len(folders) != 1 or options.keys() - {"step", "problem", "out"}:
        raise UserError("write: python plot.py trace RUN [--step=N] [--problem=ID] [--out=FILE.html]")
    folder = repo_path(folders[0])
    if not os.path.isfile(path := os.path.join(folder, "config.json")):
        raise UserError(f"{folder} has no config.json: give a folder that train.py wrote")
    with open(path) as f:
        config = json.load(f)
    names = os.listdir(os.path.join(folder, "rollouts"))
    steps = sorted(int(m[1]) for m in map(re.compile(r"step_(\d+)\.jsonl").fullmatch, names) if m)
    step = options.get("step") or str(max(steps, default=""))
    if step not in map(str, steps):
        raise UserError(f"{folder} has rollouts of the steps {steps}: choose one of them by --step=N")
    with open(os.path.join(folder, "rollouts", f"step_{step}.jsonl")) as f:
        groups = {}
        for r in map(json.loads, f):
            groups.setdefault(str(r["problem"]), []).append(r)
    # The first group that has a trace and from which something is learnt.
    tell = lambda g: (any(r["teacher_tokens"] for r in g), any(r["advantage"] for r in g))
    chosen = options.get("problem") or max(groups, key=lambda q: tell(groups[q]))
    if chosen not in groups:
        raise UserError(f"step {step} has the problems {', '.join(groups)}: choose one of them by --problem=ID")
    out = options.get("out") or f"trace_{step}_{chosen}.html"
    write_trace(out, config, folder, int(step), groups[chosen])
    print(f"wrote {out}")


def write_trace(out, config, folder, step, group):
    """Fill trace.html, in which nothing of a model's is markup or code: the data stand in it as JSON without a '<'."""
    from data import load_tokenizer  # here, because torch takes seconds to load
    from model import model_path

    latest = os.path.join(folder, "latest")
    tokenizer = load_tokenizer(latest if os.path.isdir(latest) else model_path(config["model"]))
    rows = []
    for r in group:
        by = "replay" if r["finish_reason"] == "replay" else "teacher" if r["teacher_tokens"] else "policy"
        logps = [*r["teacher_logps"], *(r["sampler_logps"] if by != "replay" else [])]  # a replay has both, of now and of then
        if len(logps) != len(r["response_ids"]):
            raise UserError(
                f"{folder} has no probabilities of the teacher's tokens in step {step}: they were not trained on then"
            )
        rows.append(
            {
                "by": by,
                "teacher_tokens": r["teacher_tokens"],
                "reward": r["reward"],
                "advantage": r["advantage"],
                "reason": r["reason"],
                "finish": r["finish_reason"],
                "ids": r["response_ids"],
                "tokens": token_texts(tokenizer, r["response_ids"]),
                "p": [float(f"{math.exp(logp):.3g}") for logp in logps],
            }
        )
    first = group[0]
    data = {"run": os.path.basename(folder), "step": step, "problem": first["problem"], "source": first["source"],
            "prompt": first["prompt"], "answer": first["answer"], "shaping": config["shaping"], "gamma": config["gamma"],
            "rows": rows}  # fmt: skip
    with open(os.path.join(ROOT, "trace.html")) as f:
        page = f.read()
    with open(out, "w") as f:
        f.write(page.replace("{{data}}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")))


def token_texts(tokenizer, ids):
    """The text of each token; of tokens that share a character, the last has it and the others nothing."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        whole = not text.endswith("\ufffd") or end - start >= 8 or end == len(ids)
        texts.append(text if whole else "")
        start = end if whole else start
    return texts


def table(methods):
    """The last evaluation of each method, a number per seed; seconds are those of the steps, not of starting up."""
    lines = [f"{'method':<14}{'step':>5}   {'greedy':<24}{'sampled':<24}{'step s':>8}"]
    for name, runs in methods.items():
        last = [next((m for m in reversed(r) if "eval/greedy" in m), r[-1]) for r in runs]
        seconds = sum(v for r in runs for m in r for k, v in m.items() if k.startswith("time/")) / len(runs)
        show = lambda key: " ".join(f"{m[key]:.3f}" if key in m else "-" for m in last)  # noqa: B023
        lines.append(f"{name:<14}{last[0]['step']:>5}   {show('eval/greedy'):<24}{show('eval/avg@k'):<24}{seconds:>8.1f}")
    return "\n".join(lines)


def main():
    if sys.argv[1:2] == ["trace"]:
        return trace(sys.argv[2:])
    folders = [a for a in sys.argv[1:] if not a.startswith("--")]
    out = next((a.removeprefix("--out=") for a in sys.argv[1:] if a.startswith("--out=")), "curves.png")
    if not folders:
        raise UserError("name at least one run: python plot.py out/toy")
    methods = by_method(folders)
    print(table(methods))
    draw(methods, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
