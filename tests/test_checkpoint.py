"""A run that was interrupted, in any way, ends as one that was not."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import load_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import eval
from configurator import ROOT, UserError
from measure.kill import POINTS, at_points, at_random, check, outcome
from model import load_policy
from runtime import checkpoint
from runtime.checkpoint import NotSaved, files_below, find, restore
from runtime.metrics import write_metrics

BASIC = ["--sampler=torch", "--reward_workers=1", "--eval_max_problems=16", "--eval_k=0", "--eval_interval=1"]
METHODS = {
    "luffy": ["--update_batches=2", "--lr_schedule=constant"],
    "relift": ["config/method/relift.py", "--sft_buffer=20"],
    "hpt": ["config/method/hpt.py", "--sft_decay_steps=4", "--sft_coef_end=0.1"],
    "exgrpo": ["config/method/exgrpo.py", "--replay_start=0.0", "--learning_rate=1e-3"],
}


def train(script, out, *argv):
    """train.py's main, in this process. Returns its exit code."""
    return script("train", [*BASIC, f"--out_dir={out}", *argv]).main()


@pytest.fixture(scope="module")
def peace(tmp_path_factory):
    """Four steps, each saved, nobody disturbing them."""
    out = tmp_path_factory.mktemp("peace") / "run"
    train(load_script, out, "--max_steps=4", "--save_interval=1", "--keep_last=0")
    return out


def copy_of(peace, tmp_path, newest=4):
    """The folder as it was when the run ended after step `newest`."""
    out = tmp_path / "copy"
    shutil.copytree(peace, out, symlinks=True)
    for step in range(newest + 1, 5):
        shutil.rmtree(out / f"ckpt_{step}")
    return out


@pytest.mark.parametrize("method", METHODS)
def test_three_and_three_are_six(script, tmp_path, method):
    """Weights, both optimizers, memory, metrics, rollouts: bit for bit."""
    argv = [*METHODS[method], "--rollout_interval=1"]
    train(script, tmp_path / "whole", *argv, "--max_steps=6")
    train(script, tmp_path / "parts", *argv, "--max_steps=3")
    assert train(script, tmp_path / "parts", *argv, "--max_steps=6", "--resume=auto") == 0
    whole, parts = outcome(tmp_path / "whole", 6), outcome(tmp_path / "parts", 6)
    assert whole == parts and len(whole) == {"relift": 4, "exgrpo": 3}.get(method, 2) + 7 + 6
    folder = tmp_path / "whole" / "ckpt_6" / "state"
    memory = {"relift": "queue", "exgrpo": "question"}.get(method)
    assert os.path.isfile(folder / "sft.safetensors") == (method == "relift")
    assert (not memory) or load_file(folder / "memory.safetensors")[memory].numel()  # it had something to remember
    rows = [json.loads(line) for line in open(tmp_path / "whole" / "metrics.jsonl")]
    assert method != "relift" or any("sft/loss" in r for r in rows[4:])
    assert method != "exgrpo" or "reward/replayed" in rows[-1]


def truncate(path, share=0.5):
    os.truncate(path, int(os.path.getsize(path) * share))


def flip(path):
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))


FAULTS = {
    "nothing": (lambda out: None, None),
    "latest is gone": (lambda out: os.remove(out / "latest"), None),
    "latest leads nowhere": (lambda out: os.remove(out / "latest") or os.symlink("ckpt_99", out / "latest"), None),
    "model truncated": (lambda out: truncate(out / "ckpt_4" / "model.safetensors"), "model.safetensors is damaged"),
    "moments flipped": (lambda out: flip(out / "ckpt_4" / "state" / "adamw.safetensors"), "state/adamw.safetensors is damaged"),
    "tokenizer gone": (lambda out: os.remove(out / "ckpt_4" / "tokenizer.json"), "tokenizer.json is missing"),
    "run.json truncated": (lambda out: truncate(out / "ckpt_4" / "state" / "run.json"), "state/run.json is damaged"),
    "run.json flipped": (lambda out: flip(out / "ckpt_4" / "state" / "run.json"), "state/run.json is damaged"),
    "run.json gone": (lambda out: os.remove(out / "ckpt_4" / "state" / "run.json"), "state/run.json is missing"),
    "a kill's leavings": (lambda out: os.rename(out / "ckpt_4", out / "ckpt_4.partial"), None),
    "metrics cut short": (lambda out: truncate(out / "metrics.jsonl", 0.9), None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_newest_whole_checkpoint_is_taken(script, peace, tmp_path, capsys, fault):
    out = copy_of(peace, tmp_path)
    spoil, said = FAULTS[fault]
    spoil(out)
    if fault == "metrics cut short":
        shutil.rmtree(out / "ckpt_4")  # the run died while it wrote the fourth line
    assert train(script, out, "--max_steps=4", "--save_interval=1", "--keep_last=0", "--resume=auto") in (0, None)
    printed = capsys.readouterr().out
    assert said is None or f"ckpt_4 does not verify ({said}): skipped" in printed
    assert ("nothing to do" in printed) == (fault in ("nothing", "latest is gone", "latest leads nowhere"))
    assert outcome(out, 4) == outcome(peace, 4)
    assert not [name for name in os.listdir(out) if "partial" in name]


def test_none_that_verifies_is_an_error(script, peace, tmp_path):
    """To start anew silently would be to lose the run."""
    out = copy_of(peace, tmp_path, newest=2)
    for step in (1, 2):
        truncate(out / f"ckpt_{step}" / "state" / "adamw.safetensors")
    before = files_below(out)
    with pytest.raises(UserError, match=r"no checkpoint verifies .*ckpt_2.*adamw.*copy it again, or start anew"):
        train(script, out, "--max_steps=4", "--resume=auto")
    assert files_below(out) == before


def test_another_versions_checkpoint_is_an_error(script, peace, tmp_path):
    """Its run.json is whole, but says something else."""
    out = copy_of(peace, tmp_path, newest=2)
    path = out / "ckpt_2" / "state" / "run.json"
    body = path.read_text().partition("\n")[2].replace('"pending"', '"tail"')
    path.write_text(hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
    with pytest.raises(UserError, match="another version of this code .run.json lacks 'pending'.: resume it under"):
        train(script, out, "--max_steps=4", "--resume=auto")


def test_damaged_ones_do_not_push_good_ones_out(script, peace, tmp_path):
    """A run that goes on from before a damaged checkpoint keeps its own newest ones, and puts the damaged aside; what only
    has a checkpoint's name is left alone."""
    out = copy_of(peace, tmp_path)
    for step in (3, 4):
        truncate(out / f"ckpt_{step}" / "model.safetensors")
    (out / "ckpt_007").mkdir()
    (out / "ckpt_0").write_text("a file")
    (out / "mine.partial").mkdir()
    (out / "eval_final.json").write_text("{}")
    with open(out / "metrics.jsonl", "ab") as f:
        f.write(b'3\n{"a": 1}\n\xff\n')
    module = script(
        "train", [*BASIC, "--max_steps=4", "--save_interval=1", "--keep_last=2", f"--out_dir={out}", "--resume=auto"]
    )
    interrupt(module, "rollout", 4)
    assert module.main() == 128 + signal.SIGTERM
    folders = ["ckpt_0", "ckpt_007", "ckpt_2", "ckpt_3", "ckpt_3.damaged", "ckpt_4.damaged"]
    assert sorted(n for n in os.listdir(out) if n.startswith("ckpt")) == folders
    assert os.readlink(out / "latest") == "ckpt_3" and find(str(out), print)[0] == str(out / "ckpt_3")
    argv = ["--max_steps=4", "--save_interval=1", "--keep_last=2", "--resume=auto"]
    assert train(script, out, *argv) == 0
    assert {"mine.partial", "eval_final.json"} <= set(os.listdir(out)) and outcome(out, 4) == outcome(peace, 4)


def test_a_folder_with_brackets(script, peace, tmp_path):
    out = tmp_path / "run[1]"
    shutil.copytree(peace, out, symlinks=True)
    os.rename(out / "ckpt_4", out / "ckpt_4.partial")
    assert train(script, out, "--max_steps=4", "--save_interval=1", "--keep_last=0", "--resume=auto") == 0
    assert outcome(out, 4) == outcome(peace, 4)


def test_nothing_to_resume_starts(script, peace, tmp_path):
    assert train(script, tmp_path / "new", "--max_steps=4", "--save_interval=1", "--resume=auto") == 0
    assert outcome(tmp_path / "new", 4) == outcome(peace, 4)
    assert sorted(n for n in os.listdir(tmp_path / "new") if n.startswith("ckpt")) == ["ckpt_3", "ckpt_4"]  # keep_last


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        (["--learning_rate=2e-4"], "learning_rate=0.0002 now, 0.0001 then"),
        (["--n_rollouts=4"], "n_rollouts=4 now, 8 then"),
        (["--seed=1"], "seed=1 now"),
        (["--holdout=8"], "holdout=8 now, 0 then"),
        (["--data=toy/shaping/train.parquet", "--min_teacher_pass=0"], "data has another content"),
        (["--model=toy/shaping/base"], "model has another content"),
        (["--grader=oat"], "grader has another content"),
    ],
)
def test_another_run_is_refused(script, peace, tmp_path, capsys, changed, names):
    out = copy_of(peace, tmp_path)
    before = files_below(out), os.stat(out / "metrics.jsonl").st_mtime_ns
    with pytest.raises(UserError, match=f"ckpt_4 is of another run .*{names}.*--resume=force"):
        train(script, out, "--max_steps=5", "--resume=auto", *changed)
    assert (files_below(out), os.stat(out / "metrics.jsonl").st_mtime_ns) == before
    assert train(script, out, "--max_steps=5", "--resume=force", *changed) == 0
    assert names in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in open(out / "metrics.jsonl")] == list(range(6))


def test_what_may_change_freely(script, peace, tmp_path, capsys):
    """Length, evaluation, logging, paths, the machine: and what is trained stays the same, bit for bit."""
    shutil.copy(os.path.join(ROOT, "toy", "train.parquet"), tmp_path / "elsewhere.parquet")
    shutil.copytree(os.path.join(ROOT, "toy", "base"), tmp_path / "base")
    out = tmp_path / "moved"
    os.rename(copy_of(peace, tmp_path, newest=3), out)
    argv = ["--max_steps=6", f"--data={tmp_path / 'elsewhere.parquet'}", f"--model={tmp_path / 'base'}", "--eval_data=",
            "--shard=none", "--reward_workers=2", "--canary_interval=1", "--rollout_interval=2", "--keep_every=2",
            "--keep_last=1", "--hang_timeout=60"]  # fmt: skip
    assert train(script, out, *argv, "--resume=auto") == 0
    printed = capsys.readouterr().out
    assert "resuming after step 3" in printed and "max_steps changed" in printed
    rows, old = ([json.loads(line) for line in open(folder / "metrics.jsonl")] for folder in (out, peace))
    assert [r["step"] for r in rows] == list(range(7)) and rows[4]["loss"] == old[4]["loss"]
    assert "mismatch/canary" in rows[5] and "eval/greedy" not in rows[5] and "eval/greedy" in rows[3]
    assert sorted(n for n in os.listdir(out) if n.startswith("ckpt")) == ["ckpt_2", "ckpt_6"]
    assert sorted(os.listdir(out / "rollouts")) == [f"step_{n}.jsonl" for n in (1, 2, 3, 4, 6)]
    # A base that is gone is not missed: the checkpoint has the model.
    assert train(script, out, *argv[1:], "--max_steps=7", "--model=toy/no_such", "--resume=auto") == 0


def test_an_export_that_others_load(peace):
    hf = AutoModelForCausalLM.from_pretrained(peace / "latest", dtype=torch.float32)
    for p, q in zip(load_policy(str(peace / "ckpt_4")).hf.parameters(), hf.parameters(), strict=True):
        assert torch.equal(p, q)
    config, base = (json.load(open(os.path.join(folder, "config.json"))) for folder in (peace / "ckpt_4", "toy/base"))
    assert config["architectures"] == base["architectures"] and config["dtype"] == "float32"


# ---------------------------------------------------------------- files that nobody wrote, and odd file systems


def forge(folder, **changes):
    """Change run.json, with a right digest."""
    path = folder / "state" / "run.json"
    run = {**json.loads(path.read_text().partition("\n")[2]), **changes}
    body = json.dumps({k: v for k, v in run.items() if v is not None})
    path.write_text(hashlib.sha256(body.encode()).hexdigest() + "\n" + body)


def resume(path, policy):
    """Find and restore. Returns AdamW's state and the memory."""
    optimizer = torch.optim.AdamW(policy.parameters())
    path, run = find(str(path), print)
    return optimizer.state, restore(path, run, policy, {"adamw": optimizer})


def test_only_files_that_run_json_names_are_opened(peace, tmp_path, policy, capsys):
    out = copy_of(peace, tmp_path)
    names = dict(policy.hf.named_parameters())
    wrong = {f"{m}.{n}": torch.full_like(p, 7.0) for m in checkpoint.MOMENTS for n, p in names.items()}
    for name in ("adamw-2", "adamw-00001-of-00002", "adamw_", "memory"):
        save_file(wrong, out / "ckpt_4" / "state" / f"{name}.safetensors")
    save_file(names, out / "ckpt_4" / "extra.safetensors")
    (out / "ckpt_4" / "state" / "sft.safetensors").mkdir()
    (state, memory), (true, _) = resume(out, policy), resume(peace, policy)
    assert memory == {} and not any((s["exp_avg"] == 7).any() for s in state.values())
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(state.values(), true.values(), strict=True))
    # Beside the checkpoint's files: what transformers would read instead of them.
    (out / "ckpt_4" / "special_tokens_map.json").write_text("{}")
    assert find(str(out), print)[0] == str(out / "ckpt_3")
    assert "special_tokens_map.json was put beside it" in capsys.readouterr().out


def test_moments_that_are_missing_are_an_error(peace, tmp_path, policy):
    out = copy_of(peace, tmp_path)
    files = json.loads((out / "ckpt_4" / "state" / "run.json").read_text().partition("\n")[2])["files"]
    forge(out / "ckpt_4", files={name: f for name, f in files.items() if "adamw" not in name})
    with pytest.raises(UserError, match="ckpt_4 cannot be resumed: the moment exp_avg.* of the optimizer adamw is missing"):
        resume(out, policy)


def test_a_number_that_disagrees_with_run_json_is_an_error(script, peace, tmp_path):
    out = copy_of(peace, tmp_path)
    shutil.copytree(out / "ckpt_4", out / "ckpt_9")
    before = files_below(out)
    with pytest.raises(UserError, match="ckpt_9 is the checkpoint of step 4.*name it ckpt_4 or move it away"):
        train(script, out, "--max_steps=6", "--resume=auto")
    assert files_below(out) == before


def test_the_format_of_run_json(peace, tmp_path):
    out = copy_of(peace, tmp_path)
    for found in (None, 1, 99):
        forge(out / "ckpt_4", format=found, written_by={"git": "abc123"})
        with pytest.raises(UserError, match=f"format {found or 'none'}, this code reads .*resume it under abc123"):
            find(str(out), print)
    (out / "ckpt_4" / "state" / "run.json").unlink()
    os.mkfifo(out / "ckpt_4" / "state" / "run.json")  # must not block
    assert find(str(out), print)[0] == str(out / "ckpt_3")


def test_the_memory_of_another_method(script, tmp_path):
    """Not even by force: what it holds would be lost without a word."""
    argv = ["--eval_data=", "--replay_share=0.5", "--replay_start=0.9", "--n_teacher=0", "--resume=force", "--max_steps=3"]
    train(script, tmp_path / "x", "--sft_buffer=20", "--max_steps=1", "--eval_data=")
    with pytest.raises(UserError, match="ckpt_1 holds the memory of another method .*start a new run from its weights"):
        train(script, tmp_path / "x", *argv)
    assert train(script, tmp_path / "x", "--eval_data=", "--max_steps=2", "--resume=force") == 0


def write(out, policy, tokenizer, step):
    out.mkdir(exist_ok=True)
    checkpoint.save(str(out), step, policy, tokenizer, {}, {"queue": torch.ones(2)}, {"step": step})


def test_the_modes_are_the_umasks(tmp_path, policy, tokenizer):
    before = os.umask(0o027)
    try:
        write(tmp_path / "x", policy, tokenizer, 1)
    finally:
        os.umask(before)
    files = files_below(tmp_path / "x" / "ckpt_1")
    assert {os.stat(tmp_path / "x" / "ckpt_1" / f).st_mode & 0o777 for f in files} == {0o640} and len(files) > 5


@pytest.mark.parametrize("kind", ["folder", "file", "no links", "dangling"])
def test_latest_is_a_convenience(tmp_path, policy, tokenizer, capsys, monkeypatch, kind):
    out, latest = tmp_path / "x", tmp_path / "x" / "latest"
    out.mkdir()
    if kind == "folder":
        latest.mkdir()
        (latest / "mine").write_text("mine")
    elif kind == "file":
        latest.write_text("mine")
    elif kind == "dangling":
        os.symlink("nowhere", latest)
        os.symlink("nowhere", out / "latest.partial")
    else:
        monkeypatch.setattr(os, "symlink", lambda *a: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    write(out, policy, tokenizer, 1)
    assert find(str(out), print)[0] == str(out / "ckpt_1")
    warned = f"warning: {latest} does not point to ckpt_1" in capsys.readouterr().out
    assert warned == (kind != "dangling")
    assert kind != "dangling" or os.readlink(latest) == "ckpt_1"
    assert kind != "folder" or (latest / "mine").read_text() == "mine"
    assert kind != "file" or latest.read_text() == "mine"


def test_what_is_in_the_way_of_a_checkpoint_is_moved_aside(tmp_path, policy, tokenizer):
    out = tmp_path / "x"
    (out / "mine").mkdir(parents=True)
    (out / "ckpt_1").write_text("mine")
    os.symlink("mine", out / "ckpt_2")
    (out / "ckpt_3").mkdir()
    (out / "ckpt_3.damaged").write_text("older")
    for step in (1, 2, 3, 3):
        write(out, policy, tokenizer, step)
    assert (out / "ckpt_1.damaged").read_text() == "mine" and os.readlink(out / "ckpt_2.damaged") == "mine"
    assert (out / "ckpt_3.damaged.1").is_dir() and (out / "ckpt_3.damaged").read_text() == "older"
    assert find(str(out), print)[0] == str(out / "ckpt_3")
    (out / "ckpt_0").mkdir()  # a plain model
    checkpoint.prune(str(out), 3, keep_last=1, keep_every=0)
    assert sorted(n for n in os.listdir(out) if re.fullmatch(r"ckpt_\d", n)) == ["ckpt_0", "ckpt_3"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_a_checkpoint_stays_until_the_one_that_replaces_it_has_its_name(tmp_path, policy, tokenizer, monkeypatch, failure):
    """As when a kill or an error comes between the two renames."""
    out, real = tmp_path / "x", os.rename

    def rename(old, new):
        if re.search(r"ckpt_1\.[0-9a-f]{8}\.partial$", old):
            raise failure
        real(old, new)

    write(out, policy, tokenizer, 1)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((KeyboardInterrupt, NotSaved)):
        write(out, policy, tokenizer, 1)
    monkeypatch.undo()
    assert (out / "ckpt_1").exists() == (failure is not KeyboardInterrupt)
    write(out, policy, tokenizer, 2)  # which removes what a kill left, but not this
    shutil.rmtree(out / "ckpt_2")
    assert find(str(out), print)[0] == str(out / "ckpt_1")
    write(out, policy, tokenizer, 1)
    assert sorted(os.listdir(out)) == ["ckpt_1", "latest"]


def test_what_no_run_wrote_is_kept(tmp_path, policy, tokenizer, capsys):
    """Pruning keeps a checkpoint that holds an evaluation, notes or a link; a checkpoint written again is kept under another
    name."""
    out = tmp_path / "x"
    for step in range(1, 6):
        write(out, policy, tokenizer, step)
    (out / "ckpt_1" / "eval").mkdir()
    (out / "ckpt_1" / "eval" / "eval.json").write_text("mine")
    (out / "ckpt_2" / "NOTES.txt").write_text("mine")
    os.symlink(tmp_path, out / "ckpt_3" / "state" / "link")
    for _ in range(2):
        checkpoint.prune(str(out), 5, keep_last=1, keep_every=0)
    assert sorted(os.listdir(out)) == ["ckpt_1", "ckpt_2", "ckpt_3", "ckpt_5", "latest"]
    assert (out / "ckpt_1" / "eval" / "eval.json").exists() and (out / "ckpt_2" / "model.safetensors").exists()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and "ckpt_2 is not pruned, because no run wrote the NOTES.txt in it" in said[1]
    write(out, policy, tokenizer, 2)
    assert (out / "ckpt_2.damaged" / "NOTES.txt").exists() and not (out / "ckpt_2" / "NOTES.txt").exists()
    assert "the one before is now" in capsys.readouterr().out and find(str(out), print)[0].endswith("ckpt_5")


def test_a_file_system_that_flushes_no_folders(tmp_path, policy, tokenizer, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "x", policy, tokenizer, 1)
    assert find(str(tmp_path / "x"), print)[0].endswith("ckpt_1")


# ---------------------------------------------------------------- signals


def interrupt(module, where, step, number=signal.SIGTERM):
    """Let the run be signalled in the midst of a step's `where`."""
    strike = lambda: os.kill(os.getpid(), number)
    at = []
    phase = module.Guard.phase

    class Watched(module.Guard):
        def phase(self, n, name):
            at[:] = [n, name]
            phase(self, n, name)

        def tick(self):
            self.ticks = getattr(self, "ticks", 0) + 1
            if at == [step, where] and self.ticks % 3 == 0 and not self.received:
                strike()
            super().tick()

    module.Guard = Watched
    real, calls = module.batch_loss, []

    def batch_loss(*arguments, **keywords):
        calls.append(1)
        if where == f"update {len(calls) - (step - 1) * 2}":
            strike()
        return real(*arguments, **keywords)

    module.batch_loss = batch_loss


TWO = ["--update_batches=2", "--max_steps=4"]


@pytest.fixture(scope="module")
def two_updates(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    train(load_script, out, *TWO)
    return outcome(out, 4)


@pytest.mark.parametrize(
    ("where", "resumes_after"), [("rollout", 2), ("reward", 2), ("update 1", 2), ("update 2", 3), ("evaluation", 3)]
)
def test_sigterm_saves_the_last_boundary(script, tmp_path, capfd, monkeypatch, two_updates, where, resumes_after):
    """In a rollout, or before its first update, the step is dropped; later it is finished. An evaluation that was cut short
    is made up for. No checkpoint was due."""
    monkeypatch.setattr("runtime.metrics.measured_memory", lambda: (math.nan, math.nan))  # as where there is no /proc
    out = tmp_path / "x"
    module = script("train", [*BASIC, *TWO, f"--out_dir={out}"])
    interrupt(module, where, 3)
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert module.main() == 128 + signal.SIGTERM
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert [n for n in os.listdir(out) if n.startswith("ckpt")] == [f"ckpt_{resumes_after}"]
    assert "SIGTERM: saving" in capfd.readouterr().err
    assert train(script, out, *TWO, "--resume=auto") == 0
    assert f"resuming after step {resumes_after}" in capfd.readouterr().out
    assert train(script, out, *TWO, "--resume=auto") in (0, None) and "nothing to do" in capfd.readouterr().out
    assert outcome(out, 4) == two_updates


def test_sigint_before_the_first_step(script, tmp_path, two_updates):
    module = script("train", [*BASIC, *TWO, f"--out_dir={tmp_path / 'x'}"])
    interrupt(module, "evaluation", 0, signal.SIGINT)
    assert module.main() == 130
    assert train(script, tmp_path / "x", *TWO, "--resume=auto") == 0
    assert outcome(tmp_path / "x", 4) == two_updates


def test_sigusr1_saves_and_goes_on(script, tmp_path, two_updates):
    module = script("train", [*BASIC, *TWO, "--keep_last=0", f"--out_dir={tmp_path / 'x'}"])
    interrupt(module, "update 1", 2, signal.SIGUSR1)
    assert module.main() == 0
    assert sorted(n for n in os.listdir(tmp_path / "x") if n.startswith("ckpt")) == ["ckpt_2", "ckpt_4"]
    assert outcome(tmp_path / "x", 4) == two_updates


# ---------------------------------------------------------------- a disk that is full


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs with room for two checkpoints of the toy and not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("told_beforehand", [True, False])
def test_a_full_disk(script, peace, small_disk, capsys, monkeypatch, told_beforehand):
    """The last good checkpoint stays, what is missing is said, and once there is room the run goes on."""
    out, argv = small_disk / "run", ["--max_steps=4", "--save_interval=1", "--keep_last=0"]
    if not told_beforehand:  # as a quota that only the write itself finds
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    with pytest.raises(UserError, match="ckpt_4 is not saved: .*--resume=auto continues from the checkpoint before") as e:
        train(script, out, *argv)
    wanted = "1.7 MiB, .* are free, .* are missing" if told_beforehand else "No space left on device"
    assert e.match(wanted)
    printed = capsys.readouterr().out
    assert "warning:" in printed and "ckpt_3 is not saved" in printed and "the next try is after the next step" in printed
    assert sorted(n for n in os.listdir(out) if n.startswith("ckpt")) == ["ckpt_1", "ckpt_2"]
    assert os.readlink(out / "latest") == "ckpt_2" and not [f for f in files_below(out) if "partial" in f]
    monkeypatch.undo()
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert train(script, out, *argv, "--resume=auto") == 0
    assert outcome(out, 4) == outcome(peace, 4)


def test_a_disk_that_fills_outside_of_checkpoints(script, small_disk, capsys, monkeypatch):
    """Rollouts and evaluations are for people and may be lost; lines of metrics.jsonl wait until there is room."""
    out = small_disk / "run"
    module = script("train", [*BASIC, "--max_steps=5", "--save_interval=0", f"--out_dir={out}"])
    hog, evaluate, calls = small_disk / "hog", eval.evaluate, []

    def fill_and_empty(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:  # the evaluation of step 2
            with pytest.raises(OSError), open(hog, "wb", buffering=0) as f:
                while True:
                    f.write(bytes(10_000)) == 10_000 or f.write(b"0")
        elif len(calls) == 5:
            os.remove(hog)
        return evaluate(*arguments, **keywords)

    monkeypatch.setattr("eval.evaluate", fill_and_empty)
    assert module.main() == 0
    printed = capsys.readouterr().out
    for what in ("write_rollouts", "write_json"):
        assert re.search(rf"warning: {what}: .*No space left on device", printed), printed
    assert [json.loads(line)["step"] for line in open(out / "metrics.jsonl")] == list(range(6))
    assert find(str(out), print)[0].endswith("ckpt_5")


def test_lines_of_metrics_are_whole_or_not_there(script, small_disk, tmp_path, capsys, monkeypatch):
    record = {f"key {i}": 1.0 for i in range(1000)}
    with open(small_disk / "hog", "wb", buffering=0) as f, pytest.raises(OSError):
        write_metrics(str(small_disk), [record])
        while True:
            f.write(bytes(10_000)) == 10_000 or f.write(b"0")
    with pytest.raises(OSError, match="No space left on device"):
        write_metrics(str(small_disk), [record, record])
    assert [json.loads(line) for line in open(small_disk / "metrics.jsonl")] == [record]
    # Lines that were refused are written with the next, in their order.
    module, real = script("train", [*BASIC, "--max_steps=5", f"--out_dir={tmp_path / 'x'}"]), write_metrics

    def write(folder, records):
        if records and records[-1]["step"] in (2, 3):
            raise OSError("no room")
        real(folder, records)

    write.__name__ = "write_metrics"
    monkeypatch.setattr("runtime.run.write_metrics", write)
    assert module.main() == 0 and capsys.readouterr().out.count("warning: write_metrics: no room") == 1  # of two
    assert [json.loads(line)["step"] for line in open(tmp_path / "x" / "metrics.jsonl")] == list(range(6))


def test_a_failed_save_is_tried_again_after_the_next_step(script, tmp_path, monkeypatch):
    module = script("train", [*BASIC, "--max_steps=5", "--save_interval=2", "--keep_last=0", f"--out_dir={tmp_path / 'x'}"])
    real, calls = checkpoint.save, []

    def save(folder, step, *rest, **more):
        calls.append(step)
        if len(calls) == 1:
            raise NotSaved("no room")
        real(folder, step, *rest, **more)

    monkeypatch.setattr("runtime.run.save", save)
    assert module.main() == 0 and calls == [2, 3, 4, 5]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_metrics_that_are_no_file(script, peace, tmp_path, make):
    """It is said at the start, and not waited for."""
    out = copy_of(peace, tmp_path, newest=2)
    os.remove(out / "metrics.jsonl")
    make(out / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl is no file"):
        train(script, out, "--max_steps=4", "--resume=auto")
    with pytest.raises(OSError):
        write_metrics(str(out), [{"step": 3}])


def test_names_with_other_digits_are_no_steps(tmp_path):
    for name in ("ckpt_1٣", "ckpt_٣", "ckpt_01", "ckpt_2"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps_in(tmp_path) == [2]


def test_find_says_nothing_of_an_empty_folder(tmp_path):
    assert find(str(tmp_path), print) == (None, None) == find(str(tmp_path / "none"), print)


# ---------------------------------------------------------------- slower: kills, and several processes


@pytest.mark.slow
def test_killed_at_named_points_and_at_random(tmp_path):
    """measure/kill.py: nothing is lost but the step under way."""
    more = ["--sampler=torch"]
    check(tmp_path, *at_points(tmp_path, POINTS, more), more)
    check(tmp_path, *at_random(tmp_path, 15, more), more)


def ranks(n, out, *argv, script="train.py"):
    front = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone"] if n > 1 else []
    done = subprocess.run(
        [sys.executable, *front, script, *BASIC, "--eval_data=", f"--out_dir={out}", *argv],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("method", "shard"), [("luffy", "fsdp"), ("relift", "ddp"), ("exgrpo", "fsdp")])
def test_three_and_three_are_six_on_two_ranks(tmp_path, method, shard):
    argv = [*METHODS[method], f"--shard={shard}"]
    ranks(2, tmp_path / "whole", *argv, "--max_steps=6")
    ranks(2, tmp_path / "parts", *argv, "--max_steps=3")
    ranks(2, tmp_path / "parts", *argv, "--max_steps=6", "--resume=auto")
    assert outcome(tmp_path / "whole", 6) == outcome(tmp_path / "parts", 6)
    for name in files_below(tmp_path / "whole" / "ckpt_6"):
        a, b = (open(tmp_path / run / "ckpt_6" / name, "rb").read() for run in ("whole", "parts"))
        assert a == b or name == os.path.join("state", "run.json"), name


SMALL_FILES = """
import runpy, sys
sys.path.insert(0, {root!r})
from runtime import checkpoint
checkpoint.FILE = 100_000
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(tmp_path):
    """One rank, two under FSDP (each writing a file of the model and of the moments), one again: as one all the way."""
    small = tmp_path / "small_files.py"
    small.write_text(SMALL_FILES.format(root=ROOT))
    argv, out = ["--update_batches=2", "--save_interval=1"], tmp_path / "x"
    ranks(1, tmp_path / "whole", *argv, "--max_steps=6")
    ranks(1, out, *argv, "--max_steps=2")
    printed = ranks(2, out, *argv, "--max_steps=4", "--shard=fsdp", "--resume=auto", script=str(small))
    assert "written under another world_size: 1; it is 2 now" in printed
    written = {"model-00001-of-00007.safetensors", "model.safetensors.index.json", "state/adamw-00013-of-00013.safetensors"}
    assert written <= set(files_below(out / "ckpt_4"))
    AutoModelForCausalLM.from_pretrained(out / "ckpt_4")
    ranks(1, out, *argv, "--max_steps=6", "--resume=auto")
    x, y = (load_file(folder / "ckpt_6" / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert x.keys() == y.keys() and all(torch.allclose(x[k], y[k], atol=1e-4) for k in x)
