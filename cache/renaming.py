"""What a change of names means for the rows of the pending table.

The rows are a log: carried out in their order, they make the lake what the mount shows. So what
happens now is said in the paths of now, and appended: what was to be done before is done before,
whatever it was, and brings to these paths what the mount shows there. Only the content of a file
that no upload ever began with is in no place yet; its Put moves to the end of the log instead.

An earlier row is changed only where nobody could tell: a move that has not begun, with nothing after
it that touches its keys, may end elsewhere. All of it happens within one transaction of the index,
before the nodes themselves are moved: the paths and keys asked for here are still the old ones.
"""

from __future__ import annotations

import msgspec

from cache.index_writer import IndexWriter
from cache.keys import prefixes
from cache.model import ROOT_INODE
from cache.pending import (
    ANY_ETAG,
    CONFLICT,
    FAILED,
    SEALED,
    Delete,
    Local,
    Mark,
    Move,
    Pending,
    PendingTable,
    Placed,
    Put,
    Restate,
    object_key,
    unsent,
)
from cache.records import Node

_LOCAL_NODES_MAX = 512  # A directory of more is taken to be in the lake: a Move that finds nothing is cheap.
EXCHANGE_NAME = b".sluice-exchange-%x"  # Where one of two that change places is for a moment.

replace = msgspec.structs.replace


class RowChanges:
    """The rows of *table* and their changes in the transaction of *w*."""

    def __init__(self, w: IndexWriter, table: PendingTable) -> None:
        self._w = w
        self._table = table

    # What loses its name, or its content

    def drop_file(self, inode: int, node: Node, path: bytes, successor_key: bytes = b"") -> str:
        """Have the lake lose a file, symlink or local node. Its staging file is the caller's.

        *successor_key*: where what takes its place is to be put. Returns what the lake has
        there: an ETag, ANY_ETAG where that is not known, "" if nothing.
        """
        key = object_key(path, node.kind)
        base = self._base_at(inode, node, key)
        is_foreign = any(isinstance(row, Put) and row.state == CONFLICT for _, row in self._rows(inode))
        self._drop_rows(inode, node)
        if key == successor_key and not self._moves_of(inode):
            return base
        if base and not is_foreign:
            self._take_away(Delete(key, 0 if node.staged else inode))
        return ""

    def stage(self, inode: int, node: Node, path: bytes) -> str:
        """Have nothing done any more with the file's old content; return the base of the new one."""
        base = self._base_at(inode, node, path)
        self._drop_rows(inode, node)
        return base

    def drop_directory(self, inode: int, path: bytes) -> None:
        """Have the lake lose the marker of an empty directory."""
        has_marker = True
        for seq, row in self._rows(inode):
            if isinstance(row, Mark) and row.is_new and seq not in self._table.running:
                has_marker = False
            if isinstance(row, Mark | Restate):
                self._table.remove(self._w, seq)
        if has_marker or self._moves_of(inode):
            self._table.add(self._w, Delete(path + b"/"))

    def _rows(self, inode: int) -> list[tuple[int, Pending]]:
        return self._table.of_inode(inode)

    def _base_at(self, inode: int, node: Node, key: bytes) -> str:
        """Return what the lake has under *key*, the node's, once all that is pending is done: an ETag,
        ANY_ETAG where that is not known, "" if nothing.
        """
        for seq, row in self._rows(inode):
            if isinstance(row, Put):
                return ANY_ETAG if self._may_be_sent(seq, row) else row.base_etag
            if isinstance(row, Local):
                return ""
        moves = self._moves_of(inode)
        if moves and self._is_free(*moves[-1]):
            return ANY_ETAG if moves[-1][1].replaces else ""  # It need never get there.
        is_known = self._w.key_of(inode) == key and not self._table.touched_after(-1, key)
        return node.etag if is_known and node.etag else ANY_ETAG

    def _may_be_sent(self, seq: int, row: Put) -> bool:
        """Return whether the lake may have, or get, some state of the file under the row's key."""
        return seq in self._table.running or bool(row.upload_key or row.uploaded)

    def _drop_rows(self, inode: int, node: Node) -> None:
        """Take the rows of a node whose content nobody wants any more, as far as they have not begun."""
        moves = []
        for seq, row in self._rows(inode):
            if isinstance(row, Put | Restate | Local):
                self._table.remove(self._w, seq)
            elif isinstance(row, Move) and not row.copied:
                moves.append((seq, row))
        for seq, row in reversed(moves):
            if self._is_free(seq, row):
                self._table.replace(self._w, seq, Delete(row.source, 0 if node.staged else inode))

    def _is_free(self, seq: int, row: Move) -> bool:
        """Return whether the move has not begun, and nothing after it depends on where it ends."""
        if seq in self._table.running:
            return False
        return not (self._table.touched_after(seq, row.source) or self._table.touched_after(seq, row.key))

    # What gets another name

    def move_file(self, inode: int, node: Node, old: bytes, new: bytes, base: str) -> bytes:
        """Have the lake get what is no directory under the path *new*; return the node's origin.

        *base*: what the lake has there, as `drop_file` returns it.
        """
        rows = self._rows(inode)
        restates = [(seq, row) for seq, row in rows if isinstance(row, Restate)]
        for seq, _ in restates:
            self._table.remove(self._w, seq)
        for seq, row in rows:
            if isinstance(row, Put):
                self._move_put(seq, row, new, base)
            elif isinstance(row, Local):
                self._table.replace(self._w, seq, replace(row, path=new))
        origin = node.origin
        if _is_clean(node, rows):
            move = Move(object_key(old, node.kind), new, inode, node.kind, node.etag, node.size_bytes)
            origin = self._add_move(inode, replace(move, replaces=bool(base)))
        for _, restate in restates:
            self._table.add(self._w, replace(restate, path=new))
        return origin

    def _move_put(self, seq: int, row: Put, new: bytes, base: str) -> None:
        """Have the content sent to *new*. What was, or is being, sent to the old key moves there, too."""
        state = SEALED if row.state in (CONFLICT, FAILED) else row.state
        moved = replace(unsent(row), path=new, base_etag=base, state=state, error="", uploaded=b"")
        if self._may_be_sent(seq, row):
            self._table.remove(self._w, seq)
            self._take_away(Move(row.key, new, 0, row.kind))
            self._table.add(self._w, replace(moved, base_etag=ANY_ETAG, upload_key=moved.key))
            return
        if self._table.touched_after(seq, moved.key):
            self._table.remove(self._w, seq)
            self._table.add(self._w, moved)
        else:
            self._table.replace(self._w, seq, moved)
        if row.base_etag and row.state != CONFLICT:
            self._take_away(Delete(row.key))

    def _add_move(self, inode: int, move: Move, *, may_join: bool = True) -> bytes:
        """Have the lake carry out *move* after all else; return the node's origin.

        *may_join*: it may be one with the last move of this node, if nothing came between.
        """
        there = self._w.key_of(inode) + (b"/" if move.is_tree else b"")
        moves = self._moves_of(inode)
        if moves and may_join and self._is_free(*moves[-1]):
            seq, last = moves[-1]
            self._table.remove(self._w, seq)
            if last.replaces:
                self._take_away(Delete(last.key))
            if last.source == move.key:
                return there if self._table.whereabouts(last.source) != last.source else b""
            move = replace(move, source=last.source, etag=last.etag, size_bytes=last.size_bytes)
        self._take_away(move)
        return there

    def _take_away(self, row: Delete | Move) -> None:
        """Have the lake lose what it has, or may get, under a key.

        What brought it there made the directories above it too, where the lake has directories.
        """
        self._table.add(self._w, row)
        for prefix in prefixes(row.key if isinstance(row, Delete) else row.source):
            for seq, mark in self._table.touching(prefix):
                if isinstance(mark, Mark) and mark.is_new:
                    self._table.replace(self._w, seq, replace(mark, is_new=False))

    def _moves_of(self, inode: int) -> list[tuple[int, Move]]:
        """Return the moves that the node still has to make, in their order."""
        return [(seq, row) for seq, row in self._rows(inode) if isinstance(row, Move) and not row.copied]

    # Directories

    def move_directory(self, inode: int, node: Node, old: bytes, new: bytes) -> bytes:
        """Have the lake get a directory, with all below it, under *new*; return the node's origin."""
        is_local = self._is_local(inode, node)
        below = self._table.below(old)
        rows: list[tuple[int, Placed]] = [
            (seq, row) for seq, row in self._rows(inode) if isinstance(row, Mark | Restate)
        ]
        rows += [(seq, row) for seq, row in below if not isinstance(row, Move)]
        may_join = not any(isinstance(row, Put) and self._may_be_sent(seq, row) for seq, row in rows)
        for seq, _ in rows:
            self._table.remove(self._w, seq)
        origin = b""
        if not is_local:
            origin = self._add_move(inode, Move(old + b"/", new, inode, node.kind), may_join=may_join)
        for seq, row in rows:
            self._table.add(self._w, self._moved_along(seq, row, new + row.path[len(old) :]))
        for seq, move in [(seq, row) for seq, row in below if isinstance(row, Move)]:
            carried = replace(move, path=new + move.path[len(old) :], to=move.to or move.path)
            self._table.replace(self._w, seq, carried)
        return origin

    def _moved_along(self, seq: int, row: Placed, path: bytes) -> Placed:
        """Return a row at or below a directory that was renamed as it stands for *path*: what it brought,
        or may bring yet, to its old path is moved there with the directory.
        """
        match row:
            case Put(state="conflict"):
                return replace(row, path=path)
            case Put():
                base = ANY_ETAG if row.base_etag else ""
                moved = replace(unsent(row), path=path, base_etag=base, uploaded=b"")
                if self._may_be_sent(seq, row):
                    moved = replace(moved, base_etag=ANY_ETAG, upload_key=moved.key)
                return moved
            case Mark():
                return replace(row, path=path, is_new=row.is_new and seq not in self._table.running)
            case _:
                return replace(row, path=path)

    def _is_local(self, inode: int, node: Node) -> bool:
        """Return whether the lake has nothing of the directory, and won't get it where it is now."""
        left, seen = [(inode, node)], 0
        while left:
            inode, node = left.pop()
            seen += 1
            if seen > _LOCAL_NODES_MAX or not self._is_unsent(inode, node):
                return False
            if node.is_directory:
                children = [child for child, _ in self._w.names(inode)]
                left += [(child, found) for child in children if (found := self._w.node(child)) is not None]
        return True

    def _is_unsent(self, inode: int, node: Node) -> bool:
        """Return whether the lake has nothing of this one node."""
        rows = self._rows(inode)
        if node.origin or any(seq in self._table.running for seq, _ in rows):
            return False
        if node.is_directory:
            return any(isinstance(row, Mark) and row.is_new for _, row in rows)
        return any(
            isinstance(row, Local)
            or (isinstance(row, Put) and not row.base_etag and not self._may_be_sent(seq, row))
            for seq, row in rows
        )

    # What is left

    def keep_if_empty(self, directory: int) -> None:
        """Have the directory marked in the lake if its last entry is gone, so that it survives."""
        node = self._w.node(directory)
        if directory == ROOT_INODE or node is None or next(self._w.names(directory), None) is not None:
            return
        if not any(isinstance(row, Mark) for _, row in self._rows(directory)):
            self._table.add(self._w, Mark(self._w.path_of(directory), directory, node.attributes))


def _is_clean(node: Node, rows: list[tuple[int, Pending]]) -> bool:
    """Return whether the node's content is the lake's: neither staged nor of this machine only."""
    return not node.staged and not any(isinstance(row, Put | Local) for _, row in rows)
