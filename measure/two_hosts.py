"""
Two machines on one: train.py in two network namespaces that a virtual cable joins, and what breaks there.

    python measure/two_hosts.py                  every stage, about half an hour; Linux, root, iproute2 and util-linux
    python measure/two_hosts.py killed cut       some of them

Each host has its own network, name, processes and mounts; they share files, as machines with a common folder do. The launch
lines are those of train.py's docstring and docs/long_run.md, with a short toy run in place of the 7B. A run that was killed,
cut off or signalled must end in time on both hosts, and then resume to the weights, optimizer, metrics and rollouts of a run
on one host, byte for byte. If a stage fails, the exit code is 1.
"""

import contextlib
import glob
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from measure.kill import outcome, resumed_after
from runtime.process import die_with_parent

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = "127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n"
STEPS, HANG = 8, 15  # steps of each run; its hang_timeout, s
LATE = HANG + 50  # s from a fault until both hosts have ended: torchrun waits 30 s for ranks that do not answer
SHORT = ["--sampler=torch", "--eval_data=", "--reward_workers=1", f"--max_steps={STEPS}", "--save_interval=2",
         f"--hang_timeout={HANG}"]  # fmt: skip


# ---------------------------------------------------------------- the hosts


@contextlib.contextmanager
def machines(folder, names=NAMES):
    """Two hosts, as the process ids of their first processes: whoever kills one ends the host with all that runs there. names:
    the text of both /etc/hosts."""
    path, started, first, networks = os.path.join(folder, "hosts"), [], [], []
    with open(path, "w") as f:
        f.write(names)
    try:
        for i in range(2):
            new = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child"]
            set_up = "hostname $0; mount -t proc proc /proc; mount --bind $1 /etc/hosts; echo; exec sleep infinity"
            command = [*new, "sh", "-ec", set_up, f"host{i}", path]
            ends_with_us = dict(start_new_session=True, preexec_fn=die_with_parent)
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **ends_with_us))
            assert started[i].stdout.readline(), f"namespaces cannot be made here: {started[i].stderr.read()}"
            first.append(child_of(started[i]))
            networks.append(open(f"/proc/{first[i]}/ns/net"))  # kept open, it outlives its host: the other keeps its address
        ip("link", "add", "eth0", "netns", first[0], "type", "veth", "peer", "name", "eth0", "netns", first[1])
        for pid, address in zip(first, ADDRESSES, strict=True):
            inside(pid, "ip", "addr", "add", f"{address}/24", "dev", "eth0").wait()
            for link in ("lo", "eth0"):
                inside(pid, "ip", "link", "set", link, "up").wait()
        yield first
    finally:
        for process in started:  # the kernel takes the rest along: processes, mounts, network
            process.kill()
            process.communicate()
        for network in networks:
            network.close()


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True)


def inside(pid, *command, **options):
    """Start a command on a host."""
    return subprocess.Popen(["nsenter", "-t", str(pid), "--all", f"--wd={ROOT}", *command], start_new_session=True, **options)


def child_of(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        return int(f.read().split()[0])


# ---------------------------------------------------------------- the launch lines


def launch_line(path, node, n_processes):
    """The arguments of the line for two nodes in a file, behind "torchrun" and up to "train.py", for one of the nodes."""
    with open(os.path.join(ROOT, path)) as f:
        (line,) = re.findall(r"torchrun (--nnodes=2 .*?train\.py)", f.read())
    changes = (("HOST", ADDRESSES[0]), ("node_rank=0", f"node_rank={node}"), ("node=8", f"node={n_processes}"))
    for old, new in changes:
        line = line.replace(old, new)
    return line.split()


STATIC, C10D = "train.py", os.path.join("docs", "long_run.md")


class Job:
    """One run on two hosts: the same line on each."""

    def __init__(self, hosts, out, page=STATIC, n_processes=1, more=((), ())):
        n = len(glob.glob(f"{out}.*.host0.log"))  # launched before
        self.logs, self.launched = [f"{out}.{n}.host{i}.log" for i in range(2)], []
        for i, pid in enumerate(hosts):
            command = [*launch_line(page, i, n_processes), *SHORT, f"--out_dir={out}", "--resume=auto", *more[i]]
            with open(self.logs[i], "w") as log:
                torchrun = os.path.join(os.path.dirname(sys.executable), "torchrun")
                self.launched.append(inside(pid, torchrun, *command, stdout=log, stderr=log))
        self.began = time.time()

    def text(self, i):
        with open(self.logs[i]) as f:
            return f.read()

    def reach(self, step):
        """Wait until the step's line is printed, and a little more: then the next step is under way."""
        while not re.search(rf"^step +{step}/", self.text(0), re.M):
            assert all(p.poll() is None for p in self.launched), self.tails()
            assert time.time() - self.began < 300, self.tails()
            time.sleep(0.05)
        time.sleep(0.4)
        self.began = time.time()

    def end(self, limit, hosts=(0, 1)):
        """Wait until torchrun has ended on the hosts. Returns the exit codes and the seconds that each took since the fault."""
        codes, took = [None, None], [None, None]
        while any(codes[i] is None for i in hosts):
            for i in hosts:
                if codes[i] is None and (code := self.launched[i].poll()) is not None:
                    codes[i], took[i] = code, time.time() - self.began
            assert time.time() - self.began < limit, f"not over after {limit} s\n{self.tails()}"
            time.sleep(0.05)
        return codes, took

    def tails(self):
        return "\n".join(f"---- host{i}\n{self.text(i)[-3000:]}" for i in range(2))


# ---------------------------------------------------------------- what a stage expects


def one_host(folder, n_processes):
    """The outcome of the same run on one host, made once."""
    out = os.path.join(folder, f"one_host_{n_processes}")
    if not os.path.isdir(out):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n_processes}", "train.py", *SHORT]
        command += [f"--out_dir={out}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=die_with_parent)
        assert done.returncode == 0, done.stderr[-3000:]
    return outcome(out, STEPS)


def finished(folder, job, out, n_processes=1):
    """The job ends well, and with the outcome of one host."""
    codes, _ = job.end(400)
    assert codes == [0, 0], f"{codes}\n{job.tails()}"
    found, wanted = outcome(out, STEPS), one_host(folder, 2 * n_processes)
    different = [name for name in wanted if found.get(name) != wanted[name]]
    assert not different, f"not the same as on one host: {different}"
    return f"{len(wanted)} items are those of one host with {2 * n_processes} processes, byte for byte"


def saved_in(out):
    """The steps of the checkpoints. Fails if one is half-written: its partial folder is removed at the next save."""
    return sorted(int(os.path.basename(p)[5:]) for p in glob.glob(os.path.join(out, "ckpt_*")) if not p.endswith(".partial"))


def goes_on(folder, out, page):
    """Start both hosts again: the job resumes after the newest checkpoint, and ends as if nothing had happened."""
    saved = saved_in(out)[-1]
    if saved == STEPS:
        return "all steps are done"
    with machines(folder) as hosts:
        job = Job(hosts, out, page)
        said = finished(folder, job, out)
        assert resumed_after(job.text(0)) == saved, f"{saved} was saved, resumed after {resumed_after(job.text(0))}"
    return f"resumed after step {saved}: {said}"


def last_words(job, i):
    """The lines in which a host says why it ended, of its ranks and of torchrun."""
    said = r"^(?:error: .*|rank \d+ failed in .*|rank \d+: SIG.*|\w*(?:Error|Exception): .*)"
    lines = re.findall(said, job.text(i), re.M)
    return f"host{i}: " + (" | ".join(line[:160] for line in lines[:3]) or "nothing of its own")


# ---------------------------------------------------------------- the stages


def undisturbed(folder, page, n_processes=1):
    out = os.path.join(folder, f"{os.path.basename(page)}_{n_processes}")
    with machines(folder) as hosts:
        return finished(folder, Job(hosts, out, page, n_processes), out, n_processes)


def killed(folder, page, host):
    """One host is gone in the middle of a step: all its processes by SIGKILL."""
    out = os.path.join(folder, f"killed_{host}_{os.path.basename(page)}")
    with machines(folder) as hosts:
        job = Job(hosts, out, page)
        job.reach(3)
        os.kill(hosts[host], signal.SIGKILL)
        codes, took = job.end(LATE, [1 - host])
        assert codes[1 - host], "the other host ended as if nothing had happened"
    print(f"    host{1 - host} ended after {took[1 - host]:.0f} s; {last_words(job, 1 - host)}", flush=True)
    return goes_on(folder, out, page)


def cut(folder, page):
    """The cable is pulled in the middle of a step. Nothing tells either side. The ranks must end on both hosts. torchrun must,
    too, but not on host 1 with a c10d rendezvous: there it waits for the store that it lost, for more than five minutes."""
    ending = [0, 1] if page == STATIC else [0]
    out = os.path.join(folder, f"cut_{os.path.basename(page)}")
    with machines(folder) as hosts:
        job = Job(hosts, out, page)
        job.reach(3)
        inside(hosts[1], "ip", "link", "set", "eth0", "down").wait()
        while not all("no rank made progress" in job.text(i) for i in range(2)):
            assert time.time() - job.began < LATE, job.tails()
            time.sleep(0.05)
        ranks = time.time() - job.began
        codes, took = job.end(LATE, ending)
        assert all(codes[i] for i in ending), codes
    torchruns = ", ".join(f"host{i}'s torchrun {took[i]:.0f} s" for i in ending)
    print(f"    the ranks ended after {ranks:.0f} s, {torchruns}; {last_words(job, 0)}; {last_words(job, 1)}", flush=True)
    return goes_on(folder, out, page)


def signalled(folder, page, host):
    """SIGTERM to the torchrun of one host: both save the same step, and end."""
    out = os.path.join(folder, f"signalled_{host}_{os.path.basename(page)}")
    with machines(folder) as hosts:
        job = Job(hosts, out, page)
        job.reach(3)
        os.kill(child_of(job.launched[host]), signal.SIGTERM)
        codes, took = job.end(LATE)
    print(f"    exit codes {codes} after {took[0]:.0f} s and {took[1]:.0f} s; {last_words(job, host)}", flush=True)
    saved = saved_in(out)[-1]
    assert saved >= 3, f"the last save is of step {saved}: it lost what was done\n{job.tails()}"
    return goes_on(folder, out, page)


def refused(folder, words, more=((), ()), names=NAMES, before=None):
    """A mistake of one host is an error on both, in one line, before anything is written."""
    out = os.path.join(folder, "refused", "run")
    with machines(folder, names) as hosts:
        if before:
            before(hosts, os.path.dirname(out))
        job = Job(hosts, out, more=more)
        codes, took = job.end(120)
    assert all(codes), codes
    for i in range(2):
        (line,) = set(re.findall(r"^error: .*", job.text(i), re.M)) or {"nothing"}
        assert re.search(words, line), f"host{i} says {line}\n{job.tails()}"
    assert not glob.glob(os.path.join(out, "*")), os.listdir(out)
    return f"after {max(took):.0f} s both say: {re.search('error: .*', job.text(0))[0]}"


def own_folder(hosts, folder):
    """Give host 1 an empty folder of its own in the place of the common one."""
    os.makedirs(folder, exist_ok=True)
    assert inside(hosts[1], "mount", "-t", "tmpfs", "none", folder).wait() == 0


STAGES = {
    "docstring": lambda folder: undisturbed(folder, STATIC),
    "c10d": lambda folder: undisturbed(folder, C10D),
    "four": lambda folder: undisturbed(folder, STATIC, n_processes=2),
    "killed": lambda folder: killed(folder, STATIC, host=1),
    "killed_c10d": lambda folder: killed(folder, C10D, host=1),
    "killed_first": lambda folder: killed(folder, C10D, host=0),
    "cut": lambda folder: cut(folder, STATIC),
    "cut_c10d": lambda folder: cut(folder, C10D),
    "signalled": lambda folder: signalled(folder, STATIC, host=1),
    "signalled_first": lambda folder: signalled(folder, STATIC, host=0),
    "signalled_c10d": lambda folder: signalled(folder, C10D, host=1),
    "own_folder": lambda folder: refused(folder, "several machines need a common out_dir", before=own_folder),
    "other_knob": lambda folder: refused(folder, "learning_rate is 0.0002 on host1", more=((), ("--learning_rate=2e-4",))),
    "no_address": lambda folder: refused(folder, "GLOO_SOCKET_IFNAME", names="127.0.0.1 localhost\n127.0.1.1 host0 host1\n"),
}


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts end, too
    names = sys.argv[1:] or list(STAGES)
    if unknown := set(names) - set(STAGES):
        sys.exit(f"no stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    failed, start = [], time.time()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name}: {time.strftime('%H:%M:%S')}", flush=True)
            try:
                print(f"    ok: {STAGES[name](folder)}", flush=True)
            except (AssertionError, subprocess.SubprocessError) as e:
                failed.append(name)
                print(f"    FAILED: {e}", flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} stages are as they should be, {time.time() - start:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
