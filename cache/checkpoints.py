"""Tells the eviction policies which checkpoints are outdated: by the names that files have now.

A file is looked at when the lake has it and when it got another name, its own or that of a directory
above it: frameworks write under a temporary name and rename, and the upload may come before or after.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from cache.errors import CacheError
from cache.index import Index
from cache.model import Inode
from cache.policy.series import Checkpoints
from cache.residency import Residency

_STEPS = 256  # Entries looked at between two checkpoints: 1.6 ms of names that are checkpoints.
_ENTRIES_MAX = 16_384  # Looked at below a directory that was renamed: more is no checkpoint.


class CheckpointNotes:
    """For the mover's trio thread."""

    def __init__(self, nursery: trio.Nursery, index: Index, residency: Residency) -> None:
        self._nursery = nursery
        self._index = index
        self._residency = residency
        self._checkpoints = Checkpoints()

    def stored(self, inode: int) -> None:
        """Note a file that the lake has, if it still is what the lake has and has a name."""
        node = self._index.node(inode)
        if node is None or not node.vid or node.staged or self._index.is_detached(inode):
            return
        with suppress(CacheError):  # Its directory went away.
            self._note(self._index.path_of(inode), node.vid, node.mtime_ns)

    def renamed(self, parent: int, name: bytes) -> None:
        """Note what has this name from now on; what is below a directory soon."""
        found = self._index.child(parent, name)
        if found is None:
            return
        inode, node = found
        if node.is_directory:
            self._nursery.start_soon(self._look_below, inode)
        else:
            self.stored(inode)

    async def _look_below(self, top: Inode) -> None:
        left, entries = [top], 0
        while left and entries < _ENTRIES_MAX:
            directory, after = left.pop(), b""
            with suppress(CacheError):  # It went away meanwhile.
                while entries < _ENTRIES_MAX and (seen := self._look_at_some(directory, after, left)):
                    entries, after = entries + len(seen), seen[-1]
                    await trio.lowlevel.checkpoint()

    def _look_at_some(self, directory: Inode, after: bytes, directories: list[Inode]) -> list[bytes]:
        """Note files from *after* on; return the names that were looked at, none at the end.

        No await in here: the path is the one that the index has now, whatever was renamed since.
        """
        found = self._index.children(directory, after, _STEPS)
        if not found or self._index.is_detached(directory):
            return []
        prefix = self._index.path_of(directory) + b"/"
        for inode, node in found:
            if node.is_directory:
                directories.append(inode)
            elif node.vid and not node.staged:
                self._note(prefix + node.name, node.vid, node.mtime_ns)
        return [node.name for _, node in found]

    def _note(self, path: bytes, vid: bytes, written_ns: int) -> None:
        outdated = self._checkpoints.stored(path, vid, written_ns)
        if outdated is not None:
            self._residency.outdated(outdated)
