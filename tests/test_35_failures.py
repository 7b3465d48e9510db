"""Residency where index, disk or lake fail: nothing is charged that is not there, nor the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache.errors import CacheError, LakeUnavailable
from cache.model import (
    BLOCK_BYTES,
    KIB,
    MIB,
    ObjectVersion,
)
from tests.residence import (
    NVME,
    TIERS,
    check,
    fill,
    refuse_commits,
    stored,
)
from tests.wiring import NO_RETRY, Cache, WatchedLake, bodies, open_cache


async def test_a_commit_that_fails_leaves_nothing_behind_on_the_way_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, content = WatchedLake(), bodies({"a": 300 * KIB, "big": 9 * MIB})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, tiers=NVME + TIERS[2:]) as cache:
        with monkeypatch.context() as patch:
            refuse_commits(cache, patch)
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
            refuse_commits(cache, patch)
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
                refuse_commits(cache, patch)
                with pytest.raises(CacheError, match="disk is full"):
                    await cache.residency.drop_version(version.id)
            assert cache.residency.sparse[version.id].blocks_present == MIB // BLOCK_BYTES
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
        assert not cache.residency.sparse and cache.index.version(version.id) is None
        await check(cache, content)


async def _fetch_in_vain(cache: Cache, version: ObjectVersion) -> None:
    with pytest.raises(LakeUnavailable):
        await cache.fetcher.fetch(version, 20 * MIB, 1)


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
            refuse_commits(cache, monkeypatch)

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
        unverified = set(cache.residency.unverified.charges())
        await cache.residency.adopt_all()
        await check(cache, content, adopted=unverified)
