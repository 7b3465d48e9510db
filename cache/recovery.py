"""At the mover's start, before the first request: make index, journal and staging files agree.

The index is trusted if it bears the mark that a recovery of it was finished: `open_store` removes
it after a power loss, and a corrupt one is made anew without. Then its pending rows are the truth,
and the journal is made equal. Else the journal's rows are the truth, staging files are mended as far
as they lack bytes that were never synced, and the namespace is rebuilt around them:

| row of the journal | staging file | what happens |
|---|---|---|
| OPEN, or sealed with another length | there, was fsynced | cut to the length of the last fsync, sealed |
| OPEN, or sealed with another length | there, was never fsynced | to lost+found; the row goes |
| sealed, conflict, failed | whole | stays, to be uploaded or resolved |
| Put | missing | stays; the mount is read-only |
| Orphan | | both go |
| none | hard-linked into objects/, or empty | goes |
| none | there | to lost+found |

Where the index was lost without a power loss, since it was corrupt, all bytes of staging files are
there: what the journal has as OPEN is sealed at its full length, fsynced or not.

Killed anywhere and run again, it ends the same: mending a file changes nothing the second time;
the index takes mark, rows and nodes in one transaction; the rest follows from what it says then.
With a trusted index, files that no row names were taken from their rows on purpose, or were being
filled for a row that never came: they go.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from cache.index import Index
from cache.index_writer import IndexWriter
from cache.journal import Journal
from cache.journaling import content_of, is_sealed
from cache.model import KIND_DIRECTORY, ROOT_INODE, Inode, ObjectVersion
from cache.pending import (
    CONFLICT,
    OPEN,
    SEALED,
    Delete,
    Local,
    Mark,
    Move,
    Orphan,
    Pending,
    PendingTable,
    Put,
    Restate,
    decode_pending,
    encode_pending,
)
from cache.records import Node
from cache.staging import StagingFiles, as_written

log = logging.getLogger(__name__)

_MARK = b"recovered"
replace = msgspec.structs.replace

Rows = dict[int, Pending]


@dataclass
class Recovered:
    """What a recovery found. *read_only_because*: a line for each row that lacks its staging file."""

    read_only_because: list[str] = field(default_factory=list)
    index_was_lost: bool = False


def recover(
    index: Index,
    journal: Journal,
    staging: StagingFiles,
    table: PendingTable,
    *,
    first: bool,
    is_intact: bool = False,
) -> Recovered:
    """Make all agree and load *table*. Blocks. Raises CacheError, StagingFull, UsageError.

    *first*: the mount is not there yet, so nobody has a file open. *is_intact*: no power loss since
    the staging files were written: an index that was lost was corrupt, or removed.
    """
    staging.prepare()
    recovered = Recovered(index_was_lost=not is_recovered(index))
    if recovered.index_was_lost:
        rows = _rebuild(index, _mended(journal.rows(), staging, is_intact=is_intact), staging)
    else:
        rows = {seq: decode_pending(packed) for seq, packed in index.pending_rows()}
        if first:
            rows = _without_orphans(index, rows, staging)
    make_equal(journal, rows, staging)
    _sweep(index, rows, staging)
    table.load(rows.items())
    recovered.read_only_because = _missing(rows, staging)
    for line in recovered.read_only_because:
        log.critical("%s; the mount is read-only until `sluice fsck` has looked at it", line)
    return recovered


def is_recovered(index: Index) -> bool:
    """Return whether its pending rows are the truth."""
    return index.meta(_MARK) is not None


def staged_numbers(rows: Mapping[int, Pending]) -> set[int]:
    """Return the staging files that rows name, orphans included."""
    return {row.staged for row in rows.values() if isinstance(row, Put | Orphan) and row.staged}


def _missing(rows: Rows, staging: StagingFiles) -> list[str]:
    there = set(staging.numbers())
    return [
        f"{os.fsdecode(row.path)}: its bytes, {staging.path(row.staged)}, are missing"
        for row in rows.values()
        if isinstance(row, Put) and row.staged and row.staged not in there
    ]


def _without_orphans(index: Index, rows: Rows, staging: StagingFiles) -> Rows:
    """Drop what was unlinked while it was open, file first: nobody has it open now."""
    kept = _drop_orphans(rows, staging)
    if len(kept) < len(rows):
        with index.write() as w:
            for seq in rows.keys() - kept.keys():
                w.remove_pending(seq)
    return kept


def _drop_orphans(rows: Rows, staging: StagingFiles) -> Rows:
    """Remove the files of orphans; return the other rows."""
    kept: Rows = {seq: row for seq, row in rows.items() if not isinstance(row, Orphan)}
    for number in staged_numbers(rows) - staged_numbers(kept):
        staging.remove(number)
    return kept


def make_equal(journal: Journal, rows: Rows, staging: StagingFiles) -> None:
    """Write to the journal what it has otherwise, once all that it then promises is on the disk."""
    known = journal.rows()
    changes: dict[int, Pending | None] = {seq: row for seq, row in rows.items() if known.get(seq) != row}
    changes |= dict.fromkeys(known.keys() - rows.keys())
    if not changes:
        return
    durable = {content_of(row) for row in known.values() if is_sealed(row)}
    staging.sync(row.staged for row in changes.values() if is_sealed(row) and content_of(row) not in durable)
    staging.sync_entries()
    journal.write(changes)


def _sweep(index: Index, rows: Rows, staging: StagingFiles) -> None:
    """Remove the staging files that no row names; one that nobody can know of is kept in lost+found."""
    next_staged = int.from_bytes(index.meta(b"next_staged") or b"\1", "big")
    ours = staged_numbers(rows)
    for number in staging.numbers():
        if number in ours:
            continue
        if number >= next_staged and not _is_disposable(number, staging):
            _keep_lost(number, b"", staging)
        else:
            staging.remove(number)


def _is_disposable(number: int, staging: StagingFiles) -> bool:
    """Return whether the file is empty, or its content is in the cache by another name too."""
    status = staging.stat(number)
    return status.st_size == 0 or status.st_nlink > 1


def _keep_lost(number: int, path: bytes, staging: StagingFiles) -> None:
    kept = staging.to_lost_found(number, path)
    log.warning("%s: not known to be whole; kept as %s", os.fsdecode(path) or "a file without a name", kept)


# After the index was lost: the journal's rows and the staging files


def _mended(rows: Rows, staging: StagingFiles, *, is_intact: bool) -> Rows:
    """Return the rows that stand, and have the staging files as these say."""
    rows = _drop_orphans(rows, staging)
    there, lost = set(staging.numbers()), staging.lost_numbers()
    kept: Rows = {}
    for seq, row in rows.items():
        if isinstance(row, Put) and row.staged:
            if row.staged in there:
                mended = _sized_put(row, staging) if is_intact else _mended_put(row, staging)
                if mended is None:
                    continue
                kept[seq] = _perhaps_sent(mended)
            elif row.staged not in lost:  # Else a recovery that was killed moved it there.
                kept[seq] = _perhaps_sent(row)
        else:
            kept[seq] = _perhaps_sent(row)
    for number in there - staged_numbers(rows):
        if not _is_disposable(number, staging):
            _keep_lost(number, b"", staging)
    return kept


def _perhaps_sent(row: Pending) -> Pending:
    """Return the row so that the lake is taken to have what it may have got: the index said when a row
    began, and the journal, which follows it, need not know yet.
    """
    if isinstance(row, Put) and row.state != CONFLICT:
        return replace(row, upload_key=row.upload_key or row.key)
    return replace(row, is_new=False) if isinstance(row, Mark) else row


def _sized_put(row: Put, staging: StagingFiles) -> Put:
    """Return the row as closing the file would have left it: all its bytes are there."""
    status = staging.stat(row.staged)
    if row.state != OPEN and status.st_size == row.size_bytes:
        return row
    state = SEALED if row.state == OPEN else row.state
    return replace(
        row,
        state=state,
        size_bytes=status.st_size,
        sealed_at_s=time.time(),
        mtime_ns=status.st_mtime_ns,
        attributes=as_written(row.attributes, status),
    )


def _mended_put(row: Put, staging: StagingFiles) -> Put | None:
    """Return the row with a staging file that is whole; None if nothing of it was ever synced.

    What was sent at some ctime is no help any more: the file may have that ctime without those bytes.
    """
    staging.forget_mode(row.staged)  # It may be an older one than the row's, which was synced.
    status = staging.stat(row.staged)
    row = replace(row, uploaded=b"", upload_ctime_ns=0)
    if row.state != OPEN and status.st_size == row.size_bytes:
        return row
    if row.synced_bytes < 0:
        if status.st_size:
            _keep_lost(row.staged, row.path, staging)
        else:
            log.warning("%s: was never synced; it is gone", os.fsdecode(row.path))
        return None
    size_bytes = min(row.synced_bytes, status.st_size)
    if status.st_size > size_bytes:
        staging.truncate(row.staged, size_bytes)
    log.warning(
        "%s: kept at the %d bytes of its last fsync (%d were there)",
        os.fsdecode(row.path),
        size_bytes,
        status.st_size,
    )
    return replace(
        row,
        state=SEALED,
        size_bytes=size_bytes,
        sealed_at_s=time.time(),
        mtime_ns=status.st_mtime_ns,
    )


# After the index was lost: the namespace


def _rebuild(index: Index, rows: Rows, staging: StagingFiles) -> Rows:
    """Give all rows their nodes, in one transaction with the mark; return the rows as they are then."""
    used = {*staged_numbers(rows), *staging.numbers(), *staging.lost_numbers(), 0}
    with index.write() as w:
        w.add_root()
        w.clear_pending()
        planted = Planter(w).plant_all(rows)
        for seq, row in planted.items():
            w.put_pending(seq, encode_pending(row))
        w.set_meta(b"next_staged", (max(used) + 1).to_bytes(8, "big"))
        w.set_meta(_MARK, b"1")
    if rows:
        log.info("the index was made anew: %d changes that the lake has not got yet are kept", len(rows))
    return planted


class Places:
    """Where the nodes of *rows* are: what a row brought somewhere, later ones may have carried on."""

    def __init__(self, rows: Rows) -> None:
        self._table = PendingTable()
        self._table.load(rows.items())

    def moved(self, seq: int, row: Move) -> Move | None:
        """Return the move from where the lake has it now to where the mount shows it.

        None where it brings nothing that the mount shows, or a later move of the same node does.
        """
        last = max(other for other, move in self._table.of_inode(row.inode) if isinstance(move, Move))
        key = self._table.fate(row.key, seq)
        if not row.inode or key is None or last != seq:
            return None
        source = self._table.whereabouts(row.source, seq)
        return replace(row, source=source, path=_path_of(key, row), to=b"")


def _path_of(key: bytes, row: Move) -> bytes:
    """Return the path of what *row* moves, once it is under *key*."""
    return key[: len(key) - (len(row.key) - len(row.to or row.path))]


class Planter:
    """Makes nodes for rows, in the transaction of *w*. Several rows may stand for one path."""

    def __init__(self, w: IndexWriter) -> None:
        self._w = w
        self._made: set[Inode] = set()
        self._inodes: dict[int, int] = {0: 0}  # What the rows' nodes were, and are now.
        self._now_ns = time.time_ns()

    def plant_all(self, rows: Rows) -> Rows:
        """Return the rows with the inodes that their nodes have now, 0 for those that need none."""
        places = Places(rows)
        for seq, row in sorted(rows.items()):  # What the lake has, before what was made or changed here.
            if isinstance(row, Move) and (moved := places.moved(seq, row)) is not None:
                self._inodes[row.inode] = self.plant(moved).inode
        planted: Rows = {}
        for is_restate in (False, True):  # What tells of the state of a node comes after what makes it.
            for seq, row in sorted(rows.items()):
                if not isinstance(row, Move) and isinstance(row, Restate) == is_restate:
                    planted[seq] = self.plant(row)
                    self._inodes[row.inode] = planted[seq].inode
        for seq in rows.keys() - planted.keys():
            planted[seq] = replace(rows[seq], inode=self._inodes.get(rows[seq].inode, 0))
        return dict(sorted(planted.items()))

    def plant(self, row: Pending) -> Pending:
        """Return the row with the inode that its node has now, 0 if it needs none."""
        match row:
            case Put():
                content = Node(0, b"", row.kind, max(0, row.size_bytes), row.mtime_ns, staged=row.staged)
                return replace(row, inode=self._place(row.path, content, attributes=row.attributes))
            case Local():
                changed_ns = row.attributes.ctime_ns
                node = Node(0, b"", row.kind, mtime_ns=changed_ns, attributes=row.attributes)
                return replace(row, inode=self._place(row.path, node))
            case Mark():
                # A new directory in the place of one that was moved there has nothing of it.
                origin = None if row.inode in self._inodes else b""
                inode = self._dress_directory(row.path, attributes=row.attributes, origin=origin)
                return replace(row, inode=inode)
            case Move():
                return replace(row, inode=self._place_moved(row))
            case Restate():
                return replace(row, inode=self._restate(row))
            case Delete():
                return replace(row, inode=0)
            case Orphan():
                raise AssertionError("nothing is open after the index was lost")

    def _place_moved(self, row: Move) -> Inode:
        """Make what is shown under its new path while the lake has it under its old one.

        Once it was copied, a listing brings it.
        """
        if row.is_tree:
            return self._dress_directory(row.path, origin=None if row.copied else row.source)
        if row.copied:
            return self._place(row.path, Node(0, b"", row.kind))
        key = row.source.decode("utf-8", "surrogateescape")
        vid = ObjectVersion(key, row.etag, row.size_bytes).id
        node = Node(0, b"", row.kind, row.size_bytes, self._now_ns, row.etag, vid, origin=row.source)
        return self._place(row.path, node)

    def _restate(self, row: Restate) -> Inode:
        """Make what the lake has wear its new attributes; a listing brings the rest of it."""
        if row.kind == KIND_DIRECTORY:
            return self._dress_directory(row.path, attributes=row.attributes)
        known = self._known(row.path)
        if known is not None and known[0] in self._made and not known[1].is_directory:
            self._w.put_node(known[0], replace(known[1], attributes=row.attributes, mtime_ns=row.mtime_ns))
            return known[0]
        node = Node(0, b"", row.kind, mtime_ns=row.mtime_ns, attributes=row.attributes)
        return self._place(row.path, node)

    def _place(self, path: bytes, node: Node, **changes: object) -> Inode:
        """Give *path* this node; a node that an earlier row gave it keeps its inode."""
        parent, name = self._parent_of(path)
        node = replace(node, parent=parent, name=name, **changes)
        known = self._w.child(parent, name)
        if known is not None and known[0] in self._made and known[1].kind == node.kind:
            self._w.put_node(known[0], node)
            return known[0]
        inode = self._w.attach(node)
        self._made.add(inode)
        return inode

    def _dress_directory(self, path: bytes, **changes: object) -> Inode:
        """Return the directory at *path*, made if it is not there, with the *changes* that are no None."""
        inode, node = self._directory(path)
        changes = {name: value for name, value in changes.items() if value is not None}
        self._w.put_node(inode, replace(node, **changes))
        return inode

    def _directory(self, path: bytes) -> tuple[Inode, Node]:
        if not path:
            root = self._w.node(ROOT_INODE)
            assert root is not None
            return ROOT_INODE, root
        parent, name = self._parent_of(path)
        known = self._w.child(parent, name)
        if known is not None and known[1].is_directory:
            return known
        node = Node(parent, name, KIND_DIRECTORY, mtime_ns=self._now_ns)
        inode = self._w.attach(node)
        self._made.add(inode)
        return inode, node

    def _parent_of(self, path: bytes) -> tuple[Inode, bytes]:
        above, _, name = path.rpartition(b"/")
        return self._directory(above)[0], name

    def _known(self, path: bytes) -> tuple[Inode, Node] | None:
        parent, name = self._parent_of(path)
        return self._w.child(parent, name)
