"""The table of what is open, shared by processes that may die at any moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from cache import opens
from cache.opens import BUCKETS, Mode, OpenState, OpenTable

CLOSED = OpenState(0, 0, Mode.CLOSED, 0)


@pytest.fixture
def table() -> OpenTable:
    return OpenTable()


def bucket_mates(table: OpenTable, count: int) -> list[int]:
    """Return inodes that share one bucket."""
    return [inode for inode in range(1, (count + 2) * BUCKETS) if table._base(inode) == table._base(7)][
        :count
    ]


def holds_nothing(table: OpenTable) -> bool:
    """Return whether there is no entry, no excess, and no change under way."""
    cells = table._cells[opens._FIRST_BUCKET :].tolist()
    words = [opens._PLACE, *range(opens._EXCESS, opens._WORDS)]
    return not any(any(cells[word :: opens._WORDS]) for word in words)


def in_a_child(work: Callable[[], Any]) -> int:
    """Run *work* in a forked process; return its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


# One process


def test_at_first_nothing_is_open(table: OpenTable) -> None:
    for inode in (1, 2, BUCKETS, (1 << 64) - 1):
        assert table.state(inode) == CLOSED
        assert not CLOSED.is_open and not CLOSED.may_be_written


def test_readers_and_writers_are_counted_apart(table: OpenTable) -> None:
    assert table.opened(5) == (1, 0, Mode.CACHED, 0)
    assert table.opened(5, writing=True) == (1, 1, Mode.CACHED, 0)
    assert table.opened(5) == (2, 1, Mode.CACHED, 0)
    assert table.state(5).may_be_written
    assert table.closed(5, writing=True) == (2, 0, Mode.CACHED, 0)
    assert table.state(5).is_open and not table.state(5).may_be_written
    table.closed(5)
    assert table.closed(5) == CLOSED == table.state(5)


def test_inodes_do_not_stand_in_for_each_other(table: OpenTable) -> None:
    mates = bucket_mates(table, 5)
    for number, inode in enumerate(mates):
        for _ in range(number):
            table.opened(inode)
    assert [table.state(inode).readers for inode in mates] == [0, 1, 2, 3, 4]
    table.closed(mates[1])
    assert [table.state(inode).readers for inode in mates] == [0, 0, 2, 3, 4]


def test_a_request_that_is_sent_again_is_counted_once(table: OpenTable) -> None:
    for _ in range(3):
        assert table.opened(5, request=100).readers == 1
    assert table.opened(5, request=102).readers == 2
    assert table.opened(5, request=100).readers == 2
    for _ in range(3):
        assert table.closed(5, request=104).readers == 1
    assert table.closed(5, request=106) == CLOSED
    assert table.closed(5, request=106) == CLOSED


def test_closing_what_is_not_open_changes_nothing(table: OpenTable) -> None:
    assert table.closed(5) == CLOSED
    table.opened(5)
    assert table.closed(5, writing=True) == (1, 0, Mode.CACHED, 0)


def test_a_count_at_its_end_stays_there(table: OpenTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opens, "_WRITERS_MAX", 3)
    for _ in range(5):
        table.opened(5, writing=True)
    for _ in range(9):
        state = table.closed(5, writing=True)
    assert state.writers == 3 and state.may_be_written


# Backing files


def pass_through(table: OpenTable, inode: int, backing_id: int) -> None:
    """Open *inode*, and answer with *backing_id*."""
    with table.held(inode) as held:
        held.opened()
        assert held.answered_with(lambda: backing_id, no_more) == backing_id


def no_more(backing_id: int) -> None:
    raise AssertionError(f"nobody left {backing_id} behind")


def test_the_first_answer_decides_for_all_that_follow(table: OpenTable) -> None:
    with table.held(5) as held:
        assert not held.may_get_backing, "it is not open"
        held.opened()
        held.opened(writing=True)
        assert held.may_get_backing, "both wait for their answers"
        assert held.answered_with(lambda: 77, no_more) == 77
        assert held.state == (1, 1, Mode.PASSTHROUGH, 77)
        assert not held.may_get_backing
    table.closed(5)
    with table.held(5) as held:
        assert held.closed(writing=True) == (0, 0, Mode.CLOSED, 77)
        held.forget_backing()
        assert held.state == CLOSED
    assert holds_nothing(table)


def test_an_inode_that_was_answered_without_a_backing_file_gets_none(table: OpenTable) -> None:
    table.opened(5)
    with table.held(5) as held:
        held.answered_cached()
        assert held.opened() == (2, 0, Mode.CACHED, 0)
        assert not held.may_get_backing
        with pytest.raises(AssertionError):
            held.answered_with(lambda: 77, no_more)
    assert table.closed(5) == (1, 0, Mode.CACHED, 0)
    assert table.closed(5) == CLOSED
    assert holds_nothing(table)
    pass_through(table, 5, 77)


def test_a_file_that_the_kernel_refuses_is_answered_without(table: OpenTable) -> None:
    with table.held(5) as held:
        held.opened()
        assert held.answered_with(lambda: 0, no_more) == 0
        assert held.state == (1, 0, Mode.CACHED, 0) and not held.may_get_backing
    table.closed(5)
    assert holds_nothing(table)


def test_an_id_that_was_left_behind_is_nobodys(table: OpenTable) -> None:
    pass_through(table, 5, 77)
    table.closed(5)
    assert table.opened(5) == (1, 0, Mode.CACHED, 0)
    pass_through(table, 6, 78)


def test_a_backing_id_that_its_closer_left_behind_is_found(table: OpenTable) -> None:
    for inode in (5, 6, 7):
        pass_through(table, inode, inode)
    table.closed(6)
    assert table.abandoned() == [6]
    with table.held(6) as held:
        held.forget_backing()
    assert table.abandoned() == []
    assert table.state(5).backing_id == 5


def test_one_thread_holds_one_inode_at_a_time(table: OpenTable) -> None:
    with table.held(5), pytest.raises(AssertionError, match="one inode at a time"):
        table.opened(6)
    assert table.opened(6).readers == 1


# A full bucket


def test_a_full_bucket_calls_what_it_does_not_hold_unknown(table: OpenTable) -> None:
    *held, extra, other = bucket_mates(table, opens._SLOTS + 2)
    for inode in held:
        table.opened(inode)
    assert table.state(extra) == CLOSED
    assert table.opened(extra).mode is Mode.UNKNOWN
    with table.held(extra) as held_extra:
        assert not held_extra.may_get_backing
        held_extra.answered_cached()
    for inode in (extra, other, held[0]):
        assert table.state(inode).is_open and table.state(inode).may_be_written
    elsewhere = next(inode for inode in range(1, 100) if table._base(inode) != table._base(7))
    assert table.state(elsewhere) == CLOSED


def test_a_bucket_that_was_full_knows_again_once_the_excess_is_closed(table: OpenTable) -> None:
    """In whatever order: an inode that is counted in both ways is closed when all of it is closed."""
    *held, extra = bucket_mates(table, opens._SLOTS + 1)
    for inode in held:
        table.opened(inode)
    table.opened(extra, writing=True, request=10)
    table.closed(held[0])
    assert table.opened(extra).mode is Mode.UNKNOWN, "there is room now, but a writer is not in it"
    assert table.closed(extra, writing=True, request=12).mode is Mode.CACHED
    assert table.closed(extra, writing=True, request=12).mode is Mode.CACHED
    assert table.closed(extra) == CLOSED
    for inode in held[1:]:
        assert table.closed(inode) == CLOSED
    assert holds_nothing(table)


def test_passthrough_is_known_even_in_a_full_bucket(table: OpenTable) -> None:
    first, *others = bucket_mates(table, opens._SLOTS + 3)
    pass_through(table, first, 9)
    for inode in others:
        table.opened(inode)
    assert table.state(first) == (1, 0, Mode.PASSTHROUGH, 9)
    assert table.opened(first) == (2, 0, Mode.PASSTHROUGH, 9)


# Several processes


def test_what_one_process_counts_the_others_see(table: OpenTable) -> None:
    table.opened(5)
    assert in_a_child(lambda: table.opened(5, writing=True)) == 0
    assert table.state(5) == (1, 1, Mode.CACHED, 0)


class DyingCells:
    """The table's memory, until the process kills itself before its *stores*-th store."""

    def __init__(self, cells: memoryview[int], stores: int) -> None:
        self.cells, self.stores = cells, stores

    def __getitem__(self, place: Any) -> Any:
        return self.cells[place]

    def __setitem__(self, place: int, value: int) -> None:
        if self.stores == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.stores -= 1
        self.cells[place] = value


def deaths(prepare: Callable[[OpenTable], None], change: Callable[[OpenTable], Any]) -> Iterator[OpenTable]:
    """Yield a table for each store of *change*: one in which a process died before just that store."""
    for stores in range(100):
        table = OpenTable()
        prepare(table)

        def work(table: OpenTable = table, stores: int = stores) -> None:
            table._cells = DyingCells(table._cells, stores)  # type: ignore[assignment]
            change(table)

        status = in_a_child(work)
        if status == 0:
            assert stores >= 6, "the change is stored, said to be valid, copied and noted as counted"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield table
    raise AssertionError("it never ended")


def test_a_process_that_dies_while_it_opens_has_counted_once_or_not_at_all() -> None:
    def change(table: OpenTable) -> OpenState:
        return table.opened(5, writing=True, request=100)

    seen = []
    for table in deaths(lambda table: None, change):
        seen.append(table.state(5).writers)
        assert change(table) == (0, 1, Mode.CACHED, 0), "the kernel sends the request again"
        assert change(table) == table.state(5) == (0, 1, Mode.CACHED, 0)
        assert table.closed(5, writing=True) == CLOSED
        assert holds_nothing(table)
    assert seen == sorted(seen) and set(seen) == {0, 1}


def test_a_process_that_dies_while_it_closes_has_counted_once_or_not_at_all() -> None:
    def prepare(table: OpenTable) -> None:
        table.opened(5)
        table.opened(5)

    def change(table: OpenTable) -> OpenState:
        return table.closed(5, request=100)

    for table in deaths(prepare, change):
        assert table.state(5).readers in (1, 2)
        assert change(table) == change(table) == (1, 0, Mode.CACHED, 0)
        assert table.closed(5) == CLOSED


def test_a_process_that_dies_after_the_last_close_leaves_a_backing_id_that_is_found() -> None:
    def prepare(table: OpenTable) -> None:
        pass_through(table, 5, 9)

    def change(table: OpenTable) -> None:
        with table.held(5) as held:
            held.closed(request=100)
            held.forget_backing()

    for table in deaths(prepare, change):
        state = table.state(5)
        assert state in ((1, 0, Mode.PASSTHROUGH, 9), (0, 0, Mode.CLOSED, 9), CLOSED)
        assert table.abandoned() == ([5] if state == (0, 0, Mode.CLOSED, 9) else [])
        change(table)
        assert table.state(5) == CLOSED


def test_a_process_that_dies_in_a_full_bucket_leaves_its_excess_right() -> None:
    def prepare(table: OpenTable) -> None:
        for inode in bucket_mates(table, opens._SLOTS):
            table.opened(inode)

    def change(table: OpenTable) -> OpenState:
        return table.opened(extra, request=100)

    *held, extra = bucket_mates(OpenTable(), opens._SLOTS + 1)
    for table in deaths(prepare, change):
        assert change(table).mode is Mode.UNKNOWN
        assert table.closed(extra, request=102) == CLOSED
        assert table.state(held[0]).mode is Mode.CACHED


_NOTE = struct.Struct("<?QQ?")  # Whether it is done; request, inode, whether it opens.


def hammer(table: OpenTable, pipe: int, seed: int, first_request: int) -> NoReturn:
    """Open and close at random, saying so before and after, until killed."""
    chance, mine = random.Random(seed), list[int]()
    for request in range(first_request, 1 << 62, 2):
        opening = not mine or chance.random() < 0.5
        inode = chance.choice(INODES) if opening else mine.pop(chance.randrange(len(mine)))
        os.write(pipe, _NOTE.pack(False, request, inode, opening))
        if opening:
            table.opened(inode, request=request)
            mine.append(inode)
        else:
            table.closed(inode, request=request)
        os.write(pipe, _NOTE.pack(True, request, inode, opening))
    os._exit(1)


INODES = [*bucket_mates(OpenTable(), 3), 101, 102]
_HAMMERS, _ROUNDS = 4, 12


def test_processes_that_are_killed_in_the_middle_leave_the_counts_right(table: OpenTable) -> None:
    """What each had begun and not told as done is sent again, as the kernel does."""
    expected: Counter[int] = Counter()
    for round_number in range(_ROUNDS):
        pids, pipes = [], []
        for number in range(_HAMMERS):
            reading, writing = os.pipe()
            seed = round_number * _HAMMERS + number + 1
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    hammer(table, writing, seed, seed * 2_000_000)
                os._exit(1)
            os.close(writing)
            pids.append(pid)
            pipes.append(os.fdopen(reading, "rb"))
        for pid, pipe in zip(pids, pipes, strict=True):
            begun = pipe.read(_NOTE.size * 200)
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            begun += pipe.read()
            pipe.close()
            notes = [_NOTE.unpack_from(begun, place) for place in range(0, len(begun), _NOTE.size)]
            for done, _, inode, opening in notes:
                expected[inode] += done and (1 if opening else -1)
            done, request, inode, opening = notes[-1]
            if not done:
                (table.opened if opening else table.closed)(inode, request=request)
                expected[inode] += 1 if opening else -1
    assert {inode: table.state(inode).readers for inode in INODES} == {i: expected[i] for i in INODES}
    for inode in INODES:
        for _ in range(expected[inode]):
            table.closed(inode)
    assert holds_nothing(table)


def test_a_lock_whose_holder_was_killed_is_free(table: OpenTable) -> None:
    def work() -> None:
        with table.held(5):
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_a_child(work)) == signal.SIGKILL
    assert table.opened(5).readers == 1


def test_nobody_opens_an_inode_while_another_process_decides_about_it(table: OpenTable) -> None:
    told, tell = os.pipe()
    with table.held(5) as held:
        pid = os.fork()
        if pid == 0:
            table._thread_lock.release()  # The copy of ours, which nobody would release here.
            table._holder = 0
            table.opened(5)
            os.write(tell, b"x")
            os._exit(0)
        for _ in range(100):
            assert held.state == CLOSED
        os.set_blocking(told, False)
        with pytest.raises(BlockingIOError):
            os.read(told, 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert table.state(5).readers == 1
    os.close(told)
    os.close(tell)


# What leaves


def test_who_is_counted_sees_that_an_inode_may_leave_or_is_seen(table: OpenTable) -> None:
    assert not table.may_leave(7)
    table.opened(7)
    assert not table.leave_unless_open(7)
    table.closed(7)
    assert table.leave_unless_open(7) and table.leave_unless_open(8)
    assert table.may_leave(7) and table.may_leave(8) and not table.may_leave(9)
    table.left()
    assert not table.may_leave(7) and not table.may_leave(8)


def test_an_open_that_the_channel_answered_keeps_an_inode() -> None:
    class Granted:
        counted = 1

        def count(self, inode: int) -> int:
            return self.counted

        def withdraw(self, inode: int) -> int:
            return self.counted

    table = OpenTable(granted := Granted())
    assert not table.leave_unless_open(7)
    granted.counted = 0
    assert table.leave_unless_open(7)


def test_a_mover_takes_back_what_a_dead_one_was_about_to_take_out(table: OpenTable) -> None:
    assert in_a_child(lambda: table.leave_unless_open(7)) == 0
    assert table.may_leave(7)
    table.begin_leaving()
    assert not table.may_leave(7)


def test_all_processes_know_how_often_requests_were_sent_again(table: OpenTable) -> None:
    assert table.resends == 0
    assert in_a_child(table.note_resend) == 0
    assert table.resends == 1


def test_what_was_noted_as_mapped_may_be_mapped_for_ever() -> None:
    table = OpenTable()
    assert not table.may_be_mapped(7)
    table.note_mapped(7)
    table.note_mapped(7 + (1 << 40))
    assert table.may_be_mapped(7) and table.may_be_mapped(7 + (1 << 40)) and not table.may_be_mapped(8)
