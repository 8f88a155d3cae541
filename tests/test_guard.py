"""Faults, each injected for real into a run under torchrun: it ends soon, says where, and goes on from there."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from configurator import ROOT, UserError
from measure.kill import outcome
from runtime.guard import Guard, Stopped
from runtime.metrics import collapse, rewind, write_rollouts

# ---------------------------------------------------------------- one process


def test_stopped_only_where_it_is_safe():
    with Guard(60) as guard:
        os.kill(os.getpid(), signal.SIGTERM)
        guard.tick()  # not inside interruptible(): no
        guard.droppable = False
        guard.safe_point()
        done = []
        with guard.interruptible():
            done.append(1)
            guard.tick()
            done.append(2)
        pytest.fail("it went on")
    assert guard.agreed == signal.SIGTERM and done == [1]


def test_what_to_do_is_done_once_and_errors_pass():
    calls = []
    with Guard(60) as guard:
        guard.on_stop = lambda: calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        guard.agree()
    assert calls == [1]
    with pytest.raises(UserError, match="no room"), Guard(60) as guard:

        def on_stop():
            raise UserError("no room")

        guard.on_stop = on_stop
        raise Stopped


def test_an_error_says_where(capsys):
    with pytest.raises(ZeroDivisionError), Guard(60) as guard:
        guard.phase(7, "update")
        _ = 1 / 0
    assert "rank 0 failed in step 7, update" in capsys.readouterr().err


def child(text, **more):
    return subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def test_a_second_signal_ends_at_once():
    process = child(
        "import time; from runtime.guard import Guard\nwith Guard(60):\n    print('in', flush=True)\n"
        "    while True: time.sleep(0.1)"
    )
    assert process.stdout.readline() == "in\n"
    process.terminate()
    assert "a second signal ends it at once" in process.stderr.readline()
    process.terminate()  # at once: the same signal by another way
    time.sleep(1.2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    process.communicate()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR2", "SIGXCPU"])
def test_what_else_ends_a_process_saves_first(name):
    """A closed terminal, and what batch systems send. A full disk under stderr is no matter."""
    number, calls, stderr = getattr(signal, name), [], os.dup(2)
    try:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        with Guard(60) as guard:
            guard.on_stop = lambda: calls.append(1)
            os.kill(os.getpid(), number)
            guard.agree()
    finally:
        os.dup2(stderr, 2)
    assert calls == [1] and guard.agreed == number


def test_under_nohup_a_hang_up_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Guard(60) as guard:
            os.kill(os.getpid(), signal.SIGHUP)
            guard.agree()
        assert not guard.agreed and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hang_ends_with_the_place_and_a_traceback():
    process = child(
        "import time; from runtime.guard import Guard\ndef stuck():\n    time.sleep(1000)\n"
        "with Guard(2) as g:\n    g.phase(3, 'rollout')\n    stuck()"
    )
    start = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.time() - start < 30
    assert "no rank made progress for 2 s (hang_timeout): rank 0: step 3, rollout" in err and "in stuck" in err


@pytest.mark.slow
def test_a_process_that_was_stopped_is_not_a_hang():
    """Ctrl-Z and fg, or a scheduler that suspends a job: the time in between does not count."""
    process = child(
        "import time; from runtime.guard import Guard\nwith Guard(3):\n    print('in', flush=True)\n"
        "    for _ in range(15): time.sleep(0.1)"
    )
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.slow
def test_a_store_that_never_answers_stops_no_clock():
    """As when the machine of torchrun's store froze: the connection stands, and nothing comes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {
            **os.environ,
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(silent.getsockname()[1]),
        }
        process = child("import time; from runtime.guard import Guard\nwith Guard(2) as g:\n    time.sleep(1000)", env=env)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "no rank made progress for 2 s (hang_timeout): rank 0: start" in err


def test_a_signal_to_save_is_agreed_on(monkeypatch):
    """One that comes while the ranks agree counts the next time: what all know decides, not what one has heard."""
    real = torch.tensor

    def tensor(*arguments, **keywords):
        found = real(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGUSR1)
        return found

    with Guard(60) as guard:
        with monkeypatch.context() as patch:
            patch.setattr("runtime.guard.torch.tensor", tensor)
            guard.agree()
        assert not guard.save_now and guard.save_asked
        guard.agree()
        assert guard.save_now and not guard.save_asked


def test_progress_is_not_a_hang():
    with Guard(1.5) as guard:
        for _ in range(30):
            time.sleep(0.1)
            guard.progress()


def test_collapse():
    steady, fallen = [0.5] * 40, [0.5] * 20 + [0.2] * 20
    assert collapse(steady) == [] == collapse(fallen[:39]) == collapse([0.1] * 20 + [0.9] * 20) == collapse([0.0] * 40)
    assert "reward/own is 0.200 over the last 20 steps, it was 0.500: look at entropy" in collapse(fallen)[0]
    assert collapse([*fallen, 0.2]) == [] and collapse(fallen + [0.3] * 20) == []


def test_rewind(tmp_path):
    (tmp_path / "rollouts").mkdir()
    for n in range(5):
        (tmp_path / "rollouts" / f"step_{n}.jsonl").touch()
        (tmp_path / f"eval_{n}.json").touch()
    mine = ["eval_aime_2026.json", "eval_2026.jsonl", "eval_007.json", "eval_٣.json", "rollouts/step_of_interest_9.jsonl"]
    mine += ["rollouts/eval_9.json", "rollouts/my_step_9.jsonl", "step_9.jsonl"]
    for name in mine:  # of somebody who puts files there that look similar
        (tmp_path / name).touch()
    (tmp_path / "eval_9.json").mkdir()
    lines = [json.dumps({"step": n}) + "\n" for n in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines)[:-4])  # the last one cut short
    assert [r["step"] for r in rewind(str(tmp_path), 3, True)] == [0, 1, 2, 3]
    assert [r["step"] for r in rewind(str(tmp_path), 2, False)] == [0, 1]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
    found = {os.path.relpath(os.path.join(d, n), tmp_path) for d, _, names in os.walk(tmp_path) for n in names}
    assert found == {f"{name}.json" for name in ("eval_0", "eval_1", "eval_2")} | {"metrics.jsonl", *mine} | {
        f"rollouts/step_{n}.jsonl" for n in range(3)
    }


def test_a_folder_of_rollouts_that_was_removed_is_made_again(tmp_path):
    write_rollouts(str(tmp_path), 3, [], {}, {}, None)
    assert os.listdir(tmp_path / "rollouts") == ["step_3.jsonl"]


# ---------------------------------------------------------------- two ranks under torchrun

ARGV = ["--sampler=torch", "--eval_data=", "--reward_workers=1", "--max_steps=6", "--save_interval=1", "--hang_timeout=8"]

FAULTY = """
import os, runpy, signal, sys, time
sys.path.insert(0, {root!r})
import reward, rollout
from runtime import guard
if os.environ["RANK"] == "1":
    phase = guard.Guard.phase
    def faulty(self, step, name):
        phase(self, step, name)
        if (step, name) == (4, {place!r}):
            time.sleep(2.5)  # let the watch see it
            {fault}
    guard.Guard.phase = faulty
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def torchrun(out, *argv, script="train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    return subprocess.Popen(
        [*command, *ARGV, f"--out_dir={out}", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """An undisturbed run: its folder, stdout and stderr."""
    out = tmp_path_factory.mktemp("peace") / "run"
    process = torchrun(out)
    printed, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out, printed, err


@pytest.fixture(scope="module")
def peace(clean):
    return outcome(clean[0], 6)


@pytest.mark.slow
def test_a_clean_run_prints_each_line_once(clean):
    """Rank 0's, without bars and warnings; and nothing on stderr, of torchrun neither."""
    _, printed, err = clean
    lines = printed.splitlines()
    steps = [line for line in lines if re.match(r"step +\d/6 ", line)]
    assert err == "" and len(steps) == 6 and not re.search("\r|warning", printed)
    assert len(lines) == len(set(lines)) <= 32, printed


def goes_on(out, peace, after):
    process = torchrun(out, "--resume=auto")
    printed, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    assert int(re.search(r"resuming after step (\d)", printed)[1]) == after
    assert outcome(out, 6) == peace


FAULTS = {  # where, what, within how many seconds it ends, what it says
    "killed in an update": (
        "update",
        "os.kill(os.getpid(), signal.SIGKILL)",
        35,
        "last seen: rank 0: .*; rank 1: step 4, update",
    ),
    "hangs in a rollout": (
        "rollout",
        "time.sleep(1000)",
        60,
        r"no rank made progress for 8 s.*rank 0: .*; rank 1: step 4, rollout",
    ),
    "frozen in an update": (
        "update",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        60,
        r"no rank made progress for 8 s.*rank 1: step 4, update",
    ),
    "its engine raises": (
        "rollout",
        "rollout.TorchSampler.decode = lambda *a: [][1]",
        35,
        r"(?s)requests, in order, are samples of the problems \[.*rank 1 failed in step 4, rollout"
        r"|rank 1 failed in step 4, rollout.*requests, in order, are samples of the problems \[",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_one_ranks_end_is_the_runs(tmp_path, peace, fault, capsys):
    place, what, limit, says = FAULTS[fault]
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=ROOT, place=place, fault=what))
    process = torchrun(tmp_path / "x", script=script)
    reached = next((time.time() for line in process.stdout if line.startswith("step    3/6")), None)
    _, err = process.communicate(timeout=limit + 60)
    taken = time.time() - reached
    with capsys.disabled():
        print(f"\n{fault}: over after {taken:.1f} s")
    assert process.returncode not in (0, None) and taken < limit
    assert re.search(says, err), err[-4000:]
    goes_on(tmp_path / "x", peace, 3)


DEADLY = """
import itertools, json, os, signal, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/toy", {tests!r}]
import reward, runtime.torch_sampler
from helpers import forked_ranks, load_script
from runtime import checkpoint, guard
from runtime.process import descendants

phase, write, gather = guard.Guard.phase, checkpoint.save_file, runtime.torch_sampler.whole_tensors
fast, count = reward.fast_verdict, itertools.count()
reward.fast_verdict = lambda *a: fast(*a) if next(count) % 10 else None  # so that every rank has a verifier's worker
checkpoint.FILE = 100_000  # so that every rank writes files

def deadly(self, step, name):
    phase(self, step, name)
    if self.rank != at % 4 or (step, name) != (at, place):
        return
    time.sleep(2.5)  # let the watch see it
    if name == "sync":
        runtime.torch_sampler.whole_tensors = half
    elif name == "checkpoint":
        checkpoint.save_file = half_a_file
    else:
        os.kill(os.getpid(), signal.SIGKILL)

def half(*arguments):  # the others wait in the third tensor's all-gather
    tensors = gather(*arguments)
    yield from (next(tensors), next(tensors))
    raise OSError("no more memory")

def half_a_file(tensors, path, *rest):
    write(tensors, path, *rest)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

def is_alive(pid):  # not a zombie either
    try:
        return " Z " not in open("/proc/%d/stat" % pid).read()
    except OSError:
        return False

guard.Guard.phase = deadly
out, *argv = sys.argv[1:]
for at, place in [*enumerate(("sync", "rollout", "reward", "update", "evaluation", "checkpoint"), 2), (0, "x"), (0, "peace")]:
    print("=====", place, file=sys.stderr, flush=True)
    name = "peace" if place == "peace" else "x"
    ranks = forked_ranks(4, load_script("train", [*argv, "--out_dir=" + os.path.join(out, name)]).main)
    while os.waitid(os.P_PID, ranks[at % 4], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        family = descendants(os.getpid())  # until one has ended
        time.sleep(0.05)
    start = time.time()
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    taken = time.time() - start
    while (left := [*filter(is_alive, family)]) and time.time() - start < 10:
        time.sleep(0.1)
    print(json.dumps([place, codes, taken, len(family), left]), flush=True)
"""


@pytest.mark.slow
def test_one_of_four_dies_in_each_phase(tmp_path, capsys):
    """FSDP, each time another rank, and no torchrun that ends the others: they do so within seconds, and say where the dead one
    was. No process is left, and the next start goes on after the last checkpoint. In the end it is the run that nothing
    happened to."""
    (tmp_path / "deadly.py").write_text(DEADLY.format(root=ROOT, tests=os.path.join(ROOT, "tests")))
    argv = ["--shard=fsdp", "--max_steps=8", "--eval_data=toy/test.parquet", "--eval_max_problems=8", "--eval_interval=6",
            "--eval_k=0", "--hang_timeout=60", "--resume=auto", "--preflight_traces=16"]  # fmt: skip
    command = [sys.executable, tmp_path / "deadly.py", tmp_path, *ARGV, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    *deaths, rest, peace = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    said = dict(part.split("\n", 1) for part in done.stderr.split("===== ")[1:])
    for step, (place, codes, taken, _, _) in enumerate(deaths, 2):
        with capsys.disabled():
            print(f"\n{place}: over after {taken:.1f} s")
        raised, codes_of_others = place == "sync", codes[: step % 4] + codes[step % 4 + 1 :]
        assert codes[step % 4] == (1 if raised else -signal.SIGKILL) and codes_of_others == [1] * 3 and taken < 10, said[place]
        words = f"rank {step % 4}{' failed in' if raised else ':'} step {step}, {place}"
        assert re.search(words, said[place]), said[place]
    assert len(deaths) == 6 and rest[1] == peace[1] == [0] * 4 and said["x"] == said["peace"] == ""
    assert all(n >= 8 for *_, n, _ in deaths) and all(left == [] for *_, left in (*deaths, rest, peace))
    assert re.findall(r"resuming after step (\d)", done.stdout) == ["1", "2", "3", "4", "5", "6"]
    assert outcome(tmp_path / "x", 8) == outcome(tmp_path / "peace", 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_torchrun_passes_signals_on(tmp_path, peace, name):
    """Both ranks save the same boundary and leave within the grace time; torchrun's exit code is its own."""
    process = torchrun(tmp_path / "x", "--save_interval=0")
    assert any(line.startswith("step    3/6") for line in process.stdout)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count(f"{name}: saving") == 2, err[-3000:]
    (saved,) = [int(n[5:]) for n in os.listdir(tmp_path / "x") if n.startswith("ckpt")]
    assert saved >= 3
    if saved < 6:
        goes_on(tmp_path / "x", peace, saved)


@pytest.mark.slow
def test_one_rank_alone_is_signalled(tmp_path, peace):
    """SIGUSR1 to one rank saves on all; SIGTERM to one stops all."""
    process = torchrun(tmp_path / "x", "--save_interval=0", "--max_steps=10000", "--rollout_interval=0")
    rank0 = next(int(m[1]) for line in process.stdout if (m := re.match(r"process (\d+): SIGUSR1 saves", line)))
    assert any(line.startswith("step ") for line in process.stdout)
    os.kill(rank0, signal.SIGUSR1)
    for _ in range(100):
        if os.path.islink(tmp_path / "x" / "latest"):
            break
        time.sleep(0.1)
    first = os.readlink(tmp_path / "x" / "latest")
    assert process.poll() is None
    assert [line for line, _ in zip(process.stdout, range(2), strict=False)]
    os.kill(rank0, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0 and os.readlink(tmp_path / "x" / "latest") != first


@pytest.mark.slow
def test_a_read_only_out_dir(tmp_path):
    """It is said before any work is done, once, and nothing is left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "-l", disk])
        process = torchrun(disk / "run")
        _, err = process.communicate(timeout=100)
        assert process.returncode != 0 and err.count(f"error: out_dir {disk}/run cannot be written: Read-only file system") == 1
        assert os.listdir(disk) == []


@pytest.mark.slow
def test_a_verifier_killed_in_the_midst_of_training(tmp_path):
    """Its workers are killed at every step: they are replaced, and the run is the one left alone."""
    script = tmp_path / "killer.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {ROOT!r})\n"
        "import reward\n"
        "score = reward.Verifier.score\n"
        "def killing(self, *a):\n"
        "    for w in self.workers:\n"
        "        w.process and w.process.kill()\n"
        "    return score(self, *a)\n"
        "reward.Verifier.score = killing\n"
        "reward.fast_verdict = lambda *a: None\n"  # so that every answer needs a worker
        f"runpy.run_path({ROOT!r} + '/train.py', run_name='__main__')\n"
    )
    results = {}
    for name, file in (("killed", script), ("peace", os.path.join(ROOT, "train.py"))):
        subprocess.run(
            [sys.executable, str(file), *ARGV, "--max_steps=3", f"--out_dir={tmp_path / name}"],
            check=True, capture_output=True, cwd=ROOT,
        )  # fmt: skip
        results[name] = outcome(tmp_path / name, 3)
    assert results["killed"] == results["peace"]


@pytest.mark.slow
def test_sigterm_reaches_the_engine_between_two_tokens(tmp_path):
    """vLLM, long answers: the rollout is dropped within a second or two, and the run that goes on is the one left alone."""
    argv = ["--sampler=vllm", "--eval_data=", "--reward_workers=1", "--max_steps=3", "--temperature=2.0", "--max_tokens=180",
            "--max_teacher_tokens=180", "--prompts_per_step=64"]  # fmt: skip
    command = [sys.executable, os.path.join(ROOT, "train.py"), *argv]
    process = subprocess.Popen([*command, f"--out_dir={tmp_path / 'x'}"], stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("step    1/3") for line in process.stdout)
    time.sleep(0.3)
    process.terminate()
    start = time.time()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and time.time() - start < 15
    assert os.readlink(tmp_path / "x" / "latest") == "ckpt_1"
    for out in ("x", "peace"):
        subprocess.run([*command, f"--out_dir={tmp_path / out}", "--resume=auto"], check=True, capture_output=True)
    assert outcome(tmp_path / "x", 3) == outcome(tmp_path / "peace", 3)
