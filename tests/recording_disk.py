"""A filesystem of one file, `image`, that keeps an exact record of each write and each fsync it gets.

`python -m tests.recording_disk MOUNTPOINT BACKING RECORDS` serves it until it is unmounted. Reads and writes
go to BACKING; RECORDS gets one record for each write and fsync, in the order in which they took effect and
before they are answered (`tests.power_loss.read_records`). A line "freeze N" on the standard input makes it
answer no write and no fsync from its Nth fsync on (counted from 1), until a line "thaw". It says "ready" when
it is mounted and "frozen R" when the first R records are what came before that fsync.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
import time
from pathlib import Path

import pyfuse3
import trio

WRITE, FLUSH = b"W", b"F"
HEAD = struct.Struct("<cQQQ")  # Kind, CLOCK_MONOTONIC in ns, offset, length; the bytes of a write follow.
NAME, INODE = b"image", 2
_FOR_EVER_S = 3600.0


class RecordingDisk(pyfuse3.Operations):  # type: ignore[misc]
    def __init__(self, backing: Path, records: Path) -> None:
        super().__init__()
        self._backing = os.open(backing, os.O_RDWR)
        self._records = os.open(records, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._count = self._flushes = self._freeze_at = 0
        self._thawed = trio.Event()
        self._thawed.set()

    def freeze(self, at_flush: int) -> None:
        self._freeze_at = at_flush

    def thaw(self) -> None:
        self._freeze_at = 0
        self._thawed.set()

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino, attributes.st_nlink = inode, 1
        attributes.entry_timeout = attributes.attr_timeout = _FOR_EVER_S
        attributes.st_mode = stat.S_IFDIR | 0o700
        if inode == INODE:
            attributes.st_mode, attributes.st_size = stat.S_IFREG | 0o600, os.fstat(self._backing).st_size
        return attributes

    async def lookup(self, parent: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(INODE)

    async def setattr(self, inode: int, *_: object) -> pyfuse3.EntryAttributes:
        return await self.getattr(inode)  # Times; nobody changes the size of a disk.

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=0, direct_io=True)

    async def read(self, handle: int, offset: int, length: int) -> bytes:
        return os.pread(self._backing, length, offset)

    async def write(self, handle: int, offset: int, content: bytes) -> int:
        await self._thawed.wait()
        self._record(WRITE, offset, content)
        return os.pwrite(self._backing, content, offset)

    async def fsync(self, handle: int, datasync: bool) -> None:
        await self._thawed.wait()
        self._flushes += 1
        if self._freeze_at and self._flushes >= self._freeze_at:
            self._thawed = trio.Event()
            print(f"frozen {self._count}", flush=True)
            await self._thawed.wait()
        self._record(FLUSH, 0, b"")

    def _record(self, kind: bytes, offset: int, content: bytes) -> None:
        """Append a record; one write(2), so a reader of the records never sees half of one for long."""
        os.writev(self._records, [HEAD.pack(kind, time.monotonic_ns(), offset, len(content)), bytes(content)])
        self._count += 1


async def obey(disk: RecordingDisk) -> None:
    """Act on what the standard input says, to its end."""
    async with trio.lowlevel.FdStream(os.dup(0)) as commands:
        heard = b""
        async for chunk in commands:
            heard += chunk
            *lines, heard = heard.split(b"\n")
            for line in lines:
                word, _, number = line.partition(b" ")
                disk.freeze(int(number)) if word == b"freeze" else disk.thaw()
    disk.thaw()  # Who could has gone.


async def serve(disk: RecordingDisk) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey, disk)
        print("ready", flush=True)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main(mountpoint: str, backing: str, records: str) -> None:
    os.setsid()  # Ctrl-C in a terminal is for the tests, which then unmount.
    disk = RecordingDisk(Path(backing), Path(records))
    options = (set(pyfuse3.default_options) - {"default_permissions"}) | {"fsname=recording-disk"}
    pyfuse3.init(disk, mountpoint, options)
    trio.run(serve, disk)
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(*sys.argv[1:4])
