"""Sets of large files and records within them, over a fake lake: what is fetched, kept and counted."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trio.testing import wait_all_tasks_blocked

from cache.ahead import SetReadAhead
from cache.model import KIB, MIB, ROOT_INODE, Inode, ObjectVersion
from cache.policy.ledger import Account, Ledger
from cache.policy.records import Access
from cache.policy.sets import ListingOrder, MakeUpcoming, Members
from cache.survey import Survey
from tests.wiring import Cache, TierSpec, WatchedLake, bodies, open_cache

SHARD = 9 * MIB
RECORD = 100_000
_GIVEN_S = 1000.0


def shards(count: int, size_bytes: int = SHARD) -> WatchedLake:
    lake = WatchedLake()
    lake.fill(bodies({f"set/{number:04}.tar": size_bytes for number in range(count)}))
    return lake


@dataclass
class Reading:
    """Reads large files as `Mover` has it, told of every READ."""

    cache: Cache
    ahead: SetReadAhead
    now_s: float = _GIVEN_S

    async def folder(self) -> list[Inode]:
        await self.cache.lister.list_directory(ROOT_INODE)
        directory = self.cache.names()["set"][0]
        await self.cache.lister.list_directory(directory)
        return [inode for inode, _ in self.cache.names(directory).values()]

    def version(self, inode: Inode) -> ObjectVersion:
        node = self.cache.index.node(inode)
        assert node is not None
        return ObjectVersion(self.cache.index.path_of(inode).decode(), node.etag, node.size_bytes)

    async def read(self, inode: Inode, offset: int, length: int) -> None:
        version, fetcher = self.version(inode), self.cache.fetcher
        if self.is_whole(inode):
            fetcher.read_seen(version, offset, length)
            self.cache.residency.used([version.id], self.now_s)
        else:
            await fetcher.fetch(version, offset, length)
        use = fetcher.take_use(version.id)
        if use is not None:
            self.ahead.used(inode, self.now_s, use)
        self.ahead.seen(inode, version.id, self.now_s, end=offset + length >= version.size_bytes)

    async def go_through(self, inode: Inode, up_to: int | None = None) -> None:
        size_bytes = self.version(inode).size_bytes if up_to is None else up_to
        for offset in range(0, size_bytes, MIB):
            await self.read(inode, offset, min(MIB, size_bytes - offset))

    def is_whole(self, inode: Inode) -> bool:
        row = self.cache.index.version(self.version(inode).id)
        return row is not None and row.whole

    def whole(self, inodes: Sequence[Inode]) -> list[Inode]:
        return [inode for inode in inodes if self.is_whole(inode)]

    async def settled(self) -> None:
        while True:
            await wait_all_tasks_blocked()
            if not self.cache.fetcher.flights_under_way and not self.cache.lister._flights:
                return
            for listing in list(self.cache.lister._flights.values()):
                await listing.done.wait()
            await self.cache.idle()

    @property
    def only(self) -> dict[str, Any]:
        (shown,) = self.ahead.status()
        return shown


@asynccontextmanager
async def reading(
    path: Path,
    lake: WatchedLake,
    make_upcoming: MakeUpcoming = lambda members: ListingOrder(),
    **settings: Any,
) -> AsyncIterator[Reading]:
    async with open_cache(path, lake, policy="epoch", **settings) as cache:
        made = Reading(cache, None)  # type: ignore[arg-type]
        made.ahead = SetReadAhead(
            cache.nursery,
            cache.lake_io,
            cache.index,
            cache.residency,
            cache.fetcher,
            Survey(cache.index, cache.lister),
            4,
            make_upcoming,
            clock=lambda: made.now_s,
        )
        cache.nursery.start_soon(made.ahead.run)
        yield made


async def test_the_next_shards_are_fetched_ahead_and_no_more(tmp_path: Path) -> None:
    async with reading(tmp_path, shards(8)) as at:
        files = await at.folder()
        await at.go_through(files[0])
        await at.settled()
        assert at.whole(files) == files[:1], "one shard is no set"
        await at.go_through(files[1])
        await at.settled()
        assert at.whole(files) == files[:4]
        assert (at.only["large"], at.only["files"], at.only["epoch"]) == (True, 8, 1)
        await at.go_through(files[2])
        await at.settled()
        assert at.whole(files) == files[:5]
        for inode in files[3:]:
            await at.go_through(inode)
            await at.settled()
        assert at.only["wasted_bytes"] == 0
        assert at.only["used_ahead_bytes"] == at.only["fetched_ahead_bytes"] == 6 * SHARD
        assert at.cache.lake_io.bytes_fetched == 8 * SHARD


async def test_shuffled_shards_are_each_fetched_once(tmp_path: Path) -> None:
    lake = shards(9)
    async with reading(tmp_path, lake) as at:
        files = await at.folder()
        order = list(files)
        random.Random(3).shuffle(order)
        for inode in order:
            await at.go_through(inode)
            await at.settled()
        assert at.cache.lake_io.bytes_fetched == 9 * SHARD
        assert (at.only["epoch"], at.only["used_share"], at.only["wasted_bytes"]) == (1, 1.0, 0)
        assert at.only["amplification"] == 1.0


class Backwards:
    """A told order: the last member first."""

    name = "told"
    is_known = True
    changes = 0
    lead_s = 0.0
    is_needed = True

    def __init__(self, members: Members) -> None:
        self._count = len(members)

    def used(self, places: Sequence[int], now_s: float) -> None:
        pass

    def epoch_began(self, epoch: int) -> None:
        pass

    def next_place(self, status: bytearray, frontier: int | None) -> int | None:
        place = status.rfind(0)
        return None if place < 0 else place

    def put_back(self, place: int) -> None:
        pass

    def due(self, place: int) -> int | None:
        return self._count - place

    def due_later(self, place: int) -> int | None:
        return None


async def test_with_a_known_order_the_shards_that_come_next_are_fetched(tmp_path: Path) -> None:
    async with reading(tmp_path, shards(8), Backwards) as at:
        files = await at.folder()
        for inode in (files[7], files[6]):
            await at.go_through(inode)
        await at.settled()
        assert at.whole(files) == files[4:]


async def test_a_set_of_shards_larger_than_every_tier_is_gone_through_without_waste(tmp_path: Path) -> None:
    count = 16
    async with reading(tmp_path, shards(count), tiers=(TierSpec("nvme0", 64 * MIB),)) as at:
        files = await at.folder()
        for seed in (1, 2):
            order = list(files)
            random.Random(seed).shuffle(order)
            for inode in order:
                await at.go_through(inode)
                await at.settled()
        assert at.only["wasted_bytes"] <= SHARD
        fetched = at.cache.lake_io.bytes_fetched / SHARD
        assert fetched <= 2 * count - 2, "the second epoch finds some of the first"
        assert at.cache.residency.tiers[0].budget.used_bytes <= 64 * MIB


async def test_a_shard_that_is_being_read_stays_though_there_is_no_room(tmp_path: Path) -> None:
    async with reading(tmp_path, shards(10), tiers=(TierSpec("nvme0", 48 * MIB),)) as at:
        files = await at.folder()
        for inode in files[:3]:
            await at.go_through(inode)
        await at.settled()
        (held, *_) = [inode for inode in at.whole(files) if inode not in files[:3]]
        await at.go_through(held, up_to=6 * MIB)
        others = [inode for inode in files[3:] if inode != held]
        for inode in others:
            await at.go_through(inode)
            await at.settled()
        assert at.is_whole(held)


async def test_two_large_files_and_one_are_no_set(tmp_path: Path) -> None:
    for count in (1, 2):
        (path := tmp_path / str(count)).mkdir()
        async with reading(path, shards(count)) as at:
            files = await at.folder()
            for inode in files:
                await at.go_through(inode)
            await at.settled()
            assert at.ahead.status() == []
            assert at.cache.lake_io.bytes_fetched == count * SHARD


async def test_files_read_at_random_are_shown_as_a_set_and_not_fetched_ahead(tmp_path: Path) -> None:
    size, tier = 64 * MIB, 40 * MIB
    lake = shards(4, size)
    async with reading(tmp_path, lake, tiers=(TierSpec("nvme0", tier),)) as at:
        files, generator = await at.folder(), random.Random(9)
        for _ in range(150):
            await at.read(generator.choice(files[:3]), generator.randrange(size - RECORD), RECORD)
        await at.settled()
        assert at.only["pattern"] == "random records"
        assert at.only["read_ahead"] == "off: records are read at random"
        assert at.only["fetched_ahead_bytes"] == 0
        assert at.cache.index.version(at.version(files[3]).id) is None


async def read_records(at: Reading, inode: Inode, count: int, seed: int) -> None:
    size_bytes = at.version(inode).size_bytes
    order = list(range(size_bytes // RECORD))
    random.Random(seed).shuffle(order)
    for number in order[:count]:
        await at.read(inode, number * RECORD, RECORD)


async def test_of_a_file_larger_than_the_tier_only_the_records_are_fetched(tmp_path: Path) -> None:
    size = 200 * MIB
    async with reading(tmp_path, shards(1, size), tiers=(TierSpec("nvme0", 50 * MIB),)) as at:
        (file,) = await at.folder()
        await read_records(at, file, 60, seed=1)
        await at.settled()
        learnt_bytes, before = at.cache.lake_io.bytes_fetched, at.cache.lake.requests["get"]
        await read_records(at, file, 10**9, seed=2)
        fetched_bytes = at.cache.lake_io.bytes_fetched - learnt_bytes
        assert fetched_bytes / (size // RECORD * RECORD) <= 1.2
        assert at.cache.lake.requests["get"] - before <= 1.1 * (size // RECORD)
        assert at.cache.fetcher.access(at.version(file).id)[0] is Access.RANDOM
        traffic = at.cache.fetcher.amplification.of(at.version(file).id)
        assert traffic is not None and traffic.fetched_bytes == at.cache.lake_io.bytes_fetched


async def test_a_file_that_fits_is_fetched_whole_once_its_records_have_cost_as_much(tmp_path: Path) -> None:
    size = 100 * MIB
    async with reading(tmp_path, shards(1, size)) as at:
        (file,) = await at.folder()
        await read_records(at, file, 30, seed=1)
        await at.settled()
        assert not at.is_whole(file)
        await read_records(at, file, 200, seed=2)
        await at.settled()
        assert at.is_whole(file)
        assert at.cache.lake_io.bytes_fetched == size
        assert at.cache.resident_bytes(at.version(file)) == bodies({"set/0000.tar": size})["set/0000.tar"]


async def test_a_file_that_does_not_fit_beside_what_an_epoch_needs_is_not_fetched_whole(
    tmp_path: Path,
) -> None:
    lake = shards(1, 40 * MIB)
    small = lake.fill(bodies({f"small/{number}": MIB for number in range(20)}))
    async with reading(tmp_path, lake, tiers=(TierSpec("nvme0", 60 * MIB),)) as at:
        (file,) = await at.folder()
        for version in small.values():
            await at.cache.fetch(version)
            at.cache.residency.expect(version.id)
        await read_records(at, file, 10**9, seed=1)
        await at.settled()
        assert all(at.cache.resident_bytes(version) is not None for version in small.values())
        assert not at.is_whole(file)


async def test_a_shard_that_changes_in_mid_epoch_fails_nobody_else(tmp_path: Path) -> None:
    lake = shards(8)
    async with reading(tmp_path, lake) as at:
        files = await at.folder()
        lake.fill({"set/0003.tar": b"new" * (4 * MIB)})
        for inode in files[:3]:
            await at.go_through(inode)
            await at.settled()
        assert not at.is_whole(files[3]), "the lake has another version"
        assert at.is_whole(files[4])
        for inode in files[4:]:
            await at.go_through(inode)
        assert at.only["wasted_bytes"] == 0


async def test_every_read_is_right_whatever_the_order(tmp_path: Path) -> None:
    """Streams, records and passes of one file at once, in a tier that it does not fit into."""
    size = 50 * MIB
    content = bodies({"set/0000.tar": size})["set/0000.tar"]
    async with reading(tmp_path, shards(1, size), tiers=(TierSpec("nvme0", 24 * MIB),)) as at:
        (file,) = await at.folder()
        generator, version = random.Random(10), at.version(file)
        frontier = 0
        for _ in range(300):
            if generator.random() < 0.5:
                offset, length = generator.randrange(size - RECORD), RECORD
            else:
                offset, length = frontier, 256 * KIB
                frontier = (frontier + length) % size
            await at.read(file, offset, length)
            await at.settled()
            await at.read(file, offset, length)  # Should it have left again.
            assert at.cache.cached_bytes(version, offset, length) == content[offset : offset + length]


def test_a_part_that_leaves_unused_is_wasted_and_the_rest_may_be_used() -> None:
    ledger, account = Ledger(), Account()
    ledger.fetched(b"v", 10 * MIB, account)
    ledger.left_in_part(b"v", 3 * MIB)
    ledger.used(b"v")
    ledger.left_in_part(b"v", MIB)
    assert (account.fetched_bytes, account.used_bytes, account.wasted_bytes) == (10 * MIB, 7 * MIB, 3 * MIB)
