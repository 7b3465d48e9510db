"""The lake's listings are laid under what the mount shows: nothing done here is undone by them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from cache.errors import NameRefused, NameTooLong
from cache.index import IndexWriter
from cache.model import (
    KEY_BYTES_MAX,
    KIND_DIRECTORY,
    KIND_FIFO,
    KIND_FILE,
    KIND_SYMLINK,
    NAME_BYTES_MAX,
    ROOT_INODE,
    Inode,
    ObjectVersion,
)
from cache.pending import SEALED, Delete, Local, Mark, Move, Pending, Put, Restate
from cache.policy.names import SHADOWED, WRITTEN_HERE, check_key, why_no_key
from cache.records import Attributes, Node
from tests import wiring
from tests.test_36_lister import expire, hidden, lake_with, list_names
from tests.wiring import Cache, WatchedLake

open_cache = partial(wiring.open_cache, with_tiers=False)
ATTRIBUTES = Attributes(0o600, 1, 2, 3)
replace = msgspec.structs.replace


class Mount:
    """Changes as the mount makes them: rows and nodes in one transaction."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.table = cache.table

    async def commit(self, change: Callable[[IndexWriter], object]) -> None:
        await self.cache.committer.commit(change)

    async def put(self, name: bytes, parent: int = ROOT_INODE, path: bytes = b"") -> int:
        """Write a file; return the number of its row."""
        path = path or name

        def change(w: IndexWriter) -> int:
            node = Node(parent, name, KIND_FILE, 3, 5, staged=9, attributes=ATTRIBUTES)
            inode = w.attach(node)
            return self.table.add(w, Put(path, inode, KIND_FILE, 9, "", ATTRIBUTES, SEALED, 3))

        return await self.cache.committer.commit(change)

    async def uploaded(self, seq: int, etag: str = '"new"') -> None:
        """Have the lake acknowledge a Put."""
        row = self.table.rows[seq]

        def change(w: IndexWriter) -> None:
            node = w.node(row.inode)
            assert node is not None
            vid = ObjectVersion(os.fsdecode(row.key), etag, 3).id
            w.put_node(row.inode, replace(node, staged=0, etag=etag, size_bytes=3, vid=vid))
            self.table.remove(w, seq)

        await self.commit(change)

    async def unlink(self, name: bytes, key: bytes = b"") -> int:
        def change(w: IndexWriter) -> int:
            w.detach(ROOT_INODE, name)
            return self.table.add(w, Delete(key or name))

        return await self.cache.committer.commit(change)

    async def done(self, seq: int) -> None:
        await self.commit(lambda w: self.table.remove(w, seq))

    async def mkdir(self, name: bytes) -> tuple[Inode, int]:
        def change(w: IndexWriter) -> tuple[Inode, int]:
            inode = w.attach(Node(ROOT_INODE, name, KIND_DIRECTORY))
            return inode, self.table.add(w, Mark(name, inode))

        return await self.cache.committer.commit(change)

    async def rename(self, name: bytes, new_name: bytes) -> int:
        """Rename what the lake has."""

        def change(w: IndexWriter) -> int:
            found = w.child(ROOT_INODE, name)
            assert found is not None
            inode, node = found
            key = w.key_of(inode) + (b"/" if node.is_directory else b"")
            w.move(inode, replace(node, name=new_name, origin=key))
            return self.table.add(w, Move(key, new_name, inode, node.kind, node.etag, node.size_bytes))

        return await self.cache.committer.commit(change)

    async def copied(self, seq: int, lake: WatchedLake) -> None:
        """Have the lake acknowledge the copies of a move, whose ETags are others."""
        row = self.table.rows[seq]
        assert isinstance(row, Move)

        def renew(w: IndexWriter, inode: int) -> None:
            node = w.node(inode)
            assert node is not None
            if node.is_directory:
                for child, _ in list(w.names(inode)):
                    renew(w, child)
            else:
                etag = lake.head(os.fsdecode(w.key_of(inode))).version.etag
                w.put_node(inode, replace(node, etag=etag))

        def change(w: IndexWriter) -> None:
            node = w.node(row.inode)
            assert node is not None
            w.put_node(row.inode, replace(node, origin=b""))
            renew(w, row.inode)
            self.table.replace(w, seq, replace(row, copied=True))

        await self.commit(change)

    async def listed(self, inode: Inode = ROOT_INODE) -> list[str]:
        expire(self.cache, inode)
        return await list_names(self.cache, inode)

    def node(self, name: str, inode: Inode = ROOT_INODE) -> tuple[Inode, Node]:
        return self.cache.names(inode)[name]


async def looked_up(mount: Mount, name: bytes) -> bool:
    return await mount.cache.lister.refresh_entry(ROOT_INODE, name)


Ask = Callable[[Mount, Iterable[str]], object]


async def by_listing(mount: Mount, names: Iterable[str]) -> set[str]:
    """Return which of *names* are shown after a listing."""
    return set(await mount.listed()) & set(names)


async def by_single_keys(mount: Mount, names: Iterable[str]) -> set[str]:
    """Return which of *names* are shown after each was asked for by itself."""
    shown = {name for name in names if await looked_up(mount, os.fsencode(name))}
    assert shown == mount.cache.names().keys() & set(names)
    return shown


both_ways = pytest.mark.parametrize("ask", [by_listing, by_single_keys])


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


@pytest.mark.parametrize("late", [False, True])
async def test_what_recovery_knows_only_by_name_is_brought_by_a_listing(tmp_path: Path, late: bool) -> None:
    """Even if the row that it was made for is done while the lake is asked."""
    lake = late_lake(["moved", "d/x", "d/y", "tree/z"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        seqs: list[int] = []

        def plant(w: IndexWriter) -> None:
            inode = w.attach(Node(ROOT_INODE, b"moved", KIND_FILE))
            tree = w.attach(Node(ROOT_INODE, b"tree", KIND_DIRECTORY))
            seqs.append(cache.table.add(w, Move(b"old", b"moved", inode, KIND_FILE, "", 4, copied=True)))
            seqs.append(cache.table.add(w, Move(b"o/", b"tree", tree, KIND_DIRECTORY, copied=True)))
            seqs.append(cache.table.add(w, Delete(b"d/x")))

        async def finish() -> None:
            lake.delete_many(["d/x"])
            for seq in seqs:
                await mount.done(seq)

        await mount.commit(plant)
        inode = mount.node("moved")[0]
        if late:
            shown = await late_listing(mount, lake, ROOT_INODE, finish)
        else:
            shown = await mount.listed()
        assert shown == ["d", "moved", "tree"]
        assert mount.node("moved")[0] == inode
        assert mount.node("moved")[1].etag == lake.head("moved").version.etag
        assert await mount.listed(mount.node("d")[0]) == ["y"]
        assert await mount.listed(mount.node("tree")[0]) == ["z"]


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


# What changes while the lake is being asked


class LateLake(WatchedLake):
    """Answers listings as of the time when they came in, however long they are held."""

    def list_page(self, prefix: str, **options: object) -> object:  # type: ignore[override]
        page = super().list_page(prefix, **options)  # type: ignore[arg-type]
        with self._arrival:
            self._arrived["listed"] += 1
            self._arrival.notify_all()
        if (gate := self.gates.get("listed")) is not None:
            assert gate.wait(60)
        return page


async def late_listing(mount: Mount, lake: LateLake, inode: Inode, change: Callable[[], object]) -> list[str]:
    """List while *change* happens after the lake was asked and before its answer comes."""
    expire(mount.cache, inode)
    asked = lake._arrived["listed"]
    gate = lake.hold("listed")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mount.cache.lister.list_directory, inode)
        await lake.met("listed", asked + 1)
        await change()  # type: ignore[misc]
        gate.set()
        del lake.gates["listed"]
    return list(mount.cache.names(inode))


async def late_lookup(mount: Mount, lake: LateLake, name: bytes, change: Callable[[], object]) -> bool:
    asked = lake._arrived["listed"]
    gate = lake.hold("listed")
    found: list[bool] = []

    async def look() -> None:
        found.append(await looked_up(mount, name))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await lake.met("listed", asked + 1)
        await change()  # type: ignore[misc]
        gate.set()
        del lake.gates["listed"]
    return found[0]


def late_lake(keys: Iterable[str], page_keys: int = 1000) -> LateLake:
    lake = LateLake(page_keys)
    lake.fill({key: b"" if key.endswith("/") else b"body" for key in keys})
    return lake


async def delete_finished(mount: Mount, lake: LateLake) -> None:
    seq = await mount.unlink(b"n")
    lake.delete_many(["n"])
    await mount.done(seq)


async def upload_finished(mount: Mount, lake: LateLake) -> None:
    seq = await mount.put(b"n")
    info = lake.put("n", b"our")
    await mount.uploaded(seq, info.version.etag)


async def mkdir_finished(mount: Mount, lake: LateLake) -> None:
    _, seq = await mount.mkdir(b"n")
    lake.put("n/", b"")
    await mount.done(seq)


async def move_finished(mount: Mount, lake: LateLake) -> None:
    seq = await mount.rename(b"n", b"m")
    lake.put("m", b"body")
    await mount.copied(seq, lake)
    lake.delete_many(["n"])
    await mount.done(seq)


async def tree_move_finished(mount: Mount, lake: LateLake) -> None:
    seq = await mount.rename(b"d", b"m")
    lake.put("m/x", b"body")
    await mount.copied(seq, lake)
    lake.delete_many(["d/x"])
    await mount.done(seq)


async def write_and_unlink(mount: Mount, lake: LateLake) -> None:
    seq = await mount.put(b"n")

    def change(w: IndexWriter) -> None:
        w.detach(ROOT_INODE, b"n")
        mount.table.remove(w, seq)

    await mount.commit(change)


FINISHED = [
    (delete_finished, ["n", "z"], ["z"]),
    (upload_finished, ["n", "z"], ["n", "z"]),
    (upload_finished, ["z"], ["n", "z"]),
    (mkdir_finished, ["z"], ["n", "z"]),
    (move_finished, ["n", "z"], ["m", "z"]),
    (tree_move_finished, ["d/x", "z"], ["m", "z"]),
    (write_and_unlink, ["z"], ["z"]),
]


@pytest.mark.parametrize("was_listed", [True, False])
@pytest.mark.parametrize(("change", "keys", "shown"), FINISHED)
async def test_what_was_finished_since_the_lake_was_asked_is_not_undone(
    tmp_path: Path,
    change: Callable[[Mount, LateLake], object],
    keys: list[str],
    shown: list[str],
    was_listed: bool,
) -> None:
    lake = late_lake(keys)
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        renames = change in (move_finished, tree_move_finished)
        if was_listed or renames:
            await mount.listed()
        assert await late_listing(mount, lake, ROOT_INODE, lambda: change(mount, lake)) == shown
        before = {name: inode for name, (inode, _) in cache.names().items()}
        assert await mount.listed() == shown  # What the lake says now is the same,
        assert {name: inode for name, (inode, _) in cache.names().items()} == before  # in all.
        assert hidden(cache) == {} and cache.told() == []


@pytest.mark.parametrize(("change", "keys", "shown"), FINISHED)
async def test_what_was_finished_since_a_single_key_was_asked_for_is_not_undone(
    tmp_path: Path, change: Callable[[Mount, LateLake], object], keys: list[str], shown: list[str]
) -> None:
    lake = late_lake(keys)
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        name = b"d" if "d/x" in keys else b"n"
        found = await late_lookup(mount, lake, name, lambda: change(mount, lake))
        assert list(cache.names()) == shown and found == (os.fsdecode(name) in shown)


async def test_a_directory_that_is_moved_while_it_is_listed_is_listed_anew(tmp_path: Path) -> None:
    lake = late_lake(["d/a", "d/b", "d/c"], page_keys=2)
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        inode = mount.node("d")[0]

        async def move() -> None:
            seq = await mount.rename(b"d", b"m")
            lake.fill({f"m/{name}": b"body" for name in "abc"})
            await mount.copied(seq, lake)
            lake.delete_many(["d/a", "d/b", "d/c"])
            await mount.done(seq)

        assert await late_listing(mount, lake, inode, move) == ["a", "b", "c"]
        assert "m/" in lake.listed
        state = cache.index.directory(inode)
        assert state is not None and state.entries == 3
        etags = {node.etag for _, node in cache.names(inode).values()}
        assert etags == {lake.head(f"m/{name}").version.etag for name in "abc"}


async def test_a_directory_made_here_that_is_renamed_while_it_is_listed_is_listed_anew(
    tmp_path: Path,
) -> None:
    lake = late_lake(["other/x"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        inode, _ = await mount.mkdir(b"d")
        await mount.put(b"f", inode, b"d/f")

        async def rename() -> None:
            def change(w: IndexWriter) -> None:
                node = w.node(inode)
                assert node is not None
                w.move(inode, replace(node, name=b"e"))
                for seq, row in cache.table.at(b"d"):
                    cache.table.replace(w, seq, replace(row, path=b"e"))
                for seq, row in cache.table.at(b"d/f"):
                    cache.table.replace(w, seq, replace(row, path=b"e/f"))

            await mount.commit(change)

        assert await late_listing(mount, lake, inode, rename) == ["f"]
        assert lake.listed[-2:] == ["d/", "e/"]


async def test_a_listing_of_many_pages_loses_nothing_that_is_made_between_them(tmp_path: Path) -> None:
    lake = late_lake([f"k{i}" for i in range(6)], page_keys=2)
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()

        async def changes() -> None:
            await upload_finished(mount, lake)
            seq = await mount.unlink(b"k0")
            lake.delete_many(["k0"])
            await mount.done(seq)
            await mount.unlink(b"k5")

        shown = ["k1", "k2", "k3", "k4", "n"]
        assert await late_listing(mount, lake, ROOT_INODE, changes) == shown
        state = cache.index.directory(ROOT_INODE)
        assert state is not None and state.entries == 5
        assert cache.table._watches == set()


@pytest.mark.parametrize("seed", range(8))
async def test_random_changes_under_late_listings_are_never_undone(tmp_path: Path, seed: int) -> None:
    """The model: what the mount shows, changed only by the mount. Nobody else writes to the lake."""
    rng = random.Random(seed)
    names = [f"n{i}" for i in range(6)]
    lake = late_lake(names[:3], page_keys=rng.choice([1, 2, 1000]))
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        model = set(await mount.listed())
        pending: dict[int, str] = {}

        async def change() -> None:
            for _ in range(rng.randrange(1, 5)):
                await step()

        async def step() -> None:
            if pending and rng.random() < 0.5:
                await finish(rng.choice(list(pending)))
                return
            name = rng.choice(names)
            if name in pending.values():
                return
            if name in model:
                model.discard(name)
                pending[await mount.unlink(name.encode())] = name
            else:
                model.add(name)
                pending[await mount.put(name.encode())] = name

        async def finish(seq: int) -> None:
            name = pending.pop(seq)
            if isinstance(mount.table.rows[seq], Delete):
                lake.delete_many([name])
                await mount.done(seq)
            else:
                await mount.uploaded(seq, lake.put(name, b"our").version.etag)

        for _ in range(25):
            if rng.random() < 0.7:
                shown = await late_listing(mount, lake, ROOT_INODE, change)
            else:
                unwritten = [name for name in names if mount.table.put_at(name.encode()) is None]
                await late_lookup(mount, lake, rng.choice([*unwritten, "x"]).encode(), step)
                shown = list(cache.names())
            assert set(shown) == model
        for seq in list(pending):
            await finish(seq)
        assert set(await mount.listed()) == model


# Symlinks of the lake


async def test_an_object_with_the_ending_is_a_symlink_without_it(tmp_path: Path) -> None:
    lake = lake_with(["d/link.rclonelink"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        parent = mount.node("d")[0]
        assert await mount.listed(parent) == ["link"]
        inode, node = mount.node("link", parent)
        version = lake.head("d/link.rclonelink").version
        assert (node.kind, node.etag, node.size_bytes, node.vid) == (
            KIND_SYMLINK,
            version.etag,
            4,
            version.id,
        )
        assert node.attributes is None
        assert cache.index.key_of(inode) == b"d/link.rclonelink"
        assert cache.index.path_of(inode) == b"d/link"
        assert await cache.lister.refresh_entry(parent, b"link")
        assert mount.node("link", parent)[0] == inode
        lake.delete_many(["d/link.rclonelink"])
        assert not await cache.lister.refresh_entry(parent, b"link")


async def test_a_symlink_that_somebody_else_changed_is_another_inode(tmp_path: Path) -> None:
    lake = lake_with(["link.rclonelink"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        inode = mount.node("link")[0]
        lake.fill({"link.rclonelink": b"elsewhere"})
        assert await mount.listed() == ["link"]
        assert mount.node("link")[0] != inode and mount.node("link")[1].size_bytes == 9


@pytest.mark.parametrize("page_keys", [1, 2, 1000])
@pytest.mark.parametrize(
    ("keys", "kind", "shadowed"),
    [
        (["n", "n.rclonelink"], KIND_FILE, {"n.rclonelink"}),
        (["n.rclonelink", "n/x"], KIND_DIRECTORY, {"n.rclonelink"}),
        (["n", "n.rclonelink", "n/x"], KIND_DIRECTORY, {"n", "n.rclonelink"}),
    ],
)
async def test_a_file_or_directory_shadows_a_symlink_of_its_name(
    tmp_path: Path, page_keys: int, keys: list[str], kind: int, shadowed: set[str]
) -> None:
    lake = lake_with([*keys, "z"], page_keys=page_keys)
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        seen = set()
        for _ in range(3):
            assert await mount.listed() == ["n", "z"]
            inode, node = mount.node("n")
            assert node.kind == kind
            seen.add(inode)
            assert hidden(cache) == dict.fromkeys(shadowed, SHADOWED)
            state = cache.index.directory(ROOT_INODE)
            assert state is not None and state.entries == 2
        if kind == KIND_FILE:
            assert len(seen) == 1
        assert await looked_up(mount, b"n") and mount.node("n")[1].kind == kind
        lake.delete_many([key for key in keys if not key.endswith(".rclonelink")])
        assert await mount.listed() == ["n", "z"]
        assert mount.node("n")[1].kind == KIND_SYMLINK and hidden(cache) == {}


async def test_a_symlink_becomes_a_file_and_a_symlink_again(tmp_path: Path) -> None:
    lake = lake_with(["n.rclonelink", "z"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        for add, gone, kind in [
            ("n.rclonelink", "n", KIND_SYMLINK),
            ("n", "n.rclonelink", KIND_FILE),
            ("n.rclonelink", "n", KIND_SYMLINK),
        ]:
            lake.delete_many([gone])
            lake.fill({add: b"1"})
            assert await mount.listed() == ["n", "z"]
            assert mount.node("n")[1].kind == kind and hidden(cache) == {}


async def test_an_ending_alone_is_no_name(tmp_path: Path) -> None:
    lake = lake_with([".rclonelink", "d/.rclonelink", "...rclonelink", "x" * 255 + ".rclonelink"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        assert await mount.listed() == ["d"]
        assert await mount.listed(mount.node("d")[0]) == []
        assert hidden(cache).keys() == {
            ".rclonelink",
            "d/.rclonelink",
            "...rclonelink",
            "x" * 255 + ".rclonelink",
        }


# Names the lake can't hold


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (b"a/b.txt", KIND_FILE),
        (b"x" * NAME_BYTES_MAX, KIND_FILE),
        (b"/".join([b"x" * 127] * 8), KIND_FILE),
        ("größe/日本".encode(), KIND_FILE),
        (b"d.rclonelink", KIND_DIRECTORY),
        (b"a.rclonelink/b", KIND_FILE),
        (b"link", KIND_SYMLINK),
    ],
)
def test_a_name_that_the_lake_can_hold_is_fine(path: bytes, kind: int) -> None:
    check_key(path, kind)


@pytest.mark.parametrize(
    ("path", "kind", "error"),
    [
        (b"x" * (NAME_BYTES_MAX + 1), KIND_FILE, NameTooLong),
        (b"/".join([b"x" * 127] * 8) + b"/y", KIND_FILE, NameTooLong),
        (b"/".join([b"x" * 127] * 8) + b"y", KIND_DIRECTORY, NameTooLong),
        (b"/".join([b"x" * 126] * 8), KIND_SYMLINK, NameTooLong),
        (b"\xff/a", KIND_FILE, NameRefused),
        (b"a/\xed\xa0\x80", KIND_FILE, NameRefused),
        (b"d/x.rclonelink", KIND_FILE, NameRefused),
        (b"d/x.rclonelink", KIND_SYMLINK, NameRefused),
    ],
)
def test_a_name_that_the_lake_cannot_hold_is_refused(path: bytes, kind: int, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        check_key(path, kind)
    assert "\n" not in str(caught.value)
    assert KEY_BYTES_MAX == 1024 and why_no_key(b"fine") is None


def test_a_pending_row_knows_its_own_kind_of_key() -> None:
    rows: list[Pending] = [Mark(b"d", 1), Delete(b"k"), Put(b"l", 1, KIND_SYMLINK, 0, "", ATTRIBUTES)]
    assert [row.key for row in rows] == [b"d/", b"k", b"l.rclonelink"]


async def test_what_was_asked_for_by_name_shows_the_mode_and_time_of_its_metadata(tmp_path: Path) -> None:
    """A listing does not tell them, and does not undo them."""
    lake = WatchedLake()
    metadata = {"mode": "0750", "uid": "7", "gid": "8", "mtime": "1700000000.5"}
    lake.put("script", b"x", metadata=metadata)
    async with open_cache(tmp_path, lake) as cache:
        await cache.lister.list_directory(ROOT_INODE)
        assert cache.names()["script"][1].attributes is None
        for again in range(2):
            await cache.lister.refresh_entry(ROOT_INODE, b"script")
            expire(cache)
            if again:
                await cache.lister.list_directory(ROOT_INODE)
            node = cache.names()["script"][1]
            assert node.attributes is not None and node.mtime_ns == 1_700_000_000_500_000_000
            assert (node.attributes.mode, node.attributes.uid, node.attributes.gid) == (0o750, 7, 8)


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
