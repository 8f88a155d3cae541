"""
Are README.md and docs/ true? Their links resolve, the map in docs/files.md is complete, and every command in them runs.

    python measure/docs_check.py            all of it, the commands in a copy of this checkout (make docs-check)
    python measure/docs_check.py --links    without running the commands (make test does that, too)

COMMANDS says how each command is run: as it is on the page, or with a few words replaced where the page needs GPUs, hours, or a
model of the hub. A command that is not in COMMANDS, or no longer on any page, is an error. LOG.md is history and not checked.
"""

import functools
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests"), os.path.join(ROOT, "toy")]

# In place of the 7B: a model of 0.1 M parameters over bytes, two processes, a few tokens. SMALL is for train.py, TINY for
# eval.py. A run of 2 steps shows that a command works; `make demo`, which later commands read, is the only one at full length.
TWO = ("--nproc_per_node=8", "--nproc_per_node=2")
SMALL = (
    " --sampler=torch --max_steps=2 --prompts_per_step=4 --max_tokens=16 --holdout=8 --reward_workers=1 --min_teacher_pass=0.5"
)
BYTES = " --max_prompt_tokens=2048"  # over bytes a prompt is longer: the system prompt has 762
TINY = " --sampler=torch --max_tokens=16 --k=1 --reward_workers=1"
SHORT = " --sampler=torch --eval_max_problems=8"
BY_CI = "by .ci/run"
HARMFUL = "not run: it changes the machine"
HUB = "by hand: it fetches what others publish"
ONLY_RESOLVED = "by hand: what is installed next is only resolved here"
COMMANDS = {
    "make test": BY_CI,
    "make test-slow": BY_CI,
    "make docs-check": BY_CI,
    "make test-gpu": "by hand: it needs a GPU",
    "pip uninstall torchvision torchaudio torchcodec": HARMFUL,
    "rm /dev/shm/*cpushm*": HARMFUL,
    "pip install -r requirements-gpu.txt": [("pip install", "pip install --dry-run -q")],
    "pip install -r requirements-optional.txt": [("pip install", "pip install --dry-run -q")],
    "pip install --no-deps -r requirements-cpu.txt": [("pip install", "pip install --dry-run -q")],
    "make TORCH_FROM=ADDRESS demo": [("make", "make --dry-run")],
    "python measure/kill.py": "by tests/test_checkpoint.py, in `make test-slow`",
    "python measure/two_hosts.py": "by hand: it needs root and half an hour",
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 --rdzv_id=1 train.py"
    " config/luffy_7b.py --resume=auto": "by measure/two_hosts.py",
    # Two commands, and a look round.
    "make demo": [],
    "make demo SEEDS=3": [("make", "make --dry-run")],
    "make demo-real": [("make demo-real", ".venv/bin/python toy/real.py --max_steps=1 --eval_max_problems=8")],
    "make demo-real SEEDS=3": [("make", "make --dry-run")],
    "source .venv/bin/activate": [],
    "python plot.py out/demo/luffy_0 out/demo/grpo_0 out/demo/sft_0": [],
    "python plot.py trace out/demo/luffy_0 --step=5 --out=out/group.html": [],
    "python train.py": [("train.py", "train.py --max_steps=2 --eval_max_problems=8")],
    "python train.py --help": [],
    "python train.py config/method/sft_verified.py --out_dir=out/teacher": [("d.py", "d.py --max_steps=2" + SHORT)],
    "torchrun --nproc_per_node=2 train.py --shard=fsdp": [("fsdp", "fsdp --max_steps=2 --out_dir=out/fsdp" + SHORT)],
    "python bench.py": [("bench.py", "bench.py --repeats=1")],
    "python bench.py --dtype=float32 --tokens=256 --repeats=1 --syncs=0": [],
    "python bench.py --dtype=bfloat16 --tokens=256 --repeats=1 --syncs=0": [],
    "python bench.py peers --trl=trl/bin/python": "by tests/test_peers.py, in `make test-slow`",
    "bash measure/gpu.sh out/gpu": [("bash", "TINY=1 bash"), ("out/gpu", "out/gpu bench")],
    "python measure/profile_step.py": [("step.py", "step.py toy")],
    "python measure/growth.py": [],
    "python measure/start_up.py": [("start_up.py", "start_up.py 1")],
    "python measure/grading_speed.py": [("speed.py", "speed.py 2 200")],
    # The 7B run.
    "python prepare.py model --model=Qwen/Qwen2.5-Math-7B --out=models/Qwen2.5-Math-7B-16k-think": [],
    "python prepare.py model --model=FILE.gguf --out=models/NAME --rope_theta=0 --max_position=0": "by tests/test_gguf.py",
    "python prepare.py openr1 --tokenizer=models/Qwen2.5-Math-7B-16k-think --out=data/openr1.parquet":
        [("openr1 ", "openr1 --src=raw.parquet ")],
    "python prepare.py align --model=Qwen/Qwen3-30B-A3B-Thinking-2507 --policy=models/Qwen2.5-Math-7B-16k-think"
    " --out=models/Qwen3-30B-A3B-Thinking-2507-aligned": [],
    "python -c \"import datasets; datasets.load_dataset('Elliott/Openr1-Math-46k-8192', split='train').to_parquet("
    "'data/openr1.parquet')\"": HUB,
    "python -c \"import datasets; datasets.load_dataset('Elliott/Openr1-Math-48k-Complement', split='train').to_parquet("
    "'data/openr1.complement.parquet')\"": HUB,
    "git clone --depth 1 https://github.com/ElliottYan/LUFFY && cp LUFFY/data/valid*.parquet data/": HUB,
    "python prepare.py reanswer --model=TEACHER --data=data/openr1.parquet --out=data/openr1.teacher.parquet":
        [("TEACHER", "models/Qwen2.5-Math-7B-16k-think --sampler=torch --max_tokens=16 --grader=any.py --require_think=False")],
    # One GPU.
    "python prepare.py model --model=Qwen/Qwen2.5-0.5B --out=models/Qwen2.5-0.5B-think --rope_theta=0 --max_position=0": [],
    "python prepare.py gsm8k": [("gsm8k", "gsm8k --src=gsm8k")],
    "python train.py config/luffy_1gpu.py --dry_run=True": [],
    "python train.py config/luffy_1gpu.py": [("1gpu.py", "1gpu.py" + SMALL + BYTES)],
    "python eval.py --model=out/luffy_1gpu/latest --data=data/gsm8k.test.parquet --temperature=0 --max_tokens=1024"
    " --out_dir=out/eval_1gpu": [(" --max_tokens=1024", TINY)],
    "python train.py config/luffy_1gpu.py config/method/grpo.py --out_dir=out/grpo_1gpu":
        [("1gpu.py", "1gpu.py" + SMALL + BYTES)],
    "python train.py config/luffy_1gpu.py config/method/sft.py --out_dir=out/sft_1gpu --prompts_per_step=64 --update_batches=1"
    " --learning_rate=1e-5 --lr_schedule=cosine --lr_floor=0.1 --warmup_steps=34 --max_steps=342":
        [(" --prompts_per_step=64", SMALL + BYTES), ("=34 --max_steps=342", "=1")],
    "python train.py config/luffy_1gpu.py config/method/sft_then_rl_corrected.py --model=out/sft_1gpu/latest"
    " --out_dir=out/sft_then_rl_1gpu": [("1gpu.py c", "1gpu.py" + SMALL + BYTES + " c")],
    "python plot.py out/luffy_1gpu out/grpo_1gpu out/sft_1gpu out/sft_then_rl_1gpu --out=out/one_gpu": [],
    "python3 -m venv .venv-gpu": ONLY_RESOLVED,
    "source .venv-gpu/bin/activate": ONLY_RESOLVED,
    "uv venv --python 3.12 .venv-gpu": "by hand: uv is no package of ours",
    "uv pip install -r requirements-gpu.txt": "by hand: uv is no package of ours",
    "uv pip install torch==2.13.0": "by hand: uv is no package of ours",
    "uv pip install --no-deps -r requirements-cpu.txt": "by hand: uv is no package of ours",
    "sbatch docs/two_nodes.slurm config/luffy_7b.py": "by tests/test_slurm.py, in `make test-slow`",
    "python train.py config/luffy_7b.py --dry_run=True": [],
    # One's own questions and reward.
    "python train.py config/luffy_1gpu.py --data=./mine.jsonl --grader=./mine.py --holdout=0 --prompts_per_step=2 --max_steps=2"
    " --out_dir=out/mine": [("out/mine", "out/mine --sampler=torch --max_tokens=16 --reward_workers=1" + BYTES)],
    # Eight.
    "torchrun --nproc_per_node=8 train.py config/luffy_7b.py --resume=auto": [TWO, ("auto", "auto" + SMALL)],
    # The same run as the line above, which is in out/luffy_7b already.
    "torchrun --nproc_per_node=8 train.py config/luffy_7b.py": [("node=8", "node=1"), ("7b.py", "7b.py --dry_run=True")],
    "torchrun --nproc_per_node=8 train.py config/grpo_7b.py": [TWO, ("7b.py", "7b.py" + SMALL)],
    "python train.py config/luffy_7b.py config/method/grpo.py --seed=2": [("seed=2", "seed=2 --dry_run=True")],
    "python train.py config/luffy_7b.py config/method/relift.py": [("relift.py", "relift.py --dry_run=True")],
    "python bench.py --size=1.5b --tokens=32768 --shortest=2048 --longest=8192":
        [("1.5b", "tiny --syncs=0 --repeats=1"), ("32768", "1024"), ("2048", "64"), ("8192", "256")],
    # Evaluation.
    "torchrun --nproc_per_node=8 eval.py config/eval/luffy.py --model=DIR --data=data/valid.all.parquet --out_dir=out/eval":
        [TWO, ("DIR", "models/Qwen2.5-Math-7B-16k-think" + TINY)],
    "python eval.py compare out/eval_a/eval.json out/eval_b/eval.json": [("eval_a", "eval"), ("eval_b", "eval")],
    "python eval.py --sweep=0.1,0.4,0.7,1.0 --k=8 --sources=aime,amc --model=DIR --data=data/valid.all.parquet":
        [("=8", "=2 --sampler=torch --max_tokens=16"), ("0.4,0.7,1.0", "1.0"), ("DIR", "models/Qwen2.5-Math-7B-16k-think")],
    "python eval.py --model=out/demo/luffy_0/ckpt_60 --k=8 --out_dir=out/eval_luffy": [],
    "python eval.py --model=out/demo/sft_0/ckpt_60 --k=8 --out_dir=out/eval_sft": [],
    "python eval.py compare out/eval_sft/eval.json out/eval_luffy/eval.json": [],
    'python sample.py --question="49+97+53+05+33+65+62+51=?" --answer=85 --k=2 --out_dir=out/demo/luffy_0': [],
    "python prepare.py export --model=out/demo/luffy_0/latest --out=models/toy-luffy --eval=out/eval_luffy": [],
    "lm_eval run --model hf --model_args pretrained=models/toy-luffy --tasks toy_sums --include_path toy --apply_chat_template"
    " --batch_size 50": "by hand: it wants an environment of its own",
    'pip install "lm_eval[hf]"': "by hand: it wants an environment of its own",
    "hf upload USER/NAME models/toy-luffy": "not run: it publishes",
    "for m in Elliott/LUFFY-Qwen-Math-7B-Zero Elliott/Qwen2.5-Math-7B-SFT Elliott/Qwen2.5-Math-7B-SFT-RL"
    " rzzhan/ExGRPO-Qwen2.5-Math-7B-Zero; do torchrun --nproc_per_node=8 eval.py config/eval/luffy.py --model=$m"
    " --data=data/valid.all.parquet --out_dir=out/six/$m; torchrun --nproc_per_node=8 eval.py config/eval/luffy.py --model=$m"
    " --out_dir=out/ood/$m --data=data/valid.arc_c.parquet,data/valid.gpqa.parquet,data/valid.mmlu_pro.parquet; done":
        [TWO, (" Elliott/Qwen2.5-Math-7B-SFT-RL rzzhan/ExGRPO-Qwen2.5-Math-7B-Zero", ""), ("--model=$m", "--model=$m" + TINY)],
    "python eval.py compare out/six/Elliott/Qwen2.5-Math-7B-SFT/eval.json"
    " out/six/Elliott/LUFFY-Qwen-Math-7B-Zero/eval.json": [],
    "torchrun --nproc_per_node=8 eval.py config/eval/luffy.py --model=out/luffy_7b/ckpt_500 --data=data/valid.all.parquet"
    " --out_dir=out/six/luffy": [TWO, ("ckpt_500", "ckpt_2" + TINY)],
    "python measure/surprises.py": [],
    # The toy worlds.
    "python train.py config/toy/shaping.py": [("shaping.py", "shaping.py --max_steps=2" + SHORT)],
    "python train.py config/toy/shaping.py --shaping=none": [("none", "none --max_steps=2" + SHORT)],
    "make table": [("make table", ".venv/bin/python toy/table.py --seeds=1 --only_print")],
    # The ablation.
    "python -m pytest tests/test_ablation.py tests/test_loss.py": [],
    "for s in 0 1 2; do python train.py config/toy/shaping.py --sampler=torch --seed=$s --out_dir=out/luffy_$s; python train.py"
    " config/toy/shaping.py config/ablation/exp.py --sampler=torch --seed=$s --out_dir=out/exp_$s; done":
        [("0 1 2", "0 1"), ("--sampler=torch", "--sampler=torch --max_steps=5 --eval_max_problems=8")],
    "python plot.py out/luffy_? out/exp_? --out=out/ablation": [],
    "python plot.py trace out/exp_1 --step=5 --out=out/ablation.html": [],
    "for g in 0.01 0.05 0.25; do for s in 0 1 2; do python train.py config/toy/shaping.py --sampler=torch --gamma=$g --seed=$s"
    " --out_dir=out/gamma${g}_$s; done; done":
        [("0.01 0.05 0.25", "0.05 0.25"), ("0 1 2", "0"), ("--sampler=torch", "--max_steps=2" + SHORT)],
    "python plot.py out/gamma* --out=out/gammas": [],
    "torchrun --nproc_per_node=8 train.py config/luffy_7b.py config/ablation/exp.py --out_dir=out/exp_7b":
        [TWO, ("exp_7b", "exp_7b" + SMALL)],
    "make toy": [],  # last: it writes over the worlds that the others use
}  # fmt: skip


PROGRAMS = r"python3?|torchrun|make|pip|rm|source|pytest|bash|sh|git|\./\S+"
WRITES = ("make toy",)  # may change the checkout's own files

# In the copy these scripts do less work: {file: [(old, new), ...]}. Their commands run as they are on the page, in seconds
# instead of minutes. tests/test_docs.py checks that each old text is there.
SHORTER = {
    "toy/build.py": [("steps=1400", "steps=14")],
    "toy/shaping.py": [("steps=1000", "steps=10"), ("steps=560", "steps=6"), ("steps=300", "steps=3")],
    # Twelve of the 33 runs (tests/test_methods.py runs every overlay), three steps of each instead of 60, each with its
    # evaluation and its checkpoint.
    "toy/table.py": [("([], ALL)", '([], [*FOUR, "rl_sft_loss", "sft_then_rl", "relift", "rkl"])'),
                     ('(["config/toy/clean.py"], FOUR)', '(["config/toy/clean.py"], ["luffy"])'),
                     ("(10, 20, 60)", "(1, 2, 3)"), ("step=60", "step=3"), ("ckpt_60", "ckpt_3"), ("(f, 60)", "(f, 3)"),
                     ("--save_interval=10", "--save_interval=1"),
                     ("*extra]", '"--max_steps=3", "--eval_interval=1", "--eval_max_problems=8", *extra]')],
    # Two of the five quantities: one more run in one process, one in two.
    "measure/growth.py": [('"group": (8, 16, 32), ', ""), ("(128, 256, 512)", "(128, 256)"),
                          ('"vocabulary": (8192, 32768, 131072), "width": (256, 512, 1024),', "")],
}  # fmt: skip


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


def pages():
    return ["README.md", *sorted(os.path.relpath(p, ROOT) for p in glob.glob(os.path.join(ROOT, "docs", "*.md")))]


def prose(page):
    return re.sub(r"```.*?```", "", read(page), flags=re.S)


# ---------------------------------------------------------------- links


def slugs(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[*`]|\]\(.*?\)", "", h)).strip().lower().replace(" ", "-") for h in headings}


@functools.cache
def ignored():
    """Files that are here but not part of the checkout."""
    git = ["git", "-C", ROOT, "ls-files", "-oi", "--exclude-standard"]  # in a copy without .git it fails and prints nothing
    listed = subprocess.run(git, capture_output=True, text=True)
    return set(listed.stdout.splitlines())


def unreadable():
    """Links, images and fences that this script would not see, because they are not plain Markdown: a list of lines."""
    kinds = {r"<(a|img)\s": "HTML", r"^ *~~~|^ +```": "a fence of another kind", r"^\[[^\]]+\]: ": "a reference link",
             r"\]\(\S+ [\"']": "a link with a title"}  # fmt: skip
    found = [(page, name, m) for page in pages() for kind, name in kinds.items() for m in re.finditer(kind, prose(page), re.M)]
    return [f"{page}: {name} ({m[0]!r}): write plain Markdown" for page, name, m in found]


def unknown_knobs():
    """--knobs in the pages that no script has: a list of lines."""
    known = set("nproc_per_node nnodes node_rank master_addr master_port shutdown-timeout no-deps signal help depth".split())
    known |= {"version", "python", "logdir", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "signals_to_handle"}
    known |= {"model_args", "tasks", "include_path", "apply_chat_template", "batch_size"}  # lm_eval's
    for path in (
        "train.py",
        "eval.py",
        "bench.py",
        "measure/peers/compare.py",
        "plot.py",
        "prepare.py",
        "sample.py",
        "toy/demo.py",
        "toy/real.py",
        "toy/table.py",
        "measure/kill.py",
    ):
        known.update(*re.findall(r"^(\w+) = |\"--([\w-]+)\"|--([\w-]+)=", read(path), re.M))
    typed = [(page, knob) for page in pages() for knob in re.findall(r"(?<![\w-])--([a-z][\w-]*)", read(page))]
    return [f"{page}: --{knob} is no knob of any script" for page, knob in typed if knob not in known]


def names(code, name):
    """Does this Python code define the name (a function, a class, a knob), or have a comment that begins with it and a colon,
    comma or stop, such as "# 2. Roll out: own samples ..."?"""
    name = re.escape(name)
    return bool(re.search(rf"^ *(def|class) {name}\b|^{name} = |^ *# (\d+\. )?{name}([:,.]|$)", code, re.M))


def broken_links():
    """Links that lead nowhere, and links [`name`](file.py) to files that have no such name: a list of lines."""
    found = []
    for page in pages():
        for words, target in re.findall(r"!?\[(`[^`]+`|[^\]]*)\]\(([^)\s]+)\)", prose(page)):
            path, _, anchor = target.partition("#")
            if path.startswith("https://"):
                continue
            file = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
            name = words.strip("`") if words.startswith("`") else os.path.basename(file)
            if not os.path.exists(os.path.join(ROOT, file)) or file in ignored():
                found.append(f"{page}: [{words}]({target}): there is no {file}")
            elif file.endswith(".py"):
                if anchor:
                    found.append(f"{page}: [{words}]({target}): a line number is soon wrong: link a name, without #{anchor}")
                elif name != os.path.basename(file) and not names(read(file), name):
                    found.append(f"{page}: [{words}]({target}): {file} has no function, class, knob or comment of that name")
            elif anchor and anchor not in slugs(file):
                found.append(f"{page}: [{words}]({target}): {file} has no such heading")
    return found


# ---------------------------------------------------------------- the file map

MAPPED = ("", "config", "docs", "measure", "measure/peers", "runtime", "toy")  # folders whose files the map names one by one


def file_map(page):
    """The paths in the block under a page's heading "The files". A line is one or more names, two spaces, what they are; names
    that are indented are in the folder above them."""
    block = re.search(r"^## The files\n.*?^```\n(.*?)^```", read(page), re.S | re.M)
    paths, folder = set(), ""
    for line in block[1].splitlines() if block else ():
        names = line.strip().partition("  ")[0].split()
        if names and not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
            paths |= set(names)
        else:
            paths |= {folder + name for name in names}
    return paths


def file_map_faults():
    """Files that the map in docs/files.md lacks; names in it, or in README's short one, that do not exist: a list of lines."""
    found = [path for folder in MAPPED for end in ("py", "html", "md", "toml", "txt")
             for path in glob.glob(os.path.join(folder, f"*.{end}"), root_dir=ROOT)]  # fmt: skip
    found = {path for path in found if path not in ignored() and os.path.basename(path) != "__init__.py"}
    return [f"docs/files.md: the file map lacks {path}" for path in sorted(found - file_map("docs/files.md"))] + [
        f"{page}: the file map has {path}, which does not exist"
        for page in ("README.md", "docs/files.md")
        for path in sorted(file_map(page))
        if not os.path.exists(os.path.join(ROOT, path))
    ]


# ---------------------------------------------------------------- commands


def commands(page):
    """What a page tells its reader to type: lines of sh blocks, lines behind a $, and code in the text that starts with the
    name of a program. Comments are cut off, a loop is one command."""
    text, found = read(page), []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        body = re.sub(r" *\\\n *", " ", body)
        if language in ("sh", "bash", "shell", "console"):
            body = re.sub(r" +#.*", "", body)
            body = re.sub(
                r"^for .*?^done", lambda m: re.sub(r"\n *", "; ", m[0]).replace("do; ", "do "), body, flags=re.S | re.M
            )
            found += [line.strip() for line in body.splitlines() if line.strip()]
        else:
            found += re.findall(r"^\$ (.+)$", body, re.M)
    inline = re.findall(r"`([^`]+)`", prose(page).replace("\n", " "))
    return found + [code for code in inline if re.match(rf"([A-Z_]+=\S+ )*({PROGRAMS}) \S", code)]


def unknown_commands():
    """Commands that are in README or docs/ but not in COMMANDS, and the reverse: a list of lines."""
    typed = {command: page for page in pages() for command in commands(page)}
    missing = [
        f"{page}: nothing runs `{command}`: add it to COMMANDS" for command, page in typed.items() if command not in COMMANDS
    ]
    return missing + [f"`{command}` in COMMANDS is no longer on any page" for command in COMMANDS if command not in typed]


def shorter(file):
    """A script's text with its SHORTER edits."""
    text = read(file)
    for old, new in SHORTER[file]:
        assert old in text, f"measure/docs_check.py, SHORTER: {file} has no {old!r}"
        text = text.replace(old, new)
    return text


def copy_checkout(folder):
    """The checkout's files without what git ignores, some of them SHORTER, and a link to its .venv."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    for file in listed.stdout.splitlines():
        target = os.path.join(folder, file)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy2(os.path.join(ROOT, file), target)
        if file in SHORTER:
            with open(target, "w", encoding="utf-8") as f:
                f.write(shorter(file))
    os.symlink(os.path.join(ROOT, ".venv"), os.path.join(folder, ".venv"))


def stand_ins(folder):
    """Make what the commands read: models under the hub's names, OpenR1's rows, the benchmarks' files, README's own questions,
    the files that README and the ablation print."""
    from pathlib import Path

    import pyarrow as pa
    import pyarrow.parquet as pq
    from helpers import build_model, openr1_row, openr1_trace, write_openr1

    folder = Path(folder)
    build_model(folder / "Qwen" / "Qwen2.5-Math-7B")
    build_model(folder / "Qwen" / "Qwen2.5-0.5B", positions=32768)
    for split in ("train", "test"):
        row = lambda i: json.dumps({"question": f"What is {i}+1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"})
        (folder / "gsm8k").mkdir(exist_ok=True)
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(row, range(64 if split == "train" else 4))))
    build_model(folder / "Qwen" / "Qwen3-30B-A3B-Thinking-2507", rows=272, eos="<|im_end|>")
    loop = next(command for command in COMMANDS if command.startswith("for m in"))
    for name in loop.partition(";")[0].split()[3:]:  # for each trained model, what prepare.py will have made of the base
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder / "models" / "Qwen2.5-Math-7B-16k-think")
    write_openr1(folder / "raw.parquet", [openr1_row(f"problem {i}", [openr1_trace(40 + i % 7)]) for i in range(64)])
    (folder / "any.py").write_text("def grade(text, answer):\n    return True\n")
    (folder / "data").mkdir()
    for file, sources in (("all", ["aime", "aime25", "amc", "math", "minerva", "olympiad_bench"]), ("arc_c", ["arc_c"]),
                          ("gpqa", ["gpqa"]), ("mmlu_pro", ["mmlu_pro"])):  # fmt: skip
        rows = [
            {"data_source": source, "prompt": [{"role": "user", "content": f"{source} {i}: A) 1 B) 2"}],
             "reward_model": {"ground_truth": "1"}}
            for source in sources for i in range(4)
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"valid.{file}.parquet")
    (folder / "mine.jsonl").write_text(re.search(r"^```json\n(.*?)^```", read("README.md"), re.S | re.M)[1])
    page = read("docs/first_ablation.md")
    (folder / "first.diff").write_text(re.search(r"^```diff\n(.*?)^```", page, re.S | re.M)[1])
    subprocess.run(["patch", "-p1", "-F0", "-i", "first.diff"], cwd=folder, check=True)
    for code in re.findall(r"^```python\n(.*?)^```", read("README.md") + page, re.S | re.M):
        file = folder / re.match(r"# (\S+)\n", code)[1]
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)


def contents(folder, names):
    """{name: text} of the checkout's own files, which only the commands in WRITES may change."""
    texts = {}
    for name in names:
        with open(os.path.join(folder, name), "rb") as f:
            texts[name] = f.read()
    return texts


def run_all(folder):
    """Run every command, one after the other. Returns those that failed."""
    path = os.path.join(folder, ".venv", "bin") + os.pathsep + os.environ["PATH"]
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    names = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    failed, before = [], contents(folder, names)
    for command, how in COMMANDS.items():
        if isinstance(how, str):
            print(f"  --     {command}: {how}", flush=True)
            continue
        line = command
        for old, new in how:
            assert old in line, (command, old)
            line = line.replace(old, new)
        start = time.time()
        done = subprocess.run(["bash", "-ec", line], cwd=folder, env=environment, capture_output=True, text=True)
        print(f"  {'FAILED' if done.returncode else 'ok    '} {time.time() - start:4.0f} s  {line}", flush=True)
        if done.returncode:
            failed.append(line)
            print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
        if command in WRITES:
            before = contents(folder, names)
        elif changed := [name for name, text in contents(folder, names).items() if text != before[name]]:
            failed.append(f"{line}: it changed {', '.join(changed)}")
            before = contents(folder, names)
    return failed


def static_faults():
    """All that is checked without running a command: a list of lines."""
    return broken_links() + file_map_faults() + unreadable() + unknown_commands() + unknown_knobs()


def main():
    faults = static_faults()
    if not faults and "--links" not in sys.argv:
        with open(os.path.join(ROOT, ".ci", "run")) as f:
            ci = f.read()
        faults += [f".ci/run does not run `{c}`" for c, how in COMMANDS.items() if how == BY_CI and f"{c}\n" not in ci]
        with tempfile.TemporaryDirectory() as folder:
            copy_checkout(folder)
            stand_ins(folder)
            faults += [f"failed: {line}" for line in run_all(folder)]
    print("\n".join(faults) or "nothing is broken")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
