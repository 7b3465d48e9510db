"""What the tests of residency share: what must agree after every step, and who disturbs it."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Collection
from contextlib import AsyncExitStack

import pytest
import trio

from cache import shielded
from cache.errors import CacheError, CacheFull
from cache.model import (
    BLOCK_BYTES,
    GROUP_BLOCKS,
    KIB,
    MIB,
    SMALL_OBJECT_BYTES_MAX,
    ObjectVersion,
    VersionId,
)
from cache.policy.eviction import ItemId
from cache.records import group_key
from tests.wiring import Cache, TierSpec, bodies

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

    Files not yet verified have no row, and are charged. The versions *adopted* without a row since the
    start are charged what their files take.
    """
    async with AsyncExitStack() as held:
        for tier in cache.residency.tiers:  # Then nothing is moved, not even ahead of need.
            await held.enter_async_context(tier.room_lock)
        check_now(cache, content, adopted)


def check_now(cache: Cache, content: dict[str, bytes] | None, adopted: Collection[bytes]) -> None:
    residency = cache.residency
    assert repr(residency.busy) == "<busy: 0 versions, 0 of them moving; 0 groups filling, 0 leaving>"
    rows, files = dict(cache.index.versions()), stored(cache)
    disk_bytes_of = {(vid, place): size for place, vid, _, size in files}
    items: list[dict[ItemId, int]] = [{} for _ in residency.tiers]
    expected_files: set[tuple[int, bytes, bool]] = set()
    unverified: list[dict[bytes, int]] = [{} for _ in residency.tiers]
    for vid, (place, charged_bytes) in residency.unverified.charges().items():
        assert vid not in rows
        expected_files.add((place, vid, True))
        unverified[place][vid] = charged_bytes
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
            assert residency.sparse[vid].blocks_present == present > 0
            assert residency.sparse[vid].tier == row.tier
        if content is not None:
            check_bytes(cache, row.version, content)
    assert residency.sparse.ids() == {vid for vid, row in rows.items() if not row.whole}
    assert {(place, vid, whole) for place, vid, whole, _ in files} == expected_files
    for place, tier in enumerate(residency.tiers):
        order = tier.policy.order(10**6)
        assert {item: tier.policy.size_of(item) for item in order} == items[place]
        charged: Counter[bytes] = Counter(unverified[place])
        assert tier.budget.used_bytes == sum(items[place].values()) + charged.total()
        assert tier.budget.used_bytes <= tier.budget.size_bytes
        for item, size_bytes in items[place].items():
            charged[item[:16]] += size_bytes
        for at, held, whole, disk_bytes in files:
            if at == place:
                row = rows.get(VersionId(held))
                is_large = row is None or row.size_bytes > SMALL_OBJECT_BYTES_MAX
                assert disk_bytes <= charged[held] + _RUNS_BYTES * is_large, (row, whole)
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


async def fill(cache: Cache, versions: dict[str, ObjectVersion]) -> None:
    for version in versions.values():
        await cache.fetch(version)


async def refuse(*_: object) -> None:
    raise CacheError("the disk is full")


def refuse_commits(cache: Cache, patch: pytest.MonkeyPatch) -> None:
    """Have the index take no change, on the way in and on the way out."""
    patch.setattr(cache.committer, "commit", refuse)
    patch.setattr(shielded, "commit", refuse)


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
