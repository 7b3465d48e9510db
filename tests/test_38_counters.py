"""Counters and marks in shared memory."""

from __future__ import annotations

import os
import time

import pytest

from cache.counters import ShownDirectories


@pytest.fixture
def shown() -> ShownDirectories:
    return ShownDirectories()


def test_at_first_nothing_is_shown(shown: ShownDirectories) -> None:
    for inode in (1, 2, shown.CELLS - 1, shown.CELLS):
        assert not shown.has(inode, 0)
        assert not shown.has(inode, time.time_ns())


def test_what_was_noted_is_shown_and_no_other_state_of_it(shown: ShownDirectories) -> None:
    now_ns = time.time_ns()
    shown.note(1, now_ns)
    assert shown.has(1, now_ns)
    assert not shown.has(1, now_ns + 1) and not shown.has(1, now_ns - 1)
    shown.note(1, now_ns + 1)
    assert shown.has(1, now_ns + 1) and not shown.has(1, now_ns)


def test_directories_do_not_stand_in_for_each_other(shown: ShownDirectories) -> None:
    """Neither those of another cell nor those that share one, though they changed at the same time."""
    shown.note(7, 5)
    for inode in (6, 8, 7 + shown.CELLS, 7 + 2 * shown.CELLS, (1 << 63) + 7):
        assert not shown.has(inode, 5)


def test_directories_that_share_a_cell_push_each_other_out(shown: ShownDirectories) -> None:
    shown.note(7, 5)
    shown.note(7 + shown.CELLS, 5)
    assert shown.has(7 + shown.CELLS, 5) and not shown.has(7, 5)
    shown.note(7, 5)
    assert shown.has(7, 5) and not shown.has(7 + shown.CELLS, 5)


def test_each_cell_holds_its_own(shown: ShownDirectories) -> None:
    for inode in range(shown.CELLS):
        shown.note(inode, inode + 1)
    assert all(shown.has(inode, inode + 1) for inode in range(shown.CELLS))


def test_what_one_process_notes_the_others_see(shown: ShownDirectories) -> None:
    shown.note(1, 5)
    pid = os.fork()
    if pid == 0:
        good = shown.has(1, 5)
        shown.note(2, 6)
        os._exit(0 if good else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert shown.has(2, 6) and shown.has(1, 5)
