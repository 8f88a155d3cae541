"""
Draw curves and print a table from runs' metrics.jsonl, and write the page that shows a group.

    python plot.py out/demo/luffy_0 out/demo/grpo_0        curves.png and curves.svg, also while runs are under way
    python plot.py out/a out/b --out=FILE.svg              only that file
    python plot.py trace out/demo/luffy_0 --step=5         a page that shows one group, token by token
    python plot.py trace RUN --step=N --problem=ID --out=FILE.html

Runs whose folders differ only in a trailing _SEED are one method: their mean is drawn, with a band from the
worst to the best seed.
"""

import json
import math
import os
import re
import sys

from runtime.process import begin

if __name__ == "__main__":
    begin()

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from configurator import ROOT, UserError, repo_path, run

# (title, scale, {metric: its name in the panel}); the scale "share" runs from 0 to 1.
PANELS = [
    ("held-out accuracy", "share", {"eval/greedy": "greedy", "eval/avg@k": "sampled"}),
    ("reward", "share", {"reward/own": "own samples", "reward/teacher": "teacher"}),
    ("prompts solved by", "share", {"groups/none_solved": "no sample", "groups/all_solved": "all samples"}),
    ("entropy", "linear", {"entropy/own": "own tokens", "entropy/teacher": "teacher's tokens"}),
    ("probability p of the teacher's tokens", "linear", {"teacher/p": "p", "teacher/f": "f(p)"}),
    ("tokens per response", "linear", {"length/own": "own samples", "length/teacher": "teacher"}),
    ("engine against trainer", "log", {"mismatch/abs": "mean |difference of log-probs|"}),
]
OUTCOMES = [
    ("held-out accuracy, greedy", "share", {"eval/greedy": ""}),
    ("held-out accuracy, sampled", "share", {"eval/avg@k": ""}),
    ("training reward of own samples", "share", {"reward/own": ""}),
]
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
MARKERS = "osD^vPX"  # for readers and printers without colours
KNOWN = ["luffy", "grpo", "mixed", "sft", "relift", "rkl", "rl_sft_loss"]  # each looks the same in all pictures
TITLE = "nano-luffy: curves of runs"  # in each picture's metadata: by it main() knows what it may draw again
REASONS = {"no_think": "no </think>", "no_answer": "no answer", "timeout": "grading timed out", "error": "grading failed"}
PHASES = {"sync": "#e0e0e0", "rollout": "#4d4d4d", "reward": "#0072B2", "update": "#a6a6a6"}


def read_run(folder):
    """metrics.jsonl as a list of dicts."""
    path = os.path.join(repo_path(folder), "metrics.jsonl")
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist: give folders that train.py wrote")
    with open(path, errors="replace") as f:
        lines = f.read().split("\n")
    records = []
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({"step": record["step"]} | {k: v for k, v in record.items() if isinstance(v, int | float)})
        except (ValueError, TypeError, KeyError, AttributeError):
            if line and i < len(lines):  # the text after the last line break may be half a line
                raise UserError(f"{path}, line {i} is not a step of a run: remove it") from None
    if not records:
        raise UserError(f"{path} is empty: wait for the run's first evaluation or step")
    return records


def by_method(folders):
    """{method: [run, ...]} in the order given. A method's name is that of its folder, or the whole path if two folders
    have the same name."""
    groups = {}
    for folder in dict.fromkeys(map(os.path.normpath, map(repo_path, folders))):
        groups.setdefault(re.sub(r"_[0-9]+$", "", folder), []).append(read_run(folder))
    names = [os.path.basename(path) for path in groups]
    shorten = lambda path, name: name if names.count(name) == 1 else os.path.relpath(path, ROOT)
    return {shorten(path, name): runs for (path, runs), name in zip(groups.items(), names, strict=True)}


def plain(name):
    """A name for a legend. matplotlib would read the text between two $ as mathematics. Of a very long name the middle is cut
    out, because the names of a sweep differ at their ends."""
    name = name if len(name) <= 100 else f"{name[:40]}…{name[-59:]}"
    return name.replace("$", r"\$")


def curve(runs, key):
    """The steps that all runs have, and the runs' mean, min and max at each."""
    series = [{m["step"]: m[key] for m in r if key in m} for r in runs]
    steps = sorted(set.intersection(*map(set, series)))
    values = [[s[step] for s in series] for step in steps]
    return steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def looks(methods):
    """{method: (colour, marker)}. Known methods have their own, the others take the remaining ones in turn."""
    taken = [KNOWN.index(name) for name in methods if name in KNOWN]
    rest = [i for i in range(len(COLORS)) if i not in taken] or list(range(len(COLORS)))
    others = [name for name in methods if name not in KNOWN]
    place = {name: KNOWN.index(name) if name in KNOWN else rest[others.index(name) % len(rest)] for name in methods}
    turn = lambda name: others.index(name) // len(rest) if name in others else 0  # the colours are used up: another marker
    return {name: (COLORS[i], MARKERS[(i + turn(name)) % len(MARKERS)]) for name, i in place.items()}


def draw_panel(axis, methods, scale, metrics):
    """Draw one or two metrics, the second dashed: the mean of each method where all its seeds have the metric, and for the
    first one also the seeds, as thin lines, and a band."""
    drawn, inside = False, True
    for (key, name), line in zip(metrics.items(), ("-", (0, (3, 2))), strict=False):
        found = False
        for i, (method, (color, marker)) in enumerate(looks(methods).items()):
            runs = methods[method]
            seeds = [[(m["step"], m[key]) for m in r if key in m] for r in runs]
            steps, mean, low, high = curve(runs, key)
            found |= any(seeds)
            inside &= all(0 <= value <= 1 for seed in seeds for _, value in seed)
            for seed in filter(None, seeds if len(runs) > 1 and line == "-" else []):
                dot = "." if len(seed) == 1 else ""  # a single point has no line
                axis.plot(*zip(*seed, strict=True), color=color, alpha=0.45, linewidth=0.7, marker=dot)
            if not steps:
                continue
            apart = (min(i, len(steps) - 1), max(1, len(steps) // 6))  # so that markers of equal curves are apart
            # The first method is drawn above the others; their markers are larger.
            axis.plot(steps, mean, color=color, linestyle=line, linewidth=1.8, marker=marker, markersize=5 + min(i, 5),
                      markevery=apart, markeredgecolor="white", zorder=4 - i / 100)  # fmt: skip
            if len(runs) > 1 and line == "-":
                axis.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        if found and name:
            axis.plot([], [], color="#555555", linestyle=line, linewidth=1.4, label=name)
        drawn |= found
    if not drawn:
        axis.text(0.5, 0.5, "not in these runs", ha="center", va="center", transform=axis.transAxes, color="#555555")
    elif scale == "log":
        axis.set(yscale="log")
    elif scale == "share" and inside:  # your own grader may give other rewards
        axis.set(ylim=(-0.04, 1.04))
    if drawn and any(metrics.values()):
        axis.legend(fontsize=8, frameon=False, loc="best")
    axis.set(xlabel="step")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)


def draw_phases(axis, methods):
    """Draw the mean seconds of a step by phase, a bar per method, with the method's marker in front."""
    names = list(methods)
    rows = {name: [m for r in runs for m in r if "time/update" in m] for name, runs in methods.items()}
    left = [0.0] * len(names)
    for phase, color in PHASES.items():
        seconds = [sum(m.get(f"time/{phase}", 0.0) for m in rows[name]) / max(1, len(rows[name])) for name in names]
        axis.barh(range(len(names)), seconds, left=left, color=color, edgecolor="#333333", linewidth=0.6, label=phase)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    for i, (color, marker) in enumerate(looks(methods).values()):  # the names may be long, or many
        axis.plot(-0.03, i, marker, color=color, transform=axis.get_yaxis_transform(), clip_on=False)
    axis.set(yticks=[], xlabel="seconds")
    axis.invert_yaxis()
    axis.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.0,
                handlelength=1.2)  # fmt: skip


def draw(methods, paths, panels, phases=False):
    """Write one picture of {method: [run, ...]} to each path. panels: [(title, scale, {metric: name}), ...]; phases: add a
    panel with the seconds of each phase of a step."""
    count = len(panels) + phases
    columns = 4 if count > 6 else 3
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), layout="constrained", squeeze=False)
    for axis, (title, scale, metrics) in zip(axes.flat, panels, strict=False):
        draw_panel(axis, methods, scale, metrics)
        axis.set(title=title)
    if phases:
        draw_phases(axes.flat[len(panels)], methods)
        axes.flat[len(panels)].set_title("a step, by phase", pad=20)
    for axis in list(axes.flat)[count:]:
        axis.remove()
    keys = [plt.Line2D([], [], color=color, marker=marker, markeredgecolor="white", linewidth=2, label=plain(name))
            for name, (color, marker) in looks(methods).items()]  # fmt: skip
    for columns in range(min(len(methods), 7), 0, -1):  # as many as fit
        legend = figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False)
        box = legend.get_window_extent()
        if columns == 1 or box.width < figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
    try:
        for path in paths:
            figure.savefig(path, dpi=130, metadata={"Title": TITLE})
    except OSError as e:
        raise UserError(f"--out: {path} cannot be written: {e.strerror}") from None
    plt.close(figure)


def draw_sweep(tables, path):
    """Draw pass@k and avg@k against temperature, from {temperature: content of eval.json}: a line per source, and their
    unweighted mean. For AIME24 and AMC this is the paper's Fig. 12."""
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


def check_replaceable(path):
    """Raise UserError if a file is there that draw() did not write."""
    try:
        if os.path.lexists(path) and TITLE.encode() not in open(path, "rb").read():
            raise UserError(f"--out: {path} is there already and is no picture of curves: choose another name")
    except OSError as e:
        raise UserError(f"--out: {path} cannot be written: {e.strerror}") from None


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
    try:
        with open(path) as f:
            config = dict(json.load(f))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: copy it again") from None
    if missing := [name for name in ("model", "shaping", "gamma", "sft_coef") if name not in config]:
        raise UserError(f"{path} has no {missing[0]!r}: give a folder that train.py wrote")
    names = os.listdir(rollouts) if os.path.isdir(rollouts := os.path.join(folder, "rollouts")) else []
    steps = sorted(int(m[1]) for m in map(re.compile(r"step_(0|[1-9][0-9]*)\.jsonl").fullmatch, names) if m)
    step = options.get("step") or str(max(steps, default=""))
    if not steps:
        raise UserError(f"{folder} has no rollouts: train with a rollout_interval")
    if step not in map(str, steps):
        raise UserError(f"{folder} has rollouts of the steps {steps}: choose one of them by --step=N")
    path, groups = os.path.join(folder, "rollouts", f"step_{step}.jsonl"), {}
    try:
        with open(path) as f:
            for r in map(json.loads, f):
                groups.setdefault(str(r["problem"]), []).append(r)
    except (ValueError, TypeError, LookupError, RecursionError):
        groups = {}
    if not groups:
        raise UserError(f"{path} is damaged: choose another step by --step=N")
    # By default the group with a trace, an advantage, and the least probable token of a teacher.
    if "written_by" not in next(iter(groups.values()))[0]:
        raise UserError(f"{folder}'s rollouts were written by an older version of this code: draw them with that one")
    rarest = lambda g: min((x for r in g for x in r["update_logps"] if math.isfinite(x)), default=0.0)
    interest = lambda g: (any(map(given_tokens, g)), any(r["advantage"] for r in g), -rarest(g))
    chosen = options.get("problem") or max(groups, key=lambda q: interest(groups[q]))
    if chosen not in groups:
        raise UserError(f"step {step} has the problems {', '.join(groups)}: choose one of them by --problem=ID")
    out = options.get("out") or f"group_{step}_{chosen}.html"
    if os.path.realpath(out) == os.path.realpath(os.path.join(ROOT, "trace.html")):
        raise UserError(f"--out={out} is the page's template: choose another name")
    write_trace(out, config, folder, int(step), groups[chosen])
    print(f"wrote {out}")


def write_trace(out, config, folder, step, group):
    """Fill trace.html. The data is embedded as JSON without a '<', so that no text of a model can act as markup or code."""
    from runtime.files import model_path
    from runtime.tokenizer import load_tokenizer  # here, because torch takes seconds to load

    latest = os.path.join(folder, "latest")
    tokenizer = load_tokenizer(latest if os.path.isdir(latest) else model_path(config["model"]))
    rows, likelihood = [], config["sft_coef"]
    for r in group:
        by = {"own": "policy"}.get(r["written_by"], r["written_by"])
        # A row that was not trained on has no update_logps. A replayed row has two log-probs: of now and of its sampling.
        now = r["update_logps"] or [None] * given_tokens(r)
        logps = [*now, *(r["sampler_logps"] if by != "replay" else [])]
        rows.append(
            {
                "by": by,
                "given": given_tokens(r),
                "reward": r["reward"],
                "advantage": r["advantage"],
                "verdict": REASONS.get(r["reason"], r["reason"]) + ", cut off at max_tokens" * (r["finish_reason"] == "length"),
                "ids": r["response_ids"],
                "tokens": token_texts(tokenizer, r["response_ids"]),
                "p": [None if logp is None else brief(math.exp(logp)) for logp in logps],
            }
        )
        # f is of p / pi_phi if that is known: of a replay (ExGRPO), and of a teacher with log-probs, which older runs lack.
        then = r["sampler_logps"] if by == "replay" else [] if likelihood else r.get("target_logps", [])
        if then:
            pairs = zip(now, then, strict=True)
            rows[-1]["ratio"] = [None if a is None else brief(math.exp(min(a - b, 88.0))) for a, b in pairs]
    first, shaping, gamma = group[0], config["shaping"], config["gamma"]
    if likelihood:
        shaping = config.get("sft_shaping", "log")  # missing in older runs
        gamma = 1.0 if shaping == "log" else gamma  # log p itself
    plain = shaping in ("none", "luffy") and not likelihood  # the page computes these itself, for any gamma
    data = {"run": os.path.basename(folder), "step": step, "problem": first["problem"], "source": first["source"],
            "prompt": first["prompt"], "answer": first["answer"], "shaping": shaping, "gamma": gamma, "likelihood": likelihood,
            "curve": None if plain else shaping_curve(shaping, gamma), "rows": rows,
            "top": config.get("teacher_top_entropy", 1),
            "scheduled": any(config.get(name) for name in ("sft_warmup_steps", "sft_decay_steps"))}  # fmt: skip
    with open(os.path.join(ROOT, "trace.html")) as f:
        before, mark, after = f.read().partition("{{data}}")
    if not mark:
        raise UserError("trace.html, the page's template, has no {{data}} any more: git checkout trace.html")
    title = re.search("<title>.*</title>", before)[0]
    try:
        if os.path.isfile(out) and title not in open(out, errors="replace").read(2000):
            raise UserError(f"--out={out} is there already and is no such page: choose another name")
        f = open(out, "w")
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror}") from None
    with f:
        f.write(before + json.dumps(data, separators=(",", ":")).replace("<", "\\u003c") + after)


def given_tokens(r):
    """The number of a row's tokens that the policy of that step did not sample: a teacher's part, or a whole replay."""
    return len(r["response_ids"]) if r["written_by"] == "replay" else r["teacher_tokens"]


def brief(x, digits=3):
    """x rounded to a few digits; None if it is not finite, because JSON has no such number."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None


def shaping_curve(shaping, gamma, n=451):
    """f and its weight p f'(p), by loss.shape, at n values of p from 1e-12 to 1000, evenly spaced in log p. It is above 1 where
    the policy is surer than the one that wrote the token."""
    import torch

    from loss import shape

    p = torch.logspace(-12, 3, n, dtype=torch.float64).requires_grad_()
    f = shape(p, shaping, gamma)
    (slope,) = torch.autograd.grad(f.sum(), p)
    values = {"f": f.detach(), "w": p.detach() * slope}
    return {name: [brief(x, 5) for x in tensor.tolist()] for name, tensor in values.items()}


def token_texts(tokenizer, ids):
    """The text of each token. If several tokens form one character, the last one gets it and the others are empty."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        whole = not text.endswith("\ufffd") or end - start >= 8 or end == len(ids)
        texts.append(text if whole else "")
        start = end if whole else start
    return texts


def table(methods):
    """The last evaluation of each method, with a number per seed; also by source if there are several. Seconds are those of
    the steps, without starting up."""
    first = max(14, *(len(name) + 1 for name in methods))  # the columns' widths: long names, many seeds
    wide = max(24, *(6 * len(runs) + 2 for runs in methods.values()))
    lines = [f"{'method':<{first}}{'step':>5}   {'greedy':<{wide}}{'sampled':<{wide}}{'step s':>8}"]
    for name, runs in methods.items():
        last = [next((m for m in reversed(r) if "eval/greedy" in m), r[-1]) for r in runs]
        seconds = sum(v for r in runs for m in r for k, v in m.items() if k.startswith("time/")) / len(runs)
        steps = ",".join(map(str, dict.fromkeys(m["step"] for m in last)))
        show = lambda key: " ".join(f"{m[key]:.3f}" if key in m else "-" for m in last)  # noqa: B023
        lines.append(f"{name:<{first}}{steps:>5}   {show('eval/greedy'):<{wide}}{show('eval/avg@k'):<{wide}}{seconds:>8.1f}")
        for source in sorted({key.split("/", 2)[2] for m in last for key in m if re.match("eval/[^/]+/", key)}):
            cells = [f"{show(f'eval/{mode}/{source}'):<{wide}}" for mode in ("greedy", "avg@k")]
            lines.append(f"  {source:<{first + 3}}   {''.join(cells)}".rstrip())
    return "\n".join(lines)


def main():
    if {"-h", "--help"} & set(sys.argv):
        return print(__doc__.strip())
    if sys.argv[1:2] == ["trace"]:
        return trace(sys.argv[2:])
    folders = [a for a in sys.argv[1:] if not a.startswith("--")]
    options = [a for a in sys.argv[1:] if a.startswith("--")]
    if not folders or any(not re.fullmatch(r"--out=.+", a) for a in options):
        raise UserError("write: python plot.py RUN ... [--out=FILE], or: python plot.py trace RUN")
    out = options[-1].removeprefix("--out=") if options else "curves"
    name, ending = os.path.splitext(out)
    if ending not in ("", ".png", ".svg", ".pdf"):
        raise UserError(f"--out={out}: choose a name that ends in .png, .svg or .pdf, or without an ending for .png and .svg")
    paths = [out] if ending else [f"{name}.png", f"{name}.svg"]
    for path in paths:
        check_replaceable(path)
    methods = by_method(folders)
    print(table(methods))
    draw(methods, paths, PANELS, phases=True)
    print(f"wrote {' and '.join(paths)}")


if __name__ == "__main__":
    run(main)
