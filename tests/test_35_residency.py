"""Placing, demoting and evicting over DRAM and two NVMe tiers: what must hold after every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from cache.model import (
    KIB,
    MIB,
    ObjectVersion,
)
from tests.residence import (
    TIERS,
    Workload,
    check,
    small_and_large,
)
from tests.wiring import Cache, TierSpec, WatchedLake, bodies, open_cache


@pytest.mark.parametrize("policy", ["lru", "epoch"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_index_files_policies_and_budgets_agree_whatever_happens(
    tmp_path: Path, seed: int, policy: str
) -> None:
    lake, content = WatchedLake(), small_and_large()
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, tiers=TIERS, policy=policy) as cache:
        cache.nursery.start_soon(cache.residency.keep_dram_room)
        workload = Workload(cache, versions, seed)
        for number in range(70):
            await workload.step()
            await check(cache, content if number % 10 == 9 else None)
        assert cache.residency.demoted_bytes > 0 and cache.residency.evicted_bytes > 0
        assert workload.full < 40


@pytest.mark.parametrize("policy", ["lru", "epoch"])
@pytest.mark.parametrize("tiers", [(24,), (32, 24)])
async def test_index_files_policies_and_budgets_agree_though_objects_are_larger_than_their_tier(
    tmp_path: Path, tiers: tuple[int, ...], policy: str
) -> None:
    """Groups leave while others of their version are filled; with two tiers, the first is DRAM."""
    sizes = {"larger": 50 * MIB + 17, "half": 15 * MIB, "small": 300 * KIB}
    lake, content = WatchedLake(), bodies(sizes)
    versions = lake.fill(content)
    specs = tuple(
        TierSpec(f"t{place}", size * MIB, is_memory=len(tiers) > 1 and place == 0)
        for place, size in enumerate(tiers)
    )
    async with open_cache(tmp_path, lake, tiers=specs, policy=policy) as cache:
        workload = Workload(cache, versions, seed=3)
        for number in range(50):
            await workload.step()
            await check(cache, content if number % 10 == 9 else None)
        assert cache.residency.evicted_bytes > 0


async def test_a_file_larger_than_its_tier_is_cached_as_it_is_read_on(tmp_path: Path) -> None:
    """Its oldest groups leave; no read has to pass by the cache, though its version is busy all the time."""
    size = 60 * MIB
    lake, content = WatchedLake(), bodies({"larger": size})
    version = lake.fill(content)["larger"]
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 32 * MIB),)) as cache:
        async with trio.open_nursery() as nursery:
            for start in (0, size // 2):
                nursery.start_soon(_read_on, cache, version, start, size // 2)
        await cache.idle()
        await check(cache, content)
        assert lake.requests["get"] < 2 * size // MIB  # In units of 1 MiB at least.
        assert cache.residency.tiers[0].budget.used_bytes > 16 * MIB


async def _read_on(cache: Cache, version: ObjectVersion, start: int, length: int) -> None:
    for offset in range(start, start + length, 128 * KIB):
        await cache.fetcher.fetch(version, offset, 128 * KIB)
