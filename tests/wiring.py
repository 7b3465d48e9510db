"""The mover's parts over a temporary directory and a fake lake, wired as `cache/mover.py` does it."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import trio

from cache.committer import Committer
from cache.config import LakeConfig
from cache.counters import Counters, Features, WriteBudget
from cache.dispatching import UploadConfig
from cache.engine import Engine
from cache.errors import LakeError
from cache.fetcher import Fetcher
from cache.index import Index
from cache.journaling import JournalKeeper
from cache.lake.base import ListPage
from cache.lake.directory import DirectoryLake
from cache.lake.fake import FakeLake
from cache.lake_io import LakeIO
from cache.lister import Lister
from cache.listing import Changed
from cache.model import MIB, ROOT_INODE, Inode, ObjectInfo, ObjectVersion
from cache.mover import open_index
from cache.opens import OpenTable
from cache.passed_names import PassedNames
from cache.pending import PendingTable
from cache.places import Tier
from cache.policy.freshness import Freshness
from cache.policy.policies import make_policy
from cache.policy.readahead import SequentialReadAhead
from cache.policy.retry import RetryPolicy
from cache.quick import QuickFills
from cache.records import Node
from cache.residency import Residency
from cache.restore import restore
from cache.tier import TierBudget, TierFiles
from cache.uploader import Uploader
from cache.write_path import Ledger, WritePath, load_table, make_write_path, open_ledger, tell_workers_by

_WAIT_S = 30.0  # A test that waits for what never happens fails instead of hanging.
QUICK_RETRY = RetryPolicy(budget_s=20.0, first_s=0.001, longest_s=0.002, slow_down_first_s=0.001)
NO_RETRY = RetryPolicy(budget_s=0.0)


class Arrivals:
    """Counts requests as they come in, for tests that wait for them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._arrival = threading.Condition()

    def note(self, verb: str) -> None:
        with self._arrival:
            self.counts[verb] += 1
            self._arrival.notify_all()

    async def met(self, verb: str, times: int) -> None:
        def wait() -> bool:
            with self._arrival:
                return self._arrival.wait_for(lambda: self.counts[verb] >= times, _WAIT_S)

        assert await trio.to_thread.run_sync(wait), f"never {times} requests of {verb}"


class WatchedLake(FakeLake):
    """A fake lake whose requests can be waited for, and whose pages can be made short."""

    def __init__(self, page_keys: int = 1000) -> None:
        super().__init__()
        self.page_keys = page_keys
        self.listed: list[str] = []  # The prefixes of all list requests, in order.
        self.arrivals = Arrivals()

    def list_page(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        keys_max: int = 1000,
    ) -> ListPage:
        self.listed.append(prefix)
        keys_max = min(keys_max, self.page_keys)
        return super().list_page(
            prefix, delimiter=delimiter, token=token, start_after=start_after, keys_max=keys_max
        )

    def _meet(self, verb: str, key: str) -> bool:
        self.arrivals.note(verb)
        return super()._meet(verb, key)

    async def met(self, verb: str, times: int = 1) -> None:
        """Return once so many requests of *verb* have come in, held at their gate or not."""
        await self.arrivals.met(verb, times)

    def hold(self, verb: str) -> threading.Event:
        """Hold the requests of *verb* from now on; set the event to let them go."""
        gate = self.gates[verb] = threading.Event()
        return gate


class WatchedDirectory(DirectoryLake):
    """A directory lake whose changes can be held: see `FakeLake.gates`."""

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        super().__init__(LakeConfig(str(path)))
        self.path = path
        self.gates: dict[str, threading.Event] = {}
        self.arrivals = Arrivals()

    async def met(self, verb: str, times: int = 1) -> None:
        """As `WatchedLake.met`."""
        await self.arrivals.met(verb, times)

    def hold(self, verb: str) -> threading.Event:
        """As `WatchedLake.hold`."""
        gate = self.gates[verb] = threading.Event()
        return gate

    def put(self, *args: Any, **options: Any) -> ObjectInfo:
        self._meet("put")
        return super().put(*args, **options)

    def copy(self, *args: Any, **options: Any) -> ObjectInfo:
        self._meet("copy")
        return super().copy(*args, **options)

    def delete_many(self, keys: Iterable[str]) -> dict[str, LakeError]:
        self._meet("delete")
        return super().delete_many(keys)

    def _meet(self, verb: str) -> None:
        self.arrivals.note(verb)
        if (gate := self.gates.get(verb)) is not None:
            assert gate.wait(_WAIT_S)

    def fill(self, objects: Mapping[str, bytes]) -> None:
        for key, body in objects.items():
            super().put(key, body)

    def objects(self) -> dict[str, bytes]:
        """Return all keys with their bodies; those of directories end in "/"."""
        found: dict[str, bytes] = {}
        for path in self.path.rglob("*"):
            key = str(path.relative_to(self.path))
            if not key.startswith(".sluice-lake"):
                found |= {f"{key}/": b""} if path.is_dir() else {key: path.read_bytes()}
        return dict(sorted(found.items()))


# Lakes of both kinds, by what they are: in a directory lake directories are there by themselves.
LAKES: dict[str, Callable[[Path], WatchedLake | WatchedDirectory]] = {
    "bucket": lambda _: WatchedLake(),
    "directory": WatchedDirectory,
}


@dataclass(frozen=True)
class Shared:
    counters: Counters
    opens: OpenTable
    budget: WriteBudget
    features: Features
    passed_names: PassedNames

    @classmethod
    def make(cls) -> Shared:
        return cls(Counters(2), OpenTable(), WriteBudget(), Features(), PassedNames())


class NoSender:
    """Sends nothing: a stand-in for the uploader."""

    dirty_bytes = 0

    def wake(self) -> None:
        pass

    def renamed(self, parent: int, name: bytes) -> None:
        pass

    async def wait_for(self, inode: int) -> None:
        pass


@dataclass(frozen=True)
class TierSpec:
    name: str
    size_bytes: int
    is_memory: bool = False
    free_min_bytes: int = 0


@dataclass
class Cache:
    """Everything that `cache.mover.Mover` is made of, and the tests' views of it."""

    path: Path
    lake: FakeLake
    lake_io: LakeIO
    index: Index
    committer: Committer
    residency: Residency
    fetcher: Fetcher
    lister: Lister
    lake_engine: Engine
    disk_engine: Engine
    nursery: trio.Nursery
    changes: trio.MemoryReceiveChannel[Changed]
    table: PendingTable
    writing: WritePath | None = None  # Both with *writable* only; the uploader with *upload*.
    uploader: Uploader | None = None
    shared: Shared | None = None

    async def fetch(self, version: ObjectVersion) -> None:
        """Make all of *version* resident."""
        await self.fetcher.fetch(version, 0, version.size_bytes)

    async def idle(self) -> None:
        """Return once no flight is under way, and none is to come."""
        while self.fetcher._flights or self.fetcher._being_fetched:
            flights = list(self.fetcher._flights.values())
            if flights:
                await flights[0][0].landed.wait()
            else:
                await trio.lowlevel.checkpoint()

    def resident_bytes(self, version: ObjectVersion) -> bytes | None:
        """Return the cached bytes of a whole version as its file holds them; None if it is not whole."""
        row = self.index.version(version.id)
        if row is None or not row.whole:
            return None
        return Path(self.residency.tiers[row.tier].files.object_path(version.id)).read_bytes()

    def cached_bytes(self, version: ObjectVersion, offset: int, length: int) -> bytes:
        """Return what the version's file holds there, whole or sparse, holes included."""
        row = self.index.version(version.id)
        assert row is not None, version
        files = self.residency.tiers[row.tier].files
        try:
            body = Path(files.file_path(version.id, whole=row.whole)).read_bytes()
        except FileNotFoundError:
            assert not row.whole, version
            body = Path(files.object_path(version.id)).read_bytes()  # Made whole, not committed yet.
        return body[offset : offset + length]

    def names(self, inode: Inode = ROOT_INODE) -> dict[str, tuple[Inode, Node]]:
        """Return what the index shows in a directory."""
        return {node.name.decode(): (child, node) for child, node in self.index.children(inode, b"", 10**6)}

    def told(self) -> list[tuple[int, bytes]]:
        """Return the entries told as changed since the last call."""
        entries: list[tuple[int, bytes]] = []
        while True:
            try:
                entries += self.changes.receive_nowait()
            except trio.WouldBlock:
                return entries


def make_tier(path: Path, spec: TierSpec, policy: str) -> Tier:
    files = TierFiles(spec.name, path / spec.name, is_memory=spec.is_memory)
    return Tier(files, TierBudget(spec.size_bytes), make_policy(policy), spec.free_min_bytes)


@asynccontextmanager
async def open_cache(
    path: Path,
    lake: FakeLake,
    *,
    tiers: tuple[TierSpec, ...] = (TierSpec("nvme0", 256 * MIB),),
    policy: str = "lru",
    ttl_s: float = 3600.0,
    immutable: bool = False,
    retry: RetryPolicy = QUICK_RETRY,
    window_bytes_max: int = 16 * MIB,
    ahead_flights_max: int = 4,
    with_tiers: bool = True,
    writable: bool = False,
    upload: UploadConfig | None = None,
    shared: Shared | None = None,
    dirty_max: int = 1 << 40,
    first: bool = True,
    lake_threads: int = 6,
    opens: OpenTable | None = None,
    passes_disks: bool = False,
) -> AsyncIterator[Cache]:
    """Open, restore and wire everything; on the way out stop it without saving anything: a crash.

    Without *with_tiers* their directories are not made: for tests that fetch nothing. *writable*: with
    journal, staging files and changes, and with *upload* the uploader too. *first*: a mount, not
    another mover of it; then give the mount's *shared* memory.
    """
    lake_engine, disk_engine = Engine("lake", lake_threads, reserved=1), Engine("disk", 3, reserved=1)
    index = open_index(path, may_rebuild=True)
    table = PendingTable()
    committer = Committer(index, partial(load_table, table, index))
    with index.write() as writer:
        writer.add_root()
        if first:
            writer.sweep_detached()
            writer.clear_answers()
    send, receive = trio.open_memory_channel[Changed](1000)
    lake_io = LakeIO(lake, lake_engine, retry, seed=1)
    made = [make_tier(path, spec, policy) for spec in tiers]
    if writable:
        shared = shared or Shared.make()
        opens = shared.opens
        tell_workers_by(shared, committer)
    residency = Residency(made, index, committer, lake_engine, disk_engine, opens, lambda: passes_disks)
    ledger = open_ledger(path, "test", index, table, first=first) if writable else None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            readahead = SequentialReadAhead(window_bytes_max)
            quick = QuickFills(residency, committer, lake_engine)
            fetcher = Fetcher(nursery, lake_io, index, residency, readahead, ahead_flights_max, quick)
            lister = Lister(nursery, lake_io, index, committer, Freshness(ttl_s, immutable), send, table)
            if with_tiers:
                await restore(residency, index, committer, disk_engine)
            parts = (lake, lake_io, index, committer, residency, fetcher, lister, lake_engine, disk_engine)
            cache = Cache(path, *parts, nursery, receive, table)
            if ledger is not None:
                assert shared is not None
                _make_writable(cache, ledger, upload, shared, dirty_max)
            yield cache
            nursery.cancel_scope.cancel()
    finally:
        lake_engine.stop()
        disk_engine.stop()
        if ledger is not None:
            ledger.close()
        index.close()
        for channel in (send, receive):
            channel.close()


async def requests_carried_out(cache: Cache) -> None:
    """Return once the lake has carried out what *cache*, which is closed, was still asking of it.

    What a killed process had asked for may be carried out late in the product too, after what the next
    one asks for: ARCHITECTURE says so ("Where it could break"), and no test asks for more.
    """

    def join() -> None:
        for thread in cache.lake_engine._workers:
            thread.join(_WAIT_S)
            assert not thread.is_alive(), f"{thread.name} does not end"

    await trio.to_thread.run_sync(join)


def _make_writable(
    cache: Cache, ledger: Ledger, upload: UploadConfig | None, shared: Shared, dirty_max: int
) -> None:
    keeper = JournalKeeper(cache.table, ledger.journal, ledger.staging, cache.disk_engine, gather_s=0.001)
    if upload is not None:
        cache.uploader = Uploader(
            cache.nursery,
            cache.lake_io,
            cache.index,
            cache.committer,
            cache.table,
            ledger.staging,
            cache.residency,
            shared.opens,
            keeper,
            upload,
            cache.lister.refresh_entry,
        )
    cache.writing = make_write_path(
        cache.nursery,
        ledger,
        cache.index,
        cache.committer,
        cache.residency,
        cache.fetcher,
        cache.lister,
        keeper,
        cache.uploader or NoSender(),
        cache.disk_engine,
        shared,
        dirty_max,
        (1000, 1000),
    )
    cache.shared = shared
    cache.writing.start(cache.nursery)
    if cache.uploader is not None:
        cache.nursery.start_soon(cache.uploader.run)


def bodies(sizes: Mapping[str, int]) -> dict[str, bytes]:
    """Return a random body for each key, of the sizes asked for. The same for the same sizes."""
    return {key: _body(key, size) for key, size in sizes.items()}


@lru_cache(100)
def _body(key: str, size_bytes: int) -> bytes:
    return random.Random(f"{key} {size_bytes}").randbytes(size_bytes)
