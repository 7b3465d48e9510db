"""Between two steps of a move, an eviction or a fill: cancellations, opens, and failures."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache import shielded
from cache.errors import CacheError
from cache.exchange import Land
from cache.model import KIB, MIB, ObjectVersion
from cache.opens import OpenTable
from cache.policy.due import Next
from cache.policy.eviction import ItemId
from cache.records import block_checksums
from tests.residence import NVME, TIERS, HeldFiles, check, stored
from tests.wiring import Cache, WatchedLake, bodies, open_cache


async def cancel_in(nursery: trio.Nursery, held: HeldFiles, verb: Callable[[], Awaitable[object]]) -> None:
    """Cancel *verb* while the file call is held, and let that go on."""
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            await verb()

    nursery.start_soon(run)
    await held.has_begun()
    scope.cancel()
    await wait_all_tasks_blocked()
    held.may_end.set()


@pytest.mark.parametrize("to_memory", [False, True])
async def test_a_move_that_is_cancelled_has_happened_or_has_not(
    tmp_path: Path, to_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `sluice warm --tier dram` that is interrupted."""
    lake, content = WatchedLake(), bodies({"a": 300 * KIB})
    version = lake.fill(content)["a"]
    async with open_cache(tmp_path, lake, tiers=TIERS[:2]) as cache:
        await cache.residency.fill_whole(
            version, lambda: content["a"], demand=True, wanted_tier="nvme" if to_memory else "dram"
        )
        target = cache.residency.tiers[0 if to_memory else 1].files
        held = HeldFiles(target, "copy_from", monkeypatch)
        async with trio.open_nursery() as nursery:
            await cancel_in(nursery, held, lambda: cache.residency.move(version.id, to_memory=to_memory))
        await check(cache, content)
        assert cache.resident_bytes(version) == content["a"]


async def test_an_eviction_that_is_cancelled_goes_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"a": 300 * KIB})
    version = lake.fill(content)["a"]
    async with open_cache(tmp_path, lake, tiers=NVME) as cache:
        await cache.fetch(version)
        held = HeldFiles(cache.residency.tiers[0].files, "remove", monkeypatch)
        async with trio.open_nursery() as nursery:
            await cancel_in(nursery, held, lambda: cache.residency.drop_version(version.id))
        await check(cache, content)
        assert stored(cache) == [] and cache.residency.tiers[0].budget.used_bytes == 0


async def test_a_group_whose_eviction_is_cancelled_leaves_while_others_are_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"big": 25 * MIB})
    version = lake.fill(content)["big"]
    async with open_cache(tmp_path, lake) as cache:
        await cache.fetcher.fetch(version, 9 * MIB, 1)
        gate = lake.hold("get")
        held = HeldFiles(cache.residency.tiers[0].files, "punch", monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.fetcher.fetch, version, 20 * MIB, 1)
            await lake.met("get", 2)
            await cancel_in(nursery, held, lambda: cache.residency.drop_version(version.id))
            gate.set()
        await cache.idle()
        await check(cache, content)


async def test_evictions_end_also_when_the_mover_does(tmp_path: Path) -> None:
    """Their commits do not wait for who has been cancelled together with them."""
    lake, content = WatchedLake(), bodies({"a": 300 * KIB, "b": 300 * KIB})
    versions = lake.fill(content)
    with trio.fail_after(30):
        async with open_cache(tmp_path, lake, tiers=TIERS) as cache:
            for version in versions.values():
                await cache.fetch(version)
            cache.nursery.start_soon(cache.residency.drop_version, versions["a"].id)
            cache.nursery.start_soon(_drain, cache)


async def _drain(cache: Cache) -> None:
    async for _ in cache.residency.drain_dram():
        pass


def opened(opens: OpenTable, version: ObjectVersion, inode: int) -> None:
    """Have the version's file open in passthrough, as a worker does."""
    opens.note_object(version.id, inode)
    with opens.held(inode) as held:
        held.opened()
        held.answered_with(lambda: 7, lambda _: None)


async def test_a_file_that_the_kernel_opens_while_it_moves_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlinked in memory, it would take memory that is not charged for as long as it is open."""
    lake, content, opens = WatchedLake(), bodies({"a": 300 * KIB}), OpenTable()
    version = lake.fill(content)["a"]
    async with open_cache(tmp_path, lake, tiers=TIERS, opens=opens) as cache:
        await cache.fetch(version)
        for tier in cache.residency.tiers[1:]:
            copy = tier.files.copy_from

            def open_meanwhile(*arguments: object, copy: Callable[..., None] = copy) -> None:
                copy(*arguments)
                opened(opens, version, 5)

            monkeypatch.setattr(tier.files, "copy_from", open_meanwhile)
        await _drain(cache)
        assert cache.residency.place_of(version.id) == 0
        assert cache.resident_bytes(version) == content["a"]
        await check(cache, content)


async def test_a_file_in_memory_that_the_kernel_opens_while_its_row_leaves_gets_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content, opens = WatchedLake(), bodies({"a": 300 * KIB}), OpenTable()
    version = lake.fill(content)["a"]
    async with open_cache(tmp_path, lake, tiers=TIERS, opens=opens) as cache:
        await cache.fetch(version)
        commit = shielded.commit

        async def open_meanwhile(*arguments: Any) -> None:
            await commit(*arguments)
            if not opens.is_passed_through(version.id):
                opened(opens, version, 5)

        with monkeypatch.context() as patch:
            patch.setattr(shielded, "commit", open_meanwhile)
            assert await cache.residency.drop_version(version.id) == 0
        assert cache.residency.place_of(version.id) == 0
        assert cache.resident_bytes(version) == content["a"]
        await check(cache, content)


async def test_what_an_epoch_says_while_a_file_moves_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"a": 300 * KIB})
    version = lake.fill(content)["a"]
    async with open_cache(tmp_path, lake, tiers=(TIERS[0], TIERS[2]), policy="epoch") as cache:
        await cache.fetch(version)
        held = HeldFiles(cache.residency.tiers[1].files, "copy_from", monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drain, cache)
            await held.has_begun()
            cache.residency.expect(version.id, Next(7))
            held.may_end.set()
        assert cache.residency.tiers[1].policy.next_of(ItemId(version.id)) == Next(7)


@pytest.mark.parametrize("size", [300 * KIB, 9 * MIB])
async def test_a_file_is_not_taken_over_while_its_very_bytes_are_being_fetched(
    tmp_path: Path, size: int
) -> None:
    """The same bytes written anew to a key have the ETag that readers of the old file fetch by."""
    lake, content = WatchedLake(), bodies({"a": size})
    version = lake.fill(content)["a"]
    path = tmp_path / "written"
    path.write_bytes(content["a"])
    asked: list[object] = []
    async with open_cache(tmp_path, lake) as cache:

        def commit(land: Land | None) -> bool:
            asked.append(land)
            change = land() if land is not None else None
            if change is not None:
                cache.committer.commit_now(change)
            return True

        gate = lake.hold("get")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.fetch, version)
            await lake.met("get")
            checksums = block_checksums(content["a"])
            assert await cache.residency.adopt_staged(version, str(path), checksums, commit)
            gate.set()
        await cache.idle()
        assert asked == [None]
        await check(cache, content)
        assert cache.resident_bytes(version) == content["a"]


async def test_a_file_that_gets_stuck_on_its_way_to_become_whole_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"big": 9 * MIB})
    version = lake.fill(content)["big"]
    async with open_cache(tmp_path, lake, tiers=TIERS[2:]) as cache:
        files, make_whole = cache.residency.tiers[0].files, cache.residency.tiers[0].files.make_whole

        def fail(*_: object) -> None:
            raise CacheError("the disk is broken")

        def broken(*arguments: object) -> None:
            make_whole(*arguments)  # type: ignore[arg-type]
            fail()

        with monkeypatch.context() as patch:
            patch.setattr(files, "make_whole", broken)
            patch.setattr(files, "make_sparse", fail)
            await cache.fetch(version)
            await cache.idle()
        await check(cache)
        assert stored(cache) == []
        await cache.fetch(version)
        await cache.idle()
        assert cache.resident_bytes(version) == content["big"]
        await check(cache, content)


async def test_a_file_that_is_taken_over_stays_when_the_index_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as good as it was, and the kernel may have it open."""
    lake, content, opens = WatchedLake(), bodies({"a": 300 * KIB}), OpenTable()
    version = lake.fill(content)["a"]
    async with open_cache(tmp_path, lake, tiers=NVME, opens=opens) as cache:
        await cache.fetch(version)
        place, charged = 0, cache.residency.tiers[0].budget.used_bytes
        cache.residency.tiers[0].policy.removed(ItemId(version.id))
        await cache.committer.commit(lambda w: w.remove_version(version.id))
        cache.residency.unverified.keep(place, version.id, charged)
        with monkeypatch.context() as patch:

            def broken() -> object:
                raise CacheError("the index can't be written")

            patch.setattr(cache.index, "write", broken)
            assert await cache.residency.adopt_all() == 0
            with pytest.raises(CacheError):
                await cache.fetch(version)
        await check(cache, content)
        await cache.fetch(version)
        assert lake.requests["get"] == 1
        await check(cache, content)
        assert os.stat(cache.residency.tiers[0].files.object_path(version.id)).st_size == 300 * KIB
