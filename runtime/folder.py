"""
Output folders: which of them a program may write into, and that only one does.

A program locks the file .lock of its folder before it looks at anything there, and holds the lock as long as it lives. The
operating system takes the lock back when the process ends, however it ends, so a killed run blocks nobody. The file stays, and
tells that the folder is ours: another folder is neither moved nor written into unless it is empty.
"""

import contextlib
import errno
import fcntl
import glob
import os
import platform
import re
import stat
import time

from configurator import ROOT, UserError, repo_path
from runtime.files import remove_partials
from runtime.ranks import MACHINES, RANK, all_ranks, print0

MARK = ".lock"  # the file's name
TITLE = "nano-luffy"  # its first word
# What programs write here whole or not at all: a kill may leave partial ones. Others, such as those of a run in a subfolder,
# may belong to a program that is running.
WHOLE = """config.json metrics.jsonl eval_*.json rollouts/step_*.jsonl ckpt_[0-9]*
settings.json eval.json averages.json sweep.json samples/*.jsonl"""
# What each program writes here, and what shows that it did, if .lock does not say so.
EVALUATION = r"settings\.json|samples|before_[0-9]+"
CONTENTS = {
    "train.py": r"config\.json|metrics\.jsonl|rollouts|eval_[0-9]+\.json|ckpt_[0-9]+(\..+)?|latest|tensorboard",
    "eval.py": EVALUATION + r"|eval\.json|averages\.json|sweep\.(json|png)|temperature_[0-9.e+-]+",
    "prepare.py": EVALUATION + "|ready",
}
SIGNS = ("ckpt_*/state/run.json", "samples/[0-9]*.jsonl", "*/samples/[0-9]*.jsonl")


class Lock:
    """A locked file, as a context manager, which removes the file at its end unless `keep` is set."""

    def __init__(self, path, program, what):
        """program: who locks it, such as "train.py". what: what is locked, for the error that another program gets."""
        self.path, self.program, self.what, self.keep = path, program, what, False

    def __enter__(self):
        self.take()
        if (line := self.first_line()) and not line.startswith(TITLE):
            raise UserError(f"{self.path} is no file of ours: remove it, or choose another name than {self.what}")
        try:
            self.sign()
        except OSError as e:  # such as a full disk
            e.filename = self.path
            with contextlib.suppress(OSError):
                self.__exit__()
            raise
        return self

    def take(self):
        """Lock the file; make it if it is not there. Raises UserError if another process holds it, and OSError."""
        while True:
            self.file = open(self.path, "r+", errors="replace", opener=self.open)
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, a forked child does not inherit it
            except (BlockingIOError, PermissionError):
                holder = self.first_line().removeprefix(TITLE).strip() or "another program"
                self.file.close()
                raise UserError(f"{self.what} is in use by {holder}: wait for its end, or choose another name") from None
            except OSError as e:  # some network file systems have no locks
                print0(f"warning: {self.path} cannot be locked ({e.strerror}): nothing stops a second program here")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                    return
            self.file.close()  # its last holder removed or moved the file in between: try again

    @staticmethod
    def open(path, flags):
        """os.open() for a regular file only, a new one if none is there: no link is followed, no pipe waited for. Raises
        OSError."""
        number = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.EEXIST, f"its {MARK} is no regular file", path)
        return number

    def first_line(self):
        self.file.seek(0)
        return self.file.readline(1000)

    def sign(self):
        """Write into the file who holds it, over what it says: a kill leaves a first line in it, the old one or the new one."""
        self.file.seek(0)
        self.file.write(f"{TITLE} {self.program}, process {os.getpid()} on {platform.node()}, since {time.ctime()}\n")
        self.file.write("This file is locked while its program runs. Afterwards it tells that the folder is ours.\n")
        self.file.truncate()

    def __exit__(self, *_):
        if not self.keep:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path)  # before it is unlocked, so that it is still ours
        self.file.close()


class OutputFolder:
    """The folder that a program writes into, as a context manager; all ranks enter it, rank 0 holds its lock. If it is empty at
    the end, it is removed, unless the user made it.

    out_dir: the knob. program: the one that alone may use this folder again, such as "train.py". inputs: knobs that name
    files and folders to read, which must not lie in it. Raises UserError if the folder must not be written into, or is in use.
    """

    def __init__(self, out_dir, program, inputs=()):
        self.path = os.path.realpath(repo_path(out_dir))  # a link's target is what is locked, and what is moved
        self.program, self.lock = program, None
        if not out_dir.strip():
            raise UserError("out_dir is empty: name a folder")
        for what, path in (("this checkout", ROOT), ("your home folder", os.path.expanduser("~"))):
            if contains(self.path, path):
                raise UserError(f"out_dir={out_dir!r} is or holds {what}, {path}: choose another, such as out/my_run")
        for name in inputs:
            if name and os.path.exists(repo_path(name)) and contains(self.path, repo_path(name)):
                raise UserError(f"out_dir={out_dir!r} holds {name}, which is read: choose another out_dir")

    def __enter__(self):
        error = None
        if RANK == 0:
            self.ours = not os.path.isdir(self.path) or os.path.exists(os.path.join(self.path, MARK))
            try:
                self.take()
            except UserError as e:
                error = e
        if error := all_ranks(error)[0]:
            raise error
        self.line = all_ranks(self.lock.first_line() if RANK == 0 else None)[0]
        if MACHINES > 1:
            self.check_common()
        if RANK:
            self.stat = os.stat(self.path)
        return self

    def check_common(self):
        """Raise UserError unless all machines see the same folder: each would write its share of a checkpoint into its own.
        A collective."""
        seen, end = RANK == 0, time.monotonic() + 30  # a network file system may show a new file late
        while not seen and time.monotonic() < end:
            with contextlib.suppress(OSError), open(os.path.join(self.path, MARK)) as f:
                seen = f.readline() == self.line
            time.sleep(0 if seen else 0.5)
        hosts = all_ranks((platform.node(), seen))
        if others := [host for host, seen in hosts if not seen]:
            raise UserError(f"{self.path} on {others[0]} is not the folder of that name on {hosts[0][0]}: several machines"
                            " need a common out_dir, for example on NFS")  # fmt: skip

    def take(self):
        """Make the folder if necessary, lock it, and check that it is ours."""
        try:
            os.makedirs(self.path, exist_ok=True)
            if not os.path.lexists(os.path.join(self.path, MARK)):
                self.check_contents()
            self.lock = Lock(os.path.join(self.path, MARK), self.program, what=self.path)
            self.lock.take()
            self.lock.keep = True
            owner = self.lock.first_line().split(",")[0].split()
            if not owner:  # its program was killed before it wrote the line
                self.check_contents()
            elif owner != [TITLE, self.program]:
                writer = " ".join(owner[1:]) if owner[0] == TITLE else "another program"
                raise UserError(f"{self.path} was written by {writer} ({MARK} says so): choose another out_dir")
            self.lock.sign()
            self.stat = os.stat(self.path)
            for name in WHOLE.split():
                remove_partials(os.path.join(glob.escape(self.path), name))
        except OSError as e:
            raise UserError(f"out_dir {self.path} cannot be written: {e.strerror}") from None

    def check_contents(self):
        """Raise UserError if the folder is neither empty nor this program's whose .lock is missing: it was not copied along, or
        the folder is older than the file."""
        names = sorted(set(os.listdir(self.path)) - {MARK})
        own = rf"({CONTENTS[self.program]})(\.[0-9a-f]{{8}}\.partial)?"
        foreign = [name for name in names if not re.fullmatch(own, name)]
        if foreign or (names and not any(glob.glob(sign, root_dir=self.path) for sign in SIGNS)):
            raise UserError(f"{self.path} holds {(foreign or names)[0]!r} and has no file {MARK} of ours: choose another"
                            " out_dir, or an empty one")  # fmt: skip

    def check(self):
        """Raise OSError if the folder is no longer the one that was entered: what is written now would be another's. If only
        its .lock was removed, rank 0 makes it again."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.stat, os.stat(self.path)) and (self.is_theirs() if RANK else self.is_held()):
                return
        raise OSError(errno.ENOENT, "it was moved, removed or replaced while this program used it", self.path)

    def is_held(self):
        """On rank 0: whether it holds the folder's .lock, which is made again if it is missing."""
        if not os.path.lexists(self.lock.path):
            lock = Lock(self.lock.path, self.program, what=self.path)
            try:
                lock.take()
            except UserError:  # another program was faster
                return False
            if lock.first_line():  # and has ended already
                return False
            lock.sign()
            lock.keep, self.lock = True, lock
        return os.path.samestat(os.fstat(self.lock.file.fileno()), os.stat(self.lock.path))

    def is_theirs(self):
        """On the other ranks: whether rank 0 holds the folder's .lock, or will make it again."""
        holder = lambda line: line.rpartition(", since")[0]
        try:
            with open(os.path.join(self.path, MARK), errors="replace") as f:
                return holder(f.readline()) == holder(self.line)
        except FileNotFoundError:
            return True

    def check_movable(self):
        """Raise UserError if the folder cannot be moved aside, because another run lies inside it or it is a mount point."""
        if RANK == 0 and os.path.ismount(self.path) and set(os.listdir(self.path)) - {MARK}:
            raise UserError(f"{self.path} is not empty and cannot be moved aside, because it is a mount point: choose a folder"
                            " in it")  # fmt: skip
        for folder, _, names in os.walk(self.path) if RANK == 0 else ():
            if MARK in names and folder != self.path:
                raise UserError(f"{self.path} cannot be moved aside, because {folder} lies in it: choose another out_dir")

    def move_aside(self):
        """On rank 0: if anything is in the folder, rename it to the first free NAME.N, and make it anew."""
        if not set(os.listdir(self.path)) - {MARK}:
            return
        n = 1
        while os.path.lexists(f"{self.path}.{n}"):
            n += 1
        try:
            os.rename(self.path, f"{self.path}.{n}")
        except OSError as e:
            raise UserError(f"{self.path} is not empty and cannot be moved aside ({e.strerror}): choose another") from None
        print0(f"{self.path} is not empty: moved to {self.path}.{n}")
        with contextlib.ExitStack() as stack:
            stack.push(self.lock)  # it moved along
            self.take()

    def __exit__(self, *_):
        if not self.lock:
            return
        with contextlib.suppress(OSError):  # it may have been moved or removed
            self.check()
            self.lock.keep = not (self.ours and os.listdir(self.path) == [MARK])
        self.lock.__exit__()
        if not self.lock.keep:
            os.rmdir(self.path)


def contains(folder, path):
    """Whether a path is a folder or lies in it, with links resolved."""
    path = os.path.realpath(path)
    return os.path.commonpath([folder, path]) == folder
