"""Applies what the lake listed to the index, page by page."""

from __future__ import annotations

import os
import stat
import time

import msgspec

from cache.index_writer import IndexWriter
from cache.lake.base import ListPage
from cache.metadata import attributes_of
from cache.model import (
    CONTROL_NAME,
    KIND_DIRECTORY,
    KIND_FILE,
    KIND_SYMLINK,
    ROOT_INODE,
    SYMLINK_SUFFIX,
    Inode,
    ObjectInfo,
)
from cache.overlay import Overlay, is_placeholder
from cache.policy.names import CONTROL_DIRECTORY, MARKER_WITH_CONTENT, SHADOWED, WRITTEN_HERE, why_no_name
from cache.records import DirectoryState, HiddenKey, Node

Changed = list[tuple[Inode, bytes]]  # (parent, name) of entries that show something else now.


def entry_of(part: str) -> tuple[str, int]:
    """Return the name and kind of the entry that an object shows as; *part*: the key's last component."""
    if part.endswith(SYMLINK_SUFFIX):
        return part[: -len(SYMLINK_SUFFIX)], KIND_SYMLINK
    return part, KIND_FILE


def node_of(parent: int, name: bytes, info: ObjectInfo, seen_at_s: float = 0.0) -> Node:
    """Return what the name shows. Mode, owner and attributes are known of what was asked for by HEAD."""
    version = info.version
    kind = entry_of(version.key)[1]
    attributes, mtime_ns = attributes_of(info.metadata, info.mtime_ns) if info.metadata else (None, 0)
    return Node(
        parent,
        name,
        kind,
        version.size_bytes,
        mtime_ns if attributes is not None and mtime_ns else info.mtime_ns,
        version.etag,
        version.id,
        seen_at_s,
        attributes=attributes,
    )


def is_same_content(one: Node, other: Node) -> bool:
    """Return whether both show the same object's content. Not by *vid*: a move changes the key in it."""
    return (one.kind, one.etag, one.size_bytes) == (other.kind, other.etag, other.size_bytes)


def put_file(w: IndexWriter, node: Node, changed: Changed) -> Inode:
    """Make the name show this version; the same version keeps its inode. Returns the inode.

    Times and modes that were set through the mount stay with the version that they were set on.
    """
    known = w.child(node.parent, node.name)
    if known is None:
        return w.attach(node)
    inode, old = known
    if is_same_content(old, node):
        mtime_ns = node.mtime_ns if old.attributes is None else old.mtime_ns
        attributes = old.attributes or node.attributes
        renewed = msgspec.structs.replace(
            old, mtime_ns=mtime_ns, seen_at_s=node.seen_at_s, attributes=attributes
        )
        if renewed != old:
            w.put_node(inode, renewed)
        return inode
    changed.append((Inode(node.parent), node.name))
    if is_placeholder(old) and old.kind == node.kind:
        mtime_ns = old.mtime_ns or node.mtime_ns
        w.put_node(inode, msgspec.structs.replace(node, attributes=old.attributes, mtime_ns=mtime_ns))
        return inode
    return w.attach(node)


def put_directory(
    w: IndexWriter, parent: int, name: bytes, changed: Changed, seen_at_s: float = 0.0
) -> Inode:
    known = w.child(parent, name)
    if known is not None and known[1].is_directory:
        inode, old = known
        if seen_at_s > old.seen_at_s:
            w.put_node(inode, msgspec.structs.replace(old, seen_at_s=seen_at_s))
        return inode
    if known is not None:
        changed.append((Inode(parent), name))
    return w.attach(Node(parent, name, KIND_DIRECTORY, mtime_ns=time.time_ns(), seen_at_s=seen_at_s))


class ListingInProgress:
    """One directory's listing: `apply` each page, then `finish`.

    Which entries were seen is kept in one bit each, so a million of them take 125 KB. Once
    *is_stale*, it changes nothing more: the directory is to be listed anew.
    """

    def __init__(self, inode: Inode, prefix: str, overlay: Overlay, now_s: float) -> None:
        self.inode = inode
        self._prefix = prefix
        self._overlay = overlay
        self.began_s = now_s
        self.pages = 0
        self.entries = 0
        self.changed: Changed = []
        self.is_stale = False
        self._seen = bytearray()
        self._deferred: list[ObjectInfo] = []  # What may be shadowed by what comes on a later page.

    def apply(self, w: IndexWriter, page: ListPage) -> None:
        """Take in one page; `changed` gets the entries that the kernel may know otherwise."""
        if not self._settle(w):
            return
        if self.pages == 0:
            w.clear_hidden(self.inode)
        self.pages += 1
        for prefix in page.prefixes:
            part = prefix[len(self._prefix) : -1]
            if (reason := self._why_hidden(part)) is not None:
                self._hide(w, prefix, reason)
                continue
            self._take_directory(w, os.fsencode(part), prefix)
        for info in page.objects:
            self._take_object(w, info)

    def _why_hidden(self, name: str) -> str | None:
        if self.inode == ROOT_INODE and os.fsencode(name) == CONTROL_NAME:
            return CONTROL_DIRECTORY
        return why_no_name(name)

    def _settle(self, w: IndexWriter) -> bool:
        self.is_stale = self.is_stale or not self._overlay.settle(w)
        return not self.is_stale

    def _hide(self, w: IndexWriter, key: str, reason: str) -> None:
        w.hide(self.inode, HiddenKey(os.fsencode(key), reason))

    def _is_none_of_ours(self, w: IndexWriter, name: bytes, key: str) -> bool:
        """Return whether the index stays as it is, whatever the lake lists under *key*."""
        if self._overlay.leaves_alone(name):
            known = w.child(self.inode, name)
            if known is None:
                return True
            if self._overlay.is_local(known[1]) or not is_placeholder(known[1]):
                self._mark(known[0])
                return True
        return self._overlay.hides(os.fsencode(key))

    def _take_directory(self, w: IndexWriter, name: bytes, prefix: str) -> None:
        if self._is_none_of_ours(w, name, prefix):
            return
        known = w.child(self.inode, name)
        if known is not None and not known[1].is_directory:
            inode, old = known
            if self._overlay.is_local(old):
                self._hide(w, prefix, WRITTEN_HERE)
                self._mark(inode)
                return
            if self._was_seen(inode):
                self.entries -= 1  # The file came on an earlier page: the directory takes its place.
                self._hide(w, self._key_of(old), SHADOWED)
        self._mark(put_directory(w, self.inode, name, self.changed))

    def _key_of(self, node: Node) -> str:
        """Return the key of one of the directory's entries that is no directory."""
        suffix = SYMLINK_SUFFIX if stat.S_ISLNK(node.kind) else ""
        return self._prefix + os.fsdecode(node.name) + suffix

    def _take_object(self, w: IndexWriter, info: ObjectInfo) -> None:
        key = info.version.key
        part = key[len(self._prefix) :]
        if part == "":
            if info.version.size_bytes:
                self._hide(w, key, MARKER_WITH_CONTENT)
            return
        if (reason := why_no_name(part) or self._why_hidden(entry_of(part)[0])) is not None:
            self._hide(w, key, reason)
            return
        node = node_of(self.inode, os.fsencode(entry_of(part)[0]), info)
        if self._is_none_of_ours(w, node.name, key):
            return
        known = w.child(self.inode, node.name)
        if known is not None and self._keeps(w, key, *known):
            return
        if known is not None and self._may_be_shadowed(node, known[1]):
            self._deferred.append(info)  # Decided at the end, when all names are known.
            return
        if known is not None and known[1].kind != node.kind and self._was_seen(known[0]):
            self.entries -= 1  # A symlink that came before: the file takes its place.
            self._hide(w, self._key_of(known[1]), SHADOWED)
        self._put(w, node)

    def _keeps(self, w: IndexWriter, key: str, inode: Inode, old: Node) -> bool:
        """Return whether the entry stays as it is though the lake lists an object under its name."""
        if self._overlay.is_local(old):
            if old.is_directory or key != self._key_of(old):
                self._hide(w, key, SHADOWED)
        elif old.seen_at_s <= self.began_s or old.is_directory:
            return False  # Else it was asked for by itself since: at least as new as this page.
        self._mark(inode)
        return True

    def _may_be_shadowed(self, node: Node, old: Node) -> bool:
        return old.is_directory or (stat.S_ISLNK(node.kind) and not stat.S_ISLNK(old.kind))

    def _put(self, w: IndexWriter, node: Node) -> None:
        known = w.child(self.inode, node.name)
        if known is not None and is_same_content(known[1], node):
            # Once asked for by itself, it stays known from then.
            node = msgspec.structs.replace(node, seen_at_s=known[1].seen_at_s)
        self._mark(put_file(w, self._overlay.dressed(node), self.changed))

    def finish(self, w: IndexWriter, now_s: float) -> None:
        """Drop the entries that the lake no longer has, and note that the directory is listed."""
        if not self._settle(w):
            return
        for info in self._deferred:
            self._take_deferred(w, info)
        if w.count_children(self.inode) != self.entries:
            self._drop_unseen(w)
            self.entries = w.count_children(self.inode)
        before = w.directory(self.inode)
        changed_at_ns = before.changed_at_ns if before is not None else time.time_ns()
        state = DirectoryState(self.began_s, self.entries, self.pages, now_s - self.began_s, changed_at_ns)
        w.set_directory(self.inode, state)

    def _take_deferred(self, w: IndexWriter, info: ObjectInfo) -> None:
        key = info.version.key
        node = node_of(self.inode, os.fsencode(entry_of(key[len(self._prefix) :])[0]), info)
        if self._is_none_of_ours(w, node.name, key):
            return
        known = w.child(self.inode, node.name)
        if known is None or not self._may_be_shadowed(node, known[1]):
            self._put(w, node)
        elif self._was_seen(known[0]) or self._overlay.is_local(known[1]):
            self._hide(w, key, SHADOWED)
            self._mark(known[0])
        else:
            self._put(w, node)

    def _drop_unseen(self, w: IndexWriter) -> None:
        for name in [name for inode, name in w.names(self.inode) if not self._was_seen(inode)]:
            known = w.child(self.inode, name)
            assert known is not None, name
            # It came after its page was listed: asked for by itself, or made or changed here.
            came_since = known[1].seen_at_s > self.began_s or self._overlay.may_come_later(name)
            if not came_since and not self._overlay.is_local(known[1]):
                w.detach(self.inode, name)
                self.changed.append((self.inode, name))

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
