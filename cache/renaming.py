"""What a change of names means for the rows of the pending table.

All of it happens within one transaction of the index, before the nodes themselves are moved: the
paths and keys asked for here are still the old ones. A row gets the next sequence number whenever
something later could touch its new key: operations on one key are carried out in their order.

What is being sent can't be changed. Its row may still leave: whoever sends finds no row then, and
what he did is undone by the Delete that took its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from cache.index import IndexWriter
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
    Orphan,
    Pending,
    PendingTable,
    Placed,
    Put,
    Restate,
    object_key,
    prefixes,
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

    # What loses its name

    def drop_file(self, inode: int, node: Node, path: bytes, successor_key: bytes = b"") -> str:
        """Have the lake lose a file, symlink or local node. Its staging file is the caller's.

        *successor_key*: where what takes its place is to be put. Returns what the lake has
        there: an ETag, ANY_ETAG where that is not known, "" if nothing.
        """
        key, base = object_key(path, node.kind), ""
        gone: list[bytes] = []
        was_to_move = bool(self._moves_of(inode))
        for seq, row in self._table.of_inode(inode):
            if isinstance(row, Delete | Orphan):
                continue
            base = self._base_left_by(seq, row) or base
            gone += self._keys_left_by(seq, row)
            self._take_back(seq, row)
        if node.etag and not node.staged:
            there = self._w.key_of(inode)
            gone += [there, *self.landings(there)]
            base = base or self._base_of(node, there, key, is_brought=not was_to_move or key in gone)
        self._delete((one for one in gone if one != successor_key), inode if not node.staged else 0)
        return base if key == successor_key else ""

    def _base_of(self, node: Node, there: bytes, key: bytes, *, is_brought: bool) -> str:
        """Return what the lake has under *key* where a clean node is shown that it has at *there*.

        *is_brought*: if these are two keys, a directory's move brings it to *key*.
        """
        if there == key:
            return node.etag
        return ANY_ETAG if is_brought else ""

    def _base_left_by(self, seq: int, row: Pending) -> str:
        """Return the ETag of what the lake has where *row* leads, "" where the row does not tell."""
        is_running = seq in self._table.running
        match row:
            case Put():
                return ANY_ETAG if is_running or row.upload_key == row.key else row.base_etag
            case Move():
                return ANY_ETAG if is_running or row.replaces or row.copied else ""
            case _:
                return ANY_ETAG if is_running else ""

    def _keys_left_by(self, seq: int, row: Pending) -> list[bytes]:
        """Return the keys that *row*, which is taken back, leaves something under, but a move's source."""
        running = self._table.running.get(seq, ())
        match row:
            case Put():
                uploaded = [*running, row.upload_key] if row.upload_key else [*running]
                brought = [place for key in uploaded for place in self.landings(key)]
                return [] if row.state == CONFLICT else [*uploaded, *brought, *self._base_keys(row)]
            case Move():
                at_target = [row.key] if row.replaces or row.copied else []
                return [*running[1:], *at_target]
            case Mark() if running or not row.is_new:
                return [row.key]
        return []

    def _base_keys(self, row: Put) -> list[bytes]:
        """Return where the lake has, or will have, what the content was based on."""
        if not row.base_etag or row.state == CONFLICT:  # After a conflict that is somebody else's.
            return []
        there = self._w.key_of(row.inode)
        return [there, *self.landings(there)]

    def drop_directory(self, inode: int, node: Node, path: bytes, *, has_successor: bool = False) -> None:
        """Have the lake lose the marker of an empty directory, unless another directory follows it."""
        gone: list[bytes] = []
        has_marker = True
        for seq, row in self._table.of_inode(inode):
            if isinstance(row, Delete):
                continue
            if isinstance(row, Mark) and row.is_new and seq not in self._table.running:
                has_marker = False
            gone += self._keys_left_by(seq, row)
            self._take_back(seq, row)
        if has_marker:
            there = self._w.key_of(inode) + b"/"
            gone += [there, *self.landings(there)]
        self._delete((one for one in gone if not has_successor or one != path + b"/"), 0)

    def _take_back(self, seq: int, row: Pending) -> None:
        """Have the row undone. In the place of a move comes the Delete of its source: something new may
        be waiting to be put there.
        """
        if isinstance(row, Move) and row.source != row.key:
            self._table.replace(self._w, seq, Delete(row.source, 0 if row.is_tree else row.inode))
        else:
            self._table.remove(self._w, seq)

    def _delete(self, keys: Iterable[bytes], inode: int) -> None:
        """Have the lake lose *keys*. Where something new is to be put, that replaces what is there."""
        for key in dict.fromkeys(keys):
            brought = [
                (seq, row)
                for seq, row in self._table.touching(key)
                if isinstance(row, Put | Mark | Move) and row.key == key and not _is_done(row)
            ]
            for seq, row in brought:
                if isinstance(row, Put) and row.state != CONFLICT:
                    self._table.replace(self._w, seq, replace(row, base_etag=ANY_ETAG))
            if not brought:
                self._table.add(self._w, Delete(key, inode))

    def landings(self, key: bytes, after: int = -1) -> Iterator[bytes]:
        """Yield where moves of whole directories, under way or to come, bring *key*, one after the other.

        *after*: the number of the operation that brings it to *key*.
        """
        moves = {seq: keys for seq, keys in self._table.running.items() if len(keys) == 2}
        for prefix in prefixes(key):
            for seq, row in self._table.touching(prefix):
                if isinstance(row, Move) and not row.copied:
                    moves[seq] = (row.source, row.key)
        for seq, (source, target) in sorted(moves.items()):
            if seq > after and source.endswith(b"/") and key.startswith(source) and key != source:
                landing = target + key[len(source) :]
                yield landing
                yield from self.landings(landing, seq)

    # What is written to

    def stage(self, inode: int, node: Node, path: bytes) -> str:
        """Have nothing done any more with the file's old content; return the base of the new one.

        That of an object which was still to be moved here is to go.
        """
        gone: list[bytes] = []
        base, was_to_move = "", bool(self._moves_of(inode))
        for seq, row in self._table.of_inode(inode):
            if isinstance(row, Restate) or (isinstance(row, Move) and not row.copied):
                base = self._base_left_by(seq, row) or base
                gone += self._table.running.get(seq, ()) if isinstance(row, Move) else ()
                self._take_back(seq, row)
        there = self._w.key_of(inode)
        self._delete((key for key in gone if key != path), 0)
        return base or self._base_of(node, there, path, is_brought=not was_to_move)

    # What gets another name

    def move_file(self, inode: int, node: Node, old: bytes, new: bytes, base: str) -> bytes:
        """Have the lake get what is no directory under the path *new*; return the node's origin.

        *base*: what the lake has there, as `drop_file` returns it.
        """
        rows = self._table.of_inode(inode)
        restates = [self._take(seq, row) for seq, row in rows if isinstance(row, Restate)]
        origin = node.origin
        puts = [(seq, row) for seq, row in rows if isinstance(row, Put)]
        for seq, put in puts:
            self._move_put(seq, put, new, base)
        for seq, row in rows:
            if isinstance(row, Local):
                self._table.replace(self._w, seq, replace(row, path=new))
        if node.etag and not node.staged:
            origin = self._move_object(inode, node, new, replaces=bool(base))
        for restate in restates:
            self._table.add(self._w, replace(restate, path=new))
        return origin

    def _take(self, seq: int, row: Restate) -> Restate:
        self._table.remove(self._w, seq)
        return row

    def _move_put(self, seq: int, row: Put, new: bytes, base: str) -> None:
        """Have the content sent to *new*; what it was based on is to go.

        What is being sent to the old key is moved on by the uploader, which knows `upload_key`.
        """
        gone = self._base_keys(row)
        state = SEALED if row.state in (CONFLICT, FAILED) else row.state
        self._readdress(seq, row, replace(row, path=new, base_etag=base, state=state, error=""))
        self._delete((key for key in gone if key != object_key(new, row.kind)), 0)

    def _readdress(self, seq: int, old: Placed, row: Placed) -> None:
        """Put *row* in the place of *old*, behind all that touches its new key."""
        if not self._table.touched_after(seq, row.key):
            self._table.replace(self._w, seq, row)
            return
        self._table.remove(self._w, seq)
        if isinstance(old, Put) and isinstance(row, Put):
            gone = [old.upload_key] if old.upload_key else []
            gone += self._table.running.get(seq, ())
            brought = [place for key in gone for place in self.landings(key)]
            self._delete((key for key in (*gone, *brought) if key != row.key), 0)
            row = replace(row, upload_id="", upload_key=b"", part_bytes=0, upload_ctime_ns=0)
        self._table.add(self._w, row)

    def _move_object(self, inode: int, node: Node, new: bytes, *, replaces: bool) -> bytes:
        """Have the object moved within the lake; return the node's origin."""
        moves = self._moves_of(inode)
        if moves:
            seq, row = moves[-1]
            if self._retarget(seq, row, new, replaces=replaces) or len(moves) > 1:
                return node.origin
            return b""  # It is back where it came from.
        return self._add_move(inode, node, self._w.key_of(inode), new, replaces=replaces)

    def _add_move(self, inode: int, node: Node, origin: bytes, new: bytes, *, replaces: bool) -> bytes:
        # A move to where it is already keeps it from being moved along with a directory above it.
        landings = list(self.landings(origin))
        move = Move(origin, new, inode, node.kind, node.etag, node.size_bytes, replaces=replaces)
        self._delete((key for key in landings if key != move.key), 0)
        self._table.add(self._w, move)
        return origin

    def _moves_of(self, inode: int) -> list[tuple[int, Move]]:
        """Return the moves that the node still has to make, in their order."""
        rows = self._table.of_inode(inode)
        return [(seq, row) for seq, row in rows if isinstance(row, Move) and not row.copied]

    def _retarget(self, seq: int, row: Move, new: bytes, *, replaces: bool) -> bool:
        """Have a pending move end at *new*; return False where nothing is left to be moved.

        What came later to its source must stay later, and what came later to *new* earlier. Where
        both can't be had, or the move is under way, another one follows it.
        """
        if self._retarget_in_place(seq, row, new, replaces=replaces):
            return seq in self._table.rows
        moved = replace(row, path=new, replaces=replaces)
        free = seq not in self._table.running and row.source != moved.key
        if free and not self._table.touched_after(seq, row.source):
            self._table.remove(self._w, seq)
            self._table.add(self._w, moved)
            self._delete([row.key] if row.replaces else [], 0)
            self._delete_moved_along(row.source, moved)
        else:
            self._table.add(self._w, replace(moved, source=row.key))
        return True

    def _retarget_in_place(self, seq: int, row: Move, new: bytes, *, replaces: bool) -> bool:
        """Have a pending move end at *new*, or be none if that is its source; return whether it can be."""
        moved = replace(row, path=new, replaces=replaces)
        if seq in self._table.running or self._table.touched_after(seq, moved.key):
            return False
        if row.source == moved.key and next(self.landings(row.source), None) is None:
            self._table.remove(self._w, seq)
        else:
            self._table.replace(self._w, seq, moved)
            self._delete_moved_along(row.source, moved)
        self._delete([row.key] if row.replaces else [], 0)
        return True

    # Directories

    def move_directory(self, inode: int, node: Node, old: bytes, new: bytes, *, replaces: bool) -> bytes:
        """Have the lake get a directory, with all below it, under *new*; return the node's origin.

        *replaces*: there was another one, of which the lake may have the marker.
        """
        rows: list[tuple[int, Placed]] = [
            (seq, row) for seq, row in self._table.of_inode(inode) if isinstance(row, Mark | Restate)
        ]
        rows += [(seq, row) for seq, row in self._table.below(old) if self._is_at(row)]
        origin, carried = self._move_tree(inode, node, new, replaces=replaces)
        for seq, row in rows:
            path = new if row.inode == inode else new + row.path[len(old) :]
            if isinstance(row, Mark) and row.inode == inode:
                row = replace(row, is_new=row.is_new and not replaces)
            self._move_row(seq, row, path, carried=carried)
        return origin

    def _is_at(self, row: Placed) -> bool:
        """Return whether the row's node is where the row says: it may be about to be moved along."""
        return self._w.node(row.inode) is not None and self._w.path_of(row.inode) == row.path

    def _move_tree(self, inode: int, node: Node, new: bytes, *, replaces: bool) -> tuple[bytes, bool]:
        """Have what the lake has of a directory moved.

        Returns the node's origin, and whether a move that comes after all that was to be done so
        far carries its results along: from the old path, not from where a move further up begins.
        """
        moves = self._moves_of(inode)
        if not moves:
            if self._is_local(inode, node):
                return b"", False
            origin = self._w.key_of(inode) + b"/"
            carried = origin == self._w.path_of(inode) + b"/"
            return self._add_move(inode, node, origin, new, replaces=replaces), carried
        seq, row = moves[-1]
        if self._retarget_in_place(seq, row, new, replaces=replaces):
            return (node.origin if self._moves_of(inode) else b""), False
        self._table.add(self._w, replace(row, source=row.key, path=new, replaces=replaces))
        return node.origin, row.path == self._w.path_of(inode)

    def _delete_moved_along(self, source: bytes, moved: Move) -> None:
        """A directory's move that ends elsewhere than it was to brings what was deleted there, too."""
        if not moved.is_tree:
            return
        keys = [row.key for row in self._table.rows.values() if isinstance(row, Delete)]
        below = [key for key in keys if key.startswith(source) and key != source]
        self._delete((moved.key + key[len(source) :] for key in below), 0)

    def _move_row(self, seq: int, row: Placed, path: bytes, *, carried: bool) -> None:
        """Have a row below a directory that was renamed stand for *path*.

        *carried*: what the row brings to its old path goes on with the directory.
        """
        is_running = seq in self._table.running
        match row:
            case Put(state="conflict") | Local():
                self._readdress(seq, row, replace(row, path=path))
            case Put() if not (carried and is_running):
                base = ANY_ETAG if row.base_etag else ""
                self._readdress(seq, row, replace(row, path=path, base_etag=base))
            case Mark() if not (carried and is_running):
                self._readdress(seq, row, replace(row, path=path))
            case Restate():
                self._table.remove(self._w, seq)
                self._table.add(self._w, replace(row, path=path))
            case Move(copied=False) if not carried and self._moves_of(row.inode)[-1][0] == seq:
                self._retarget_below(seq, row, path)

    def _retarget_below(self, seq: int, row: Move, path: bytes) -> None:
        node = self._w.node(row.inode)
        if (
            not self._retarget(seq, row, path, replaces=False)
            and node is not None
            and not self._moves_of(row.inode)
        ):
            self._w.put_node(row.inode, replace(node, origin=b""))

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
        rows = self._table.of_inode(inode)
        if node.origin or any(seq in self._table.running for seq, _ in rows):
            return False
        if node.is_directory:
            return any(isinstance(row, Mark) and row.is_new for _, row in rows)
        return any(isinstance(row, Local) or (isinstance(row, Put) and not row.base_etag) for _, row in rows)

    # What is left

    def keep_if_empty(self, directory: int) -> None:
        """Have the directory marked in the lake if its last entry is gone, so that it survives."""
        node = self._w.node(directory)
        if directory == ROOT_INODE or node is None or next(self._w.names(directory), None) is not None:
            return
        if not any(isinstance(row, Mark) for _, row in self._table.of_inode(directory)):
            self._table.add(self._w, Mark(self._w.path_of(directory), directory, node.attributes))


def _is_done(row: Pending) -> bool:
    return isinstance(row, Move) and row.copied
