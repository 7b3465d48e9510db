"""The memory that parts are sent from."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache.send_limits import PartBuffers


async def test_a_buffer_is_used_again_and_none_is_kept_when_nothing_is_sent() -> None:
    buffers = PartBuffers(100)
    async with buffers.held(40) as first:
        async with buffers.held(40) as second:
            assert len(second) == 40 and second is not first
        async with buffers.held(40) as third:
            assert third is second
    async with buffers.held(40) as fourth:
        assert fourth is not first and fourth is not second


async def test_a_buffer_of_another_size_takes_the_place_of_idle_ones() -> None:
    buffers = PartBuffers(100)
    async with buffers.held(10):
        async with buffers.held(40) as large:
            pass
        async with buffers.held(7) as last_part:
            assert len(last_part) == 7
        async with buffers.held(40) as other:
            assert other is not large


async def test_buffers_of_two_files_are_not_mistaken_for_each_other() -> None:
    """The last part of one file ends while parts of another are on their way."""
    buffers = PartBuffers(100)
    async with buffers.held(5):
        async with buffers.held(7) as last_part:
            async with buffers.held(40):
                pass
            assert len(last_part) == 7
        async with buffers.held(40) as part:
            assert len(part) == 40
            async with buffers.held(7) as other:
                assert len(other) == 7


async def test_what_a_failed_request_may_still_be_sending_is_not_written_to() -> None:
    buffers = PartBuffers(100)
    async with buffers.held(10):
        with pytest.raises(OSError, match="broke"):
            async with buffers.held(40) as failed:
                raise OSError("broke")
        async with buffers.held(40) as next_one:
            assert next_one is not failed


async def test_no_more_is_held_than_allowed_but_by_one_alone(nursery: trio.Nursery) -> None:
    buffers = PartBuffers(100)
    held: list[int] = []

    async def hold(size_bytes: int, may_end: trio.Event) -> None:
        async with buffers.held(size_bytes):
            held.append(size_bytes)
            await may_end.wait()

    ends = [trio.Event() for _ in range(3)]
    nursery.start_soon(hold, 60, ends[0])
    await wait_all_tasks_blocked()
    nursery.start_soon(hold, 300, ends[1])
    await wait_all_tasks_blocked()
    nursery.start_soon(hold, 30, ends[2])  # There is room for it, and it waits for its turn.
    await wait_all_tasks_blocked()
    assert held == [60]
    ends[0].set()
    await wait_all_tasks_blocked()
    assert held == [60, 300]
    ends[1].set()
    await wait_all_tasks_blocked()
    assert held == [60, 300, 30]
    ends[2].set()
