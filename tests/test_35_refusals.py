"""No object is refused for ever while some tier could take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from cache.errors import CacheError, CacheFull
from cache.model import KIB, MIB, ObjectVersion
from cache.opens import OpenTable
from tests.residence import check
from tests.wiring import Cache, TierSpec, WatchedLake, bodies, open_cache


async def kept(cache: Cache, versions: list[ObjectVersion]) -> int:
    """Fetch *versions*; return how many of them were not refused."""
    count = 0
    for version in versions:
        try:
            await cache.fetch(version)
            count += 1
        except CacheError:
            pass
    return count


def pin_all(cache: Cache, place: int) -> None:
    tier = cache.residency.tiers[place]
    pinned = {item[:16] for item in tier.policy.order(10**6)}
    tier.is_pinned = pinned.__contains__
    for item in tier.policy.order(10**6):
        tier.policy.pin(item)


async def test_a_disk_full_of_pins_leaves_misses_to_the_others(tmp_path: Path) -> None:
    """It has the larger share free, of which no object fits."""
    lake, content = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(40)})
    versions = list(lake.fill(content).values())
    tiers = (TierSpec("pinned", 4 * MIB + 900 * KIB), TierSpec("other", 8 * MIB + 200 * KIB))
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        await kept(cache, versions[:11])
        pin_all(cache, 0)
        assert len(cache.residency.tiers[0].policy) == 4
        assert await kept(cache, versions[11:]) == len(versions) - 11
        await check_pinned(cache)


async def check_pinned(cache: Cache) -> None:
    for tier in cache.residency.tiers:
        for item in tier.policy.pinned():
            tier.policy.unpin(item)
    await check(cache)


async def test_a_disk_that_others_filled_leaves_misses_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its budget it has most room; whatever leaves it gives the disk no room."""
    monkeypatch.setattr("cache.places._GUARD_EVERY_BYTES", 0)
    lake, content = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(20)})
    versions = list(lake.fill(content).values())
    tiers = (TierSpec("full", 50 * MIB, False, MIB), TierSpec("other", 8 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        monkeypatch.setattr(cache.residency.tiers[0].files, "free_bytes", lambda: 0)
        assert await kept(cache, versions) == len(versions)
        await check(cache, content)


async def test_a_disk_without_inodes_replaces_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses new files though there is room; were nothing to leave, nothing would ever get in."""
    lake, content = WatchedLake(), bodies({f"k{i:02}": 20 * KIB for i in range(40)})
    versions = list(lake.fill(content).values())
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 64 * MIB),)) as cache:
        files, land_whole = cache.residency.tiers[0].files, cache.residency.tiers[0].files.land_whole

        def land(version: ObjectVersion, vid: bytes, body: bytes) -> list[int]:
            if len(list(files.stored())) >= 10:
                raise CacheFull("no space left on device")
            return land_whole(version, vid, body)

        monkeypatch.setattr(files, "land_whole", land)
        assert await kept(cache, versions) > len(versions) // 2
        await check(cache, content)


async def test_a_disk_without_inodes_replaces_what_it_has_by_what_memory_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({f"k{i:02}": 20 * KIB for i in range(60)})
    versions = list(lake.fill(content).values())
    tiers = (TierSpec("dram", 200 * KIB, is_memory=True), TierSpec("nvme0", 64 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        files, copy_from = cache.residency.tiers[1].files, cache.residency.tiers[1].files.copy_from

        def copy(*arguments: Any) -> None:
            if len(list(files.stored())) >= 10:
                raise CacheFull("no space left on device")
            copy_from(*arguments)

        monkeypatch.setattr(files, "copy_from", copy)
        assert await kept(cache, versions) == len(versions)
        late = [version for version in versions[30:] if cache.residency.place_of(version.id) == 1]
        assert len(late) >= 5
        await check(cache, content)


async def test_memory_full_of_open_files_leaves_misses_to_the_disks(tmp_path: Path) -> None:
    lake, content, opens = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(20)}), OpenTable()
    versions = list(lake.fill(content).values())
    tiers = (TierSpec("dram", 5 * MIB, is_memory=True), TierSpec("nvme0", 40 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers, opens=opens) as cache:
        for inode, version in enumerate(versions[:5], 2):
            await cache.fetch(version)
            opens.note_object(version.id, inode)
            with opens.held(inode) as held:
                held.opened()
                held.answered_with(lambda inode=inode: inode, lambda _: None)
        assert await kept(cache, versions[5:]) == 15
        assert {cache.residency.place_of(version.id) for version in versions[5:]} == {1}
        await check(cache, content)


async def test_a_large_object_goes_elsewhere_after_one_refusal(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({"big": 9 * MIB, **{f"k{i:02}": MIB for i in range(30)}})
    versions = lake.fill(content)
    tiers = (TierSpec("pinned", 20 * MIB), TierSpec("other", 10 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        smalls = [version for key, version in versions.items() if key != "big"]
        await kept(cache, smalls)
        pin_all(cache, 0)
        for _ in range(2):
            with trio.move_on_after(10):
                await kept(cache, [versions["big"]])
        await cache.idle()
        assert cache.residency.place_of(versions["big"].id) == 1
        await check_pinned(cache)


async def test_what_is_pinned_in_memory_does_not_stop_the_rest_from_leaving(tmp_path: Path) -> None:
    """No disk has room for it, and it is the first that memory would give up."""
    lake, content = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(30)})
    versions = list(lake.fill(content).values())
    tiers = (TierSpec("dram", 6 * MIB, is_memory=True), TierSpec("nvme0", 4 * MIB + 512 * KIB))
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        await kept(cache, versions[:4])
        async for _ in cache.residency.drain_dram():
            pass
        pin_all(cache, 1)
        assert await kept(cache, versions[4:10]) == 6
        first = {bytes(version.id) for version in versions[4:7]}
        cache.residency.tiers[0].is_pinned = first.__contains__
        assert await kept(cache, versions[10:]) == 20
        assert all(cache.residency.place_of(version.id) == 0 for version in versions[4:7])
        await check_pinned(cache)


async def test_read_ahead_finds_room_before_a_miss_had_the_disk_asked(tmp_path: Path) -> None:
    """As after a hint, when nothing was read yet."""
    lake, content = WatchedLake(), bodies({"k0": MIB})
    version = lake.fill(content)["k0"]
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 64 * MIB, False, 64 * MIB),)) as cache:
        assert cache.residency.may_read_ahead(MIB)
        await cache.fetcher.fetch_ahead(version)
        assert cache.resident_bytes(version) == content["k0"]
