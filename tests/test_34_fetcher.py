"""Flights: one fetch for each block, whoever waits, and what happens when it fails."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache.errors import (
    CacheError,
    CacheFull,
    LakeUnavailable,
    ObjectChanged,
    ObjectMissing,
    SluiceError,
    TruncatedBody,
)
from cache.lake.base import Body
from cache.model import BLOCK_BYTES, FETCH_BLOCKS, GROUP_BYTES, KIB, MIB, ObjectVersion
from cache.records import block_checksums
from tests.wiring import NO_RETRY, Cache, TierSpec, WatchedLake, bodies, open_cache

SMALL = 300 * KIB + 11
UNIT = FETCH_BLOCKS * BLOCK_BYTES
LARGE = 2 * GROUP_BYTES + 3 * BLOCK_BYTES + 5


def lake_of(**sizes: int) -> tuple[WatchedLake, dict[str, ObjectVersion], dict[str, bytes]]:
    lake, content = WatchedLake(), bodies(sizes)
    return lake, lake.fill(content), content


async def read(cache: Cache, version: ObjectVersion, offset: int, length: int) -> bytes:
    """Fetch a range and return it as the tier's file holds it."""
    await cache.fetcher.fetch(version, offset, length)
    return cache.cached_bytes(version, offset, length)


def failing(lake: WatchedLake, errors: Iterator[Exception | None]) -> None:
    """Have the next GETs raise *errors* in turn; None and the end let them pass."""
    lake.fault = lambda verb, key: next(errors, None) if verb == "get" else None


def used_bytes(cache: Cache) -> list[int]:
    return [tier.budget.used_bytes for tier in cache.residency.tiers]


def whole_bytes(cache: Cache, size_bytes: int) -> int:
    """Return what a whole object of that size is charged on the first tier."""
    return cache.residency.tiers[0].files.whole_bytes(size_bytes)


async def test_a_small_object_is_fetched_whole_by_one_get(tmp_path: Path) -> None:
    lake, versions, content = lake_of(a=SMALL)
    async with open_cache(tmp_path, lake) as cache:
        await cache.fetcher.fetch(versions["a"], 100, 5)
        assert cache.resident_bytes(versions["a"]) == content["a"]
        assert lake.gets == [("a", 0, SMALL)]
        await cache.fetch(versions["a"])
        assert lake.requests["get"] == 1
        assert used_bytes(cache) == [whole_bytes(cache, SMALL)]
        assert cache.lake_io.bytes_fetched == SMALL


async def test_an_empty_object_needs_no_fetch(tmp_path: Path) -> None:
    lake, versions, _ = lake_of(empty=0)
    async with open_cache(tmp_path, lake) as cache:
        await cache.fetch(versions["empty"])
        assert lake.requests["get"] == 0


async def test_many_readers_of_one_object_share_one_flight(tmp_path: Path) -> None:
    lake, versions, content = lake_of(a=SMALL)
    gate = lake.hold("get")
    async with open_cache(tmp_path, lake) as cache:
        async with trio.open_nursery() as readers:
            for _ in range(50):
                readers.start_soon(cache.fetch, versions["a"])
            await lake.met("get")
            await wait_all_tasks_blocked()
            assert cache.fetcher.flights_under_way == 1
            gate.set()
        assert lake.requests["get"] == 1
        assert cache.resident_bytes(versions["a"]) == content["a"]
        assert cache.fetcher.flights_under_way == 0


async def test_readers_of_overlapping_ranges_fetch_each_block_once(tmp_path: Path) -> None:
    lake, versions, content = lake_of(big=LARGE)
    gate, generator = lake.hold("get"), random.Random(11)
    version = versions["big"]
    async with open_cache(tmp_path, lake) as cache:
        async with trio.open_nursery() as readers:
            for _ in range(40):
                offset = generator.randrange(LARGE)
                length = min(generator.randrange(1, 3 * MIB), LARGE - offset)
                readers.start_soon(cache.fetcher.fetch, version, offset, length)
            await wait_all_tasks_blocked()
            gate.set()
        await cache.idle()
        blocks = [
            block
            for _, offset, length in lake.gets
            for block in range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES))
        ]
        assert len(blocks) == len(set(blocks))
        await cache.fetch(version)
        await cache.idle()
        assert sum(length for _, _, length in lake.gets) == LARGE
        assert cache.resident_bytes(version) == content["big"]


async def test_a_cancelled_reader_leaves_the_fetch_to_the_others(tmp_path: Path) -> None:
    lake, versions, content = lake_of(a=SMALL)
    gate = lake.hold("get")
    async with open_cache(tmp_path, lake) as cache:
        async with trio.open_nursery() as others:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as first:
                    first.start_soon(cache.fetch, versions["a"])
                    await lake.met("get")
                    others.start_soon(cache.fetch, versions["a"])
                    await wait_all_tasks_blocked()
                    scope.cancel()
            assert cache.fetcher.flights_under_way == 1
            gate.set()
        assert lake.requests["get"] == 1
        assert cache.resident_bytes(versions["a"]) == content["a"]


async def test_a_fetch_goes_on_though_all_its_readers_were_cancelled(tmp_path: Path) -> None:
    lake, versions, content = lake_of(a=SMALL)
    gate = lake.hold("get")
    async with open_cache(tmp_path, lake) as cache:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as only:
                only.start_soon(cache.fetch, versions["a"])
                await lake.met("get")
                scope.cancel()
        gate.set()
        await cache.idle()
        assert cache.resident_bytes(versions["a"]) == content["a"]


async def test_a_failing_lake_is_an_error_to_all_who_wait_and_a_later_try_works(tmp_path: Path) -> None:
    lake, versions, content = lake_of(a=SMALL)
    gate = lake.hold("get")
    failing(lake, itertools.repeat(LakeUnavailable("down")))
    failures: list[SluiceError] = []
    async with open_cache(tmp_path, lake, retry=NO_RETRY) as cache:

        async def reader() -> None:
            try:
                await cache.fetch(versions["a"])
            except LakeUnavailable as error:
                failures.append(error)

        async with trio.open_nursery() as readers:
            for _ in range(5):
                readers.start_soon(reader)
            await lake.met("get")
            await wait_all_tasks_blocked()
            gate.set()
        assert len(failures) == 5
        assert used_bytes(cache) == [0] and cache.index.version(versions["a"].id) is None
        lake.fault = None
        await cache.fetch(versions["a"])
        assert cache.resident_bytes(versions["a"]) == content["a"]


@pytest.mark.parametrize("key", ["small", "large"])
async def test_what_may_pass_is_tried_again_until_it_does(tmp_path: Path, key: str) -> None:
    lake, versions, content = lake_of(small=SMALL, large=LARGE)
    failing(lake, iter([LakeUnavailable("1"), TruncatedBody("2"), LakeUnavailable("3")]))
    async with open_cache(tmp_path, lake) as cache:
        assert await read(cache, versions[key], 5, 1000) == content[key][5:1005]
        assert cache.lake_io.retries == 3
        assert cache.lake_io.failing_for_s() is None


@pytest.mark.parametrize("kind", [ObjectChanged, ObjectMissing])
@pytest.mark.parametrize("key", ["small", "large"])
async def test_a_version_that_is_gone_is_told_at_once_and_nothing_is_charged(
    tmp_path: Path, key: str, kind: type[SluiceError]
) -> None:
    lake, versions, _ = lake_of(small=SMALL, large=LARGE)
    if kind is ObjectChanged:
        lake.put(key, b"another")
    else:
        lake.delete_many([key])
    async with open_cache(tmp_path, lake) as cache:
        with pytest.raises(kind):
            await cache.fetcher.fetch(versions[key], 0, 1000)
        await cache.idle()
        assert cache.lake_io.retries == 0
        assert used_bytes(cache) == [0]
        assert not cache.residency.sparse and not cache.residency.busy


async def test_a_fault_of_ours_fails_the_read_and_not_the_mover(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lake, versions, _ = lake_of(a=SMALL)
    failing(lake, iter([ZeroDivisionError("a bug")]))
    async with open_cache(tmp_path, lake) as cache:
        with pytest.raises(SluiceError, match="ZeroDivisionError: a bug"):
            await cache.fetch(versions["a"])
        await cache.fetch(versions["a"])
    assert "the fetch failed" in caplog.text


async def test_a_lone_read_in_a_large_object_fetches_its_unit_and_no_more(tmp_path: Path) -> None:
    lake, versions, content = lake_of(big=LARGE)
    offset = GROUP_BYTES + UNIT + 5 * BLOCK_BYTES + 7
    async with open_cache(tmp_path, lake) as cache:
        assert await read(cache, versions["big"], offset, 100) == content["big"][offset : offset + 100]
        await cache.idle()
        assert lake.gets == [("big", GROUP_BYTES + UNIT, UNIT)]
        assert used_bytes(cache) == [UNIT]
        row = cache.index.version(versions["big"].id)
        assert row is not None and not row.whole


async def test_the_first_read_waits_for_its_own_unit_and_not_for_the_read_ahead(tmp_path: Path) -> None:
    """Nor for its slots: whoever reads goes before what is fetched ahead."""
    lake, versions, content = lake_of(big=LARGE)
    async with open_cache(tmp_path, lake, ahead_flights_max=1) as cache:
        async with cache.fetcher._ahead_slots:
            assert await read(cache, versions["big"], 0, 4096) == content["big"][:4096]
            assert lake.gets == [("big", 0, UNIT)]
        await cache.idle()
        assert len(lake.gets) > 1


async def test_a_read_ahead_that_a_reader_joins_overtakes_the_slots(tmp_path: Path) -> None:
    """It was queued for a slot; who waits for it now must not wait for the others in the queue."""
    lake, versions, content = lake_of(big=LARGE)
    version, far = versions["big"], GROUP_BYTES
    async with open_cache(tmp_path, lake, ahead_flights_max=1) as cache:
        async with cache.fetcher._ahead_slots:
            cache.fetcher._join(version, range(far // BLOCK_BYTES, 2 * far // BLOCK_BYTES), demand=False)
            cache.fetcher._join(version, range(far // BLOCK_BYTES), demand=False)
            await wait_all_tasks_blocked()
            assert lake.gets == [] and cache.fetcher.flights_under_way == 2
            with trio.fail_after(30):
                await cache.fetcher._await_all(cache.fetcher._join(version, range(1), demand=True))
            assert lake.gets == [("big", 0, GROUP_BYTES)]
            assert cache.cached_bytes(version, 0, GROUP_BYTES) == content["big"][:GROUP_BYTES]
            assert cache.fetcher.flights_under_way == 1
            assert cache.fetcher._ahead_slots.borrowed_tokens == 1  # Only the test's own.
        await cache.idle()
        assert lake.gets[1:] == [("big", far, GROUP_BYTES)]
        assert cache.fetcher._ahead_slots.borrowed_tokens == 0


async def test_a_queued_read_ahead_that_another_read_ahead_joins_keeps_waiting(tmp_path: Path) -> None:
    lake, versions, _ = lake_of(big=LARGE)
    async with open_cache(tmp_path, lake, ahead_flights_max=1) as cache:
        async with cache.fetcher._ahead_slots:
            for _ in range(2):
                cache.fetcher._join(versions["big"], range(8), demand=False)
            await wait_all_tasks_blocked()
            assert lake.gets == [] and cache.fetcher.flights_under_way == 1
        await cache.idle()
        assert len(lake.gets) == 1


async def test_a_read_ahead_that_holds_its_slot_gives_it_back_whoever_joined_and_however_it_ends(
    tmp_path: Path,
) -> None:
    lake, versions, _ = lake_of(big=LARGE)
    gate = lake.hold("get")
    failing(lake, iter([ObjectMissing("gone")]))
    async with open_cache(tmp_path, lake, ahead_flights_max=1) as cache:
        cache.fetcher._join(versions["big"], range(8), demand=False)
        await lake.met("get")
        flights = cache.fetcher._join(versions["big"], range(8), demand=True)
        assert cache.fetcher.flights_under_way == 1
        assert cache.fetcher._ahead_slots.borrowed_tokens == 1
        gate.set()
        with pytest.raises(ObjectMissing):
            await cache.fetcher._await_all(flights)
        assert cache.fetcher._ahead_slots.borrowed_tokens == 0


async def test_reading_on_makes_a_large_object_whole(tmp_path: Path) -> None:
    lake, versions, content = lake_of(big=LARGE)
    version = versions["big"]
    async with open_cache(tmp_path, lake) as cache:
        for offset in range(0, LARGE, MIB):
            length = min(MIB, LARGE - offset)
            assert await read(cache, version, offset, length) == content["big"][offset : offset + length]
        await cache.idle()
        assert cache.resident_bytes(version) == content["big"]
        assert used_bytes(cache) == [whole_bytes(cache, LARGE)]
        assert not cache.residency.sparse
        checksums = [one for _, group in cache.index.groups_of(version.id) for one in group.checksums]
        assert checksums == block_checksums(content["big"])
        assert cache.residency.tiers[0].files.read_label(version.id) == (version, checksums)
        assert sum(length for _, _, length in lake.gets) == LARGE


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (BLOCK_BYTES - 1, 2),
        (GROUP_BYTES - 1, 2),
        (LARGE - 1, 1),
        (LARGE - 6, 6),
        (GROUP_BYTES, GROUP_BYTES),
    ],
)
async def test_gets_are_whole_units_and_end_with_the_object(tmp_path: Path, offset: int, length: int) -> None:
    lake, versions, content = lake_of(big=LARGE)
    async with open_cache(tmp_path, lake) as cache:
        assert await read(cache, versions["big"], offset, length) == content["big"][offset : offset + length]
        await cache.idle()
        for _, start, size in lake.gets:
            assert start % UNIT == 0
            assert (start + size) % UNIT == 0 or start + size == LARGE
            assert start // GROUP_BYTES == (start + size - 1) // GROUP_BYTES


async def test_a_range_past_the_end_fetches_nothing(tmp_path: Path) -> None:
    lake, versions, _ = lake_of(big=LARGE)
    async with open_cache(tmp_path, lake) as cache:
        await cache.fetcher.fetch(versions["big"], LARGE, 10)
        assert lake.requests["get"] == 0


async def test_what_is_larger_than_the_tier_is_not_cached_and_nothing_is_charged(tmp_path: Path) -> None:
    lake, versions, content = lake_of(a=SMALL)
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 64 * KIB),)) as cache:
        with pytest.raises(CacheFull):
            await cache.fetch(versions["a"])
        assert lake.requests["get"] == 0
        assert used_bytes(cache) == [0]
        assert bytes(await cache.fetcher.read_through(versions["a"], 7, 100)) == content["a"][7:107]


async def test_a_large_object_that_finds_no_room_leaves_no_trace(tmp_path: Path) -> None:
    lake, versions, _ = lake_of(big=LARGE)
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 64 * KIB),)) as cache:
        with pytest.raises(CacheFull):
            await cache.fetcher.fetch(versions["big"], 0, 4096)
        await cache.idle()
        assert not cache.residency.sparse and used_bytes(cache) == [0]


async def test_a_tier_whose_room_is_all_in_flight_is_full_and_later_is_not(tmp_path: Path) -> None:
    lake, versions, content = lake_of(a=SMALL, b=SMALL)
    gate = lake.hold("get")
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 400 * KIB),)) as cache:
        async with trio.open_nursery() as readers:
            readers.start_soon(cache.fetch, versions["a"])
            await lake.met("get")
            with pytest.raises(CacheFull, match="all of it is in use"):
                await cache.fetch(versions["b"])
            gate.set()
        assert cache.resident_bytes(versions["a"]) == content["a"]
        await cache.fetch(versions["b"])
        assert cache.resident_bytes(versions["a"]) is None
        assert cache.resident_bytes(versions["b"]) == content["b"]
        assert used_bytes(cache) == [whole_bytes(cache, SMALL)]


async def test_a_cache_that_cannot_store_is_a_cache_error_and_nothing_stays_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, versions, _ = lake_of(small=SMALL, large=LARGE)
    async with open_cache(tmp_path, lake) as cache:

        def refuse(*_: object) -> Body:
            raise CacheError("the disk is broken")

        files = cache.residency.tiers[0].files
        with monkeypatch.context() as patch:
            patch.setattr(files, "land_whole", refuse)
            patch.setattr(files, "land_blocks", refuse)
            for version in versions.values():
                with pytest.raises(CacheError, match="broken"):
                    await cache.fetcher.fetch(version, 0, 1000)
            await cache.idle()
        assert used_bytes(cache) == [0]
        for version in versions.values():
            await cache.fetcher.fetch(version, 0, 1000)


async def test_of_a_body_that_breaks_off_nothing_stays_on_disk_or_charged(tmp_path: Path) -> None:
    lake, versions, content = lake_of(big=LARGE)
    async with open_cache(tmp_path, lake, retry=NO_RETRY) as cache:
        await cache.fetcher.fetch(versions["big"], GROUP_BYTES, 1)
        await cache.idle()
        used = used_bytes(cache)
        lake.fault = lambda verb, key: "truncate" if verb == "get" else None
        with pytest.raises(TruncatedBody):
            await cache.fetcher.fetch(versions["big"], 0, 1)
        await cache.idle()
        assert used_bytes(cache) == used
        assert not any(cache.cached_bytes(versions["big"], 0, UNIT))  # Half of it was written.
        lake.fault = None
        assert await read(cache, versions["big"], 0, UNIT) == content["big"][:UNIT]


async def test_reads_of_what_is_cached_start_the_read_ahead(tmp_path: Path) -> None:
    lake, versions, _ = lake_of(big=LARGE)
    async with open_cache(tmp_path, lake) as cache:
        for i in range(4):
            cache.fetcher.read_seen(versions["big"], i * BLOCK_BYTES, BLOCK_BYTES)
        await cache.idle()
        assert lake.gets and max(offset for _, offset, _ in lake.gets) >= GROUP_BYTES // 2
