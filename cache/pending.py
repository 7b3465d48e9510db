"""What the lake does not know yet: pending operations, what they hide of the lake and what they keep.

The rows are in the index (`pending`), written in the same transaction as the namespace's change, and
in the journal, which follows with synchronous commits. `PendingTable` is their picture in the mover's
memory; it is loaded from the rows, and every change of it goes through an `IndexWriter`.

A *path* is a place in the mount, a *key* one in the lake; both are bytes, relative, without a leading
slash. A directory's key ends in "/". They differ for a symlink (its key has an ending of its own) and
while a move is pending (`Node.origin`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import msgspec

from cache.index_writer import IndexWriter
from cache.keys import Claims, KeyTree, discard
from cache.keys import prefixes as prefixes
from cache.model import SYMLINK_SUFFIX
from cache.records import Attributes

OPEN, SEALED, CONFLICT, FAILED = "open", "sealed", "conflict", "failed"
_LAST = 1 << 62  # After all operations.
ANY_ETAG = "*"  # As base_etag: whatever the lake has there is replaced.


class Put(msgspec.Struct, tag="put", array_like=True, frozen=True):
    """A file or symlink whose content the lake has not.

    *base_etag*: what the lake has under the key when the upload may replace it; "" means nothing.
    *size_bytes*: -1 while it may be written. *synced_bytes*: the length that the last fsync made
    durable, -1 if there was none. A symlink has no staging file (*staged* 0): its content is the
    target in its attributes.
    """

    path: bytes
    inode: int
    kind: int
    staged: int
    base_etag: str
    attributes: Attributes
    state: str = OPEN
    size_bytes: int = -1
    synced_bytes: int = -1
    mtime_ns: int = 0
    sealed_at_s: float = 0.0
    upload_id: str = ""
    part_bytes: int = 0
    # The row's key, set before the first byte leaves, with the ctime of what is sent: the lake may have an
    # object or an upload of ours there. Whoever takes the row away adds a Delete or a Move of it.
    upload_key: bytes = b""
    error: str = ""
    upload_ctime_ns: int = 0
    uploaded: bytes = b""  # Of the state that the lake has under key and base_etag: see `upload_mark`.

    @property
    def key(self) -> bytes:
        return object_key(self.path, self.kind)


class Mark(msgspec.Struct, tag="mark", array_like=True, frozen=True):
    """A directory whose marker, an empty object named like it with "/" at the end, is to be put.

    *is_new*: the directory was made here, and the lake has never had its marker, nor anything below it
    that has left it again.
    """

    path: bytes
    inode: int
    attributes: Attributes | None = None
    error: str = ""
    is_new: bool = False

    @property
    def key(self) -> bytes:
        return self.path + b"/"


class Delete(msgspec.Struct, tag="delete", array_like=True, frozen=True):
    """An object, or (key with "/" at its end) a directory's marker, that is to leave the lake."""

    key: bytes
    inode: int = 0  # While it is open somewhere, its bytes may still be asked for: the delete waits.
    error: str = ""


class Move(msgspec.Struct, tag="move", array_like=True, frozen=True):
    """An object or a whole directory that goes from *source*, a key, to *path*.

    *source* and *key* are as of the time when the row was added. Where later renames carry it on, *path*
    follows what the mount shows, and *to* is the path that this move leads to. *etag*: "" for
    whatever is there, if anything. *inode*: 0 where no node has its content from *source*.
    *copied*: all is there under its new key, and the namespace says so; the old keys are to go.
    *replaces*: the lake has something there that the mount does not show any more.
    """

    source: bytes
    path: bytes
    inode: int
    kind: int
    etag: str = ""
    size_bytes: int = 0
    copied: bool = False
    error: str = ""
    replaces: bool = False
    to: bytes = b""  # "": *path*.

    @property
    def is_tree(self) -> bool:
        return stat.S_ISDIR(self.kind)

    @property
    def key(self) -> bytes:
        path = self.to or self.path
        return path + b"/" if self.is_tree else object_key(path, self.kind)


class Restate(msgspec.Struct, tag="restate", array_like=True, frozen=True):
    """An object of the lake whose metadata is to change (chmod, chown, utimens, xattrs)."""

    path: bytes
    inode: int
    kind: int
    attributes: Attributes
    mtime_ns: int = 0
    error: str = ""

    @property
    def key(self) -> bytes:
        return self.path + b"/" if stat.S_ISDIR(self.kind) else object_key(self.path, self.kind)


class Local(msgspec.Struct, tag="local", array_like=True, frozen=True):
    """A FIFO or socket: it never goes to the lake."""

    path: bytes
    inode: int
    kind: int
    attributes: Attributes

    @property
    def key(self) -> bytes:
        return b""


class Orphan(msgspec.Struct, tag="orphan", array_like=True, frozen=True):
    """The staging file of an unlinked file that is open: it goes with the last close."""

    inode: int
    staged: int

    @property
    def key(self) -> bytes:
        return b""


Pending = Put | Mark | Delete | Move | Restate | Local | Orphan
Placed = Put | Mark | Move | Restate | Local  # Those that stand for a path of the mount.

encode_pending = msgspec.msgpack.Encoder().encode
decode_pending = msgspec.msgpack.Decoder(Pending).decode


def upload_mark(row: Put, ctime_ns: int) -> bytes:
    """Return what `Put.uploaded` is when the lake has the row's content as of *ctime_ns*.

    It is another one after each change of key, base or attributes, whoever makes it.
    """
    named = msgspec.msgpack.encode((row.key, row.base_etag, row.staged, ctime_ns, row.attributes))
    return hashlib.blake2b(named, digest_size=16).digest()


def object_key(path: bytes, kind: int) -> bytes:
    """Return the key of what is no directory at *path*."""
    return path + os.fsencode(SYMLINK_SUFFIX) if stat.S_ISLNK(kind) else path


def touched_keys(row: Pending) -> tuple[bytes, ...]:
    """Return the keys that the operation reads or writes; one with "/" at its end is a whole tree."""
    match row:
        case Move():
            return (row.source, row.key)
        case Local() | Orphan():
            return ()
        case _:
            return (row.key,)


class KeyWatch:
    """Which names of one directory operations touched since it was opened: what a listing that runs
    meanwhile says of them may be older than what the mount shows.

    *prefixes*: the directory's, in the lake and in the mount. *above*: the names of directories below
    which something was touched. *moved*: a move of the directory itself, or of one above it, began or
    ended.
    """

    def __init__(self, *prefixes: bytes) -> None:
        self._prefixes = prefixes
        self._touched = Claims()
        self.names: set[bytes] = set()
        self.above: set[bytes] = set()
        self.moved = False

    def note(self, row: Pending) -> None:
        self._touched.add(0, touched_keys(row), touched_trees(row))
        for key in touched_keys(row):
            self._note_key(key, whole_tree=isinstance(row, Move) and row.is_tree)

    def has_touched(self, key: bytes) -> bool:
        """Return whether an operation touched *key* itself, or a whole directory that it is in."""
        return next(self._touched.on(key, whole_tree=False), None) is not None

    def _note_key(self, key: bytes, *, whole_tree: bool) -> None:
        for prefix in self._prefixes:
            if len(key) > len(prefix) and key.startswith(prefix):
                part, _, below = key[len(prefix) :].partition(b"/")
                if below:
                    self.above.add(part)
                else:
                    self.names.update((part, part.removesuffix(os.fsencode(SYMLINK_SUFFIX))))
            elif whole_tree and prefix.startswith(key):
                self.moved = True


class Running(dict[int, tuple[bytes, ...]]):
    """The keys of the operations that are under way, as they were when each began.

    An operation stays until `end`, also when its row was changed or removed meanwhile. Only `begin`
    and `end` change it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trees: dict[int, tuple[bytes, ...]] = {}
        self._claims = Claims()

    def begin(self, seq: int, row: Pending) -> None:
        self.end(seq)
        self[seq], self._trees[seq] = touched_keys(row), touched_trees(row)
        self._claims.add(seq, self[seq], self._trees[seq])

    def end(self, seq: int) -> None:
        """It is known how it ended, if it was under way."""
        if seq in self:
            self._claims.discard(seq, self.pop(seq), self._trees.pop(seq))

    def on(self, key: bytes, *, whole_tree: bool) -> Iterator[int]:
        return self._claims.on(key, whole_tree=whole_tree)


class PendingTable:
    """All pending rows by their sequence numbers; a later operation has the greater number.

    For the mover's trio thread. `load` first; after a failed commit `load` again, since the
    memory is then ahead of the index.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Pending] = {}
        self._next_seq = 1
        self._by_path = KeyTree()  # Placed rows only.
        self._by_inode: defaultdict[int, set[int]] = defaultdict(set)
        self._claims = Claims()
        self.running = Running()
        # What the journal has not got yet, in the order of the last change of each row.
        self.unjournaled: dict[int, Pending | None] = {}
        self.on_change: Callable[[], None] = _nothing  # The journal's keeper, once there is one.
        self._watches: set[KeyWatch] = set()
        self.unseen: set[int] = set()  # Rows changed since the uploader looked, which empties it.

    def load(self, rows: Iterable[tuple[int, Pending]]) -> None:
        """Start over with *rows*. What is running and what the journal lacks stays as it is."""
        running, unjournaled, next_seq = self.running, self.unjournaled, self._next_seq
        on_change, watches = self.on_change, self._watches
        self.__init__()  # type: ignore[misc]
        self.running, self._next_seq = running, next_seq
        self.on_change, self._watches = on_change, watches
        for seq, row in rows:
            self._put(seq, row)
            self._next_seq = max(self._next_seq, seq + 1)
        self.unseen = set(self.rows)
        # What a failed commit noted besides is not to reach the journal.
        self.unjournaled = {seq: self.rows.get(seq) for seq in unjournaled}

    # Changes, within a transaction of the index

    def add(self, w: IndexWriter, row: Pending) -> int:
        """Append *row*; return its sequence number."""
        seq = self._next_seq
        self._next_seq += 1
        self.replace(w, seq, row)
        return seq

    def replace(self, w: IndexWriter, seq: int, row: Pending) -> None:
        if _is_same_place(self.rows.get(seq), row):
            self._renew(seq, row)
        else:
            self._drop(seq)
            self._put(seq, row)
        w.put_pending(seq, encode_pending(row))
        self._note(seq, row)

    def remove(self, w: IndexWriter, seq: int) -> None:
        if self._drop(seq):
            w.remove_pending(seq)
            self._note(seq, None)

    def _note(self, seq: int, row: Pending | None) -> None:
        self.unjournaled.pop(seq, None)
        self.unjournaled[seq] = row
        self.on_change()
        self.unseen.add(seq)

    @contextmanager
    def watch(self, *prefixes: bytes) -> Iterator[KeyWatch]:
        """Have the names below *prefixes* that operations touch noted, while the block runs."""
        watch = KeyWatch(*prefixes)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    def _renew(self, seq: int, row: Pending) -> None:
        """Do what `_drop` and `_put` do where only what the row says changes, not what it is found by."""
        self.rows[seq] = row
        for watch in self._watches:
            watch.note(row)

    def _put(self, seq: int, row: Pending) -> None:
        self.rows[seq] = row
        for watch in self._watches:
            watch.note(row)
        self._by_inode[row.inode].add(seq)
        path = path_of(row)
        if path is not None:
            self._by_path.add(path, seq)
        self._claims.add(seq, touched_keys(row), touched_trees(row))

    def _drop(self, seq: int) -> bool:
        row = self.rows.pop(seq, None)
        if row is None:
            return False
        for watch in self._watches:
            watch.note(row)
        discard(self._by_inode, row.inode, seq)
        path = path_of(row)
        if path is not None:
            self._by_path.discard(path, seq)
        self._claims.discard(seq, touched_keys(row), touched_trees(row))
        return True

    # Questions

    def at(self, path: bytes) -> list[tuple[int, Placed]]:
        """Return the rows that stand for *path*, oldest first."""
        found = [(seq, self.rows[seq]) for seq in sorted(self._by_path.at(path))]
        return found  # type: ignore[return-value]  # Only placed rows are in _by_path.

    def of_inode(self, inode: int) -> list[tuple[int, Pending]]:
        """Return the rows of *inode*, oldest first."""
        return [(seq, self.rows[seq]) for seq in sorted(self._by_inode.get(inode, ()))]

    def below(self, directory: bytes) -> list[tuple[int, Placed]]:
        """Return the rows that stand for paths below *directory*, oldest first."""
        found = [(seq, self.rows[seq]) for seq in sorted(set(self._by_path.below(directory + b"/")))]
        return found  # type: ignore[return-value]  # Only placed rows are in _by_path.

    def touching(self, key: bytes) -> list[tuple[int, Pending]]:
        """Return the rows that read or write exactly *key*, oldest first."""
        return [(seq, self.rows[seq]) for seq in sorted(self._claims.at(key))]

    def next_on(self, key: bytes, after: int) -> Pending | None:
        """Return the first operation after the operation *after* that touches *key*, None if none does."""
        later = [seq for seq in self._claims.on(key, whole_tree=False) if seq > after]
        return self.rows[min(later)] if later else None

    def put_at(self, path: bytes) -> tuple[int, Put] | None:
        for seq, row in self.at(path):
            if isinstance(row, Put):
                return seq, row
        return None

    def keeps(self, path: bytes) -> bool:
        """Return whether the mount shows something at or below *path* that the lake may not list."""
        return bool(self._by_path.at(path)) or self._by_path.has_below(path + b"/")

    def fate(self, key: bytes, after: int = -1) -> bytes | None:
        """Return under which key what the lake has under *key* will be once all is done, None if it goes.

        *after*: the operation that brings it to *key*; earlier ones have passed. A *key* that ends
        in "/" is a directory.
        """
        while True:
            steps = [step for place in (key, *prefixes(key)) for step in self._steps(key, place, after)]
            if not steps:
                return key
            after, target = min(steps)
            if not target:
                return None
            key = target

    def _steps(self, key: bytes, place: bytes, after: int) -> Iterator[tuple[int, bytes]]:
        """Yield each operation on *place* that takes *key* along, and where to: b"" if it goes."""
        for seq in self._claims.at(place):
            row = self.rows[seq]
            if seq <= after:
                continue
            if isinstance(row, Delete) and place == key:
                yield seq, b""
            elif isinstance(row, Move) and row.source == place and (row.is_tree or place == key):
                yield seq, b"" if row.copied else row.key + key[len(place) :]

    def whereabouts(self, key: bytes, before: int = _LAST) -> bytes:
        """Return under which key the lake has now what is under *key* when the operation *before* begins."""
        while True:
            steps = [step for place in (key, *prefixes(key)) for step in self._steps_back(key, place, before)]
            if not steps:
                return key
            before, source = max(steps)
            if not source:
                return key  # What was brought there before was deleted: this came after it.
            key = source

    def _steps_back(self, key: bytes, place: bytes, before: int) -> Iterator[tuple[int, bytes]]:
        """Yield each operation that brings *key* along to *place*, and where from: b"" if it ends there."""
        for seq in self._claims.at(place):
            row = self.rows[seq]
            if seq >= before:
                continue
            if isinstance(row, Delete):
                yield seq, b""  # Of a directory only when it is empty.
            if not isinstance(row, Move) or row.copied or row.key != place:
                continue
            if row.is_tree or place == key:
                yield seq, row.source + key[len(place) :]

    def blocked(self, seq: int) -> bool:
        """Return whether an earlier operation, or one under way, touches the same keys: it goes first."""
        return next(self.blockers(seq), None) is not None

    def blockers(self, seq: int) -> Iterator[int]:
        """Yield the operations that go before *seq*; one may come several times."""
        trees = touched_trees(self.rows[seq])
        for key in touched_keys(self.rows[seq]):
            earlier = self._claims.on(key, whole_tree=key in trees)
            yield from (other for other in earlier if other < seq)
            running = self.running.on(key, whole_tree=key in trees)
            yield from (other for other in running if other != seq)

    def touched_after(self, seq: int, key: bytes) -> bool:
        """Return whether a later operation, or another one under way, touches *key* or, where that
        is a directory's, what is below it.
        """
        whole_tree = key.endswith(b"/")
        if any(other > seq for other in self._claims.on(key, whole_tree=whole_tree)):
            return True
        return any(other != seq for other in self.running.on(key, whole_tree=whole_tree))


def path_of(row: Pending) -> bytes | None:
    """Return the path that the row stands for, None for one that stands for none."""
    return None if isinstance(row, Delete | Orphan) else row.path


def _is_same_place(old: Pending | None, row: Pending) -> bool:
    """Return whether both are Puts of one inode, path and key: that is how most rows change."""
    if not isinstance(old, Put) or not isinstance(row, Put):
        return False
    return old.inode == row.inode and old.path == row.path and old.kind == row.kind


def touched_trees(row: Pending) -> tuple[bytes, ...]:
    """Return those of the touched keys below which all is concerned. A directory's marker goes last."""
    if not isinstance(row, Move | Delete):
        return ()
    return tuple(key for key in touched_keys(row) if key.endswith(b"/"))


def unsent(row: Put) -> Put:
    """Return the row without anything that may be in the lake and is not known to be."""
    return msgspec.structs.replace(row, upload_id="", upload_key=b"", part_bytes=0, upload_ctime_ns=0)


def _nothing() -> None:
    """Nobody wants to know."""
