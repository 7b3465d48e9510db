"""Changes of the index: one transaction of the mover's, see `cache.index` for what is stored how."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator

import lmdb
import msgspec

from cache.errors import CacheError
from cache.model import (
    KIND_DIRECTORY,
    KIND_SYMLINK,
    ROOT_INODE,
    SYMLINK_SUFFIX,
    Inode,
)
from cache.records import (
    DirectoryState,
    Group,
    HiddenKey,
    Node,
    VersionRow,
    as_inode,
    child_key,
    decode_directory,
    decode_node,
    decode_version,
    encode,
    group_key,
    hidden_key,
    inode_key,
)


class IndexWriter:
    """Changes within one transaction. Reads here see the changes made before in it."""

    def __init__(self, txn: lmdb.Transaction, dbs: dict[str, lmdb._Database]) -> None:
        self._txn = txn
        self._dbs = dbs
        self._next_inode = int.from_bytes(txn.get(b"next_inode", db=dbs["meta"]) or b"\2", "big")
        self._inodes_given = False
        self._changed_directories: set[int] = set()
        self._entries: dict[int, int] = {}  # By how many entries directories grew: written once, at the end.
        self._nodes: dict[int, Node] = {}  # As of now, of those that were read or written here.
        self.changed_nodes: set[int] = set()  # Also those whose path shows something else now.
        self.lost_names: list[tuple[int, bytes]] = []  # Which inodes had which names, and have them no more.

    def finish(self) -> None:
        """Write what goes with the changes: called once, last, by `Index.write`."""
        if self._inodes_given:
            self.set_meta(b"next_inode", self._next_inode.to_bytes(8, "big"))
        for inode in self._changed_directories.union(self._entries):
            state = self.directory(inode)
            if state is not None:
                self.set_directory(inode, msgspec.structs.replace(state, changed_at_ns=time.time_ns()))

    def set_meta(self, name: bytes, value: bytes) -> None:
        self._txn.put(name, value, db=self._dbs["meta"])

    def add_root(self) -> None:
        if self._txn.get(inode_key(ROOT_INODE), db=self._dbs["nodes"]) is None:
            self.put_node(ROOT_INODE, Node(parent=ROOT_INODE, name=b"", kind=KIND_DIRECTORY))

    def node(self, inode: int) -> Node | None:
        node = self._nodes.get(inode)
        if node is None:
            packed = self._txn.get(inode_key(inode), db=self._dbs["nodes"])
            if packed is None:
                return None
            node = self._nodes[inode] = decode_node(packed)
        return node

    def path_of(self, inode: int) -> bytes:
        """Return what `Index.path_of` does, with the changes of this transaction."""
        names: list[bytes] = []
        while inode != ROOT_INODE:
            node = self.node(inode)
            if node is None:
                raise CacheError(f"index: inode {inode} has no node")
            names.append(node.name)
            inode = node.parent
        return b"/".join(reversed(names))

    def key_of(self, inode: int) -> bytes:
        """Return where the lake has it, or would have it; a directory without a slash at the end."""
        return key_of(self._txn, self._dbs["nodes"], inode)

    def child(self, parent: int, name: bytes) -> tuple[Inode, Node] | None:
        packed = self._txn.get(child_key(parent, name), db=self._dbs["children"])
        if packed is None:
            return None
        inode = as_inode(bytes(packed))
        node = self.node(inode)
        assert node is not None, (parent, name)
        return inode, node

    def put_node(self, inode: int, node: Node) -> None:
        self.changed_nodes.add(inode)
        self._nodes[inode] = node
        self._txn.put(inode_key(inode), encode(node), db=self._dbs["nodes"])

    def attach(self, node: Node) -> Inode:
        """Give *node* a new inode and its name in the parent. The name's old node is detached."""
        inode = Inode(self._next_inode)
        self._next_inode += 1
        self._inodes_given = True
        self._changed_directories.add(node.parent)
        key = child_key(node.parent, node.name)
        replaced = self._txn.get(key, db=self._dbs["children"])
        if replaced is not None:
            self.changed_nodes.add(as_inode(bytes(replaced)))
            self._txn.put(replaced, b"", db=self._dbs["detached"])
        self._txn.put(key, inode_key(inode), db=self._dbs["children"])
        self._nodes[inode] = node
        self._txn.put(inode_key(inode), encode(node), db=self._dbs["nodes"], append=False)
        return inode

    def detach(self, parent: int, name: bytes) -> None:
        """Take the name out. The node stays for those who have it open, until `sweep_detached`."""
        packed = self._txn.pop(child_key(parent, name), db=self._dbs["children"])
        if packed is not None:
            self._changed_directories.add(parent)
            self.changed_nodes.add(as_inode(bytes(packed)))
            self._txn.put(packed, b"", db=self._dbs["detached"])

    def move(self, inode: int, node: Node) -> None:
        """Give *inode* the parent and name of *node*, and all else of it. The name must be free."""
        old, key = self.node(inode), child_key(node.parent, node.name)
        assert old is not None and self._txn.get(key, db=self._dbs["children"]) is None, (inode, node)
        self._txn.delete(child_key(old.parent, old.name), db=self._dbs["children"])
        self._txn.put(key, inode_key(inode), db=self._dbs["children"])
        self._changed_directories.update((old.parent, node.parent))
        self.lost_names.append((inode, old.name))
        self.put_node(inode, node)

    def touch(self, directory: int, now_ns: int, entries: int) -> None:
        """Note that the mount changed a directory's entries, whose number grew by *entries*."""
        node = self.node(directory)
        if node is not None:
            self.put_node(directory, msgspec.structs.replace(node, mtime_ns=now_ns))
        if entries:
            self._entries[directory] = self._entries.get(directory, 0) + entries

    def is_detached(self, inode: int) -> bool:
        return self._txn.get(inode_key(inode), db=self._dbs["detached"]) is not None

    def forget(self, inode: int) -> None:
        """Remove a detached node that nobody has open, a directory's entries included."""
        for child, name in list(self.names(inode)):
            self._txn.delete(child_key(inode, name), db=self._dbs["children"])
            self.forget(child)
        if (node := self.node(inode)) is not None:
            self.lost_names.append((inode, node.name))
        self.changed_nodes.add(inode)
        self._nodes.pop(inode, None)
        for db in ("detached", "directories", "nodes"):
            self._txn.delete(inode_key(inode), db=self._dbs[db])
        self.clear_hidden(inode)

    def names(self, parent: int) -> Iterator[tuple[Inode, bytes]]:
        """Yield (inode, name) of all entries. Don't change `children` before it ends."""
        prefix = inode_key(parent)
        with self._txn.cursor(db=self._dbs["children"]) as cursor:
            go_on = cursor.set_range(prefix)
            while go_on and cursor.key()[:8] == prefix:
                yield as_inode(bytes(cursor.value())), bytes(cursor.key()[8:])
                go_on = cursor.next()

    def count_children(self, parent: int) -> int:
        prefix, count = inode_key(parent), 0
        with self._txn.cursor(db=self._dbs["children"]) as cursor:
            if cursor.set_range(prefix):
                for key in cursor.iternext(keys=True, values=False):
                    if key[:8] != prefix:
                        break
                    count += 1
        return count

    def sweep_detached(self) -> int:
        """Forget detached nodes, subtrees included; nothing may be open. Returns how many."""
        detached, nodes = self._dbs["detached"], self._dbs["nodes"]
        count = 0
        while (first := self._first_key(detached)) is not None:
            self._txn.delete(first, db=detached)
            inode = as_inode(first)
            for _, name in list(self.names(inode)):
                self.detach(inode, name)
            self._txn.delete(first, db=self._dbs["directories"])
            self.clear_hidden(inode)
            count += self._txn.delete(first, db=nodes)
        return count

    def _first_key(self, db: lmdb._Database) -> bytes | None:
        with self._txn.cursor(db=db) as cursor:
            return bytes(cursor.key()) if cursor.first() else None

    def set_directory(self, inode: int, state: DirectoryState) -> None:
        self._entries.pop(inode, None)
        self._txn.put(inode_key(inode), encode(state), db=self._dbs["directories"])

    def directory(self, inode: int) -> DirectoryState | None:
        packed = self._txn.get(inode_key(inode), db=self._dbs["directories"])
        if packed is None:
            return None
        state, grown = decode_directory(packed), self._entries.get(inode, 0)
        return msgspec.structs.replace(state, entries=max(0, state.entries + grown)) if grown else state

    def clear_hidden(self, parent: int) -> None:
        prefix = inode_key(parent)
        with self._txn.cursor(db=self._dbs["hidden"]) as cursor:
            go_on = cursor.set_range(prefix)
            while go_on and cursor.key()[:8] == prefix:
                go_on = cursor.delete() and bool(cursor.key())

    def hide(self, parent: int, hidden: HiddenKey) -> None:
        self._txn.put(hidden_key(parent, hidden.key), encode(hidden), db=self._dbs["hidden"])

    def put_version(self, vid: bytes, row: VersionRow) -> None:
        self._txn.put(vid, encode(row), db=self._dbs["versions"])

    def version(self, vid: bytes) -> VersionRow | None:
        packed = self._txn.get(vid, db=self._dbs["versions"])
        return None if packed is None else decode_version(packed)

    def group(self, vid: bytes, group: int) -> Group | None:
        packed = self._txn.get(group_key(vid, group), db=self._dbs["groups"])
        return None if packed is None else Group.unpack(bytes(packed))

    def put_group(self, vid: bytes, group: int, row: Group) -> None:
        self._txn.put(group_key(vid, group), row.pack(), db=self._dbs["groups"])

    def remove_version(self, vid: bytes) -> None:
        self._txn.delete(vid, db=self._dbs["versions"])
        with self._txn.cursor(db=self._dbs["groups"]) as cursor:
            go_on = cursor.set_range(vid)
            while go_on and cursor.key()[:16] == vid:
                go_on = cursor.delete() and bool(cursor.key())

    def remove_versions(self, vids: Iterable[bytes]) -> None:
        for vid in vids:
            self.remove_version(vid)

    def remove_group(self, vid: bytes, group: int) -> None:
        self._txn.delete(group_key(vid, group), db=self._dbs["groups"])

    def put_pending(self, seq: int, packed: bytes) -> None:
        self._txn.put(seq.to_bytes(8, "big"), packed, db=self._dbs["pending"])

    def remove_pending(self, seq: int) -> None:
        self._txn.delete(seq.to_bytes(8, "big"), db=self._dbs["pending"])

    def clear_pending(self) -> None:
        self._txn.drop(self._dbs["pending"], delete=False)

    def answer(self, id: int) -> bytes | None:
        """Return what was kept with `put_answer`."""
        packed = self._txn.get(id.to_bytes(8, "big"), db=self._dbs["answers"])
        return None if packed is None else bytes(packed[8:])

    def put_answer(self, id: int, number: int, packed: bytes) -> None:
        numbered = number.to_bytes(8, "big") + packed
        self._txn.put(id.to_bytes(8, "big"), numbered, db=self._dbs["answers"])

    def remove_answer(self, id: int) -> None:
        self._txn.delete(id.to_bytes(8, "big"), db=self._dbs["answers"])

    def clear_answers(self) -> None:
        self._txn.drop(self._dbs["answers"], delete=False)

    def take_staged_number(self) -> int:
        """Return the number of the next staging file. None is given twice."""
        number = int.from_bytes(self._txn.get(b"next_staged", db=self._dbs["meta"]) or b"\1", "big")
        self.set_meta(b"next_staged", (number + 1).to_bytes(8, "big"))
        return number


def nodes_down_to(txn: lmdb.Transaction, nodes: lmdb._Database, inode: int) -> list[Node]:
    """Return the nodes from below the root to *inode*. Raises CacheError where one is missing."""
    found: list[Node] = []
    while inode != ROOT_INODE:
        packed = txn.get(inode_key(inode), db=nodes)
        if packed is None:
            raise CacheError(f"index: inode {inode} has no node")
        found.append(decode_node(packed))
        inode = found[-1].parent
    return found[::-1]


def key_of(txn: lmdb.Transaction, nodes: lmdb._Database, inode: int) -> bytes:
    """Return the key of *inode*, from the nearest node above it, or itself, of which it is known."""
    names: list[bytes] = []
    while inode != ROOT_INODE:
        packed = txn.get(inode_key(inode), db=nodes)
        if packed is None:
            raise CacheError(f"index: inode {inode} has no node")
        node = decode_node(packed)
        if node.origin:
            names.append(node.origin.rstrip(b"/"))
            break
        is_symlink = node.kind == KIND_SYMLINK
        names.append(node.name + os.fsencode(SYMLINK_SUFFIX) if is_symlink else node.name)
        inode = node.parent
    return b"/".join(reversed(names))
