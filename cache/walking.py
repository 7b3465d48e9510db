"""Finds what paths of the mount lead to: one entry, or all files below a directory, listed by now."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from cache.errors import SluiceError, UsageError
from cache.index import Index
from cache.lister import Lister
from cache.model import ROOT_INODE, Inode
from cache.records import Node

_LISTINGS_AT_ONCE = 8
_STEPS = 500  # Entries read from the index between two checkpoints: a millisecond or two.
_FILES_MAX = 16_000_000  # Eight bytes each.
_ERRORS_MAX = 100  # Are told by name; all are counted.


@dataclass
class Found:
    """Files of the lake, each once, in the order in which they were found.

    *local*: files that the lake has not yet, and so are here anyway.
    """

    inodes: array[int] = field(default_factory=lambda: array("Q"))
    total_bytes: int = 0
    local: int = 0
    failed: int = 0
    errors: list[dict[str, str]] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def note(self, inode: Inode, node: Node) -> None:
        if node.staged or not node.vid:
            self.local += not node.is_directory
        elif node.size_bytes and inode not in self._seen:
            if len(self.inodes) >= _FILES_MAX:
                raise UsageError(f"more than {_FILES_MAX:,} files; name fewer directories")
            self._seen.add(inode)
            self.inodes.append(inode)
            self.total_bytes += node.size_bytes

    def fail(self, path: str, error: object) -> None:
        self.failed += 1
        if len(self.errors) < _ERRORS_MAX:
            self.errors.append({"path": path, "error": str(error)})


class Walker:
    def __init__(self, index: Index, lister: Lister) -> None:
        self._index = index
        self._lister = lister

    async def resolve(self, path: str) -> tuple[Inode, Node]:
        """Return the inode that *path* shows. Raises UsageError when there is none, and LakeError."""
        inode, node = ROOT_INODE, self._index.node(ROOT_INODE)
        assert node is not None
        for name in os.fsencode(path).split(b"/"):
            if name in (b"", b"."):
                continue
            found = self._index.child(inode, name)
            if found is None and node.is_directory and await self._lister.lookup(inode, name):
                found = self._index.child(inode, name)
            if found is None:
                raise UsageError(f"{path}: no such file or directory")
            inode, node = found
        return inode, node

    async def add_all(self, found: Found, paths: Iterable[str]) -> None:
        for number, path in enumerate(paths):
            if number % _STEPS == 0:
                await trio.lowlevel.checkpoint()
            await self.add(found, path)

    async def add(self, found: Found, path: str) -> None:
        """Add the file at *path*, or all files below the directory. What fails is noted."""
        try:
            inode, node = await self.resolve(path)
        except UsageError:
            found.fail(path, "no such file or directory")
            return
        except SluiceError as error:
            found.fail(path, error)
            return
        if node.is_directory:
            await self._add_below(found, inode)
        else:
            found.note(inode, node)

    async def _add_below(self, found: Found, top: Inode) -> None:
        level = [top]
        while level:
            await self._list_all(found, level)
            below: list[Inode] = []
            for directory in level:
                await self._add_entries(found, directory, below)
            level = below

    async def _add_entries(self, found: Found, directory: Inode, below: list[Inode]) -> None:
        after = b""
        while entries := self._index.children(directory, after, _STEPS):
            for inode, node in entries:
                if node.is_directory:
                    below.append(inode)
                else:
                    found.note(inode, node)
            after = entries[-1][1].name
            await trio.lowlevel.checkpoint()

    async def _list_all(self, found: Found, directories: list[Inode]) -> None:
        """Have all *directories* listed, several at a time."""
        waiting = iter(directories)

        async def list_each() -> None:
            for directory in waiting:
                try:
                    await self._lister.list_directory(directory)
                except SluiceError as error:
                    found.fail(os.fsdecode(self._index.path_of(directory)), error)

        async with trio.open_nursery() as nursery:
            for _ in range(min(_LISTINGS_AT_ONCE, len(directories))):
                nursery.start_soon(list_each)
