"""Where objects land, and how they move between DRAM and the disks."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache.fetcher import Wanted
from cache.model import KIB, MIB, block_count
from cache.policy.eviction import ItemId
from cache.records import charge, group_key
from tests.residence import (
    NVME,
    TIERS,
    HeldFiles,
    check,
    fill,
    rot,
)
from tests.wiring import TierSpec, WatchedLake, bodies, open_cache


async def test_fetched_objects_land_in_dram_and_its_victims_move_down(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(30)})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
        await fill(cache, versions)
        await check(cache, content)
        places = [cache.residency.place_of(version.id) for version in versions.values()]
        assert places[-1] == 0 and None not in places
        assert places.count(0) >= 19
        assert lake.requests["get"] == 30  # Nothing was lost on the way.


async def test_an_object_over_half_of_dram_lands_on_nvme(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({"a": 3 * MIB, "b": 5 * MIB})
    versions = lake.fill(content)
    tiers = (TierSpec("dram", 8 * MIB, is_memory=True), *NVME)
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        await fill(cache, versions)
        assert cache.residency.place_of(versions["a"].id) == 0
        assert cache.residency.place_of(versions["b"].id) == 1


async def test_what_the_kernel_reads_itself_on_disks_alone_lands_there(tmp_path: Path) -> None:
    """But not where no disk has room for it, nor where memory was asked for."""
    lake, content = WatchedLake(), bodies({"small": MIB, "a": 2 * MIB, "b": 9 * MIB, "huge": 13 * MIB})
    content |= bodies({"asked": 3 * MIB})
    versions = lake.fill(content)
    tiers = (TierSpec("dram", 64 * MIB, is_memory=True), TierSpec("nvme0", 12 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers, passes_disks=True) as cache:
        asked = versions.pop("asked")
        blocks = range(block_count(asked.size_bytes))
        await cache.fetcher.fetch_wanted(asked, blocks, Wanted("dram"))
        await fill(cache, versions)
        places = {name: cache.residency.place_of(version.id) for name, version in versions.items()}
        assert places == {"small": 0, "a": 1, "b": 1, "huge": 0}
        assert cache.residency.place_of(asked.id) == 0
        await check(cache, content)


async def test_nvme_tiers_of_unequal_size_fill_by_their_free_share(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(18)})
    async with open_cache(tmp_path, lake, tiers=TIERS[1:]) as cache:
        await fill(cache, lake.fill(content))
        shares = [tier.budget.used_bytes / tier.budget.size_bytes for tier in cache.residency.tiers]
        assert abs(shares[0] - shares[1]) < 0.1


async def test_what_fits_into_one_tier_only_goes_there_though_the_other_is_emptier(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({"first": 3 * MIB, "second": 3 * MIB})
    tiers = (TierSpec("tiny", 2 * MIB), TierSpec("nvme1", 8 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        await fill(cache, lake.fill(content))
        await check(cache, content)
        assert [tier.budget.used_bytes for tier in cache.residency.tiers] == [
            0,
            2 * cache.residency.tiers[1].files.whole_bytes(3 * MIB),
        ]


async def test_moving_frees_dram_down_to_nothing_when_drained(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({**{f"k{i:02}": 200 * KIB for i in range(40)}, "big": 9 * MIB})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
        await fill(cache, {key: version for key, version in versions.items() if key != "big"})
        await cache.fetcher.fetch(versions["big"], 5 * MIB, 1)
        assert cache.residency.place_of(versions["big"].id) == 0
        reports = [report async for report in cache.residency.drain_dram()]
        await check(cache, content)
        assert cache.residency.tiers[0].budget.used_bytes == 0
        assert reports[-1][0] == reports[-1][1] == cache.residency.demoted_bytes
        assert all(cache.residency.place_of(version.id) for version in versions.values())


async def test_a_block_that_went_bad_in_dram_is_found_when_it_moves_and_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lake, content = WatchedLake(), bodies({"good": 300 * KIB, "bad": 300 * KIB})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
        await fill(cache, versions)
        rot(cache, versions["bad"], 200 * KIB)
        _ = [report async for report in cache.residency.drain_dram()]
        await check(cache, content)
        assert cache.residency.place_of(versions["bad"].id) is None
        assert cache.residency.place_of(versions["good"].id) is not None
        assert "can't move" in caplog.text


async def test_a_version_that_is_gone_from_dram_by_now_is_not_moved_again(tmp_path: Path) -> None:
    """A drain works from a list; what moved meanwhile must keep its copy on NVMe."""
    lake, content = WatchedLake(), bodies({"a": 300 * KIB})
    version = lake.fill(content)["a"]
    async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
        await cache.fetch(version)
        assert await cache.residency.demotion.demote(0, [ItemId(version.id)]) == charge(300 * KIB)
        assert await cache.residency.demotion.demote(0, [ItemId(version.id)]) == 0
        await check(cache, content)
        assert cache.resident_bytes(version) == content["a"]


async def test_blocks_fetched_while_their_version_moves_land_where_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"big": 9 * MIB})
    version = lake.fill(content)["big"]
    async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
        await cache.fetcher.fetch(version, 1 * MIB, 1)
        await cache.idle()
        held = HeldFiles(cache.residency.tiers[2].files, "copy_from", monkeypatch)
        monkeypatch.setattr(cache.residency.placing, "emptiest_disk", lambda _: 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.residency.demotion.demote, 0, [ItemId(group_key(version.id, 0))])
            await held.has_begun()
            nursery.start_soon(cache.fetcher.fetch, version, 5 * MIB, 1)
            await wait_all_tasks_blocked()
            held.may_end.set()
        await cache.idle()
        await check(cache, content)
        assert cache.residency.place_of(version.id) == 2
        assert cache.cached_bytes(version, 5 * MIB, 1) == content["big"][5 * MIB : 5 * MIB + 1]


async def test_dram_makes_room_ahead_of_need(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(19)})
    async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
        cache.nursery.start_soon(cache.residency.keep_dram_room)
        await fill(cache, lake.fill(content))
        await check(cache, content)
        assert cache.residency.tiers[0].budget.room_bytes >= 20 * MIB // 10


async def test_uses_are_gathered_and_saved_with_the_rows(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({"a": 1000})
    version = lake.fill(content)["a"]
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await cache.fetch(version)
        cache.residency.used([version.id, version.id, b"u" * 16], 5e9)
        row = cache.index.version(version.id)
        assert row is not None
        assert cache.residency.usage(version.id, row).hits == 2
        cache.residency.save_usage()
        await cache.committer.commit(lambda w: None)
        saved = cache.index.version(version.id)
        assert saved is not None and (saved.hits, saved.last_used_s) == (2, 5e9)
        assert cache.residency.usage(version.id, saved).hits == 2


async def test_what_can_move_makes_room_before_a_group_that_could_only_leave(tmp_path: Path) -> None:
    """A group of a file that is being filled can't move: dropped, it would be fetched again."""
    content = bodies({"big": 9 * MIB} | {f"k{i}": 2 * MIB for i in range(3)})
    lake = WatchedLake()
    versions = lake.fill(content)
    big = versions.pop("big")
    async with open_cache(tmp_path, lake, tiers=TIERS, policy="lru") as cache:
        await cache.fetcher.fetch(big, MIB, 1)
        await cache.idle()
        await fill(cache, versions)
        first_group = ItemId(group_key(big.id, 0))
        assert cache.residency.leaving.victims(0, 1) == [first_group]
        may_land = lake.hold("get")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.fetcher.fetch, big, 8 * MIB, 1)
            await lake.met("get", 5)
            for _ in versions:
                assert await cache.residency.demotion.make_room(0, 1)
                assert cache.residency.tiers[0].policy.size_of(first_group)
            assert await cache.residency.demotion.make_room(0, 1)
            assert cache.residency.tiers[0].policy.size_of(first_group) is None
            may_land.set()
        await cache.idle()
        await check(cache, content)
        assert all(cache.residency.place_of(version.id) in (1, 2) for version in versions.values())


async def test_a_group_of_a_file_that_is_being_filled_leaves_at_its_turn_where_no_disk_has_room(
    tmp_path: Path,
) -> None:
    """Else one long read would push all of memory, and as much of the disk, to nowhere."""
    content = bodies({"big": 9 * MIB} | {f"{where}{i}": 2 * MIB for where in "dk" for i in range(3)})
    lake = WatchedLake()
    versions = lake.fill(content)
    big, on_disk = versions.pop("big"), [versions.pop(f"d{i}") for i in range(3)]
    tiers = (TierSpec("dram", 20 * MIB, is_memory=True), TierSpec("nvme0", 7 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers, policy="lru") as cache:
        for version in on_disk:
            await cache.fetch(version)
        async for _ in cache.residency.demotion.drain_dram():
            pass
        await cache.fetcher.fetch(big, MIB, 1)
        await cache.idle()
        await fill(cache, versions)
        may_land = lake.hold("get")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.fetcher.fetch, big, 8 * MIB, 1)
            await lake.met("get", 8)
            assert await cache.residency.demotion.make_room(0, 1)
            assert cache.residency.tiers[0].policy.size_of(ItemId(group_key(big.id, 0))) is None
            may_land.set()
        await cache.idle()
        await check(cache, content)
        assert {cache.residency.place_of(version.id) for version in on_disk} == {1}
        assert {cache.residency.place_of(version.id) for version in versions.values()} == {0}
