"""Applies what the lake listed to the index, page by page."""

from __future__ import annotations

import os
import time

from cache.index import Index, IndexWriter
from cache.lake.base import ListPage
from cache.model import KIND_DIRECTORY, KIND_FILE, Inode, ObjectInfo
from cache.policy.names import MARKER_WITH_CONTENT, SHADOWED, why_no_name
from cache.records import DirectoryState, HiddenKey, Node

Changed = list[tuple[Inode, bytes]]  # (parent, name) of entries that show something else now.


def node_of(parent: int, name: bytes, info: ObjectInfo, seen_at_s: float = 0.0) -> Node:
    version = info.version
    return Node(
        parent, name, KIND_FILE, version.size_bytes, info.mtime_ns, version.etag, version.id, seen_at_s
    )


def put_file(w: IndexWriter, node: Node, changed: Changed) -> Inode:
    """Make the name show this version; the same version keeps its inode. Returns the inode."""
    known = w.child(node.parent, node.name)
    if known is None:
        return w.attach(node)
    inode, old = known
    if old.vid == node.vid:
        if (old.mtime_ns, old.seen_at_s) != (node.mtime_ns, node.seen_at_s):
            w.put_node(inode, node)
        return inode
    changed.append((Inode(node.parent), node.name))
    return w.attach(node)


def put_directory(
    w: IndexWriter, parent: int, name: bytes, changed: Changed, seen_at_s: float = 0.0
) -> Inode:
    known = w.child(parent, name)
    if known is not None and known[1].is_directory:
        inode, old = known
        if seen_at_s > old.seen_at_s:
            w.put_node(inode, Node(parent, name, KIND_DIRECTORY, mtime_ns=old.mtime_ns, seen_at_s=seen_at_s))
        return inode
    if known is not None:
        changed.append((Inode(parent), name))
    return w.attach(Node(parent, name, KIND_DIRECTORY, mtime_ns=time.time_ns(), seen_at_s=seen_at_s))


class ListingInProgress:
    """One directory's listing: `apply` each page, then `finish`.

    Which entries were seen is kept in one bit each, so a million of them take 125 KB.
    """

    def __init__(self, index: Index, inode: Inode, prefix: str, now_s: float) -> None:
        self._index = index
        self.inode = inode
        self._prefix = prefix
        self.began_s = now_s
        self.pages = 0
        self.entries = 0
        self.changed: Changed = []
        self._seen = bytearray()
        self._deferred: list[ObjectInfo] = []  # Files whose name was a directory so far.

    def apply(self, w: IndexWriter, page: ListPage) -> None:
        """Take in one page; `changed` gets the entries that the kernel may know otherwise."""
        if self.pages == 0:
            w.clear_hidden(self.inode)
        self.pages += 1
        for prefix in page.prefixes:
            part = prefix[len(self._prefix) : -1]
            if (reason := why_no_name(part)) is not None:
                w.hide(self.inode, HiddenKey(os.fsencode(prefix), reason))
                continue
            self._take_directory(w, os.fsencode(part))
        for info in page.objects:
            self._take_object(w, info)

    def _take_directory(self, w: IndexWriter, name: bytes) -> None:
        known = w.child(self.inode, name)
        if known is not None and not known[1].is_directory and self._was_seen(known[0]):
            self.entries -= 1  # The file came on an earlier page: the directory takes its place.
            w.hide(self.inode, HiddenKey(os.fsencode(self._prefix) + name, SHADOWED))
        self._mark(put_directory(w, self.inode, name, self.changed))

    def _take_object(self, w: IndexWriter, info: ObjectInfo) -> None:
        key = info.version.key
        part = key[len(self._prefix) :]
        if part == "":
            if info.version.size_bytes:
                w.hide(self.inode, HiddenKey(os.fsencode(key), MARKER_WITH_CONTENT))
            return
        if (reason := why_no_name(part)) is not None:
            w.hide(self.inode, HiddenKey(os.fsencode(key), reason))
            return
        name = os.fsencode(part)
        known = w.child(self.inode, name)
        if known is not None:
            inode, old = known
            if old.seen_at_s > self.began_s and not old.is_directory:
                self._mark(inode)  # Asked for by itself since: at least as new as this page.
                return
            if old.etag == info.version.etag and old.size_bytes == info.version.size_bytes:
                if old.mtime_ns != info.mtime_ns:
                    w.put_node(inode, node_of(self.inode, name, info))
                self._mark(inode)
                return
            if old.is_directory:
                self._deferred.append(info)  # Decided at the end, when all prefixes are known.
                return
        self._mark(put_file(w, node_of(self.inode, name, info), self.changed))

    def finish(self, w: IndexWriter, now_s: float) -> None:
        """Drop the entries that the lake no longer has, and note that the directory is listed."""
        for info in self._deferred:
            name = os.fsencode(info.version.key[len(self._prefix) :])
            known = w.child(self.inode, name)
            if known is not None and known[1].is_directory and self._was_seen(known[0]):
                w.hide(self.inode, HiddenKey(os.fsencode(info.version.key), SHADOWED))
            else:
                self._mark(put_file(w, node_of(self.inode, name, info), self.changed))
        if w.count_children(self.inode) != self.entries:
            for name in [name for inode, name in w.names(self.inode) if not self._was_seen(inode)]:
                known = w.child(self.inode, name)
                if known is not None and known[1].seen_at_s > self.began_s:
                    self._mark(known[0])  # Came after its page was listed: asked for by itself since.
                    continue
                w.detach(self.inode, name)
                self.changed.append((self.inode, name))
        before = w.directory(self.inode)
        changed_at_ns = before.changed_at_ns if before is not None else time.time_ns()
        state = DirectoryState(self.began_s, self.entries, self.pages, now_s - self.began_s, changed_at_ns)
        w.set_directory(self.inode, state)

    def _mark(self, inode: int) -> None:
        place = inode >> 3
        if place >= len(self._seen):
            self._seen.extend(bytes(place + 1024 - len(self._seen)))
        if not self._seen[place] & 1 << (inode & 7):
            self._seen[place] |= 1 << (inode & 7)
            self.entries += 1

    def _was_seen(self, inode: int) -> bool:
        place = inode >> 3
        return place < len(self._seen) and bool(self._seen[place] & 1 << (inode & 7))
