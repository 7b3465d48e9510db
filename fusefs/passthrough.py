"""Opens that the kernel serves from the cached file itself (FUSE_PASSTHROUGH): reads never reach us.

Python answers OPEN and RELEASE. In between the kernel reads and writes the backing file at its own
speed, in that file's page cache, mmap(2) included. Its conditions (linux/fuse.h, fs/fuse/iomode.c):
all who have an inode open at one time have it open in one mode and with one backing id, else
open(2) fails with EIO; and registering a file takes CAP_SYS_ADMIN.

So every open of an inode that may be passed through is counted, in the `OpenTable` that all workers
share. The first open chooses the mode, those that follow join it, the last one to close takes the
backing id back. The count goes up before the kernel hears the answer to OPEN and down after
it sent RELEASE, so what the table calls closed is closed in the kernel.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from cache.config import MountConfig
from cache.model import MIB, PASSTHROUGH_BYTES_MIN
from cache.opens import Held, OpenState, OpenTable
from fusefs import channel, device

log = logging.getLogger(__name__)

# Objects as large as this on average are shards: their opens are few for their bytes.
SHARD_BYTES_MIN = 8 * MIB


_WRITABLE = {
    "auto": " in the first cache directory (they go to disks, not to memory); what is written goes through"
    " Python, which --dirty-max needs (--passthrough all)",
    "all": " in the first cache directory (they go to disks, not to memory); it writes what the lake has not"
    " yet got, too",
}


class Passthrough:
    """*fd*: the session's device. The same in every worker: what it knows is in *opens*."""

    def __init__(self, opens: OpenTable, fd: int) -> None:
        self.opens = opens
        self.device = fd
        self._failures: set[str] = set()

    def opened(
        self,
        inode: int,
        backing_fd: Callable[[], int | None] | None,
        *,
        vid: bytes = b"",
        writing: bool = False,
        request: int = 0,
    ) -> int:
        """Count one more open of *inode*; return what `answered` does.

        *request*: `channel.last_unique()`. No await from here to the answer.
        """
        with self.opens.held(inode) as held:
            self._take_back(held)
            held.opened(writing=writing, request=request)
            return self._answered(held, inode, backing_fd, vid)

    def counted(self, inode: int, *, writing: bool = False, request: int = 0) -> OpenState:
        """Count one more open, to be answered later; return the state with it."""
        with self.opens.held(inode) as held:
            self._take_back(held)
            return held.opened(writing=writing, request=request)

    def answered(self, inode: int, backing_fd: Callable[[], int | None] | None, *, vid: bytes = b"") -> int:
        """Return the backing id to answer an open with that was counted before; 0 for cached mode.

        *backing_fd* is called if no other open of the inode was answered. It returns a descriptor
        of the file that holds all of the inode's bytes, which is closed here, or None where there
        is no such file; itself None: this open is no reason to register one. *vid*: the object version in
        it, which then does not leave its tier while it is open. No await from here to the answer.
        """
        with self.opens.held(inode) as held:
            return self._answered(held, inode, backing_fd, vid)

    def _answered(
        self, held: Held, inode: int, backing_fd: Callable[[], int | None] | None, vid: bytes
    ) -> int:
        state = held.state
        if state.backing_id and state.is_open:
            return state.backing_id
        granted = self.opens.withdraw_grant(inode)  # Those who have it open by it are in cached mode.
        if backing_fd is None or granted or not held.may_get_backing:
            if state.is_open:  # Else it was answered by another worker, and closed since.
                held.answered_cached()
            return 0
        if vid:
            self.opens.note_object(vid, inode)
        return held.answered_with(lambda: self._registered(backing_fd, vid), self._close)

    def _registered(self, backing_fd: Callable[[], int | None], vid: bytes) -> int:
        """Return a backing id; 0 where there is no file, or the kernel refuses it."""
        fd = backing_fd()
        if fd is None:
            return 0
        try:
            if vid:
                self.opens.note_file(vid, os.fstat(fd).st_ino)
            return self._register(fd)
        finally:
            os.close(fd)

    def closed(self, inode: int, *, writing: bool = False, request: int = 0) -> OpenState:
        """Count one open less, however it was answered; return the state without it."""
        with self.opens.held(inode) as held:
            held.closed(writing=writing, request=request)
            self._take_back(held)
            return held.state

    def sweep(self) -> None:
        """Take back what workers that died had not come to take back."""
        for inode in self.opens.abandoned():
            with self.opens.held(inode) as held:
                self._take_back(held)

    def _take_back(self, held: Held) -> None:
        state = held.state
        if state.backing_id and not state.is_open:
            self._close(state.backing_id)
            held.forget_backing()

    def _register(self, fd: int) -> int:
        """Return a backing id; 0 where the kernel refuses the file."""
        try:
            return device.open_backing(self.device, fd)
        except OSError as error:
            if (reason := reason_of(error)) not in self._failures:
                self._failures.add(reason)
                log.warning("a cached file can't be passed through, Python serves it: %s", reason)
            return 0

    def _close(self, backing_id: int) -> None:
        with suppress(OSError):  # ENOENT: it was closed by one who died before the table heard of it.
            device.close_backing(self.device, backing_id)


def reason_of(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "the cache directory is on a stacked file system (overlayfs); give --cache on a disk"
    if error.errno == errno.EPERM:
        return "needs CAP_SYS_ADMIN: mount as root"
    return str(error.strerror)


def want(config: MountConfig) -> None:
    """Have the session that is initialised next ask the kernel for passthrough, if it is of use."""
    if _excluded(config) is None:
        channel.want_passthrough()


def failure(config: MountConfig, fd: int, tiers: Iterable[Path]) -> str | None:
    """Return None where the session can pass files through, else why it can't.

    They are files of *tiers*, on writable mounts staging files.
    """
    excluded = _excluded(config)
    if excluded is not None:
        return excluded
    directories = tiers if config.read_only else (config.index_directory,)
    return channel.passthrough_failure() or _try_tiers(fd, directories)


def _excluded(config: MountConfig) -> str | None:
    """Return why the options leave passthrough out, None if they don't."""
    if config.passthrough == "off":
        return "--passthrough off"
    if config.profile == "dataset" and config.read_only:
        return "--profile dataset: opens send no request, so the kernel is told of no file"
    return None


def _try_tiers(fd: int, tiers: Iterable[Path]) -> str | None:
    """Register a file of each tier and take it back; return None, or why none can be a backing file."""
    reason: str | None = "there is no tier"
    for directory in tiers:
        try:
            file = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            return None  # A file system without nameless files: the first open will tell.
        try:
            device.close_backing(fd, device.open_backing(fd, file))
            return None
        except OSError as error:
            reason = reason_of(error)
        finally:
            os.close(file)
    return reason


def choose(
    config: MountConfig, no_channel: str | None, failure: str | None, sample: tuple[int, int]
) -> dict[str, dict[str, object]]:
    """Return the features `no_open` and `passthrough`, of which a mount has one at most, with reasons.

    Where open(2) sends no request, a hit in the page cache costs nothing at all, but each byte
    that is not there comes through Python, and the mount learns only when it reads that the lake
    holds another version: read(2) then fails with ESTALE, where open(2) would have found the new
    one. *failure*: why the kernel passes nothing through. *sample*: objects and their bytes, of the
    lake.
    """
    no_open = _no_open(config, no_channel, failure, sample)
    reason = failure or (
        "opens send no request, so the kernel is told of no file; --profile checkpoint has it instead"
        if no_open["on"]
        else f"cached files of {PASSTHROUGH_BYTES_MIN // MIB} MiB or more are read by the kernel itself"
        + ("" if config.read_only else _WRITABLE[config.passthrough])
    )
    passes = failure is None and not no_open["on"]
    return {"no_open": no_open, "passthrough": {"on": passes, "reason": reason}}


def _no_open(
    config: MountConfig, no_channel: str | None, failure: str | None, sample: tuple[int, int]
) -> dict[str, object]:
    if config.profile == "checkpoint":
        return {
            "on": False,
            "reason": "--profile checkpoint: an open that meets a changed object looks it up again",
        }
    if not config.read_only:
        return {"on": False, "reason": "the mount is writable"}
    if no_channel is not None:
        return {"on": False, "reason": no_channel}
    objects, size_bytes = sample
    if config.profile == "auto" and failure is None and objects:
        mean = f"the first {objects} objects have {size_bytes / objects / MIB:.2f} MiB on average"
        if size_bytes >= objects * SHARD_BYTES_MIN:
            return {"on": False, "reason": f"--profile auto: {mean}, which the kernel reads best by itself"}
        return {"on": True, "reason": f"--profile auto: {mean}: opens would cost more, and cost no request"}
    return {"on": True, "reason": f"--profile {config.profile}, read-only: opens cost no request"}
