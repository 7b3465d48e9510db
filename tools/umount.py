"""`sluice umount`: moves the memory tier to disk, unmounts, and waits until the processes have ended."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cache import control
from cache.control import NotMounted, Unanswered
from cache.errors import SluiceError, UsageError
from tools.option_kinds import format_size
from tools.options import Parser
from tools.status import all_mounts, find_mount, printable
from tools.sync import upload_all

SUPERVISOR_EXIT_S = 60.0
MOVER_RESTART_S = 3.0  # A mover that died is back within this time.
_UMOUNT_NOFOLLOW = 8  # <sys/mount.h>
_BUSY_SHOWN_MAX = 5

Unmount = Callable[[Path], None]


def main(argv: Sequence[str], unmount: Unmount | None = None) -> int:
    """Unmount and return 0 when the mount's processes have ended. Raises SluiceError."""
    parser = Parser(
        prog="sluice umount",
        description="Wait until the lake has all that was written, and unmount; what the cache holds stays"
        " for the next mount.",
    )
    parser.add_argument("directory", metavar="DIR", help="the mount point")
    parser.add_argument(
        "--lazy", action="store_true", help="leave what the lake has not yet to the next mount"
    )
    arguments = parser.parse_args(argv)
    mountpoint = _mountpoint(arguments.directory)
    with _supervisor(mountpoint) as pidfd:
        if pidfd is not None:
            if not arguments.lazy:
                _upload(mountpoint)
            _drain(mountpoint)
        (unmount or _unmount)(mountpoint)
        if pidfd is not None and not _ends(pidfd, SUPERVISOR_EXIT_S):
            raise SluiceError(f"{mountpoint}: unmounted, but its processes still run; see the mount's log")
    print(f"unmounted {printable(str(mountpoint))}")
    return 0


def _mountpoint(directory: str) -> Path:
    """Return the mount point that *directory* names. Raises UsageError when it is none of ours."""
    path = Path(os.path.realpath(directory))
    mount = next((mount for mount in all_mounts() if mount.mountpoint == path), None)
    if mount is not None and mount.is_ours:
        return path
    if mount is not None:
        raise UsageError(
            f"{directory}: a mount of type {mount.filesystem_type}, not of SluiceFS; use umount(8)"
        )
    try:
        above, _ = find_mount(directory)
    except UsageError:
        raise UsageError(f"{directory}: nothing is mounted there; `sluice status` lists the mounts") from None
    raise UsageError(f"{directory}: not a mount point; it lies in the mount {above}; unmount that")


@contextlib.contextmanager
def _supervisor(mountpoint: Path) -> Iterator[int | None]:
    """Yield a pidfd of the mount's supervisor, or None if nobody answers any more."""
    status = _status(mountpoint)
    pid = status["processes"]["supervisor"] if status is not None else None
    try:
        pidfd = os.pidfd_open(pid) if pid is not None else None
    except ProcessLookupError:
        pidfd = None
    try:
        yield pidfd
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _status(mountpoint: Path) -> dict[str, Any] | None:
    """Return the mount's status; None if it is dead, or does not answer within a mover's restart."""
    deadline_s = time.monotonic() + MOVER_RESTART_S
    while True:
        try:
            status: dict[str, Any] = control.call(mountpoint, "status")
            return status
        except (NotMounted, Unanswered):
            if time.monotonic() >= deadline_s or _is_dead(mountpoint):
                return None
            time.sleep(0.1)


def _is_dead(mountpoint: Path) -> bool:
    """Return whether the kernel has lost the mount's processes (every request fails at once then)."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _upload(mountpoint: Path) -> None:
    """Wait until the lake has everything. Raises SluiceError, still mounted, when it can't be had."""
    errors = upload_all(mountpoint, [""])["errors"]
    if errors:
        first = f"{errors[0]['path']}: {errors[0]['error']}"
        raise SluiceError(
            f"{mountpoint}: the lake has not all that was written ({len(errors)} failed, the first: {first});"
            " see `sluice queue`, or leave it to the next mount with `sluice umount --lazy`"
        )


def _drain(mountpoint: Path) -> None:
    """Move what the memory tier holds to disk. A failure costs only cache: told, and passed over."""
    try:
        moved = (
            _drain_with_bar(mountpoint) if sys.stdout.isatty() else _call_drain(mountpoint, lambda _: None)
        )
    except SluiceError as error:
        print(f"sluice: the memory tier could not be kept: {error}; unmounting all the same", file=sys.stderr)
        return
    if moved:
        print(f"moved {format_size(moved)} from memory to disk")


def _call_drain(mountpoint: Path, on_progress: Callable[[dict[str, Any]], None]) -> int:
    # The time-out is for silence: each progress line starts it anew.
    return int(control.call(mountpoint, "drain", on_progress=on_progress, timeout_s=120.0)["bytes"])


def _drain_with_bar(mountpoint: Path) -> int:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("memory to disk", *columns, transient=True) as progress:
        task = progress.add_task("", total=None)
        return _call_drain(
            mountpoint, lambda told: progress.update(task, completed=told["done"], total=told["total"])
        )


def _unmount(mountpoint: Path) -> None:
    """Unmount through the kernel as root, else through fusermount3. Raises SluiceError."""
    failure = _umount2(mountpoint) if os.geteuid() == 0 else _fusermount(mountpoint)
    if failure is None:
        return
    code, text = failure
    if code == errno.EBUSY:
        raise SluiceError(
            f"{mountpoint}: in use by {busy_processes(mountpoint) or 'a process of another user'}"
        )
    raise SluiceError(f"{mountpoint}: can't be unmounted: {text}")


def _umount2(mountpoint: Path) -> tuple[int, str] | None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), _UMOUNT_NOFOLLOW) == 0:
        return None
    code = ctypes.get_errno()
    return code, os.strerror(code)


def _fusermount(mountpoint: Path) -> tuple[int, str] | None:
    command = ["fusermount3", "-u", "--", str(mountpoint)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        return errno.ENOENT, "fusermount3 is missing; install the package fuse3"
    if done.returncode == 0:
        return None
    return (errno.EBUSY if "busy" in done.stderr else errno.EIO), done.stderr.strip()


def busy_processes(mountpoint: Path, proc: Path = Path("/proc")) -> str:
    """Return "python (pid 12), bash (pid 34)": who has files, directories or mappings there.

    Reads links only, so that no request goes to a mount that may not answer.
    """
    users = []
    for process in sorted((p for p in proc.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)):
        with contextlib.suppress(OSError):  # It ended, or is another user's.
            if _uses(process, os.fspath(mountpoint)):
                name = (process / "comm").read_text().strip()
                users.append(f"{name} (pid {process.name})")
    more = f" and {len(users) - _BUSY_SHOWN_MAX} more" if len(users) > _BUSY_SHOWN_MAX else ""
    return ", ".join(users[:_BUSY_SHOWN_MAX]) + more


def _uses(process: Path, mountpoint: str) -> bool:
    links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
    for link in links:
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target == mountpoint or target.startswith(mountpoint + "/"):
                return True
    maps = (process / "maps").read_bytes()
    return b" " + os.fsencode(mountpoint) + b"/" in maps


def _ends(pidfd: int, within_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))
