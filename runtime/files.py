"""
Files that are written whole or not at all, digests of their content, and the folders of models.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import uuid

from transformers import AutoConfig

from configurator import UserError, first_line, not_here, repo_path
from data import digest

# ---------------------------------------------------------------- whole files


def make_folder(folder):
    """Make an output folder, before there are results to lose. Raises UserError if it cannot be written."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"out_dir {folder} cannot be written: {e.strerror}") from None
    return folder


@contextlib.contextmanager
def whole(path):
    """Open a text file to write. It appears at `path` when the block ends, whole or not at all, even if the machine
    dies."""
    partial = partial_name(path)
    try:
        with open(partial, "w") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(partial)
        if isinstance(e, OSError):
            e.filename = e.filename or path  # an error of write() or fsync(), such as a full disk, names no file
        raise


def partial_name(path):
    """A name beside `path`, which no other program uses, for what becomes `path` when it is whole."""
    return f"{path}.{uuid.uuid4().hex[:8]}.partial"


def remove_partials(path):
    """Remove what killed programs left under partial_name(path); path is a glob. Only for who holds the lock of the place."""
    for left in glob.glob(f"{path}.????????.partial"):
        if re.search(r"\.[0-9a-f]{8}\.partial$", left):
            shutil.rmtree(left) if os.path.isdir(left) and not os.path.islink(left) else os.remove(left)


def write_lines(path, rows):
    with whole(path) as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)


def write_json(path, value):
    with whole(path) as f:
        json.dump(value, f, indent=1, allow_nan=False)


# ---------------------------------------------------------------- digests


def fingerprint(path):
    """[bytes, SHA-256] of a file."""
    with open(path, "rb") as f:
        return [os.path.getsize(path), hashlib.file_digest(f, "sha256").hexdigest()]


def read_run(path):
    """Read and check a checkpoint's state/run.json: (its content, None), or (None, what is wrong with it)."""
    file = os.path.join(path, "state", "run.json")
    if not os.path.isfile(file):  # a pipe in its place would block
        return None, "state/run.json is missing"
    try:
        with open(file) as f:
            sha256, _, body = f.read().partition("\n")
        if hashlib.sha256(body.encode()).hexdigest() == sha256 and type(run := json.loads(body)) is dict:
            return run, None
    except OSError as e:
        return None, f"state/run.json: {e.strerror}"
    except ValueError:
        pass
    return None, "state/run.json is damaged"


def weights_digest(name):
    """A number that changes if a model's weights, config or tokenizer change; for a hub model, if its name or commit does.
    The files of a checkpoint are compared with its state/run.json. Raises UserError if they differ, or one is missing."""
    if not os.path.isdir(name):
        return digest(name, load_config(name)._commit_hash)
    try:
        found = {file: fingerprint(os.path.join(name, file)) for file in model_files(name)}
    except OSError as e:
        raise UserError(f"model {name}: {first_line(e)}") from None
    if os.path.lexists(os.path.join(name, "state", "run.json")):
        run, fault = read_run(name)
        written = {file: h for file, h in run.get("files", {}).items() if not file.startswith("state/")} if run else found
        for file in written.keys() | found.keys():
            if file not in written:
                fault = f"{file} was put beside it"
            elif not os.path.isfile(os.path.join(name, file)):
                fault = f"{file} is missing"
            elif found.get(file, written[file]) != written[file]:
                fault = f"{file} is not the one that was written"
        if fault:
            raise UserError(f"checkpoint {name}: {fault}: copy it again, or remove its state/ if you changed it on purpose")
    return digest(sorted(found.items()))


# ---------------------------------------------------------------- model folders

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip


# What would make transformers read yet other files: beside a model, and in its files.
ASIDE = ("additional_chat_templates", "adapter_config.json")
POINTERS = (("config.json", "configuration_files"), ("tokenizer_config.json", "fast_tokenizer_files"))


def model_files(folder):
    """The names of the files that make up a model: config, tokenizer and weight_files(). No other file counts. Raises OSError
    if a file of weights is missing, and for ASIDE and POINTERS."""
    for name in ASIDE:
        if os.path.lexists(os.path.join(folder, name)):
            raise OSError(f"{name} would change the model: remove it from the folder")
    for name, key in POINTERS:
        if key in read_object(folder, name):
            raise OSError(f"{name} names other files by {key!r}: remove that entry")
    return [name for name in CONFIGS + TOKENIZER if os.path.isfile(os.path.join(folder, name))] + weight_files(folder)


def weight_files(folder):
    """The names of the files with a model's weights, as transformers chooses: the one that config.json names, else the
    first of WEIGHTS; behind an index, the files in it. Empty if there are none. Raises OSError if one is missing."""
    first = next((name for name in WEIGHTS if os.path.isfile(os.path.join(folder, name))), None)
    first = read_object(folder, "config.json").get("transformers_weights") or first
    names = [first] if first else []
    if first and first.endswith(".index.json"):
        names += sorted(set(read_index(folder, first).values()))
    for name in names:
        if os.path.basename(name) != name or not os.path.isfile(os.path.join(folder, name)):
            by = first if name != first else "config.json"
            raise OSError(f"{by} names {name}, which is no file in the folder: copy the model again")
    return names


def read_object(folder, name):
    """The object in a JSON file; {} if there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError), open(os.path.join(folder, name)) as f:
        return dict(json.load(f))
    return {}


def read_index(folder, name):
    """{tensor name: file name} of an index of weights. Raises OSError if it is none."""
    try:
        with open(os.path.join(folder, name)) as f:
            found = dict(json.load(f)["weight_map"])
        if all(type(file) is str for file in found.values()):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise OSError(f"{name} is no index of weights: copy the model again")


@functools.cache
def model_path(model):
    """The knob `model` -> the path of a folder, or a hub name (USER/NAME, if there is no folder USER here). A link is followed
    once per process: a live run's `latest` may move between two looks. Raises UserError if it is neither."""
    path, user = repo_path(model), model.split("/")[0]
    if os.path.isdir(path):
        return os.path.realpath(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and user != "models" and not os.path.isdir(repo_path(user)):
        return model
    raise UserError(f"there is no model folder {path}: python prepare.py model makes one (docs/data.md)")


def load_config(model):
    """The model's config. Raises UserError if there is none."""
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as e:
        raise UserError(f"no config loads from model {model}{not_here(model)}: {first_line(e)}") from None
