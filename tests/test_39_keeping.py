"""What stays in the tiers, by what is known and seen: orders, scans, files that are read again and again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from trio.testing import wait_all_tasks_blocked

from cache.model import KIB, MIB, ROOT_INODE, Inode
from cache.policy.order.spec import Spec
from cache.policy.order.told import ToldSampler
from cache.policy.order.upcoming import Order, OrderedUpcoming, order_of_places, order_of_sampler
from cache.policy.sets import ListingOrder, MakeUpcoming, Members
from tests.test_39_ahead import Reading, lake_of, reading, shuffled
from tests.wiring import TierSpec, WatchedLake, bodies

SIZE = 100 * KIB
COUNT = 600
TENTH = (TierSpec("nvme0", 8 * MIB),)  # Holds 76 of them.


def told(make: object) -> MakeUpcoming:
    """Return the factory of what knows the order that *make*(count) returns, from the beginning."""

    def upcoming_of(members: Members) -> OrderedUpcoming:
        count = len(members)
        made = OrderedUpcoming(count, list, lambda work, then: then(work()), ListingOrder())
        made.tell(lambda: make(count))  # type: ignore[operator]
        return made

    return upcoming_of


def by_sampler(count: int) -> Order | None:
    return order_of_sampler(ToldSampler("torch", 0, advance="reseed"), count, list)


def epoch(files: list[Inode], number: int) -> list[Inode]:
    return [files[place] for place in Spec("torch", 0, number, "reseed").order(len(files))]


async def read_paced(reader: Reading, inodes: list[Inode]) -> int:
    """Read one after the other, as fast as what is known allows; return how many had to be waited for."""
    waited = 0
    for inode in inodes:
        await reader.settled()
        reader.now_s += 0.01
        waited += not reader.is_cached(inode)
        await reader.read(inode)
    return waited


async def test_with_the_order_known_a_tenth_of_the_set_is_enough(tmp_path: Path) -> None:
    lake = lake_of(COUNT, size_bytes=SIZE)
    async with reading(tmp_path, lake, tiers=TENTH, make_upcoming=told(by_sampler)) as reader:
        files = await reader.folder()
        waited = []
        for number in range(3):
            before = lake.requests["get"]
            waited.append(await read_paced(reader, epoch(files, number)))
            fetched = lake.requests["get"] - before
            assert fetched <= COUNT + 8, number
        assert reader.only["epoch"] == 3 and reader.only["order"].startswith("torch with seed 0")
        # The first are read before the set is known, or before the next epoch is.
        assert waited[0] <= 24 and max(waited[1:]) <= 24, waited
        assert reader.only["wasted_bytes"] <= 8 * SIZE


async def test_of_an_order_that_was_told_the_first_files_come_before_the_first_use(tmp_path: Path) -> None:
    lake = lake_of(COUNT, size_bytes=SIZE)
    async with reading(tmp_path, lake, tiers=TENTH, make_upcoming=told(by_sampler)) as reader:
        files = await reader.folder()
        reader.ahead.announced(reader.cache.names()["set"][0])
        await reader.settled()
        order = epoch(files, 0)
        assert reader.cached(order[:24]) == order[:24]
        assert lake.requests["get"] < COUNT // 4  # No more than the window of a reader who has begun.
        shown = reader.only
        assert (shown["epoch"], shown["used_share"], shown["pattern"]) == (1, 0.0, "too few uses")
        assert await read_paced(reader, order) <= 8
        assert lake.requests["get"] <= COUNT + 8 and reader.only["epoch"] == 1
        assert await read_paced(reader, epoch(files, 1)) <= 24
        assert reader.only["epoch"] == 2


async def test_what_is_announced_and_not_read_is_given_up(tmp_path: Path) -> None:
    lake = lake_of(COUNT, size_bytes=SIZE)
    async with reading(tmp_path, lake, tiers=TENTH, make_upcoming=told(by_sampler)) as reader:
        await reader.folder()
        reader.ahead.announced(reader.cache.names()["set"][0])
        await reader.settled()
        before = lake.requests["get"]
        reader.now_s += 3600
        reader.ahead.orders_changed()
        await reader.settled()
        assert lake.requests["get"] == before


async def test_a_set_that_is_followed_is_announced_in_vain(tmp_path: Path) -> None:
    async with reading(tmp_path, lake_of(300), make_upcoming=told(by_sampler)) as reader:
        files = await reader.folder()
        await reader.read_all(shuffled(files, 1)[:24])
        await reader.settled()
        reader.ahead.announced(reader.cache.names()["set"][0])
        reader.ahead.announced(ROOT_INODE)
        await reader.settled()
        assert reader.only["uses"] == 24 - 16


async def test_what_the_next_epoch_needs_first_is_still_there(tmp_path: Path) -> None:
    lake, tiers = lake_of(COUNT, size_bytes=SIZE), (TierSpec("nvme0", 24 * MIB),)
    async with reading(tmp_path, lake, tiers=tiers, make_upcoming=told(by_sampler)) as reader:
        files = await reader.folder()
        await read_paced(reader, epoch(files, 0))
        await reader.settled()
        kept = reader.cached(files)
        soon = set(epoch(files, 1)[: COUNT // 2])
        assert len(kept) > 200 and len(soon.intersection(kept)) > 0.75 * len(kept)


async def test_an_order_that_stops_holding_gives_back_what_it_held(tmp_path: Path) -> None:
    def wrong(count: int) -> Order:
        return order_of_places(np.random.default_rng(1).permutation(count).astype(np.uint32), count)

    lake = lake_of(COUNT, size_bytes=SIZE)
    async with reading(tmp_path, lake, tiers=TENTH, make_upcoming=told(wrong)) as reader:
        files = shuffled(await reader.folder(), 5)
        await read_paced(reader, files)
        await reader.settled()
        policy = reader.cache.residency.tiers[0].policy
        assert reader.only["order"] == "unknown"
        assert all((known := policy.next_of(item)) is None or known.due is None for item in policy.order(999))


async def test_a_copy_of_a_large_tree_leaves_a_training_set_alone(tmp_path: Path) -> None:
    lake = lake_of(200, "train", SIZE)
    lake.fill(bodies({f"tree/{number:04}": SIZE for number in range(900)}))
    tiers = (TierSpec("nvme0", 32 * MIB),)  # The training set is 20 MB of it.
    async with reading(tmp_path, lake, tiers=tiers, policy="auto") as reader:
        train = await reader.folder("train")
        for number in range(2):
            await reader.read_all(shuffled(train, number))
        await reader.settled()
        assert len(reader.cached(train)) == 200
        await reader.read_all(await reader.folder("tree"))
        await reader.settled()
        assert len(reader.cached(train)) >= 190
        before = lake.requests["get"]
        await reader.read_all(shuffled(train, 9))
        assert lake.requests["get"] - before <= 10


async def test_a_search_through_the_training_set_itself_costs_it_little(tmp_path: Path) -> None:
    lake = lake_of(400, "train", SIZE)
    tiers = (TierSpec("nvme0", 24 * MIB),)
    async with reading(tmp_path, lake, tiers=tiers, policy="auto") as reader:
        train = await reader.folder("train")
        for number in range(2):
            await reader.read_all(shuffled(train, number))
        held = len(reader.cached(train))
        await reader.read_all(train)
        await reader.settled()
        assert len(reader.cached(train)) >= 0.9 * held
        before = lake.requests["get"]
        await reader.read_all(shuffled(train, 9))
        await reader.settled()
        assert lake.requests["get"] - before <= (400 - held) * 1.25


async def test_files_that_are_read_again_and_again_stay_during_epochs(tmp_path: Path) -> None:
    lake = lake_of(400, "train", SIZE)
    lake.fill(bodies({f"shared/{number}": SIZE for number in range(8)}))
    tiers = (TierSpec("nvme0", 16 * MIB),)
    async with reading(tmp_path, lake, tiers=tiers, policy="auto") as reader:
        train, shared = await reader.folder("train"), await reader.folder("shared")
        missed = 0
        for number in range(4):
            for step, inode in enumerate(shuffled(train, number)):
                await reader.read(inode)
                await wait_all_tasks_blocked()
                if step % 10 == 0:
                    missed += number > 0 and not reader.is_cached(shared[step // 10 % 8])
                    await reader.read(shared[step // 10 % 8])
        assert missed <= 8  # Of 120.


async def test_one_file_is_no_set_and_one_larger_than_all_tiers_is_read_from_the_lake(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill(bodies({"set/one": SIZE, "large/one": 6 * MIB}))
    async with reading(tmp_path, lake, tiers=(TierSpec("nvme0", 4 * MIB),)) as reader:
        (one,) = await reader.folder()
        for _ in range(40):
            await reader.read(one)
        assert reader.ahead.status() == [] and lake.requests["get"] == 1
        await reader.cache.lister.list_directory(ROOT_INODE)
        (large,) = await reader.folder("large")
        body = await reader.cache.fetcher.read_through(reader.version(large), 0, 6 * MIB)
        assert len(body) == 6 * MIB


async def test_files_that_change_while_their_order_is_followed_are_left_to_their_readers(
    tmp_path: Path,
) -> None:
    lake = lake_of(COUNT, size_bytes=SIZE)
    async with reading(tmp_path, lake, tiers=TENTH, make_upcoming=told(by_sampler)) as reader:
        files = await reader.folder()
        order = epoch(files, 0)
        await read_paced(reader, order[:100])
        changed = set(order[300:320])
        for inode in changed:
            lake.put(f"set/{files.index(inode):04}", b"another")
        waited = await read_paced(reader, [inode for inode in order[100:] if inode not in changed])
        assert waited <= 4
        assert reader.only["read_ahead"] == "done"
