"""Changes happen once, are durable when that is said, and are refused as a whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from cache import client, messages
from cache.config import CacheDirectory, LakeConfig, MountConfig
from cache.errors import (
    CacheError,
    MountReadOnly,
    NameExists,
    NameMissing,
)
from cache.index_writer import IndexWriter
from cache.journal import Journal
from cache.model import MIB, ROOT_INODE
from cache.mover import Mover, TierPlan, run_mover
from cache.pending import CONFLICT, OPEN, SEALED, Put
from cache.renaming import replace
from cache.store import open_store
from tests.changing import GID, UID, Files
from tests.wiring import Shared, WatchedLake, open_cache


@pytest.fixture
def lake() -> WatchedLake:
    lake = WatchedLake()
    lake.fill({"data/one": b"1", "data/two": b"22", "data/sub/three": b"333", "top": b"t"})
    return lake


@pytest.fixture
async def files(tmp_path: Path, lake: WatchedLake) -> AsyncIterator[Files]:
    async with open_cache(tmp_path, lake, writable=True) as cache:
        yield Files(cache)


# Once


async def test_a_change_that_comes_twice_happens_once(files: Files) -> None:
    request = messages.Create(ROOT_INODE, b"f", 0o644, UID, GID)
    first = await files.changes.apply(request, 1000)
    again = await files.changes.apply(request, 1000)
    assert first.value == again.value and len(files.rows()) == 1
    await files.changes.apply(messages.Unlink(ROOT_INODE, b"f"), 1002)
    await files.changes.apply(messages.Unlink(ROOT_INODE, b"f"), 1002)
    with pytest.raises(NameMissing):
        await files.changes.apply(messages.Unlink(ROOT_INODE, b"f"), 1004)


async def test_a_change_that_comes_twice_at_one_time_happens_once(files: Files) -> None:
    request, values = messages.Create(ROOT_INODE, b"f", 0o644, UID, GID), []

    async def ask() -> None:
        values.append((await files.changes.apply(request, 1000)).value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask)
    assert len(set(values)) == 1 and len(files.rows()) == 1


async def test_the_next_mover_remembers_and_the_next_mount_does_not(
    tmp_path: Path, lake: WatchedLake
) -> None:
    request = messages.Create(ROOT_INODE, b"f", 0o644, UID, GID)
    async with open_cache(tmp_path, lake, writable=True) as cache:
        inode = (await Files(cache).changes.apply(request, 1000)).value
        shared = cache.shared
    async with open_cache(tmp_path, lake, writable=True, first=False, shared=shared) as cache:
        assert (await Files(cache).changes.apply(request, 1000)).value == inode
    async with open_cache(tmp_path, lake, writable=True) as cache:
        with pytest.raises(NameExists):
            await Files(cache).changes.apply(request, 1000)


async def test_answers_are_remembered_up_to_a_number(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.changes._ANSWERS_MAX", 3)
    inode = await files.create_open("f")
    for number in range(100, 110, 2):
        await files.changes.apply(messages.SetAttributes(inode, mode=number), number)
    assert files.cache.index.answer_ids() == [104, 106, 108]


# Durability and refusals


async def test_sync_notes_the_length_and_waits_for_the_journal(files: Files) -> None:
    inode = await files.create_open("f")
    await files.changes.sync(inode, 5, remote=False)
    writing = files.cache.writing
    assert writing is not None
    (row,) = writing.ledger.journal.rows().values()
    assert isinstance(row, Put) and row.synced_bytes == 5


@pytest.mark.parametrize(("keep_bytes", "synced_bytes"), [(0, -1), (3, 3), (5, 5), (9, 5), (-1, 5)])
async def test_what_is_cut_off_is_not_durable_any_more_before_it_is_written_again(
    files: Files, keep_bytes: int, synced_bytes: int
) -> None:
    inode = await files.create_open("f")
    files.write_open(inode, b"12345")
    await files.changes.sync(inode, 5, remote=False)
    await files.changes.stage(inode, keep_bytes)
    writing = files.cache.writing
    assert writing is not None
    (row,) = writing.ledger.journal.rows().values()
    assert isinstance(row, Put) and row.synced_bytes == synced_bytes


async def test_a_file_that_is_opened_while_it_is_to_be_sealed_stays_open(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode = await files.create_open("f")
    files.write_open(inode, b"12345")
    commit = files.cache.committer.commit

    async def open_first(change: Callable[[IndexWriter], object], *, patient: bool) -> object:
        monkeypatch.undo()
        files.opens.opened(inode, writing=True)
        await files.changes.stage(inode, -1)
        return await commit(change)

    monkeypatch.setattr(files.cache.committer, "commit", open_first)
    await files.close(inode)
    (row,) = files.rows()
    assert isinstance(row, Put) and (row.state, row.size_bytes) == (OPEN, -1)
    files.write_open(inode, b"1234567")
    await files.close(inode)
    (row,) = files.rows()
    assert isinstance(row, Put) and (row.state, row.size_bytes) == (SEALED, 7)


@pytest.mark.parametrize("state", [SEALED, CONFLICT])
async def test_closing_gives_a_sealed_file_the_size_that_it_has(files: Files, state: str) -> None:
    inode = await files.create("f", b"12345")
    table = files.cache.table
    (seq,) = table.rows

    def change(w: IndexWriter) -> None:
        row = table.rows[seq]
        assert isinstance(row, Put)
        table.replace(w, seq, replace(row, state=state))

    await files.cache.committer.commit(change)
    files.write_open(inode, b"1234567")
    await files.changes.closed(inode)
    (row,) = files.rows()
    assert isinstance(row, Put) and (row.state, row.size_bytes) == (state, 7)
    assert (await files.node("f")).size_bytes == 7
    await files.changes.closed(inode)
    assert files.rows() == [row]


async def test_who_waits_for_room_is_told_to_ask_again_after_a_while(
    tmp_path: Path, lake: WatchedLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker gives up a request that nobody answers."""
    monkeypatch.setattr("cache.changes._ASK_AGAIN_S", 0.001)
    async with open_cache(tmp_path, lake, writable=True, dirty_max=0) as cache:
        with trio.fail_after(30):
            await Files(cache).changes.await_room()
    assert client._ANSWER_S_MAX > 2 * 300.0


async def test_at_the_end_the_journal_knows_what_is_whole(tmp_path: Path, lake: WatchedLake) -> None:
    async with open_cache(tmp_path, lake, writable=True) as cache:
        writing = cache.writing
        assert writing is not None
        await Files(cache).create("f", b"12345")
        await writing.settle()
        cache.nursery.cancel_scope.cancel()
        writing.finish()
        (row,) = writing.ledger.journal.rows().values()
        assert isinstance(row, Put) and (row.state, row.size_bytes) == (SEALED, 5)


async def test_the_mover_finishes_the_journal_when_nothing_runs_any_more(
    tmp_path: Path, lake: WatchedLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_directory = tmp_path / "cache"
    plans = [TierPlan("nvme0", cache_directory, False, 64 * MIB)]
    config = MountConfig(LakeConfig("s3://bucket"), tmp_path, (CacheDirectory(cache_directory),))
    store = open_store(config)
    monkeypatch.setattr("cache.mover.open_lake", lambda config: lake)
    shared = Shared.make()

    async def serve(mover: Mover, changes: object) -> None:
        request = messages.Create(ROOT_INODE, b"f", 0o644, UID, GID)
        answer = await mover.handle(request, 2)
        await mover.handle(messages.Closed(answer.value))

    await run_mover(config, plans, shared, serve, first=True)  # type: ignore[arg-type]
    journal = Journal(cache_directory, store.id)
    rows = list(journal.rows().values())
    journal.close()
    store.release()
    assert [(row.path, row.state) for row in rows if isinstance(row, Put)] == [(b"f", SEALED)]


async def test_a_journal_that_failed_refuses_changes(files: Files) -> None:
    inode = await files.create_open("f")
    assert files.cache.writing is not None
    files.cache.writing.keeper.read_only_because = "the disk"
    for refused in (
        lambda: files.create_open("g"),
        lambda: files.changes.stage(inode, -1),
        lambda: files.changes.sync(inode, 0, False),
    ):
        with pytest.raises(MountReadOnly, match="the disk"):
            await refused()


async def test_a_failed_transaction_takes_everything_back(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    await files.create("before")
    whole = IndexWriter.finish

    def fail(w: IndexWriter) -> None:
        raise CacheError("the disk is full")

    monkeypatch.setattr(IndexWriter, "finish", fail)
    with pytest.raises(CacheError, match="full"):
        await files.create_open("f")
    monkeypatch.setattr(IndexWriter, "finish", whole)
    assert files.paths() == [b"before"]
    assert len(files.staged()) == 1
    noted = files.cache.table.unjournaled.values()
    assert all(row is None or row in files.rows() for row in noted)
    await files.create("f")
    assert files.paths() == [b"before", b"f"]


async def test_a_refused_change_leaves_the_others_of_its_transaction(files: Files) -> None:
    await files.find("top")
    results: list[str] = []

    async def make(name: str) -> None:
        try:
            await files.apply(messages.Create(ROOT_INODE, name.encode(), 0o644, UID, GID))
            results.append(name)
        except NameExists:
            results.append("refused")

    async with trio.open_nursery() as nursery:
        for name in ("a", "top", "b"):
            nursery.start_soon(make, name)
    assert sorted(results) == ["a", "b", "refused"]
    assert sorted(files.paths()) == [b"a", b"b"]


# Dirty bytes


class FullSender:
    dirty_bytes = 100

    def wake(self) -> None:
        pass

    def renamed(self, parent: int, name: bytes) -> None:
        pass

    async def wait_for(self, inode: int) -> None:
        pass


async def test_writers_wait_while_there_are_too_many_dirty_bytes(
    tmp_path: Path, lake: WatchedLake, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_cache(tmp_path, lake, writable=True, dirty_max=100) as cache:
        changes, sender = Files(cache).changes, FullSender()
        changes._sender = sender
        assert cache.shared is not None
        cache.shared.counters.row(1).add("bytes_written", 1000)
        changes.set_budget()
        assert cache.shared.budget.allowed_until == 1000
        waited = trio.Event()

        async def wait() -> None:
            await changes.await_room()
            waited.set()

        cache.nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not waited.is_set()
        sender.dirty_bytes = 40
        await waited.wait()
        changes.set_budget()
        assert cache.shared.budget.allowed_until == 1060
    assert "writers wait" in caplog.text
