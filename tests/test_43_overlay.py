"""The lake's listings are laid under what the mount shows: nothing done here is undone by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.index_writer import IndexWriter
from cache.model import (
    KIND_DIRECTORY,
    KIND_FIFO,
    KIND_FILE,
    KIND_SYMLINK,
    ROOT_INODE,
    Inode,
)
from cache.pending import SEALED, Delete, Local, Mark, Move, Put, Restate
from cache.policy.names import SHADOWED, WRITTEN_HERE
from cache.records import Node
from tests.overlaid import (
    ATTRIBUTES,
    Ask,
    Mount,
    both_ways,
    by_single_keys,
    open_cache,
    replace,
)
from tests.test_36_lister import hidden, lake_with

# What is hidden


@both_ways
async def test_what_was_deleted_is_not_shown_again(tmp_path: Path, ask: Ask) -> None:
    lake = lake_with(["a", "b", "link.rclonelink"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        await mount.unlink(b"a")
        await mount.unlink(b"link", b"link.rclonelink")
        assert await ask(mount, ["a", "b", "link"]) == {"b"}
        assert hidden(cache) == {}


@both_ways
async def test_a_directory_that_was_removed_or_moved_away_is_not_shown_again(
    tmp_path: Path, ask: Ask
) -> None:
    lake = lake_with(["gone/", "old/x", "old/sub/y", "kept/x"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        await mount.unlink(b"gone", b"gone/")
        seq = await mount.rename(b"old", b"new")
        inode = mount.node("new")[0]
        for _ in range(2):
            assert await ask(mount, ["gone", "old", "new", "kept"]) == {"new", "kept"}
            assert mount.node("new")[0] == inode
            assert await mount.listed(inode) == ["sub", "x"]
            assert await mount.listed(mount.node("sub", inode)[0]) == ["y"]
        lake.fill({"new/x": b"body", "new/sub/y": b"body"})
        before = {name: child for name, (child, _) in cache.names(inode).items()}
        await mount.copied(seq, lake)
        assert await ask(mount, ["old", "new"]) == {"new"}
        assert await mount.listed(inode) == ["sub", "x"]
        lake.delete_many(["old/x", "old/sub/y"])
        await mount.done(seq)
        assert await ask(mount, ["old", "new"]) == {"new"}
        assert await mount.listed(inode) == ["sub", "x"]
        assert {name: child for name, (child, _) in cache.names(inode).items()} == before


@both_ways
async def test_a_file_that_was_moved_is_shown_under_its_new_name_only(tmp_path: Path, ask: Ask) -> None:
    lake = lake_with(["a", "b"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        inode = mount.node("a")[0]
        await mount.rename(b"a", b"z")
        assert await ask(mount, ["a", "b", "z"]) == {"b", "z"}
        lake.fill({"z": b"a copy under way"})
        assert await ask(mount, ["a", "b", "z"]) == {"b", "z"}
        assert mount.node("z")[0] == inode and mount.node("z")[1].origin == b"a"


async def test_a_new_directory_in_the_place_of_a_moved_one_shows_nothing_of_it(tmp_path: Path) -> None:
    lake = lake_with(["d/x", "d/sub/y"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        await mount.rename(b"d", b"moved")
        inode, _ = await mount.mkdir(b"d")
        assert await mount.listed() == ["d", "moved"]
        assert await mount.listed(inode) == []
        assert not await cache.lister.refresh_entry(inode, b"x")
        assert not await cache.lister.refresh_entry(inode, b"sub")
        assert await mount.listed(mount.node("moved")[0]) == ["sub", "x"]
        assert await cache.lister.refresh_entry(mount.node("moved")[0], b"x")


async def test_a_directory_moved_out_of_a_moved_one_is_in_one_place(tmp_path: Path) -> None:
    lake = lake_with(["a/sub/x", "a/y"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        await mount.rename(b"a", b"b")
        parent = mount.node("b")[0]
        await mount.listed(parent)

        def move_out(w: IndexWriter) -> None:
            found = w.child(parent, b"sub")
            assert found is not None
            inode, node = found
            key = w.key_of(inode) + b"/"
            assert key == b"a/sub/"
            w.move(inode, replace(node, parent=ROOT_INODE, name=b"c", origin=key))
            cache.table.add(w, Move(b"b/sub/", b"c", inode, KIND_DIRECTORY))

        await mount.commit(move_out)
        assert await mount.listed() == ["b", "c"]
        assert await mount.listed(parent) == ["y"]
        assert await mount.listed(mount.node("c")[0]) == ["x"]


# What is kept


@both_ways
async def test_what_was_made_here_stays_though_the_lake_lacks_it(tmp_path: Path, ask: Ask) -> None:
    lake = lake_with(["a"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        await mount.put(b"file")
        inode, _ = await mount.mkdir(b"dir")
        below, _ = await mount.mkdir(b"implied")
        await mount.put(b"deep", below, b"implied/deep")

        def others(w: IndexWriter) -> None:
            fifo = w.attach(Node(ROOT_INODE, b"fifo", KIND_FIFO, attributes=ATTRIBUTES))
            cache.table.add(w, Local(b"fifo", fifo, KIND_FIFO, ATTRIBUTES))
            link = w.attach(Node(ROOT_INODE, b"link", KIND_SYMLINK, attributes=ATTRIBUTES))
            cache.table.add(w, Put(b"link", link, KIND_SYMLINK, 0, "", ATTRIBUTES, SEALED))

        await mount.commit(others)
        names = {"a", "dir", "fifo", "file", "implied", "link"}
        before = cache.names()
        assert await ask(mount, names) == names
        assert {name: one[0] for name, one in cache.names().items()} == {
            name: one[0] for name, one in before.items()
        }
        assert mount.node("file")[1].staged == 9 and mount.node("dir")[0] == inode
        assert await mount.listed(below) == ["deep"]
        state = cache.index.directory(ROOT_INODE)
        assert state is None or ask is by_single_keys or state.entries == 6


@both_ways
async def test_what_is_written_here_is_not_replaced_by_what_the_lake_has(tmp_path: Path, ask: Ask) -> None:
    lake = lake_with(["n"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        seq = await mount.put(b"n")
        inode = mount.node("n")[0]
        assert await ask(mount, ["n"]) == {"n"}
        lake.fill({"n": b"someone else's"})
        assert await ask(mount, ["n"]) == {"n"}
        assert mount.node("n")[0] == inode and mount.node("n")[1].staged == 9
        assert cache.told() == []
        info = lake.put("n", b"our")
        await mount.uploaded(seq, info.version.etag)
        assert await ask(mount, ["n"]) == {"n"}
        assert mount.node("n")[0] == inode and mount.node("n")[1].staged == 0


@pytest.mark.parametrize("page_keys", [1, 1000])
async def test_a_file_written_here_hides_a_directory_that_somebody_else_made(
    tmp_path: Path, page_keys: int
) -> None:
    lake = lake_with(["n/x", "z"], page_keys=page_keys)
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.put(b"n")
        assert await mount.listed() == ["n", "z"]
        assert not mount.node("n")[1].is_directory
        assert hidden(cache) == {"n/": WRITTEN_HERE}


@pytest.mark.parametrize("page_keys", [1, 1000])
async def test_a_directory_made_here_hides_a_file_that_somebody_else_made(
    tmp_path: Path, page_keys: int
) -> None:
    lake = lake_with(["n", "z"], page_keys=page_keys)
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.mkdir(b"n")
        assert await mount.listed() == ["n", "z"]
        assert mount.node("n")[1].is_directory
        assert hidden(cache) == {"n": SHADOWED}


@both_ways
async def test_attributes_stay_with_the_version_that_they_were_set_on(tmp_path: Path, ask: Ask) -> None:
    lake = lake_with(["f", "d/x"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()

        def chmod(w: IndexWriter) -> None:
            for name in (b"f", b"d"):
                found = w.child(ROOT_INODE, name)
                assert found is not None
                w.put_node(found[0], replace(found[1], attributes=ATTRIBUTES, mtime_ns=42, vid=b"moved"))

        await mount.commit(chmod)
        inode = mount.node("f")[0]
        assert await ask(mount, ["f", "d"]) == {"f", "d"}
        for name in ("f", "d"):
            assert mount.node(name)[1].attributes == ATTRIBUTES
        assert mount.node("f")[1].mtime_ns == 42 and mount.node("f")[0] == inode
        assert mount.node("f")[1].vid == b"moved"  # Its cached bytes are found by it.
        lake.fill({"f": b"someone else's version"})
        assert await ask(mount, ["f"]) == {"f"}
        assert mount.node("f")[1].attributes is None and mount.node("f")[0] != inode


@both_ways
async def test_attributes_that_the_lake_has_yet_to_get_are_worn_at_once(tmp_path: Path, ask: Ask) -> None:
    """After a recovery the node may be there before the lake was asked, or not at all."""
    lake = lake_with(["f", "g", "h.rclonelink"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)

        def plant(w: IndexWriter) -> None:
            inode = w.attach(Node(ROOT_INODE, b"f", KIND_FILE, mtime_ns=42, attributes=ATTRIBUTES))
            cache.table.add(w, Restate(b"f", inode, KIND_FILE, ATTRIBUTES, 42))
            cache.table.add(w, Restate(b"g", 0, KIND_FILE, ATTRIBUTES, 43))
            link = w.attach(Node(ROOT_INODE, b"h", KIND_SYMLINK, mtime_ns=44, attributes=ATTRIBUTES))
            cache.table.add(w, Restate(b"h", link, KIND_SYMLINK, ATTRIBUTES, 44))

        await mount.commit(plant)
        inodes = mount.node("f")[0], mount.node("h")[0]
        assert await ask(mount, ["f", "g", "h"]) == {"f", "g", "h"}
        assert (mount.node("f")[0], mount.node("h")[0]) == inodes
        for name, mtime_ns in (("f", 42), ("g", 43), ("h", 44)):
            node = mount.node(name)[1]
            assert (node.attributes, node.mtime_ns, node.size_bytes) == (ATTRIBUTES, mtime_ns, 4), name
            assert node.etag and node.vid


async def test_a_lookup_of_what_is_here_asks_nobody(tmp_path: Path) -> None:
    lake = lake_with([])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.put(b"f")
        await mount.mkdir(b"d")
        for name in (b"f", b"d"):
            assert await cache.lister.lookup(ROOT_INODE, name)
            assert await cache.lister.refresh_entry(ROOT_INODE, name)
        assert not lake.requests


# Directories that are gone, with keys below them that are yet to go


@both_ways
@pytest.mark.parametrize("page_keys", [1, 1000])
async def test_a_directory_that_is_gone_is_not_shown_for_keys_that_are_yet_to_go(
    tmp_path: Path, ask: Ask, page_keys: int
) -> None:
    lake = lake_with(["d/deleted", "d/moved", "d/sub/x", "k"], page_keys=page_keys)
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        assert await mount.listed() == ["d", "k"]

        def empty(w: IndexWriter) -> list[int]:
            w.detach(ROOT_INODE, b"d")
            rows = (Delete(b"d/deleted"), Move(b"d/moved", b"m", 0, KIND_FILE), Delete(b"d/sub/x"))
            return [cache.table.add(w, row) for row in rows]

        seqs = await cache.committer.commit(empty)
        for _ in range(2):
            assert await ask(mount, ["d", "k"]) == {"k"}
        lake.fill({"d/foreign": b"another client's"})
        lake.delete_many(["d/deleted", "d/moved", "d/sub/x"])
        for seq in seqs:
            await mount.done(seq)
        assert await ask(mount, ["d", "k"]) == {"d", "k"}
        assert await mount.listed(mount.node("d")[0]) == ["foreign"]


@both_ways
async def test_a_directory_that_was_never_listed_is_shown_for_what_stays_in_it(
    tmp_path: Path, ask: Ask
) -> None:
    """As after the index was lost."""
    lake = lake_with(["d/deleted", "d/kept"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.commit(lambda w: cache.table.add(w, Delete(b"d/deleted")))
        assert await ask(mount, ["d"]) == {"d"}
        assert await mount.listed(mount.node("d")[0]) == ["kept"]


async def test_a_directory_that_is_gone_costs_no_request_once_the_lake_is_rid_of_it(tmp_path: Path) -> None:
    lake = lake_with(["d/x", "k"])
    async with open_cache(tmp_path, lake) as cache:
        await Mount(cache).listed()
        assert lake.listed == [""]


async def test_a_new_directory_in_a_moved_one_shows_nothing_of_what_was_moved_out_before(
    tmp_path: Path,
) -> None:
    lake = lake_with(["a/sub/x", "a/y"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()

        def change(w: IndexWriter) -> Inode:
            found = w.child(ROOT_INODE, b"a")
            assert found is not None
            inode, node = found
            out = w.attach(Node(ROOT_INODE, b"out", KIND_DIRECTORY, origin=b"a/sub/"))
            cache.table.add(w, Move(b"a/sub/", b"out", out, KIND_DIRECTORY))
            w.move(inode, replace(node, name=b"b", origin=b"a/"))
            cache.table.add(w, Move(b"a/", b"b", inode, KIND_DIRECTORY))
            new = w.attach(Node(inode, b"sub", KIND_DIRECTORY))
            cache.table.add(w, Mark(b"b/sub", new, is_new=True))
            return new

        new = await cache.committer.commit(change)
        assert await mount.listed(mount.node("b")[0]) == ["sub", "y"]
        assert await mount.listed(new) == []
        assert await mount.listed(mount.node("out")[0]) == ["x"]
