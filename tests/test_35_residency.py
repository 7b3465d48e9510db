"""Placing, demoting and evicting over DRAM and two NVMe tiers: what must hold after every step."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Collection
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache.errors import CacheError, CacheFull, LakeUnavailable
from cache.model import (
    BLOCK_BYTES,
    GROUP_BLOCKS,
    KIB,
    MIB,
    SMALL_OBJECT_BYTES_MAX,
    ObjectVersion,
    VersionId,
)
from cache.opens import OpenTable
from cache.policy.eviction import ItemId
from cache.records import charge, group_key
from cache.residency import _EVICT_SHARE_MAX
from tests.wiring import NO_RETRY, Cache, TierSpec, WatchedLake, bodies, open_cache

TIERS = (
    TierSpec("dram", 20 * MIB, is_memory=True),
    TierSpec("nvme0", 12 * MIB),
    TierSpec("nvme1", 25 * MIB),
)
NVME = (TierSpec("nvme0", 8 * MIB),)
# Once written back, a file of more than four runs takes a block for them on ext4, and keeps it when the
# runs become fewer. Nobody charges it. Only what is, or was, sparse has so many.
_RUNS_BYTES = 4096
_FOLDER = "so/that/the/label/is/too/long/for/the/inode/and/takes/a/block"


def small_and_large(smalls: int = 60, larges: int = 3) -> dict[str, bytes]:
    generator = random.Random(35)
    sizes = {f"{_FOLDER}/small{i:02}": generator.randrange(1, 500 * KIB) for i in range(smalls)}
    sizes |= {f"{_FOLDER}/large{i}": 8 * MIB + generator.randrange(1, 2 * MIB) for i in range(larges)}
    return bodies(sizes)


async def check(
    cache: Cache, content: dict[str, bytes] | None = None, *, adopted: Collection[bytes] = ()
) -> None:
    """Assert that index, files, policies, budgets (and, given *content*, bytes) agree, once idle.

    The versions *adopted* without a row since the start are charged what their files take.
    """
    async with AsyncExitStack() as held:
        for tier in cache.residency.tiers:  # Then nothing is moved, not even ahead of need.
            await held.enter_async_context(tier.room_lock)
        check_now(cache, content, adopted)


def check_now(cache: Cache, content: dict[str, bytes] | None, adopted: Collection[bytes]) -> None:
    residency = cache.residency
    assert not residency._busy and not residency._moving
    rows, files = dict(cache.index.versions()), stored(cache)
    disk_bytes_of = {(vid, place): size for place, vid, _, size in files}
    items: list[dict[ItemId, int]] = [{} for _ in residency.tiers]
    expected_files = set()
    for vid, row in rows.items():
        groups = cache.index.groups_of(vid)
        expected_files.add((row.tier, vid, row.whole))
        if row.whole:
            assert all(group.is_complete for _, group in groups)
            charged_bytes = residency.tiers[row.tier].files.whole_bytes(row.size_bytes)
            if vid in adopted:
                charged_bytes = disk_bytes_of[vid, row.tier]
            items[row.tier][ItemId(vid)] = charged_bytes
        else:
            sizes = {number: group.charged_bytes(number, row.size_bytes) for number, group in groups}
            items[row.tier] |= {ItemId(group_key(vid, number)): size for number, size in sizes.items()}
            present = sum(group.present.bit_count() for _, group in groups)
            assert residency._sparse[vid].blocks_present == present > 0
            assert residency._sparse[vid].tier == row.tier
        if content is not None:
            check_bytes(cache, row.version, content)
    assert residency._sparse.keys() == {vid for vid, row in rows.items() if not row.whole}
    assert {(place, vid, whole) for place, vid, whole, _ in files} == expected_files
    for place, tier in enumerate(residency.tiers):
        order = tier.policy.order(10**6)
        assert {item: tier.policy.size_of(item) for item in order} == items[place]
        assert tier.budget.used_bytes == sum(items[place].values()) <= tier.budget.size_bytes
        charged: Counter[bytes] = Counter()
        for item, size_bytes in items[place].items():
            charged[item[:16]] += size_bytes
        for at, held, whole, disk_bytes in files:
            if at == place:
                row = rows[VersionId(held)]
                uncharged = _RUNS_BYTES if row.size_bytes > SMALL_OBJECT_BYTES_MAX else 0
                assert disk_bytes <= charged[held] + uncharged, (row.key, whole)
        assert os.listdir(tier.files.path / "incoming") == []


def stored(cache: Cache) -> list[tuple[int, bytes, bool, int]]:
    return [
        (place, vid, whole, disk_bytes)
        for place, tier in enumerate(cache.residency.tiers)
        for vid, whole, disk_bytes in tier.files.stored()
    ]


def check_bytes(cache: Cache, version: ObjectVersion, content: dict[str, bytes]) -> None:
    held, lake = cache.cached_bytes(version, 0, version.size_bytes), content[version.key]
    for number, group in cache.index.groups_of(version.id):
        for i in range(len(group.checksums)):
            if group.present >> i & 1:
                start = (number * GROUP_BLOCKS + i) * BLOCK_BYTES
                assert held[start : start + BLOCK_BYTES] == lake[start : start + BLOCK_BYTES]


def rot(cache: Cache, version: ObjectVersion, offset: int) -> None:
    row = cache.index.version(version.id)
    assert row is not None
    path = cache.residency.tiers[row.tier].files.file_path(version.id, whole=row.whole)
    with open(path, "r+b") as file:
        byte = file.read(offset + 1)[offset]
        file.seek(offset)
        file.write(bytes([byte ^ 0x55]))


class Workload:
    """Random requests for a while, several at once, as workers and admin commands make them."""

    def __init__(self, cache: Cache, versions: dict[str, ObjectVersion], seed: int) -> None:
        self._cache = cache
        self._versions = list(versions.values())
        self._random = random.Random(seed)
        self.full = 0

    async def step(self) -> None:
        if self._random.random() < 0.1:
            await self._rot_and_drop()
        async with trio.open_nursery() as nursery:
            for _ in range(self._random.randrange(1, 7)):
                verb = self._random.choices(
                    [self._fetch, self._use, self._drop, self._drain], [12, 6, 1, 0.5]
                )[0]
                nursery.start_soon(verb, self._random.choice(self._versions))
        await self._cache.idle()

    async def _fetch(self, version: ObjectVersion) -> None:
        offset = self._random.randrange(version.size_bytes)
        length = min(self._random.choice([4096, MIB, 16 * MIB]), version.size_bytes - offset)
        try:
            await self._cache.fetcher.fetch(version, offset, length)
        except CacheFull:
            self.full += 1

    async def _use(self, version: ObjectVersion) -> None:
        item = version.id if version.size_bytes <= 8 * MIB else group_key(version.id, 0)
        self._cache.residency.used([version.id, item], 1.0)

    async def _drop(self, version: ObjectVersion) -> None:
        await self._cache.residency.drop_version(version.id)

    async def _drain(self, _: ObjectVersion) -> None:
        async for _ in self._cache.residency.drain_dram():
            pass

    async def _rot_and_drop(self) -> None:
        """Find a block that went bad, as a reader does, or leave it to be found when it moves."""
        rows = [(vid, row) for vid, row in self._cache.index.versions()]
        if not rows:
            return
        vid, row = self._random.choice(rows)
        number, group = self._random.choice(self._cache.index.groups_of(vid))
        block = number * GROUP_BLOCKS + group.present.bit_length() - 1
        rot(self._cache, row.version, block * BLOCK_BYTES)
        if row.tier == 0 and self._random.random() < 0.5:
            await self._drain(row.version)
        await self._cache.residency.drop(vid, number)


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
            assert not cache.residency._filling and not cache.residency._leaving
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


async def fill(cache: Cache, versions: dict[str, ObjectVersion]) -> None:
    for version in versions.values():
        await cache.fetch(version)


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


async def test_a_small_tier_does_not_evict_more_than_it_must(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({f"k{i:02}": 100 * KIB for i in range(100)})
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        for version in lake.fill(content).values():
            await cache.fetch(version)
            assert len(cache.residency.tiers[0].policy) <= 81
        most = 8 * MIB // _EVICT_SHARE_MAX + 200 * KIB
        assert cache.residency.tiers[0].budget.room_bytes <= most


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
        assert await cache.residency._demote(0, [ItemId(version.id)]) == charge(300 * KIB)
        assert await cache.residency._demote(0, [ItemId(version.id)]) == 0
        await check(cache, content)
        assert cache.resident_bytes(version) == content["a"]


class HeldFiles:
    """Holds one of a tier's file calls in its thread until it may go on."""

    def __init__(self, files: object, name: str, patch: pytest.MonkeyPatch) -> None:
        self._real = getattr(files, name)
        self.began, self.may_end = threading.Event(), threading.Event()
        patch.setattr(files, name, self)

    def __call__(self, *args: object, **named: object) -> object:
        self.began.set()
        assert self.may_end.wait(30)
        return self._real(*args, **named)

    async def has_begun(self) -> None:
        assert await trio.to_thread.run_sync(self.began.wait, 30)


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


async def test_blocks_fetched_while_their_version_moves_land_where_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"big": 9 * MIB})
    version = lake.fill(content)["big"]
    async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
        await cache.fetcher.fetch(version, 1 * MIB, 1)
        await cache.idle()
        held = HeldFiles(cache.residency.tiers[2].files, "copy_from", monkeypatch)
        monkeypatch.setattr(cache.residency, "_emptiest_disk", lambda _: 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.residency._demote, 0, [ItemId(group_key(version.id, 0))])
            await held.has_begun()
            nursery.start_soon(cache.fetcher.fetch, version, 5 * MIB, 1)
            await wait_all_tasks_blocked()
            held.may_end.set()
        await cache.idle()
        await check(cache, content)
        assert cache.residency.place_of(version.id) == 2
        assert cache.cached_bytes(version, 5 * MIB, 1) == content["big"][5 * MIB : 5 * MIB + 1]


async def test_a_commit_that_fails_leaves_nothing_behind_on_the_way_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"a": 300 * KIB, "big": 9 * MIB})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, tiers=NVME + TIERS[2:]) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(cache.committer, "commit", refuse)
            for version in versions.values():
                with pytest.raises(CacheError, match="disk is full"):
                    await cache.fetcher.fetch(version, 2 * MIB if version.size_bytes > 8 * MIB else 0, 1)
            await cache.idle()
        await check(cache)
        assert stored(cache) == []


async def test_a_commit_that_fails_leaves_all_as_it_was_on_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"a": 300 * KIB, "big": 9 * MIB})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
        await cache.fetch(versions["a"])
        await cache.fetcher.fetch(versions["big"], MIB, 1)
        await cache.idle()
        before = stored(cache)
        with monkeypatch.context() as patch:
            patch.setattr(cache.committer, "commit", refuse)
            for version in versions.values():
                with pytest.raises(CacheError, match="disk is full"):
                    await cache.residency.drop_version(version.id)
            _ = [report async for report in cache.residency.drain_dram()]
        await check(cache, content)
        assert [place for place, *_ in stored(cache)] == [place for place, *_ in before]


async def test_a_commit_that_fails_keeps_the_groups_of_a_version_that_is_being_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"big": 25 * MIB})
    version = lake.fill(content)["big"]
    async with open_cache(tmp_path, lake) as cache:
        await cache.fetcher.fetch(version, 9 * MIB, 1)
        gate = lake.hold("get")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.fetcher.fetch, version, 20 * MIB, 1)
            await lake.met("get", 2)
            with monkeypatch.context() as patch:
                patch.setattr(cache.committer, "commit", refuse)
                with pytest.raises(CacheError, match="disk is full"):
                    await cache.residency.drop_version(version.id)
            assert cache.residency._sparse[version.id].blocks_present == MIB // BLOCK_BYTES
            gate.set()
        await cache.idle()
        await check(cache, content)


async def test_the_only_group_leaves_while_another_is_filled_and_the_fill_fails(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({"big": 25 * MIB})
    version = lake.fill(content)["big"]
    async with open_cache(tmp_path, lake, retry=NO_RETRY) as cache:
        await cache.fetcher.fetch(version, 9 * MIB, 1)
        gate = lake.hold("get")
        lake.fault = lambda verb, key: LakeUnavailable("away") if verb == "get" else None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_fetch_in_vain, cache, version)
            await lake.met("get", 2)
            assert await cache.residency.drop_version(version.id) == MIB
            gate.set()
        await cache.idle()
        await wait_all_tasks_blocked()
        assert cache.residency._sparse == {} and cache.index.version(version.id) is None
        await check(cache, content)


async def _fetch_in_vain(cache: Cache, version: ObjectVersion) -> None:
    with pytest.raises(LakeUnavailable):
        await cache.fetcher.fetch(version, 20 * MIB, 1)


async def refuse(_: object) -> None:
    raise CacheError("the disk is full")


@pytest.mark.parametrize("step", ["make_whole", "commit"])
async def test_a_sparse_file_that_cannot_become_whole_serves_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    lake, content = WatchedLake(), bodies({"big": 9 * MIB})
    version = lake.fill(content)["big"]
    async with open_cache(tmp_path, lake, tiers=TIERS[2:]) as cache:
        files, make_whole = cache.residency.tiers[0].files, cache.residency.tiers[0].files.make_whole

        def broken(*arguments: Any) -> None:
            if step == "make_whole":
                raise CacheError("the disk is full")
            make_whole(*arguments)
            monkeypatch.setattr(cache.committer, "commit", refuse)

        monkeypatch.setattr(files, "make_whole", broken)
        await cache.fetch(version)
        await cache.idle()
        monkeypatch.undo()
        await check(cache, content)
        assert cache.cached_bytes(version, 0, 9 * MIB) == content["big"]
        await cache.residency.drop_version(version.id)
        await check(cache)
        assert stored(cache) == []


async def test_a_file_that_cannot_be_removed_does_not_stop_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lake, content = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(12)})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        with monkeypatch.context() as patch:

            def broken(*_: object, **__: object) -> None:
                raise CacheError("the disk is broken")

            patch.setattr(cache.residency.tiers[0].files, "unlink", broken)
            await fill(cache, versions)
        assert "can't be removed" in caplog.text
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        unverified = set(cache.residency._unverified)
        await cache.residency.adopt_all()
        await check(cache, content, adopted=unverified)


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


async def test_dram_makes_room_ahead_of_need(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({f"k{i:02}": MIB for i in range(19)})
    async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
        cache.nursery.start_soon(cache.residency.keep_dram_room)
        await fill(cache, lake.fill(content))
        await check(cache, content)
        assert cache.residency.tiers[0].budget.room_bytes >= 20 * MIB // 10


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
        commit = cache.residency._committer.commit

        async def open_meanwhile(*arguments: Any) -> None:
            await commit(*arguments)
            with opens.held(5) as held:
                held.opened()
                held.answered_with(lambda: 7, lambda _: None)

        with monkeypatch.context() as patched:
            patched.setattr(cache.residency._committer, "commit", open_meanwhile)
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
