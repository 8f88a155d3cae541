"""How a command begins and ends: output that cannot be written, signals, process groups. Most processes load no torch."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from helpers import metrics

from configurator import ROOT
from runtime.process import drop_process_group

TALK = """
import logging, subprocess, sys, threading
from runtime.process import begin, heartbeat
begin()
with heartbeat("work", 1, every=0.01):
    for i in range(300):
        print("東京 \\ud800", "x" * 100)
        print("東京", file=sys.stderr, flush=True)
    logging.warning("東京")
    sys.stdout.buffer.write(b"bytes")
    sys.stdout.flush()
    threading.Thread(target=print, args=["thread"]).start()
    with open(sys.argv[1], "w") as f:  # it must not get the number of a closed stream
        subprocess.run("echo child; echo child >&2", shell=True)
        f.write("done")
print("the end")
"""


def start(text, *argv, **more):
    return subprocess.Popen([sys.executable, "-c", text, *map(str, argv)], cwd=ROOT, text=True, **more)


def full(tmp_path):
    return {"stdout": open("/dev/full", "w"), "stderr": open("/dev/full", "w")}


def no_reader(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    return {"stdout": writing, "stderr": writing}


def ascii_only(tmp_path):
    return {"stdout": open(tmp_path / "log", "w"), "stderr": subprocess.STDOUT,
            "env": {**os.environ, "PYTHONIOENCODING": "ascii"}}  # fmt: skip


def no_room(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # EFBIG stands for ENOSPC
    return {"stdout": open(tmp_path / "log", "w"), "stderr": subprocess.STDOUT, "preexec_fn": limit}


def closed(*numbers):
    return lambda tmp_path: {"preexec_fn": lambda: [os.close(n) for n in numbers]}


def not_blocking(tmp_path):
    _reading, writing = os.pipe()  # an integer: it stays open
    os.set_blocking(writing, False)
    return {"stdout": writing, "stderr": writing}


OUTPUTS = {"full disk": full, "no reader": no_reader, "ascii": ascii_only, "no room": no_room, "stdout closed": closed(1),
           "all closed": closed(0, 1, 2), "stderr closed": closed(2), "full pipe": not_blocking}  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
def test_lost_output_ends_nothing(tmp_path, output):
    process = start(TALK, tmp_path / "done", **OUTPUTS[output](tmp_path))
    assert process.wait(60) == 0
    assert (tmp_path / "done").read_text() == "done"
    if output == "ascii":
        text = (tmp_path / "log").read_text()
        assert "\\u6771\\u4eac \\ud800 xxx" in text and text.endswith("the end\n")


def test_output_goes_on_when_there_is_room_again(tmp_path):
    text = (
        "import resource; from runtime.process import begin; begin(); limit = lambda n: resource.setrlimit("
        "resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))\n"
        "print('before'); limit(20); print('x' * 10**6); limit(resource.RLIM_INFINITY); print('after')"
    )
    with open(tmp_path / "log", "w") as log:
        assert start(text, stdout=log).wait(60) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "before" and lines[-1].endswith("after") and len("".join(lines)) < 100


@pytest.mark.parametrize(("output", "code"), [(no_reader, 0), (full, 1)])
def test_a_product_on_stdout(tmp_path, output, code):
    """A reader that had enough is no fault, as in `eval.py compare | head`. A full disk is one."""
    text = "import sys; from runtime.process import begin, lost_output; begin(); print('x' * 10**6); sys.exit(lost_output())"
    process = start(text, **{**output(tmp_path), "stderr": subprocess.PIPE})
    assert process.communicate()[1] == ("error: output was lost: No space left on device\n" if code else "")
    assert process.returncode == code


# ---------------------------------------------------------------- signals

WAIT = """
import sys, time
from runtime.process import begin, unwind_on_signals
begin()
{more}
print("ready")
while True:
    try:
        time.sleep(60)
    except {swallows}:
        pass
    finally:
        print("cleaned")
"""


def signalled(numbers, more="", swallows="KeyboardInterrupt", **options):
    """Send signals to WAIT. Returns its exit code, stdout and stderr."""
    text = WAIT.format(more=more, swallows=swallows)
    process = start(text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    assert process.stdout.readline() == "ready\n"
    for number in numbers:
        time.sleep(0.3)
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_ctrl_c_is_one_line_at_any_moment():
    assert signalled([signal.SIGUSR1, signal.SIGINT]) == (130, "", "interrupted by SIGINT\n")
    assert signalled([signal.SIGINT], swallows="BaseException") == (130, "", "interrupted by SIGINT\n")
    assert signalled([signal.SIGINT], env={**os.environ, "RANK": "1"}) == (130, "", "")
    assert signalled([signal.SIGTERM]) == (-signal.SIGTERM, "", "")
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job in the background
    assert signalled([signal.SIGINT, signal.SIGTERM], preexec_fn=ignore) == (-signal.SIGTERM, "", "")


def test_what_is_half_written_is_removed():
    for number, name in ((signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")):
        assert signalled([number], "unwind_on_signals()") == (128 + number, "cleaned\n", f"interrupted by {name}\n")
    text = WAIT.format(more="unwind_on_signals()", swallows="BaseException")
    process = start(text, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):  # the second one ends even what swallows the first
        time.sleep(0.3)  # behind "ready" it enters its try
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "interrupted by SIGINT\n"
    assert process.wait(60) == 130


RUNS = {
    "train": ["train.py", "--sampler=torch", "--eval_data=", "--max_steps=1", "--out_dir=OUT"],
    "eval": ["eval.py", "--sampler=torch", "--max_tokens=200", "--out_dir=OUT"],
    "prepare": [
        "prepare.py",
        "model",
        "--model=toy/base",
        "--out=OUT",
        "--rope_theta=0",
        "--max_position=0",
        "--template=keep",
    ],
    "plot": ["plot.py", "OUT"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_ctrl_c_while_a_command_starts(tmp_path, name):
    """At many moments of its start, which is mostly imports: one line, at once, and no process is left."""
    argv = [a.replace("OUT", str(tmp_path / "out")) for a in RUNS[name]]
    for seconds in (0.7, 2.0, 4.0, 8.0):
        process = subprocess.Popen(
            [sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGUSR1)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        # It was over; at the very end, when all is printed, Python has taken its handlers away.
        if process.returncode == 0 or "error:" in err or (process.returncode == -signal.SIGINT and out and not err):
            break
        assert process.returncode == 130 and "Traceback" not in err and err.count("SIGINT") == 1, (seconds, err)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        assert not os.path.exists(tmp_path / "out.partial")


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads(tmp_path):
    argv = ["--sampler=torch", "--eval_data=", "--reward_workers=1", "--max_steps=2", f"--out_dir={tmp_path / 'out'}"]
    for output in (no_reader, full, closed(1, 2)):
        process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, **output(tmp_path))
        assert process.wait(200) == 0
        assert [row["step"] for row in metrics(tmp_path / "out")] == [0, 1, 2]
        assert os.readlink(tmp_path / "out" / "latest") == "ckpt_2"


# ---------------------------------------------------------------- process groups


def test_no_process_group_is_left():
    if dist.is_initialized():
        pytest.skip("an engine of this test session has one")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    drop_process_group()
    assert not dist.is_initialized()
    drop_process_group()
