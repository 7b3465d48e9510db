"""Starting again: after a killed process, after a stopped machine, and with other tiers than before."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from cache.errors import CacheError, CacheFull
from cache.index import Index, remove_index
from cache.model import BLOCK_BYTES, GROUP_BYTES, KIB, MIB, ObjectVersion
from cache.mover import open_index
from tests.residence import check, stored
from tests.wiring import Cache, TierSpec, WatchedLake, bodies, open_cache

NVME = (TierSpec("nvme0", 64 * MIB),)
ALL = (TierSpec("dram", 30 * MIB, is_memory=True), TierSpec("nvme0", 32 * MIB), TierSpec("nvme1", 32 * MIB))
LARGE = GROUP_BYTES + 5 * MIB + 17


def some() -> tuple[WatchedLake, dict[str, ObjectVersion], dict[str, bytes]]:
    lake = WatchedLake()
    content = bodies({f"k{i}": (i + 1) * 100 * KIB + i for i in range(6)} | {"large": LARGE})
    return lake, lake.fill(content), content


async def fill(cache: Cache, versions: dict[str, ObjectVersion]) -> None:
    """Fetch all but the large object, and two pieces of that."""
    for key, version in versions.items():
        if key != "large":
            await cache.fetch(version)
    await cache.fetcher.fetch(versions["large"], 2 * MIB, 1)
    await cache.fetcher.fetch(versions["large"], GROUP_BYTES + MIB, 1)
    await cache.idle()


def used(cache: Cache) -> list[int]:
    return [tier.budget.used_bytes for tier in cache.residency.tiers]


async def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        await fill(cache, versions)
        before = used(cache), sorted(stored(cache))
        gets = lake.requests["get"]
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        assert (used(cache), sorted(stored(cache))) == before
        await check(cache, content)
        await fill(cache, versions)
        assert lake.requests["get"] == gets
        await cache.fetch(versions["large"])
        await cache.idle()
        assert cache.resident_bytes(versions["large"]) == content["large"]


async def test_starting_twice_gives_the_same(tmp_path: Path) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        await fill(cache, versions)
    states = []
    for _ in range(2):
        async with open_cache(tmp_path, lake, tiers=ALL) as cache:
            await check(cache, content)
            states.append((used(cache), sorted(stored(cache))))
    assert states[0] == states[1]


async def test_rows_without_files_are_dropped(tmp_path: Path) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
        files = cache.residency.tiers[0].files
        os.unlink(files.object_path(versions["k1"].id))
        os.unlink(files.partial_path(versions["large"].id))
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await check(cache, content)
        assert cache.residency.place_of(versions["k1"].id) is None
        assert cache.index.groups_of(versions["large"].id) == []
        await fill(cache, versions)
        await check(cache, content)


async def test_a_lost_tmpfs_costs_what_was_in_it_and_no_more(tmp_path: Path) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        await fill(cache, versions)
        _ = [report async for report in cache.residency.drain_dram()]
        lake.fill({"late": b"x" * 1000})
        await cache.fetch(lake.head("late").version)
    (tmp_path / "dram").rename(tmp_path / "gone")
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        await check(cache, content)
        assert used(cache)[0] == 0 and lake.requests["get"] == 9
        assert cache.resident_bytes(versions["k5"]) == content["k5"]


async def test_whole_files_without_rows_are_taken_over_and_sparse_ones_dropped(tmp_path: Path) -> None:
    """The process was killed after a file had been renamed and before its row was committed."""
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
        with cache.index.write() as w:
            w.remove_versions([versions["k2"].id, versions["large"].id])
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        assert await cache.residency.adopt_all() == 1
        await check(cache, content, adopted=[versions["k2"].id])
        assert cache.resident_bytes(versions["k2"]) == content["k2"]
        assert cache.residency.place_of(versions["large"].id) is None


async def test_files_in_memory_without_rows_are_dropped(tmp_path: Path) -> None:
    """They bear no label: nothing says whose they are."""
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        await fill(cache, versions)
        with cache.index.write() as w:
            w.remove_version(versions["k2"].id)
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        await check(cache, content)
        assert cache.residency.place_of(versions["k2"].id) is None


async def test_blocks_written_and_not_committed_are_given_back_to_the_disk(tmp_path: Path) -> None:
    lake, versions, content = some()
    vid = versions["large"].id
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
        files = cache.residency.tiers[0].files
        for start in (0, GROUP_BYTES - BLOCK_BYTES, LARGE // BLOCK_BYTES * BLOCK_BYTES):
            piece = content["large"][start : start + MIB]
            files.land_blocks(vid, start, [piece])
        assert os.stat(files.partial_path(vid)).st_blocks * 512 > 4 * MIB
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await check(cache, content)
        disk_bytes = os.stat(cache.residency.tiers[0].files.partial_path(vid)).st_blocks * 512
        assert 2 * MIB <= disk_bytes <= 2 * MIB + 8192
        await cache.fetch(versions["large"])
        await cache.idle()
        assert cache.resident_bytes(versions["large"]) == content["large"]


async def test_a_version_that_was_on_its_way_down_is_kept_once(tmp_path: Path) -> None:
    """Killed between copy and commit, and between commit and unlink: two files, one row."""
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        await fill(cache, versions)
        dram, nvme = cache.residency.tiers[0].files, cache.residency.tiers[1].files
        for key in ("k0", "k1", "large"):
            row = cache.index.version(versions[key].id)
            assert row is not None and row.tier == 0
            nvme.copy_from(dram, row, versions[key].id, cache.index.groups_of(versions[key].id))
        with cache.index.write() as w:
            row = w.version(versions["k1"].id)
            assert row is not None
            w.put_version(versions["k1"].id, type(row)(row.key, row.etag, row.size_bytes, 1, True))
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        await check(cache, content)
        assert [cache.residency.place_of(versions[key].id) for key in ("k0", "k1", "large")] == [0, 1, 0]


async def test_a_file_that_became_whole_and_has_a_sparse_row_is_dropped(tmp_path: Path) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
        files, vid = cache.residency.tiers[0].files, versions["large"].id
        os.rename(files.partial_path(vid), files.object_path(vid))
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await check(cache, content)
        await cache.fetch(versions["large"])
        await cache.idle()
        assert cache.resident_bytes(versions["large"]) == content["large"]


async def test_without_its_index_a_cache_takes_its_whole_files_over(tmp_path: Path) -> None:
    """What `open_store` does when the machine stopped without a clean unmount."""
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
    remove_index(tmp_path)
    gets = lake.requests["get"]
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        assert used(cache)[0] == sum(disk_bytes for *_, disk_bytes in stored(cache))
        assert await cache.residency.adopt_all() == 6
        for i in range(6):
            await cache.fetch(versions[f"k{i}"])
            assert cache.resident_bytes(versions[f"k{i}"]) == content[f"k{i}"]
        assert lake.requests["get"] == gets
        assert cache.residency.place_of(versions["large"].id) is None
        assert len(stored(cache)) == 6


@pytest.mark.parametrize("damage", ["zeros", "short", "one bit", "no label"])
async def test_a_torn_file_is_dropped_and_fetched_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
        path = cache.residency.tiers[0].files.object_path(versions["k3"].id)
    size = os.stat(path).st_size
    if damage == "no label":
        os.removexattr(path, "user.sluice.version")
    elif damage == "one bit":
        body = bytearray(content["k3"])
        body[-1] ^= 1
        with open(path, "r+b") as file:  # noqa: ASYNC230
            file.write(body)
    else:
        os.truncate(path, size - 5000)
        if damage == "zeros":
            os.truncate(path, size)
    remove_index(tmp_path)
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        with caplog.at_level(logging.WARNING):
            assert await cache.residency.adopt_all() == 5
        assert "do not match the label" in caplog.text
        assert cache.residency.place_of(versions["k3"].id) is None and len(stored(cache)) == 5
        await cache.fetch(versions["k3"])
        assert cache.resident_bytes(versions["k3"]) == content["k3"]
        assert used(cache)[0] == sum(
            cache.residency.tiers[0].policy.size_of(item) or 0
            for item in cache.residency.tiers[0].policy.order(99)
        )


async def test_a_read_of_a_file_not_yet_verified_verifies_it_first(tmp_path: Path) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
    remove_index(tmp_path)
    gets = lake.requests["get"]
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        cache.nursery.start_soon(cache.residency.adopt_all)
        for i in reversed(range(6)):
            await cache.fetch(versions[f"k{i}"])
            assert cache.resident_bytes(versions[f"k{i}"]) == content[f"k{i}"]
        assert lake.requests["get"] == gets
        used_bytes, policy = used(cache)[0], cache.residency.tiers[0].policy
        assert used_bytes == sum(policy.size_of(item) or 0 for item in policy.order(99))


async def test_a_fetch_that_waited_while_its_file_was_taken_over_fetches_nothing(tmp_path: Path) -> None:
    """Else its bytes would be charged twice, and never given back."""
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await cache.fetch(versions["k0"])
        before = used(cache)
        await cache.residency.fill_whole(versions["k0"], lambda: b"", demand=True)
        assert used(cache) == before
        await check(cache, content)


async def lose_rows(tmp_path: Path, lake: WatchedLake, versions: list[ObjectVersion]) -> None:
    """Fill a cache with *versions* and forget it."""
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        for version in versions:
            await cache.fetch(version)
    remove_index(tmp_path)


async def test_files_not_yet_verified_make_room_when_nothing_else_can_leave(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({f"k{i}": MIB + i for i in range(4)})
    versions = list(lake.fill(content).values())
    await lose_rows(tmp_path, lake, versions[:3])
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 3 * MIB + 64 * KIB),)) as cache:
        files, policy = cache.residency.tiers[0].files, cache.residency.tiers[0].policy
        before = cache.residency.unverified.charges()
        assert len(before) == 3 and len(policy) == 0
        await cache.fetch(versions[3])
        assert cache.resident_bytes(versions[3]) == content["k3"]
        (gone,) = before.keys() - cache.residency.unverified.charges().keys()
        assert gone not in {vid for _, vid, *_ in stored(cache)}
        left = {vid: charged for vid, (_, charged) in cache.residency.unverified.charges().items()}
        assert used(cache) == [files.whole_bytes(MIB + 3) + sum(left.values())]
        assert await cache.residency.adopt_all() == 2
        await check(cache, content, adopted=left)
        assert cache.index.version(gone) is None


async def test_what_has_rows_leaves_before_files_not_yet_verified(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({f"k{i}": MIB + i for i in range(4)})
    versions = list(lake.fill(content).values())
    await lose_rows(tmp_path, lake, versions[:2])
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 3 * MIB + 64 * KIB),)) as cache:
        unverified = set(cache.residency.unverified.charges())
        await cache.fetch(versions[2])
        await cache.fetch(versions[3])
        assert cache.residency.place_of(versions[2].id) is None
        assert unverified == {version.id for version in versions[:2]}
        assert set(cache.residency.unverified.charges()) == unverified
        assert await cache.residency.adopt_all() == 2
        await check(cache, content, adopted=unverified)


async def test_only_the_tier_that_is_short_gives_its_unverified_files_up(tmp_path: Path) -> None:
    lake, content = WatchedLake(), bodies({"k0": MIB})
    versions = list(lake.fill(content).values())
    await lose_rows(tmp_path, lake, versions)
    tiers = (*NVME, TierSpec("nvme1", 8 * MIB))
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        before = used(cache)
        assert not await cache.residency.unverified.drop_one(1)
        assert used(cache) == before and before[0] > 0
        assert await cache.residency.unverified.drop_one(0)
        assert not await cache.residency.unverified.drop_one(0)
        assert used(cache) == [0, 0] and stored(cache) == []


async def test_a_tier_full_of_unverified_files_that_all_leave_is_full_only_then(tmp_path: Path) -> None:
    """The last one makes room too; what is larger than the tier still drives none of them out."""
    lake, content = (
        WatchedLake(),
        bodies({f"k{i}": MIB for i in range(3)} | {"most": 3 * MIB, "more": 4 * MIB}),
    )
    versions = lake.fill(content)
    await lose_rows(tmp_path, lake, [versions[f"k{i}"] for i in range(3)])
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 3 * MIB + 64 * KIB),)) as cache:
        with pytest.raises(CacheFull):
            await cache.fetch(versions["more"])
        assert len(cache.residency.unverified) == 3
        await cache.fetch(versions["most"])
        assert not cache.residency.unverified
        await check(cache, content)


CORRUPT_INDEXES = {
    "text": b"not an index" * 10_000,
    "zeros": bytes(1 << 16),
    "short": b"x",
    "torn": None,  # Its first pages are lost.
    "cut off": None,  # Its last pages are.
}


def corrupt_index(home: Path, damage: str) -> None:
    path, body = home / "index.lmdb" / "data.mdb", CORRUPT_INDEXES[damage]
    if damage == "cut off":
        os.truncate(path, 2 * 4096)
    elif body is None:
        with path.open("r+b") as file:
            file.seek(0)
            file.write(b"\xff" * 4096 * 2)
    else:
        path.write_bytes(body)


@pytest.mark.parametrize("damage", CORRUPT_INDEXES)
async def test_a_corrupt_index_is_made_anew_and_the_files_are_taken_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
    corrupt_index(tmp_path, damage)
    gets = lake.requests["get"]
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        assert "it is made anew" in caplog.text
        assert await cache.residency.adopt_all() == 6
        await check(cache, content, adopted={version.id for version in versions.values()})
        assert lake.requests["get"] == gets


@pytest.mark.parametrize("damage", sorted({*CORRUPT_INDEXES} - {"cut off"}))  # There they get SIGBUS.
def test_a_corrupt_index_that_others_may_have_open_is_an_error_and_stays(tmp_path: Path, damage: str) -> None:
    Index(tmp_path).close()
    corrupt_index(tmp_path, damage)
    path = tmp_path / "index.lmdb" / "data.mdb"
    before = path.read_bytes()
    with pytest.raises(CacheError, match=r"index\.lmdb"):
        open_index(tmp_path, may_rebuild=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize("may_rebuild", [True, False])
def test_a_good_index_is_opened_as_it_is(tmp_path: Path, may_rebuild: bool) -> None:
    index = open_index(tmp_path, may_rebuild=may_rebuild)
    with index.write() as w:
        w.set_meta(b"lake", b"here")
    index.close()
    again = open_index(tmp_path, may_rebuild=may_rebuild)
    assert again.meta(b"lake") == b"here"
    again.close()


async def test_a_tier_made_smaller_keeps_what_was_used_last(tmp_path: Path) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
        for i, key in enumerate(["k0", "k1", "k2", "k5", "k4", "large", "k3"]):
            cache.residency.used([versions[key].id], 1e10 + i)
        cache.residency.save_usage()
        await cache.committer.commit(lambda w: None)
    small = (TierSpec("nvme0", 3 * MIB),)
    async with open_cache(tmp_path, lake, tiers=small) as cache:
        await check(cache, content)
        assert cache.residency.place_of(versions["k3"].id) == 0
        assert cache.residency.place_of(versions["large"].id) == 0
        assert cache.residency.place_of(versions["k5"].id) is None
        assert used(cache)[0] <= 3 * MIB


async def test_files_without_rows_never_take_the_room_of_those_with_rows(tmp_path: Path) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
        with cache.index.write() as w:
            w.remove_versions([versions[key].id for key in ("k3", "k4", "k5")])
    async with open_cache(tmp_path, lake, tiers=(TierSpec("nvme0", 3 * MIB),)) as cache:
        await cache.residency.adopt_all()
        await check(cache, content, adopted=[versions[key].id for key in ("k3", "k4", "k5")])
        assert {"k0", "k1", "k2", "large"} <= {row.key.decode() for _, row in cache.index.versions()}


@pytest.mark.parametrize(
    "tiers",
    [ALL[1:], (ALL[0], ALL[2], ALL[1]), (TierSpec("new", 8 * MIB), *ALL[1:])],
    ids=["no dram", "swapped", "one more"],
)
async def test_nvme_keeps_its_content_when_the_tiers_are_numbered_otherwise(
    tmp_path: Path, tiers: tuple[TierSpec, ...]
) -> None:
    lake, versions, content = some()
    async with open_cache(tmp_path, lake, tiers=ALL) as cache:
        await fill(cache, versions)
        _ = [report async for report in cache.residency.drain_dram()]
        await check(cache, content)
    gets = lake.requests["get"]
    async with open_cache(tmp_path, lake, tiers=tiers) as cache:
        await check(cache, content)
        await fill(cache, versions)
        assert lake.requests["get"] == gets


async def test_the_eviction_order_survives_a_restart(tmp_path: Path) -> None:
    lake, versions, _ = some()
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await fill(cache, versions)
        for i, key in enumerate(["k3", "k1", "k5", "k0"]):
            cache.residency.used([versions[key].id], 1e10 + i)
        cache.residency.save_usage()
        await cache.committer.commit(lambda w: None)
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        order = cache.residency.tiers[0].policy.order(99)
        assert [item[:16] for item in order[-4:]] == [versions[key].id for key in ("k3", "k1", "k5", "k0")]
