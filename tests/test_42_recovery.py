"""Recovery: each line of the crash table, with the index and without it, killed anywhere and run again."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import lmdb
import msgspec
import pytest

from cache.errors import SluiceError, UsageError
from cache.index import Index, remove_index
from cache.journal import Journal
from cache.journaling import orphan_seq
from cache.model import (
    KIND_DIRECTORY,
    KIND_FIFO,
    KIND_FILE,
    KIND_SYMLINK,
    ROOT_INODE,
    Inode,
    ObjectVersion,
)
from cache.pending import (
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
    Put,
    Restate,
    decode_pending,
)
from cache.records import Attributes, Node
from cache.recovery import Recovered, recover
from cache.staging import StagingFiles, mode_said
from cache.store import boot_id, kept_all_bytes
from cache.write_path import open_ledger

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


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    home.stop()


def without_inodes(rows: Mapping[int, Pending]) -> dict[int, Pending]:
    return {seq: replace(row, inode=0) for seq, row in rows.items()}


def perhaps_sent(rows: Mapping[int, Pending]) -> dict[int, Pending]:
    """Return the rows as a lost index leaves them: nobody knows which had begun."""
    found = without_inodes(rows)
    for seq, row in found.items():
        if isinstance(row, Put) and row.state != CONFLICT:
            found[seq] = replace(row, upload_key=row.upload_key or row.key)
    return found


# Nothing, and the trusted index


def test_an_empty_cache_recovers_to_nothing(home: Home) -> None:
    assert home.start() == Recovered(index_was_lost=True)
    assert home.rows() == {} and home.tree() == {}
    assert home.start() == Recovered(index_was_lost=False)


def test_a_trusted_index_wins_over_the_journal(home: Home) -> None:
    """The journal lags behind; what was acknowledged before a process was killed is in the index."""
    home.start()
    assert home.index is not None
    home.stage(1)
    home.stage(2)
    home.write_journal({1: put(b"gone", 9), 2: put(b"old", 1), 3: Delete(b"k")})
    table = PendingTable()
    with home.index.write() as w:
        w.set_meta(b"next_staged", (3).to_bytes(8, "big"))
        table.replace(w, 2, sealed(b"new", 1))
        table.replace(w, 3, Delete(b"k"))
        table.replace(w, 4, put(b"open", 2))
    assert home.start(first=False).read_only_because == []
    assert home.rows() == {2: sealed(b"new", 1), 3: Delete(b"k"), 4: put(b"open", 2)}
    assert home.staged() == {1: BODY, 2: BODY}
    assert home.table is not None
    assert home.table.put_at(b"new") == (2, sealed(b"new", 1))


@pytest.mark.parametrize("first", [True, False])
def test_an_orphan_lives_until_nobody_can_have_it_open(home: Home, first: bool) -> None:
    home.start()
    assert home.index is not None
    home.stage(1)
    with home.index.write() as w:
        w.set_meta(b"next_staged", (2).to_bytes(8, "big"))
        PendingTable().replace(w, 1, Orphan(5, 1))
    for _ in range(2):
        home.start(first=first)
        assert home.rows() == ({} if first else {1: Orphan(5, 1)})
        assert home.staged() == ({} if first else {1: BODY})
    assert home.lost() == {}


def test_with_a_trusted_index_files_taken_from_their_rows_go_and_unknown_ones_are_kept(home: Home) -> None:
    home.start()
    assert home.index is not None
    for number in (1, 2, 9):
        home.stage(number)
    home.stage(10, b"")
    with home.index.write() as w:
        w.set_meta(b"next_staged", (3).to_bytes(8, "big"))
        PendingTable().replace(w, 1, sealed(b"f", 1))
    home.write_journal({1: sealed(b"f", 1), 2: sealed(b"uploaded", 2)})
    home.start()
    assert home.staged() == {1: BODY} and home.lost() == {"unnamed-9": BODY}


# After a power loss


def test_what_was_sealed_is_there_whole_under_its_name(home: Home) -> None:
    rows: dict[int, Pending] = {
        1: sealed(b"a/b/c", 1),
        2: sealed(b"top", 2, state=CONFLICT, error="why"),
        3: sealed(b"a/b/\xff", 3, state=FAILED, upload_id="u", part_bytes=5, upload_key=b"k"),
        4: sealed(b"a/empty", 4, size_bytes=0),
    }
    for number in (1, 2, 3):
        home.stage(number)
    home.stage(4, b"")
    home.write_journal(rows)
    assert home.start() == Recovered([], index_was_lost=True)
    assert without_inodes(home.rows()) == perhaps_sent(rows)
    inode, node = home.node("a/b/c")
    assert node == Node(node.parent, b"c", KIND_FILE, len(BODY), 77, staged=1, attributes=ATTRIBUTES)
    assert home.rows()[1].inode == inode and home.node("a")[1].is_directory
    assert home.tree().keys() == {"a", "a/b", "a/b/c", "a/b/\udcff", "a/empty", "top"}
    assert home.staged() == {1: BODY, 2: BODY, 3: BODY, 4: b""} and home.lost() == {}


@pytest.mark.parametrize(
    ("row", "body", "kept"),
    [
        (put(b"d/f", 1, synced_bytes=4), BODY, b"0123"),
        (put(b"d/f", 1, synced_bytes=10), BODY, BODY),
        (put(b"d/f", 1, synced_bytes=0), BODY, b""),
        (put(b"d/f", 1, synced_bytes=10), b"012", b"012"),
        (sealed(b"d/f", 1, size_bytes=99, synced_bytes=4), BODY, b"0123"),
        (sealed(b"d/f", 1, size_bytes=5, synced_bytes=4, state=CONFLICT), BODY, b"0123"),
    ],
    ids=["longer", "exact", "synced empty", "truncated since", "sealed and torn", "conflict and torn"],
)
def test_what_was_open_is_sealed_at_the_length_of_its_last_fsync(
    home: Home, row: Put, body: bytes, kept: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    home.stage(1, body)
    os.utime(home.staging.path(1), ns=(1, 123456))
    home.write_journal({1: row})
    home.start()
    (found,) = home.rows().values()
    assert isinstance(found, Put)
    assert (found.state, found.size_bytes, found.mtime_ns) == (SEALED, len(kept), 123456)
    assert found.sealed_at_s > 0 and found.base_etag == '"base"'
    assert home.staged() == {1: kept} and home.lost() == {}
    assert home.staging.stat(1).st_mtime_ns == 123456
    assert home.node("d/f")[1].size_bytes == len(kept)
    assert "d/f: kept at the" in caplog.text


@pytest.mark.parametrize("row", [put(b"d/f", 1, synced_bytes=4), sealed(b"d/f", 1)], ids=["open", "sealed"])
def test_after_a_power_loss_the_mode_is_the_rows_not_the_staging_files(home: Home, row: Put) -> None:
    """The disk may have an older one of the file than the row, which was synced."""
    home.stage(1)
    home.staging.set_mode(1, 0o644)
    home.write_journal({1: row})
    home.start()
    (found,) = home.rows().values()
    assert isinstance(found, Put) and found.attributes == ATTRIBUTES
    assert mode_said(home.staging.stat(1)) is None
    own = home.node("d/f")[1].attributes
    assert own is not None and own.mode == ATTRIBUTES.mode


def test_after_killed_processes_the_mode_is_the_staging_files(home: Home) -> None:
    home.stage(1)
    home.staging.set_mode(1, 0o644)
    home.write_journal({1: put(b"d/f", 1)})
    home.start(is_intact=True)
    (found,) = home.rows().values()
    assert isinstance(found, Put) and found.attributes.mode == 0o644


@pytest.mark.parametrize("row", [put(b"d/f", 1), sealed(b"d/f", 1, size_bytes=99)], ids=["open", "torn"])
def test_what_was_never_synced_is_in_lost_found_and_the_name_shows_what_the_lake_has(
    home: Home, row: Put, caplog: pytest.LogCaptureFixture
) -> None:
    home.stage(1)
    home.write_journal({1: row})
    home.start()
    assert home.rows() == {} and home.tree() == {} and home.staged() == {}
    assert home.lost() == {"f-1": BODY}
    assert "d/f: not known to be whole; kept as" in caplog.text


def test_of_an_empty_file_that_was_never_synced_nothing_is_kept(home: Home) -> None:
    home.stage(1, b"")
    home.write_journal({1: put(b"f", 1)})
    home.start()
    assert home.rows() == {} and home.staged() == {} and home.lost() == {}


def test_a_file_without_a_row_is_kept_in_lost_found_unless_it_is_in_the_cache_too(home: Home) -> None:
    for number in (1, 2):
        home.stage(number)
    home.stage(3, b"")
    os.link(home.staging.path(2), home.path / "adopted")
    home.start()
    assert home.staged() == {} and home.lost() == {"unnamed-1": BODY}
    assert (home.path / "adopted").read_bytes() == BODY


def test_the_file_of_an_orphan_goes(home: Home) -> None:
    home.stage(1)
    home.write_journal({1: Orphan(5, 1)})
    home.start()
    assert home.rows() == {} and home.staged() == {}
    assert home.lost() == {}


@pytest.mark.parametrize("power_lost", [True, False])
def test_a_discarded_file_that_is_back_after_a_power_loss_goes_again(home: Home, power_lost: bool) -> None:
    home.start()
    home.stage(7)
    home.stage(8)
    home.write_journal({1: sealed(b"f", 8), orphan_seq(7): Orphan(0, 7)})
    if power_lost:
        home.lose_power()
    else:
        assert home.index is not None
        with home.index.write() as w:
            PendingTable().replace(w, 1, sealed(b"f", 8))
            w.set_meta(b"next_staged", (9).to_bytes(8, "big"))
    home.start()
    assert home.staged() == {8: BODY} and home.lost() == {} and list(home.rows()) == [1]


@pytest.mark.parametrize("has_index", [True, False])
def test_a_row_without_its_file_makes_the_mount_read_only_and_stays(
    home: Home, has_index: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows: dict[int, Pending] = {1: sealed(b"d/f", 1), 2: sealed(b"good", 2), 3: put(b"open", 3)}
    if has_index:
        home.start()
        assert home.index is not None
        with home.index.write() as w:
            for seq, row in rows.items():
                PendingTable().replace(w, seq, row)
    home.stage(2)
    home.write_journal(rows)
    for _ in range(2):
        lines = home.start().read_only_because
        assert len(lines) == 2 and lines[0].startswith("d/f: ") and lines[1].startswith("open: ")
        assert all("missing" in line and "staging/" in line for line in lines)
        assert without_inodes(home.rows()) == (without_inodes(rows) if has_index else perhaps_sent(rows))
    assert "d/f: its bytes" in caplog.text and "read-only" in caplog.text


def test_the_next_staging_file_has_a_number_that_was_never_used(home: Home) -> None:
    home.stage(0x20)
    home.stage(0x30)
    home.write_journal({1: sealed(b"f", 0x20), 2: sealed(b"missing", 0x40)})
    home.start()
    assert home.lost() == {"unnamed-30": BODY}
    assert home.index is not None
    assert home.index.meta(b"next_staged") == (0x41).to_bytes(8, "big")
    home.lose_power()
    home.write_journal({2: None})  # type: ignore[dict-item]
    home.start()
    assert home.index.meta(b"next_staged") == (0x31).to_bytes(8, "big")


# The namespace that is rebuilt


def test_directories_symlinks_and_fifos_are_there_again(home: Home) -> None:
    rows: dict[int, Pending] = {
        1: Mark(b"d/e", 700, ATTRIBUTES),
        2: Mark(b"plain", 701),
        3: Put(b"d/link", 702, KIND_SYMLINK, 0, "", LINK, SEALED),
        4: Local(b"d/fifo", 703, KIND_FIFO, OTHERS),
        5: Delete(b"d/gone", 704),
    }
    home.write_journal(rows)
    assert home.start().read_only_because == []
    found = home.rows()
    assert without_inodes(found) == perhaps_sent(rows) and found[5].inode == 0
    assert home.node("d/e") == (found[1].inode, replace(home.node("d/e")[1], attributes=ATTRIBUTES))
    assert home.node("d/link") == (found[3].inode, replace(home.node("d/link")[1], attributes=LINK))
    assert home.node("d/link")[1].kind == KIND_SYMLINK
    fifo = home.node("d/fifo")[1]
    assert (fifo.kind, fifo.attributes, home.node("d/fifo")[0]) == (KIND_FIFO, OTHERS, found[4].inode)
    assert {path for path, node in home.tree().items() if node.is_directory} == {"d", "d/e", "plain"}


def test_what_was_moved_is_shown_under_its_new_path_with_its_origin(home: Home) -> None:
    version = ObjectVersion("old/f", '"e"', 9)
    rows: dict[int, Pending] = {
        1: Move(b"tree/", b"new/tree", 700, KIND_DIRECTORY),
        2: Move(b"old/f", b"new/tree/f", 701, KIND_FILE, '"e"', 9),
        3: Move(b"done", b"there", 702, KIND_FILE, '"x"', 1, copied=True),
        4: Mark(b"new/tree", 700, ATTRIBUTES),
    }
    home.write_journal(rows)
    home.start()
    found = home.rows()
    inode, node = home.node("new/tree/f")
    assert (node.origin, node.etag, node.size_bytes, node.vid) == (b"old/f", '"e"', 9, version.id)
    assert found[2].inode == inode and node.mtime_ns > 0
    inode, node = home.node("new/tree")
    assert (node.origin, node.attributes) == (b"tree/", ATTRIBUTES)
    assert found[1].inode == found[4].inode == inode
    inode, node = home.node("there")
    assert found[3].inode == inode and (node.etag, node.origin, node.staged) == ("", b"", 0)
    assert home.index is not None
    assert home.index.key_of(home.node("new/tree/f")[0]) == b"old/f"
    assert home.index.key_of(home.node("new/tree")[0]) == b"tree"


def test_attributes_that_the_lake_has_yet_to_get_wait_for_the_object(home: Home) -> None:
    home.stage(1)
    rows: dict[int, Pending] = {
        1: sealed(b"written", 1),
        2: Restate(b"written", 700, KIND_FILE, OTHERS, 55),
        3: Restate(b"far/away", 701, KIND_FILE, OTHERS, 56),
        4: Restate(b"far", 702, KIND_DIRECTORY, ATTRIBUTES),
    }
    home.write_journal(rows)
    home.start()
    found = home.rows()
    assert found[1].inode == found[2].inode == home.node("written")[0]
    written = home.node("written")[1]
    assert (written.staged, written.attributes, written.mtime_ns) == (1, OTHERS, 55)
    inode, node = home.node("far/away")
    assert found[3].inode == inode
    assert (node.attributes, node.etag, node.seen_at_s) == (OTHERS, "", 0.0)
    assert home.node("far")[1].attributes == ATTRIBUTES


def test_paths_under_each_other_come_together_in_any_order(home: Home) -> None:
    home.stage(1)
    home.write_journal(
        {1: sealed(b"a/b/f", 1), 2: Mark(b"a/b", 700, ATTRIBUTES), 3: Move(b"x/", b"a", 701, KIND_DIRECTORY)}
    )
    home.start()
    assert home.tree().keys() == {"a", "a/b", "a/b/f"}
    assert home.node("a")[1].origin == b"x/" and home.node("a/b")[1].attributes == ATTRIBUTES


def test_an_index_without_the_mark_keeps_what_it_knows_of_the_lake(home: Home) -> None:
    """It is from before there was anything to write, or from a read-only mount after a power loss."""
    index = Index(home.path)
    with index.write() as w:
        w.add_root()
        directory = w.attach(Node(ROOT_INODE, b"d", KIND_DIRECTORY))
        w.attach(Node(directory, b"known", KIND_FILE, 1, 1, '"e"', b"v" * 16))
        w.put_pending(9, b"of a recovery that was killed")
    index.close()
    home.stage(1)
    home.write_journal({1: sealed(b"d/new", 1)})
    home.start()
    assert home.tree().keys() == {"d", "d/known", "d/new"}
    assert list(home.rows()) == [1] and home.node("d")[0] == directory


# Killed anywhere

EVERYTHING: dict[int, Pending] = {
    1: sealed(b"d/sealed", 1),
    2: put(b"d/synced", 2, synced_bytes=4),
    3: put(b"d/never", 3),
    4: put(b"d/never-empty", 4),
    5: Orphan(600, 5),
    6: Mark(b"m", 601, ATTRIBUTES),
    7: Move(b"t/", b"moved", 602, KIND_DIRECTORY),
    8: Delete(b"x", 603),
    9: Local(b"fifo", 604, KIND_FIFO, OTHERS),
    10: Restate(b"far", 605, KIND_FILE, OTHERS, 5),
    11: sealed(b"d/missing", 0x99),
}


class Killed(Exception):
    """Stands for SIGKILL: raised in the place of a step."""


def fill(home: Home) -> None:
    for number in (1, 2, 3, 5, 6):
        home.stage(number)
    home.stage(4, b"")
    home.stage(7)
    os.link(home.staging.path(7), home.path / "adopted")
    home.write_journal(EVERYTHING)


STEPS = (
    "cache.staging.os.truncate",
    "cache.staging.os.utime",
    "cache.staging.os.rename",
    "cache.staging.os.unlink",
    "cache.staging.os.fsync",
    "cache.staging.os.fdatasync",
    "cache.recovery.Planter.plant",
    "cache.recovery.IndexWriter.set_meta",
    "cache.index.Index.write",
    "cache.journal.Journal.write",
    "cache.pending.PendingTable.load",
)


class Killer:
    """Counts the steps of a recovery; at step *at* it ends, before or after that step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, *, after: bool) -> None:
        self.count = 0
        for name in STEPS:
            owner, attribute = _resolve(name)
            monkeypatch.setattr(owner, attribute, self._wrapped(getattr(owner, attribute), at, after))

    def _wrapped(self, step: object, at: int, after: bool) -> object:
        assert callable(step)

        def call(*args: object, **keywords: object) -> object:
            self.count += 1
            if self.count == at and not after:
                raise Killed
            result = step(*args, **keywords)
            if self.count == at and after:
                raise Killed
            return result

        return call


def _resolve(name: str) -> tuple[object, str]:
    parts = name.split(".")
    owner: object = importlib.import_module(".".join(parts[:2]))
    for part in parts[2:-1]:
        owner = getattr(owner, part)
    return owner, parts[-1]


def outcome(home: Home) -> object:
    nodes = {
        path: replace(node, mtime_ns=0) if path in ("d/synced", "d/missing") else node
        for path, node in home.tree().items()
    }
    rows = {
        seq: replace(row, sealed_at_s=0.0, mtime_ns=0) if isinstance(row, Put) else row
        for seq, row in without_inodes(home.rows()).items()
    }
    for seq, row in home.rows().items():
        if not isinstance(row, Delete | Orphan):
            assert home.node(os.fsdecode(row.path))[0] == row.inode, seq
    return nodes, rows, home.staged(), home.lost(), (home.path / "adopted").exists()


def steps_of_a_recovery(path: Path) -> int:
    home = Home(path)
    fill(home)
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, 0, after=False)
        home.start()
    home.stop()
    return killer.count


@pytest.mark.parametrize("power", [True, False], ids=["killed", "power lost too"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_step_and_run_again_it_ends_the_same(tmp_path: Path, after: bool, power: bool) -> None:
    """Twice in a row: the second recovery is killed too, at the same step."""
    steps = steps_of_a_recovery(tmp_path / "count")
    whole = Home(tmp_path / "whole")
    fill(whole)
    lines = whole.start().read_only_because
    expected = outcome(whole)
    whole.stop()
    assert steps > 20
    for at in range(1, steps + 1):
        home = Home(tmp_path / f"at{at}")
        fill(home)
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                Killer(patch, at, after=after)
                try:
                    home.start()
                except (Killed, SluiceError):
                    pass
            home.stop()
            if not power:
                home.lose_power()
        found = home.start().read_only_because
        assert outcome(home) == expected, at
        assert len(found) == len(lines) == 1
        home.stop()


def test_recovering_again_without_power_changes_nothing(home: Home) -> None:
    fill(home)
    home.start()
    before = outcome(home)
    home.restart_without_power()
    assert outcome(home) == before


def test_a_journal_of_another_version_stops_recovery_before_anything_is_touched(home: Home) -> None:
    fill(home)
    with lmdb.open(str(home.path / "journal.lmdb"), max_dbs=2) as env:
        meta = env.open_db(b"meta")
        with env.begin(write=True, db=meta) as txn:
            txn.put(b"format", b"sluicefs-journal 9")
    before = home.staged()
    with pytest.raises(UsageError, match="sluicefs-journal 9"):
        Journal(home.path, "store")
    assert home.staged() == before and home.lost() == {}


# Nodes that several rows stand for


def test_of_several_moves_the_last_says_where_it_is_and_the_first_where_the_lake_has_it(home: Home) -> None:
    """Two directories, and two files, that changed places."""
    first = ObjectVersion("f", '"f"', 4)
    rows: dict[int, Pending] = {
        1: Move(b"a/", b".sluice-exchange-5", 5, KIND_DIRECTORY),
        2: Move(b"b/", b"a", 6, KIND_DIRECTORY),
        3: Move(b".sluice-exchange-5/", b"b", 5, KIND_DIRECTORY),
        4: Move(b"f", b".sluice-exchange-7", 7, KIND_FILE, '"f"', 4),
        5: Move(b"g", b"f", 8, KIND_FILE, '"g"', 4),
        6: Move(b".sluice-exchange-7", b"g", 7, KIND_FILE, '"f"', 4),
    }
    home.write_journal(rows)
    home.start()
    assert home.tree().keys() == {"a", "b", "f", "g"}
    origins = {path: node.origin for path, node in home.tree().items()}
    assert origins == {"a": b"b/", "b": b"a/", "f": b"g", "g": b"f"}
    assert home.node("g")[1].vid == first.id
    found = home.rows()
    assert without_inodes(found) == without_inodes(rows)
    assert found[1].inode == found[3].inode == home.node("b")[0]
    assert found[4].inode == found[6].inode == home.node("g")[0]


def test_a_move_that_was_made_already_is_not_where_the_next_begins(home: Home) -> None:
    rows: dict[int, Pending] = {
        1: Move(b"a/", b"b", 5, KIND_DIRECTORY, copied=True),
        2: Move(b"b/", b"c", 5, KIND_DIRECTORY),
    }
    home.write_journal(rows)
    home.start()
    assert {path: node.origin for path, node in home.tree().items()} == {"c": b"b/"}


def test_what_a_later_move_of_its_directory_carries_along_is_there(home: Home) -> None:
    """What a move brings to a directory goes on with it, and is where the lake has it now until then."""
    home.stage(1)
    rows: dict[int, Pending] = {
        1: Move(b"x", b"old/x", 6, KIND_FILE, '"x"', 1),
        2: Move(b"old/", b"new", 5, KIND_DIRECTORY),
        3: sealed(b"old/f", 1),
        4: Move(b"new/sub/", b"out", 7, KIND_DIRECTORY),
        5: Move(b"new/y", b"y", 8, KIND_FILE, '"y"', 1),
        6: Move(b"new/", b"newer", 5, KIND_DIRECTORY),
        7: Move(b"new/z", b"z", 9, KIND_FILE, '"z"', 1),
        8: Delete(b"z"),
        9: Move(b"p", b"q", 0, KIND_FILE),
    }
    home.write_journal(rows)
    home.start()
    assert home.tree().keys() == {"newer", "newer/x", "old", "old/f", "out", "y"}
    origins = {path: home.node(path)[1].origin for path in ("newer", "newer/x", "out", "y")}
    assert origins == {"newer": b"old/", "newer/x": b"x", "out": b"old/sub/", "y": b"old/y"}
    assert without_inodes(home.rows()) == perhaps_sent(rows)


def test_what_takes_the_name_of_a_directory_that_was_moved_and_removed_is_not_where_that_was(
    home: Home,
) -> None:
    """Else what lies below it would be looked for there once its own moves are made."""
    rows: dict[int, Pending] = {
        1: Move(b"x/", b"c", 0, KIND_DIRECTORY),
        2: Delete(b"c/"),
        3: Move(b"y/", b"a/sub", 4, KIND_DIRECTORY, to=b"c/sub"),
        4: Move(b"c/", b"a", 5, KIND_DIRECTORY),
        5: Mark(b"a", 5, is_new=True),
    }
    home.write_journal(rows)
    home.start()
    assert home.node("a")[1].origin == b"c/" and home.node("a/sub")[1].origin == b"y/"


def test_what_waits_for_somebody_is_not_carried_along(home: Home) -> None:
    home.stage(1)
    rows: dict[int, Pending] = {
        1: sealed(b"d/f", 1, state=CONFLICT),
        2: Local(b"d/fifo", 6, KIND_FIFO, OTHERS),
        3: Move(b"d/", b"e", 5, KIND_DIRECTORY),
    }
    home.write_journal(rows)
    home.start()
    assert home.tree().keys() == {"d", "d/f", "d/fifo", "e"}


@pytest.mark.parametrize("is_intact", [True, False])
def test_what_was_to_be_sent_may_have_been(home: Home, is_intact: bool) -> None:
    """Of the index, which is lost, not of the journal: that learns it a little later."""
    home.stage(1)
    rows: dict[int, Pending] = {1: sealed(b"f", 1), 2: Mark(b"d", 700, is_new=True)}
    home.write_journal(rows)
    home.start(is_intact=is_intact)
    found = home.rows()
    assert isinstance(found[1], Put) and found[1].upload_key == b"f"
    assert isinstance(found[2], Mark) and not found[2].is_new


@pytest.mark.parametrize("is_intact", [True, False])
def test_after_a_power_loss_the_ctime_of_what_was_sent_says_nothing_of_the_bytes(
    home: Home, is_intact: bool
) -> None:
    home.stage(1)
    row = sealed(b"f", 1, uploaded=b"mark", upload_ctime_ns=5, upload_id="u", upload_key=b"f")
    home.write_journal({1: row})
    home.start(is_intact=is_intact)
    (found,) = without_inodes(home.rows()).values()
    expected = row if is_intact else replace(row, uploaded=b"", upload_ctime_ns=0)
    assert found == replace(expected, inode=0)


# The index was lost, but no power


@pytest.mark.parametrize(
    ("row", "state"),
    [
        (put(b"d/f", 1), SEALED),
        (put(b"d/f", 1, synced_bytes=4), SEALED),
        (sealed(b"d/f", 1, size_bytes=4), SEALED),
        (sealed(b"d/f", 1, size_bytes=4, state=CONFLICT), CONFLICT),
    ],
)
def test_without_a_power_loss_what_was_open_is_whole(home: Home, row: Put, state: str) -> None:
    home.stage(1)
    home.write_journal({1: row})
    home.start(is_intact=True)
    (found,) = home.rows().values()
    assert isinstance(found, Put) and (found.state, found.size_bytes) == (state, len(BODY))
    assert home.staged() == {1: BODY} and home.lost() == {}
    assert home.node("d/f")[1].size_bytes == len(BODY)


def test_without_a_power_loss_an_empty_file_stays(home: Home) -> None:
    home.stage(1, b"")
    home.write_journal({1: put(b"f", 1)})
    home.start(is_intact=True)
    assert home.tree().keys() == {"f"} and home.node("f")[1].size_bytes == 0


@pytest.mark.parametrize("is_intact", [True, False])
def test_the_ledger_knows_from_the_directory_whether_power_was_lost(tmp_path: Path, is_intact: bool) -> None:
    home = Home(tmp_path)
    home.stage(1)
    home.write_journal({1: put(b"f", 1)})
    (tmp_path / "boot").write_text(boot_id())
    if not is_intact:
        (tmp_path / "power-lost").touch()
    index = Index(tmp_path)
    with index.write() as w:
        w.add_root()
    ledger = open_ledger(tmp_path, "store", index, PendingTable(), first=True)
    ledger.close()
    index.close()
    assert home.staged() == ({1: BODY} if is_intact else {})
    assert kept_all_bytes(tmp_path)  # From now on, until the next power loss.
