"""
Kill a run at named points and at random times, resume it each time, and compare it with a run that was not disturbed.

    python measure/kill.py                        20 points, then 15 random times, torch sampler
    python measure/kill.py --sampler=vllm         the same with vLLM

The run saves a checkpoint at every step. It must resume each time, lose only the step under way, and end with the same
weights, optimizer, metrics and rollouts, byte for byte. If not, the exit code is 1.
"""

import glob
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

POINTS = (
    "load weights", "generate", "generated", "submit", "collect", "advantages", "backward", "before the optimizer",
    "behind the optimizer", "rollouts half written", "evaluation", "metrics half written", "checkpoint begun",
    "model half written", "optimizer written", "files hashed", "run.json half written", "before the rename",
    "before latest", "pruning",
)  # fmt: skip


# ---------------------------------------------------------------- the child: train.py, which dies at one point


def child(point, at_step, argv):
    """Run train.py. In step `at_step` it dies by SIGKILL at `point`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import runpy

    import torch

    # None of these imports runtime/run.py or train.py, which take functions from them by name: patched below, they get the
    # patched ones.
    import eval
    import loss
    import reward
    import rollout
    from runtime import checkpoint, guard, metrics

    assert "runtime.run" not in sys.modules
    step = [0]

    def note(self, number, name, phase=guard.Guard.phase):
        step[0] = number
        phase(self, number, name)

    guard.Guard.phase = note

    def kill(owner, name, before=None, after=None, when=lambda *a, **k: True):
        """Make owner.name deadly where when() holds: it calls before() and dies instead of its work, or with after() it does
        its work, calls after() and dies."""
        real = getattr(owner, name)

        def wrapped(*arguments, **keywords):
            if step[0] != at_step or not when(*arguments, **keywords):
                return real(*arguments, **keywords)
            if after is None:
                (before or (lambda *a, **k: None))(*arguments, **keywords)
            else:
                real(*arguments, **keywords)
                after(*arguments, **keywords)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, wrapped)

    def halve(path):
        os.truncate(path, os.path.getsize(path) // 2)

    def half_a_line(folder, records):
        with open(os.path.join(folder, "metrics.jsonl"), "a") as f:
            f.write(json.dumps(records[0])[:50])

    done = lambda *a, **k: None
    sampler = rollout.VLLMSampler if "--sampler=vllm" in argv else rollout.TorchSampler
    ends = lambda end: lambda path, *rest: str(path).endswith(end)
    goes_to = lambda end: lambda source, target: str(target).endswith(end)
    {
        "load weights": lambda: kill(sampler, "load"),
        "generate": lambda: kill(sampler, "generate"),
        "generated": lambda: kill(sampler, "generate", after=done),
        "submit": lambda: kill(reward.Verifier, "submit"),
        "collect": lambda: kill(reward.Verifier, "collect"),
        "advantages": lambda: kill(loss, "group_advantages"),
        "backward": lambda: kill(torch.Tensor, "backward", after=done),
        "before the optimizer": lambda: kill(torch.optim.AdamW, "step"),
        "behind the optimizer": lambda: kill(torch.optim.AdamW, "step", after=done),
        "rollouts half written": lambda: kill(
            metrics, "write_rollouts", after=lambda folder, n, *a: halve(os.path.join(folder, "rollouts", f"step_{n}.jsonl"))
        ),
        "evaluation": lambda: kill(eval, "evaluate", after=done),
        "metrics half written": lambda: kill(metrics, "write_metrics", before=half_a_line),
        "checkpoint begun": lambda: kill(checkpoint, "gather_shares"),
        "model half written": lambda: kill(
            checkpoint, "save_file", after=lambda tensors, path, *a: halve(path), when=lambda t, path, *a: "model" in path
        ),
        "optimizer written": lambda: kill(checkpoint, "save_file", after=done, when=lambda t, path, *a: "adamw" in path),
        "files hashed": lambda: kill(checkpoint, "fingerprint", after=done, when=ends("adamw.safetensors")),
        "run.json half written": lambda: kill(checkpoint, "to_disk", before=halve, when=ends("run.json")),
        "before the rename": lambda: kill(os, "rename", when=goes_to(f"ckpt_{at_step}")),
        "before latest": lambda: kill(os, "symlink"),
        "pruning": lambda: kill(checkpoint, "discard", before=lambda path: os.remove(os.path.join(path, "model.safetensors"))),
    }[point]()
    sys.argv = ["train.py", *argv]
    runpy.run_path(os.path.join(ROOT, "train.py"), run_name="__main__")


# ---------------------------------------------------------------- the parent


def command(out, steps, more):
    return [
        "--eval_k=0", "--eval_interval=1", "--eval_max_problems=8", "--reward_workers=1", "--save_interval=1",
        f"--max_steps={steps}", f"--out_dir={out}", "--resume=auto", *more,
    ]  # fmt: skip


def launch(argv, *front):
    script = front or (os.path.join(ROOT, "train.py"),)
    return subprocess.Popen([sys.executable, *script, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def resumed_after(text):
    found = re.search(r"resuming after step (\d+)", text)
    return int(found[1]) if found else 0


def newest_checkpoint(out):
    """Its step, after which the run must resume. Only the step under way may be lost: its line in metrics.jsonl is written
    before its checkpoint."""
    saved = max(int(n[5:]) for n in os.listdir(out) if re.fullmatch("ckpt_[0-9]+", n))
    lines = [line for line in open(os.path.join(out, "metrics.jsonl")) if line.endswith("\n")]
    done = json.loads(lines[-1])["step"]
    assert done - 1 <= saved <= done, f"step {done} is done, {saved} is saved"
    return saved


def outcome(out, steps):
    """What must not depend on kills: the final files, the metrics without time and memory, the rollouts."""
    found = {}
    checkpoint = os.path.join(out, f"ckpt_{steps}")
    for name in glob.glob("**/*.safetensors", root_dir=checkpoint, recursive=True):
        found[name] = open(os.path.join(checkpoint, name), "rb").read()
    assert found, f"no tensors in {checkpoint}"
    for line in open(os.path.join(out, "metrics.jsonl")):
        row = json.loads(line)
        found[f"metrics {row['step']}"] = {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))}
    for name in sorted(os.listdir(os.path.join(out, "rollouts"))):
        found[name] = open(os.path.join(out, "rollouts", name), "rb").read()
    return found


def after_the_kill(process, text, out, before):
    """Check that the process was killed, and that it had resumed after step `before`. Returns the newest checkpoint's step."""
    assert process.returncode == -signal.SIGKILL, f"not killed (exit code {process.returncode})\n{text[-2000:]}"
    assert resumed_after(text) == before, f"step {before} was saved, resumed after {resumed_after(text)}"
    return newest_checkpoint(out)


def at_points(folder, points, more):
    """One run of len(points) + 2 steps, killed at the i-th point in step i + 2. Returns its folder and the steps."""
    out, steps, saved = os.path.join(folder, "points"), len(points) + 2, 0
    for i, point in enumerate(points):
        process = launch(command(out, steps, more), os.path.abspath(__file__), "child", point, str(i + 2))
        saved = after_the_kill(process, process.communicate()[0], out, saved)
        print(f"killed in step {i + 2}, {point}: the checkpoint of step {saved} is whole", flush=True)
    return out, steps


def at_random(folder, times, more, seed=0):
    """One run, killed `times` times, each time at a random moment after the first step that it took."""
    out, steps, rng = os.path.join(folder, "random"), 3 * times, random.Random(seed)
    saved = 0
    for _ in range(times):
        process = launch(command(out, steps, more))
        text = ""
        for line in process.stdout:
            text += line
            if re.match(r"step +\d", line):
                break
        time.sleep(rng.random() * 0.7)
        process.send_signal(signal.SIGKILL)
        saved = after_the_kill(process, text + process.communicate()[0], out, saved)
        print(f"killed: the checkpoint of step {saved} is whole", flush=True)
    return out, steps


def check(folder, out, steps, more):
    """Finish the run, and compare it with one that was not disturbed."""
    process = launch(command(out, steps, more))
    text, _ = process.communicate()
    assert process.returncode == 0, text[-2000:]
    undisturbed = os.path.join(folder, "undisturbed")
    shutil.rmtree(undisturbed, ignore_errors=True)
    process = launch(command(undisturbed, steps, more))
    text, _ = process.communicate()
    assert process.returncode == 0, text[-2000:]
    found, wanted = outcome(out, steps), outcome(undisturbed, steps)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    different = [name for name in found if found[name] != wanted[name]]
    assert not different, different
    print(f"the same as an undisturbed run: {len(found)} items, {steps} steps", flush=True)


def main():
    more = sys.argv[1:] or ["--sampler=torch"]
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        check(folder, *at_points(folder, POINTS, more), more)
        check(folder, *at_random(folder, 15, more), more)
    print(f"{len(POINTS)} points and 15 random times in {time.time() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        main()
