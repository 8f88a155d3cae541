"""Output folders: what may be written into, and by one program at a time."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import BASE, TRAIN, metrics

from configurator import ROOT, UserError, repo_path
from runtime.folder import MARK, Lock, OutputFolder

FILES = [TRAIN, BASE]


def tree(folder):
    return sorted(os.path.relpath(os.path.join(d, name), folder) for d, dirs, files in os.walk(folder) for name in dirs + files)


def refused(out_dir, inputs=FILES, program="train.py"):
    with pytest.raises(UserError) as e, OutputFolder(str(out_dir), program, inputs):
        pass
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


@pytest.mark.parametrize("name", ["", "  ", ROOT, "/", "~", os.path.dirname(ROOT), "toy", "config", "runtime/..", ".", "tests"])
def test_what_is_not_ours_is_refused(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = os.listdir(ROOT), os.listdir(os.path.join(ROOT, "toy"))
    assert "choose" in refused(name) or "name a folder" in refused(name)
    assert before == (os.listdir(ROOT), os.listdir(os.path.join(ROOT, "toy")))


def test_an_empty_home_folder_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "home folder" in refused("~")
    assert "no such user" in refused("~nobody_of_this_name/x")
    assert tree(tmp_path) == []


def test_folders_that_hold_what_is_read(tmp_path):
    """Even if they are ours: a model, data or a grader inside, also behind a link."""
    with OutputFolder(str(tmp_path / "a"), "train.py"):
        (tmp_path / "a" / "ckpt_2").mkdir()
    os.symlink(tmp_path / "a", tmp_path / "link")
    for name in ("a", "link"):
        assert "holds" in refused(tmp_path / name, [str(tmp_path / "link" / "ckpt_2")])


def test_a_foreign_folder_is_refused_and_a_new_or_empty_one_is_not(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "paper.tex").touch()
    assert "paper.tex" in refused(tmp_path / "theirs")
    (tmp_path / "theirs" / MARK).write_text("something else")
    assert "was written by another program" in refused(tmp_path / "theirs")
    assert tree(tmp_path / "theirs") == [MARK, "paper.tex"] and (tmp_path / "theirs" / MARK).read_text() == "something else"
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "deep/er"):
        with OutputFolder(str(tmp_path / name), "train.py") as folder:
            open(os.path.join(folder.path, "x"), "w").close()
        assert tree(tmp_path / name) == [MARK, "x"]
    assert "was written by train.py" in refused(tmp_path / "new", program="eval.py")
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(tmp_path / "file")
    assert "cannot be written" in refused(tmp_path / ("long" * 100))


def test_a_run_whose_mark_was_not_copied_along_is_ours(tmp_path):
    """But not a folder that merely holds a checkpoint among other things."""
    state = tmp_path / "run" / "ckpt_4" / "state"
    state.mkdir(parents=True)
    assert "holds 'ckpt_4'" in refused(tmp_path / "run")
    (state / "run.json").touch()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with OutputFolder(str(tmp_path / "run"), "train.py"):
        pass
    os.remove(tmp_path / "run" / MARK)
    (tmp_path / "run" / "thesis").mkdir()
    assert "holds 'thesis'" in refused(tmp_path / "run")


@pytest.mark.parametrize(
    ("program", "files"),
    [
        ("train.py", ["ckpt_4/state/run.json", "config.json", "metrics.jsonl.0a1b2c3d.partial"]),
        ("eval.py", ["settings.json", "samples/00000.jsonl", "before_1/eval.json"]),
        ("eval.py", ["temperature_0.6/samples/00000.jsonl"]),
        ("prepare.py", ["settings.json", "samples/00003.jsonl", "ready"]),
    ],
)
def test_an_empty_mark(tmp_path, program, files):
    """As the machine's death may leave it: the folder still belongs to the program that wrote such files, and to no other."""
    for name in (MARK, *files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert "has no file .lock of ours" in refused(tmp_path, program="train.py" if program != "train.py" else "eval.py")
    with OutputFolder(str(tmp_path), program):
        assert (tmp_path / MARK).read_text().startswith(f"nano-luffy {program}, ")


def test_a_kill_while_the_mark_is_written(tmp_path, monkeypatch):
    with OutputFolder(str(tmp_path), "eval.py"):
        (tmp_path / "mine").touch()

    def killed(tell):
        lock = OutputFolder(str(tmp_path), "eval.py")
        monkeypatch.setattr("runtime.folder.platform.node", lambda: os._exit(1))
        lock.__enter__()

    child, told = forked(killed)
    os.waitpid(child, 0)
    told.close()
    with OutputFolder(str(tmp_path), "eval.py"):
        pass


def test_a_mark_that_was_removed_under_a_live_program(tmp_path):
    """It is made again and locked, unless another program made its own."""
    with OutputFolder(str(tmp_path / "x"), "train.py") as folder:
        os.remove(tmp_path / "x" / MARK)
        folder.check()
        assert f"in use by train.py, process {os.getpid()} on " in busy(tmp_path / "x")
        os.remove(tmp_path / "x" / MARK)
        assert busy(tmp_path / "x") == ""
        with pytest.raises(OSError, match="it was moved, removed or replaced"):
            folder.check()


def test_the_mark_as_the_other_ranks_see_it(tmp_path, monkeypatch):
    with OutputFolder(str(tmp_path), "eval.py") as folder:
        monkeypatch.setattr("runtime.folder.RANK", 1)
        folder.check()
        os.remove(tmp_path / MARK)
        folder.check()
        monkeypatch.undo()
        folder.check()  # rank 0 makes it again
        monkeypatch.setattr("runtime.folder.RANK", 1)
        folder.check()
        (tmp_path / MARK).write_text("nano-luffy eval.py, process 1 on another, since then")
        with pytest.raises(OSError, match="it was moved, removed or replaced"):
            folder.check()


def test_a_mark_that_is_no_file(tmp_path):
    """A pipe is not waited for, and what a link points to is not overwritten."""
    (tmp_path / "precious").touch()
    for name, make in (("pipe", os.mkfifo), ("link", lambda path: os.symlink(tmp_path / "precious", path)), ("dir", os.mkdir)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / MARK)
        assert "cannot be written" in refused(tmp_path / name)
    assert (tmp_path / "precious").read_text() == ""


def test_a_folder_that_moves_under_a_live_run(script, tmp_path, capsys):
    """Nothing is written into what another program makes in its place; when it is back, the lines of metrics are, too."""
    out, away = tmp_path / "out", tmp_path / "away"

    def hook(step, phase, record):
        if (step, phase) == (1, "rollout"):
            os.rename(out, away)
            with OutputFolder(str(out), "train.py"):
                (out / "of_another").touch()
        elif (step, phase) == (3, "rollout"):
            assert sorted(os.listdir(out)) == [MARK, "of_another"]
            shutil.rmtree(out)
            os.rename(away, out)

    argv = ["--sampler=torch", "--eval_data=", "--max_steps=3", "--prompts_per_step=2", "--save_interval=1"]
    assert script("train", [*argv, f"--out_dir={out}"]).main(hook=hook) == 0
    assert "it was moved, removed or replaced" in capsys.readouterr().out
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 3] and os.readlink(out / "latest") == "ckpt_3"


def test_the_end_of_a_program_whose_folder_is_gone_or_anothers(tmp_path):
    path = tmp_path / "run"
    with OutputFolder(str(path), "train.py"):
        shutil.rmtree(path)
    assert tree(tmp_path) == []
    with OutputFolder(str(path), "train.py"):
        os.rename(path, tmp_path / "away")
        other = OutputFolder(str(path), "train.py").__enter__()
    assert tree(tmp_path) == ["away", f"away/{MARK}", "run", f"run/{MARK}"]
    other.__exit__()
    with Lock(str(tmp_path / "x.lock"), "prepare.py", what="x"):
        os.remove(tmp_path / "x.lock")


def test_nothing_is_left_of_a_start_that_failed(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(UserError, match="no model"), OutputFolder(str(tmp_path / name), "train.py"):
            raise UserError("no model")
    assert tree(tmp_path) == ["mine", f"mine/{MARK}"]


def test_only_partial_files_of_its_own_are_removed(tmp_path):
    """Not the half-written checkpoint of a live run in a subfolder, nor what prepare.py is writing beside the run's files."""
    own = "ckpt_2 config.json metrics.jsonl eval_2.json rollouts/step_2.jsonl settings.json samples/00001.jsonl".split()
    others = ["inner/ckpt_2", "inner/config.json", "x.parquet", "ckpt_mine"]
    with OutputFolder(str(tmp_path), "train.py"):
        for name in own + others:
            (tmp_path / f"{name}.0a1b2c3d.partial" / "state").mkdir(parents=True)
    with OutputFolder(str(tmp_path), "train.py"):
        assert [name for name in own + others if (tmp_path / f"{name}.0a1b2c3d.partial").exists()] == others


def test_moved_aside(tmp_path):
    path = tmp_path / "run"
    for i in range(3):
        with OutputFolder(str(path), "train.py") as folder:
            folder.check_movable()
            folder.move_aside()
            assert "in use by train.py, process" in busy(path)  # the new one is locked too
            (path / f"of_run_{i}").touch()
    assert tree(tmp_path / "run.1") == [MARK, "of_run_0"] and tree(tmp_path / "run.2") == [MARK, "of_run_1"]
    with OutputFolder(str(path / "inner"), "train.py") as inner:
        open(os.path.join(inner.path, "x"), "w").close()
    with OutputFolder(str(path), "train.py") as folder, pytest.raises(UserError, match=r"inner lies in it"):
        folder.check_movable()


def test_a_mount_point_cannot_be_moved_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path))
    with OutputFolder(str(tmp_path), "train.py") as folder:
        folder.check_movable()  # it is empty
        (tmp_path / "metrics.jsonl").touch()
        with pytest.raises(UserError, match="it is a mount point: choose a folder in it"):
            folder.check_movable()


def forked(work):
    """Call work in a forked process, to which this process's locks do not belong. Returns (its process, a pipe with what it
    wrote)."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        with contextlib.suppress(BaseException):
            work(lambda text: os.write(writer, text.encode()))
        os._exit(0)
    os.close(writer)
    return child, os.fdopen(reader)


def busy(path):
    """What another program is told that wants the folder; "" if it gets it."""

    def want(tell):
        try:
            OutputFolder(str(path), "train.py").__enter__()
        except UserError as e:
            tell(str(e))

    child, told = forked(want)
    with told:
        os.waitpid(child, 0)
        return told.read()


def test_one_program_at_a_time(tmp_path):
    """The second is refused; a killed holder blocks nobody, nor does a child that it forked and that lives on."""
    path = tmp_path / "run"

    def hold(tell):
        with OutputFolder(str(path), "train.py") as folder:
            open(os.path.join(folder.path, "x"), "w").close()
            grandchild = os.fork()
            if grandchild:
                tell(f"{grandchild}\n")
            time.sleep(60)

    for _ in range(2):
        holder, told = forked(hold)
        grandchild = int(told.readline())
        assert f"in use by train.py, process {holder} on " in busy(path)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert busy(path) == ""
        os.kill(grandchild, signal.SIGKILL)
        told.close()


def test_a_lock_whose_file_was_removed_meanwhile(tmp_path):
    """Who waited for the file that its holder removes must not lock a file without a name."""
    path = str(tmp_path / "x.lock")
    with Lock(path, "prepare.py", what="x") as lock:
        assert "prepare.py" in lock.first_line()
        os.remove(path)
        open(path, "w").close()  # another program's
        lock.keep = True
    with Lock(path, "prepare.py", what="x"):
        pass
    assert not os.path.exists(path)


def test_a_lock_file_of_others_is_left_alone(tmp_path):
    path = tmp_path / "x.parquet.lock"
    path.write_bytes(b"\xff theirs")
    with pytest.raises(UserError, match="no file of ours"), Lock(str(path), "prepare.py", what="x.parquet"):
        pass
    assert path.read_bytes() == b"\xff theirs"


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with OutputFolder(str(tmp_path / "run"), "train.py"):
        assert "No locks available" in capsys.readouterr().out


def test_paths_that_start_with_a_dot_are_the_current_folders(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert repo_path("./x") == str(tmp_path / "sub" / "x") and repo_path("../x") == str(tmp_path / "x")
    assert repo_path(".") == str(tmp_path / "sub") and repo_path("x") == os.path.join(ROOT, "x")
    assert repo_path(".hidden/x") == os.path.join(ROOT, ".hidden/x")


@pytest.mark.slow
def test_a_second_start_harms_no_live_run(script, tmp_path):
    """While a run is in a step, a second start of its folder is refused, and the run ends as ever."""
    out = tmp_path / "out"
    argv = ["--sampler=torch", "--eval_data=", "--max_steps=3", "--prompts_per_step=2", "--save_interval=1"]
    second = [sys.executable, os.path.join(ROOT, "train.py"), *argv, f"--out_dir={out}", "--resume=auto"]
    tries = []

    def hook(step, phase, record):
        if (step, phase) == (2, "rollout"):
            tries.append(subprocess.run(second, capture_output=True, text=True))

    module = script("train", [*argv, f"--out_dir={out}"])
    assert module.main(hook=hook) == 0
    assert tries[0].returncode == 2 and f"in use by train.py, process {os.getpid()}" in tries[0].stderr
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 3] and os.listdir(tmp_path) == ["out"]
