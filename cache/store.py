"""The cache directory: lock, format, whose it is, and whether its index may be trusted."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cache.config import MountConfig
from cache.errors import CacheError, UsageError
from cache.format import FORMAT
from cache.index import remove_index

_POWER_LOST = "power-lost"  # A file, there from a power loss until its recovery was finished.
_UNPROVEN = (
    "unproven"  # A file, there until the lake has answered once: another may take its place till then.
)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class CacheStore:
    """The locked cache directories of one mount. *id* is the same in all of them."""

    id: str
    directories: tuple[Path, ...]
    lock_fds: tuple[int, ...]

    def release(self) -> None:
        for fd in self.lock_fds:
            os.close(fd)

    def note_lake_answered(self) -> None:
        """Keep the directories for their lake from now on. Raises UsageError."""
        for directory in self.directories:
            try:
                if (directory / _UNPROVEN).exists():
                    (directory / _UNPROVEN).unlink()
                    _sync_directory(directory)
            except OSError as error:
                raise UsageError(f"--cache {directory}: {_mend(error)}") from error

    def mark_clean(self) -> None:
        """Note that all was synced, so that the index may be trusted after the next boot too."""
        for directory in self.directories:
            _sync_filesystem(directory)
        write_synced(self.directories[0] / "clean", "")


def open_store(config: MountConfig) -> CacheStore:
    """Lock and check all cache directories; make them where they are missing.

    The index is removed when the machine stopped without a clean unmount: it was never synced. Until
    `forget_power_loss` the directory says so, in whatever boot it is recovered.
    Raises UsageError with the option, the directory and the mend.
    """
    fds: list[int] = []
    try:
        for cache in config.caches:
            fds.append(_lock(cache.path))
        identity = _check_formats([cache.path for cache in config.caches], config.lake.identity)
        store = CacheStore(identity, tuple(cache.path for cache in config.caches), tuple(fds))
        _distrust_after_crash(store.directories[0])
        return store
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def open_to_check(directories: list[Path]) -> CacheStore:
    """Lock the directories of one mount that is not there. Changes nothing. Raises UsageError."""
    fds: list[int] = []
    try:
        lakes = [lines[2] for path in directories if (lines := _read_format(path))]
        for path in directories:
            fds.append(_lock(path))
        return CacheStore(_check_formats(directories, lakes[0]), tuple(directories), tuple(fds))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def is_trusted(directory: Path) -> bool:
    """Return whether the next mount believes the index. Raises UsageError."""
    try:
        boot = directory / "boot"
        return (directory / "clean").exists() or (boot.exists() and boot.read_text() == boot_id())
    except OSError as error:
        raise UsageError(f"{directory}: {_mend(error)}") from error


def read_store_id(directory: Path) -> str:
    """Return the id of the opened store that *directory* is one of. Raises UsageError."""
    lines = _read_format(directory)
    if lines is None:
        raise UsageError(f"--cache {directory}: is no SluiceFS cache any more: `format` is gone")
    return lines[1]


def boot_id() -> str:
    """Return the kernel's id of this boot (proc(5): random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def kept_all_bytes(directory: Path) -> bool:
    """Return whether what was written to files of *directory* is there, synced or not.

    So it is until the machine stops, and after a clean unmount; not known where no store was opened.
    """
    try:
        is_this_boot = (directory / "boot").read_text() == boot_id()
        return is_this_boot and not (directory / _POWER_LOST).exists()
    except OSError:
        return False


def forget_power_loss(directory: Path) -> None:
    """Note that *directory* was recovered after a power loss. Raises CacheError."""
    try:
        (directory / _POWER_LOST).unlink()
        _sync_directory(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CacheError(f"{directory / _POWER_LOST}: {error.strerror}") from error


def _lock(directory: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # There before `format` is.
        ours = {"lock", "log", "lost+found", "format.new", _UNPROVEN, f"{_UNPROVEN}.new"}
        if not (directory / "format").exists() and not ours.issuperset(os.listdir(directory)):
            raise UsageError(
                f"--cache {directory}: holds files that are no SluiceFS cache; name an empty directory"
            )
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"--cache {directory}: {_mend(error)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(fd, 200, 0).decode(errors="replace").strip()
        os.close(fd)
        raise UsageError(
            f"--cache {directory}: in use by another mount{f' ({owner})' if owner else ''};"
            " unmount it or name another directory"
        ) from error
    return fd


def note_owner(store: CacheStore, text: str) -> None:
    """Put into the lock files who holds them, for the message that a second mount prints."""
    for fd in store.lock_fds:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, text.encode(), 0)


def _check_formats(directories: list[Path], lake: str) -> str:
    texts = [_read_format(directory) for directory in directories]
    known = {text[1] for text in texts if text is not None}
    if len(known) > 1:
        raise UsageError(
            f"--cache {directories[-1]}: belongs to another set of cache directories than"
            f" {directories[0]}; name the directories that were used together, or empty ones"
        )
    identity = known.pop() if known else secrets.token_hex(8)
    for directory, text in zip(directories, texts, strict=True):
        if text is None or (text[2] != lake and (directory / _UNPROVEN).exists()):
            try:
                write_synced(directory / _UNPROVEN, "")
                write_synced(directory / "format", f"{FORMAT}\n{identity}\n{lake}\n")
            except OSError as error:
                raise UsageError(f"--cache {directory}: {_mend(error)}") from error
        elif text[2] != lake:
            raise UsageError(
                f"--cache {directory}: holds the cache of {text[2]}, not of {lake};"
                " name another directory, or remove that one"
            )
    return identity


def _read_format(directory: Path) -> list[str] | None:
    try:
        lines = (directory / "format").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"--cache {directory}: {_mend(error)}") from error
    if not lines or lines[0] != FORMAT or len(lines) < 3:
        found = lines[0][:60] if lines else "empty"
        raise UsageError(
            f"--cache {directory}: its format is {found!r}, this version knows {FORMAT!r};"
            " use the version that made it, or remove the directory"
        )
    return lines


def _distrust_after_crash(directory: Path) -> None:
    boot, clean = directory / "boot", directory / "clean"
    try:
        same_boot = boot.exists() and boot.read_text() == boot_id()
        if not clean.exists() and not same_boot:
            write_synced(directory / _POWER_LOST, "")
            remove_index(directory)
        if not same_boot:
            write_synced(boot, boot_id())
        clean.unlink(missing_ok=True)
        _sync_directory(directory)
    except OSError as error:
        raise UsageError(f"--cache {directory}: {_mend(error)}") from error


def _mend(error: OSError) -> str:
    mends = {
        errno.ENOSPC: "the disk is full; free some space or name a directory on another disk",
        errno.EROFS: "the disk is read-only; name a directory on another disk",
        errno.EACCES: "permission denied; name a directory that you may write to",
        errno.ENOTDIR: "not a directory; name a directory",
        errno.EEXIST: "not a directory; name a directory",
    }
    return mends.get(error.errno or 0, f"{error.strerror}; name another directory")


def write_synced(path: Path, text: str) -> None:
    fd = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, text.encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(path.with_suffix(".new"), path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_filesystem(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(fd):
            code = ctypes.get_errno()
            raise CacheError(f"{path}: {os.strerror(code)}")
    finally:
        os.close(fd)
