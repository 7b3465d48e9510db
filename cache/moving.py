"""What changes in the lake without bytes of ours: moves, deletes, markers of directories, metadata.

Each step can be done twice. Of a move: copy all, then one transaction that says so (`Move.copied`, origins
and ETags), then delete the old keys, then the row goes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import trio

from cache.committer import Committer
from cache.contents import Stale
from cache.errors import LakeError, ObjectChanged, ObjectExists, ObjectMissing
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.journaling import JournalKeeper
from cache.keys import prefixes
from cache.lake_io import LakeIO
from cache.metadata import metadata_of, restated
from cache.model import Inode, ObjectInfo, ObjectVersion
from cache.pending import Delete, Mark, Move, PendingTable, Restate
from cache.records import Node
from cache.restating import know_again, renewed
from cache.sending import run_all
from cache.uploading import put_origin

log = logging.getLogger(__name__)

DELETE_KEYS_MAX = 1000  # In one request.
_COPIES_AT_ONCE = 32
_CHANGES_MAX = 3  # Times that an object may change while it is copied.
replace = msgspec.structs.replace


@dataclass(frozen=True, slots=True)
class _Copied:
    """*source* is what was copied; *info* what it became, None if neither was there."""

    source: ObjectVersion
    info: ObjectInfo | None


@dataclass
class _Tree:
    """A directory's move under way: what was found under its old keys."""

    source: str
    target: str
    copied: list[_Copied] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)  # Old keys that are to be deleted.


class Moves:
    """Carries out Move, Delete, Mark and Restate rows.

    All raise LakeError and leave the row, Stale where there is nothing to do. *waits*: a Delete must
    wait, since somebody has the file open. `changed` gets the entries that turned out to be something
    else in the lake: for the lister to look at.
    """

    def __init__(
        self,
        lake: LakeIO,
        index: Index,
        committer: Committer,
        table: PendingTable,
        keeper: JournalKeeper,
        waits: Callable[[Delete], bool],
    ) -> None:
        self._lake = lake
        self._index = index
        self._committer = committer
        self._table = table
        self._keeper = keeper
        self._waits = waits
        self._copies = trio.CapacityLimiter(_COPIES_AT_ONCE)
        self.changed: list[tuple[Inode, bytes]] = []

    async def move(self, seq: int) -> None:
        row = self._table.rows.get(seq)
        if not isinstance(row, Move):
            raise Stale(str(seq))
        if row.is_tree:
            await self._move_tree(seq, row)
            await self._finish(seq)
            return
        is_as_known = await self._move_file(seq, row)
        await self._finish(seq)
        if not is_as_known:  # To be told last: while an operation touches a name, no listing changes it.
            self._note_changed(row.inode)

    # One object

    async def _move_file(self, seq: int, row: Move) -> bool:
        """Return whether the object was there, and was the one that the index knows."""
        source, target = os.fsdecode(row.source), os.fsdecode(row.key)
        is_as_known = True
        if not row.copied:
            asked = await self._asked(row, source)
            copied = await self._copy(asked, target) if asked.etag else _Copied(asked, None)
            await self._committer.commit(lambda w: self._flip_file(w, seq, row, copied))
            is_as_known = copied.info is not None and copied.source == asked
        await self._keeper.settled()
        await self._delete([source])
        return is_as_known

    async def _asked(self, row: Move, source: str) -> ObjectVersion:
        """Return what is to be moved, without an ETag if nothing is there. Raises LakeError."""
        await self._know_again(row.inode)
        node = self._index.node(row.inode) if row.inode else None
        if node is not None and node.etag and self._index.key_of(row.inode) == row.source:
            # Its metadata may have been restated since the row was made: that is another ETag.
            return ObjectVersion(source, node.etag, node.size_bytes)
        if row.etag:
            return ObjectVersion(source, row.etag, row.size_bytes)
        try:
            return (await self._lake.head(source)).version
        except ObjectMissing:
            return ObjectVersion(source, "", 0)

    async def _copy(self, version: ObjectVersion, target: str) -> _Copied:
        """Copy *version*, or what has taken its place meanwhile. It may have been copied already."""
        key = version.key
        for _ in range(_CHANGES_MAX):
            try:
                async with self._copies:
                    return _Copied(version, await self._lake.copy(version, target))
            except ObjectChanged:
                log.warning("%s: changed in the lake while it was moved; what is there now moves", key)
            except ObjectMissing:
                return await self._arrived(version, target)
            try:
                version = (await self._lake.head(version.key)).version
            except ObjectMissing:
                return await self._arrived(version, target)
        raise ObjectChanged(f"{version.key}: changes again and again while it is moved")

    async def _arrived(self, version: ObjectVersion, target: str) -> _Copied:
        """Tell what became of an object that is not under its old key any more."""
        try:
            info = await self._lake.head(target)
        except ObjectMissing:
            info = None
        if info is not None and info.version.size_bytes == version.size_bytes:
            return _Copied(version, info)  # Copied and deleted, and the end of the process came first.
        log.warning("%s: is gone from the lake, it can't be moved", version.key)
        return _Copied(version, None)

    def _flip_file(self, w: IndexWriter, seq: int, row: Move, copied: _Copied) -> None:
        now = self._table.rows[seq]
        assert isinstance(now, Move), now  # Nobody takes the row of what is under way.
        self._table.replace(w, seq, replace(now, copied=True, error=""))
        node = w.node(row.inode) if row.inode else None
        if copied.info is not None:
            self._tell_followers(w, seq, row.key, copied.info.version.etag)
        if node is not None and not node.staged and w.key_of(row.inode) == row.source:
            _place(w, row.inode, self._with_etag(w, row.inode, node, copied), row.key)

    def _tell_followers(self, w: IndexWriter, seq: int, key: bytes, etag: str) -> None:
        """Have moves that wait for this one to go on from *key* know what they will find."""
        for other, row in self._table.touching(key):
            if other != seq and isinstance(row, Move) and row.source == key and row.etag:
                self._table.replace(w, other, replace(row, etag=etag))

    def _with_etag(self, w: IndexWriter, inode: int, node: Node, copied: _Copied) -> Node:
        """Return the node of what was copied, if it is that, with the ETag that it has now."""
        source = copied.source
        if copied.info is None or (node.etag, node.size_bytes) != (source.etag, source.size_bytes):
            return node
        return renewed(w, self._table, inode, node, copied.info.version.etag)

    def _note_changed(self, inode: int) -> None:
        node = self._index.node(inode) if inode else None
        if node is not None and not self._index.is_detached(inode):
            self.changed.append((Inode(node.parent), node.name))

    async def _finish(self, seq: int) -> None:
        def change(w: IndexWriter) -> None:
            self._table.running.end(seq)
            self._table.remove(w, seq)

        await self._committer.commit(change)

    # A directory

    async def _move_tree(self, seq: int, row: Move) -> None:
        tree = _Tree(os.fsdecode(row.source), os.fsdecode(row.key))
        arrived = await self._sizes_below(tree.target) if row.copied else {}

        async def move_page(page: Sequence[ObjectInfo]) -> None:
            found = [info.version for info in page]
            wanted = [version for version in found if self._is_wanted(seq, tree, version, arrived)]
            if row.copied:  # Again, after a power loss: an operation that comes next may have put these here.
                tree.gone += {version.key for version in found} - {version.key for version in wanted}
                return
            tree.gone += [version.key for version in found]
            moves = iter(wanted)
            await run_all([partial(self._copy_some, tree, moves)] * min(_COPIES_AT_ONCE, len(wanted)))

        await self._each_page(tree.source, move_page)
        directories = await self._directories(tree.source)
        for prefix in directories:  # Some may be empty.
            await self._lake.put(tree.target + prefix[len(tree.source) :], b"", {})
        if not row.copied:
            await self._committer.commit(lambda w: self._flip_tree(w, seq, row, tree))
        await self._keeper.settled()
        await self._delete([*tree.gone, *reversed(directories)])

    def _is_wanted(self, seq: int, tree: _Tree, version: ObjectVersion, arrived: dict[str, int]) -> bool:
        """Return whether the object is to be copied: not if it is there, or is to be deleted there next."""
        target = tree.target + version.key[len(tree.source) :]
        if arrived.get(target) == version.size_bytes:
            return False
        row = self._table.next_on(os.fsencode(target), seq)
        return not (isinstance(row, Delete) and row.key == os.fsencode(target) and not self._waits(row))

    async def _copy_some(self, tree: _Tree, versions: Iterator[ObjectVersion]) -> None:
        for version in versions:
            copied = await self._copy(version, tree.target + version.key[len(tree.source) :])
            tree.copied.append(copied)

    async def _each_page(self, prefix: str, take: Callable[[Sequence[ObjectInfo]], Awaitable[None]]) -> None:
        """Have *take* called for each page of what is below *prefix*."""
        token: str | None = None
        while True:
            page = await self._lake.list_page(prefix, token, delimiter=False)
            await take(page.objects)
            token = page.next_token
            if token is None:
                return

    async def _sizes_below(self, prefix: str) -> dict[str, int]:
        sizes: dict[str, int] = {}

        async def take(page: Sequence[ObjectInfo]) -> None:
            sizes.update({info.version.key: info.version.size_bytes for info in page})

        await self._each_page(prefix, take)
        return sizes

    async def _directories(self, prefix: str) -> list[str]:
        """Return the directory *prefix*, if it is there, and all below it, deeper ones later.

        A bucket has none: there a directory is nothing but its objects, a marker among them.
        """
        if not self._lake.lake.has_directories:
            return []
        try:
            await self._lake.head(prefix)
        except ObjectMissing:
            return []
        found, left = [prefix], [prefix]
        while left:
            page = await self._lake.list_page(left.pop(), None)
            left += page.prefixes
            found += page.prefixes
        return found

    def _flip_tree(self, w: IndexWriter, seq: int, row: Move, tree: _Tree) -> None:
        now = self._table.rows[seq]
        assert isinstance(now, Move), now
        self._table.replace(w, seq, replace(now, copied=True, error=""))
        origins = self._origins_below(w, row.source) | {row.source: row.inode}
        for copied in tree.copied:
            self._take_etag(w, origins, copied)
        for origin, inode in origins.items():
            node = w.node(inode)
            if node is not None and origin != row.source:
                w.put_node(inode, replace(node, origin=row.key + origin[len(row.source) :]))
            elif node is not None:
                _place(w, inode, node, row.key)

    def _origins_below(self, w: IndexWriter, source: bytes) -> dict[bytes, int]:
        """Return the nodes that the lake has below *source* and later operations take from there, by keys."""
        found = {}
        for row in self._table.rows.values():
            node = w.node(row.inode) if isinstance(row, Move | Delete) and row.inode else None
            if node is not None and node.origin.startswith(source):
                found[node.origin] = row.inode
        return found

    def _take_etag(self, w: IndexWriter, origins: dict[bytes, int], copied: _Copied) -> None:
        """Have the copy's ETag known where it is another one, and to the moves that follow."""
        if copied.info is None or copied.info.version.etag == copied.source.etag:
            return
        self._tell_followers(w, 0, os.fsencode(copied.info.version.key), copied.info.version.etag)
        key = os.fsencode(copied.source.key)
        place = next(place for place in (key, *prefixes(key)) if place in origins)
        inode = _find(w, origins[place], key[len(place) :])
        node = w.node(inode) if inode else None
        if node is not None and w.key_of(inode) == key:
            w.put_node(inode, self._with_etag(w, inode, node, copied))

    # Deletes

    async def delete(self, seqs: Sequence[int]) -> dict[int, LakeError]:
        """Carry out Delete rows, up to DELETE_KEYS_MAX; return those that failed."""
        rows = {seq: row for seq in seqs if isinstance(row := self._table.rows.get(seq), Delete)}
        keys = {os.fsdecode(row.key): seq for seq, row in rows.items()}
        failed = await self._lake.delete_many(list(keys)) if keys else {}
        errors = {keys[key]: error for key, error in failed.items()}

        def change(w: IndexWriter) -> None:
            for seq in seqs:
                if seq not in errors:
                    self._table.running.end(seq)
                    self._table.remove(w, seq)

        await self._committer.commit(change)
        return errors

    async def _delete(self, keys: Sequence[str]) -> None:
        """Delete all *keys*, in their order; raises the first failure."""
        for start in range(0, len(keys), DELETE_KEYS_MAX):
            batch = keys[start : start + DELETE_KEYS_MAX]
            failed = await self._lake.retrying("delete", batch[0], partial(self._delete_batch, batch))
            if failed:
                raise next(iter(failed.values()))

    async def _delete_batch(self, batch: Sequence[str]) -> dict[str, LakeError]:
        return await self._lake.delete_many(batch)

    # Markers and metadata

    async def mark(self, seq: int) -> None:
        row = self._table.rows.get(seq)
        if not isinstance(row, Mark):
            raise Stale(str(seq))
        await self._put_marker(row)

        def change(w: IndexWriter) -> None:
            self._table.running.end(seq)
            now = self._table.rows.get(seq)
            if now == row:
                self._table.remove(w, seq)
            elif isinstance(now, Mark):
                self._table.replace(w, seq, replace(now, is_new=now.is_new and now.key != row.key))

        await self._committer.commit(change)

    async def _put_marker(self, row: Mark | Restate) -> None:
        mtime_ns = row.mtime_ns if isinstance(row, Restate) else 0
        await self._lake.put(os.fsdecode(row.key), b"", metadata_of(row.attributes, mtime_ns))

    async def restate(self, seq: int) -> None:
        row = self._table.rows.get(seq)
        if not isinstance(row, Restate):
            raise Stale(str(seq))
        node = self._index.node(row.inode)
        copied: _Copied | None = None
        if node is not None and node.is_directory:
            await self._put_marker(row)
        elif node is not None:
            copied = await self._copy_in_place(row)

        def change(w: IndexWriter) -> None:
            self._table.running.end(seq)
            if self._table.rows.get(seq) == row:
                self._table.remove(w, seq)
            now = w.node(row.inode)
            if copied is None or copied.info is None or now is None or now.etag != copied.source.etag:
                return
            w.put_node(row.inode, renewed(w, self._table, row.inode, now, copied.info.version.etag))

        await self._committer.commit(change)
        if copied is None and node is not None and not node.is_directory:
            self._note_changed(row.inode)  # Once its row is gone: see `move`.

    async def _copy_in_place(self, row: Restate) -> _Copied | None:
        """Give the object its new metadata; None where it is not the one that the row is about."""
        key = os.fsdecode(row.key)
        for _ in range(_CHANGES_MAX):
            node = self._index.node(row.inode)
            try:
                source = await self._lake.head(key)
                # After a power loss the node may be made of the row, and nobody have looked yet.
                if node is not None and node.etag and source.version.etag != node.etag:
                    if await self._know_again(row.inode):
                        continue
                    log.warning("%s: has changed in the lake: its mode, owner and times stay", key)
                    return None
                metadata = restated(source.metadata, row.attributes, row.mtime_ns, source.version)
                info = await self._lake.copy(source.version, key, metadata)
                return _Copied(source.version, info)
            except (ObjectChanged, ObjectExists):
                continue
            except ObjectMissing:
                log.warning("%s: is gone from the lake: its mode, owner and times can't be stored", key)
                return None
        return None

    async def _know_again(self, inode: int) -> bool:
        return await know_again(self._lake, self._index, self._committer, self._table, inode)


def _place(w: IndexWriter, inode: int, node: Node, key: bytes) -> None:
    """Store the node so that the lake has it under *key*. One without a name can't go by its place."""
    if w.is_detached(inode):
        w.put_node(inode, replace(node, origin=key))
    else:
        put_origin(w, inode, node, key)


def _find(w: IndexWriter, inode: int, rest: bytes) -> int:
    """Return the inode at the path *rest* below a directory, 0 if there is none; it itself for b""."""
    for name in rest.split(b"/") if rest else ():
        found = w.child(inode, name)
        if found is None:
            return 0
        inode = found[0]
    return inode
