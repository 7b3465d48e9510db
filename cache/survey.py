"""What lies below a directory: the members of a sample set, in listing order."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator

import trio

from cache.errors import SluiceError
from cache.index import Index
from cache.lister import Lister
from cache.model import SMALL_OBJECT_BYTES_MAX, Inode
from cache.policy.recognise import Candidate
from cache.policy.sets import Members
from cache.records import Node

log = logging.getLogger(__name__)

MEMBERS_MAX = 4_000_000  # 16 bytes each, and as much while they are sorted.
_DIRECTORIES_MAX = 100_000
_LEVELS_MAX = 64  # Of directories that were never listed: each is a round of listings.
_LISTINGS_AT_ONCE = 8
_SORTED_AT_ONCE = 20_000  # Members: more are sorted in a thread, a second for a million.
_CHUNK = 500  # Entries read from the index at once: a millisecond or two.


class Survey:
    """Reads subtrees from the index, having what was never listed listed first."""

    def __init__(self, index: Index, lister: Lister) -> None:
        self._index = index
        self._lister = lister

    async def members(self, candidate: Candidate) -> Members | None:
        """Return the files that may be members: those over SMALL_OBJECT_BYTES_MAX, or the others.

        None where there are too many files or directories. Raises LakeError.
        """
        for _ in range(_LEVELS_MAX):
            found = _Found(candidate.large)
            if not await self._walk(candidate, found):
                return None
            if found.unlisted:
                await self._list_all(found.unlisted)
            elif len(found.inodes) <= _SORTED_AT_ONCE:
                return Members(found.inodes, found.total_bytes)
            else:
                return await trio.to_thread.run_sync(Members, found.inodes, found.total_bytes)
        return None

    async def _walk(self, candidate: Candidate, found: _Found) -> bool:
        """Gather what the index has; return False once it is too much."""
        root = Inode(candidate.root)
        found.note_directory(root, self._index)
        stack = [self._entries(root)]
        while stack:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
            elif not entry[1].is_directory:
                if entry[1].vid:  # Else the lake has no such object (yet).
                    found.note_file(*entry)
            elif candidate.deep:
                found.note_directory(entry[0], self._index)
                stack.append(self._entries(entry[0]))
            found.steps += 1
            if found.steps % _CHUNK == 0:
                await trio.lowlevel.checkpoint()
            if len(found.inodes) > MEMBERS_MAX or found.directories > _DIRECTORIES_MAX:
                return False
        return True

    def _entries(self, directory: Inode) -> Iterator[tuple[Inode, Node]]:
        after = b""
        while entries := self._index.children(directory, after, _CHUNK):
            yield from entries
            after = entries[-1][1].name

    async def _list_all(self, directories: list[Inode]) -> None:
        waiting = iter(directories)
        failed: list[SluiceError] = []

        async def list_each() -> None:
            for directory in waiting:
                try:
                    await self._lister.list_directory(directory)
                except SluiceError as error:
                    failed.append(error)
                    return

        async with trio.open_nursery() as nursery:
            for _ in range(_LISTINGS_AT_ONCE):
                nursery.start_soon(list_each)
        if failed:
            raise failed[0]


class _Found:
    def __init__(self, large: bool) -> None:
        self._large = large
        self.inodes = array("Q")
        self.total_bytes = 0
        self.directories = 0
        self.unlisted: list[Inode] = []
        self.steps = 0

    def note_file(self, inode: Inode, node: Node) -> None:
        if node.size_bytes and (node.size_bytes > SMALL_OBJECT_BYTES_MAX) == self._large:
            self.inodes.append(inode)
            self.total_bytes += node.size_bytes

    def note_directory(self, inode: Inode, index: Index) -> None:
        self.directories += 1
        if index.directory(inode) is None:
            self.unlisted.append(inode)
