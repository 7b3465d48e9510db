"""The index: namespace, block maps and residence in one LMDB environment.

Only the mover writes; workers read, each call in a short transaction of its own. Commits are not
synced: the index can be rebuilt. An environment is opened after the fork, once in each process.

  meta         b"next_inode", b"next_staged", b"lake", b"boot", b"clean"
  nodes        inode -> Node
  children     parent inode + name -> inode
  directories  inode -> DirectoryState          (absent: never listed)
  detached     inode -> b""                     (nodes whose path shows another inode now)
  hidden       parent inode + hash -> HiddenKey
  versions     version id -> VersionRow
  groups       version id + group -> Group
  pending      sequence number -> Pending       (what the lake does not know yet: see pending.py)
  answers      id of a change -> Answer         (the last ones, so that a change sent twice happens once)
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import msgspec

from cache import pages
from cache.errors import CacheError, UsageError
from cache.model import (
    KIND_DIRECTORY,
    KIND_SYMLINK,
    ROOT_INODE,
    SYMLINK_SUFFIX,
    GroupIndex,
    Inode,
    VersionId,
)
from cache.records import (
    DirectoryState,
    Group,
    HiddenKey,
    Node,
    VersionRow,
    as_inode,
    as_vid,
    child_key,
    decode_directory,
    decode_hidden,
    decode_node,
    decode_version,
    encode,
    group_key,
    hidden_key,
    inode_key,
)

MAP_BYTES = 1 << 38  # Address space, not memory: room for some 10**9 keys.
_NAMES = (
    "meta",
    "nodes",
    "children",
    "directories",
    "detached",
    "hidden",
    "versions",
    "groups",
    "pending",
    "answers",
)


class Index:
    """The environment and its readers. Use `write()` for changes."""

    def __init__(self, directory: Path) -> None:
        """Open or create. Raises UsageError when the disk refuses, CacheError when it is corrupt."""
        self.path = directory / "index.lmdb"
        try:
            self.env = lmdb.open(
                str(self.path),
                map_size=MAP_BYTES,
                max_dbs=len(_NAMES),
                max_readers=1024,
                max_spare_txns=8,
                sync=False,
                metasync=False,
                readahead=False,
            )
            self._dbs = {name: self.env.open_db(name.encode()) for name in _NAMES}
        except lmdb.Error as error:
            raise _opening_error(directory, error) from error
        self._nodes = self._dbs["nodes"]
        self._children = self._dbs["children"]

    def close(self) -> None:
        self.env.close()

    # Namespace

    def node(self, inode: int) -> Node | None:
        with self.env.begin() as txn:
            packed = txn.get(inode_key(inode), db=self._nodes)
        return None if packed is None else decode_node(packed)

    def nodes(self, inodes: Iterable[int]) -> Iterator[Node | None]:
        """Yield the node of each. Holds a read transaction: finish it before long."""
        with self.env.begin() as txn:
            for inode in inodes:
                packed = txn.get(inode_key(inode), db=self._nodes)
                yield None if packed is None else decode_node(packed)

    def child(self, parent: int, name: bytes) -> tuple[Inode, Node] | None:
        with self.env.begin() as txn:
            packed = txn.get(child_key(parent, name), db=self._children)
            if packed is None:
                return None
            node = txn.get(packed, db=self._nodes)
        assert node is not None, (parent, name)
        return as_inode(packed), decode_node(node)

    def answer(self, id: int) -> bytes | None:
        """Return the packed answer of the change *id*, None for one that has not happened."""
        with self.env.begin() as txn:
            packed = txn.get(id.to_bytes(8, "big"), db=self._dbs["answers"])
        return None if packed is None else bytes(packed[8:])

    def answer_ids(self) -> list[int]:
        """Return the ids of the changes whose answers are kept, oldest first."""
        with self.env.begin() as txn, txn.cursor(db=self._dbs["answers"]) as cursor:
            found = sorted((bytes(packed[:8]), bytes(key)) for key, packed in cursor)
        return [int.from_bytes(key, "big") for _, key in found]

    def answers_given(self) -> int:
        """Return the number that the next answer gets: they are kept in this order."""
        with self.env.begin() as txn, txn.cursor(db=self._dbs["answers"]) as cursor:
            return max((int.from_bytes(packed[:8], "big") + 1 for _, packed in cursor), default=0)

    def children(self, parent: int, after: bytes, limit: int) -> list[tuple[Inode, Node]]:
        """Return up to *limit* entries in byte order, from the first one behind *after* on."""
        found: list[tuple[Inode, Node]] = []
        prefix = inode_key(parent)
        with self.env.begin() as txn, txn.cursor(db=self._children) as cursor:
            go_on = cursor.set_range(prefix + after)
            if go_on and after and cursor.key() == prefix + after:
                go_on = cursor.next()
            while go_on and len(found) < limit:
                key, packed = cursor.item()
                if key[:8] != prefix:
                    break
                node = txn.get(packed, db=self._nodes)
                assert node is not None, key
                found.append((as_inode(packed), decode_node(node)))
                go_on = cursor.next()
        return found

    def directory(self, inode: int) -> DirectoryState | None:
        with self.env.begin() as txn:
            packed = txn.get(inode_key(inode), db=self._dbs["directories"])
        return None if packed is None else decode_directory(packed)

    def is_detached(self, inode: int) -> bool:
        """Return whether the path of *inode* shows another version, or nothing, by now."""
        with self.env.begin() as txn:
            return txn.get(inode_key(inode), db=self._dbs["detached"]) is not None

    def path_of(self, inode: int) -> bytes:
        """Return the path below the root, without a leading slash; b"" is the root."""
        with self.env.begin() as txn:
            return b"/".join(node.name for node in _nodes_down_to(txn, self._nodes, inode))

    def key_of(self, inode: int) -> bytes:
        """Return where the lake has it, or would have it; a directory's without a slash at the end."""
        with self.env.begin() as txn:
            return _key_of(txn, self._nodes, inode)

    def pending_rows(self) -> list[tuple[int, bytes]]:
        """Return the sequence numbers and packed rows of what is pending, the earliest first."""
        with self.env.begin() as txn, txn.cursor(db=self._dbs["pending"]) as cursor:
            return [(int.from_bytes(key, "big"), bytes(packed)) for key, packed in cursor]

    def hidden(self, limit: int) -> tuple[int, list[HiddenKey]]:
        """Return how many keys no path can show, and the first *limit* of them."""
        db = self._dbs["hidden"]
        with self.env.begin() as txn, txn.cursor(db=db) as cursor:
            found: list[HiddenKey] = []
            for _, packed in cursor:
                if len(found) == limit:
                    break
                found.append(decode_hidden(packed))
            return int(txn.stat(db)["entries"]), found

    # Residence

    def residence(self, vid: bytes, groups: range) -> tuple[VersionRow | None, list[Group | None]]:
        """Return the version's row and the rows of *groups*, from one state of the index."""
        db = self._dbs["groups"]
        with self.env.begin() as txn:
            packed = txn.get(vid, db=self._dbs["versions"])
            if packed is None:
                return None, [None] * len(groups)
            rows = [txn.get(group_key(vid, group), db=db) for group in groups]
        return decode_version(packed), [None if row is None else Group.unpack(row) for row in rows]

    def content(self, inode: int, groups: range) -> tuple[Node, VersionRow, list[Group | None]] | None:
        """Return a node and what `residence` says of its version, from one state of the index.

        None where there is no such node, or nothing of its content.
        """
        db = self._dbs["groups"]
        with self.env.begin() as txn:
            packed = txn.get(inode_key(inode), db=self._nodes)
            if packed is None:
                return None
            node = decode_node(packed)
            packed = txn.get(node.vid, db=self._dbs["versions"]) if node.vid else None
            if packed is None:
                return None
            rows = [txn.get(group_key(node.vid, group), db=db) for group in groups]
        return node, decode_version(packed), [None if row is None else Group.unpack(row) for row in rows]

    def version(self, vid: bytes) -> VersionRow | None:
        with self.env.begin() as txn:
            packed = txn.get(vid, db=self._dbs["versions"])
        return None if packed is None else decode_version(packed)

    def groups_of(self, vid: bytes) -> list[tuple[GroupIndex, Group]]:
        found = []
        with self.env.begin() as txn, txn.cursor(db=self._dbs["groups"]) as cursor:
            go_on = cursor.set_range(vid)
            while go_on and cursor.key()[:16] == vid:
                group = GroupIndex(int.from_bytes(cursor.key()[16:], "big"))
                found.append((group, Group.unpack(cursor.value())))
                go_on = cursor.next()
        return found

    def versions(self) -> Iterator[tuple[VersionId, VersionRow]]:
        """Yield every row. Holds a read transaction: finish it before long."""
        with self.env.begin() as txn, txn.cursor(db=self._dbs["versions"]) as cursor:
            for key, packed in cursor:
                yield as_vid(key), decode_version(packed)

    def meta(self, name: bytes) -> bytes | None:
        with self.env.begin() as txn:
            value = txn.get(name, db=self._dbs["meta"])
        return None if value is None else bytes(value)

    def entries(self) -> dict[str, int]:
        with self.env.begin() as txn:
            return {name: int(txn.stat(db)["entries"]) for name, db in self._dbs.items()}

    @contextmanager
    def write(self) -> Iterator[IndexWriter]:
        """Open a write transaction; it commits when the block ends. No await inside."""
        try:
            with self.env.begin(write=True) as txn:
                writer = IndexWriter(txn, self._dbs)
                yield writer
                writer.finish()
        except lmdb.Error as error:
            raise CacheError(f"{self.path}: {error}") from error


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
        return _key_of(self._txn, self._dbs["nodes"], inode)

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


def _nodes_down_to(txn: lmdb.Transaction, nodes: lmdb._Database, inode: int) -> list[Node]:
    """Return the nodes from below the root to *inode*. Raises CacheError where one is missing."""
    found: list[Node] = []
    while inode != ROOT_INODE:
        packed = txn.get(inode_key(inode), db=nodes)
        if packed is None:
            raise CacheError(f"index: inode {inode} has no node")
        found.append(decode_node(packed))
        inode = found[-1].parent
    return found[::-1]


def _key_of(txn: lmdb.Transaction, nodes: lmdb._Database, inode: int) -> bytes:
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


def cover_pages(directory: Path) -> None:
    """Make the file as long as its pages. Nobody else may have it open.

    Raises CacheError where it was cut off, and leaves it as it is.
    """
    path = directory / "index.lmdb"
    if not pages.data_file(path).exists():
        return
    try:
        with lmdb.open(str(path), map_size=MAP_BYTES, max_dbs=len(_NAMES) + 1) as env:
            missing_bytes = pages.missing_bytes(env, path)
            if missing_bytes:
                pages.lengthen(path, missing_bytes)
                try:
                    pages.use_all(env, _NAMES)
                except BaseException:
                    pages.lengthen(path, -missing_bytes)
                    raise
    except lmdb.Error as error:
        raise _opening_error(directory, error) from error


def remove_index(directory: Path) -> None:
    shutil.rmtree(directory / "index.lmdb", ignore_errors=True)


def _opening_error(directory: Path, error: lmdb.Error) -> Exception:
    text = str(error)
    if isinstance(error, lmdb.DiskError) or any(
        os_text in text for os_text in ("Read-only", "Permission", "No space", "Input/output")
    ):
        return UsageError(f"--cache {directory}: the index can't be opened there ({text})")
    if errno.errorcode.get(getattr(error, "code", 0)):
        return UsageError(f"--cache {directory}: {text}")
    return CacheError(f"{directory}/index.lmdb: {text}")
