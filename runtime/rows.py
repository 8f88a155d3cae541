"""
Rows of LUFFY's schema from what people have: a parquet file, JSON lines, or a dataset on the Hugging Face hub.

A row is {"prompt": [{role, content}, ...], "target": the traces, likewise, "reward_model": {"ground_truth": text},
"data_source": text}, or in short {"question": text, "answer": text or number, "trace": text or several}. The last two of the
long form and the last of the short one may be missing. The long form may also have "target_logps": for each trace null, or a
list of its tokens' log-probs.
"""

import json
import os
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configurator import UserError, first_line, repo_path

LONG, SHORT = ("prompt", "target", "reward_model"), ("question", "answer", "trace")
COLUMNS = (*LONG, "target_logps", "data_source", *SHORT)
ROLES = ("system", "user", "assistant")
# USER/NAME, and behind colons a subset and a split in the syntax of `datasets`; or one file there, and a split.
HUB = re.compile(r"(hf://datasets/[^:\s]+|[\w.-]+/[\w.-]+)(?::(\w[\w.-]*))??(?::(\w+(?:\[\S+\])?))?")


def data_path(name):
    """The knob `data` -> the path of a file or folder, or a name on the hub. USER/NAME is a path if it exists, if its ending
    is that of a file, or if there is a folder USER."""
    if not name.strip():
        raise UserError("data is empty: name a file, a folder or a dataset on the hub (docs/data.md)")
    path, folder = repo_path(name), name.split("/")[0]
    is_file = os.path.exists(path) or re.search(r"\.\w*(parquet|json|jsonl|csv|gz|zst)$", name) or name[:1] in (".", "~")
    is_local = not name.startswith("hf://") and (is_file or os.path.isdir(repo_path(folder)))
    return name if HUB.fullmatch(name) and not is_local else path


def read_rows(path, content=None):
    """Yield (index, row in the long form) of what data_path() names, with one batch in memory at a time. content: a hash
    object; it is fed each row, so that at the end it stands for what was read. Raises UserError if the data is missing,
    damaged, or of another schema."""
    is_name = not os.path.isabs(path) and not os.path.isfile(path)
    source = rows_of_dataset if os.path.isdir(path) or is_name else rows_of_file
    for index, row in enumerate(source(path)):
        row = long_form(row, f"{path} row {index}")
        if content:
            content.update(repr(row).encode())
        yield index, row


def long_form(row, where):
    """A row in the long form, checked, with messages whose content is null left out. `where` names it in a UserError."""
    is_short = row.get("prompt") is None and "question" in row
    # A trace, or an answer, that would be lost. A question beside a prompt is not: some files keep it there.
    if mixed := [name for name in ((*LONG, "target_logps") if is_short else ("answer", "trace")) if row.get(name)]:
        raise UserError(f"{where} has {mixed[0]!r} beside {'question' if is_short else 'prompt'!r}: write it in one form, see"
                        " docs/data.md")  # fmt: skip
    if is_short:
        traces = row.get("trace")
        message = lambda role, text: {"role": role, "content": text}
        row = {
            "prompt": [message("user", row["question"])],
            "target": [message("assistant", t) for t in (traces if isinstance(traces, list) else [traces])],
            "reward_model": {"ground_truth": row.get("answer")},
            "data_source": row.get("data_source"),
        }
    turns, logps = {}, logps_of_traces(row, where)
    for name, roles in (("prompt", ROLES), ("target", ("assistant",))):
        messages = row.get(name)
        if not isinstance(messages, (list, type(None))) or not all(isinstance(m, (dict, type(None))) for m in messages or []):
            raise UserError(f"{where}: {name!r} is {messages!r:.80}, not a list of {{role, content}}: see docs/data.md")
        messages = [m for m in messages or [] if m]
        if unread := [key for m in messages for key in m if key not in ("role", "content") and m[key] is not None]:
            raise UserError(f"{where}: {name!r} has a message with {unread[0]!r}: put its text into 'content', or remove it")
        turns[name] = [m for m in messages if m.get("content") is not None]  # an empty system turn stays
        for m in turns[name]:
            check_text(m["content"], f"{where}: the content in {name!r}")
            if m.get("role") not in roles:
                raise UserError(f"{where}: a role in {name!r} is {m.get('role')!a:.80}, not {' or '.join(roles)}")
    graded = row.get("reward_model")
    if not isinstance(graded, (dict, type(None))):
        raise UserError(f"{where}: 'reward_model' is {graded!r:.80}, not {{ground_truth}}: see docs/data.md")
    answer = (graded or {}).get("ground_truth")
    answer = plain_number(answer)
    check_text(answer, f"{where}: the ground truth")
    check_text((graded or {}).get("style"), f"{where}: the style in 'reward_model'")
    check_text(row.get("data_source"), f"{where}: 'data_source'")
    return {
        **turns,
        "reward_model": {**(graded or {}), "ground_truth": answer},
        "data_source": row.get("data_source"),
        **({"target_logps": logps} if logps else {}),
    }


def logps_of_traces(row, where):
    """The row's target_logps as floats, without those of traces that are null; None if it has none."""
    traces, found = row.get("target") or [], row.get("target_logps")
    if found is None:
        return None
    is_number = lambda x: type(x) in (int, float, Decimal)
    lists = isinstance(found, list) and all(x is None or (isinstance(x, list) and all(map(is_number, x))) for x in found)
    if not lists or not isinstance(traces, list) or len(found) != len(traces):
        raise UserError(f"{where}: 'target_logps' is {found!r:.80}, not a list of numbers for each of its {len(traces)} traces")
    kept = [x for m, x in zip(traces, found, strict=True) if m and m.get("content") is not None]
    return [x and list(map(float, x)) for x in kept]


def plain_number(answer):
    """An int, float or Decimal as decimal digits without an exponent; anything else, be it NaN or 1e400, as it is."""
    if type(answer) in (float, Decimal):
        number = Decimal(str(answer))
        return f"{number:f}" if number.is_finite() and abs(number.adjusted()) < 400 else answer
    return str(answer) if type(answer) is int else answer


def check_text(text, what):
    """Raise UserError unless `text` is None or text that can be encoded."""
    try:
        if text is None or text.encode() is not None:
            return
    except (AttributeError, UnicodeEncodeError):
        pass
    raise UserError(f"{what} is {text!a:.80}, not text: see docs/data.md")


# ---------------------------------------------------------------- files


def rows_of_file(path):
    head = head_of(path)
    if head.startswith(b"PAR1") or (path.endswith(".parquet") and not (head and is_json(head))):
        return rows_of_parquet(path)
    return rows_of_json_lines(path)


def is_json(head):
    """May a file that begins like this be JSON? White space alone may, too."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[", b"")


def head_of(path):
    """A file's first bytes, which tell its kind. Raises UserError if there is no such file, or it has to be unpacked."""
    if not os.path.isfile(path):
        raise UserError(f"there is no data file {path}; a dataset on the hub is USER/NAME:SUBSET:SPLIT, a file there"
                        " hf://datasets/USER/NAME/FILE:SPLIT")  # fmt: skip
    with open(path, "rb") as f:
        head = f.read(512)
    remedies = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"version https://git-lfs": "git lfs pull"}
    for magic, remedy in remedies.items():
        if head.startswith(magic):
            raise UserError(f"{path} does not hold the data itself: {remedy} makes it")
    return head


def rows_of_parquet(path):
    file = open_parquet(path)
    columns = columns_of(file.schema_arrow.names, path)
    n = 0
    try:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from rows_of_batch(batch, file.schema_arrow)
            n += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is damaged after row {n} ({first_line(e)}): copy it again") from None


def rows_of_batch(batch, schema):
    """An Arrow batch as rows. What stands in another form there is read as it was written: class labels and columns of JSON,
    which `datasets` describes in the schema's metadata, and a float32's digits."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    as_written = {}
    for name in batch.schema.names:
        feature = features.get(name)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            as_written[name] = dict(enumerate(feature["names"])).get
        elif isinstance(feature, dict) and feature.get("_type") == "Json":
            as_written[name] = json.loads
        elif schema.field(name).type == pa.float32():
            as_written[name] = lambda value: float(str(np.float32(value)))
    rows = batch.to_pylist()
    for row in rows:
        row.update({name: read(row[name]) for name, read in as_written.items() if row[name] is not None})
    return rows


def columns_of(names, path):
    """Those of COLUMNS that a table has. Raises UserError if it has neither form of a row, or one of them misspelt."""
    columns = [name for name in COLUMNS if name in names]
    is_short = "question" in columns and "prompt" not in columns
    missing = [name for name in (("question", "answer") if is_short else ("prompt", "reward_model")) if name not in columns]
    wanted = COLUMNS if missing else SHORT if is_short else (*LONG, "trace")
    for name in names:
        if name not in COLUMNS and (ours := name.lower().rstrip("s")) in wanted and ours not in names:
            raise UserError(f"{path} has {name!r}, which is {ours!r} here: rename it")
    if missing and not {"question", "answer"} <= {*columns}:  # a row of the short form may have a prompt that is null
        raise UserError(f"{path} lacks the column {missing[0]!r}, it has {list(names)}: see docs/data.md for the schema")
    return columns


def open_parquet(path):
    """Open a parquet file. Raises UserError if it is missing, cut short, or something else."""
    head = head_of(path)
    if head and not head.startswith(b"PAR1"):
        kind = "JSON" if is_json(head) else f"something that begins with {head[:8]!r}"
        raise UserError(f"{path} is no parquet file, but {kind}")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not a whole parquet file ({first_line(e)}): copy it again") from None


def rows_of_json_lines(path):
    try:
        with open(path, encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                row = json.loads(line, parse_float=Decimal, object_pairs_hook=object_of)  # Decimal keeps the digits
                if not isinstance(row, dict):
                    raise UserError(f"{path} line {number} is {line.strip()[:20]!r}, no object: write one {{...}} per line")
                columns_of(row, f"{path} line {number}")
                yield row
    except UnicodeDecodeError:
        raise UserError(f"{path} is neither a parquet file nor JSON lines in UTF-8: iconv -t utf-8 converts text") from None
    except (ValueError, RecursionError, ArithmeticError) as e:
        raise UserError(f"{path} line {number} cannot be read as JSON ({first_line(e)}): write one {{...}} per line") from None


def object_of(pairs):
    """A JSON object. Of two values of one key Python would take the last, in silence."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key stands twice in {list(row)!r:.80}")
    return row


def count_rows(path):
    """The number of rows of a file, parquet's read from its footer; 0 for a dataset on the hub, and if there is no file."""
    if not os.path.isfile(path):
        return 0
    with open(path, "rb") as f:
        if f.read(4) != b"PAR1":
            return sum(1 for line in f if line.strip())
    return open_parquet(path).metadata.num_rows


# ---------------------------------------------------------------- datasets


def rows_of_dataset(name):
    """The rows of a dataset on the hub, or in a folder as `datasets` reads one."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name} is no file, and datasets are read by a package: pip install datasets") from None
    datasets.disable_progress_bars()
    folder = os.path.isdir(name)
    path, subset, split = (name, None, None) if folder else HUB.fullmatch(name).groups()
    options = {}
    if path.startswith("hf://"):
        path, options = "parquet" if path.endswith(".parquet") else "json", {"data_files": path}
    try:
        table = datasets.load_dataset(path, subset, split=split or "train", **options)
    except Exception as e:
        there = "" if folder else f"there is no {repo_path(name)}, and "
        cause = f" ({first_line(e.__cause__)})" if e.__cause__ else ""  # it names the file and the columns
        raise UserError(f"{there}datasets loads no {name}: {first_line(e)}{cause}") from None
    if (kind := table.info.builder_name) not in ("parquet", "json", "arrow", None):
        raise UserError(f"{name} holds files of the kind {kind!r}, which may turn 007 into 7: write JSON lines or parquet")
    columns = columns_of(table.column_names, name)
    for batch in table.select_columns(columns).with_format("arrow").iter(1024):
        yield from rows_of_batch(batch, table.features.arrow_schema)


def files_in_words(path):
    """For the log: the files of a folder that are its split "train". Other data has its name only."""
    if not os.path.isdir(path):
        return ""
    import datasets

    files = [os.path.relpath(file, path) for file in datasets.load_dataset_builder(path).config.data_files["train"]]
    return f" ({', '.join(files[:8])}{f' and {len(files) - 8} more' if len(files) > 8 else ''})"
