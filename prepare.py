"""
Prepare what training needs: problems in LUFFY's schema, a model with enough positions and a chat template for long thoughts,
and a teacher model that reads the policy's token ids; and make a trained model ready for others.

    python prepare.py openr1 --tokenizer=models/Qwen2.5-Math-7B-16k-think
    python prepare.py gsm8k
    python prepare.py reanswer --model=TEACHER --data=data/openr1.parquet --out=data/openr1.teacher.parquet
    python prepare.py model --model=Qwen/Qwen2.5-Math-7B --out=models/Qwen2.5-Math-7B-16k-think
    python prepare.py model --model=FILE.gguf --out=models/NAME --rope_theta=0 --max_position=0
    python prepare.py align --model=TEACHER --policy=models/Qwen2.5-Math-7B-16k-think --out=models/TEACHER-aligned
    python prepare.py export --model=out/luffy_7b/latest --out=models/luffy-7b

All commands write to *.partial and rename at the end, so a file with its final name is whole. They overwrite nothing.
"""

import argparse
import sys

from runtime.process import begin, unwind_on_signals

if __name__ == "__main__":
    begin()

from configurator import UserError, first_line, out_of_range, repo_path, run


def check_range(args, names, written):
    """Raise UserError for the first named argument that is outside the range, written as in a knob's comment."""
    for name in names.split():
        if wrong := out_of_range(name, getattr(args, name), written):
            raise UserError(wrong)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser("openr1", allow_abbrev=False, help="OpenR1-Math-220k to LUFFY's files")
    p.add_argument("--src", default="open-r1/OpenR1-Math-220k", help="a hub data set (%(default)s), a parquet file or a folder")
    p.add_argument("--out", default="data/openr1.parquet", help="%(default)s; the other files are written beside it")
    p.add_argument("--tokenizer", required=True, help="folder or hub name of the model to be trained")
    p.add_argument("--traces", default="first", choices=["first", "all"], help="usable traces that a problem keeps")
    p.add_argument("--max_tokens", type=int, default=8192, help="of a trace, EOS included (%(default)s)")
    p.add_argument("--tags", default="keep", choices=["keep", "open", "drop"], help="of traces: open drops <think>, drop both")

    p = commands.add_parser("gsm8k", allow_abbrev=False, help="GSM8K to LUFFY's schema, its solutions as traces")
    p.add_argument("--src", default="openai/gsm8k", help="a hub data set (%(default)s), or a folder or file with a copy of it")
    p.add_argument("--out", default="data/gsm8k.parquet", help="%(default)s; the test questions are written beside it")

    p = commands.add_parser("reanswer", allow_abbrev=False, help="new traces by another teacher, verified; resumable")
    p.add_argument("--model", required=True, help="the teacher: a folder in Hugging Face format, or a hub name")
    p.add_argument("--data", required=True, help="problems in LUFFY's schema; their traces are ignored")
    p.add_argument("--out", required=True, help="problems with a verified trace; the others are written beside it")
    p.add_argument("--k", type=int, default=1, help="samples per problem; each verified one becomes a trace (%(default)s)")
    p.add_argument("--temperature", type=float, default=0.7, help="of sampling (%(default)s)")
    p.add_argument("--max_tokens", type=int, default=8192, help="of a sample, EOS included (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    p.add_argument("--require_think", default="True", choices=["True", "False"], help="a thought must close (%(default)s)")
    p.add_argument("--grader", default="math_verify", help="or oat, or a file that defines grade(text, answer) (%(default)s)")
    p.add_argument("--solved_at", type=float, default=1.0, help="a reward from here on counts as solved (%(default)s)")
    p.add_argument("--reward_workers", type=int, default=2, help="verifier processes per rank (%(default)s)")
    p.add_argument("--reward_timeout", type=float, default=2.0, help="seconds of grading per answer (%(default)s)")
    p.add_argument("--sampler", default="auto", choices=["auto", "vllm", "torch"], help="auto: vllm where it is installed")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: the GPU, if vLLM is made for it")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on a GPU")
    p.add_argument("--gpu_memory", type=float, default=0.85, help="share of the GPU's memory for vLLM (%(default)s)")
    p.add_argument("--tensor_parallel", type=int, default=1, help="consecutive ranks that share one engine (%(default)s)")
    p.add_argument("--chunk", type=int, default=256, help="samples per chunk; a kill loses one chunk per rank (%(default)s)")
    p.add_argument("--hang_timeout", type=float, default=300.0, help="end after so many seconds without progress (%(default)s)")

    p = commands.add_parser("model", allow_abbrev=False, help="set a model's RoPE base, positions and chat template")
    p.add_argument("--model", required=True, help="a folder in Hugging Face format, a hub name, or a local file.gguf")
    p.add_argument("--out", required=True, help="the new folder")
    p.add_argument("--rope_theta", type=int, default=40000, help="0 leaves the model's own (%(default)s)")
    p.add_argument("--max_position", type=int, default=16384, help="0 leaves the model's own (%(default)s)")
    p.add_argument("--template", default="luffy", help="luffy, llama, keep, or a Jinja file (%(default)s)")
    p.add_argument("--round_trip", default="True", choices=["True", "False"], help="generate some tokens with it (%(default)s)")

    p = commands.add_parser("align", allow_abbrev=False, help="give a teacher model the policy's tokenizer, end and rows")
    p.add_argument("--model", required=True, help="the teacher: a folder in Hugging Face format, or a hub name")
    p.add_argument("--policy", required=True, help="the model to be trained; only its tokenizer and config are read")
    p.add_argument("--out", required=True, help="the new folder")
    p.add_argument("--swap_ends", default="True", choices=["True", "False"],
                   help="False renames the end and leaves the weights, as published (%(default)s)")  # fmt: skip

    p = commands.add_parser("export", allow_abbrev=False, help="a checkpoint as a folder for vLLM, lm-eval and the hub")
    p.add_argument("--model", required=True, help="a checkpoint, such as out/RUN/latest, or another model folder")
    p.add_argument("--out", required=True, help="the new folder; its name is the card's title")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights (%(default)s)")
    p.add_argument("--eval", default="", help="eval.py's out_dir: its accuracies go into the card")
    p.add_argument("--base", default="", help="the base model's name on the hub, for the card")
    p.add_argument("--round_trip", default="True", choices=["True", "False"], help="generate some tokens with it (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    args = run(lambda: parse(sys.argv[1:]))

import contextlib
import gc
import glob
import hashlib
import json
import os
import re
import shutil
import time
from fnmatch import fnmatch
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import set_verbosity_error

from data import EMPTY, THINK, Unusable, load_problems, load_templates, plain_trace
from eval import evaluate
from model import load_policy
from reward import Verifier
from rollout import Sample, choose_sampler, open_sampler, pick_device
from runtime.card import model_card
from runtime.files import (
    CONFIGS,
    TOKENIZER,
    load_config,
    model_path,
    partial_name,
    remove_partials,
    weight_files,
    weights_digest,
    write_json,
)
from runtime.folder import Lock, OutputFolder
from runtime.guard import Watch
from runtime.plan import show
from runtime.ranks import RANK, WORLD, barrier, leave, print0, start_processes
from runtime.rows import data_path, open_parquet, read_rows
from runtime.tensors import misshapen, tensor_files
from runtime.tokenizer import check_same_ids, check_same_tokens, ends_in_words, gives_back, load_tokenizer, render_prompt
from runtime.work import chunk_files, open_work, read_chunks, settings_of, work_through

QUESTION = {"role": "user", "content": "What is 1 + 1?"}  # to try a model's chat template with


def from_hub(name, **options):
    try:
        return snapshot_download(name, **options)
    except Exception as e:
        raise UserError(f"there is no {repo_path(name)}, and the hub gives no {name}: {first_line(e)}") from None


def check_free(paths):
    """Raise UserError if anything has one of these names, be it a link that leads nowhere."""
    if taken := [path for path in paths if os.path.lexists(path)]:
        raise UserError(f"{taken[0]} exists: remove it, or name another --out")


def give_name(partial, path):
    """Rename a file. Unlike os.rename it overwrites nothing: it raises UserError."""
    try:
        os.link(partial, path)
    except FileExistsError:
        if not os.path.samefile(partial, path):  # it is after a kill between the two calls
            check_free([path])
    except OSError:  # some file systems have no links
        check_free([path])
        return os.rename(partial, path)
    os.remove(partial)


# ---------------------------------------------------------------- openr1

OPENR1 = {"problem": pa.binary(), "answer": pa.binary(), "generations": pa.list_(pa.binary()),
          "is_reasoning_complete": pa.list_(pa.bool_()), "correctness_math_verify": pa.list_(pa.bool_())}  # fmt: skip
MESSAGES = pa.list_(pa.struct({"content": pa.string(), "role": pa.string()}))
SCHEMA = pa.schema({"data_source": pa.string(), "prompt": MESSAGES, "target": MESSAGES, "ability": pa.string(),
                    "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
                    "extra_info": pa.struct({"index": pa.int64(), "split": pa.string()})})  # fmt: skip
EASY, HARD = 2048, 4096  # the most tokens of the first trace: the paper's 7.3k and 25.4k problems for weak base models
BATCH = 128  # rows in memory at a time, about 6 MB of OpenR1
COUNTS = (
    "rows read", "rows in out", "rows in easy", "rows in hard", "rows in complement",
    "row without: no generations", "row without: lists of different lengths", "row without: no usable trace",
    "row dropped: not UTF-8", "row dropped: no problem", "row dropped: no answer", "row dropped: problem seen before",
    "traces of rows not dropped", "traces kept", "traces behind the first usable one",
    "trace dropped: lists of different lengths", "trace dropped: null", "trace dropped: not complete",
    "trace dropped: not correct", "trace dropped: not UTF-8", "trace dropped: thought never closed",
    "trace dropped: without text", "trace dropped: with a control token inside", "trace dropped: with a second <think>",
    "trace dropped: too long", "trace dropped: changed by the tokenizer",
)  # fmt: skip


def prepare_openr1(args):
    """Follow the recipe of the released 46k set: a generation is usable if math-verify found it right, its reasoning is
    complete and it has at most max_tokens tokens. A problem's target is its first usable generation, or all of them.

    Ours differs in three ways. The limit includes EOS and the leading "<think>\\n", so training drops none of these
    traces, whether or not it strips "<think>\\n". A thought that never closes is unusable: its reward would always be 0.
    A problem with the same text as an earlier one is dropped, whether or not the earlier one has a trace; the recipe does
    not mention repeats.

    Writes out, and beside it *.complement.parquet (rows without a usable trace), *.easy.parquet and *.hard.parquet (rows
    of out whose first trace is short), *.sft.jsonl (a conversation per trace) and *.report.json (COUNTS; a row or trace
    with several faults is counted under the first in that order). It takes one pass, with one batch in memory, and a
    digest per problem to recognise repeats.
    """
    check_range(args, "max_tokens", "[> 0]")
    out = repo_path(args.out)
    stem, ending = os.path.splitext(out)
    if ending != ".parquet":
        raise UserError(f"--out={args.out}: name a file that ends in .parquet")
    tables = {name: f"{stem}.{name}.parquet" for name in ("complement", "easy", "hard")} | {"out": out}
    sft, report = f"{stem}.sft.jsonl", f"{stem}.report.json"
    paths = [sft, report, *tables.values()]
    check_free(paths)
    sources, tokenizer = openr1_files(args.src), load_tokenizer(model_path(args.tokenizer))
    system, longest_token = load_templates()["system"], max(map(len, tokenizer.get_vocab()))
    set_verbosity_error()  # transformers would warn of texts that are longer than the model's context
    counts, seen, beat = dict.fromkeys(COUNTS, 0), set(), time.time()

    def length(text):
        """The number of tokens, EOS included. Raises Unusable above the limit, and for a text that they do not give back. A
        text is not tokenised if its number of characters already shows that it has too many tokens."""
        n = len(text) // longest_token
        if n <= args.max_tokens:
            ids = tokenizer.encode(text, add_special_tokens=False)
            n = len(ids) + 1
        if n > args.max_tokens:
            raise Unusable("too long")
        if not gives_back(tokenizer, ids, text):
            raise Unusable("changed by the tokenizer")
        return n

    for path in paths:
        remove_partials(glob.escape(path))
    partial = {path: partial_name(path) for path in paths}
    try:
        with contextlib.ExitStack() as stack:
            writers = {name: stack.enter_context(pq.ParquetWriter(partial[path], SCHEMA)) for name, path in tables.items()}
            lines = stack.enter_context(open(partial[sft], "w", encoding="utf-8"))
            for batch in openr1_batches(sources):
                found = {name: [] for name in tables}
                for row in batch:
                    counts["rows read"] += 1
                    try:
                        problem, answer = question_of(row, seen)
                    except Unusable as e:
                        counts[f"row dropped: {e}"] += 1
                        continue
                    traces = traces_of(row, length, args.traces == "all", tokenizer.control, counts)
                    prompt = [{"role": "system", "content": system}, {"role": "user", "content": problem}]
                    target = [{"role": "assistant", "content": bare(t, args.tags)} for t, _ in traces]
                    lines.writelines(json.dumps({"messages": [*prompt, m]}, ensure_ascii=False) + "\n" for m in target)
                    first = traces[0][1] if traces else HARD + 1
                    fits = {"out": traces, "easy": first <= EASY, "hard": first <= HARD, "complement": not traces}
                    for name in [name for name in tables if fits[name]]:
                        counts[f"rows in {name}"] += 1
                        found[name].append({
                            "data_source": "openr1", "prompt": prompt, "target": target or None, "ability": "math",
                            "reward_model": {"ground_truth": answer, "style": "rule"},
                            "extra_info": {"index": counts["rows read"] - 1, "split": "default"},
                        })  # fmt: skip
                for name in [name for name in tables if found[name]]:
                    writers[name].write_table(pa.Table.from_pylist(found[name], SCHEMA))
                if time.time() - beat > 10:
                    beat = time.time()
                    print(f"  ... {counts['rows read']} rows, {counts['rows in out']} with a trace", flush=True)
        print("\n".join(f"{what:<44}{n:>9,}" for what, n in counts.items()))
        if not counts["rows in out"]:
            raise UserError(f"no trace of {args.src} is usable, so nothing is written: see the counts above")
        with open(partial[report], "w") as f:
            json.dump({**vars(args), "counts": counts}, f, indent=2)
        check_free(paths)
        for path in paths:  # out is the last
            give_name(partial[path], path)
    finally:
        for path in partial.values():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
    print(f"wrote {', '.join(paths)}")


def bare(trace, tags):
    """A trace with its tags ("keep"), without the opening one ("open") or without both ("drop")."""
    if tags == "keep":
        return trace
    return trace.removeprefix(THINK) if tags == "open" else trace.removeprefix(THINK).replace("</think>", "")


def openr1_files(src):
    """The parquet files that --src names. Raises UserError if one is damaged or does not have OpenR1's schema."""
    path = repo_path(src)
    if not os.path.exists(path) and src.count("/") == 1 and src[0] not in "./~" and not src.endswith(".parquet"):
        path = os.path.join(from_hub(src, repo_type="dataset", allow_patterns="data/train-*.parquet"), "data")
    files = sorted(glob.glob(os.path.join(glob.escape(path), "*.parquet"))) if os.path.isdir(path) else [path]
    if not files:
        raise UserError(f"there is no parquet file in {path}")
    for file in files:
        schema = open_parquet(file).schema_arrow
        for name, want in OPENR1.items():
            found = [t for n, t in zip(schema.names, schema.types, strict=True) if n == name]
            if list(map(as_binary, found)) != [want]:
                have = " and ".join(map(str, found)) or "missing"
                raise UserError(f"{file}: column {name!r} is {have}, unlike OpenR1-Math-220k's: choose another --src")
    return files


def as_binary(t):
    """An Arrow type with text replaced by binary, and lists of large offsets by lists."""
    if pa.types.is_list(t) or pa.types.is_large_list(t):
        return pa.list_(as_binary(t.value_type))
    return pa.binary() if pa.types.is_string(t) or pa.types.is_large_string(t) else t


def openr1_batches(files):
    """Yield lists of {column: value}. Text is bytes, because pyarrow would stop at a cell that is not UTF-8. Pages are
    read when they are needed, so a file may have row groups of any size."""
    for path in files:
        n = 0
        try:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                for batch in file.iter_batches(BATCH, columns=list(OPENR1), use_threads=False):
                    columns = [batch[name].cast(t).to_pylist() for name, t in OPENR1.items()]
                    yield [dict(zip(OPENR1, values, strict=True)) for values in zip(*columns, strict=True)]
                    n += len(batch)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path} is damaged after row {n} ({first_line(e)}): copy it again") from None


def text_of(data):
    try:
        return (data or b"").decode()
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None


def question_of(row, seen):
    """A row's problem and answer. Raises Unusable. seen: digests of the problems so far."""
    problem, answer = text_of(row["problem"]), text_of(row["answer"])
    for text, fault in ((problem, "no problem"), (answer, "no answer")):
        if EMPTY.fullmatch(text):
            raise Unusable(fault)
    key = hashlib.blake2b(row["problem"], digest_size=16).digest()
    if key in seen:
        raise Unusable("problem seen before")
    seen.add(key)
    return problem, answer


def traces_of(row, length, every, control, counts):
    """A row's usable traces, the first or every one: [(trace, its number of tokens), ...]. Updates counts."""
    generations, *flags = (row[name] or [] for name in list(OPENR1)[2:])
    traces, why = [], "no usable trace" if generations else "no generations"
    counts["traces of rows not dropped"] += len(generations)
    if generations and any(len(flag) != len(generations) for flag in flags):
        why = "lists of different lengths"
        counts[f"trace dropped: {why}"] += len(generations)
        generations = []
    for data, *holds in zip(generations, *flags, strict=False):
        if traces and not every:
            counts["traces behind the first usable one"] += 1
            continue
        try:
            text = usable_trace(data, *holds, control)
            traces.append((text, length(text)))
        except Unusable as e:
            counts[f"trace dropped: {e}"] += 1
    counts["traces kept"] += len(traces)
    if not traces:
        counts[f"row without: {why}"] += 1
    return traces


def usable_trace(data, complete, correct, control):
    """A generation's text, beginning with "<think>\\n". Raises Unusable."""
    for holds, fault in ((data is not None, "null"), (complete, "not complete"), (correct, "not correct")):
        if not holds:
            raise Unusable(fault)
    if "</think>" not in (text := text_of(data)):
        raise Unusable("thought never closed")
    return THINK + plain_trace(text, control, opened=True)


# ---------------------------------------------------------------- gsm8k

CALCULATION = re.compile(r"<<[^<>]*>>")  # 48/2 = <<48/2=24>>24: what GSM8K's authors gave a calculator


def prepare_gsm8k(args):
    """GSM8K's training questions with their worked solutions as traces: the solution without the calculator's marks is the
    thought, and the answer behind #### is boxed after </think>. Writes out, and beside it *.test.parquet, the test questions
    without traces. A --src that is one file gives out alone. Prints how many traces the verifier accepts.
    """
    out = repo_path(args.out)
    stem, ending = os.path.splitext(out)
    if ending != ".parquet":
        raise UserError(f"--out={args.out}: name a file that ends in .parquet")
    paths = {"test": f"{stem}.test.parquet", "train": out}
    check_free(paths.values())
    sources, system = gsm8k_sources(args.src), load_templates()["system"]
    partial = {split: partial_name(path) for split, path in paths.items() if split in sources}
    for split in partial:
        remove_partials(glob.escape(paths[split]))
    try:
        with Verifier() as verifier:
            for split in partial:
                rows = [gsm8k_row(row, i, split, system, sources[split]) for i, row in read_rows(sources[split])]
                if not rows:
                    raise UserError(f"{sources[split]} has no row: choose another --src")
                traces = [row["target"][0]["content"].removeprefix(THINK) for row in rows]
                verdicts = verifier.score(traces, [row["reward_model"]["ground_truth"] for row in rows])
                n_right = sum(verdict.reason == "correct" for verdict in verdicts)
                print(f"{split}: {len(rows):,} questions; the verifier accepts {n_right:,} of {len(rows):,} solutions")
                if split == "test":  # to be evaluated on, never to be learnt
                    rows = [{**row, "target": None} for row in rows]
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), partial[split])
        for split in partial:  # out is the last
            give_name(partial[split], paths[split])
    finally:
        for path in partial.values():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
    print(f"wrote {', '.join(paths[split] for split in partial)}")


def gsm8k_sources(src):
    """{split: what read_rows() reads} of --src: the hub's data set, a folder as the hub or the authors lay it out, or one file
    for "train". Raises UserError if a folder lacks a split."""
    path = data_path(src)
    if not os.path.isabs(path):
        if ":" in src:
            raise UserError(f"--src={src}: name the data set alone, such as openai/gsm8k, or a folder or file")
        return {split: f"{src}:main:{split}" for split in ("train", "test")}
    if not os.path.isdir(path):
        return {"train": path}
    sources = {}
    for split in ("train", "test"):
        names = (
            f"main/{split}-00000-of-00001.parquet",
            f"{split}-00000-of-00001.parquet",
            f"{split}.parquet",
            f"{split}.jsonl",
        )
        found = [file for name in names if os.path.isfile(file := os.path.join(path, name))]
        if not found:
            raise UserError(f"{path} has none of {', '.join(names)}: choose another --src, which may be one file")
        sources[split] = found[0]
    return sources


def gsm8k_row(row, index, split, system, source):
    """A row of GSM8K, as read_rows() gives it -> a row of SCHEMA. Raises UserError if it does not end in "#### 72"."""
    solution = row["reward_model"]["ground_truth"] or ""
    thought, _, answer = solution.rpartition("####")
    thought, answer = CALCULATION.sub("", thought).strip(), answer.strip().replace(",", "")
    if not (row["prompt"] and thought and answer):
        raise UserError(f"{source} row {index}: its answer ends in {solution[-40:]!r}, not in '#### 72' behind a solution as"
                        " GSM8K's do: choose another --src")  # fmt: skip
    trace = f"{THINK}{thought}\n</think>\n\\boxed{{{answer}}}"
    return {
        "data_source": "gsm8k", "prompt": [{"role": "system", "content": system}, *row["prompt"]],
        "target": [{"role": "assistant", "content": trace}], "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"}, "extra_info": {"index": index, "split": split},
    }  # fmt: skip


# ---------------------------------------------------------------- reanswer


def prepare_reanswer(args):
    """Sample k responses per problem from the teacher, with its own chat template. Samples that end by themselves and that
    the verifier accepts become the problem's traces, in the order drawn. Problems without a trace go to
    *.complement.parquet.

    Under torchrun the ranks share the work. Samples are kept in the folder *.work until out is written. The same command
    continues a killed run, and ends with the same files.
    """
    check_range(args, "k max_tokens chunk gpu_memory tensor_parallel solved_at", "[> 0]")
    for name, written in (("reward_workers", "[1, 1024]"), ("reward_timeout", "[0.01, 86400]"),
                          ("hang_timeout", "[0.1, 604800]"), ("temperature", "[0 or 0.01, 100]"),
                          ("seed", "[0, 4294967295]")):  # fmt: skip
        check_range(args, name, written)
    out = repo_path(args.out)
    stem, ending = os.path.splitext(out)
    complement, report, work = (stem + s for s in (".complement.parquet", ".report.json", ".work"))
    if ending != ".parquet":
        raise UserError(f"--out={args.out}: name a file that ends in .parquet")
    # Named after the folder that is locked: another command's --out may be this one's complement.
    partial = {out: f"{work}.out.partial", complement: f"{work}.complement.partial", report: f"{work}.report.partial"}
    ready = os.path.join(work, "ready")  # it exists if a run was killed while it renamed its files: those are whole
    if not os.path.exists(ready):
        check_free(partial)
    elif not any(map(os.path.exists, partial.values())):
        return print(f"{out} is already complete: remove {work} if you do not need it")
    if WORLD % args.tensor_parallel:
        raise UserError(f"tensor_parallel={args.tensor_parallel} must divide the {WORLD} process(es) that torchrun started")
    source, name = data_path(args.data), model_path(args.model)
    tokenizer, context = load_tokenizer(name), load_config(name).max_position_embeddings
    verifier = Verifier(args.reward_workers, args.reward_timeout, args.require_think == "True", args.grader,
                        solved_at=args.solved_at)  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(verifier)
        content = hashlib.sha256()
        problems = load_problems(source, tokenizer, context - 1, require_think=False, log=print0, content=content)
        opened = render_prompt(tokenizer, [QUESTION]).endswith(THINK)
        longest = max(len(p.prompt_ids) for p in problems)
        device, dtype = pick_device(args.device, args.dtype)
        sampler = choose_sampler(args.sampler)  # what "auto" is here: samples of two samplers must not be mixed
        start_processes(device, "none", vars(args))
        compared = ("k", "temperature", "max_tokens", "seed", "chunk", "reward_timeout", "require_think", "solved_at")
        knobs = {knob: getattr(args, knob) for knob in compared} | {"device": device}
        settings = settings_of(knobs, problems, model=name, sampler=sampler, dtype=dtype, verifier=verifier)
        place = stack.enter_context(OutputFolder(work, "prepare.py"))
        open_work(place, settings, vars(args))
        if not os.path.exists(ready):  # it is moved aside with work of other settings
            check_free(partial)
        size = max(1, args.chunk // args.k)
        chunks = [problems[i : i + size] for i in range(0, len(problems), size)]
        engine = None
        if not all(map(os.path.exists, chunk_files(work, chunks))):
            engine = open_sampler(
                name, tokenizer.stop_ids, min(context, longest + args.max_tokens), sampler=sampler, dtype=dtype,
                gpu_memory=args.gpu_memory, seed=args.seed, tensor_parallel=args.tensor_parallel,
            )  # fmt: skip

        def answer(part):
            return evaluate(part, engine, verifier, tokenizer, stamp=name, k=args.k, temperature=args.temperature,
                            max_tokens=args.max_tokens, seed=args.seed)  # fmt: skip

        with Watch(args.hang_timeout) as watch:
            verifier.tick = watch.progress
            if engine:
                engine.tick = watch.progress
            work_through(place, chunks, answer, watch, args.tensor_parallel)
        if RANK == 0 and not os.path.exists(ready):
            files = chunk_files(work, chunks)
            counts = write_answers(source, content.digest(), files, partial[out], partial[complement], THINK if opened else "")
            print("\n".join(f"{what:<32}{n:>10,}" for what, n in counts.items()))
            if not counts["samples kept"]:
                for path in (out, complement):
                    os.remove(partial[path])
                raise UserError(f"no sample was kept, so nothing is written: see the samples in {work}/samples")
            write_json(partial[report], {**vars(args), "counts": counts})
            open(ready, "w").close()
        if RANK == 0:
            for path in (report, complement, out):
                if os.path.exists(partial[path]):
                    give_name(partial[path], path)
            shutil.rmtree(os.path.join(work, "samples"))
            os.remove(os.path.join(work, "settings.json"))
            os.remove(ready)
            print(f"wrote {out}, {complement}, {report}")
    barrier()  # no rank leaves while another still needs it
    if engine:
        engine.close()


def write_answers(source, read, paths, out, complement, opening):
    """The rows of source with their verified samples as target, in one pass over both. Returns counts. read: the digest of
    the rows that were answered; raises UserError if these are others."""
    counts = dict.fromkeys(("problems", "problems with a trace", "samples", "samples kept"), 0)
    answers = read_chunks(paths)
    answer = next(answers)
    with pq.ParquetWriter(out, SCHEMA) as right, pq.ParquetWriter(complement, SCHEMA) as rest:
        waiting = {right: [], rest: []}
        content = hashlib.sha256()
        for index, row in read_rows(source, content):
            if answer is None or index != answer["id"]:  # a row that load_problems dropped
                continue
            traces = []
            for text, reason, finish in zip(*(answer[n] for n in ("response", "reason", "finish")), strict=True):
                if reason == "correct" and finish == "stop":
                    traces.append({"role": "assistant", "content": opening + text})
                else:
                    fault = f"sample dropped: {'cut off' if finish == 'length' else reason}"
                    counts[fault] = counts.get(fault, 0) + 1
            counts["problems"] += 1
            counts["problems with a trace"] += bool(traces)
            counts["samples"] += len(answer["reward"])
            counts["samples kept"] += len(traces)
            writer = right if traces else rest
            waiting[writer].append({
                "data_source": row.get("data_source") or "unknown", "prompt": row["prompt"], "target": traces or None,
                "ability": "math", "reward_model": {"style": "rule", **row["reward_model"]},
                "extra_info": {"index": index, "split": "default"},
            })  # fmt: skip
            if len(waiting[writer]) == BATCH:
                writer.write_table(pa.Table.from_pylist(waiting[writer], SCHEMA))
                waiting[writer].clear()
            answer = next(answers, None)
        for writer, rows in waiting.items():
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    if content.digest() != read:
        raise UserError(f"{source} has changed while it was answered: restore it, and the same command continues")
    return counts


# ---------------------------------------------------------------- model

SKIPPED = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.py", "consolidated*", ".*", "*/*")


def prepare_model(args):
    """Copy a model, without subfolders and other files of weights than its own, or unpack a GGUF file; edit config.json and the
    chat template. Raises UserError unless the edits take effect and config, weights, tokenizer and engines agree."""
    check_range(args, "rope_theta max_position", "")  # zero or more
    out, template, packed = repo_path(args.out), chat_template(args.template), args.model.endswith(".gguf")
    check_new(out)
    source, files, weights = (repo_path(args.model), [], []) if packed else model_on_disk(model_path(args.model))
    with new_folder(out, source) as partial:
        if packed:
            unpack_gguf(source, partial)
        copy_files(source, partial, set(files) - set(weights))
        edit_config(partial, args.rope_theta, args.max_position)
        tokenizer = edit_template(partial, template, args.max_position, args.template)
        dtype = check_weights(partial if packed else source, partial, tokenizer)
        if not packed:
            print(f"copying {sum(os.path.getsize(os.path.join(source, name)) for name in weights) / 1e9:.1f} GB", flush=True)
        copy_files(source, partial, weights)
        if args.round_trip == "True":
            round_trip(partial, tokenizer, dtype)
    print(f"wrote {out}")


def unpack_gguf(path, folder):
    """Write the model of a GGUF file into a folder in Hugging Face format: float32 weights, config, tokenizer, chat template.
    Quantized weights become the numbers that they stand for. Raises UserError if transformers does not read it."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}: name a local .gguf file")
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise UserError(f"a GGUF file is read with the package {missing[0]}: pip install -r requirements-optional.txt")
    from gguf import GGUFReader
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    where = dict(pretrained_model_name_or_path=os.path.dirname(path), gguf_file=os.path.basename(path))
    print(f"unpacking {os.path.getsize(path) / 1e9:.1f} GB", flush=True)
    try:
        field = GGUFReader(path).get_field("tokenizer.ggml.pre")
        cut = field.contents() if field else "gpt-2"
        tokenizer = AutoTokenizer.from_pretrained(**where)
        plain = dict(dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), output_loading_info=True)
        hf, found = AutoModelForCausalLM.from_pretrained(**where, **plain)
    except Exception as e:
        raise UserError(f"{path} is no GGUF file of a causal LM that transformers reads: {first_line(e)}") from None
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise UserError(f"{path} lacks {len(missing)} tensor(s), {missing[0]} among them: if it is one of several parts, join"
                        " them first (llama-gguf-split --merge)")  # fmt: skip
    if cut == "smollm":  # transformers does not know it, and would cut spaces before a digit in another way
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif cut not in ("gpt-2", "default", *GGUF_PRE_TOKENIZER_SPLITS):
        print(f"note: transformers cuts text as GPT-2 does, for it does not know {cut!r}: compare its ids with the original's")
    try:
        hf.save_pretrained(folder)
    except SafetensorError as e:  # a full disk
        raise OSError(first_line(e)) from None
    tokenizer.save_pretrained(folder)
    for name in weight_files(folder):  # save_pretrained() writes them for the user alone
        shutil.copymode(os.path.join(folder, "config.json"), os.path.join(folder, name))


def check_new(out):
    """Raise UserError unless a folder of this name can be made: there may be an empty one."""
    if os.path.lexists(out) and (os.path.islink(out) or not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out} exists and is not an empty folder: remove it, or name another --out")


def model_on_disk(model):
    """Fetch a model from the hub, if it is a name there. Returns its folder, the names of its files without those of SKIPPED
    and without other files of weights than its own, and those of its weights. Raises UserError unless they are safetensors."""
    source = model if os.path.isdir(model) else from_hub(model, ignore_patterns=list(SKIPPED))
    try:
        named = weight_files(source)
    except OSError as e:
        raise UserError(f"{source} is no causal LM in safetensors: {first_line(e)}") from None
    weights = [name for name in named if name.endswith(".safetensors")]
    if not weights:
        raise UserError(f"{source} has no *.safetensors, the only supported format of weights: load it with"
                        " AutoModelForCausalLM.from_pretrained and write it with save_pretrained")  # fmt: skip
    skipped = lambda name: any(fnmatch(name, p) for p in SKIPPED) or (fnmatch(name, "*.safetensors*") and name not in named)
    return source, [e.name for e in os.scandir(source) if e.is_file() and not skipped(e.name)], weights


def copy_files(source, folder, names):
    for name in names:
        shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))


@contextlib.contextmanager
def new_folder(out, source):
    """A folder that is named `out` when the block ends, and is removed if it fails. Errors then name the user's folder,
    source."""
    remove_partials(glob.escape(out))
    partial = partial_name(out)
    os.makedirs(partial)
    try:
        yield partial
        os.rename(partial, out)  # nothing but an empty folder may be there
    except UserError as e:
        raise UserError(str(e).replace(partial, source)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def chat_template(name):
    """The Jinja text that --template names; None for keep."""
    templates = load_templates()
    if name in templates["chat"]:
        return templates["chat"][name].replace("{system}", templates["system"])
    if name != "keep" and not os.path.isfile(repo_path(name)):
        raise UserError(f"--template={name}: choose {', '.join(templates['chat'])}, keep, or your own file")
    return None if name == "keep" else open(repo_path(name), encoding="utf-8").read()


@contextlib.contextmanager
def edited(path):
    """Open a JSON file as a dict, and write it back with the changes made in the block."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is missing or not JSON: {first_line(e)}") from None
    yield content
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2, ensure_ascii=False)


def rope_and_positions(folder):
    """What transformers reads from config.json: RoPE's parameters, a dict, and the number of positions; {} and 0 if there
    are none."""
    config = load_config(folder)
    return getattr(config, "rope_parameters", None) or {}, getattr(config, "max_position_embeddings", 0)


def edit_config(folder, theta, positions):
    """Set both in config.json; 0 keeps the old value. rope_theta is set where the file has it, which depends on the file's
    age. Raises UserError for a value below the one that the model was trained with."""
    rope, room = rope_and_positions(folder)
    for flag, new, old in (("rope_theta", theta, rope.get("rope_theta", 0)), ("max_position", positions, room)):
        if new and not 0 < old <= new:
            why = f"is below the model's own {old:g}" if old else "has no single value in this model's config"
            raise UserError(f"--{flag}={new} {why}: --{flag}=0 keeps the model's own")
    with edited(os.path.join(folder, "config.json")) as config:
        if theta:
            places = [config, config.get("rope_parameters") or {}, config.get("rope_scaling") or {}]
            for place in [p for p in places if "rope_theta" in p] or [config]:
                place["rope_theta"] = float(theta)
        if positions:
            config["max_position_embeddings"] = positions
    new_rope, new_room = rope_and_positions(folder)
    if theta not in (0, new_rope.get("rope_theta")) or positions not in (0, new_room):
        raise UserError(f"{folder}: transformers reads {new_rope} and {new_room} positions from the edited config.json: edit it"
                        " by hand, then --rope_theta=0 --max_position=0")  # fmt: skip
    print(f"rope_theta {rope.get('rope_theta')} -> {new_rope.get('rope_theta')}, positions {room} -> {new_room}")
    if new_rope.get("rope_type", "default") != "default":
        print(f"note: its RoPE scaling stays as it is: {new_rope}")


def edit_template(folder, template, positions, name):
    """Set the chat template; None keeps the old one. Returns the tokenizer. The template is written twice: transformers 5
    prefers chat_template.jinja, older versions (such as 4.45) know only tokenizer_config.json."""
    path = os.path.join(folder, "tokenizer_config.json")
    if os.path.isfile(path):
        with edited(path) as config:
            room = config.get("model_max_length")
            if isinstance(room, (int, float)) and room < positions:
                config["model_max_length"] = positions  # vLLM uses the smaller of this and the model's positions
            if template is not None:
                config["chat_template"] = template
                with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as f:
                    f.write(template)
    tokenizer = load_tokenizer(folder)
    for mark in re.findall(r"<\|\w+\|>", template or ""):
        if tokenizer.encode(mark, add_special_tokens=False) != [tokenizer.get_vocab().get(mark)]:
            raise UserError(f"this model has no token {mark}: choose --template=llama or your own file")
    try:
        prompt = render_prompt(tokenizer, [QUESTION])
        with_system = render_prompt(tokenizer, [{"role": "system", "content": load_templates()["system"]}, QUESTION])
    except Exception as e:
        raise UserError(f"the chat template fails on a system and a user turn: {first_line(e)}") from None
    if name == "luffy" and not (prompt == with_system and prompt.endswith(THINK)):
        raise UserError(f"transformers does not use the chat template that was written: the prompt ends in {prompt[-40:]!r}")
    print(f"the prompt ends in {prompt[-40:]!r}")
    if not prompt.endswith(THINK):
        print("note: it does not open a thought: train and evaluate with --require_think=False")
    return tokenizer


def check_weights(source, folder, tokenizer):
    """Check the headers of source's weights against folder's config, and the tokenizer against both. No weight is read.
    Returns the dtype to run in."""
    config = load_config(folder)
    try:
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        files = tensor_files(source)
    except Exception as e:
        raise UserError(f"{source} is no causal LM in safetensors: {first_line(e)}") from None
    wanted, dtypes = dict(hf.named_parameters()), set()  # a tied head is no parameter of its own
    if missing := [name for name in wanted if name not in files]:
        raise UserError(f"the weights of {source} lack {len(missing)} of {len(wanted)} tensors, {missing[0]} among them: copy"
                        " them again, or fix config.json")  # fmt: skip
    for name, parameter in wanted.items():
        with safe_open(files[name], "pt") as f:
            tensor = f.get_slice(name)
        dtypes.add(tensor.get_dtype())
        if tensor.get_shape() != list(parameter.shape):
            raise UserError(f"{source}: {name} is {tensor.get_shape()} in the weights, {list(parameter.shape)} by config.json:"
                            " use files of one model")  # fmt: skip
    check_rows(source, tokenizer, hf.get_input_embeddings().weight.size(0))
    if extra := [name for name in files if name not in hf.state_dict()]:
        print(f"note: config.json has no place for {len(extra)} tensor(s) of the weights, {extra[0]} among them")
    print(ends_in_words(tokenizer))
    return "float32" if dtypes == {"F32"} else "bfloat16"


def check_rows(source, tokenizer, rows):
    """Raise UserError unless each token has a row of the embedding."""
    if (top := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(f"{source}: the tokenizer's ids end at {top}, the embedding has {rows} rows: use files of one model")


def round_trip(folder, tokenizer, dtype, tokens=8):
    """Continue a prompt greedily with transformers, then with vLLM where it is installed. Raises UserError if their
    log-probs differ. They are compared up to the first token that differs: after it the two texts are different."""
    prompt = tokenizer.encode(render_prompt(tokenizer, [QUESTION]), add_special_tokens=False)
    (device, _), room, ends = pick_device("auto", dtype), len(prompt) + tokens, tokenizer.stop_ids
    policy = load_policy(folder, dtype=getattr(torch, dtype), device=device, frozen=True)
    policy.hf.set_attn_implementation("sdpa")  # the sequence is not packed
    ids, logps = list(prompt), []
    with torch.no_grad():  # no generate(): it would follow the folder's generation_config
        while len(logps) < tokens and ids[-1] not in ends:
            logprobs = policy.hf(torch.tensor([ids], device=device), use_cache=False).logits[0, -1].float().log_softmax(-1)
            ids.append(int(logprobs.argmax()))
            logps.append(logprobs[ids[-1]].item())
    ours = Sample(ids[len(prompt) :], logps, "")
    print(f"{dtype}, by transformers: {QUESTION['content']!r} continues with {tokenizer.decode(ours.ids)!r}", flush=True)
    if choose_sampler("auto") != "vllm":
        print("vLLM is not installed: nothing to compare with")
        return
    del policy  # otherwise two copies would be in memory
    gc.collect()
    torch.cuda.empty_cache()
    try:
        engine = open_sampler(folder, ends, room, sampler="vllm", dtype=dtype, gpu_memory=0.85)
        (theirs,) = engine.generate([prompt], [0], 0.0, tokens, folder)
        engine.close()
    except Exception as e:
        raise UserError(f"vLLM does not run it: {first_line(e)}; --round_trip=False skips this check") from None
    same = next((i for i, (a, b) in enumerate(zip(ours.ids, theirs.ids, strict=False)) if a != b), len(ours.ids))
    difference = max(abs(a - b) for a, b in zip(ours.logps[: same + 1], theirs.logps, strict=False))
    limit = 0.1 if dtype == "bfloat16" else 1e-3
    print(f"by vLLM: {same} of {len(ours.ids)} tokens are the same, log-probs differ by at most {difference:.1e}")
    if not difference <= limit:
        raise UserError(f"transformers and vLLM differ by {difference:.2g} in log-prob, over {limit}: they read the model's"
                        " files differently")  # fmt: skip


# ---------------------------------------------------------------- align

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def prepare_align(args):
    """Make a teacher model for kl_coef and ce_coef of one whose tokenizer differs a little from the policy's. It gets the
    policy's tokenizer files and its EOS, pad and BOS. Raises UserError unless each of the policy's tokens has the same id in
    the teacher's tokenizer, which may have more: their rows stay, and training masks a first choice among them.

    The end. A teacher that was trained to end in another token gives the policy's EOS hardly any probability, whatever its
    config calls it. So the head's rows of the two ends are swapped, and the teacher's probability of ending is found at the
    policy's EOS. The embedding's rows are not: no token of a response follows its EOS, but the teacher's end may be in the
    prompt, where it closes the template's turns (<|im_end|>), and must be read as what it is. A tied head is therefore written
    as a tensor of its own. swap_ends=False leaves the weights, as TGPO's release did.

    The rows. Where the policy has more, embedding and head are padded with zeros; nothing is cut. A zero row's logit is 0. No
    tokenizer gives these ids, but the policy may sample one: to the teacher its log-prob is minus the logsumexp of the logits,
    low and finite. As a first choice it would be masked, like each id that is no token of the policy.

    Only the files of weights that hold embedding or head are written anew, one in memory at a time and in their dtype. The
    others are hard links to the teacher's, or copies where the file system has no links: the experts of a large teacher take no
    second place. The folder is for judging. To sample from the teacher, as reanswer does, take the original.
    """
    out, teacher, policy = repo_path(args.out), model_path(args.model), model_path(args.policy)
    check_new(out)
    if not os.path.isdir(policy):
        policy = from_hub(policy, allow_patterns=[*CONFIGS, *TOKENIZER])
    ours, theirs = load_tokenizer(policy), load_tokenizer(teacher)
    check_same_ids(ours, theirs)
    source, files, weights = model_on_disk(teacher)
    places, config = embedding_and_head(source)
    old, rows = config.vocab_size, max(config.vocab_size, load_config(policy).vocab_size)
    check_rows(source, theirs, old)
    ends, settings = [theirs.eos_token_id, ours.eos_token_id], {"vocab_size": rows}
    differ = ends[0] != ends[1]
    swapped = ends if differ and args.swap_ends == "True" else []
    if swapped and config.tie_word_embeddings:
        places.setdefault(HEAD, places[EMBEDDING])  # a head of its own, in the embedding's file
        settings["tie_word_embeddings"] = False
    parts = {}  # a file of weights to rewrite: which of the two tensors change there
    for name, file in places.items():
        if rows > old or (swapped and name == HEAD):
            parts.setdefault(os.path.basename(file), []).append(name)
    with new_folder(out, source) as partial:
        copy_files(policy, partial, [name for name in TOKENIZER if os.path.isfile(os.path.join(policy, name))])
        copy_files(source, partial, set(files) - {*weights, *TOKENIZER})
        edit_ends(partial, ours, settings)
        linked, grown = 0, []
        for name in weights:
            path, new = os.path.join(source, name), os.path.join(partial, name)
            if name in parts:
                grown.append(rewrite(path, new, parts[name], rows, swapped))
            else:
                linked += link_or_copy(path, new)
        for name in [name for name in files if parts and name.endswith(".safetensors.index.json")]:
            edit_index(os.path.join(partial, name), parts, map(sum, zip(*grown, strict=True)))
        check_same_tokens(ours, load_tokenizer(partial))
        embedding_and_head(partial)
    before, after = (f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})" for tokenizer in (theirs, ours))
    how = "their rows of the head swapped" if swapped else "in name only"
    print(
        f"aligned: {len(ours)} tokens (the teacher's own tokenizer has {len(theirs)}); rows {old} -> {rows}; end"
        f" {before} -> {after}{f', {how}' if differ else ''}; files of weights: {linked} linked,"
        f" {len(weights) - linked - len(parts)} copied, {len(parts)} rewritten"
    )
    print(f"wrote {out}")


def embedding_and_head(folder):
    """{tensor name: file} of a model's embedding and head, of which a tied model may lack the latter, and its config. Raises
    UserError unless both have the config's shape."""
    try:
        config, files = load_config(folder), tensor_files(folder)
        for name in (EMBEDDING, HEAD):
            if name not in files and not (name == HEAD and config.tie_word_embeddings):
                raise OSError(f"its weights lack {name}")
        places = {name: files[name] for name in (EMBEDDING, HEAD) if name in files}
        for name, file in places.items():
            with safe_open(file, "pt") as f:
                shape, wanted = f.get_slice(name).get_shape(), [config.vocab_size, config.hidden_size]
            if shape != wanted:
                raise misshapen(name, shape, wanted)
    except (OSError, AttributeError) as e:  # a config that keeps its sizes elsewhere
        raise UserError(f"{folder} is no causal LM in safetensors: {first_line(e)}") from None
    return places, config


def edit_ends(folder, tokenizer, changes):
    """Write the tokenizer's EOS, pad and BOS, and in config.json more changes."""
    ends = tokenizer.stop_ids if len(tokenizer.stop_ids) > 1 else tokenizer.eos_token_id
    special = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    for name, more in zip(CONFIGS, (changes, {}), strict=True):
        if name == "config.json" or os.path.isfile(os.path.join(folder, name)):
            with edited(os.path.join(folder, name)) as config:
                config.update(special | more)


def rewrite(path, new, names, rows, swapped):
    """Copy a safetensors file. The tensors in `names` are padded with zeros to `rows` rows, and the two rows `swapped` of the
    head change places; a head that is not in the file is made of the embedding. Returns how many numbers and bytes were added.
    The source is only read: nothing is done in place, because its tensors are its pages."""
    tensors, order = load_file(path), torch.arange(rows)
    order[swapped] = order[swapped[::-1]]
    size = lambda: (sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values()))
    before = size()
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    for name in names:
        tensor = tensors[name] if name in tensors else tensors[EMBEDDING]
        tensor = F.pad(tensor, (0, 0, 0, rows - len(tensor)))
        tensors[name] = tensor[order] if name == HEAD else tensor
    try:
        save_file(tensors, new, metadata)
        shutil.copymode(path, new)  # save_file() writes for the user alone
    except SafetensorError as e:  # a full disk
        raise OSError(first_line(e)) from None
    return [now - was for now, was in zip(size(), before, strict=True)]


def link_or_copy(path, new):
    """Give a file another name, or copy it where the file system has no links. Returns whether it is a link."""
    try:
        os.link(os.path.realpath(path), new)  # in a hub cache the path is a symbolic link
        return True
    except OSError:
        shutil.copyfile(path, new)
        return False


def edit_index(path, parts, grown):
    """Note in an index of weights what rewrite() did: the tensors of each file, and how many numbers and bytes were added."""
    with edited(path) as index:
        index["weight_map"].update({name: file for file, names in parts.items() for name in names})
        sizes = index.get("metadata") or {}
        for name, more in zip(("total_parameters", "total_size"), grown, strict=True):
            if name in sizes:
                sizes[name] += more


# ---------------------------------------------------------------- export


def prepare_export(args):
    """Make a folder that vLLM, lm-evaluation-harness and the hub take as it is: the weights in args.dtype, config.json that
    says so, generation_config.json with every id that ends a response, tokenizer, chat template, and a card with what the run
    recorded. The weights' files keep their names; one is in memory at a time. Raises UserError for a checkpoint that is not as
    it was written, and for a model that transformers and vLLM do not read alike."""
    out = repo_path(args.out)
    check_new(out)
    source, files, weights = model_on_disk(model_path(args.model))
    digest = weights_digest(source)  # compares a checkpoint's files with what was written
    tokenizer = load_tokenizer(source)
    card = model_card(source, digest, os.path.basename(out), render_prompt(tokenizer, [QUESTION]), tokenizer, args.dtype,
                      args.base, args.eval)  # fmt: skip
    with new_folder(out, source) as partial:
        path = lambda name: os.path.join(partial, name)
        copy_files(source, partial, [n for n in files if n in (*CONFIGS, *TOKENIZER) or n.endswith(".safetensors.index.json")])
        with edited(path("config.json")) as config:
            config["dtype"] = args.dtype
            config.pop("torch_dtype", None)  # the older name of the same
        # Anew, with the ends alone: vLLM and lm-eval would take the base's length limit and penalties from it.
        write_json(path("generation_config.json"), {"eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.pad_token_id})
        check_weights(source, partial, tokenizer)
        sizes = [cast(os.path.join(source, name), path(name), getattr(torch, args.dtype)) for name in weights]
        for name in glob.glob("*.safetensors.index.json", root_dir=partial):
            with edited(path(name)) as index:
                index["metadata"] = {**(index.get("metadata") or {}), "total_size": sum(sizes)}
        with open(path("README.md"), "w", encoding="utf-8") as f:
            f.write(card)
        if args.round_trip == "True":
            _, dtype = pick_device("auto", "auto")  # on a CPU float32, in which the two differ by less
            round_trip(partial, tokenizer, dtype)
    print(f"wrote {out}: {show(sum(sizes))} of {args.dtype}, and README.md, the card: read it before you publish it")


def cast(path, new, dtype):
    """Copy a safetensors file with its floating-point tensors in another dtype. Returns the tensors' bytes."""
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(path).items()}
    try:
        save_file(tensors, new, {"format": "pt"})
        shutil.copymode(os.path.join(os.path.dirname(new), "config.json"), new)  # save_file() writes for the user alone
    except SafetensorError as e:  # a full disk
        raise OSError(first_line(e)) from None
    return sum(t.nbytes for t in tensors.values())


# ---------------------------------------------------------------- main


def main(args):
    if WORLD > 1 and args.command != "reanswer":
        raise UserError(f"{args.command} runs in one process: leave torchrun out")
    if not args.out.strip():
        raise UserError("--out is empty: name a file or folder")
    out, commands = repo_path(args.out), {"openr1": prepare_openr1, "gsm8k": prepare_gsm8k, "reanswer": prepare_reanswer,
                                          "model": prepare_model, "align": prepare_align, "export": prepare_export}  # fmt: skip
    try:
        os.makedirs(os.path.dirname(out), exist_ok=True)
        # One lock for all names that commands may share: y.easy.parquet is written for --out=y.parquet, too.
        family = re.sub(r"(\.(complement|easy|hard|test))*\.parquet$", "", out)
        with Lock(f"{family}.lock", "prepare.py", what=out) if RANK == 0 else contextlib.nullcontext():
            commands[args.command](args)
    except OSError as e:  # a full disk, a folder that may not be written
        raise UserError(first_line(e) if e.filename else f"{out} cannot be written: {first_line(e)}") from None


if __name__ == "__main__":
    if args.command != "reanswer":  # that one continues with what it finds
        unwind_on_signals()
    leave(run(lambda: main(args)), getattr(args, "tensor_parallel", 1))
