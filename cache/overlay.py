"""What the mount shows of one directory that the lake knows nothing of, or no longer, or not yet.

A listing of the lake is laid under it:

1. What is deleted or moved away is not shown, whether its row is pending (`hides`) or was finished
   after the listing began (`leaves_alone`: of such names the index knows better).
2. What was made or changed here stays as it is (`is_local`).
3. A directory that the mount does not have is not shown for keys below it that are all hidden.
4. A directory that was moved itself since the listing began is listed anew (`settle`).
"""

from __future__ import annotations

import stat

import msgspec

from cache.index import Index
from cache.index_writer import IndexWriter
from cache.pending import KeyWatch, Move, Pending, PendingTable, Restate
from cache.records import Node


def prefix_of(place: bytes) -> bytes:
    """Return the prefix of what is below *place*, a path or a key without a slash at its end."""
    return place + b"/" if place else b""


def is_kept(table: PendingTable, path: bytes) -> bool:
    """Return whether a row says that what is no directory at *path* is not the lake's, or not yet."""
    return any(not (isinstance(row, Restate) or _is_copied(row)) for _, row in table.at(path))


def _is_copied(row: Pending) -> bool:
    return isinstance(row, Move) and row.copied


def is_placeholder(node: Node) -> bool:
    """Return whether recovery made the node for what the lake has, before the lake was asked."""
    is_object = stat.S_ISREG(node.kind) or stat.S_ISLNK(node.kind)
    return is_object and not (node.etag or node.staged or node.origin)


class Overlay:
    """*prefix*: of the directory's keys when the listing began; *watch* was opened at that moment."""

    def __init__(self, table: PendingTable, watch: KeyWatch, inode: int, prefix: bytes) -> None:
        self._table = table
        self._watch = watch
        self._inode = inode
        self._prefix = prefix
        self._path_prefix = prefix
        self._is_empty = True

    def settle(self, w: Index | IndexWriter) -> bool:
        """Look where the directory is now; return False if it is no longer where it was listed.

        To be called first in each transaction. Raises CacheError if it is gone for good.
        """
        path, key = w.path_of(self._inode), w.key_of(self._inode)
        self._path_prefix = prefix_of(path)
        self._is_empty = not self._table.rows
        return prefix_of(key) == self._prefix and not self._watch.moved

    def leaves_alone(self, name: bytes) -> bool:
        """Return whether *name* was changed through the mount since the lake was asked."""
        return name in self._watch.names

    def may_come_later(self, name: bytes) -> bool:
        """Return whether the lake may have got *name*, or something below it, since it was asked."""
        return name in self._watch.names or name in self._watch.above

    def hides(self, key: bytes) -> bool:
        """Return whether *key*, below the directory (a directory's own ends in "/"), is deleted or moved
        away already: whether it ends up elsewhere than where the mount has it.
        """
        if self._is_empty:
            return False
        return self._table.fate(key) != self._path_prefix + key[len(self._prefix) :]

    def may_hide_all_below(self, name: bytes) -> bool:
        """Return whether what the lake has below the directory *name* may be all hidden: operations
        touch something there, or have since the lake was asked.
        """
        prefix = self._prefix + name + b"/"
        return self.may_come_later(name) or self._table.touched_after(-1, prefix)

    def is_local(self, node: Node) -> bool:
        """Return whether what the lake lists, or lacks, under the node's name changes nothing."""
        if node.staged or node.origin:
            return True
        if self._is_empty:
            return False
        path = self._path_prefix + node.name
        if node.is_directory:
            return self._table.keeps(path)
        return is_kept(self._table, path)

    def dressed(self, node: Node) -> Node:
        """Return *node*, which the lake has shown, with attributes that the lake has yet to get."""
        if self._is_empty:
            return node
        for _, row in self._table.at(self._path_prefix + node.name):
            if isinstance(row, Restate):
                mtime_ns = row.mtime_ns or node.mtime_ns
                node = msgspec.structs.replace(node, attributes=row.attributes, mtime_ns=mtime_ns)
        return node
