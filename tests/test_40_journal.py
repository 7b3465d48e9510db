"""The journal keeps what was committed, and its keeper says when, whatever the disk does."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import lmdb
import msgspec
import pytest
import trio
import trio.testing

from cache.engine import Engine
from cache.errors import CacheError, MountReadOnly, SluiceError, StagingFull, UsageError
from cache.index import Index
from cache.journal import Journal
from cache.journaling import JournalKeeper, is_sealed, orphan_seq, unsealed
from cache.model import KIND_FIFO, KIND_FILE
from cache.pages import missing_bytes
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
)
from cache.records import Attributes
from cache.staging import StagingFiles

_WAIT_S = 30.0
ATTRIBUTES = Attributes(0o644, 1, 2, 3, xattrs={b"user.a": b"\0\xff"})
replace = msgspec.structs.replace


def put(path: bytes = b"d/f", staged: int = 7, **changes: object) -> Put:
    return replace(Put(path, 100 + staged, KIND_FILE, staged, "", ATTRIBUTES), **changes)


def sealed(path: bytes = b"d/f", staged: int = 7, size_bytes: int = 5, **changes: object) -> Put:
    changes = {"state": SEALED, "size_bytes": size_bytes, "sealed_at_s": 1.5, **changes}
    return put(path, staged, **changes)


EACH: dict[int, Pending] = {
    1: sealed(base_etag='"e"', upload_id="u", part_bytes=5, upload_key=b"k", error="why"),
    2: Mark(b"d", 3, ATTRIBUTES),
    3: Delete(b"\xff/x"),
    1 << 40: Move(b"a/", b"b", 4, 0o40000, copied=True),
    1 << 41: Restate(b"f", 5, KIND_FILE, ATTRIBUTES, 9),
    1 << 42: Local(b"fifo", 6, KIND_FIFO, ATTRIBUTES),
    (1 << 63) - 1: Orphan(7, 8),
}


# The journal itself


def test_rows_come_back_in_order_after_opening_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "store")
    shuffled = list(EACH.items())
    random.Random(1).shuffle(shuffled)
    journal.write(dict(shuffled))
    journal.close()
    again = Journal(tmp_path, "store")
    assert again.rows() == EACH and list(again.rows()) == sorted(EACH)
    again.write({1: None, 2: None, 99: None, 3: Delete(b"other")})
    assert again.rows() == {seq: row for seq, row in EACH.items() if seq > 3} | {3: Delete(b"other")}
    again.close()


def test_any_thread_may_write(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "store")
    for seq in range(1, 4):
        thread = threading.Thread(target=journal.write, args=({seq: Delete(b"k")},))
        thread.start()
        thread.join()
    assert list(journal.rows()) == [1, 2, 3]
    journal.close()


def write_meta(directory: Path, name: bytes, value: bytes) -> None:
    with lmdb.open(str(directory / "journal.lmdb"), max_dbs=2) as env:
        meta = env.open_db(b"meta")
        with env.begin(write=True, db=meta) as txn:
            txn.put(name, value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            b"format",
            b"sluicefs-journal 3",
            ["sluicefs-journal 3", "sluicefs-journal 2", "version that wrote it"],
        ),
        (b"format", b"\xff" * 500, ["version that wrote it"]),
        (b"store", b"another", ["another cache directory"]),
    ],
)
def test_a_journal_of_another_version_or_cache_is_refused_and_stays(
    tmp_path: Path, name: bytes, value: bytes, words: list[str]
) -> None:
    journal = Journal(tmp_path, "store")
    journal.write(EACH)
    journal.close()
    write_meta(tmp_path, name, value)
    for _ in range(2):
        with pytest.raises(UsageError) as caught:
            Journal(tmp_path, "store")
        text = str(caught.value)
        assert str(tmp_path) in text and "\n" not in text and all(word in text for word in words)
    write_meta(tmp_path, name, {b"format": b"sluicefs-journal 2", b"store": b"store"}[name])
    journal = Journal(tmp_path, "store")
    assert journal.rows() == EACH
    journal.close()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "text": lambda body: b"no journal" * 10_000,
    "zeros": lambda body: bytes(len(body)),
    "torn": lambda body: b"\xff" * 8192 + body[8192:],
    "cut off": lambda body: body[: len(body) - 4096],
    "two pages": lambda body: body[:8192],
    "one byte": lambda body: b"x",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_journal_is_one_clear_line_and_stays_as_it_is(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path, "store")
    journal.write({seq: put(b"f" * 900, seq) for seq in range(1, 50)})
    journal.close()
    path = tmp_path / "journal.lmdb" / "data.mdb"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"journal can't be used.*fsck.*lost\+found") as caught:
        Journal(tmp_path, "store")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_journal_that_is_shorter_than_its_pages_may_be_good(tmp_path: Path) -> None:
    """Pages at the end that a transaction took and gave back are never written."""
    journal = Journal(tmp_path, "store")
    journal.write({1: Delete(b"k")})
    journal.close()
    path = tmp_path / "journal.lmdb"
    with lmdb.open(str(path), max_dbs=2) as env:
        pending = env.open_db(b"pending")
        with env.begin(write=True, db=pending) as txn:
            txn.put(b"\0" * 8, bytes(100_000))
            txn.delete(b"\0" * 8)
        assert missing_bytes(env, path) > 0
    for _ in range(2):
        journal = Journal(tmp_path, "store")
        assert journal.rows() == {1: Delete(b"k")}
        journal.write({2: Delete(b"m")})
        journal.write({2: None})
        journal.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal.lmdb"]


def test_a_row_that_no_version_wrote_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "store")
    journal.write({1: Delete(b"k")})
    journal.close()
    with lmdb.open(str(tmp_path / "journal.lmdb"), max_dbs=2) as env:
        pending = env.open_db(b"pending")
        with env.begin(write=True, db=pending) as txn:
            txn.put(b"\0" * 8, b"\xc1")
    journal = Journal(tmp_path, "store")
    with pytest.raises(CacheError, match=r"journal\.lmdb"):
        journal.rows()
    journal.close()


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "journal.lmdb").write_text("a file")
    with pytest.raises(UsageError, match="journal can't be used"):
        Journal(tmp_path, "store")


def test_after_a_write_that_failed_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, "store")
    journal.write({1: Delete(b"a")})
    with monkeypatch.context() as patch:
        patch.setattr("cache.journal.encode_pending", _refuse)
        with pytest.raises(CacheError, match="Input/output error"):
            journal.write({1: None, 2: Delete(b"b")})
    assert journal.rows() == {1: Delete(b"a")}
    journal.write({2: Delete(b"b")})
    assert journal.rows() == {1: Delete(b"a"), 2: Delete(b"b")}
    journal.close()


def _refuse(_: object) -> bytes:
    raise lmdb.Error("Input/output error")


# Its keeper


class WatchedJournal(Journal):
    """Counts, holds and fails writes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "store")
        self.writes: list[dict[int, Pending | None]] = []
        self.gate: threading.Event | None = None
        self.began = threading.Event()
        self.error: SluiceError | None = None

    def write(self, changes: Mapping[int, Pending | None]) -> None:
        self.began.set()
        if self.gate is not None:
            assert self.gate.wait(_WAIT_S)
        if self.error is not None:
            raise self.error
        super().write(changes)
        self.writes.append(dict(changes))


@dataclass
class WatchedStaging(StagingFiles):
    """Notes what is synced, in the order of the steps."""

    home: Path
    steps: list[str] = field(default_factory=list)
    error: SluiceError | None = None

    def __post_init__(self) -> None:
        super().__init__(self.home)

    def sync(self, numbers: object) -> None:
        if self.error is not None:
            raise self.error
        assert isinstance(numbers, list)
        self.steps.append(f"bytes {sorted(numbers)}")

    def sync_entries(self) -> None:
        self.steps.append("names")


@dataclass
class Bench:
    index: Index
    table: PendingTable
    journal: WatchedJournal
    staging: WatchedStaging
    keeper: JournalKeeper
    engine: Engine

    def change(self, *rows: tuple[int, Pending | None]) -> None:
        """Put or remove rows, as one commit does."""
        with self.index.write() as w:
            for seq, row in rows:
                if row is None:
                    self.table.remove(w, seq)
                else:
                    self.table.replace(w, seq, row)

    async def quiet(self) -> dict[int, Pending]:
        """Return the journal's rows once it has everything and all that is sealed."""
        while True:
            await self.keeper.settled()
            if not self.keeper._unsealed and not self.table.unjournaled:
                return self.journal.rows()
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def bench(path: Path, *, seals: bool = True, rows: Mapping[int, Pending] = {}) -> AsyncIterator[Bench]:
    """Everything around a keeper; without *seals*, sealed files are synced only where they must be."""
    index, table, journal = Index(path), PendingTable(), WatchedJournal(path)
    staging, engine = WatchedStaging(path), Engine("disk", 2)
    staging.prepare()
    table.load(rows.items())
    keeper = JournalKeeper(
        table, journal, staging, engine, gather_s=0, seal_pause_s=0 if seals else 1e9, retry_s=0
    )
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            yield Bench(index, table, journal, staging, keeper, engine)
            nursery.cancel_scope.cancel()
    finally:
        engine.stop()
        journal.close()
        index.close()


async def test_what_was_changed_is_in_the_journal_once_settled(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.change((1, Delete(b"a")), (2, Delete(b"b")))
        await b.keeper.settled()
        assert b.journal.rows() == {1: Delete(b"a"), 2: Delete(b"b")}
        b.change((1, None), (2, Delete(b"c")))
        await b.keeper.settled()
        assert b.journal.rows() == {2: Delete(b"c")}
        writes = len(b.journal.writes)
        await b.keeper.settled()
        assert len(b.journal.writes) == writes  # There was nothing to write.


async def test_the_journal_follows_even_if_nobody_waits(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.change((1, Delete(b"a")))
        assert await trio.to_thread.run_sync(b.journal.began.wait, _WAIT_S)


async def test_what_gathers_during_a_write_is_one_write(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.journal.gate = threading.Event()
        settled: list[int] = []

        async def settle(seq: int) -> None:
            b.change((seq, Delete(b"%d" % seq)))
            await b.keeper.settled()
            settled.append(seq)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(settle, 1)
            assert await trio.to_thread.run_sync(b.journal.began.wait, _WAIT_S)
            for seq in range(2, 30):
                nursery.start_soon(settle, seq)
            await trio.testing.wait_all_tasks_blocked()
            assert settled == []
            b.journal.gate.set()
        assert sorted(settled) == list(range(1, 30))
        assert [len(write) for write in b.journal.writes] == [1, 28]


async def test_a_waiter_whose_change_is_being_written_waits_for_it(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.journal.gate = threading.Event()
        b.change((1, Delete(b"a")))
        assert await trio.to_thread.run_sync(b.journal.began.wait, _WAIT_S)
        async with trio.open_nursery() as nursery:
            done = trio.Event()

            async def settle() -> None:
                await b.keeper.settled()
                done.set()

            nursery.start_soon(settle)
            await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set()
            b.journal.gate.set()
        assert list(b.journal.rows()) == [1]


async def test_names_are_on_the_disk_before_the_journal_names_a_file(tmp_path: Path) -> None:
    async with bench(tmp_path, seals=False) as b:
        for seq, staged, steps in [(1, 9, ["names"]), (2, 3, ["names"] * 2), (2, 3, ["names"] * 2)]:
            b.change((seq, put(b"f%d" % seq, staged)))
            await b.keeper.settled()
            assert b.staging.steps == steps


async def test_an_fsync_waits_for_no_other_files_bytes(tmp_path: Path) -> None:
    """The journal has the sealed file as it stood while it was open, and as sealed later."""
    async with bench(tmp_path, seals=False) as b:
        b.change((1, sealed(synced_bytes=3)), (2, put(b"synced", 8, synced_bytes=4)))
        await b.keeper.settled()
        assert b.staging.steps == ["names"]
        assert b.journal.rows() == {
            1: put(synced_bytes=3, sealed_at_s=1.5),
            2: put(b"synced", 8, synced_bytes=4),
        }


@pytest.mark.parametrize("state", [SEALED, CONFLICT])
async def test_what_is_sealed_is_called_so_once_its_bytes_are_on_the_disk(tmp_path: Path, state: str) -> None:
    async with bench(tmp_path) as b:
        rows = {seq: sealed(b"f%d" % seq, seq, state=state) for seq in range(1, 20)}
        b.change(*rows.items())
        assert await b.quiet() == rows
        synced = [step for step in b.staging.steps if step.startswith("bytes")]
        assert synced and all(str(number) in " ".join(synced) for number in rows)


async def test_a_file_written_again_is_synced_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.change((1, sealed()))
        await b.quiet()
        b.change((1, put()))
        assert (await b.quiet())[1] == put()
        b.change((1, sealed(sealed_at_s=2.5)))
        assert (await b.quiet())[1] == sealed(sealed_at_s=2.5)
        assert b.staging.steps == ["names", "bytes [7]", "bytes [7]"]


async def test_what_goes_before_its_bytes_are_synced_is_not_sealed(tmp_path: Path) -> None:
    async with bench(tmp_path, seals=False) as b:
        b.change((1, sealed()), (2, sealed(b"g", 8)), (3, sealed(b"h", 9)))
        await b.keeper.settled()
        b.change((1, None), (2, put(b"g", 8)), (3, sealed(b"h", 9, sealed_at_s=3.0)))
        await b.keeper.settled()
        assert await b.keeper._seal_gathered()
        assert b.staging.steps == ["names", "bytes [9]"]


@pytest.mark.parametrize("seq", [1, 5], ids=["same number", "new number"])
async def test_renaming_a_whole_file_leaves_it_whole(tmp_path: Path, seq: int) -> None:
    """Its bytes are on the disk already: at no moment may the journal say less."""
    async with bench(tmp_path, seals=False, rows={1: sealed()}) as b:
        b.change((1, None), (seq, sealed(b"new")))
        await b.keeper.settled()
        assert b.journal.rows() == {seq: sealed(b"new")}
        assert not [step for step in b.staging.steps if step.startswith("bytes")]


@pytest.mark.parametrize(
    "left", [None, Orphan(107, 7), sealed(b"elsewhere", 7)], ids=["gone", "open", "moved"]
)
async def test_what_takes_the_place_of_whole_content_is_whole_first(
    tmp_path: Path, left: Pending | None
) -> None:
    """write tmp, rename over the last one: after a power loss there is the old one or the new one."""
    async with bench(tmp_path, seals=False, rows={1: sealed(), 2: put(b"tmp", 8)}) as b:
        b.change((1, left), (2, None), (3, sealed(b"d/f", 8)), (4, sealed(b"other", 9)))
        await b.keeper.settled()
        is_moved = isinstance(left, Put)
        rows = b.journal.rows()
        assert rows[3] == (put(b"d/f", 8, sealed_at_s=1.5) if is_moved else sealed(b"d/f", 8))
        assert rows[4] == put(b"other", 9, sealed_at_s=1.5)
        assert b.staging.steps[: 1 if not is_moved else 0] == (["bytes [8]"] if not is_moved else [])


async def test_a_discarded_file_goes_after_its_row_has_left_the_journal(tmp_path: Path) -> None:
    async with bench(tmp_path, rows={1: sealed()}) as b:
        b.journal.write({1: sealed()})
        b.staging.create(7)
        b.journal.gate, b.journal.began = threading.Event(), threading.Event()
        b.change((1, None))
        b.keeper.discard(7)
        assert await trio.to_thread.run_sync(b.journal.began.wait, _WAIT_S)
        assert b.staging.exists(7)
        b.journal.gate.set()
        await b.keeper.settled()
        await b.keeper.settled()
        assert not b.staging.exists(7)
        assert b.journal.rows() == {orphan_seq(7): Orphan(0, 7)}  # It might be back after a power loss.
        b.staging.steps.clear()
        b.change((2, Delete(b"next")))
        await b.keeper.settled()
        assert b.staging.steps == ["names"] and b.journal.rows() == {2: Delete(b"next")}


async def test_a_failing_journal_makes_the_mount_read_only_until_it_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(tmp_path) as b:
        b.journal.error = CacheError("journal.lmdb: No space left on device")
        b.staging.create(7)
        b.keeper.discard(7)
        b.change((1, Delete(b"a")))
        for _ in range(3):
            with pytest.raises(MountReadOnly, match="No space left"):
                await b.keeper.settled()
        assert b.keeper.failed and "No space left" in b.keeper.read_only_because
        with pytest.raises(MountReadOnly):
            b.keeper.check()
        b.change((2, Delete(b"b")))
        b.journal.error = None
        while b.keeper.failed:
            await trio.lowlevel.checkpoint()
        b.keeper.check()
        await b.keeper.settled()
        await b.keeper.settled()
        assert {1: Delete(b"a"), 2: Delete(b"b")}.items() <= b.journal.rows().items()
        assert not b.staging.exists(7)
    levels = [record.levelname for record in caplog.records if record.name == "cache.journaling"]
    assert levels == ["CRITICAL", "WARNING"]


@pytest.mark.parametrize("first", [True, False], ids=["before the write", "in the background"])
async def test_lost_bytes_of_a_staging_file_are_never_taken_for_synced(tmp_path: Path, first: bool) -> None:
    """The kernel tells of lost pages once: the next fsync succeeds, and would be believed."""
    async with bench(tmp_path, rows={1: sealed()} if first else {}) as b:
        b.staging.error = CacheError("staging/8: Input/output error")
        b.change((1, None), (2, sealed(b"d/f", 8)))
        while not b.keeper.failed:
            await trio.lowlevel.checkpoint()
        b.staging.error = None
        b.change((3, Delete(b"x")))
        while b.table.unjournaled:
            await trio.lowlevel.checkpoint()
        with pytest.raises(MountReadOnly, match="Input/output"):
            await b.keeper.settled()


async def test_a_full_disk_under_the_staging_files_is_no_lasting_failure(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.staging.error = StagingFull("staging: No space left on device")
        b.change((1, sealed()))
        while not b.keeper.failed:
            await trio.lowlevel.checkpoint()
        b.staging.error = None
        b.change((2, Delete(b"x")))
        while b.keeper.failed:
            await trio.lowlevel.checkpoint()
        assert (await b.quiet())[1] == sealed()


async def test_a_mount_that_lacks_bytes_stays_read_only(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        keeper = JournalKeeper(
            b.table, b.journal, b.staging, b.engine, read_only_because="d/f: its bytes are missing"
        )
        with pytest.raises(MountReadOnly, match="missing"):
            keeper.check()
        keeper._recover()
        assert keeper.failed


async def test_at_the_end_all_is_written_and_sealed(tmp_path: Path) -> None:
    async with bench(tmp_path, seals=False) as b:
        b.change((1, sealed()))
        await b.keeper.settled()
        b.change((2, sealed(b"g", 8)))
    journal = b.journal = WatchedJournal(tmp_path)
    b.keeper._journal = journal
    b.keeper.finish()
    assert journal.rows() == {1: sealed(), 2: sealed(b"g", 8)}
    journal.close()


async def test_after_a_commit_that_failed_the_journal_gets_what_the_index_has(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.change((1, Delete(b"a")))
        await b.keeper.settled()
        with pytest.raises(RuntimeError), b.index.write() as w:
            b.table.replace(w, 1, Delete(b"wrong"))
            b.table.replace(w, 2, Delete(b"wrong too"))
            raise RuntimeError("the transaction fails")
        b.table.load([(1, Delete(b"a"))])
        await b.keeper.settled()
        assert b.journal.rows() == {1: Delete(b"a")}


@pytest.mark.parametrize("seed", range(5))
async def test_the_journal_is_always_a_state_that_the_table_had(tmp_path: Path, seed: int) -> None:
    """Random changes and renames; what is sealed may be called open."""
    rng = random.Random(seed)
    states: list[dict[int, tuple[bytes, int]]] = [{}]

    def view(rows: Mapping[int, Pending]) -> dict[int, tuple[bytes, int]]:
        return {seq: (row.path, row.staged) for seq, row in rows.items() if isinstance(row, Put)}

    async with bench(tmp_path) as b:
        for step in range(1, 120):
            rows = list(b.table.rows.items())
            kind = rng.choice(["new", "seal", "rename", "remove"]) if rows else "new"
            seq, row = rng.choice(rows) if rows else (0, Delete(b""))
            if kind == "new":
                b.change((1000 + step, put(b"p%d" % step, step)))
            elif isinstance(row, Put) and kind == "seal":
                b.change((seq, replace(row, state=SEALED, size_bytes=step, sealed_at_s=float(step))))
            elif isinstance(row, Put) and kind == "rename":
                b.change((seq, None), (2000 + step, replace(row, path=b"r%d" % step)))
            else:
                b.change((seq, None))
            states.append(view(b.table.rows))
            if rng.random() < 0.3:
                await b.keeper.settled()
            assert view(b.journal.rows()) in states
        rows_in_the_end = await b.quiet()
        assert rows_in_the_end == b.table.rows


def test_errors_of_the_system_name_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("cache.journal.Path.mkdir", refuse)
    with pytest.raises(UsageError, match="Read-only file system"):
        Journal(tmp_path, "store")


def test_open_rows_are_never_sealed_by_mistake() -> None:
    assert not is_sealed(put()) and not is_sealed(None) and not is_sealed(Delete(b"k"))
    assert not is_sealed(sealed(staged=0))  # A symlink has no bytes of its own.
    assert unsealed(sealed()).state == OPEN and unsealed(sealed()).size_bytes == -1
