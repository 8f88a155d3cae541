"""
Curves and a table from runs' metrics.jsonl.

    python plot.py out/demo/luffy_0 out/demo/grpo_0 --out=curves.png

Runs whose folders differ only in a trailing _SEED are one method: their mean is drawn, with a band from the
worst to the best seed.
"""

import json
import os
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from configurator import UserError, repo_path, run

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
