"""Read-ahead of sample sets: what is fetched, in which order, how much, and what yields to what."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cache.ahead import SetReadAhead
from cache.errors import LakeUnavailable, SlowDown
from cache.model import KIB, MIB, ROOT_INODE, Inode, ObjectVersion
from cache.policy.due import SOME_TIME
from cache.policy.eviction import ItemId
from cache.policy.ledger import Account, Ledger
from cache.policy.parallel import Parallelism
from cache.policy.sets import ListingOrder, MakeUpcoming
from cache.survey import Survey
from tests.wiring import NO_RETRY, QUICK_RETRY, Cache, TierSpec, WatchedLake, bodies, open_cache

SIZE = 20 * KIB


def lake_of(count: int, folder: str = "set", size_bytes: int = SIZE) -> WatchedLake:
    lake = WatchedLake()
    lake.fill(bodies({f"{folder}/{number:04}": size_bytes for number in range(count)}))
    return lake


@dataclass
class Reading:
    """Reads files as workers have them read, on a clock that stands still unless it is moved."""

    cache: Cache
    ahead: SetReadAhead
    now_s: float = 1000.0

    async def folder(self, name: str = "set") -> list[Inode]:
        """Return the inodes of a directory's files in listing order, listed by now."""
        await self.cache.lister.list_directory(ROOT_INODE)
        directory = self.cache.names()[name][0]
        await self.cache.lister.list_directory(directory)
        return [inode for inode, _ in self.cache.names(directory).values()]

    def version(self, inode: Inode) -> ObjectVersion:
        node = self.cache.index.node(inode)
        assert node is not None
        return ObjectVersion(self.cache.index.path_of(inode).decode(), node.etag, node.size_bytes)

    async def read(self, inode: Inode) -> None:
        """As `Mover.handle` does: a hit is told, a miss is fetched."""
        version = self.version(inode)
        self.ahead.used(inode, self.now_s)
        if self.is_cached(inode):
            self.cache.residency.used([version.id], self.now_s)
        else:
            await self.cache.fetch(version)

    async def read_all(self, inodes: Sequence[Inode]) -> None:
        for inode in inodes:
            await self.read(inode)
            await wait_all_tasks_blocked()

    def is_cached(self, inode: Inode) -> bool:
        row = self.cache.index.version(self.version(inode).id)
        return row is not None and row.whole

    def cached(self, inodes: Sequence[Inode]) -> list[Inode]:
        return [inode for inode in inodes if self.is_cached(inode)]

    async def settled(self) -> None:
        """Return once nothing is fetched or looked at any more."""
        while True:
            await wait_all_tasks_blocked()
            listings = list(self.cache.lister._flights.values())
            if not self.cache.fetcher.flights_under_way and not listings:
                return
            for listing in listings:
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
    *,
    fetches_max: int = 4,
    make_upcoming: MakeUpcoming = lambda members: ListingOrder(),
    prepare: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    **settings: Any,
) -> AsyncIterator[Reading]:
    settings.setdefault("policy", "epoch")
    async with open_cache(path, lake, **settings) as cache:
        made = Reading(cache, None)  # type: ignore[arg-type]
        made.ahead = SetReadAhead(
            cache.nursery,
            cache.lake_io,
            cache.index,
            cache.residency,
            cache.fetcher,
            Survey(cache.index, cache.lister),
            fetches_max,
            make_upcoming,
            clock=lambda: made.now_s,
            prepare=prepare,
        )
        cache.nursery.start_soon(made.ahead.run)
        yield made


def shuffled(inodes: Sequence[Inode], seed: int) -> list[Inode]:
    order = list(inodes)
    random.Random(seed).shuffle(order)
    return order


async def test_the_rest_of_a_set_is_fetched_once_an_epoch_is_seen(tmp_path: Path) -> None:
    async with reading(tmp_path, lake := lake_of(300)) as reader:
        files = await reader.folder()
        await reader.read_all(shuffled(files, 1)[:24])
        await reader.settled()
        assert reader.cached(files) == files
        assert lake.requests["get"] == 300
        shown = reader.only
        assert (shown["path"], shown["files"], shown["bytes"]) == ("set", 300, 300 * SIZE)
        assert (shown["epoch"], shown["used_share"], shown["cached_share"]) == (1, 0.08, 1.0)
        assert (shown["order"], shown["pattern"], shown["read_ahead"]) == ("unknown", "shuffled", "done")
        assert shown["fetched_ahead_bytes"] == (300 - 16) * SIZE - used_by_demand(reader)
        assert shown["wasted_bytes"] == 0


async def test_a_message_of_uses_of_several_sets_and_of_none_counts_for_each(tmp_path: Path) -> None:
    lake = lake_of(100, "set")
    lake.fill(bodies({f"other/{number:04}": SIZE for number in range(100)}))
    lake.fill(bodies({f"few/{number:04}": SIZE for number in range(3)}))
    async with reading(tmp_path, lake) as reader:
        a, b = shuffled(await reader.folder("set"), 1), shuffled(await reader.folder("other"), 2)
        few = await reader.folder("few")
        for files in (a, b):
            reader.ahead.used_all(files[:32], [reader.now_s] * 32)
            await reader.settled()
        uses = [inode for pair in zip(a[32:], b[32:], strict=True) for inode in pair]
        for start in range(0, len(uses), 40):
            told = [*uses[start : start + 20], *few, *uses[start + 20 : start + 40]]
            reader.ahead.used_all(told, [reader.now_s] * len(told))
            await reader.settled()
        shown = {one["path"]: one for one in reader.ahead.status()}
        assert shown.keys() == {"set", "other"}
        for one in shown.values():
            assert one["used_share"] == 1.0 and one["uses"] >= 68 and one["pattern"] == "shuffled"


async def test_what_orders_need_is_prepared_from_the_first_use_on_and_waited_for(tmp_path: Path) -> None:
    calls, ready = list[int](), trio.Event()

    async def prepare() -> None:
        calls.append(len(calls))
        await ready.wait()

    async with reading(tmp_path, lake_of(300), prepare=prepare) as reader:
        files = await reader.folder()
        await reader.read(files[7])
        await wait_all_tasks_blocked()
        assert calls == [0]
        await reader.read_all(shuffled(files, 1)[:24])
        assert len(calls) == 2 and reader.ahead.status() == []
        ready.set()
        await reader.read_all(shuffled(files, 1)[24:30])
        await reader.settled()
        assert reader.cached(files) == files


def used_by_demand(reader: Reading) -> int:
    """Return the bytes that readers fetched after the set was known."""
    return reader.cache.lake_io.bytes_fetched - 16 * SIZE - reader.only["fetched_ahead_bytes"]


async def test_without_an_epoch_nothing_is_fetched_ahead(tmp_path: Path) -> None:
    async with reading(tmp_path, lake := lake_of(300)) as reader:
        await reader.read_all(shuffled(await reader.folder(), 1)[:15])
        await reader.settled()
        assert lake.requests["get"] == 15 and reader.ahead.status() == []


async def test_a_scan_fetches_the_next_files_in_listing_order(tmp_path: Path) -> None:
    async with reading(tmp_path, lake_of(400)) as reader:
        files = await reader.folder()
        await reader.read_all(files[:24])
        await reader.settled()
        assert reader.only["pattern"] == "scan"
        ahead = reader.cached(files)
        assert 24 < len(ahead) < 100 and ahead == files[: len(ahead)]


async def test_a_tree_of_classes_that_was_never_listed_is_listed_and_fetched(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill(bodies({f"train/c{c:02}/{n:03}": SIZE for c in range(12) for n in range(20)}))
    async with reading(tmp_path, lake) as reader:
        await reader.cache.lister.list_directory(ROOT_INODE)
        train = reader.cache.names()["train"][0]
        await reader.cache.lister.list_directory(train)
        classes = [inode for inode, _ in reader.cache.names(train).values()]
        first = []
        for directory in classes[:8]:
            await reader.cache.lister.list_directory(directory)
            first += [inode for inode, _ in reader.cache.names(directory).values()][:4]
        await reader.read_all(shuffled(first, 3))
        await reader.settled()
        assert reader.only["files"] == 240 and reader.only["cached_share"] == 1.0


async def test_a_reader_overtakes_what_is_fetched_ahead(tmp_path: Path) -> None:
    """All fetches that may be under way are held; one that is asked for starts all the same."""
    async with reading(tmp_path, lake := lake_of(300), fetches_max=4) as reader:
        files = shuffled(await reader.folder(), 1)
        await reader.read_all(files[:15])
        gate = lake.hold("get")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, files[15])
            await lake.met("get", 15 + 1 + 4)
            await wait_all_tasks_blocked()
            assert reader.cache.fetcher.flights_under_way == 5
            fetched = {version for version, _ in reader.cache.fetcher._flights}
            late = next(inode for inode in files[16:] if reader.version(inode).id not in fetched)
            nursery.start_soon(reader.read, late)
            await lake.met("get", 15 + 1 + 4 + 1)
            gate.set()
        await reader.settled()
        assert len(reader.cached(files)) == 300 and lake.requests["get"] == 300


async def test_a_reader_joins_a_fetch_that_nobody_had_asked_for(tmp_path: Path) -> None:
    async with reading(tmp_path, lake := lake_of(100), fetches_max=2) as reader:
        files = await reader.folder()
        await reader.read_all(shuffled(files, 1)[:15])
        gate = lake.hold("get")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, shuffled(files, 1)[15])
            await lake.met("get", 15 + 3)
            await wait_all_tasks_blocked()
            on_their_way = {version for version, _ in reader.cache.fetcher._flights}
            wanted = [inode for inode in files if reader.version(inode).id in on_their_way]
            for inode in wanted:
                nursery.start_soon(reader.read, inode)
            await wait_all_tasks_blocked()
            assert lake.requests["get"] == 18
            gate.set()
        await reader.settled()
        assert lake.requests["get"] == 100
        assert reader.only["used_ahead_bytes"] == 2 * SIZE


async def test_the_second_epoch_of_a_cached_set_asks_the_lake_for_nothing(tmp_path: Path) -> None:
    async with reading(tmp_path, lake := lake_of(200)) as reader:
        files = await reader.folder()
        for epoch in (1, 2, 3):
            await reader.read_all(shuffled(files, epoch))
        await reader.settled()
        assert lake.requests["get"] == 200
        assert reader.only["epoch"] == 3 and reader.only["used_ahead_bytes"] > 50 * SIZE


ONE_TIER = (TierSpec("nvme0", 30 * MIB),)
TWO_TIERS = (TierSpec("dram", 10 * MIB, is_memory=True), TierSpec("nvme0", 24 * MIB))


@pytest.mark.parametrize(("tiers", "most"), [(ONE_TIER, 1.12), (TWO_TIERS, 1.25)])
async def test_of_a_set_larger_than_the_tiers_each_epoch_fetches_what_does_not_fit(
    tmp_path: Path, tiers: tuple[TierSpec, ...], most: float
) -> None:
    """The optimum is what does not fit. A few dozen more are fetched, of however many.

    They are what is read before the epoch is seen, what protects the files used last, and the room
    that a DRAM tier keeps free.
    """
    count, size = 600, 100 * KIB
    lake = lake_of(count, size_bytes=size)
    async with reading(tmp_path, lake, tiers=tiers) as reader:
        reader.cache.nursery.start_soon(reader.cache.residency.keep_dram_room)
        files = await reader.folder()
        held = reader.cache.residency.tiers
        optimum = count - sum(t.budget.size_bytes // t.files.whole_bytes(size) for t in held)
        fetched = []
        for epoch in range(1, 6):
            before = lake.requests["get"]
            await reader.read_all(shuffled(files, epoch))
            await reader.settled()
            fetched.append(lake.requests["get"] - before)
        assert reader.only["epoch"] == 5
        assert fetched[0] <= count * 1.03
        assert all(each <= optimum * most for each in fetched[1:]), (fetched, optimum)
        assert reader.only["wasted_bytes"] <= 0.02 * sum(fetched) * size
        assert reader.only["used_ahead_bytes"] > count * size


async def test_a_use_of_the_last_epoch_that_is_told_late_costs_no_member_its_rank(tmp_path: Path) -> None:
    async with reading(tmp_path, lake_of(200)) as reader:
        files = await reader.folder()
        first, second = shuffled(files, 1), shuffled(files, 2)
        await reader.read_all(first)
        reader.now_s += 1
        await reader.read_all(second[:40])
        await reader.settled()
        (tier,) = reader.cache.residency.tiers
        late = [inode for inode in first[-30:] if inode not in second[:40]]
        reader.now_s -= 0.2
        for inode in late:
            reader.cache.residency.used([reader.version(inode).id], reader.now_s)  # As the mover does.
            reader.ahead.used(inode, reader.now_s)
        assert reader.only["epoch"] == 2 and reader.only["used_share"] <= 0.21
        told = [tier.policy.next_of(ItemId(reader.version(inode).id)) for inode in late]
        assert told == [SOME_TIME] * len(late)


async def test_what_an_epoch_still_needs_stays_when_it_moves_down_a_tier(tmp_path: Path) -> None:
    """The set fits into both tiers together; nothing is fetched twice however it is moved."""
    tiers = (TierSpec("dram", 8 * MIB, is_memory=True), TierSpec("nvme0", 24 * MIB))
    lake = lake_of(260, size_bytes=100 * KIB)
    async with reading(tmp_path, lake, tiers=tiers) as reader:
        reader.cache.nursery.start_soon(reader.cache.residency.keep_dram_room)
        files = await reader.folder()
        for epoch in (1, 2, 3):
            await reader.read_all(shuffled(files, epoch))
        await reader.settled()
        assert lake.requests["get"] == 260
        assert reader.cache.residency.demoted_bytes > 0 == reader.cache.residency.evicted_bytes


async def test_read_ahead_pushes_out_an_old_set_but_not_one_in_use(tmp_path: Path) -> None:
    lake, tier = WatchedLake(), TierSpec("nvme0", 16 * MIB)
    lake.fill(bodies({f"{name}/{n:04}": 100 * KIB for name in ("old", "new") for n in range(100)}))
    async with reading(tmp_path, lake, tiers=(tier,)) as reader:
        old, new = await reader.folder("old"), await reader.folder("new")
        await reader.read_all(shuffled(old, 1)[:50])  # In the middle of its epoch, and all fetched.
        await reader.settled()
        await reader.read_all(shuffled(new, 1)[:20])
        await reader.settled()
        assert len(reader.cached(shuffled(old, 1)[50:])) >= 49
        assert len(reader.cached(new)) < 100
        reader.now_s += 1000.0  # Nobody reads the old set any more.
        await reader.read_all(shuffled(new, 1)[20:40])
        await reader.settled()
        assert len(reader.cached(shuffled(new, 1)[40:])) == 60


async def test_files_that_are_gone_or_changed_are_left_to_their_readers(tmp_path: Path) -> None:
    async with reading(tmp_path, lake := lake_of(200)) as reader:
        files = await reader.folder()
        lake.delete_many([f"set/{n:04}" for n in range(100, 120)])
        lake.put("set/0150", b"another")
        order = [inode for inode in shuffled(files, 1) if inode not in [*files[100:120], files[150]]]
        await reader.read_all(order[:30])
        await reader.settled()
        assert len(reader.cached(files)) == 200 - 21
        assert reader.only["read_ahead"] == "done"


async def test_a_set_that_grows_is_surveyed_again(tmp_path: Path) -> None:
    async with reading(tmp_path, lake := lake_of(100), ttl_s=0.0) as reader:
        await reader.read_all(shuffled(await reader.folder(), 1)[:30])
        await reader.settled()
        lake.fill(bodies({f"set/{n:04}": SIZE for n in range(100, 200)}))
        files = await reader.folder()
        reader.now_s += 60.0
        await reader.read_all(files[100:110])
        await reader.read_all(shuffled(files, 1)[:20])
        await reader.settled()
        assert reader.only["files"] == 200 and reader.only["cached_share"] == 1.0


async def test_a_lake_that_asks_for_less_gets_less_and_the_set_still_comes(tmp_path: Path) -> None:
    async with reading(tmp_path, lake := lake_of(200), fetches_max=6, retry=QUICK_RETRY) as reader:
        files = await reader.folder()
        refusals = iter(range(40))

        def refuse(verb: str, key: str) -> Exception | None:
            return SlowDown("503") if verb == "get" and next(refusals, None) is not None else None

        lake.fault = refuse
        await reader.read_all(shuffled(files, 1)[:24])
        await reader.settled()
        assert len(reader.cached(files)) == 200


async def test_a_lake_that_is_away_is_asked_by_one_fetch_at_a_time(tmp_path: Path) -> None:
    async with reading(tmp_path, lake := lake_of(200), fetches_max=6) as reader:
        files = shuffled(await reader.folder(), 1)
        await reader.read_all(files[:15])
        reader.cache.lake_io.failing_since_s = 0.0
        gate = lake.hold("get")
        reader.ahead.used(files[15], reader.now_s)
        await lake.met("get", 16)
        await wait_all_tasks_blocked()
        assert reader.cache.fetcher.flights_under_way == 1
        gate.set()
        await reader.settled()
        assert len(reader.cached(files[:15] + files[16:])) == 199


async def test_a_fetch_that_fails_is_tried_again_only_after_the_next_use(tmp_path: Path) -> None:
    async with reading(tmp_path, lake := lake_of(200), fetches_max=2, retry=NO_RETRY) as reader:
        files = shuffled(await reader.folder(), 1)
        await reader.read_all(files[:15])
        lake.fault = lambda verb, key: LakeUnavailable("away") if verb == "get" else None
        reader.ahead.used(files[15], reader.now_s)
        await reader.settled()
        asked = lake.requests["get"]
        assert 15 < asked <= 15 + 2
        lake.fault = None
        reader.ahead.used(files[16], reader.now_s)
        await reader.settled()
        assert len(reader.cached(files)) == 200 - 2


async def test_members_of_very_different_sizes_fill_the_tier_and_then_wait(tmp_path: Path) -> None:
    """The mean would fit where the largest does not: it waits for a use, it does not spin."""
    lake, tier = WatchedLake(), TierSpec("nvme0", 12 * MIB)
    lake.fill(bodies({f"set/{n:03}": 7 * MIB if n % 50 == 49 else 60 * KIB for n in range(200)}))
    async with reading(tmp_path, lake, tiers=(tier,)) as reader:
        files = await reader.folder()
        small = [inode for number, inode in enumerate(files) if number % 50 != 49]
        await reader.read_all(shuffled(small, 1)[:40])
        await reader.settled()
        assert reader.only["read_ahead"] == "waiting for room"
        assert reader.only["wasted_bytes"] == 0


async def test_a_fault_in_the_read_ahead_never_fails_a_read(tmp_path: Path) -> None:
    def broken(members: object) -> ListingOrder:
        raise RuntimeError("a fault")

    async with reading(tmp_path, lake_of(100), make_upcoming=broken) as reader:
        files = await reader.folder()
        await reader.read_all(shuffled(files, 1))
        assert len(reader.cached(files)) == 100 and reader.ahead.status() == []


# --- Its policies -------------------------------------------------------------------------------


def rate_after(parallelism: Parallelism, most_useful: int, seconds: float) -> float:
    """Run against a lake whose throughput grows up to *most_useful* fetches at a time; return the clock."""
    now_s = 0.0
    while now_s < seconds:
        now_s += 1 / (50 * min(parallelism.limit, most_useful))
        parallelism.landed(100_000, now_s)
    return now_s


def test_parallelism_climbs_as_far_as_it_brings_more() -> None:
    parallelism = Parallelism(64, first=8)
    rate_after(parallelism, 64, 5.0)
    assert parallelism.limit == 64
    modest = Parallelism(64, first=8)
    rate_after(modest, 10, 2.0)
    assert 10 <= modest.limit <= 30


def test_parallelism_halves_when_the_lake_asks_and_grows_again_later() -> None:
    parallelism = Parallelism(32, first=32)
    for _ in range(5):
        parallelism.slowed(10.0)
    assert parallelism.limit == 16
    parallelism.slowed(11.5)
    assert parallelism.limit == 8
    rate_after(parallelism, 32, 20.0)
    assert parallelism.limit == 32


def test_parallelism_does_not_judge_what_was_short_of_work() -> None:
    parallelism = Parallelism(32, first=8)
    for second in range(100):
        parallelism.landed(1, float(second))
        parallelism.idle()
    assert parallelism.limit == 8


def test_what_was_read_ahead_is_used_or_wasted_once() -> None:
    ledger, account = Ledger(), Account()
    for name in (b"used", b"left", b"failed"):
        ledger.fetched(name, 10, account)
    for _ in range(2):
        ledger.used(b"used")
        ledger.left(b"left")
        ledger.left(b"used")
        ledger.not_fetched(b"failed")
    assert (account.fetched_bytes, account.used_bytes, account.wasted_bytes) == (20, 10, 10)
    assert len(ledger) == 0


def test_an_account_is_wasteful_from_a_share_and_an_amount_on() -> None:
    assert not Account(fetched_bytes=20 * MIB, wasted_bytes=20 * MIB).is_wasteful
    assert Account(fetched_bytes=100 * MIB, wasted_bytes=40 * MIB).is_wasteful
    assert not Account(fetched_bytes=1000 * MIB, wasted_bytes=40 * MIB).is_wasteful


def test_what_was_wasted_counts_ever_less_as_epochs_pass() -> None:
    account = Account(fetched_bytes=100 * MIB, wasted_bytes=100 * MIB)
    account.epoch_began()
    assert account.is_wasteful, "50 MiB"
    account.epoch_began()
    assert not account.is_wasteful
    assert (account.fetched_bytes, account.wasted_bytes) == (100 * MIB, 100 * MIB), "shown as they are"
    account.wasted_bytes += 10 * MIB
    account.fetched_bytes += 10 * MIB
    assert account.is_wasteful


async def test_what_was_expected_of_files_that_were_replaced_makes_room(tmp_path: Path) -> None:
    """In the middle of an epoch of a set larger than the tier: nobody will use the old versions."""
    count, lake = 300, lake_of(300)
    async with reading(tmp_path, lake, tiers=(TierSpec("nvme0", 5 * MIB),)) as reader:
        files = await reader.folder()
        folder = reader.cache.names()["set"][0]
        for part in (count, count, count // 3):
            reader.now_s += 60
            await reader.read_all(shuffled(files, part + int(reader.now_s))[:part])
        new = bodies({f"set/{number:04}": SIZE for number in range(count)})
        lake.fill({key: b"anew" + body[4:] for key, body in new.items()})
        reader.cache.lister.relist_ahead(folder)
        await reader.settled()
        files = [inode for inode, _ in reader.cache.names(folder).values()]
        reader.now_s += 600
        for seed in range(2):
            before = lake.requests["get"]
            reader.now_s += 60
            await reader.read_all(shuffled(files, seed))
            await reader.settled()
        assert lake.requests["get"] - before < count / 2, "1 - C is 0.29"


async def test_a_set_that_nobody_reads_any_more_makes_room_for_another_also_without_read_ahead(
    tmp_path: Path,
) -> None:
    count = 200
    lake = WatchedLake()
    sizes = {f"{name}/{number:04}": SIZE for name in "ab" for number in range(count)}
    versions = lake.fill(bodies(sizes))
    tiers = (TierSpec("nvme0", (count + 13) * (SIZE + 4 * KIB)),)
    async with open_cache(tmp_path, lake, tiers=tiers, policy="epoch") as cache:

        async def epoch(name: str, seed: int) -> int:
            before = lake.requests["get"]
            for key in random.Random(seed).sample(sorted(versions), len(versions)):
                version = versions[key]
                if key.startswith(name) and cache.index.version(version.id) is not None:
                    cache.residency.used([version.id], 0.0)
                elif key.startswith(name):
                    await cache.fetch(version)
            return lake.requests["get"] - before

        for seed in range(3):
            await epoch("b", seed)
        missed = [await epoch("a", seed) for seed in range(6)]
        assert missed[-1] == 0, missed
