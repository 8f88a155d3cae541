"""
Does the memory of `prepare.py openr1` stay the same when its file grows? Its peak on a generated file of 100 MB and on one of
1 GB.

    python measure/prepare_memory.py                      small row groups, as the hub's files have
    python measure/prepare_memory.py 1000000              all rows in one row group
"""

import os
import random
import subprocess
import sys
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT, FLAGS = pa.string(), pa.list_(pa.bool_())
SCHEMA = pa.schema({"problem": TEXT, "answer": TEXT, "solution": TEXT, "generations": pa.list_(TEXT),
                    "is_reasoning_complete": FLAGS, "correctness_math_verify": FLAGS})  # fmt: skip


def write(path, n_bytes, group):
    """A file of about n_bytes in rows of about 20 kB with two generations each; half of them are usable."""
    rng, n = random.Random(0), n_bytes // 20_000
    text = "".join(rng.choices("0123456789abcdefghijklmnopqrstuvwxyz +-=\n", k=1_000_000))
    cut = lambda size: text[(start := rng.randrange(len(text) - size)) : start + size]

    def table(first, last):
        rows = []
        for i in range(first, last):
            traces = [f"<think>\n{cut(rng.randint(1, 18_000))}</think>" for _ in range(2)]
            flags = [rng.random() < 0.5 for _ in traces]
            rows.append({"problem": f"{i} {cut(200)}", "answer": str(i), "solution": cut(1000), "generations": traces,
                         "is_reasoning_complete": [True, True], "correctness_math_verify": flags})  # fmt: skip
        return pa.Table.from_pylist(rows, SCHEMA)

    with pq.ParquetWriter(path, SCHEMA, compression="none") as writer:
        for first in range(0, n, group):
            writer.write_table(table(first, min(n, first + group)), row_group_size=group)


group = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
peaks = []
with tempfile.TemporaryDirectory() as folder:
    for n_bytes in (100_000_000, 1_000_000_000):
        source, out = os.path.join(folder, "raw.parquet"), os.path.join(folder, str(n_bytes), "openr1.parquet")
        if os.fork() == 0:  # in a child process, so that this memory is not counted as the command's
            write(source, n_bytes, group)
            os._exit(0)
        os.wait()
        argv = ["prepare.py", "openr1", f"--src={source}", f"--out={out}", "--tokenizer=toy/base", "--max_tokens=20000"]
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss / 1024)
        seconds = usage.ru_utime + usage.ru_stime
        print(f"{os.path.getsize(source) / 1e6:.0f} MB: peak {peaks[-1]:.0f} MiB, {seconds:.0f} CPU s", flush=True)
print(f"ratio {peaks[1] / peaks[0]:.3f}")
