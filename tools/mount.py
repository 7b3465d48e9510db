"""`sluice mount`: checks the options, becomes a daemon, and returns when the mount answers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cache.config import CacheDirectory, MountConfig
from cache.errors import SluiceError, UsageError
from cache.format import cache_around
from tools import logs, options
from tools.option_kinds import format_size
from tools.options import Values
from tools.status import find_mount

FUSE_CONF = Path("/etc/fuse.conf")

Supervise = Callable[[MountConfig, Callable[[], None]], int]

_log = logging.getLogger(__name__)


def main(argv: Sequence[str], supervise: Supervise | None = None) -> int:
    """Mount, and return 0 once the mount answers; with --foreground, when it has ended.

    *supervise* runs the mount (`fusefs.supervisor.supervise`). Raises SluiceError.
    """
    config, values = options.read(argv)
    check_world(config, values)
    _make_directories(config)
    run = supervise or _supervise
    return _foreground(config, run) if config.foreground else _background(config, run)


def _supervise(config: MountConfig, announce: Callable[[], None]) -> int:
    from fusefs.supervisor import supervise  # Late: pyfuse3 and trio, which the waiting parent does not need.

    return supervise(config, announce)


# --- Checks against the disk -------------------------------------------------------------------


def check_world(config: MountConfig, values: Values) -> None:
    """Raise UsageError unless the directories are there, apart from each other, and large enough."""
    _check_mountpoint(config.mountpoint, values.positional("mountpoint", "DIR").mention)
    if not config.lake.is_s3:
        _check_apart(config, Path(config.lake.url), values)
        if (cache := cache_around(Path(config.lake.url))) is not None:
            mention = values.positional("lake", "LAKE").mention
            raise UsageError(f"{mention}: {cache} is a cache directory of SluiceFS; name the lake itself")
    _check_outside_caches(config, values)
    mentions = [mention for _, mention in values.all("cache")] or [
        f"--cache {config.caches[0].path} (default)"
    ]
    for directory, mention in zip(config.caches, mentions, strict=True):
        _check_cache(directory, mention, config.free_space_min_bytes, values.mention("keep-free"))
    if config.log_file is not None:
        _check_log_file(config.log_file, values.mention("log-file"))
    if config.allow_other and os.geteuid() != 0 and not user_allow_other():
        raise UsageError(
            f"{values.mention('allow-other')}: not permitted; add the line user_allow_other to {FUSE_CONF}"
        )


def _check_mountpoint(path: Path, mention: str) -> None:
    try:
        entries = os.listdir(path)
        mounted = os.path.ismount(path)
    except FileNotFoundError:
        raise UsageError(f"{mention}: no such directory; create it first: mkdir -p {path}") from None
    except NotADirectoryError:
        raise UsageError(f"{mention}: not a directory; name an empty directory") from None
    except OSError as error:  # ENOTCONN: a mount whose processes died.
        raise UsageError(f"{mention}: {error.strerror}; try `sluice umount {path}` first") from error
    if mounted:
        raise UsageError(
            f"{mention}: something is mounted there already; unmount it or name another directory"
        )
    if entries:
        raise UsageError(f"{mention}: the directory is not empty; name an empty one")
    if not os.access(path, os.W_OK):
        raise UsageError(
            f"{mention}: you may not write there, so you may not mount; name a directory of yours"
        )


def _check_apart(config: MountConfig, lake: Path, values: Values) -> None:
    mention = values.positional("mountpoint", "DIR").mention
    if _within(config.mountpoint, lake):
        raise UsageError(f"{mention}: lies inside the lake {lake}; name a directory outside of it")
    if _within(lake, config.mountpoint):
        raise UsageError(f"{mention}: would hide the lake {lake}; name a directory beside it")
    for directory in config.caches:
        if _within(directory.path, lake):
            raise UsageError(
                f"--cache {directory.path}: lies inside the lake {lake}; choose a directory outside of it"
            )


def _check_outside_caches(config: MountConfig, values: Values) -> None:
    """Neither a mount point nor another cache belongs among a cache's own files."""
    mention = values.positional("mountpoint", "DIR").mention
    around = [directory.path for directory in config.caches if _within(config.mountpoint, directory.path)]
    for cache in [*around, cache_around(config.mountpoint)]:
        if cache is not None:
            raise UsageError(f"{mention}: lies inside the cache directory {cache}; name one outside of it")
    for directory in config.caches:
        cache = cache_around(directory.path.parent)
        if cache is not None:
            raise UsageError(
                f"--cache {directory.path}: lies inside the cache directory {cache}; name one outside of it"
            )


def _mount_around(path: Path) -> Path | None:
    """Return the SluiceFS mount that *path* lies in, None if it lies in none."""
    try:
        return find_mount(str(path))[0]
    except UsageError:
        return None


def _within(path: Path, parent: Path) -> bool:
    return path == parent or parent in path.parents


def _check_cache(directory: CacheDirectory, mention: str, free_min_bytes: int, keep_free: str) -> None:
    """Raise UsageError unless the directory can be made or used, and its size fits its disk."""
    place = directory.path
    try:
        while not os.path.lexists(place):
            place = place.parent
        if (mount := _mount_around(place)) is not None:
            raise UsageError(f"{mention}: lies inside the SluiceFS mount {mount}; name a directory on a disk")
        if not place.is_dir():
            raise UsageError(f"{mention}: {place} is not a directory; name a directory")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UsageError(
                f"{mention}: {place} can't be written; mend its permissions or name another directory"
            )
        disk = os.statvfs(place)
    except OSError as error:
        raise UsageError(f"{mention}: {error.strerror}; name another directory") from error
    disk_bytes = disk.f_blocks * disk.f_frsize
    if disk_bytes == 0:  # A file system that does not tell.
        return
    if directory.size_bytes is not None and directory.size_bytes > disk_bytes:
        raise UsageError(f"{mention}: larger than its disk; give at most {format_size(disk_bytes)}")
    if free_min_bytes >= disk_bytes:
        raise UsageError(
            f"{keep_free}: leaves nothing of the {format_size(disk_bytes)} of {place}; give less"
        )


def _check_log_file(path: Path, mention: str) -> None:
    if path.is_dir():
        raise UsageError(f"{mention}: a directory; name a file")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{mention}: can't be written; name a file in a directory that is there and yours")


def user_allow_other() -> bool:
    """Return whether /etc/fuse.conf lets users other than root share their mounts."""
    try:
        return any(line.strip() == "user_allow_other" for line in FUSE_CONF.read_text().splitlines())
    except OSError:
        return False


def _make_directories(config: MountConfig) -> None:
    for directory in config.caches:
        try:
            directory.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--cache {directory.path}: can't be created: {error.strerror}; name another directory"
            ) from error


# --- In the foreground -------------------------------------------------------------------------


def log_path(config: MountConfig) -> Path:
    return config.log_file or config.index_directory / "log"


def mounted_line(config: MountConfig) -> str:
    sizes = (
        f"{cache.path}" + (f" ({format_size(cache.size_bytes)})" if cache.size_bytes else "")
        for cache in config.caches
    )
    log = "standard error" if config.foreground else log_path(config)
    return f"mounted {config.lake.url} on {config.mountpoint}; cache {', '.join(sizes)}; log {log}"


def _foreground(config: MountConfig, supervise: Supervise) -> int:
    _configure_log(config, file=config.log_file, stderr=True)

    def announce() -> None:
        print(mounted_line(config), flush=True)
        sd_notify(f"READY=1\nSTATUS={mounted_line(config)}")

    try:
        return supervise(config, announce)
    finally:
        sd_notify("STOPPING=1")


def _configure_log(config: MountConfig, *, file: Path | None, stderr: bool) -> None:
    try:
        logs.configure(config.log_level, file=file, stderr=stderr)
    except OSError as error:
        raise SluiceError(
            f"{file}: can't be opened for the log: {error.strerror}; give --log-file"
        ) from error


def sd_notify(message: str) -> None:
    """Tell systemd, if it asked to be told (sd_notify(3)). A failure is of no consequence to the mount."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # An abstract socket.
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(message.encode(), address)


# --- The daemon --------------------------------------------------------------------------------
# The child tells the parent one JSON line over a pipe: {"ready": true}, or {"error", "status"}.


def _background(config: MountConfig, supervise: Supervise) -> int:
    """Fork the mount, wait until it answers, and return 0. Raises SluiceError with the child's line."""
    log = log_path(config)
    log_bytes_before = log.stat().st_size if log.exists() else 0
    sys.stdout.flush()
    sys.stderr.flush()
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_fd)
        _child(config, supervise, write_fd)
    os.close(write_fd)
    try:
        with _sigterm_raises():
            answer = _wait_for_answer(child, read_fd)
    except BaseException:  # Interrupted while waiting: leave nothing mounted and nothing running.
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
        raise
    finally:
        os.close(read_fd)
    _raise_unless_ready(answer, child, log, log_bytes_before)
    print(mounted_line(config), flush=True)
    return 0


@contextlib.contextmanager
def _sigterm_raises() -> Any:
    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Not in the main thread: whoever embeds us handles signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_for_answer(child: int, read_fd: int) -> dict[str, Any]:
    """Return the child's answer, or {} if it ended without one.

    Watches the child too: its workers inherit the pipe, so the pipe's end alone proves nothing.
    """
    line = b""
    pidfd = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(read_fd, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if read_fd in ready:
                piece = os.read(read_fd, 65536)
                line += piece
                if line.endswith(b"\n"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
                if not piece:
                    return {}
            elif pidfd in ready:
                return {}
    finally:
        os.close(pidfd)


def _raise_unless_ready(answer: dict[str, Any], child: int, log: Path, log_bytes_before: int) -> None:
    if answer.get("ready"):
        return
    _, wait_status = os.waitpid(child, 0)
    if "error" in answer:
        raise (UsageError if answer["status"] == 2 else SluiceError)(answer["error"])
    code = os.waitstatus_to_exitcode(wait_status)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    last = logs.last_line(log, log_bytes_before)
    said = f"its log {log} ends with: {last}" if last else f"its log {log} says nothing"
    raise SluiceError(f"the mount's process {how} before the mount was ready; {said}")


def _child(config: MountConfig, supervise: Supervise, write_fd: int) -> NoReturn:
    """Run the mount detached from terminal and parent. Never returns."""
    status, answer = 1, _Answer(write_fd)
    try:
        os.setsid()
        os.chdir("/")
        _configure_log(config, file=log_path(config), stderr=False)
        _silence_standard_streams()
        status = supervise(config, lambda: answer.send({"ready": True}))
    except SluiceError as error:
        status = 2 if isinstance(error, UsageError) else 1
        _log.error("the mount ends: %s", error)
        answer.send({"error": str(error), "status": status})
    except BaseException as error:
        _log.exception("the mount ends")
        text = f"internal error: {type(error).__name__}: {error}; see the log {log_path(config)}"
        answer.send({"error": text, "status": status})
    finally:
        logging.shutdown()
        os._exit(status)


class _Answer:
    """The child's end of the pipe: says one thing, once, and is closed then."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd  # None once it has spoken: the number may be another file's by then.

    def send(self, answer: dict[str, Any]) -> None:
        fd, self._fd = self._fd, None
        if fd is None:
            return
        with contextlib.suppress(OSError):  # The parent is gone; the mount goes on.
            os.write(fd, json.dumps(answer).encode() + b"\n")
        os.close(fd)


def _silence_standard_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
