"""Changes that are finished while the lake is being asked are not undone by its answer."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import trio

from cache.index_writer import IndexWriter
from cache.model import (
    KIND_DIRECTORY,
    KIND_FILE,
    ROOT_INODE,
    Inode,
)
from cache.pending import Delete, Move
from cache.records import Node
from tests.overlaid import (
    Mount,
    looked_up,
    open_cache,
    replace,
)
from tests.test_36_lister import expire, hidden
from tests.wiring import WatchedLake


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


class LateLake(WatchedLake):
    """Answers listings as of the time when they came in, however long they are held."""

    def list_page(self, prefix: str, **options: object) -> object:  # type: ignore[override]
        page = super().list_page(prefix, **options)  # type: ignore[arg-type]
        self.arrivals.note("listed")
        if (gate := self.gates.get("listed")) is not None:
            assert gate.wait(60)
        return page


async def late_listing(mount: Mount, lake: LateLake, inode: Inode, change: Callable[[], object]) -> list[str]:
    """List while *change* happens after the lake was asked and before its answer comes."""
    expire(mount.cache, inode)
    asked = lake.arrivals.counts["listed"]
    gate = lake.hold("listed")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mount.cache.lister.list_directory, inode)
        await lake.met("listed", asked + 1)
        await change()  # type: ignore[misc]
        gate.set()
        del lake.gates["listed"]
    return list(mount.cache.names(inode))


async def late_lookup(mount: Mount, lake: LateLake, name: bytes, change: Callable[[], object]) -> bool:
    asked = lake.arrivals.counts["listed"]
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
