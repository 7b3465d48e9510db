"""Fills that nobody waits for: they end as those that a task makes, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache.errors import CacheError, LakeUnavailable, ObjectChanged, SlowDown, SluiceError
from cache.fetcher import Started
from cache.model import KIB, MIB, ObjectVersion
from cache.policy.due import Next
from cache.policy.eviction import ItemId
from tests.test_33_engine_committer import until
from tests.wiring import NO_RETRY, QUICK_RETRY, Cache, TierSpec, WatchedLake, bodies, open_cache

SIZE = 20 * KIB


def lake_of(count: int) -> WatchedLake:
    lake = WatchedLake()
    lake.fill(bodies({f"k{number}": SIZE for number in range(count)}))
    return lake


async def start(cache: Cache, version: ObjectVersion) -> list[SluiceError | None]:
    """Start a fill and wait for its end; return what was told."""
    told: list[SluiceError | None] = []
    assert cache.fetcher.fetch_ahead_nowait(version, Next(5), told.append) is Started.UNDER_WAY
    await until(lambda: bool(told))
    return told


def check_nothing_is_left(cache: Cache, version: ObjectVersion) -> None:
    (tier,) = cache.residency.tiers
    assert cache.resident_bytes(version) is None and len(tier.policy) == 0
    assert (tier.budget.used_bytes, tier.landing_bytes, len(cache.residency.busy)) == (0, 0, 0)
    assert not list(Path(tier.files.path).glob("objects/*/*"))
    assert cache.fetcher.flights_under_way == 0


async def test_what_was_filled_is_there_and_expected_when_it_is_due(tmp_path: Path) -> None:
    async with open_cache(tmp_path, lake := lake_of(3), policy="auto") as cache:
        version = lake.head("k1").version
        assert await start(cache, version) == [None]
        assert cache.resident_bytes(version) == bytes(lake.get_range(version, 0, SIZE))
        (tier,) = cache.residency.tiers
        assert tier.policy.next_of(ItemId(version.id)) == Next(5)
        assert tier.budget.used_bytes == tier.files.whole_bytes(SIZE) and tier.landing_bytes == 0
        again = cache.fetcher.fetch_ahead_nowait(version, Next(5), lambda _: None)
        assert again is Started.RESIDENT


async def test_fills_that_end_together_are_one_transaction_and_each_fails_alone(tmp_path: Path) -> None:
    async with open_cache(tmp_path, lake := lake_of(5), policy="auto", retry=NO_RETRY) as cache:
        versions = [lake.head(f"k{number}").version for number in range(5)]
        lake.put("k2", b"another")
        gate, told = lake.hold("get"), dict[int, SluiceError | None]()
        for number, version in enumerate(versions):
            then = partial(told.__setitem__, number)
            assert cache.fetcher.fetch_ahead_nowait(version, Next(number), then) is Started.UNDER_WAY
        before = cache.index.env.info()["last_txnid"]
        gate.set()
        await until(lambda: len(told) == 5)
        assert isinstance(told.pop(2), ObjectChanged) and set(told.values()) == {None}
        assert cache.index.env.info()["last_txnid"] - before <= 4
        policy = cache.residency.tiers[0].policy
        assert [policy.next_of(ItemId(versions[number].id)) for number in told] == [Next(n) for n in told]
        assert all(cache.resident_bytes(versions[number]) is not None for number in told)
        assert cache.resident_bytes(versions[2]) is None and not cache.residency.busy


async def test_a_reader_joins_it(tmp_path: Path) -> None:
    async with open_cache(tmp_path, lake := lake_of(3)) as cache:
        version, gate, told = lake.head("k1").version, lake.hold("get"), list[object]()
        cache.fetcher.fetch_ahead_nowait(version, Next(), told.append)
        second = cache.fetcher.fetch_ahead_nowait(version, Next(), told.append)
        assert second is Started.MUST_WAIT
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.fetch, version)
            await wait_all_tasks_blocked()
            gate.set()
        assert told == [None] and lake.requests["get"] == 1


@pytest.mark.parametrize("error", [SlowDown("503"), LakeUnavailable("away")])
async def test_after_a_failure_of_the_lake_it_is_tried_again(tmp_path: Path, error: Exception) -> None:
    async with open_cache(tmp_path, lake := lake_of(3), retry=QUICK_RETRY) as cache:
        version, failures = lake.head("k1").version, iter([error])
        lake.fault = lambda verb, key: next(failures, None) if verb == "get" else None
        assert await start(cache, version) == [None]
        assert cache.resident_bytes(version) is not None
        assert cache.lake_io.retries == 1 and cache.lake_io.failing_since_s is None


async def test_a_failure_that_stays_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    async with open_cache(tmp_path, lake := lake_of(3), retry=NO_RETRY) as cache:
        version = lake.head("k1").version
        lake.put("k1", b"another")
        (told,) = await start(cache, version)
        assert isinstance(told, ObjectChanged)
        check_nothing_is_left(cache, version)


@pytest.mark.parametrize("where", ["land", "commit"])
async def test_a_cache_that_fails_leaves_nothing_charged(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> object:
        raise CacheError("the disk fails")

    async with open_cache(tmp_path, lake := lake_of(3)) as cache:
        version = lake.head("k1").version
        broken: Callable[..., object] = fail
        if where == "land":
            monkeypatch.setattr(cache.residency.tiers[0].files, "land_whole", broken)
        else:
            monkeypatch.setattr("cache.quick.put_whole", broken)
            monkeypatch.setattr("cache.filling.put_whole", broken)
        (told,) = await start(cache, version)
        assert isinstance(told, CacheError)
        check_nothing_is_left(cache, version)


async def test_without_room_it_must_wait(tmp_path: Path) -> None:
    tiers = (TierSpec("nvme0", 64 * KIB),)
    async with open_cache(tmp_path, lake := lake_of(5), tiers=tiers) as cache:
        for number in range(2):
            await cache.fetch(lake.head(f"k{number}").version)
        version = lake.head("k3").version
        assert cache.fetcher.fetch_ahead_nowait(version, Next(), lambda _: None) is Started.MUST_WAIT
        assert not cache.residency.busy and cache.fetcher.flights_under_way == 0


async def test_what_is_pinned_is_pinned_when_it_lands(tmp_path: Path) -> None:
    async with open_cache(tmp_path, lake := lake_of(3)) as cache:
        version = lake.head("k1").version
        (tier,) = cache.residency.tiers
        tier.is_pinned = version.id.__eq__
        for each in (version, lake.head("k2").version):
            assert await start(cache, each) == [None]
        assert tier.policy.pinned() == [ItemId(version.id)]


async def test_a_large_object_is_no_such_fill(tmp_path: Path) -> None:
    lake = WatchedLake()
    version = lake.fill(bodies({"large": 9 * MIB}))["large"]
    async with open_cache(tmp_path, lake) as cache:
        assert cache.fetcher.fetch_ahead_nowait(version, Next(), lambda _: None) is Started.MUST_WAIT
        await cache.fetcher.fetch_ahead(version, Next(5))
        assert cache.fetcher.fetch_ahead_nowait(version, Next(), lambda _: None) is Started.RESIDENT
