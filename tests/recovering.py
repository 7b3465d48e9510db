"""A cache directory that is left as a crash leaves it, and recovered: for the tests of recovery."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cache.index import Index, remove_index
from cache.journal import Journal
from cache.model import (
    KIND_FILE,
    ROOT_INODE,
    Inode,
)
from cache.pending import (
    CONFLICT,
    SEALED,
    Pending,
    PendingTable,
    Put,
    decode_pending,
)
from cache.records import Attributes, Node
from cache.recovery import Recovered, recover
from cache.staging import StagingFiles

ATTRIBUTES = Attributes(0o640, 1, 2, 3, xattrs={b"user.a": b"b"})

OTHERS = Attributes(0o700, 3, 4, 5)

LINK = Attributes(0o777, 1, 2, 3, target=b"../target")

BODY = b"0123456789"


replace = msgspec.structs.replace


def put(path: bytes, staged: int, **changes: object) -> Put:
    """An inode number that no new index gives: rows must get those of their new nodes."""
    return replace(Put(path, 5000 + staged, KIND_FILE, staged, '"base"', ATTRIBUTES), **changes)


def sealed(path: bytes, staged: int, **changes: object) -> Put:
    return put(path, staged, **{"state": SEALED, "size_bytes": len(BODY), "mtime_ns": 77, **changes})


@dataclass
class Home:
    """A cache directory; `start` opens what a mover opens, and recovers."""

    path: Path
    index: Index | None = None
    table: PendingTable | None = None

    @property
    def staging(self) -> StagingFiles:
        return StagingFiles(self.path)

    def write_journal(self, rows: Mapping[int, Pending]) -> None:
        journal = Journal(self.path, "store")
        journal.write(rows)
        journal.close()

    def journal_rows(self) -> dict[int, Pending]:
        journal = Journal(self.path, "store")
        rows = journal.rows()
        journal.close()
        return rows

    def stage(self, number: int, body: bytes = BODY) -> None:
        staging = self.staging
        staging.prepare()
        staging.create(number)
        Path(staging.path(number)).write_bytes(body)

    def staged(self) -> dict[int, bytes]:
        return {number: Path(self.staging.path(number)).read_bytes() for number in self.staging.numbers()}

    def lost(self) -> dict[str, bytes]:
        folder = self.path / "lost+found"
        return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}

    def start(self, *, first: bool = True, is_intact: bool = False) -> Recovered:
        self.stop()
        index, table, journal = Index(self.path), PendingTable(), Journal(self.path, "store")
        try:
            with index.write() as w:
                w.add_root()
            recovered = recover(index, journal, self.staging, table, first=first, is_intact=is_intact)
        except BaseException:
            index.close()
            raise
        finally:
            journal.close()
        self.index, self.table = index, table
        return recovered

    def stop(self) -> None:
        if self.index is not None:
            self.index.close()
            self.index = None

    def lose_power(self) -> None:
        """As `open_store` after another boot without a clean unmount."""
        self.stop()
        remove_index(self.path)

    def restart_without_power(self) -> Recovered:
        self.lose_power()
        return self.start()

    def node(self, path: str) -> tuple[Inode, Node]:
        assert self.index is not None
        inode = ROOT_INODE
        for part in path.split("/"):
            found = self.index.child(inode, os.fsencode(part))
            assert found is not None, path
            inode, node = found
        return inode, node

    def tree(self) -> dict[str, Node]:
        """Return all paths with their nodes, without numbers that may differ."""
        assert self.index is not None
        found: dict[str, Node] = {}

        def walk(inode: int, above: str) -> None:
            assert self.index is not None
            for child, node in self.index.children(inode, b"", 999):
                path = above + os.fsdecode(node.name)
                found[path] = replace(node, parent=0, mtime_ns=0 if node.is_directory else node.mtime_ns)
                if node.is_directory:
                    walk(child, path + "/")

        walk(ROOT_INODE, "")
        return found

    def rows(self) -> dict[int, Pending]:
        """Return the rows; index, journal and table have to agree on them."""
        assert self.index is not None and self.table is not None
        rows = {seq: decode_pending(packed) for seq, packed in self.index.pending_rows()}
        assert rows == self.journal_rows() == self.table.rows
        return rows


def without_inodes(rows: Mapping[int, Pending]) -> dict[int, Pending]:
    return {seq: replace(row, inode=0) for seq, row in rows.items()}


def perhaps_sent(rows: Mapping[int, Pending]) -> dict[int, Pending]:
    """Return the rows as a lost index leaves them: nobody knows which had begun."""
    found = without_inodes(rows)
    for seq, row in found.items():
        if isinstance(row, Put) and row.state != CONFLICT:
            found[seq] = replace(row, upload_key=row.upload_key or row.key)
    return found
