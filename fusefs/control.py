"""The directory `.sluice` in the mount's root: never listed there, reached by name. Knows no pyfuse3.

  stats, config, version   for reading: what `sluice status --json` says, the configuration, the version
  order, warm              for writing: what `sluice hint FILE` takes; paths, one a line

All of it is plain file I/O, so it works from inside a container. Any worker may get any request: what
is to be remembered is the mover's. Inodes say themselves what they are:

  CONTROL_BIT | 1          the directory
  CONTROL_BIT | 2, 3       order, warm
  CONTROL_BIT | 4          where the mover finds these two on a read-only mount
  CONTROL_BIT | ... << 32  a snapshot of a file for reading, with its size in the low bits

A snapshot never changes, so what the kernel's page cache has of it is right, also on mounts without
opens. Each look at the name shows another one. On read-only mounts `order` and `warm` are FIFOs: see
`cache/pipes.py`.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass

from cache.client import MoverClient
from cache.control_files import READABLE, SIZE_BITS, WRITABLE
from cache.errors import NameMissing, TextRefused
from cache.messages import (
    FinishText,
    PipeLookedUp,
    ReadSnapshot,
    TakeSnapshot,
    WriteText,
)
from cache.model import CONTROL_NAME, ROOT_INODE
from cache.pipes import PIPES_NAME

CONTROL_BIT = 1 << 57  # Above all inodes, and below the bits that handles have.
_MASK = CONTROL_BIT - 1
DIRECTORY, PIPES = CONTROL_BIT | 1, CONTROL_BIT | 4
_WRITABLE = {CONTROL_BIT | number: name for number, name in enumerate(WRITABLE, 2)}
_INODES = {name: inode for inode, name in _WRITABLE.items()}
_SNAPSHOT_MIN = 1 << SIZE_BITS
# Of a handle of a writable file: this bit, above those of snapshots, and a number of the open's own.
_TEXT_BIT, _TEXT_BITS = 1 << 56, 40


@dataclass(frozen=True, slots=True)
class ControlEntry:
    inode: int
    name: bytes
    mode: int
    size_bytes: int = 0


class ControlDirectory:
    """*read_only*: of the mount."""

    def __init__(self, mover: MoverClient, *, read_only: bool) -> None:
        self._mover = mover
        self._read_only = read_only

    def in_root(self, parent: int, name: bytes) -> int:
        """Return the inode of what is named like this in the mount's root; 0 if it is none of ours."""
        if parent != ROOT_INODE or not name.startswith(CONTROL_NAME):
            return 0
        if name == CONTROL_NAME:
            return DIRECTORY
        return PIPES if name == PIPES_NAME and self._read_only else 0

    def entry(self, inode: int) -> ControlEntry:
        """Return what an inode is. Raises NameMissing."""
        if inode in (DIRECTORY, PIPES):
            return ControlEntry(inode, b"", stat.S_IFDIR | 0o555)
        if inode in _WRITABLE:
            kind = stat.S_IFIFO if self._read_only else stat.S_IFREG
            return ControlEntry(inode, _WRITABLE[inode], kind | 0o622)
        if inode & _MASK >= _SNAPSHOT_MIN:
            return ControlEntry(inode, b"", stat.S_IFREG | 0o444, inode & (_SNAPSHOT_MIN - 1))
        raise NameMissing("no such control file")

    async def lookup(self, parent: int, name: bytes) -> ControlEntry:
        """Return the directory's entry of that name. Raises NameMissing, and what the mover raises."""
        if name in READABLE and parent == DIRECTORY:
            number = (await self._mover.ask(TakeSnapshot(name))).value
            return self.entry(CONTROL_BIT | number)
        if name not in WRITABLE:
            raise NameMissing(f"{os.fsdecode(name)}: no such control file")
        if self._read_only and parent == DIRECTORY:
            await self._mover.ask(PipeLookedUp(name))
        return self.entry(_INODES[name])

    async def entries(self) -> list[ControlEntry]:
        """Return what the directory lists."""
        found = []
        for name in (*READABLE, *WRITABLE):
            entry = await self.lookup(DIRECTORY, name) if name in READABLE else self.entry(_INODES[name])
            found.append(ControlEntry(entry.inode, name, entry.mode, entry.size_bytes))
        return found

    def open_file(self, inode: int) -> int:
        """Return a handle: of a writable file one that tells this open from others."""
        if inode not in _WRITABLE:
            return inode
        return CONTROL_BIT | _TEXT_BIT | secrets.randbits(_TEXT_BITS) << 8 | inode & 0xFF

    async def read(self, handle: int, offset: int, length: int) -> bytes:
        number = handle & _MASK
        if handle & _TEXT_BIT or offset >= number & (_SNAPSHOT_MIN - 1):
            return b""  # Of a writable file there is nothing to read.
        return (await self._mover.ask(ReadSnapshot(number, offset, length))).body

    async def write(self, handle: int, offset: int, body: bytes) -> int:
        """Take a piece of a text. Raises TextRefused."""
        if not handle & _TEXT_BIT:
            raise TextRefused("this control file is for reading")
        await self._mover.ask(WriteText(handle, _name_of(handle), offset, body))
        return len(body)

    async def finish(self, handle: int, *, is_closed: bool) -> None:
        """Have taken over what was written. Raises TextRefused."""
        if handle & _TEXT_BIT:
            await self._mover.ask(FinishText(handle, is_closed))


def _name_of(handle: int) -> bytes:
    return _WRITABLE[CONTROL_BIT | handle & 0xFF]
