"""The threads that do blocking I/O, and the group commit of the index."""

from __future__ import annotations

import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import lmdb
import outcome
import pytest
import trio
import trio.lowlevel
import trio.testing
from trio.testing import wait_all_tasks_blocked

from cache.committer import Change, Committer
from cache.engine import Engine
from cache.errors import CacheError, NameExists, SluiceError
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.model import KIND_FILE, ROOT_INODE, Inode
from cache.records import DirectoryState, Node

_WAIT_S = 30.0


async def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds: what is awaited ends in other threads."""
    with trio.fail_after(_WAIT_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


class Gate:
    """A job that says when it began and ends when it may."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log = log
        self._name = name
        self.began = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> str:
        self._log.append(self._name)
        self.began.set()
        assert self.may_end.wait(_WAIT_S)
        return self._name

    async def has_begun(self) -> None:
        assert await trio.to_thread.run_sync(self.began.wait, _WAIT_S)


@pytest.fixture
async def one_thread() -> AsyncIterator[Engine]:
    engine = Engine("test", 1)
    yield engine
    engine.stop()


async def test_a_call_runs_in_a_thread_and_gives_its_result(one_thread: Engine) -> None:
    thread = await one_thread.run(threading.current_thread)
    assert thread is not threading.current_thread()
    assert thread.name == "test-0"


async def test_a_call_raises_what_it_raises(one_thread: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        await one_thread.run(lambda: 1 // 0)
    assert await one_thread.run(lambda: 5) == 5


async def test_demand_overtakes_what_is_read_ahead(one_thread: Engine) -> None:
    order: list[str] = []
    first = Gate(order, "first")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one_thread.run, first)
        await first.has_begun()
        for i in range(3):
            nursery.start_soon(lambda i=i: one_thread.run(lambda: order.append(f"ahead{i}"), demand=False))
        await wait_all_tasks_blocked()
        for i in range(3):
            nursery.start_soon(lambda i=i: one_thread.run(lambda: order.append(f"demand{i}")))
        await wait_all_tasks_blocked()
        first.may_end.set()
    assert order[0] == "first"
    assert {name[:-1] for name in order[1:4]} == {"demand"}
    assert {name[:-1] for name in order[4:]} == {"ahead"}


async def test_read_ahead_leaves_threads_free_for_demand() -> None:
    engine, log = Engine("test", 3, reserved=1), list[str]()
    gates = [Gate(log, f"ahead{i}") for i in range(3)]
    async with trio.open_nursery() as nursery:
        for gate in gates:
            nursery.start_soon(lambda gate=gate: engine.run(gate, demand=False))
            await wait_all_tasks_blocked()
        for gate in gates[:2]:
            await gate.has_begun()
        assert await engine.run(lambda: "demand") == "demand"
        assert not gates[2].began.is_set()
        gates[0].may_end.set()
        await gates[2].has_begun()
        for gate in gates:
            gate.may_end.set()
    engine.stop()


async def test_a_job_cancelled_while_it_waits_never_runs(one_thread: Engine) -> None:
    log: list[str] = []
    first = Gate(log, "first")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one_thread.run, first)
        await first.has_begun()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as waiting:
                waiting.start_soon(one_thread.run, lambda: log.append("never"))
                await wait_all_tasks_blocked()
                scope.cancel()
        first.may_end.set()
    await one_thread.run(lambda: log.append("last"))
    assert log == ["first", "last"]


async def test_a_job_cancelled_while_it_runs_runs_to_its_end_and_nobody_waits(one_thread: Engine) -> None:
    log: list[str] = []
    job = Gate(log, "job")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_thread.run, job)
            await job.has_begun()
            scope.cancel()
    assert scope.cancelled_caught
    job.may_end.set()
    assert await one_thread.run(lambda: "next") == "next"


async def test_a_thread_that_waits_keeps_nothing_of_its_last_job(one_thread: Engine) -> None:
    """The body of an upload's part, say, of which every thread kept one."""

    class Body:
        pass

    body = Body()
    kept = weakref.ref(body)
    await one_thread.run(partial(id, body))
    del body
    await until(lambda: kept() is None)


async def test_many_calls_at_once_each_get_their_own_result() -> None:
    engine, results = Engine("test", 4), dict[int, int]()

    async def one(i: int) -> None:
        results[i] = await engine.run(lambda: i * i, demand=bool(i % 2))

    async with trio.open_nursery() as nursery:
        for i in range(2000):
            nursery.start_soon(one, i)
    engine.stop()
    assert results == {i: i * i for i in range(2000)}


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path)
    yield index
    index.close()


class CountingIndex(Index):
    """Counts transactions, and fails those that it is told to."""

    commits = 0
    failing = False

    def write(self):  # type: ignore[no-untyped-def]
        self.commits += 1
        if self.failing:
            raise CacheError("the disk is full")
        return super().write()


def put(name: str) -> Change:
    return lambda w: w.set_meta(name.encode(), b"1")


async def test_changes_that_wait_together_are_one_transaction(tmp_path: Path, nursery: trio.Nursery) -> None:
    index = CountingIndex(tmp_path)
    committer = Committer(index)
    nursery.start_soon(committer.run)
    async with trio.open_nursery() as waiting:
        for i in range(50):
            waiting.start_soon(committer.commit, put(f"m{i}"))
    assert index.commits == 1
    assert all(index.meta(b"m%d" % i) for i in range(50))
    nursery.cancel_scope.cancel()
    index.close()


async def test_what_is_due_is_committed_at_once_and_leaves_what_waits_with_patience(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    index = CountingIndex(tmp_path)
    committer, told = Committer(index), []

    def refuse(w: IndexWriter) -> None:
        raise SluiceError("refused")

    committer.commit_then(put("patient"), told.append, patient=True)
    committer.commit_due(put("due"), told.append)
    committer.commit_due(refuse, told.append)
    committer.flush_due()
    assert index.commits == 1 and index.meta(b"due") == b"1" and index.meta(b"patient") is None
    assert told[0] is None and str(told[1]) == "refused" and len(told) == 2
    committer.flush_due()
    assert index.commits == 1  # Nothing is.
    committer.flush()
    assert index.meta(b"patient") == b"1" and told[2] is None
    index.close()


async def test_a_patient_change_shares_the_next_transaction_and_is_committed_without_one_too(
    tmp_path: Path, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    index = CountingIndex(tmp_path)
    committer = Committer(index)
    nursery.start_soon(committer.run)
    async with trio.open_nursery() as both:
        both.start_soon(partial(committer.commit, put("first"), patient=True))
        await wait_all_tasks_blocked()
        assert index.commits == 0
        both.start_soon(committer.commit, put("second"))
    assert index.commits == 1 and index.meta(b"first") == index.meta(b"second") == b"1"
    async with trio.open_nursery() as alone:
        alone.start_soon(partial(committer.commit, put("alone"), patient=True))
        await wait_all_tasks_blocked()
        assert index.commits == 1
        mock_clock.jump(1)
    assert index.commits == 2 and index.meta(b"alone") == b"1"
    nursery.cancel_scope.cancel()
    index.close()


async def test_a_commit_returns_only_when_readers_can_see_it(index: Index, nursery: trio.Nursery) -> None:
    committer = Committer(index)
    nursery.start_soon(committer.run)
    for i in range(5):
        await committer.commit(put(f"m{i}"))
        assert index.meta(b"m%d" % i) == b"1"
    nursery.cancel_scope.cancel()


async def test_a_failed_transaction_fails_all_who_wait_for_it_and_nobody_after(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    index = CountingIndex(tmp_path)
    committer = Committer(index)
    nursery.start_soon(committer.run)
    errors: list[CacheError] = []

    async def one(i: int) -> None:
        try:
            await committer.commit(put(f"m{i}"))
        except CacheError as error:
            errors.append(error)

    index.failing = True
    async with trio.open_nursery() as waiting:
        for i in range(3):
            waiting.start_soon(one, i)
    assert len(errors) == 3 and index.commits == 1
    index.failing = False
    await committer.commit(put("after"))
    assert index.meta(b"after") and not index.meta(b"m0")
    nursery.cancel_scope.cancel()
    index.close()


async def test_an_lmdb_error_takes_the_whole_transaction_back_and_is_a_cache_error(
    index: Index, nursery: trio.Nursery
) -> None:
    committer = Committer(index)
    nursery.start_soon(committer.run)

    def refuse(w: IndexWriter) -> None:
        w.set_meta(b"half", b"1")
        raise lmdb.MapFullError("full")

    with pytest.raises(CacheError, match="full"):
        await committer.commit(refuse)
    assert index.meta(b"half") is None
    nursery.cancel_scope.cancel()


async def test_a_queued_change_is_applied_though_its_caller_was_cancelled(
    index: Index, nursery: trio.Nursery
) -> None:
    committer = Committer(index)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as waiting:
            waiting.start_soon(committer.commit, put("m"))
            await wait_all_tasks_blocked()
            scope.cancel()
    committer.commit_nowait(put("n"))
    nursery.start_soon(committer.run)
    await committer.commit(put("o"))
    assert index.meta(b"m") and index.meta(b"n")
    nursery.cancel_scope.cancel()


async def test_a_change_that_was_refused_fails_alone_and_a_commit_returns_what_its_change_does(
    index: Index, nursery: trio.Nursery
) -> None:
    committer = Committer(index)
    nursery.start_soon(committer.run)
    results: list[object] = []

    def refuse(w: IndexWriter) -> None:
        raise NameExists("taken")

    async def one(change: Change[object]) -> None:
        try:
            results.append(await committer.commit(change))
        except NameExists as error:
            results.append(str(error))

    async with trio.open_nursery() as waiting:
        for change in (put("m"), refuse, lambda w: 5):
            waiting.start_soon(one, change)
    assert sorted(map(str, results)) == ["5", "None", "taken"]
    assert index.meta(b"m")
    nursery.cancel_scope.cancel()


async def test_a_fault_of_ours_fails_its_transaction_and_is_told_to_whoever_has_memory_to_take_back(
    index: Index, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    rolled_back: list[int] = []
    committer = Committer(index, lambda: rolled_back.append(1))
    nursery.start_soon(committer.run)

    def fail(w: IndexWriter) -> None:
        w.set_meta(b"half", b"1")
        raise ZeroDivisionError("oops")

    with pytest.raises(CacheError, match="oops"):
        await committer.commit(fail)
    assert index.meta(b"half") is None and rolled_back == [1]
    assert "a change of the index failed" in caplog.text
    nursery.cancel_scope.cancel()


async def test_a_commit_at_once_takes_those_that_wait_along_and_leaves_the_committer_listening(
    index: Index, nursery: trio.Nursery
) -> None:
    committer = Committer(index)
    nursery.start_soon(committer.run)
    await wait_all_tasks_blocked()
    committer.commit_nowait(put("m"))
    assert committer.commit_now(lambda w: 7) == 7
    assert index.meta(b"m")
    with trio.fail_after(_WAIT_S):
        await committer.commit(put("n"))
    assert index.meta(b"n")
    nursery.cancel_scope.cancel()


async def test_what_is_submitted_is_told_once_and_in_batches(one_thread: Engine) -> None:
    told: list[object] = []
    for number in range(20):
        one_thread.submit(partial(int, number), lambda result: told.append(result.unwrap()), demand=False)
    one_thread.submit(lambda: 1 // 0, told.append, demand=False)
    await until(lambda: len(told) == 21)
    assert told[:20] == [*range(20)] and isinstance(told[20], outcome.Error)


async def test_what_ends_together_is_told_at_once_with_the_arguments_and_failures_of_each(
    one_thread: Engine,
) -> None:
    first, told = Gate([], "first"), list[list[tuple[str, outcome.Outcome[object]]]]()
    one_thread.submit_gathered(first, "a", told.append)
    await first.has_begun()
    one_thread.submit_gathered(lambda: 1 / 0, "b", told.append)
    ended = threading.Event()
    one_thread.submit_gathered(ended.set, "c", told.append)
    first.may_end.set()
    assert ended.wait(_WAIT_S)  # No turn of trio's loop since the first one ended.
    await until(lambda: sum(map(len, told)) == 3)
    (names, results) = zip(*(one for batch in told for one in batch), strict=True)
    assert names == ("a", "b", "c") and results[0] == outcome.Value("first")
    assert isinstance(results[1], outcome.Error) and isinstance(results[1].error, ZeroDivisionError)
    assert len(told) < 3


@pytest.mark.parametrize("demand", [True, False])
async def test_what_follows_a_job_may_fail_alone(
    one_thread: Engine, demand: bool, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[object] = []
    one_thread.submit(lambda: 1, lambda result: 1 // 0, demand=demand)
    one_thread.submit(lambda: 2, told.append, demand=demand)
    while not told:
        await trio.lowlevel.checkpoint()
    assert "what follows a job failed" in caplog.text
    assert await one_thread.run(lambda: 3) == 3


async def test_jobs_that_had_to_wait_for_a_thread_of_the_read_ahead_all_run() -> None:
    """Tokens that were dropped while nothing might be taken are made up for."""
    engine, told = Engine("test", 4, reserved=3), list[int]()
    for number in range(50):
        engine.submit(partial(int, number), lambda result: told.append(result.unwrap()), demand=False)
        assert await engine.run(lambda: "asked") == "asked"
    while len(told) < 50:
        await trio.lowlevel.checkpoint()
    assert told == [*range(50)]
    engine.stop()


async def test_a_commit_tells_what_became_of_it(tmp_path: Path) -> None:
    index = Index(tmp_path)
    committer, told = Committer(index), list[object]()

    def refuse(writer: IndexWriter) -> None:
        raise NameExists("there is one")

    committer.commit_then(lambda writer: writer.set_meta(b"lake", b"1"), told.append)
    committer.commit_then(refuse, told.append)
    committer.commit_then(lambda writer: writer.set_meta(b"boot", b"2"), lambda error: 1 // 0)
    committer.flush()
    assert told[0] is None and isinstance(told[1], NameExists)
    assert (index.meta(b"lake"), index.meta(b"boot")) == (b"1", b"2")
    index.close()


async def test_a_commit_says_which_nodes_it_changed_and_a_failed_one_says_nothing(tmp_path: Path) -> None:
    index = Index(tmp_path)
    committer, told = Committer(index), list[set[int]]()
    committer.on_nodes = lambda inodes: told.append(set(inodes))

    def make(w: IndexWriter) -> Inode:
        w.add_root()
        return w.attach(Node(ROOT_INODE, b"a", KIND_FILE))

    one = committer.commit_now(make)
    told.clear()
    two = committer.commit_now(lambda w: w.attach(Node(ROOT_INODE, b"a", KIND_FILE, etag="other")))
    assert one in told.pop()  # The path shows another inode now.
    committer.commit_now(lambda w: w.move(two, Node(ROOT_INODE, b"b", KIND_FILE)))
    committer.commit_now(lambda w: w.detach(ROOT_INODE, b"b"))
    committer.commit_now(lambda w: w.forget(two))
    committer.commit_now(lambda w: w.touch(ROOT_INODE, 5, 1))
    assert told == [{two}, {two}, {two}, {ROOT_INODE}]

    def fail(w: IndexWriter) -> None:
        w.put_node(ROOT_INODE, Node(ROOT_INODE, b"", KIND_FILE))
        raise ValueError("a fault of ours")

    with pytest.raises(CacheError):
        committer.commit_now(fail)
    assert len(told) == 4
    index.close()


def test_a_transaction_shows_what_it_has_changed_so_far(tmp_path: Path) -> None:
    """Though it keeps the nodes that it has read, and writes a directory's count at its end."""
    index = Index(tmp_path)
    with index.write() as w:
        w.add_root()
        w.set_directory(ROOT_INODE, DirectoryState(1.0, 3, 1, 0.0))
    with index.write() as w:
        inode = w.attach(Node(ROOT_INODE, b"a", KIND_FILE))
        w.touch(ROOT_INODE, 7, 1)
        assert w.directory(ROOT_INODE).entries == 4  # type: ignore[union-attr]
        w.put_node(inode, Node(ROOT_INODE, b"a", KIND_FILE, size_bytes=9))
        assert w.child(ROOT_INODE, b"a") == (inode, w.node(inode)) and w.path_of(inode) == b"a"
        w.move(inode, Node(ROOT_INODE, b"b", KIND_FILE, size_bytes=8))
        assert w.path_of(inode) == b"b" and w.child(ROOT_INODE, b"a") is None
        w.touch(ROOT_INODE, 8, -1), w.touch(ROOT_INODE, 9, 1)
        assert index.directory(ROOT_INODE).entries == 3  # type: ignore[union-attr]
    state, root = index.directory(ROOT_INODE), index.node(ROOT_INODE)
    assert state is not None and state.entries == 4 and state.changed_at_ns > 0
    assert root is not None and root.mtime_ns == 9
    with index.write() as w:
        w.touch(ROOT_INODE, 10, 1)
        w.set_directory(ROOT_INODE, DirectoryState(2.0, 50, 1, 0.0))  # A listing counts anew.
        w.detach(ROOT_INODE, b"b")
        w.forget(inode)
        assert w.node(inode) is None
    assert index.directory(ROOT_INODE).entries == 50  # type: ignore[union-attr]
    index.close()
