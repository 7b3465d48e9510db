"""Sequential read-ahead within one file: what is fetched ahead of which reads."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cache.model import GROUP_BYTES, KIB, MIB
from cache.policy.readahead import SLACK_BYTES, SequentialReadAhead

READ = 128 * KIB
SIZE = 1024 * MIB
WINDOW = 64 * MIB
VID = b"v" * 16


def read_on(
    policy: SequentialReadAhead, start: int, reads: int, *, stalled: bool, vid: bytes = VID, size: int = SIZE
) -> list[range]:
    """Read *reads* pieces in order from *start*; return what was fetched ahead."""
    asked = [
        policy.read(vid, start + i * READ, READ, size, stalled=stalled)
        for i in range(reads)
        if start + i * READ < size
    ]
    return [ahead for ahead in asked if ahead is not None]


def test_the_first_read_at_the_start_fetches_the_rest_of_the_first_group() -> None:
    policy = SequentialReadAhead(WINDOW)
    assert policy.read(VID, 0, READ, SIZE, stalled=True) == range(READ, GROUP_BYTES + GROUP_BYTES)


def test_a_lone_read_elsewhere_fetches_nothing_ahead() -> None:
    policy = SequentialReadAhead(WINDOW)
    assert policy.read(VID, 100 * MIB, READ, SIZE, stalled=True) is None


def test_reading_on_fetches_every_byte_once_and_without_gaps() -> None:
    policy = SequentialReadAhead(WINDOW)
    asked = read_on(policy, 0, SIZE // READ, stalled=False)
    assert asked[0].start == READ
    for one, following in pairwise(asked):
        assert one.stop == following.start
    assert asked[-1].stop == SIZE


def test_each_group_that_was_read_is_followed_by_one_more_ahead() -> None:
    """So the lake is asked all the time, and not for half of a window at once."""
    policy = SequentialReadAhead(WINDOW)
    read_on(policy, 0, 512, stalled=True)
    asked = [policy.read(VID, i * READ, READ, SIZE, stalled=False) for i in range(512, 1024)]
    ahead = [one for one in asked if one is not None]
    assert [len(one) for one in ahead] == [GROUP_BYTES] * (512 * READ // GROUP_BYTES)
    gaps = [later - earlier for earlier, later in pairwise(i for i, one in enumerate(asked) if one)]
    assert set(gaps) == {GROUP_BYTES // READ}


def test_windows_end_at_group_boundaries() -> None:
    policy = SequentialReadAhead(WINDOW)
    asked = read_on(policy, 0, 500, stalled=True)
    assert all(ahead.stop % GROUP_BYTES == 0 for ahead in asked)


def test_the_window_doubles_while_readers_stall_up_to_its_limit() -> None:
    policy = SequentialReadAhead(WINDOW)
    reach, frontier = [], 0
    for i in range(300):
        ahead = policy.read(VID, i * READ, READ, SIZE, stalled=True)
        frontier = (i + 1) * READ
        if ahead is not None:
            reach.append(ahead.stop - frontier)
    assert max(reach) > WINDOW // 2
    assert max(reach) <= WINDOW + GROUP_BYTES
    assert reach[0] <= 2 * GROUP_BYTES


def test_a_reader_who_never_stalls_keeps_the_smallest_window() -> None:
    policy = SequentialReadAhead(WINDOW)
    for i in range(500):
        ahead = policy.read(VID, i * READ, READ, SIZE, stalled=False)
        assert ahead is None or ahead.stop - (i + 1) * READ <= 2 * GROUP_BYTES


def test_reads_that_come_out_of_order_belong_to_the_same_stream() -> None:
    policy, generator = SequentialReadAhead(WINDOW), random.Random(5)
    offsets = list(range(0, 64 * MIB, READ))
    for start in range(0, len(offsets), 8):
        batch = offsets[start : start + 8]  # 1 MiB, as the kernel's read-ahead sends it.
        generator.shuffle(batch)
        offsets[start : start + 8] = batch
    asked = [policy.read(VID, offset, READ, SIZE, stalled=False) for offset in offsets]
    ranges = [ahead for ahead in asked if ahead is not None]
    for one, following in pairwise(ranges):
        assert one.stop == following.start
    assert ranges[-1].stop > 64 * MIB


def test_a_read_beyond_the_slack_is_another_stream() -> None:
    policy = SequentialReadAhead(WINDOW)
    read_on(policy, 0, 4, stalled=False)
    assert policy.read(VID, 4 * READ + SLACK_BYTES + READ, READ, SIZE, stalled=False) is None


def test_several_readers_of_one_file_are_each_read_ahead_for() -> None:
    policy, ranges = SequentialReadAhead(WINDOW), list[range]()
    starts = [i * 128 * MIB for i in range(SequentialReadAhead.STREAMS_MAX)]
    for i in range(64):
        for start in starts:
            ahead = policy.read(VID, start + i * READ, READ, SIZE, stalled=False)
            if ahead is not None:
                ranges.append(ahead)
    for start in starts:
        own = [ahead for ahead in ranges if start <= ahead.start < start + 128 * MIB]
        assert own and own[-1].stop >= start + 64 * READ


def test_random_reads_fetch_nothing_ahead() -> None:
    policy, generator = SequentialReadAhead(WINDOW), random.Random(7)
    offsets = generator.sample(range(8 * MIB, 1000 * 1024 * MIB, 16 * MIB), 500)
    size = 1024 * 1024 * MIB
    assert all(policy.read(VID, offset, READ, size, stalled=True) is None for offset in offsets)


def test_a_small_rest_of_a_file_is_fetched_to_its_end_and_not_beyond() -> None:
    policy, size = SequentialReadAhead(WINDOW), 9 * MIB + 17
    assert read_on(policy, 0, 72, stalled=False, size=size)[-1].stop == size
    assert policy.read(VID, size - 17, 17, size, stalled=True) is None


def test_the_tables_stay_bounded() -> None:
    policy, generator = SequentialReadAhead(WINDOW), random.Random(9)
    for i in range(3 * policy.FILES_MAX):
        policy.read(i.to_bytes(16, "big"), 0, READ, SIZE, stalled=True)
    for _ in range(200):
        policy.read(VID, generator.randrange(0, SIZE, 64 * MIB), READ, SIZE, stalled=True)
    assert len(policy._files) <= policy.FILES_MAX
    assert all(len(file.streams) <= policy.STREAMS_MAX for file in policy._files.values())


def test_a_forgotten_file_starts_over() -> None:
    policy = SequentialReadAhead(WINDOW)
    first = policy.read(VID, 0, READ, SIZE, stalled=True)
    assert policy.read(VID, 0, READ, SIZE, stalled=False) is None
    policy.forget(VID)
    assert policy.read(VID, 0, READ, SIZE, stalled=True) == first


@given(
    size=st.integers(1, 200 * MIB),
    reads=st.lists(st.tuples(st.integers(0, 200 * MIB), st.integers(1, 2 * MIB), st.booleans()), max_size=60),
)
def test_what_is_asked_for_lies_in_the_file_and_within_the_window(
    size: int, reads: list[tuple[int, int, bool]]
) -> None:
    policy = SequentialReadAhead(WINDOW)
    for offset, length, stalled in reads:
        offset %= size
        length = min(length, size - offset)
        ahead = policy.read(VID, offset, length, size, stalled=stalled)
        if ahead is not None:
            assert 0 <= ahead.start < ahead.stop <= size
            assert len(ahead) <= WINDOW + GROUP_BYTES
