"""
Evaluate a model as the papers do: avg@k with its interval, pass@k, maj@k, length, truncation and format per benchmark.

    python eval.py --model=out/toy/ckpt_60 --data=toy/test.parquet --k=4
    torchrun --nproc_per_node=8 eval.py config/eval/luffy.py --model=DIR --data=data/valid.all.parquet
    python eval.py compare out/a/eval.json out/b/eval.json            paired bootstrap, source by source
    python eval.py --sweep=0.1,0.4,0.7,1.0 --k=8 --sources=aime,amc   pass@k against temperature

Writes out_dir/{eval.json, averages.json, settings.json, samples/, .lock}. A path starts at the repository, or at the current
folder if it begins with ./ or ../. The same command continues a killed evaluation. Results of other settings in out_dir are
moved to out_dir/before_1.
"""

import contextlib
import os
import re
import sys
from functools import partial

from runtime.process import begin, lost_output

if __name__ == "__main__":
    begin()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch loads; see docs/faq.md, Troubleshooting

# ---------------------------------------------------------------- what to evaluate
data = "toy/test.parquet"  # problems, comma-separated: parquet, JSON lines or a dataset on the hub (docs/data.md)
model = "toy/base"  # a folder in Hugging Face format, or a hub name
out_dir = "out/eval"  # where the results go
sources = ""  # benchmarks to evaluate, comma-separated; "" is all
max_problems = 0  # per source; 0 is all
# ---------------------------------------------------------------- the prompt (config/templates.toml)
template = "own"  # own: the model's chat template; qwen, simplerl, prime, prime_sft, no
system = "remove"  # the data's system turn; without it the chat template may add its own default [keep | remove]
shuffle_options = ""  # sources whose multiple-choice options are permuted (by seed), such as arc_c,gpqa,mmlu_pro
# ---------------------------------------------------------------- sampling
k = "1,aime=32,aime25=32,amc=32"  # samples per problem: one number, then exceptions by source
temperature = 0.6  # 0 is greedy; below 0.01 logits overflow, and vLLM takes 0.01; top_p is always 1 [0 or 0.01, 100]
sweep = ""  # temperatures, comma-separated: evaluate at each, and write sweep.json and sweep.png
max_tokens = 8192  # response tokens at most [> 0]
seed = 0  # of the samples [0, 4294967295]
# ---------------------------------------------------------------- grading (reward.py)
grader = "math_verify"  # training's rule; oat: the last \boxed{} counts; or a Python file that defines grade(text, answer)
require_think = True  # the prompt must end in "<think>\n" and the response must close its thought
grade_unclosed = False  # a response that never closes its thought is graded as a whole, instead of counted as wrong
answer_line = False  # read "ANSWER: C" as \boxed{C} if the ground truth is a letter or digit and nothing is boxed
refuse_unevaluated = False  # where the ground truth is a plain number, \binom{10}{3} for 120 is wrong
solved_at = 1.0  # a reward from here on counts as solved, in pass@k and maj@k; of interest for your own grader [> 0]
reward_workers = 2  # verifier processes per rank [1, 1024]
reward_timeout = 2.0  # seconds of grading per answer [0.01, 86400]
# ---------------------------------------------------------------- system
sampler = "auto"  # auto: vllm where it is installed [auto | vllm | torch]
device = "auto"  # the GPU if there is one, and vLLM is not the one for CPUs [auto | cpu | cuda]
dtype = "auto"  # of weights and matrix products; auto: bfloat16 on a GPU [auto | float32 | bfloat16]
gpu_memory = 0.85  # share of the GPU's memory that vLLM may take [> 0]
tensor_parallel = 1  # consecutive ranks that share one engine [> 0]
chunk = 256  # samples per chunk of work; a kill loses at most one chunk per rank [> 0]
hang_timeout = 300.0  # end after so many seconds without progress on any rank [0.1, 604800]

from configurator import UserError, configure, out_of_range, printable, run

if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    if sys.argv[1:2] == ["compare"]:
        from runtime.stats import compare

        sys.exit(run(lambda: compare(sys.argv[2:])) or lost_output())
    config = run(lambda: configure(globals(), sys.argv[1:], __file__))

import numpy as np

from data import digest, load_benchmark, load_templates
from reward import Verifier, graded_text, letter_with_text
from rollout import Sample, choose_sampler, open_sampler, pick_device, request_seed
from runtime.files import load_config, model_path, write_json
from runtime.folder import OutputFolder
from runtime.guard import Watch
from runtime.metrics import best_and_worst
from runtime.preflight import check_ids, warn_of_busy_cores
from runtime.ranks import RANK, WORLD, barrier, gather_engines, leave, mine, print0, start_processes
from runtime.rows import data_path
from runtime.stats import AVERAGES, averages, summarize
from runtime.tokenizer import ends_in_words, load_tokenizer, render_prompt, response_text
from runtime.work import chunk_files, open_work, read_chunks, settings_of, work_through

# Knobs that may change when a killed evaluation is continued: the samples do not depend on them, or what follows from
# them is compared instead (the problems, the weights, k by source, each temperature).
NOT_COMPARED = (
    "data model out_dir sources max_problems template system shuffle_options k temperature sweep gpu_memory reward_workers"
    " hang_timeout"
).split()


# ---------------------------------------------------------------- problems


def renderer(tokenizer, template, system, shuffle=(), seed=0, left_alone=None):
    """load_problems' `render` for a template of config/templates.toml. shuffle: sources whose options are permuted.
    left_alone: a dict that gets {(source, question): why its options were not}."""
    templates = load_templates()["eval"]
    if template not in templates:
        raise UserError(f"template={template!r}: choose one of {', '.join(templates)}")
    chosen = templates[template]
    adds_bos = tokenizer.bos_token is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id

    def render(messages, answer, source):
        *before, last = messages
        question = last["content"]
        if source in shuffle:
            if left_alone is not None and isinstance(why := options(question, answer), str):
                left_alone[source, question] = why
            question, answer = shuffled(question, answer, seed)
        if "prompt" in chosen:  # unlike a chat template it has no BOS
            return (tokenizer.bos_token if adds_bos else "") + chosen["prompt"].replace("{question}", question), answer
        turns = [m for m in before if system == "keep" or m["role"] != "system"]
        user = chosen.get("user", "{question}").replace("{question}", question)
        return render_prompt(tokenizer, [*turns, {**last, "content": user}]), answer

    return render


def options(question, answer):
    """Where a question's options stand: a list of (label, start of its text, end of its text). The labels A) B) C), (A) (B),
    A. B. or A: B: begin a line and are all of one form; not 1. 2., which may be steps, and the answer 2 their number. Of
    several runs A, B, C, ... the last one counts, because the question itself may have such a list. An option ends before
    the next label, the last one before a blank line. Why they cannot be permuted, a string, if there are no options, the
    answer is no label, or an option refers to others."""
    runs = {}  # the form of a label -> its last run
    for m in re.finditer(r"(?m)^[ \t]*(\(?)([A-Z])([).:])[ \t]+", question):
        run = runs.setdefault((m[1], m[3]), [])
        if m[2] == "A":
            run[:] = [m]
        elif run and ord(m[2]) == ord(run[-1][2]) + 1:
            run.append(m)
    known = [run for run in runs.values() if len(run) > 1]
    if not known:
        return "no options A, B, ... at the beginning of lines"
    fitting = [run for run in known if answer in [m[2] for m in run]]
    if not fitting:
        return "the ground truth is no option's label"
    run = max(fitting, key=lambda run: run[0].start())
    ends = [m.start() for m in run[1:]] + [re.search(r"\n[ \t\r]*\n|\Z", question[run[-1].end() :]).start() + run[-1].end()]
    found = [(m[2], m.end(), m.end() + len(question[m.end() : end].rstrip())) for m, end in zip(run, ends, strict=True)]
    if any(REFERS.search(question[start:end]) for _, start, end in found):
        return "an option refers to others"
    return found


REFERS = re.compile(  # to above, both A, A and B, (A) or (B), option C, none of the others
    r"(?i:\b(?:above|below|(?:both|n?either|options?|choices?|answers?|(?:same|true) as) \(?[A-J]\b"
    r"|(?:all|none|any|both) of (?:the )?(?:other|previous|options)))|\b[A-J]\)? (?:and|or|nor|&) \(?[A-J]\b"
)


def shuffled(question, answer, seed):
    """Permute the texts of a question's options over their labels. Returns the question and the answer's new label; both are
    unchanged where options() says why."""
    if isinstance(found := options(question, answer), str):
        return question, answer
    labels, starts, ends = zip(*found, strict=True)
    order = np.random.default_rng([seed, digest(question)]).permutation(len(found)).tolist()
    between = [question[a:b] for a, b in zip((0, *ends), (*starts, len(question)), strict=True)]
    texts = [question[starts[i] : ends[i]] for i in order]
    return "".join(map(str.__add__, between, [*texts, ""])), labels[order.index(labels.index(answer))]


def samples_per_source(k, sources):
    """The knob `k` -> {source: samples per problem}. Raises UserError if it is malformed or names an unknown source."""
    first, *rest = (part.strip() for part in k.split(","))
    pairs = [[word.strip() for word in part.split("=")] for part in rest]
    if not all(len(pair) == 2 and pair[0] for pair in pairs) or not all(positive(n) for n in (first, *(p[-1] for p in pairs))):
        raise UserError(f"k={k!r}: write a number above zero, then source=number for each exception")
    known = {*sources, *(name for members in AVERAGES.values() for name in members)}
    if unknown := [name for name, _ in pairs if name not in known]:
        raise UserError(f"k={k!r}: there is no source {unknown[0]!r}, the data has {', '.join(sorted(sources))}")
    special = {name: int(n) for name, n in pairs}
    return {source: special.get(source, int(first)) for source in sources}


def positive(number):
    return number.isdecimal() and int(number) > 0


# ---------------------------------------------------------------- sample and grade


def evaluate(problems, sampler, verifier, tokenizer, stamp, k, temperature, max_tokens, seed):
    """Sample k responses per problem and grade them. Returns one dict per problem: id, key, source, answer, and lists
    with an entry per sample: response, length, finish (reason), reward, reason, prediction (the answer found in it),
    format (its thought is closed and an answer is boxed) and letter_with_text (it is wrong by that, see reward.py). A
    prompt that fills the model's context gets an empty response, which is wrong. stamp: of the weights to sample from."""
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
    sampler.generate(prompts, seeds, temperature, max_tokens, stamp, done=lambda i, sample: grade(fitting[i], sample))
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
                "letter_with_text": [
                    v.reason == "wrong" and letter_with_text(graded_text(t, verifier.require_think, True), p.answer)
                    for v, t in zip(verdicts[own], texts[own], strict=True)
                ],
                "response": texts[own],
            }
        )
    return rows


def evaluate_modes(problems, sampler, verifier, tokenizer, guard, *, stamp, modes, max_tokens, seed, tensor_parallel):
    """Greedy and sampled accuracy during training; all ranks share the work. modes: [(name, samples per problem,
    temperature), ...]. Returns metrics {eval/name: mean reward}, a table {source: its numbers}, and the last mode's
    rows of evaluate()."""
    metrics, table, rows = {}, {}, []
    for name, k, temperature in modes:
        with guard.interruptible():
            own = mine(problems, tensor_parallel)
            rows = evaluate(own, sampler, verifier, tokenizer, stamp=stamp, k=k, temperature=temperature,
                            max_tokens=max_tokens, seed=seed)  # fmt: skip
        rows = gather_engines(rows, tensor_parallel)
        by_source = summarize(rows)
        for source, row in by_source.items():
            entry = table.setdefault(source, {"n": row["n"]})
            entry |= {"greedy": row["avg@k"]} if name == "greedy" else row
            metrics |= {f"eval/{name}/{source}": row["avg@k"]} if len(by_source) > 1 else {}
        metrics[f"eval/{name}"] = sum(sum(r["reward"]) / k for r in rows) / len(rows)
    return metrics, table, rows


# ---------------------------------------------------------------- the command


def main():
    if WORLD % tensor_parallel:
        raise UserError(f"tensor_parallel={tensor_parallel} must divide the {WORLD} process(es) that torchrun started")
    output = OutputFolder(out_dir, "eval.py", inputs=[*words(data), model, grader])
    kind, precision = pick_device(device, dtype)
    engine_kind = choose_sampler(sampler)
    warn_of_busy_cores(kind)
    temperatures = read_temperatures(sweep) if sweep else [temperature]
    name = model_path(model)
    tokenizer = load_tokenizer(name)
    print0(ends_in_words(tokenizer))
    model_config = load_config(name)
    context = model_config.max_position_embeddings
    verifier = Verifier(
        workers=reward_workers, timeout=reward_timeout, require_think=require_think, grader=grader,
        grade_unclosed=grade_unclosed, answer_line=answer_line, solved_at=solved_at,
        refuse_unevaluated=refuse_unevaluated,
    )  # fmt: skip
    left_alone = {}
    problems = gather_problems(renderer(tokenizer, template, system, words(shuffle_options), seed, left_alone), tokenizer)
    for line in not_shuffled(left_alone):
        print0(line)
    check_ids(problems, tokenizer, model_config)
    k_of = samples_per_source(k, {p.source for p in problems})
    lengths = [len(p.prompt_ids) for p in problems]
    room = min(context, max(lengths) + max_tokens)
    if max(lengths) + max_tokens > context:
        full = sum(n >= context for n in lengths)
        print0(f"note: responses end at the context of {context} tokens; {full} prompts fill it and count as wrong")
    start_processes(kind, "none", config)
    compared = {name: value for name, value in config.items() if name not in NOT_COMPARED} | {"k": k_of, "device": kind}
    settings = settings_of(compared, problems, model=name, sampler=engine_kind, dtype=precision, verifier=verifier)
    engine, tables, chunks = None, {}, cut(problems, k_of)

    def work(part, t):
        return evaluate(part, engine, verifier, tokenizer, stamp=name, k=k_of[part[0].source], temperature=t,
                        max_tokens=max_tokens, seed=seed)  # fmt: skip

    with contextlib.ExitStack() as stack:
        stack.enter_context(output)
        stack.enter_context(verifier)
        for t in temperatures:
            place = output
            if sweep:
                print0(f"temperature {t:g}")
                place = stack.enter_context(OutputFolder(os.path.join(output.path, f"temperature_{t:g}"), "eval.py"))
            open_work(place, {**settings, "temperature": t}, config)
            paths = chunk_files(place.path, chunks)
            if engine is None and not all(map(os.path.exists, paths)):
                engine = open_sampler(
                    name, tokenizer.stop_ids, room, sampler=engine_kind, dtype=precision, gpu_memory=gpu_memory,
                    seed=seed, tensor_parallel=tensor_parallel,
                )  # fmt: skip
            with Watch(hang_timeout) as watch:
                verifier.tick = watch.progress
                if engine:
                    engine.tick = watch.progress
                work_through(place, chunks, partial(work, t=t), watch, tensor_parallel)
            if RANK == 0:
                tables[f"{t:g}"] = report(place.path, paths)
        if sweep and RANK == 0:
            from plot import draw_sweep  # here, because matplotlib takes a second to load

            write_json(os.path.join(output.path, "sweep.json"), tables)
            draw_sweep(tables, os.path.join(output.path, "sweep.png"))
    barrier()  # no rank leaves while another still needs it
    if engine:
        engine.close()


def read_temperatures(text):
    try:
        values = [float(t) for t in text.split(",")]
    except ValueError:
        raise UserError(f"sweep={text!r}: write temperatures with commas, such as 0.1,0.4,0.7,1.0") from None
    if wrong := next(filter(None, (out_of_range("temperature", v, "[0 or 0.01, 100]") for v in values)), None):
        raise UserError(f"sweep={text!r}: {wrong}")
    names = [f"{v:g}" for v in values]  # of the folders, too
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"sweep={text!r}: {twice[0]} is there twice; temperatures differ in their first six digits")
    return values


def not_shuffled(left_alone, shown=5):
    """Lines that count and name the questions whose options stay as they are."""
    by_reason = {}
    for (source, question), why in left_alone.items():
        by_reason.setdefault((source, why), []).append(" ".join(question.split())[:60])
    for (source, why), names in sorted(by_reason.items()):
        named = "; ".join(map(repr, names[:shown])) + ("; ..." if len(names) > shown else "")
        yield printable(f"shuffle_options: {len(names)} questions of {source} are left alone ({why}): {named}")


def words(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def gather_problems(render, tokenizer):
    """The problems of the chosen sources, from all files. A problem's id is its key, so its samples do not depend on
    the file that it comes from."""
    found = {}
    for path in words(data) or [""]:  # which data_path refuses
        loaded = load_benchmark(
            data_path(path), tokenizer, max_problems=0, max_prompt_tokens=sys.maxsize, require_think=require_think,
            log=print0, render=render,
        )  # fmt: skip
        for p in loaded:
            p.id = p.key
            found.setdefault(p.source, {}).setdefault(p.key, p)
    wanted = words(sources) or sorted(found)
    for name, asked in (("sources", wanted), ("shuffle_options", words(shuffle_options))):
        if missing := [source for source in asked if source not in found]:
            raise UserError(f"{name}: the data has no {missing[0]!r}, it has {', '.join(sorted(found))}")
    return [p for source in sorted(set(wanted)) for p in list(found[source].values())[: max_problems or None]]


def cut(problems, k_of):
    """Cut problems into chunks. Each is of one source and has about `chunk` samples."""
    chunks, by_source = [], {}
    for p in problems:
        by_source.setdefault(p.source, []).append(p)
    for source, own in by_source.items():
        size = max(1, chunk // k_of[source])
        chunks += [own[i : i + size] for i in range(0, len(own), size)]
    return chunks


def report(folder, paths):
    """Summarise the samples: write eval.json and averages.json, and print a table."""
    rows = list(read_chunks(paths))
    table = summarize(rows)
    means = averages(rows, table)
    for source, row in table.items():  # for compare, which may have only this file
        row["problems"] = {str(r["key"]): float(np.mean(r["reward"])) for r in rows if r["source"] == source}
    write_json(os.path.join(folder, "averages.json"), means)
    write_json(os.path.join(folder, "eval.json"), table)
    columns = [c for c in ("pass@k", "maj@k", "length", "truncated", "format") if any(c in row for row in table.values())]
    print(f"{'source':<20}{'n':>6}{'k':>4}{'avg@k':>8}{'95 % interval':>18}" + "".join(f"{c:>11}" for c in columns))
    for source, row in (table | means).items():
        low, high = row["avg@k_ci"]
        counts = f"{row['n']:>6}{row['k']:>4}" if "k" in row else f"{row['n']:>6}    "
        rest = "".join(f"{row[c]:>11.{0 if c == 'length' else 3}f}" if c in row else f"{'-':>11}" for c in columns)
        print(f"{source:<20}{counts}{row['avg@k']:>8.3f}{f'[{low:.3f}, {high:.3f}]':>18}{rest}")
    for source, row in table.items():
        if n := row["letter_with_text"]:
            print(f"  {source}: {n} of {row['n'] * row['k']} samples box the right letter with more text, and count as wrong")
    for reason in ("error", "timeout"):
        if n := sum(r["reason"].count(reason) for r in rows):
            print(
                f"note: {n} of {sum(len(r['reason']) for r in rows)} answers count as wrong because grading ended in {reason}"
            )
    print("\n".join(best_and_worst(rows)))
    return table


if __name__ == "__main__":
    leave(run(main), tensor_parallel)
