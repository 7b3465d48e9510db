"""Which paths are pinned: what is cached of them never leaves the cache.

They are kept in a small file beside the index, so that they also outlive the index, which is made anew
after a power loss. A pinned directory means all that is below it, also what comes later; a pinned path
means the version that it shows, so an older one may leave.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from cache.errors import CacheError
from cache.index import Index
from cache.model import ROOT_INODE, Inode
from cache.store import write_synced

log = logging.getLogger(__name__)

_FILE = "pins"
_FORMAT = 1


def ancestors(path: bytes) -> Iterator[bytes]:
    """Yield *path* and all directories above it, the root (b"") last."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]
    yield b""


class Pins:
    """The pinned paths of one cache, in *directory*. Paths are bytes below the mount's root."""

    def __init__(self, directory: Path, index: Index) -> None:
        """Load them. A file that can't be read pins nothing, and the log says so."""
        self._file = directory / _FILE
        self._index = index
        self._paths = self._load()
        # Versions that lie below a pinned path, though the lake's key of when they came does not.
        self._moved: dict[bytes, Inode] = {}

    def _load(self) -> set[bytes]:
        try:
            kept = json.loads(self._file.read_text())
            if kept["format"] != _FORMAT:
                raise ValueError(f"format {kept['format']!r}")
            return {os.fsencode(path) for path in kept["paths"]}
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("%s: not readable (%r), nothing is pinned; pin it again", self._file, error)
            return set()

    @property
    def paths(self) -> list[bytes]:
        return sorted(self._paths)

    def __bool__(self) -> bool:
        return bool(self._paths)

    def replace(self, paths: set[bytes]) -> None:
        """Make *paths* the pinned ones; durable when this returns. Raises CacheError."""
        text = json.dumps({"format": _FORMAT, "paths": [os.fsdecode(path) for path in sorted(paths)]})
        try:
            write_synced(self._file, text + "\n")
        except OSError as error:
            raise CacheError(f"{self._file}: {error.strerror}; nothing was changed") from error
        self._paths = set(paths)

    def pinned_by(self, path: bytes) -> bytes | None:
        """Return the pinned path that holds *path*, itself or a directory above it; None if none does."""
        if not self._paths:
            return None
        return next((above for above in ancestors(path) if above in self._paths), None)

    def note_place(self, inode: Inode, vid: bytes) -> None:
        """Note where a version is shown, for one whose key lies elsewhere: it was moved there."""
        row = self._index.version(vid)
        if row is not None and self._shown_at(row.key) != inode:
            self._moved[vid] = inode

    def is_pinned(self, vid: bytes) -> bool:
        """Return whether a cached version may not leave: a pinned path shows it.

        So does, as far as anybody knows, one in a directory that was not listed yet.
        """
        if not self._paths:
            return False
        inode = self._moved.get(vid)
        if inode is None:
            row = self._index.version(vid)
            if row is None or self.pinned_by(row.key) is None:
                return False
            inode = self._shown_at(row.key)
            if inode is None:
                return False
            if inode == 0:
                return True
        return self._is_shown_pinned(inode, vid)

    def _is_shown_pinned(self, inode: Inode, vid: bytes) -> bool:
        node = self._index.node(inode)
        if node is None or node.vid != vid or self._index.is_detached(inode):
            return False
        try:
            return self.pinned_by(self._index.path_of(inode)) is not None
        except CacheError:  # A directory above it is gone.
            return False

    def _shown_at(self, path: bytes) -> Inode | None:
        """Return the inode at *path*; None if there is none, 0 if that is not known yet."""
        inode = ROOT_INODE
        for name in path.split(b"/"):
            found = self._index.child(inode, name)
            if found is None:
                return None if self._index.directory(inode) is not None else Inode(0)
            inode = found[0]
        return inode
