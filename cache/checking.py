"""What `sluice fsck` does: reads all of a cache directory while no mount uses it, and says what is wrong.

| found | told as | mended |
|---|---|---|
| bytes that the lake has not got are missing | fault | the change is dropped: the lake's file shows again |
| the journal can't be read | fault | it is moved aside; what the index knows of it stays |
| the index can't be read | fault | it is removed: the next mount makes it anew |
| a cached object does not match its checksums | fault | it is dropped: the next read fetches it |
| staging files that no change names, lost+found | note | the next mount, or its owner, sees to them |

Nothing is changed unless asked. What is mended leaves a directory that the next mount takes as one
whose index was lost, where changes were dropped: recovery.py says what follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache.errors import CacheError, SluiceError, UsageError
from cache.index import Index, cover_pages, remove_index
from cache.journal import Journal
from cache.model import GROUP_BYTES, VersionId
from cache.pending import Pending, Put, decode_pending
from cache.records import block_checksums
from cache.recovery import is_recovered, make_equal, staged_numbers
from cache.staging import StagingFiles
from cache.store import CacheStore, is_trusted
from cache.tier import TierFiles

Rows = dict[int, Pending]


@dataclass
class Report:
    """*faults* and *notes*: one line each. *mended*: how many of the faults are none any more."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mended: int = 0
    changes: int = 0
    staging_files: int = 0
    objects: int = 0
    object_bytes: int = 0


class Checker:
    """Checks the directories of one mount, which *store* has locked. Blocks, for as long as reading takes."""

    def __init__(self, store: CacheStore, *, repair: bool) -> None:
        self.report = Report()
        self._store = store
        self._repair = repair
        self._home = store.directories[0]
        self._staging = StagingFiles(self._home)

    def run(self) -> Report:
        """Raises SluiceError where a directory can't be read at all, or not mended."""
        index = self._index()
        try:
            self._check_changes(index)
            for number, directory in enumerate(self._store.directories):
                self._check_tier(TierFiles(f"nvme{number}", directory, is_memory=False), index)
        finally:
            if index is not None:
                index.close()
        if self._is_index_to_go:
            remove_index(self._home)
        return self.report

    _is_index_to_go = False

    def _fault(self, text: str) -> None:
        """Note it as one that is mended, where that is asked for; the caller does that."""
        self.report.faults.append(text)
        self.report.mended += self._repair

    def _index(self) -> Index | None:
        """Return the index if there is one that the next mount believes."""
        if not (self._home / "index.lmdb" / "data.mdb").exists():
            return None
        if not is_trusted(self._home):
            self.report.notes.append(
                "the machine stopped while it was mounted: the next mount makes the index anew"
            )
            return None
        try:
            cover_pages(self._home)
            return Index(self._home)
        except CacheError as error:
            self._fault(f"{error}; what is cached is known by its files all the same")
            self._is_index_to_go = self._repair
            return None

    # What the lake has not got

    def _check_changes(self, index: Index | None) -> None:
        journal = self._journal()
        try:
            rows = self._rows(index, journal)
            if rows is None:
                return
            there = set(self._staging.numbers()) if self._staging.directory.exists() else set()
            self.report.changes, self.report.staging_files = len(rows), len(there)
            lost = {seq: row for seq, row in rows.items() if _lacks_bytes(row, there)}
            for row in lost.values():
                assert isinstance(row, Put)
                where = self._staging.path(row.staged)
                self._fault(f"{os.fsdecode(row.path)}: its bytes, {where}, are missing")
            if lost and self._repair:
                journal = journal or Journal(self._home, self._store.id)
                make_equal(journal, {seq: rows[seq] for seq in rows.keys() - lost.keys()}, self._staging)
                self._is_index_to_go = True
            self._note_strays(rows, there)
        finally:
            if journal is not None:
                journal.close()

    def _journal(self) -> Journal | None:
        path = self._home / "journal.lmdb"
        if not path.exists():
            return None
        try:
            journal = Journal(self._home, self._store.id)
            journal.rows()
            return journal
        except SluiceError as error:
            self._fault(str(error).partition("; it was left")[0])
        if self._repair:
            os.rename(path, _free_name(path))
            return Journal(self._home, self._store.id)
        return None

    def _rows(self, index: Index | None, journal: Journal | None) -> Rows | None:
        """Return what the next mount starts with, None where that can't be told."""
        if index is not None and is_recovered(index):
            return {seq: decode_pending(packed) for seq, packed in index.pending_rows()}
        return None if journal is None else journal.rows()

    def _note_strays(self, rows: Rows, there: set[int]) -> None:
        strays = there - staged_numbers(rows)
        if strays:
            self.report.notes.append(
                f"{len(strays)} staging files belong to no change: the next mount keeps in lost+found"
                " what may not be elsewhere"
            )
        lost = self._staging.lost_found
        names = sorted(os.listdir(lost)) if lost.is_dir() else []
        self.report.notes += [f"{lost / name}: kept for you, the lake has it not" for name in names]

    # What the lake has

    def _check_tier(self, files: TierFiles, index: Index | None) -> None:
        for vid, whole in _stored(files.path):
            path = files.file_path(vid, whole=whole)
            size_bytes = os.stat(path).st_size
            self.report.objects += 1
            self.report.object_bytes += size_bytes
            if not whole and index is None:
                continue  # The next mount removes it: which of its bytes are there, nobody knows.
            is_good = files.read_label(vid) is not None if whole else _is_sparse_good(files, vid, index)
            if is_good:
                continue
            self._fault(f"{path}: does not match its checksums{_shown_as(index, vid)}")
            if self._repair:
                self._drop(files, vid, index)

    def _drop(self, files: TierFiles, vid: VersionId, index: Index | None) -> None:
        if index is not None:  # First, so that it never names a file that is not there.
            with index.write() as w:
                w.remove_version(vid)
        files.remove(vid)


def _lacks_bytes(row: Pending, there: set[int]) -> bool:
    return isinstance(row, Put) and row.staged != 0 and row.staged not in there


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    return aside


def _stored(directory: Path) -> Iterator[tuple[VersionId, bool]]:
    """Yield (version id, whole) of each file of a tier. What has another name is none of ours."""
    for folder, whole in (("objects", True), ("partial", False)):
        for path in sorted((directory / folder).glob("??/*")):
            try:
                vid = bytes.fromhex(path.name)
            except ValueError:
                continue
            if len(vid) == 16:
                yield VersionId(vid), whole


def _is_sparse_good(files: TierFiles, vid: VersionId, index: Index | None) -> bool:
    """Return whether the blocks that the index has of a sparse file are what they were."""
    assert index is not None
    row = index.version(vid)
    if row is None or row.whole:
        return True  # The next mount removes the file: it was left by a process that was killed.
    with open(files.partial_path(vid), "rb") as reader:
        for number, group in index.groups_of(vid):
            reader.seek(number * GROUP_BYTES)
            found = block_checksums(reader.read(GROUP_BYTES))
            found += [0] * (len(group.checksums) - len(found))
            for block, expected in enumerate(group.checksums):
                if group.present >> block & 1 and found[block] != expected:
                    return False
    return True


def _shown_as(index: Index | None, vid: VersionId) -> str:
    row = None if index is None else index.version(vid)
    return "" if row is None else f" ({os.fsdecode(row.key)})"


def directories_of(paths: Sequence[str]) -> list[Path]:
    """Return them as cache directories. Raises UsageError where one is none."""
    for path in paths:
        if not (Path(path) / "format").is_file():
            raise UsageError(
                f"{path}: no SluiceFS cache; name the directories that --cache had, in its order"
            )
    if not (Path(paths[0]) / "boot").is_file():
        raise UsageError(f"{paths[0]}: has no index; name the directory first that --cache had first")
    return [Path(path).absolute() for path in paths]
