"""Warming and pins without a mount: what is planned, fetched, left out, kept, and counted as failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache.errors import AccessDenied, LakeUnavailable, SluiceError, UsageError
from cache.model import KIB, MIB, Inode
from cache.pinning import Keeper
from cache.pins import Pins, ancestors
from cache.policy.eviction import ItemId
from cache.walking import Found, Walker
from cache.warming import Job, Warmer
from tests.wiring import NO_RETRY, Cache, TierSpec, WatchedLake, bodies, open_cache

SIZE = 100 * KIB


def lake_of(count: int, folder: str = "set", size_bytes: int = SIZE) -> WatchedLake:
    lake = WatchedLake()
    lake.fill(bodies({f"{folder}/{number:03}": size_bytes for number in range(count)}))
    return lake


def warmer_of(cache: Cache, fetches_max: int = 4) -> Warmer:
    return Warmer(cache.lake_io, cache.index, cache.residency, cache.fetcher, fetches_max)


async def found_in(cache: Cache, *paths: str) -> Found:
    found = Found()
    for path in paths:
        await Walker(cache.index, cache.lister).add(found, path)
    return found


async def warmed(cache: Cache, *paths: str, tier: str = "") -> Job:
    warmer, found = warmer_of(cache), await found_in(cache, *paths)
    job = await warmer.plan(found, tier)
    await warmer.run(job, found)
    return job


async def test_a_plan_counts_each_file_once_and_fetches_nothing(tmp_path: Path) -> None:
    lake = lake_of(10)
    async with open_cache(tmp_path, lake) as cache:
        found = await found_in(cache, "set", "set/003", "", "set/nothing")
        job = await warmer_of(cache).plan(found)
        assert (job.files, job.fitting, job.fetch_bytes, found.failed) == (10, 10, 10 * SIZE, 1)
        assert lake.requests["get"] == 0 and job.left_s(0.0) is None


async def test_part_of_a_large_file_is_not_fetched_again(tmp_path: Path) -> None:
    lake = WatchedLake()
    (version,) = lake.fill(bodies({"large": 40 * MIB})).values()
    async with open_cache(tmp_path, lake) as cache:
        await cache.fetcher.fetch(version, 0, 1 * MIB)
        await cache.idle()
        row_bytes = sum(g.present_bytes(n, version.size_bytes) for n, g in cache.index.groups_of(version.id))
        job = await warmed(cache, "large")
        assert job.fetched_bytes == job.fetch_bytes == 40 * MIB - row_bytes
        assert cache.resident_bytes(version) is not None


async def test_demand_goes_first(tmp_path: Path) -> None:
    """While all the threads that warming may have are taken, a reader's fetch is not held up."""
    lake = lake_of(50)
    (wanted,) = lake.fill(bodies({"other": SIZE})).values()
    async with open_cache(tmp_path, lake) as cache, trio.open_nursery() as nursery:
        found = await found_in(cache, "set")
        warmer = warmer_of(cache, fetches_max=50)
        job = await warmer.plan(found)
        gate = lake.hold("get")
        nursery.start_soon(warmer.run, job, found)
        await lake.met("get", 5)
        read = trio.Event()

        async def reader() -> None:
            await cache.fetch(wanted)
            read.set()

        nursery.start_soon(reader)
        await lake.met("get", 6)  # The sixth thread is kept for readers.
        gate.set()
        await read.wait()


async def test_a_cancelled_job_stops(tmp_path: Path) -> None:
    lake = lake_of(50)
    async with open_cache(tmp_path, lake) as cache:
        found = await found_in(cache, "set")
        warmer = warmer_of(cache, fetches_max=2)
        job = await warmer.plan(found)
        gate = lake.hold("get")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(warmer.run, job, found)
            await lake.met("get", 2)
            nursery.cancel_scope.cancel()
        gate.set()
        await cache.idle()
        assert lake.requests["get"] == 2 and warmer.status() == []


async def test_failures_are_counted_by_reason_and_the_rest_comes(tmp_path: Path) -> None:
    lake = lake_of(20)
    async with open_cache(tmp_path, lake, retry=NO_RETRY) as cache:
        lake.fault = lambda verb, key: AccessDenied(key) if verb == "get" and key < "set/005" else None
        job = await warmed(cache, "set")
        assert (job.fetched_files, job.failed_files, job.is_complete) == (15, 5, False)
        (failure,) = job.told(0.0)["failures"]
        assert failure["reason"] == "access denied by the lake" and failure["files"] == 5


async def test_a_lake_that_is_away_is_not_asked_for_each_file(tmp_path: Path) -> None:
    lake = lake_of(100)
    async with open_cache(tmp_path, lake, retry=NO_RETRY) as cache:
        lake.fault = lambda verb, key: LakeUnavailable("away") if verb == "get" else None
        job = await warmed(cache, "set")
        assert job.failed_files == 100 and lake.requests["get"] < 20


@pytest.mark.parametrize("policy", ["lru", "epoch"])
async def test_what_does_not_fit_is_left_out_and_nothing_of_the_job_goes_for_it(
    tmp_path: Path, policy: str
) -> None:
    lake = lake_of(60, size_bytes=1 * MIB)
    tiers = (TierSpec("dram", 16 * MIB, is_memory=True), TierSpec("nvme0", 24 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers, policy=policy) as cache:
        job = await warmed(cache, "set")
        assert 25 <= job.fetched_files <= 40 and job.fetched_files + job.unfit_files == 60
        assert len(dict(cache.index.versions())) == job.fetched_files == lake.requests["get"]


@pytest.mark.parametrize(("tier", "fetched"), [("", 7), ("nvme", 7), ("dram", 9)])
async def test_what_is_for_disks_alone_is_planned_for_these(tmp_path: Path, tier: str, fetched: int) -> None:
    lake = lake_of(20, size_bytes=3 * MIB)
    tiers = (TierSpec("dram", 32 * MIB, is_memory=True), TierSpec("nvme0", 23 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers, passes_disks=True) as cache:
        job = await warmed(cache, "set", tier=tier)
        assert (job.fitting, job.fetched_files, job.unfit_files) == (fetched, fetched, 20 - fetched)
        assert lake.requests["get"] == fetched


async def test_a_tier_that_is_not_there_is_refused(tmp_path: Path) -> None:
    async with open_cache(tmp_path, lake_of(2)) as cache:
        for tier, said in (("dram", "mount with --dram"), ("tape", "must be dram or nvme")):
            with pytest.raises(UsageError, match=said):
                await warmer_of(cache).plan(await found_in(cache, "set"), tier)


# Pins


def keeper_of(cache: Cache) -> Keeper:
    """Return what pins in *cache*, as a mover wires it."""
    pins = Pins(cache.path, cache.index)
    for tier in cache.residency.tiers:
        tier.is_pinned = pins.is_pinned
    return Keeper(cache.index, cache.residency, Walker(cache.index, cache.lister), pins)


def test_a_path_lies_below_itself_and_all_above_it() -> None:
    assert list(ancestors(b"a/b/c")) == [b"a/b/c", b"a/b", b"a", b""]


async def test_pins_are_kept_in_a_file_that_outlives_the_index(tmp_path: Path) -> None:
    async with open_cache(tmp_path, lake_of(3)) as cache:
        await keeper_of(cache).pin(["set/000", "./set//001/"])
    async with open_cache(tmp_path, lake_of(3)) as cache:
        assert Pins(tmp_path, cache.index).paths == [b"set/000", b"set/001"]


async def test_pinned_content_stays_on_disk_under_pressure_in_every_tier(tmp_path: Path) -> None:
    lake = lake_of(60, "crowd", 1 * MIB)
    kept = lake.fill(bodies({f"keep/{number}": 1 * MIB for number in range(6)}))
    tiers = (TierSpec("dram", 8 * MIB, is_memory=True), TierSpec("nvme0", 10 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        keeper = keeper_of(cache)
        found, _ = await keeper.pin(["keep"])
        warmer = warmer_of(cache)
        await warmer.run(await warmer.plan(found), found)
        everything = await found_in(cache, "crowd")
        for inode in everything.inodes:
            await warmer.fetch(Job(), Inode(inode))
        assert all(cache.resident_bytes(version) is not None for version in kept.values())
        gone, errors = await keeper.unpin([""])
        assert (gone, errors) == (["keep"], [])
        assert all(not tier.policy.pinned() for tier in cache.residency.tiers)


async def test_more_than_the_disks_hold_is_refused_with_nothing_changed(tmp_path: Path) -> None:
    tiers = (TierSpec("nvme0", 4 * MIB), TierSpec("nvme1", 4 * MIB))
    lake = lake_of(7, size_bytes=1 * MIB)
    lake.fill(bodies({"huge": 6 * MIB}))
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        keeper = keeper_of(cache)
        await keeper.pin(["set"])
        for paths in (["huge"], ["set", "huge"], [""]):
            with pytest.raises(SluiceError, match="pin less, unpin something, or mount with a larger"):
                await keeper.pin(paths)
        assert keeper.pins.paths == [b"set"]


async def test_a_version_that_is_shown_no_longer_may_leave(tmp_path: Path) -> None:
    lake = lake_of(1)
    async with open_cache(tmp_path, lake, ttl_s=0.0) as cache:
        keeper = keeper_of(cache)
        found, _ = await keeper.pin(["set"])
        warmer = warmer_of(cache)
        await warmer.run(await warmer.plan(found), found)
        old = cache.residency.tiers[0].policy.pinned()
        lake.fill({"set/000": b"new"})
        await cache.lister.lookup(cache.names()["set"][0], b"000")
        assert len(old) == 1 and not keeper.pins.is_pinned(old[0][:16])
        await keeper._guarded_look(start=False)  # As `run` does once names have changed.
        assert cache.residency.tiers[0].policy.pinned() == []
        assert cache.residency.tiers[0].policy.size_of(ItemId(old[0])) is not None


async def test_what_is_pinned_is_no_room_for_what_is_warmed(tmp_path: Path) -> None:
    lake = lake_of(6, "keep", 1 * MIB)
    lake.fill(bodies({f"more/{number}": 1 * MIB for number in range(10)}))
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 10 * MIB),)) as cache:
        keeper, warmer = keeper_of(cache), warmer_of(cache)
        found, _ = await keeper.pin(["keep"])
        await warmer.run(await warmer.plan(found), found)
        job = await warmed(cache, "more")
        await wait_all_tasks_blocked()
        assert 2 <= job.fetched_files <= 4 and job.unfit_files == 10 - job.fetched_files
        assert len(cache.residency.tiers[0].policy.pinned()) == 6
