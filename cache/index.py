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
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from cache import pages
from cache.errors import CacheError, UsageError
from cache.index_writer import IndexWriter, key_of, nodes_down_to
from cache.model import (
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
    group_key,
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
            return b"/".join(node.name for node in nodes_down_to(txn, self._nodes, inode))

    def key_of(self, inode: int) -> bytes:
        """Return where the lake has it, or would have it; a directory's without a slash at the end."""
        with self.env.begin() as txn:
            return key_of(txn, self._nodes, inode)

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
