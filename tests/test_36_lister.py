"""The namespace follows the lake: listings, single keys, changes, and listing ahead of walks."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Awaitable, Iterable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache.errors import CacheError, LakeUnavailable, SluiceError
from cache.lister import _AHEAD_DIRECTORIES, _LOOKUPS_BEFORE_LISTING
from cache.model import ROOT_INODE, Inode
from cache.policy.names import MARKER_WITH_CONTENT, SHADOWED
from tests import wiring
from tests.wiring import NO_RETRY, Cache, WatchedLake

open_cache = partial(wiring.open_cache, with_tiers=False)


def lake_with(keys: Iterable[str], *, page_keys: int = 1000, body: bytes = b"body") -> WatchedLake:
    lake = WatchedLake(page_keys)
    lake.fill({key: b"" if key.endswith("/") else body for key in keys})
    return lake


async def list_names(cache: Cache, inode: Inode = ROOT_INODE) -> list[str]:
    await cache.lister.list_directory(inode)
    return list(cache.names(inode))


async def inode_at(cache: Cache, path: str) -> Inode:
    inode = ROOT_INODE
    for part in filter(None, path.split("/")):
        assert await cache.lister.lookup(inode, os.fsencode(part)), path
        child = cache.index.child(inode, os.fsencode(part))
        assert child is not None
        inode = child[0]
    return inode


def expire(cache: Cache, inode: Inode = ROOT_INODE) -> None:
    """Make a listing and what it showed look an hour older."""
    state = cache.index.directory(inode)
    if state is not None:
        with cache.index.write() as w:
            w.set_directory(inode, msgspec.structs.replace(state, listed_at_s=state.listed_at_s - 3600))


async def listed_ahead(cache: Cache) -> None:
    """Return once all that is listed ahead has been listed."""
    while cache.lister._ahead:
        for flight in list(cache.lister._flights.values()):
            await flight.done.wait()
        await trio.lowlevel.checkpoint()


def hidden(cache: Cache) -> dict[str, str]:
    count, keys = cache.index.hidden(1000)
    assert count == len(keys)
    return {os.fsdecode(one.key): one.reason for one in keys}


def changed_at(cache: Cache, inode: Inode = ROOT_INODE) -> int:
    state = cache.index.directory(inode)
    assert state is not None
    return state.changed_at_ns


@pytest.mark.parametrize("page_keys", [2, 1000])
async def test_a_directory_is_changed_exactly_by_listings_that_show_something_else(
    tmp_path: Path, page_keys: int
) -> None:
    lake = lake_with(["a", "b", "c", "d/x"], page_keys=page_keys)
    async with open_cache(tmp_path, lake) as cache:

        async def relisted() -> int:
            expire(cache)
            await cache.lister.list_directory(ROOT_INODE)
            return changed_at(cache)

        began_ns = time.time_ns()
        await cache.lister.list_directory(ROOT_INODE)
        seen = [changed_at(cache)]
        assert began_ns <= seen[0] <= time.time_ns()
        assert await relisted() == seen[-1]
        for change in (
            lambda: lake.put("a", b"another version"),
            lambda: lake.put("new", b"x"),
            lambda: lake.delete_many(["b"]),
            lambda: lake.put("dir/", b""),
            lambda: lake.delete_many(["d/x"]),
        ):
            change()
            seen.append(await relisted())
            assert seen[-1] > seen[-2]
            assert await relisted() == seen[-1]
        lake.put("dir/below", b"x")  # Another directory's entry.
        assert await relisted() == seen[-1]


async def test_a_directory_is_changed_by_a_lookup_that_finds_something_else(tmp_path: Path) -> None:
    lake = lake_with(["a", "b"])
    async with open_cache(tmp_path, lake) as cache:
        await cache.lister.list_directory(ROOT_INODE)
        before = changed_at(cache)
        assert await cache.lister.refresh_entry(ROOT_INODE, b"a")
        assert not await cache.lister.refresh_entry(ROOT_INODE, b"none")
        assert changed_at(cache) == before
        lake.put("a", b"another version")
        assert await cache.lister.refresh_entry(ROOT_INODE, b"a")
        then = changed_at(cache)
        assert then > before
        lake.delete_many(["b"])
        assert not await cache.lister.refresh_entry(ROOT_INODE, b"b")
        assert changed_at(cache) > then


@pytest.mark.parametrize("page_keys", [1, 2, 3, 7, 1000])
async def test_a_listing_shows_files_and_directories_however_it_is_paged(
    tmp_path: Path, page_keys: int
) -> None:
    lake = lake_with(["a", "b/1", "b/2", "c", "d/x/y", "e", "z"], page_keys=page_keys)
    async with open_cache(tmp_path, lake) as cache:
        assert await list_names(cache) == ["a", "b", "c", "d", "e", "z"]
        kinds = {name: node.is_directory for name, (_, node) in cache.names().items()}
        assert {name for name, is_directory in kinds.items() if is_directory} == {"b", "d"}
        state = cache.index.directory(ROOT_INODE)
        assert state is not None and state.entries == 6 and state.pages == -(-6 // page_keys)
        assert await list_names(cache, await inode_at(cache, "d/x")) == ["y"]


async def test_a_file_shows_the_version_that_the_lake_has(tmp_path: Path) -> None:
    lake = lake_with(["d/f"])
    async with open_cache(tmp_path, lake) as cache:
        node = cache.index.node(await inode_at(cache, "d/f"))
        info = lake.head("d/f")
        assert node is not None
        assert (node.etag, node.size_bytes, node.vid) == (info.version.etag, 4, info.version.id)
        assert node.mtime_ns == info.mtime_ns


async def test_names_that_are_no_utf8_are_shown(tmp_path: Path) -> None:
    lake = lake_with(["\udcff/\udc80\udc81"])
    async with open_cache(tmp_path, lake) as cache:
        inode = await inode_at(cache, "\udcff")
        await cache.lister.list_directory(inode)
        assert [node.name for _, node in cache.index.children(inode, b"", 9)] == [b"\x80\x81"]


async def test_keys_that_no_path_can_show_are_hidden_and_counted(tmp_path: Path) -> None:
    long = "x" * 256
    lake = lake_with(["a//b", "/lead", "./c", "../d", f"dir/{long}", f"{long}/e", "ok", "dir/.", "dir/.."])
    async with open_cache(tmp_path, lake) as cache:
        assert await list_names(cache) == ["a", "dir", "ok"]
        assert await list_names(cache, await inode_at(cache, "a")) == []
        assert await list_names(cache, await inode_at(cache, "dir")) == []
        found = hidden(cache)
        assert found.keys() == {"a//", "/", "./", "../", f"dir/{long}", f"{long}/", "dir/.", "dir/.."}
        assert "//" in found["a//"] and "255" in found[f"dir/{long}"]
        for name in (b".", b"..", b"", b"x" * 256, b"a/b"[:0]):
            assert not await cache.lister.refresh_entry(ROOT_INODE, name)


async def test_what_is_no_longer_hidden_is_no_longer_told(tmp_path: Path) -> None:
    lake = lake_with(["a//b", "ok"])
    async with open_cache(tmp_path, lake) as cache:
        inode = await inode_at(cache, "a")
        await list_names(cache, inode)
        assert hidden(cache)
        lake.delete_many(["a//b"])
        lake.fill({"a/b": b""})
        expire(cache, inode)
        assert await list_names(cache, inode) == ["b"]
        assert hidden(cache) == {}


@pytest.mark.parametrize("page_keys", [1, 2, 1000])
@pytest.mark.parametrize("others", [[], ["n", "n-before-the-slash"], ["n.after"]])
async def test_a_key_that_is_also_a_prefix_shows_as_the_directory(
    tmp_path: Path, page_keys: int, others: list[str]
) -> None:
    """ "n" sorts before "n/...", with "n-" in between: on one page, or the file's page first."""
    lake = lake_with(["n", "n/inside", *others], page_keys=page_keys)
    async with open_cache(tmp_path, lake) as cache:
        shown = sorted({"n", *others})
        for _ in range(3):
            assert sorted(await list_names(cache)) == shown
            assert cache.names()["n"][1].is_directory
            assert hidden(cache) == {"n": SHADOWED}
            state = cache.index.directory(ROOT_INODE)
            assert state is not None and state.entries == len(shown)
            expire(cache)
        inode = cache.names()["n"][0]
        cache.told()
        expire(cache)
        await list_names(cache)
        assert cache.names()["n"][0] == inode and cache.told() == []
        assert await list_names(cache, inode) == ["inside"]


async def test_a_directory_marker_shows_nothing_and_one_with_content_is_hidden(tmp_path: Path) -> None:
    lake = lake_with(["empty/", "full/", "full/x"])
    lake.fill({"full/": b"content"})
    async with open_cache(tmp_path, lake) as cache:
        assert await list_names(cache) == ["empty", "full"]
        assert await list_names(cache, await inode_at(cache, "empty")) == []
        assert await list_names(cache, await inode_at(cache, "full")) == ["x"]
        assert hidden(cache) == {"full/": MARKER_WITH_CONTENT}


async def test_listing_again_keeps_the_inodes_of_what_did_not_change(tmp_path: Path) -> None:
    lake = lake_with(["a", "b", "d/x"], page_keys=2)
    async with open_cache(tmp_path, lake) as cache:
        await list_names(cache)
        before = {name: inode for name, (inode, _) in cache.names().items()}
        lake.fill({"b": b"other content", "new": b""})
        expire(cache)
        await list_names(cache)
        after = {name: inode for name, (inode, _) in cache.names().items()}
        assert after["a"] == before["a"] and after["d"] == before["d"]
        assert after["b"] not in before.values()
        assert cache.told() == [(ROOT_INODE, b"b")]
        assert cache.index.is_detached(before["b"])
        old = cache.index.node(before["b"])
        assert old is not None and old.size_bytes == 4  # Whoever has it open goes on reading it.


async def test_what_vanished_is_detached_and_told(tmp_path: Path) -> None:
    lake = lake_with(["a", "b", "d/x"])
    async with open_cache(tmp_path, lake) as cache:
        await list_names(cache)
        inodes = {name: inode for name, (inode, _) in cache.names().items()}
        lake.delete_many(["a", "d/x"])
        expire(cache)
        assert await list_names(cache) == ["b"]
        assert sorted(cache.told()) == [(ROOT_INODE, b"a"), (ROOT_INODE, b"d")]
        assert cache.index.is_detached(inodes["a"]) and cache.index.is_detached(inodes["d"])


async def test_a_file_becomes_a_directory_and_a_file_again(tmp_path: Path) -> None:
    lake = lake_with(["n"])
    async with open_cache(tmp_path, lake) as cache:
        await list_names(cache)
        seen = {cache.names()["n"][0]}
        for key, gone, is_directory in [("n/x", "n", True), ("n", "n/x", False)]:
            lake.delete_many([gone])
            lake.fill({key: b"1"})
            expire(cache)
            assert await list_names(cache) == ["n"]
            inode, node = cache.names()["n"]
            assert node.is_directory is is_directory
            assert inode not in seen
            seen.add(inode)
            assert cache.told() == [(ROOT_INODE, b"n")]
            state = cache.index.directory(ROOT_INODE)
            assert state is not None and state.entries == 1
            assert hidden(cache) == {}


async def test_a_listing_is_asked_for_once_by_many_and_then_believed(tmp_path: Path) -> None:
    lake = lake_with(["a", "b"])
    gate = lake.hold("list")
    async with open_cache(tmp_path, lake) as cache:
        async with trio.open_nursery() as readers:
            for _ in range(20):
                readers.start_soon(cache.lister.list_directory, ROOT_INODE)
                readers.start_soon(cache.lister.lookup, ROOT_INODE, b"a")
            await wait_all_tasks_blocked()
            gate.set()
        await list_names(cache)
        assert await cache.lister.lookup(ROOT_INODE, b"b")
        assert not await cache.lister.lookup(ROOT_INODE, b"c")
        assert lake.requests == Counter(list=1)


@pytest.mark.parametrize(("immutable", "requests"), [(False, 2), (True, 1)])
async def test_an_expired_listing_is_asked_for_again_and_an_immutable_one_never(
    tmp_path: Path, immutable: bool, requests: int
) -> None:
    lake = lake_with(["a"])
    async with open_cache(tmp_path, lake, immutable=immutable) as cache:
        await list_names(cache)
        expire(cache)
        await list_names(cache)
        assert lake.requests["list"] == requests


async def test_without_a_ttl_every_question_goes_to_the_lake_and_ends(tmp_path: Path) -> None:
    lake = lake_with(["a"])
    async with open_cache(tmp_path, lake, ttl_s=0) as cache:
        for _ in range(3):
            assert await list_names(cache) == ["a"]
        assert lake.requests["list"] == 3
        lake.fill({"b": b""})
        assert await cache.lister.lookup(ROOT_INODE, b"b")


async def test_a_failed_listing_is_an_error_to_all_who_wait_and_the_next_try_works(tmp_path: Path) -> None:
    lake = lake_with(["a"])
    gate = lake.hold("list")
    lake.fault = lambda verb, key: LakeUnavailable("down")
    failures: list[SluiceError] = []
    async with open_cache(tmp_path, lake, retry=NO_RETRY) as cache:

        async def expect_failure(call: Awaitable[object]) -> None:
            try:
                await call
            except LakeUnavailable as error:
                failures.append(error)

        async with trio.open_nursery() as readers:
            for _ in range(3):
                readers.start_soon(expect_failure, cache.lister.list_directory(ROOT_INODE))
                readers.start_soon(expect_failure, cache.lister.lookup(ROOT_INODE, b"a"))
            await wait_all_tasks_blocked()
            gate.set()
        assert len(failures) == 6
        assert cache.index.directory(ROOT_INODE) is None
        lake.fault = None
        assert await list_names(cache) == ["a"]


async def test_a_listing_that_fails_on_a_later_page_is_that_error_and_not_a_group_of_errors(
    tmp_path: Path,
) -> None:
    """A group would pass every handler of SluiceError and end the mover."""
    lake = lake_with([f"k{i}" for i in range(10)], page_keys=2)
    asked = Counter[str]()

    def fault(verb: str, key: str) -> Exception | None:
        asked[verb] += 1
        return LakeUnavailable("down") if asked[verb] == 3 else None

    lake.fault = fault
    async with open_cache(tmp_path, lake, retry=NO_RETRY) as cache:
        with pytest.raises(LakeUnavailable):
            await cache.lister.list_directory(ROOT_INODE)
        assert len(await list_names(cache)) == 10


async def test_a_commit_that_fails_while_the_next_page_comes_is_that_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = lake_with([f"k{i}" for i in range(10)], page_keys=2)

    async def refuse(_: object) -> None:
        raise CacheError("the disk is full")

    async with open_cache(tmp_path, lake) as cache:
        with monkeypatch.context() as patch, pytest.raises(CacheError, match="disk is full"):
            patch.setattr(cache.committer, "commit", refuse)
            await cache.lister.list_directory(ROOT_INODE)
        assert len(await list_names(cache)) == 10


@pytest.mark.parametrize("verb", ["head", "list"])
async def test_a_single_key_that_cannot_be_asked_for_is_that_error(tmp_path: Path, verb: str) -> None:
    lake = lake_with(["a"])
    lake.fault = lambda asked, key: LakeUnavailable("down") if asked == verb else None
    async with open_cache(tmp_path, lake, retry=NO_RETRY) as cache:
        with pytest.raises(LakeUnavailable):
            await cache.lister.refresh_entry(ROOT_INODE, b"a")


async def test_a_fault_of_ours_fails_the_listing_and_not_the_mover(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lake = lake_with(["a"])
    lake.fault = lambda verb, key: ZeroDivisionError("a bug")
    async with open_cache(tmp_path, lake) as cache:
        with pytest.raises(SluiceError, match="ZeroDivisionError"):
            await cache.lister.list_directory(ROOT_INODE)
        lake.fault = None
        assert await list_names(cache) == ["a"]
    assert "the listing of inode 1 failed" in caplog.text


async def test_a_listing_that_an_unreachable_lake_delays_goes_on(tmp_path: Path) -> None:
    lake = lake_with([f"k{i}" for i in range(9)], page_keys=2)
    errors = iter([None, LakeUnavailable("1"), LakeUnavailable("2"), None, LakeUnavailable("3")])
    lake.fault = lambda verb, key: next(errors, None)
    async with open_cache(tmp_path, lake) as cache:
        assert len(await list_names(cache)) == 9


async def test_a_lookup_in_a_small_directory_lists_it(tmp_path: Path) -> None:
    lake = lake_with(["a", "b"])
    async with open_cache(tmp_path, lake) as cache:
        assert await cache.lister.lookup(ROOT_INODE, b"a")
        assert not await cache.lister.lookup(ROOT_INODE, b"c")
        assert lake.requests == Counter(list=1)


async def test_a_lookup_in_a_large_directory_asks_for_the_one_key(tmp_path: Path) -> None:
    lake = lake_with([f"k{i:03}" for i in range(60)] + ["z/inside"], page_keys=10)
    async with open_cache(tmp_path, lake) as cache:
        assert await cache.lister.lookup(ROOT_INODE, b"k055")
        assert await cache.lister.lookup(ROOT_INODE, b"z")
        assert not await cache.lister.lookup(ROOT_INODE, b"nothing")
        found = cache.index.child(ROOT_INODE, b"k055")
        assert found is not None and found[1].size_bytes == 4 and found[1].seen_at_s > 0
        assert lake.listed.count("") <= 2  # The first page, but not all of it.
        assert cache.index.directory(ROOT_INODE) is None
        inode = found[0]
        assert len(await list_names(cache)) == 61
        assert cache.names()["k055"][0] == inode


async def test_many_lookups_in_a_large_directory_list_it(tmp_path: Path) -> None:
    lake = lake_with([f"k{i:03}" for i in range(60)], page_keys=10)
    async with open_cache(tmp_path, lake) as cache:
        for i in range(_LOOKUPS_BEFORE_LISTING + 1):
            assert await cache.lister.lookup(ROOT_INODE, b"k%03d" % i)
        await cache.lister.list_directory(ROOT_INODE)
        asked = lake.requests.copy()
        for i in range(60):
            assert await cache.lister.lookup(ROOT_INODE, b"k%03d" % i)
        assert lake.requests == asked


async def test_a_listing_that_nobody_wants_whole_gives_up_and_starts_over_when_somebody_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.lister._PAUSE_S", 0.0)
    lake = lake_with([f"k{i:03}" for i in range(30)], page_keys=10)
    async with open_cache(tmp_path, lake) as cache:
        assert await cache.lister.lookup(ROOT_INODE, b"k025")
        assert cache.index.directory(ROOT_INODE) is None
        lake.delete_many(["k000"])
        names = await list_names(cache)
        assert len(names) == 29 and "k000" not in names


async def test_a_single_key_that_is_gone_is_detached_and_told(tmp_path: Path) -> None:
    lake = lake_with(["a", "b"])
    async with open_cache(tmp_path, lake) as cache:
        await list_names(cache)
        lake.delete_many(["a"])
        assert not await cache.lister.refresh_entry(ROOT_INODE, b"a")
        assert list(cache.names()) == ["b"]
        assert cache.told() == [(ROOT_INODE, b"a")]


async def test_a_single_key_shows_its_new_version_and_keeps_its_inode_otherwise(tmp_path: Path) -> None:
    lake = lake_with(["a"])
    async with open_cache(tmp_path, lake) as cache:
        await list_names(cache)
        inode = cache.names()["a"][0]
        assert await cache.lister.refresh_entry(ROOT_INODE, b"a")
        assert cache.names()["a"][0] == inode and cache.told() == []
        lake.fill({"a": b"new"})
        assert await cache.lister.refresh_entry(ROOT_INODE, b"a")
        assert cache.names()["a"][0] != inode and cache.names()["a"][1].size_bytes == 3
        assert cache.told() == [(ROOT_INODE, b"a")]


async def test_a_single_key_that_is_also_a_prefix_is_the_directory(tmp_path: Path) -> None:
    lake = lake_with(["n", "n/x"])
    async with open_cache(tmp_path, lake) as cache:
        assert await cache.lister.refresh_entry(ROOT_INODE, b"n")
        assert cache.names()["n"][1].is_directory


async def test_what_was_asked_for_while_a_listing_ran_is_not_undone_by_it(tmp_path: Path) -> None:
    """It came after its page was listed. Without this it would be gone until the listing expires."""
    lake = lake_with([f"k{i}" for i in range(6)], page_keys=3)
    async with open_cache(tmp_path, lake) as cache:
        gate = lake.hold("list")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.lister.list_directory, ROOT_INODE)
            await lake.met("list", 1)
            gate.set()
            gate = lake.hold("list")
            await lake.met("list", 2)  # The first page is known, the second held.
            lake.fill({"added": b"1", "k0": b"changed"})
            nursery.start_soon(cache.lister.refresh_entry, ROOT_INODE, b"added")
            nursery.start_soon(cache.lister.refresh_entry, ROOT_INODE, b"k0")
            await lake.met("list", 4)
            await lake.met("head", 2)
            gate.set()
        await list_names(cache)
        assert {"added", "k0", "k5"} <= cache.names().keys()
        assert cache.names()["k0"][1].size_bytes == 7


async def test_a_walk_is_listed_ahead(tmp_path: Path) -> None:
    lake = lake_with([f"d{i:02}/f" for i in range(40)])
    async with open_cache(tmp_path, lake) as cache:
        await list_names(cache)
        assert lake.listed == [""]
        await cache.lister.list_directory(cache.names()["d00"][0])
        await listed_ahead(cache)
        assert sorted(lake.listed) == sorted(["", *(f"d{i:02}/" for i in range(40))])
        asked = lake.requests["list"]
        for name, (inode, _) in cache.names().items():
            assert await list_names(cache, inode) == ["f"], name
        assert lake.requests["list"] == asked


async def test_listing_ahead_is_bounded(tmp_path: Path) -> None:
    lake = lake_with([f"d{i:03}/f" for i in range(300)])
    async with open_cache(tmp_path, lake) as cache:
        await list_names(cache)
        await cache.lister.list_directory(cache.names()["d000"][0])
        await listed_ahead(cache)
        assert len(lake.listed) <= 2 + _AHEAD_DIRECTORIES


async def test_listing_the_root_again_lists_nothing_else(tmp_path: Path) -> None:
    lake = lake_with([f"d{i}/f" for i in range(5)])
    async with open_cache(tmp_path, lake) as cache:
        await list_names(cache)
        await list_names(cache)
        await wait_all_tasks_blocked()
        assert lake.listed == [""]


async def test_a_directory_read_by_itself_is_no_walk(tmp_path: Path) -> None:
    lake = lake_with([f"d{i}/f" for i in range(5)])
    async with open_cache(tmp_path, lake) as cache:
        inode = await inode_at(cache, "d3")
        await list_names(cache, inode)
        await wait_all_tasks_blocked()
        assert sorted(lake.listed) == ["", "d3/"]


async def test_the_memory_of_walks_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.lister._WALK_DIRECTORIES_MAX", 10)
    lake = lake_with([])
    async with open_cache(tmp_path, lake) as cache:
        for inode in range(100, 150):
            cache.lister._note_walk(Inode(inode))
        assert len(cache.lister._read_at_s) == 10


async def test_a_listing_ahead_of_its_end_is_made_by_itself(tmp_path: Path) -> None:
    lake = lake_with(["a"])
    async with open_cache(tmp_path, lake) as cache:
        await list_names(cache)
        lake.fill({"b": b""})
        began_s = time.time()
        cache.lister.relist_ahead(ROOT_INODE)
        await cache.lister._flights[ROOT_INODE].done.wait()
        state = cache.index.directory(ROOT_INODE)
        assert state is not None and state.listed_at_s >= began_s
        assert list(cache.names()) == ["a", "b"]
