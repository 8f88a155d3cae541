"""
Evaluation as the papers do it: avg@k with its interval, pass@k, maj@k, length, truncation and format per benchmark.

    python eval.py --model=out/toy/ckpt_60 --data=toy/test.parquet --k=4
    torchrun --nproc_per_node=8 eval.py config/eval/luffy.py --model=DIR --data=data/valid.all.parquet
    python eval.py compare out/a/eval.json out/b/eval.json            paired bootstrap, source by source
    python eval.py --sweep=0.1,0.4,0.7,1.0 --k=8 --sources=aime,amc   pass@k against temperature

Writes out_dir/{eval.json, averages.json, settings.json, samples/}. A killed evaluation goes on where it stopped; what
other settings left in out_dir is moved to out_dir/before_1.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch loads; see README, Troubleshooting

# ---------------------------------------------------------------- what to evaluate
data = "toy/test.parquet"  # files of problems, comma-separated, in LUFFY's parquet schema
model = "toy/base"  # a folder in Hugging Face format, or a hub name
out_dir = "out/eval"  # where the results go
sources = ""  # benchmarks to take, comma-separated; "" takes all
max_problems = 0  # per source; 0 takes all
# ---------------------------------------------------------------- the prompt (config/templates.toml)
template = "own"  # own: the model's chat template; qwen, simplerl, prime, prime_sft, no
system = "remove"  # keep or remove the data's system turn; the model's template may put its own default there
shuffle_options = ""  # sources whose multiple-choice options are permuted, by the seed, such as arc_c,gpqa,mmlu_pro
# ---------------------------------------------------------------- sampling
k = "1,aime=32,aime25=32,amc=32"  # samples per problem: one number, and sources that differ
temperature = 0.6  # 0 is greedy; top_p is 1 always
sweep = ""  # temperatures, comma-separated: evaluate at each, and write sweep.json and sweep.png
max_tokens = 8192  # response tokens at most
seed = 0  # of the samples
# ---------------------------------------------------------------- grading (reward.py)
grader = "math_verify"  # training's rule; oat: the last \boxed{} counts; or a Python file that defines grade(text, answer)
require_think = True  # the prompt must end in "<think>\n" and the response must close its thought
grade_unclosed = False  # grade a response that never closes its thought as a whole, instead of as wrong
answer_line = False  # take "ANSWER: C" for \boxed{C} where a letter or digit is asked for and nothing is boxed
reward_workers = 2  # verifier processes per rank
reward_timeout = 2.0  # seconds of grading per answer
# ---------------------------------------------------------------- system
sampler = "auto"  # vllm, torch, or auto: vllm where it is installed
dtype = "auto"  # weights and matrix products: float32, bfloat16, or auto: bfloat16 on a GPU
gpu_memory = 0.85  # share of the GPU's memory that vLLM may take
tensor_parallel = 1  # consecutive ranks that share one engine
chunk = 256  # samples per piece of work: what a kill may cost each rank

from configurator import ROOT, UserError, configure, printable, provenance, repo_path, require, run

if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    if sys.argv[1:2] == ["compare"]:
        from stats import compare

        sys.exit(run(lambda: compare(sys.argv[2:])))
    config = run(lambda: configure(globals(), sys.argv[1:], __file__))

import numpy as np
import torch

from data import digest, load_problems, load_templates, load_tokenizer, render_prompt, response_text
from model import load_config, model_path, start_processes
from reward import Verifier, graded_text
from rollout import Sample, open_sampler, request_seed, wants_vllm
from stats import AVERAGES, averages, summarize

WRITTEN = ("eval.json", "averages.json", "samples", "settings.json")  # moved in this order: without settings all is void
# Knobs that may change between a run and its continuation: they do not matter, or what they lead to is compared.
NOT_COMPARED = (
    "data model out_dir sources max_problems template system shuffle_options k temperature sweep gpu_memory reward_workers"
).split()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*args):
    if RANK == 0:
        print(*args, flush=True)


# ---------------------------------------------------------------- problems


def load_benchmark(path, tokenizer, max_problems, max_prompt_tokens, require_think, log=print, render=None):
    """load_problems without repeats of the same question and answer, then at most max_problems per source (0: all)."""
    first = {}
    for p in load_problems(path, tokenizer, max_prompt_tokens, require_think=require_think, log=log, render=render):
        first.setdefault(p.key, p)
    counts, kept = {}, []
    for p in first.values():
        counts[p.source] = counts.get(p.source, 0) + 1
        if not max_problems or counts[p.source] <= max_problems:
            kept.append(p)
    log(f"{path}: {len(kept)} distinct problems to evaluate, of {', '.join(sorted(counts))}")
    return kept


def renderer(tokenizer, template, system, shuffle=(), seed=0):
    """load_problems' `render` for a template of config/templates.toml. Options of the sources in `shuffle` are permuted."""
    templates = load_templates()["eval"]
    if template not in templates:
        raise UserError(f"template={template!r}: choose one of {', '.join(templates)}")
    chosen = templates[template]
    adds_bos = tokenizer.bos_token is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id

    def render(messages, answer, source):
        *before, last = messages
        question = last["content"]
        if source in shuffle:
            question, answer = shuffled(question, answer, seed)
        if "prompt" in chosen:  # a chat template has its own BOS
            return (tokenizer.bos_token if adds_bos else "") + chosen["prompt"].replace("{question}", question), answer
        turns = [m for m in before if system == "keep" or m["role"] != "system"]
        user = chosen.get("user", "{question}").replace("{question}", question)
        return render_prompt(tokenizer, [*turns, {**last, "content": user}]), answer

    return render


def shuffled(question, answer, seed):
    """The question with its options' texts permuted over the labels, and the answer's new label. Unchanged if it has no
    options labelled A) B) C) or 1. 2. 3., if the answer is no label, or if options speak of each other."""
    parts = re.split(r"(?m)^(\(?(?:[A-Z]|[1-9])[).:][ \t]+)", question)  # before, label, text, label, text, ...
    labels, texts = [re.sub(r"\W", "", label) for label in parts[1::2]], parts[2::2]
    in_order = labels in ([chr(ord(a) + i) for i in range(len(labels))] for a in "A1")
    if len(labels) < 2 or not in_order or answer not in labels:
        return question, answer
    if re.search(r"(?i)\b(above|below|both [A-J]|[A-J] and [A-J])\b", " ".join(texts)):
        return question, answer
    bodies = [text.rstrip("\n") for text in texts]
    bodies[-1] = texts[-1].split("\n\n")[0].rstrip("\n")  # what follows a blank line is no part of the last option
    ends = [text[len(body) :] for text, body in zip(texts, bodies, strict=True)]
    order = np.random.default_rng([seed, digest(question)]).permutation(len(labels)).tolist()
    lines = [label + bodies[i] + end for label, i, end in zip(parts[1::2], order, ends, strict=True)]
    return parts[0] + "".join(lines), labels[order.index(labels.index(answer))]


def samples_per_source(k, sources):
    """Read `k`: {source: samples per problem}. Raises UserError if it is malformed, or names no source there is."""
    first, *rest = (part.strip() for part in k.split(","))
    pairs = [[word.strip() for word in part.split("=")] for part in rest]
    if not all(len(pair) == 2 and pair[0] for pair in pairs) or not all(positive(n) for n in (first, *(p[-1] for p in pairs))):
        raise UserError(f"k={k!r}: write a number above zero, then source=number for those that differ")
    known = {*sources, *(name for members in AVERAGES.values() for name in members)}
    if unknown := [name for name, _ in pairs if name not in known]:
        raise UserError(f"k={k!r}: there is no source {unknown[0]!r}, the data has {', '.join(sorted(sources))}")
    special = {name: int(n) for name, n in pairs}
    return {source: special.get(source, int(first)) for source in sources}


def positive(number):
    return number.isdecimal() and int(number) > 0


# ---------------------------------------------------------------- try, and sum up


def evaluate(problems, sampler, verifier, tokenizer, stamp, k, temperature, max_tokens, seed):
    """Try each problem k times. Returns one dict per problem: id, key, source, answer, and a list each of the samples'
    response, length, finish (reason), reward, reason, prediction (the answer found in it) and format (its thought is
    closed and an answer boxed). A prompt that fills the model's context is answered by nothing, and wrong."""
    tries = [(p, i) for p in problems for i in range(k)]
    fits = lambda n: len(tries[n][0].prompt_ids) < sampler.max_model_len
    fitting = [*filter(fits, range(len(tries)))]
    samples, texts, handles = ([None] * len(tries) for _ in range(3))

    def grade(n, sample):
        samples[n], texts[n] = sample, response_text(tokenizer, sample.ids)
        handles[n] = verifier.submit(texts[n], tries[n][0].answer)

    for n in range(len(tries)):
        if not fits(n):
            grade(n, Sample([], [], "length"))
    prompts = [tries[n][0].prompt_ids for n in fitting]
    seeds = [request_seed(seed, "eval", tries[n][0].id, tries[n][1]) for n in fitting]
    sampler.generate(prompts, seeds, temperature, max_tokens, stamp, lambda i, sample: grade(fitting[i], sample))
    verdicts = verifier.collect(handles)
    rows = []
    for i, p in enumerate(problems):
        own = slice(i * k, (i + 1) * k)
        rows.append(
            {
                "id": p.id,
                "key": p.key,
                "source": p.source,
                "answer": p.answer,
                "reward": [v.reward for v in verdicts[own]],
                "reason": [v.reason for v in verdicts[own]],
                "prediction": [v.answer for v in verdicts[own]],
                "length": [len(s.ids) for s in samples[own]],
                "finish": [s.finish_reason for s in samples[own]],
                "format": ["\\boxed" in (graded_text(t, verifier.require_think) or "") for t in texts[own]],
                "response": texts[own],
            }
        )
    return rows


# ---------------------------------------------------------------- work that survives a kill


def settings_of(knobs, problems, model, sampler, dtype, grader):
    """What the samples depend on, and so what two runs must share to be one: knobs, questions and prompts, weights, and the
    code that samples and grades. Small enough for a JSON file."""
    names = ("data", "decoder", "eval", "model", "reward", "rollout")
    own = [open(os.path.join(ROOT, f"{name}.py"), "rb").read() for name in names]
    return {
        **knobs,
        "problems": digest([(p.id, p.key, p.prompt_ids, p.answer) for p in problems]),
        "weights": weights_digest(model) if RANK == 0 else None,  # compared there; it takes seconds a gigabyte
        "code": digest(own),
        "grader": open(repo_path(grader)).read() if os.path.isfile(repo_path(grader)) else grader,
        "sampler": "vllm" if wants_vllm(sampler) else "torch",
        "dtype": dtype,
    }


def open_work(folder, settings, knobs):
    """Make the folder, or find in it what the same settings left, to go on with; move aside what others left there. All
    ranks leave it together, so they agree on what is missing: vLLM's start wants either all of them or none."""
    path, settings = os.path.join(folder, "settings.json"), json.loads(json.dumps(settings))
    if RANK == 0:
        make_folder(folder)
        try:
            with open(path) as f:
                before = json.load(f)
        except (OSError, ValueError):  # none, so what else lies there cannot be trusted
            before = {"settings": {}, "written_by": {}}
        old = before["settings"]
        if old != settings:
            move_aside(folder, [name for name in sorted(old.keys() | settings.keys()) if old.get(name) != settings.get(name)])
            write_json(path, {"settings": settings, "knobs": knobs, "written_by": provenance()})
        elif before["written_by"] != provenance():
            print0(f"note: {folder} was begun by another commit or with other packages (settings.json names them)")
        make_folder(os.path.join(folder, "samples"))
    if WORLD > 1:
        torch.distributed.barrier()


def move_aside(folder, differ):
    """Put what work left in the folder into the first free before_N there."""
    found = [name for name in WRITTEN if os.path.exists(os.path.join(folder, name))]
    if found:
        n = 1
        while os.path.exists(aside := os.path.join(folder, f"before_{n}")):
            n += 1
        os.mkdir(aside)
        for name in found:
            os.rename(os.path.join(folder, name), os.path.join(aside, name))
        print0(f"{folder} held work with other settings ({', '.join(differ)}): moved to {aside}")


def work_through(folder, chunks, work, tensor_parallel=1):
    """Call work(chunk) for each chunk whose file in folder/samples is missing, the engines taking turns; a file has a JSON
    line per row and appears whole or not at all. Returns once the files of all ranks are there."""
    paths, start, rewards = chunk_files(folder, chunks), time.time(), []
    for i in range(RANK // tensor_parallel, len(chunks), WORLD // tensor_parallel):
        if os.path.exists(paths[i]):
            continue
        rows = work(chunks[i])
        if RANK % tensor_parallel == 0:
            write_lines(paths[i], rows)
        rewards += [reward for row in rows for reward in row["reward"]]
        have, passed = sum(map(os.path.exists, paths)), time.time() - start
        print0(f"  {have} of {len(chunks)} chunks, {passed:.0f} s, mean reward here {sum(rewards) / len(rewards):.3f}")
    while not all(map(os.path.exists, paths)):  # another rank is at work; if it dies, torchrun ends this one
        time.sleep(1)
    if WORLD > 1:
        torch.distributed.barrier()  # now all have seen them, and the caller may do with them what it likes


def chunk_files(folder, chunks):
    return [os.path.join(folder, "samples", f"{i:05d}.jsonl") for i in range(len(chunks))]


@contextlib.contextmanager
def whole(path):
    """A text file that is at `path` when the block has ended, or not at all, even if the machine dies."""
    try:
        with open(path + ".partial", "w") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".partial", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(path + ".partial")
        raise


def write_lines(path, rows):
    with whole(path) as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)


def read_lines(paths):
    for path in paths:
        with open(path) as f:
            try:
                yield from map(json.loads, f)
            except ValueError:
                raise UserError(f"{path} is damaged: remove it, and the same command makes it again") from None


def weights_digest(name):
    """A number that changes if any file of a model's folder does; of a hub model, its name and commit."""
    if not os.path.isdir(name):
        return digest(name, load_config(name)._commit_hash)
    seen = []
    for file in sorted(f for f in os.listdir(name) if os.path.isfile(os.path.join(name, f))):
        with open(os.path.join(name, file), "rb") as f:
            seen.append((file, hashlib.file_digest(f, "sha256").digest()))
    return digest(seen)


# ---------------------------------------------------------------- the command


def main():
    require(globals(), "max_tokens reward_workers reward_timeout gpu_memory tensor_parallel chunk", "temperature max_problems")
    for name, value, choices in (("dtype", dtype, ("auto", "float32", "bfloat16")), ("system", system, ("keep", "remove"))):
        if value not in choices:
            raise UserError(f"{name}={value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    if WORLD % tensor_parallel:
        raise UserError(f"tensor_parallel={tensor_parallel} must divide the {WORLD} process(es) that torchrun started")
    wants_vllm(sampler)
    temperatures = read_temperatures(sweep) if sweep else [temperature]
    name = model_path(model)
    tokenizer = load_tokenizer(name)
    context = load_config(name).max_position_embeddings
    verifier = Verifier(reward_workers, reward_timeout, require_think, grader, grade_unclosed, answer_line)
    problems = gather_problems(renderer(tokenizer, template, system, words(shuffle_options), seed), tokenizer)
    k_of = samples_per_source(k, {p.source for p in problems})
    lengths = [len(p.prompt_ids) for p in problems]
    room = min(context, max(lengths) + max_tokens)
    if max(lengths) + max_tokens > context:
        full = sum(n >= context for n in lengths)
        print0(f"note: responses end where the context of {context} tokens does; {full} prompts fill it, and count as wrong")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = dtype if dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    start_processes(device, "none")
    compared = {name: value for name, value in config.items() if name not in NOT_COMPARED} | {"k": k_of}
    settings = settings_of(compared, problems, name, sampler, kind, grader)
    engine, tables, chunks = None, {}, cut(problems, k_of)

    def work(part, t):
        return evaluate(part, engine, verifier, tokenizer, name, k_of[part[0].source], t, max_tokens, seed)

    with verifier:
        for t in temperatures:
            folder = repo_path(os.path.join(out_dir, f"temperature_{t:g}") if sweep else out_dir)
            if sweep:
                print0(f"temperature {t:g}")
            open_work(folder, {**settings, "temperature": t}, config)
            if engine is None and not all(map(os.path.exists, chunk_files(folder, chunks))):
                engine = open_sampler(name, tokenizer.eos_token_id, room, sampler, kind, gpu_memory, seed, tensor_parallel)
            work_through(folder, chunks, partial(work, t=t), tensor_parallel)
            if RANK == 0:
                tables[f"{t:g}"] = report(folder, chunk_files(folder, chunks))
    if WORLD > 1:
        torch.distributed.barrier()  # nobody leaves while another still needs it
    if engine:
        engine.close()
    if sweep and RANK == 0:
        from plot import draw_sweep  # here, because matplotlib takes a second to load

        write_json(os.path.join(repo_path(out_dir), "sweep.json"), tables)
        draw_sweep(tables, os.path.join(repo_path(out_dir), "sweep.png"))


def read_temperatures(text):
    try:
        values = [float(t) for t in text.split(",")]
    except ValueError:
        raise UserError(f"sweep={text!r}: write temperatures with commas, such as 0.1,0.4,0.7,1.0") from None
    if not all(0 <= v < 100 for v in values):
        raise UserError(f"sweep={text!r}: temperatures are zero or more")
    return values


def words(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def gather_problems(render, tokenizer):
    """The chosen sources of all files, each problem's id its key: its samples do not depend on the file it stands in."""
    found = {}
    for path in words(data):
        for p in load_benchmark(repo_path(path), tokenizer, 0, sys.maxsize, require_think, print0, render):
            p.id = p.key
            found.setdefault(p.source, {}).setdefault(p.key, p)
    wanted = words(sources) or sorted(found)
    for name, asked in (("sources", wanted), ("shuffle_options", words(shuffle_options))):
        if missing := [source for source in asked if source not in found]:
            raise UserError(f"{name}: the data has no {missing[0]!r}, it has {', '.join(sorted(found))}")
    return [p for source in sorted(set(wanted)) for p in list(found[source].values())[: max_problems or None]]


def cut(problems, k_of):
    """Chunks of problems of one source, about `chunk` samples each."""
    chunks, by_source = [], {}
    for p in problems:
        by_source.setdefault(p.source, []).append(p)
    for source, own in by_source.items():
        size = max(1, chunk // k_of[source])
        chunks += [own[i : i + size] for i in range(0, len(own), size)]
    return chunks


def report(folder, paths):
    """Sum up the samples: eval.json, averages.json, and a table on the screen."""
    rows = list(read_lines(paths))
    table = summarize(rows)
    means = averages(rows, table)
    for source, row in table.items():  # for compare, which may see nothing but this file
        row["problems"] = {str(r["key"]): float(np.mean(r["reward"])) for r in rows if r["source"] == source}
    write_json(os.path.join(folder, "averages.json"), means)
    write_json(os.path.join(folder, "eval.json"), table)
    columns = ("pass@k", "maj@k", "length", "truncated", "format")
    print(f"{'source':<20}{'n':>6}{'k':>4}{'avg@k':>8}{'95 % interval':>18}" + "".join(f"{c:>11}" for c in columns))
    for source, row in (table | means).items():
        low, high = row["avg@k_ci"]
        counts = f"{row['n']:>6}{row['k']:>4}" if "k" in row else f"{row['n']:>6}    "
        rest = "".join(f"{row[c]:>11.{0 if c == 'length' else 3}f}" for c in columns)
        print(f"{source:<20}{counts}{row['avg@k']:>8.3f}{f'[{low:.3f}, {high:.3f}]':>18}{rest}")
    print("\n".join(best_and_worst(rows)))
    return table


def best_and_worst(rows):
    """Two lines: the tails of a best answer, the shortest if there are several, and of a worst, the longest."""
    answers = [
        (reward, -length, i, j)
        for i, r in enumerate(rows)
        for j, (reward, length) in enumerate(zip(r["reward"], r["length"], strict=True))
    ]
    lines = []
    for word, (reward, _, i, j) in (("best", max(answers)), ("worst", min(answers))):
        r = rows[i]
        tail = printable(r["response"][j][-80:].replace("\n", " "))
        lines.append(f"  {word:<5} reward {reward:g}, {r['length'][j]} tokens, answer {printable(r['answer'][:30])}: ...{tail}")
    return lines


def make_folder(folder):
    """Make an output folder before there is anything to lose. Raises UserError if it cannot be written."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"out_dir {folder} cannot be written: {e.strerror}") from None
    return folder


def write_json(path, value):
    with whole(path) as f:
        json.dump(value, f, indent=1, allow_nan=False)


if __name__ == "__main__":
    run(main)
    if WORLD > 1 and tensor_parallel == 1:  # as in train.py: gloo's threads may abort an interpreter on its way out
        sys.stdout.flush()
        os._exit(0)
