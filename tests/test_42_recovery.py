"""What a start makes of journal, staging files and index: with a trusted index, and after a power loss."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.index import Index
from cache.journaling import orphan_seq
from cache.model import (
    KIND_FILE,
)
from cache.pending import (
    CONFLICT,
    FAILED,
    SEALED,
    Delete,
    Orphan,
    Pending,
    PendingTable,
    Put,
)
from cache.records import Node
from cache.recovery import Recovered
from cache.staging import mode_said
from cache.store import boot_id, kept_all_bytes
from cache.write_path import open_ledger
from tests.recovering import (
    ATTRIBUTES,
    BODY,
    Home,
    perhaps_sent,
    put,
    sealed,
    without_inodes,
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    home.stop()


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
