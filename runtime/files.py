"""
Files that are written whole or not at all, digests of their content, and the folders of models.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import uuid

from transformers import AutoConfig

from configurator import UserError, repo_path
from data import digest, first_line

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
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(partial)
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


def read_lines(paths):
    for path in paths:
        with open(path) as f:
            try:
                yield from map(json.loads, f)
            except ValueError:
                raise UserError(f"{path} is damaged: remove it, and the same command makes it again") from None


def write_json(path, value):
    with whole(path) as f:
        json.dump(value, f, indent=1, allow_nan=False)


# ---------------------------------------------------------------- digests


def fingerprint(path):
    """[bytes, SHA-256] of a file."""
    with open(path, "rb") as f:
        return [os.path.getsize(path), hashlib.file_digest(f, "sha256").hexdigest()]


def weights_digest(name):
    """A number that changes if any file in a model's folder changes; for a hub model, if its name or commit does."""
    if not os.path.isdir(name):
        return digest(name, load_config(name)._commit_hash)
    seen = []
    for file in sorted(f for f in os.listdir(name) if os.path.isfile(os.path.join(name, f))):
        with open(os.path.join(name, file), "rb") as f:
            seen.append((file, hashlib.file_digest(f, "sha256").digest()))
    return digest(seen)


# ---------------------------------------------------------------- model folders


def model_path(model):
    """The knob `model` -> the path of a folder, or a hub name (one slash, and no such folder). Raises UserError if it is
    neither."""
    path = repo_path(model)
    if os.path.isdir(path):
        return path
    if model.count("/") == 1 and model[0] not in "./~":
        return model
    raise UserError(f"there is no model folder {path}")


def load_config(model):
    """The model's config. Raises UserError if there is none."""
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as e:
        raise UserError(f"no config loads from model {model}: {first_line(e)}") from None
