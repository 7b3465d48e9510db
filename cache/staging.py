"""Staging files: the bytes that the lake has not got yet. Never evicted.

  staging/<number>             number in hex; given by the mover, never given twice
  lost+found/<name>-<number>   what a crash left without an owner

All calls block. The mover makes and removes the files; workers read and write them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from cache.errors import CacheError, StagingFull
from cache.model import NAME_BYTES_MAX
from cache.records import Attributes

_MODE = 0o600  # Of a staging file that says nothing of the mode: its node does.
_libc = ctypes.CDLL(None, use_errno=True)
_FDS_MAX = 64
_FEW_FILES = 8  # So many are synced one by one; more of them with all that is on the disk.


class StagingFiles:
    """The files below one cache directory. Errors: StagingFull when the disk is, else CacheError."""

    def __init__(self, directory: Path, fds_max: int = _FDS_MAX) -> None:
        self.directory = directory / "staging"
        self.lost_found = directory / "lost+found"
        self._prefix = f"{self.directory}/"
        self._fds = FdCache(self.path, fds_max)

    def __repr__(self) -> str:
        return f"<staging {self.directory}>"

    def prepare(self) -> None:
        """Make the directory, durably."""
        with _as_staging_errors(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync_directory(self.directory.parent)

    def path(self, number: int) -> str:
        assert number > 0, number
        return f"{self._prefix}{number:x}"

    # Files

    def create(self, number: int) -> bool:
        """Make an empty file; return False if there is one: no number is used twice.

        Its name is durable once `sync_entries` returned; the JournalKeeper sees to that before
        the journal names it.
        """
        with _as_staging_errors(self.directory):
            try:
                os.close(
                    os.open(self.path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
                )
            except FileExistsError:
                return False
        return True

    def exists(self, number: int) -> bool:
        return os.path.exists(self.path(number))

    def stat(self, number: int) -> os.stat_result:
        """Raises CacheError when there is no such file."""
        with _as_staging_errors(self.directory):
            return os.stat(self.path(number))

    def truncate(self, number: int, size_bytes: int) -> None:
        """Set the size; the time of the last change stays."""
        with _as_staging_errors(self.directory):
            path = self.path(number)
            status = os.stat(path)
            os.truncate(path, size_bytes)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def set_mode(self, number: int, mode: int) -> None:
        """Have the file say that it has this mode, which it `may_say`; the node's is void then."""
        assert may_say(mode), mode
        with _as_staging_errors(self.directory):
            os.chmod(self.path(number), mode)

    def forget_mode(self, number: int) -> None:
        """Have the node say the mode."""
        if mode_said(self.stat(number)) is not None:
            with _as_staging_errors(self.directory):
                os.chmod(self.path(number), _MODE)

    def remove(self, number: int) -> None:
        """Unlink the file, if it is there. Nothing durable may name it: see `JournalKeeper.discard`."""
        self.release(number)
        with _as_staging_errors(self.directory), contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(number))

    def numbers(self) -> list[int]:
        """Return the numbers of all files, ascending. What has another name is none of ours."""
        with _as_staging_errors(self.directory):
            return sorted(_numbers_in(os.listdir(self.directory)))

    def used_bytes(self) -> int:
        """Return the disk space that all files take, holes not counted."""
        total = 0
        with _as_staging_errors(self.directory), os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # Unlinked since it was listed.
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
        return total

    # Lost and found

    def to_lost_found(self, number: int, name: bytes) -> str:
        """Move the file to lost+found, durably; return its path there. *name*: what it was called."""
        suffix = b"-%x" % number
        base = name.rsplit(b"/", 1)[-1][: NAME_BYTES_MAX - len(suffix)] or b"unnamed"
        target = os.path.join(os.fsencode(self.lost_found), base + suffix)
        with _as_staging_errors(self.lost_found):
            self.lost_found.mkdir(mode=0o700, exist_ok=True)
            os.rename(self.path(number), target)
            _sync_directory(self.lost_found)
            _sync_directory(self.lost_found.parent)
            _sync_directory(self.directory)
        return os.fsdecode(target)

    def lost_numbers(self) -> set[int]:
        """Return the numbers that the files in lost+found had."""
        try:
            names = os.listdir(self.lost_found)
        except OSError:  # Not there, or (a file system's own) not ours to read.
            return set()
        return set(_numbers_in(name.rpartition("-")[2] for name in names))

    # Durability

    def sync(self, numbers: Iterable[int]) -> None:
        """Return when all bytes of these files are on the disk. One that is gone is no error."""
        numbers = list(numbers)
        if len(numbers) > _FEW_FILES:
            self.sync_all()
            return
        for number in numbers:
            with _as_staging_errors(self.directory), contextlib.suppress(FileNotFoundError):
                fd = os.open(self.path(number), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(fd)
                finally:
                    os.close(fd)

    def sync_entries(self) -> None:
        """Return when the names of all files made so far are on the disk."""
        with _as_staging_errors(self.directory):
            _sync_directory(self.directory)

    def sync_all(self) -> None:
        """Return when all that was written so far to the file system is on the disk (syncfs(2))."""
        with _as_staging_errors(self.directory):
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if _libc.syncfs(fd):
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code))
            finally:
                os.close(fd)

    # Descriptors

    def fd(self, number: int) -> int:
        """Return an open descriptor (read and write). Don't keep it over an await: see `held`."""
        with _as_staging_errors(self.directory):
            return self._fds.get(number)

    @contextlib.contextmanager
    def held(self, number: int) -> Iterator[int]:
        """Yield a descriptor that stays open while the block runs, whatever other threads do."""
        with _as_staging_errors(self.directory):
            fd = self._fds.hold(number)
        try:
            yield fd
        finally:
            self._fds.let_go(number)

    def release(self, number: int) -> None:
        """Close the descriptor, if there is one; one that is held is closed when it is let go."""
        self._fds.drop(number)

    def release_removed(self) -> None:
        """Close the descriptors of files that have no name any more, so that their space comes free."""
        self._fds.drop_removed()

    def release_idle(self) -> None:
        """Close the descriptors that nobody used since the last call."""
        self._fds.drop_idle()

    def close(self) -> None:
        self._fds.close()


class FdCache:
    """Open descriptors by number; beyond *fds_max* the one used longest ago is closed. Thread-safe.

    Invariant: one that is held is never closed, so for so long there may be more of them.
    """

    def __init__(self, path: object, fds_max: int) -> None:
        assert callable(path) and fds_max > 0
        self._path = path
        self._fds_max = fds_max
        self._lock = threading.Lock()
        self._fds: OrderedDict[int, int] = OrderedDict()  # Used longest ago first.
        self._holds: dict[int, int] = {}
        self._dropped: set[int] = set()  # Held ones that are to be closed.
        self._used: set[int] = set()  # Since `drop_idle` was called last.

    def get(self, number: int) -> int:
        with self._lock:
            return self._get(number)

    def hold(self, number: int) -> int:
        with self._lock:
            fd = self._get(number)
            self._holds[number] = self._holds.get(number, 0) + 1
            return fd

    def let_go(self, number: int) -> None:
        with self._lock:
            self._holds[number] -= 1
            if self._holds[number] == 0:
                del self._holds[number]
                if number in self._dropped:
                    self._close(number)
                self._shrink()

    def drop(self, number: int) -> None:
        with self._lock:
            self._drop(number)

    def drop_removed(self) -> None:
        with self._lock:
            for number, fd in list(self._fds.items()):
                if os.fstat(fd).st_nlink == 0:
                    self._drop(number)

    def drop_idle(self) -> None:
        with self._lock:
            for number in [number for number in self._fds if number not in self._used | self._holds.keys()]:
                self._close(number)
            self._used.clear()

    def close(self) -> None:
        with self._lock:
            for number in list(self._fds):
                self._close(number)

    def _get(self, number: int) -> int:
        fd = self._fds.get(number)
        if fd is None:
            fd = self._fds[number] = os.open(self._path(number), os.O_RDWR | os.O_CLOEXEC)
            self._shrink(keep=number)
        self._fds.move_to_end(number)
        self._used.add(number)
        return fd

    def _shrink(self, keep: int = 0) -> None:
        if len(self._fds) <= self._fds_max:
            return
        for number in list(self._fds):
            if len(self._fds) <= self._fds_max:
                return
            if number not in self._holds and number != keep:
                self._close(number)

    def _drop(self, number: int) -> None:
        if number in self._holds:
            self._dropped.add(number)
        elif number in self._fds:
            self._close(number)

    def _close(self, number: int) -> None:
        self._dropped.discard(number)
        os.close(self._fds.pop(number))


def may_say(mode: int) -> bool:
    """Return whether a staging file may have *mode*: we can still use it, and it runs for nobody else."""
    return mode != _MODE and mode & _MODE == _MODE and not mode & ~0o777


def mode_said(status: os.stat_result) -> int | None:
    """Return the mode that was set while the file was written, None where its node says it."""
    mode = stat.S_IMODE(status.st_mode)
    return None if mode == _MODE else mode


def as_written(own: Attributes, status: os.stat_result) -> Attributes:
    """Return the attributes of a file whose node has *own*, and whose staging file has *status*."""
    mode = mode_said(status)
    if mode is None or mode == own.mode:
        return own
    return msgspec.structs.replace(own, mode=mode, ctime_ns=max(own.ctime_ns, status.st_ctime_ns))


def is_open_for_writing(fd: int) -> bool:
    """Return whether anybody has the file open or mapped for writing. *fd*: open for reading only.

    The kernel refuses a lease then (fs/locks.c: check_conflicting_open). For the main thread: while
    there is a lease, who opens the file to write has the kernel send SIGIO.
    """
    previous = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    except OSError:
        return True
    finally:
        signal.signal(signal.SIGIO, previous)


def _numbers_in(names: Iterable[str]) -> Iterator[int]:
    for name in names:
        try:
            number = int(name, 16)
        except ValueError:
            continue
        if number > 0 and f"{number:x}" == name:
            yield number


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _as_staging_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StagingFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else CacheError
        raise kind(f"{error.filename or where}: {error.strerror}") from error
