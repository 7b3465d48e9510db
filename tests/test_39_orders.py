"""What a mover knows of orders: hints resolved through the index, and given to the sets they are for."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from cache import messages
from cache.errors import UsageError
from cache.model import GROUP_BYTES, MIB, Inode
from cache.orders import Orders
from cache.policy.order.spec import Spec
from cache.policy.order.upcoming import OrderedUpcoming
from cache.recorder import Recorder
from tests import wiring
from tests.wiring import Cache, WatchedLake
from tools.bench.loaders import opens

CLASSES, IMAGES = 8, 50


class Members:
    """A set as the read-ahead keeps it: inodes by place."""

    def __init__(self, inodes: Sequence[int]) -> None:
        self.inodes = array("Q", inodes)
        self._places = {inode: place for place, inode in enumerate(inodes)}

    def place(self, inode: int) -> int | None:
        return self._places.get(inode)


def key(number: int) -> str:
    return f"train/class{number // IMAGES}/{number:04d}.jpg"


KEYS = [key(number) for number in range(CLASSES * IMAGES)]


@pytest.fixture
def lake() -> WatchedLake:
    lake = WatchedLake()
    lake.fill({**dict.fromkeys(KEYS, b"x"), "other/file": b"x"})
    return lake


async def members_of(cache: Cache) -> Members:
    """Return the set below train/, all of it listed."""
    orders = Orders(cache.nursery, cache.index, cache.lister)
    directory = await orders._directory(b"train")
    return Members([inode async for inode in orders._files_below(directory)])


async def settled(upcoming: OrderedUpcoming) -> None:
    """Return once no search is under way."""
    with trio.fail_after(60):
        while upcoming._is_searching:  # noqa: ASYNC110 - a thread ends it, and tells nobody.
            await trio.sleep(0.001)


def coming(upcoming: OrderedUpcoming, count: int) -> list[int]:
    status, places = bytearray(len(KEYS)), list[int]()
    while len(places) < count and (place := upcoming.next_place(status, None)) is not None:
        status[place] = 2
        places.append(place)
    return places


def hint(**fields: Any) -> dict[str, Any]:
    return {"directory": "train", "upload": "1", "last": True, **fields}


async def test_told_paths_are_what_comes_next(tmp_path: Path, lake: WatchedLake) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        numbers = list(range(399, -1, -3))
        paths = [key(number) for number in numbers]
        answer = await orders.hint(hint(paths=["train/none", *paths, "nowhere/x", "train/class1"]))
        missing = ["train/none", "nowhere/x", "train/class1"]
        assert answer == {"files": len(paths), "missing": 3, "examples": missing}
        upcoming = orders.make_upcoming(await members_of(cache))
        await settled(upcoming)
        assert upcoming.name == "told" and coming(upcoming, 20) == numbers[:20]


async def test_a_hint_for_a_set_that_is_being_read_is_used_at_once(tmp_path: Path, lake: WatchedLake) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        upcoming = orders.make_upcoming(await members_of(cache))
        assert not upcoming.is_known
        await orders.hint(hint(indices=[7, 5, 10_000, 3]))
        await settled(upcoming)
        assert upcoming.is_known and coming(upcoming, 9) == [7, 5, 3]


async def test_who_reads_ahead_hears_what_was_told_of_no_set_that_is_known(
    tmp_path: Path, lake: WatchedLake
) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders, announced = Orders(cache.nursery, cache.index, cache.lister), list[Inode]()
        orders.on_told = announced.append
        train = await orders._directory(b"train")
        class0 = await orders._directory(b"train/class0")
        await orders.hint(hint(sampler={"family": "torch", "seed": 5, "world": 1, "ranks": [0]}))
        await orders.hint(hint(paths=[key(0), key(1)]))
        await orders.hint(hint(directory="", paths=KEYS))
        assert announced == [train, class0, train]
        upcoming = orders.make_upcoming(await members_of(cache))
        await orders.hint(hint(paths=[key(2)]))
        assert announced == [train, class0, train]
        await settled(upcoming)


async def test_each_change_of_an_order_is_told(tmp_path: Path, lake: WatchedLake) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders, changed = Orders(cache.nursery, cache.index, cache.lister), trio.Event()
        orders.on_change = changed.set
        upcoming = orders.make_upcoming(await members_of(cache))
        await orders.hint(hint(indices=[7, 5]))
        await changed.wait()
        assert upcoming.is_known


async def test_a_hint_may_come_in_parts(tmp_path: Path, lake: WatchedLake) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        members = await members_of(cache)
        await orders.hint(hint(paths=[key(9)], last=False))
        assert orders.told_for(members) is None
        assert (await orders.hint(hint(paths=[key(2)])))["files"] == 2
        told = orders.told_for(members)
        assert told is not None
        assert [members.place(inode) for inode in told.inodes] == [9, 2]


async def test_a_told_sampler_needs_no_lines(tmp_path: Path, lake: WatchedLake) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        upcoming = orders.make_upcoming(await members_of(cache))
        await orders.hint(hint(sampler={"family": "torch", "seed": 5, "world": 2, "ranks": [1]}))
        await settled(upcoming)
        assert upcoming.name == "told: torch with seed 5"
        assert coming(upcoming, 30) == Spec("torch", 5).order(len(KEYS))[1::2][:30].tolist()


async def test_what_is_told_for_another_directory_says_nothing(tmp_path: Path, lake: WatchedLake) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        await orders.hint({"directory": "other", "upload": "1", "paths": ["other/file"], "last": True})
        assert orders.told_for(await members_of(cache)) is None


@pytest.mark.parametrize("directory", ["nowhere", "train/class0/0000.jpg", "train/none"])
async def test_a_hint_for_no_directory_is_refused(tmp_path: Path, lake: WatchedLake, directory: str) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        with pytest.raises(UsageError, match="no such directory"):
            await orders.hint(hint(directory=directory, paths=[]))


async def test_a_hint_of_which_nothing_is_there_is_refused_and_asks_the_lake_little(
    tmp_path: Path, lake: WatchedLake
) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        paths = [f"no{number}/file" for number in range(5000)]
        with pytest.raises(UsageError, match="none of the 5,000 files"):
            await orders.hint(hint(paths=paths))
        assert len(lake.listed) < 100
        assert orders.told_for(await members_of(cache)) is None


async def test_an_order_is_found_while_the_mover_serves(tmp_path: Path, lake: WatchedLake) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        upcoming = orders.make_upcoming(await members_of(cache))
        order = Spec("torch", 42).order(len(KEYS)).tolist()
        for place in opens(order, 1, ranks=1, workers=2, batch=16):
            upcoming.used([place], 0.0)
            await settled(upcoming)
            if upcoming.is_known:
                break
        assert upcoming.name == "torch with seed 42"


async def test_a_search_that_fails_is_logged_and_costs_nothing_else(
    tmp_path: Path, lake: WatchedLake, caplog: pytest.LogCaptureFixture
) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        upcoming = orders.make_upcoming(await members_of(cache))

        def fail() -> None:
            raise RuntimeError("on purpose")

        upcoming.tell(fail)
        await settled(upcoming)
        assert not upcoming.is_known and "the search for the order of a set failed" in caplog.text
        caplog.clear()


async def test_the_told_orders_are_bounded(tmp_path: Path, lake: WatchedLake) -> None:
    async with wiring.open_cache(tmp_path, lake, with_tiers=False) as cache:
        orders = Orders(cache.nursery, cache.index, cache.lister)
        for upload in range(20):
            await orders.hint(hint(upload=str(upload), paths=[key(upload)], last=False))
        assert len(orders._uploads) <= 4
        for _ in range(3):
            await orders.hint(hint(paths=[key(1)]))
        assert len(orders._told) == 1


# --- The recorder ------------------------------------------------------------------------------


async def test_the_recorder_notes_misses_and_hits_once_each(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({"small": b"x" * 5000, "large": b"y" * (GROUP_BYTES + MIB)})
    async with wiring.open_cache(tmp_path, lake) as cache:
        await cache.lister.list_directory(Inode(1))
        (large, large_node), (small, small_node) = (cache.names()[name] for name in ("large", "small"))
        recorder = Recorder(cache.index, 100.0)
        recorder.note(messages.Fetch(small, 0, 5000), 100.5)
        recorder.note(messages.Fetch(small, 0, 5000), 100.6)  # Another read of the same use.
        recorder.note(messages.Fetch(large, GROUP_BYTES - 10, 20), 101.0)
        recorder.note(messages.Lookup(1, b"small"), 101.0)
        recorder.note(messages.Fetch(99, 0, 1), 101.0)  # No such inode.
        assert recorder.take() == [
            (500.0, small_node.vid.hex(), 5000),
            (1000.0, large_node.vid.hex() + "00000000", GROUP_BYTES),
            (1000.0, large_node.vid.hex() + "00000001", MIB),
        ]
        recorder.note(messages.Used([small_node.vid]), 110.0)
        assert recorder.take() == []  # It is in no tier: it left meanwhile.
