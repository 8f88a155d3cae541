"""docs/two_nodes.slurm, with stand-ins for srun and scontrol: two nodes are two torchruns here."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import lines_of

from configurator import ROOT

SCRIPT = os.path.join(ROOT, "docs", "two_nodes.slurm")
SRUN = """
import os, signal, subprocess, sys
command = sys.argv[1:]
print("srun", *command, flush=True)
while command[0].startswith("--"):
    command.pop(0)
if os.environ.get("ONLY_PRINT"):
    sys.exit()
tasks = [subprocess.Popen(command) for node in range(2)]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
open(os.environ["STARTED"], "w").write(str(os.getpid()))
sys.exit(max(abs(task.wait()) for task in tasks))
"""


def is_free(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


def start(folder, *argv, **environment):
    """The job in a checkout's place, `folder`, as sbatch starts it. Returns its process."""
    tools = folder / "bin"
    for name, interpreter, text in (("scontrol", "/bin/sh", "[ $1-$2 = show-hostnames ] && printf 'localhost\\nother\\n'"),
                                    ("srun", sys.executable, SRUN)):  # fmt: skip
        tools.mkdir(exist_ok=True)
        (tools / name).write_text(f"#!{interpreter}\n{text}\n")
        (tools / name).chmod(0o755)
    (folder / ".venv-gpu" / "bin").mkdir(parents=True, exist_ok=True)
    path = f"{os.path.dirname(sys.executable)}:{tools}:{os.environ['PATH']}"
    (folder / ".venv-gpu" / "bin" / "activate").write_text(f"export PATH='{path}'\n")
    if not (folder / "train.py").exists():
        (folder / "train.py").symlink_to(os.path.join(ROOT, "train.py"))
    job = 7000 + next(n for n in range(os.getpid() % 900, 1000) if is_free(29500 + n))
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": f"{job}", "SLURM_JOB_NUM_NODES": "2",
             "SLURM_JOB_NODELIST": "n[1-2]", "STARTED": str(folder / "srun.pid")}  # fmt: skip
    return subprocess.Popen(["bash", SCRIPT, *argv], env={**os.environ, **slurm, **environment}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "gpus", "line"),
    [([], {}, "--nproc_per_node=8 .* train.py config/luffy_7b.py --resume=auto"),
     (["config/luffy_7b.py", "config/method/grpo.py", "--seed=2"], {"SLURM_GPUS_ON_NODE": "4"},
      "--nproc_per_node=4 .* train.py config/luffy_7b.py config/method/grpo.py --seed=2 --resume=auto")],
)  # fmt: skip
def test_its_line(tmp_path, argv, gpus, line):
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    job = start(tmp_path, *argv, ONLY_PRINT="1", **gpus)
    (shown,) = job.communicate(timeout=60)[0].splitlines()
    port, number = re.search(r"--rdzv_endpoint=localhost:(\d+) --rdzv_id=(\d+) ", shown).groups()
    assert int(port) == 29500 + int(number) % 1000 and job.returncode == 0
    assert re.fullmatch(rf"srun --kill-on-bad-exit=0 --wait=600 torchrun --nnodes=2 {line}", shown), shown


@pytest.mark.slow
def test_the_signal_before_the_time_limit_saves(tmp_path):
    """And the next job of the chain finishes the run."""
    argv = ["--sampler=torch", "--eval_data=", "--reward_workers=1", "--canary_interval=0", f"--out_dir={tmp_path / 'run'}"]
    log = tmp_path / "run" / "metrics.jsonl"
    job = start(tmp_path, *argv, "--max_steps=1000", SLURM_GPUS_ON_NODE="1")
    end = time.time() + 200
    while not (log.exists() and len(lines_of(log)) > 2):
        if job.poll() is not None or time.time() > end:
            job.kill()
            pytest.fail(job.communicate(timeout=60)[0][-3000:])
        time.sleep(0.2)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    shown = job.communicate(timeout=120)[0]
    (saved,) = tmp_path.glob("run/ckpt_*")
    n = int(saved.name.removeprefix("ckpt_"))
    assert job.returncode != 0 and n >= 2, shown[-3000:]
    job = start(tmp_path, *argv, f"--max_steps={n + 2}", SLURM_GPUS_ON_NODE="1")
    shown = job.communicate(timeout=200)[0]
    assert job.returncode == 0 and f"resuming after step {n}:" in shown, shown[-3000:]
    assert [row["step"] for row in lines_of(log)] == [*range(n + 3)]
