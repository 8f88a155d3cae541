"""
The model card of an exported checkpoint: what the run and its evaluations have recorded, and nothing that was not.
"""

import ast
import json
import os
import re

from configurator import ROOT, UserError, first_line, free_knobs, read_script, repo_path
from data import THINK
from runtime.files import read_object, read_run
from runtime.stats import read_scores
from runtime.tokenizer import ends_in_words

SHOWN = ("n", "k", "greedy", "avg@k", "pass@k", "maj@k", "length", "truncated")  # columns of a table of accuracies
PROTOCOL = ("data", "template", "system", "k", "temperature", "max_tokens", "grader", "require_think", "grade_unclosed")


def model_card(source, digest, name, prompt, tokenizer, dtype, base, evaluation):
    """The text of README.md for the model in the folder `source`.

    digest       of its weights, files.weights_digest()
    name         the card's title
    prompt       a rendered prompt, for what it ends in
    base         the base model's name on the hub, or ""
    evaluation   a folder of eval.py's results, or its eval.json; "" for none

    Raises UserError if the evaluation is not readable, or was made of other weights, and for a base that is no name.
    """
    if base and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        raise UserError(f"--base={base}: write the name that the base model has on the hub, USER/NAME")
    run, _ = read_run(source) if os.path.isdir(os.path.join(source, "state")) else (None, None)
    parts = [front_matter(base), f"# {name}", *training(run, base), "## Accuracies"]
    recorded = [*by_the_run(source, run), *by_eval(source, digest, evaluation)]
    parts += recorded or ["None is recorded."]
    cast = f"Measured before the weights were cast to {dtype}; the cast model was not evaluated."
    parts += [cast] if recorded and dtype != "float32" else []
    opened = ", which opens a thought: a response begins inside it and closes it with `</think>`"
    parts += [
        "## Use",
        f"Weights are {dtype}. The chat template's prompt ends in `{prompt[-20:]!r}`{opened if prompt.endswith(THINK) else ''};"
        f" {ends_in_words(tokenizer)}.",
        "No license is stated here: it follows from those of the base model and of the data.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(base):
    """What the hub reads of a card."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- nano-luffy"]
    return "\n".join(["---", *lines, *([f"base_model: {base}"] if base else []), "---"])


def training(run, base):
    """Paragraphs on how the model was trained."""
    if not run:
        return ["What is known of its training is not in the folder that was exported: it has no `state/run.json`."]
    knobs, by = run["knobs"], run["written_by"]
    script = os.path.join(ROOT, "train.py")
    default, free = defaults(script), free_knobs(script)
    changed = {k: v for k, v in knobs.items() if k not in free and k not in ("sampler", "dtype") and v != default.get(k)}
    facts = {"base model": base, "training started from": bare(knobs["model"]),
             "data": f"{bare(knobs['data'])}, {run['inputs']['problems']} problems",
             "teacher model": bare(knobs["teacher_model"]), "grader": bare(knobs["grader"]), "steps": run["step"],
             "dtype of training": knobs["dtype"], "processes": run["world_size"],
             "code": by.get("git", "") + (", with edits" if by.get("edited") else ""),
             "packages": ", ".join(f"{p} {v}" for p, v in by.items() if p not in ("git", "edited"))}  # fmt: skip
    return [
        "Trained by nano-luffy: LUFFY ([arXiv 2504.14945](https://arxiv.org/abs/2504.14945)), which is GRPO with teacher traces"
        " in its groups, or one of the methods it is compared with. The knobs say which.",
        "## Training",
        table(("", "value"), [(k, v) for k, v in facts.items() if v != ""]),
        "Of the knobs that change what is learnt, " + ("these differ" if changed else "none differs") +
        " from the defaults of today's `train.py`, which are LUFFY's on the toy" + (":" if changed else "."),
        *([table(("knob", "value", "default"), [(f"`{k}`", v, default.get(k, "")) for k, v in changed.items()])] if changed
          else []),
    ]  # fmt: skip


def by_the_run(source, run):
    """Paragraphs on the evaluation that training made at the checkpoint's step, if it made one."""
    file = os.path.join(os.path.dirname(source), f"eval_{run['step']}.json") if run else ""
    rows = read_object(os.path.dirname(file), os.path.basename(file))
    if not rows:
        return []
    t = run["knobs"]["eval_temperature"]
    return [f"By the run itself at step {run['step']}, samples at T={t:g}:", accuracies(rows)]


def by_eval(source, digest, evaluation):
    """Paragraphs on an evaluation by eval.py."""
    if not evaluation:
        return []
    folder = repo_path(evaluation).removesuffix("/eval.json")
    read_scores(os.path.join(folder, "eval.json"))  # raises UserError if it is none
    try:
        with open(os.path.join(folder, "settings.json")) as f:
            written = json.load(f)
        weights, knobs = written["settings"]["weights"], written["knobs"]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"{folder}/settings.json does not tell which model was evaluated: {first_line(e)}") from None
    if weights != digest:
        raise UserError(f"--eval={evaluation} is of other weights ({knobs.get('model')}): evaluate {source} with eval.py")
    protocol = ", ".join(f"{k}={bare(knobs[k])}" for k in PROTOCOL if k in knobs)
    return [f"By `eval.py` ({protocol}):", accuracies(read_object(folder, "eval.json"))]


def accuracies(rows):
    """A table of {source: its numbers}."""
    columns = [c for c in SHOWN if any(c in row for row in rows.values())]
    show = lambda c, x: f"{x:.{0 if c == 'length' else 3}f}" if type(x) is float else x
    return table(("source", *columns), [(name, *(show(c, row.get(c, "")) for c in columns)) for name, row in rows.items()])


def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def defaults(script):
    """{knob: its default} of a script."""
    with open(script) as f:
        body = ast.parse(f.read().partition("\nfrom configurator import ")[0]).body
    names = {name for name, _ in read_script(script)[1]}
    found = [(node.targets[0].id, node.value) for node in body if isinstance(node, ast.Assign) and len(node.targets) == 1
             and isinstance(node.targets[0], ast.Name)]  # fmt: skip
    return {name: ast.literal_eval(value) for name, value in found if name in names}


def bare(value):
    """A knob's value for others to read: an absolute path, which names folders of this machine, without these."""
    return os.path.basename(value) if type(value) is str and value[:1] in ("/", "~") else value
