"""One run per folder, or the jobs of one array: a lock file that says who holds it.

Three signs of life are used. The kernel's lock on the open file ends with its process, whatever ended it, and is not
fooled by a reused process number; but not every network file system passes it to other machines. So the file also
names host, process and start time, which settles it on that host; and its holder touches it every few seconds, so that
another host (or a container of another name) can tell a holder that was killed with its machine.
"""

import errno
import fcntl
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from gigamil.errors import EnvironmentFault

LOCK_NAME = ".gigamil.lock"
_JOB_LOCK = re.compile(r"\.gigamil-job-(\d+)-of-(\d+)\.lock")
TOUCH_S = 10.0
# Twelve touches, and more than the minute for which NFS clients believe their cached file times (acregmax).
DEAD_AFTER_S = 120.0
# A launcher starts a job again only when it has lost it, and what is left of it ends within PATIENCE_S of `parallel.meeting`.
SAME_JOB_DEAD_AFTER_S = 30.0
_NO_KERNEL_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        what: command, as the user knows it.
        host, pid: its process.
        started: when that began, in seconds since 1970, which tells reused numbers apart.
        launcher_job: the job that a launcher may start again; None if nobody does.
    """

    what: str
    host: str
    pid: int
    started: float
    launcher_job: str | None = None

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"`{self.what}`, process {self.pid} on {self.host}, started {since}"


class FolderInUse(EnvironmentFault):
    """Another run holds the folder.

    Attributes:
        holder: who; None if it has only just come.
    """

    def __init__(self, message: str, holder: Holder | None) -> None:
        super().__init__(message)
        self.holder = holder


@contextmanager
def folder_lock(
    path: Path | str, what: str, job: tuple[int, int] | None = None, launcher_job: str | None = None
) -> Iterator[None]:
    """Hold a folder for one run; it is made if it is missing.

    The lock of a dead run is taken over with a notice in the log: on this machine at once, of another machine when it
    has not been touched for two minutes, or half a minute if the launcher has started the same job again.

    Args:
        path: the folder.
        what: the holder as the user knows it, for example "gigamil tile".
        job: (i, n) for the i-th of n jobs that share the folder. The others of the n may hold it too; the same i, jobs
            of another n, and a run that wants the folder for itself may not.
        launcher_job: name of the launcher's job (`gigamil.parallel.topology.launcher_job`).
    Raises:
        FolderInUse: another run holds the folder.
        EnvironmentFault: it cannot be written.
    """
    folder = Path(path)
    file = folder / (LOCK_NAME if job is None else ".gigamil-job-{}-of-{}.lock".format(*job))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(folder, file)
        try:
            _take(handle, folder, file, what, launcher_job)
        except BaseException:
            os.close(handle)
            raise
        try:
            # After our own lock: of two that start at once, at least one sees the other.
            _refuse_others(folder, file, job)
        except BaseException:
            _let_go(handle, file)
            raise
    except OSError as error:
        raise EnvironmentFault(f"folder '{folder}' cannot be locked: {error}. Name a writable one.") from error
    try:
        with _touched(handle, file):
            yield
    finally:
        _let_go(handle, file)


def _open_locked(folder: Path, file: Path) -> int:
    """Open the lock file and take the kernel's lock on it, as a file that still has its name."""
    while True:
        handle = _open(file, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(handle)
            os.close(handle)
            raise _in_use(folder, file, holder) from None
        except OSError as error:
            if error.errno not in _NO_KERNEL_LOCKS:
                os.close(handle)
                raise
        if _same_file(handle, file):
            return handle
        os.close(handle)  # the holder before deleted it between our open and our lock


def _open(file: Path, flags: int) -> int:
    """Open a lock file, and never what a link in its place leads to: that would be overwritten."""
    try:
        return os.open(file, flags | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if file.is_symlink():
            leads_to = os.readlink(file)
            raise EnvironmentFault(f"lock file '{file}' is a symbolic link to '{leads_to}'. Remove it.") from error
        raise


def _let_go(handle: int, file: Path) -> None:
    # Deleted while still locked: who waits for this file sees that it is gone and opens the next one.
    file.unlink(missing_ok=True)
    os.close(handle)


def _refuse_others(folder: Path, mine: Path, job: tuple[int, int] | None) -> None:
    """Refuse if someone holds the folder who may not share it; delete the locks of those that are dead."""
    for file in sorted(folder.glob(".gigamil*.lock")):
        theirs = _JOB_LOCK.fullmatch(file.name)
        if file == mine or (job and theirs and int(theirs[2]) == job[1]) or not (theirs or file.name == LOCK_NAME):
            continue
        try:
            handle = _open(file, os.O_RDWR)
        except FileNotFoundError:
            continue  # it has just ended
        try:
            if _is_held(handle, folder):
                raise _in_use(folder, file, _read_holder(handle))
            file.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _is_held(handle: int, folder: Path) -> bool:
    """Whether the holder of an open lock file is alive, by the kernel's word or by what the file says."""
    try:
        # Shared: several that look at one dead lock do not take each other for its holder.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_KERNEL_LOCKS:
            raise
    holder = _read_holder(handle)
    return holder is not None and _seems_alive(holder, handle, folder, DEAD_AFTER_S)


def _seems_alive(holder: Holder, handle: int, folder: Path, dead_after_s: float) -> bool:
    return _alive(holder) if holder.host == socket.gethostname() else _touched_within(dead_after_s, handle, folder)


def _take(handle: int, folder: Path, file: Path, what: str, launcher_job: str | None) -> None:
    """Write ourselves into a lock file, unless its last holder may be alive."""
    last = _read_holder(handle)
    if last is not None:
        is_same_job = launcher_job is not None and last.launcher_job == launcher_job
        if _seems_alive(last, handle, folder, SAME_JOB_DEAD_AFTER_S if is_same_job else DEAD_AFTER_S):
            raise _in_use(folder, file, last)
        _log.warning("folder '%s': took over the lock of a run that is dead (%s)", folder, last)
    me = Holder(what, socket.gethostname(), os.getpid(), psutil.Process().create_time(), launcher_job)
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(asdict(me)).encode(), 0)


def _read_holder(handle: int) -> Holder | None:
    """The holder that a lock file names; None if it was killed before it wrote its name."""
    text = os.pread(handle, 4096, 0)
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


@contextmanager
def _touched(handle: int, file: Path) -> Iterator[None]:
    """Keep the time of a lock file fresh."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(TOUCH_S):
            try:
                os.utime(handle)
            except OSError as error:  # a file server that is away comes back
                _log.warning("'%s' cannot be touched: %s", file, error)

    thread = threading.Thread(target=touch, name="gigamil-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _touched_within(seconds: float, handle: int, folder: Path) -> bool:
    # Both times are the file server's: its clock may be minutes off ours.
    with tempfile.TemporaryFile(dir=folder) as just_now:
        return os.fstat(just_now.fileno()).st_mtime - os.fstat(handle).st_mtime < seconds


def _alive(holder: Holder) -> bool:
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.started) < 1.0
    except psutil.NoSuchProcess:
        return False


def _same_file(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _in_use(folder: Path, file: Path, holder: Holder | None) -> FolderInUse:
    who = f"by {holder}" if holder else "by a run that has just started"
    elsewhere = holder is not None and holder.host != socket.gethostname()
    cure = f"try again in {DEAD_AFTER_S / 60:g} minutes, or delete" if elsewhere else "delete"
    message = (
        f"folder '{folder}' is in use {who}. Wait for it, or name another folder. If that run is dead, {cure} '{file}'."
    )
    return FolderInUse(message, holder)
