"""A small file system on a socket instead of /dev/fuse, for test_45_channel.py to talk to.

    python tests/channel_peer.py FD [passthrough] [grants] [thread] [reads=DIRECTORY]

Inode n opens with backing id n - 100 when that is positive. What `getattr` says of an inode tells
what the extension has noted: the request's number is the size, the process the owner.

With grants, `unlink` of the name "give 5" does so for inode 5 and fails with EBUSY where that says
no (also "withdraw 5", "closed 5");
`readlink` of an inode shows how many have it open, what the extension answered, what was released here.

With thread, a thread receives the requests after INIT.

With reads, a READ of inode n is one of the file n in the directory; its checksums are those of the file
n.good. What can't be read right is answered "failed", what is not taken by `read`.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from array import array
from pathlib import Path
from typing import Any

# Another build of `fusefs._channel` lies in a copy of the package.
sys.path[:0] = [p for p in (os.environ.get("SLUICE_TEST_CHANNEL"), str(Path(__file__).parents[1])) if p]

from fusefs import channel  # noqa: E402

if reason := channel.load():
    sys.exit(reason)

import pyfuse3  # noqa: E402
import trio.lowlevel  # noqa: E402

from cache.model import BLOCK_BYTES, ceil_div  # noqa: E402
from cache.records import block_checksums  # noqa: E402
from fusefs.grants import Grants  # noqa: E402
from fusefs.worker import shake_hands  # noqa: E402


class Reads:
    """Answers READs as a worker does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.module: Any = channel.module()
        self.failed = -1

    def start(self) -> None:
        self.failed = self.module.start_reads()
        self.module.answer_directly(self.answer, lambda: False)

    def answer(self, opcode: int, unique: int, inode: int, uid: int, gid: int, body: bytes) -> int | None:
        if opcode != 15:
            return None
        handle, offset, length = struct.unpack_from("<QQI", body)
        good = (self.directory / f"{inode}.good").read_bytes()
        start, end = offset // BLOCK_BYTES * BLOCK_BYTES, min(len(good), offset + length)
        end = min(len(good), ceil_div(end, BLOCK_BYTES) * BLOCK_BYTES)
        checksums = array("Q", block_checksums(good[start:end]))
        length = min(length, len(good) - offset)
        path = str(self.directory / str(inode))
        taken = self.module.read_file(unique, handle, offset, length, path, start, end, checksums, inode == 1)
        return int(self.module.TAKEN) if taken else None

    async def answer_failed(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.failed)
            for unique, handle, offset, length in self.module.failed_reads():
                self.module.reply_read(unique, b"failed %d %d %d" % (handle, offset, length))


class Peer(pyfuse3.Operations):
    grants: Grants | None = None

    def __init__(self) -> None:
        super().__init__()
        self.released: list[int] = []
        self.initialised = trio.Event()

    def init(self) -> None:
        self.initialised.set()

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        from fusefs import _channel

        number, pid = channel.last_unique(), _channel.last_pid()
        await trio.lowlevel.checkpoint()
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino, attributes.st_size, attributes.st_uid = inode, number, pid
        return attributes

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        number = channel.last_unique()
        for _ in range(inode % 7):
            await trio.lowlevel.checkpoint()  # So that replies come in another order than the requests.
        if inode > 100:
            try:
                channel.pass_through(number, inode - 100)
            except ValueError as error:
                raise pyfuse3.FUSEError(errno.EIO) from error
        if flags == 1:
            raise pyfuse3.FUSEError(errno.EACCES)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        inode = pyfuse3.InodeT(int(name))
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        if inode > 100:
            channel.pass_through(channel.last_unique(), inode - 100)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True), attributes

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return b"%d" % fh

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self.released.append(fh)

    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        assert self.grants is not None
        verb, inode = os.fsdecode(name).split()
        if getattr(self.grants, verb)(int(inode)) is False:
            raise pyfuse3.FUSEError(errno.EBUSY)

    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        assert self.grants is not None
        requests, opened = self.grants.drained()
        shown = [self.grants.count(inode), requests, opened, self.released]
        return pyfuse3.FileNameT(json.dumps(shown).encode())

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_files = 0 if channel.passthrough_failure() is None else 1
        return data


if "passthrough" in sys.argv:
    channel.want_passthrough()
peer = Peer()
if "grants" in sys.argv:
    peer.grants = Grants(words=8)
    peer.grants.answer()
pyfuse3.init(peer, f"/dev/fd/{sys.argv[1]}", set())
if "thread" in sys.argv:
    trio.run(shake_hands, peer.initialised)
    assert channel.can_receive_in_thread()
    channel.receive_in_thread()


async def main() -> None:
    async with trio.open_nursery() as nursery:
        for argument in sys.argv:
            if argument.startswith("reads="):
                reads = Reads(Path(argument[len("reads=") :]))
                reads.start()
                nursery.start_soon(reads.answer_failed)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


trio.run(main)
