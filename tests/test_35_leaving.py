"""How what is cached leaves: what is in use stays, and who comes meanwhile waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache import shielded
from cache.errors import CacheFull
from cache.model import (
    KIB,
    MIB,
    ObjectVersion,
)
from cache.opens import OpenTable
from cache.placing import EVICT_SHARE_MAX
from cache.records import charge
from tests.residence import (
    NVME,
    TIERS,
    HeldFiles,
    check,
    fill,
    small_and_large,
)
from tests.wiring import TierSpec, WatchedLake, bodies, open_cache


async def test_a_small_tier_does_not_evict_more_than_it_must(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({f"k{i:02}": 100 * KIB for i in range(100)})
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        for version in lake.fill(content).values():
            await cache.fetch(version)
            assert len(cache.residency.tiers[0].policy) <= 81
        most = 8 * MIB // EVICT_SHARE_MAX + 200 * KIB
        assert cache.residency.tiers[0].budget.room_bytes <= most


async def test_a_fetch_during_the_same_versions_eviction_lands_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the file that has just landed is unlinked, and the index names it for ever."""
    lake, content = WatchedLake(), bodies({"a": 300 * KIB})
    version = lake.fill(content)["a"]
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await cache.fetch(version)
        held = HeldFiles(cache.residency.tiers[0].files, "remove", monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.residency.drop_version, version.id)
            await held.has_begun()
            nursery.start_soon(cache.fetch, version)
            await wait_all_tasks_blocked()
            assert lake.requests["get"] == 1
            held.may_end.set()
        await check(cache, content)
        assert cache.resident_bytes(version) == content["a"]


async def test_a_fetch_into_a_version_whose_group_is_leaving_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"big": 17 * MIB})
    version = lake.fill(content)["big"]
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 40 * MIB),)) as cache:
        await cache.fetcher.fetch(version, 1 * MIB, 1)
        await cache.fetcher.fetch(version, 9 * MIB, 1)
        await cache.idle()
        held = HeldFiles(cache.residency.tiers[0].files, "punch", monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.residency.drop, version.id, 0)
            await held.has_begun()
            nursery.start_soon(cache.fetcher.fetch, version, 1 * MIB, 1)
            await wait_all_tasks_blocked()
            held.may_end.set()
        await cache.idle()
        await check(cache, content)
        assert cache.cached_bytes(version, MIB, 1) == content["big"][MIB : MIB + 1]


async def test_the_guard_keeps_the_disks_last_bytes_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of 30 MiB, 10 of which stay free, under a tier that may take 100."""
    monkeypatch.setattr("cache.places._GUARD_EVERY_BYTES", MIB)
    lake, content = WatchedLake(), bodies({f"k{i:02}": 512 * KIB for i in range(60)})
    versions = lake.fill(content)
    tiers = (TierSpec("nvme0", 100 * MIB, free_min_bytes=10 * MIB),)
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        files = cache.residency.tiers[0].files
        others_bytes = 0

        def free_bytes() -> int:
            return 30 * MIB - others_bytes - sum(size for _, _, size in files.stored())

        monkeypatch.setattr(files, "free_bytes", free_bytes)
        for version in versions.values():
            await cache.fetch(version)
            assert free_bytes() >= 10 * MIB - 3 * MIB  # What lands between two looks.
        await check(cache, content)
        assert cache.residency.tiers[0].budget.used_bytes >= 16 * MIB
        others_bytes = 15 * MIB
        await cache.residency.drop_version(next(reversed(versions.values())).id)
        for version in list(versions.values())[:8]:
            await cache.fetch(version)
        assert free_bytes() >= 10 * MIB - 3 * MIB
        await check(cache, content)


async def test_a_disk_filled_by_others_empties_the_tier_and_reads_pass_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.places._GUARD_EVERY_BYTES", 0)
    lake, content = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(6)})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 8 * MIB, False, MIB),)) as cache:
        await fill(cache, dict(list(versions.items())[:4]))
        monkeypatch.setattr(cache.residency.tiers[0].files, "free_bytes", lambda: 0)
        with pytest.raises(CacheFull):
            await cache.fetch(versions["k05"])
        await check(cache, content)
        assert cache.residency.tiers[0].budget.used_bytes == 0


async def test_what_the_kernel_reads_itself_stays_where_it_is_until_it_is_closed(tmp_path: Path) -> None:
    lake, content, opens = WatchedLake(), small_and_large(), OpenTable()
    first, *others = lake.fill(content).values()
    async with open_cache(tmp_path, lake, tiers=TIERS, opens=opens) as cache:
        await cache.fetch(first)
        place = cache.residency.place_of(first.id)
        opens.note_object(first.id, 5)
        with opens.held(5) as held:
            held.opened()
            held.answered_with(lambda: 7, lambda _: None)
        for version in others:  # More than all tiers hold.
            await cache.fetch(version)
        assert cache.residency.place_of(first.id) == place
        assert await cache.residency.drop_version(first.id) == 0
        await cache.idle()
        await check(cache, content)
        with opens.held(5) as held:
            held.closed()
            held.forget_backing()
        assert await cache.residency.drop_version(first.id) > 0
        await check(cache, content)


async def test_a_bad_block_leaves_even_while_the_kernel_reads_the_file(tmp_path: Path) -> None:
    lake, opens = WatchedLake(), OpenTable()
    (version,) = lake.fill(bodies({"file": 100_000})).values()
    async with open_cache(tmp_path, lake, tiers=NVME, opens=opens) as cache:
        await cache.fetch(version)
        opens.note_object(version.id, 5)
        with opens.held(5) as held:
            held.opened()
            held.answered_with(lambda: 7, lambda _: None)
        await cache.residency.drop(version.id, 0)
        assert cache.residency.place_of(version.id) is None


async def test_a_file_that_the_kernel_opens_while_its_row_leaves_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evictions look for opens before their commit; an open may come between."""
    lake, content, opens = WatchedLake(), bodies({"file": 100_000}), OpenTable()
    (version,) = lake.fill(content).values()
    async with open_cache(tmp_path, lake, tiers=NVME, opens=opens) as cache:
        await cache.fetch(version)
        opens.note_object(version.id, 5)
        commit = shielded.commit

        async def open_meanwhile(*arguments: Any) -> None:
            await commit(*arguments)
            with opens.held(5) as held:
                held.opened()
                held.answered_with(lambda: 7, lambda _: None)

        with monkeypatch.context() as patched:
            patched.setattr(shielded, "commit", open_meanwhile)
            assert await cache.residency.drop_version(version.id) == 0
        assert cache.residency.place_of(version.id) is None
        assert await trio.Path(cache.residency.tiers[0].files.object_path(version.id)).exists()
        assert cache.residency.tiers[0].budget.used_bytes == charge(100_000) + 4096  # It is there.
        await cache.fetch(version)
        assert lake.requests["get"] == 1  # Of the file that was kept.
        await check(cache, content)


async def test_misses_that_find_a_tier_full_of_open_files_do_not_wait_for_each_other(tmp_path: Path) -> None:
    lake, opens = WatchedLake(), OpenTable()
    kept = lake.fill(bodies({f"k{i}": MIB for i in range(7)}))
    missed = lake.fill(bodies({f"large{i}": 9 * MIB for i in range(6)}))
    async with open_cache(tmp_path, lake, tiers=NVME, opens=opens) as cache:
        for inode, version in enumerate(kept.values(), 2):
            await cache.fetch(version)
            opens.note_object(version.id, inode)
            with opens.held(inode) as held:
                held.opened()
                held.answered_with(lambda inode=inode: inode, lambda _: None)
        refused = []

        async def miss(version: ObjectVersion) -> None:
            with pytest.raises(CacheFull):
                await cache.fetcher.fetch(version, 0, KIB)
            refused.append(version)

        started_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for version in missed.values():
                nursery.start_soon(miss, version)
        assert len(refused) == 6
        # Nothing that lands could make room. Each would wait for two seconds, and hold up the next.
        assert trio.current_time() - started_s < 4
        await cache.idle()
        await check(cache)
