"""Residency under everything at once: disks and index that fail, cancellations, opens that come and go."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from cache.errors import CacheError, CacheFull, LakeUnavailable, SluiceError
from cache.exchange import Land
from cache.fetcher import Started, Wanted
from cache.index_writer import IndexWriter
from cache.model import BLOCK_BYTES, FETCH_BLOCKS, GROUP_BLOCKS, KIB, MIB, ObjectVersion, block_count
from cache.opens import OpenTable
from cache.policy.due import SOME_TIME, Next
from cache.records import block_checksums, group_key
from tests.residence import TIERS, check, rot, small_and_large
from tests.wiring import Cache, TierSpec, WatchedLake, bodies, open_cache

SEEDS = int(os.environ.get("SLUICE_MODEL_SEEDS", "3"))
STEPS = 25
BROKEN = ("land_whole", "land_blocks", "make_whole", "make_sparse", "copy_from", "link_whole", "hand_over")


class Trouble:
    """Random requests, several at once, of a cache whose parts fail now and then."""

    def __init__(
        self,
        cache: Cache,
        content: dict[str, bytes],
        versions: list[ObjectVersion],
        opens: OpenTable,
        seed: int,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        self._caplog = caplog
        self._cache = cache
        self._content = content
        self._versions = versions
        self._opens = opens
        self._random = random.Random(seed)
        self._dice = random.Random(seed)  # For threads.
        self._mutex = threading.Lock()
        self._serial = 0
        self._bad: set[bytes] = set()  # Versions with a bad block: their files may go while they are open.
        self._open: dict[int, tuple[ObjectVersion, str, int]] = {}  # Inode to version, and the file's number.
        self.is_quiet = False

    # Faults

    def breaks(self, share: float) -> bool:
        with self._mutex:
            return not self.is_quiet and self._dice.random() < share

    def break_parts(self, patch: pytest.MonkeyPatch) -> None:
        """Have file calls, transactions and GETs fail now and then."""
        for tier in self._cache.residency.tiers:
            for name in BROKEN:
                patch.setattr(tier.files, name, self._breaking(getattr(tier.files, name), name))
        write = self._cache.index.write

        @contextmanager
        def failing() -> Iterator[IndexWriter]:
            with write() as writer:
                yield writer
                if self.breaks(0.02):
                    raise CacheError("the index can't be written")

        patch.setattr(self._cache.index, "write", failing)

    def _breaking(self, call: Callable[..., object], name: str) -> Callable[..., object]:
        share = 0.3 if name in ("make_whole", "make_sparse") else 0.03

        def broken(*arguments: object) -> object:
            if self.breaks(share):
                raise CacheFull("no space left") if self.breaks(0.5) else CacheError("the disk is broken")
            return call(*arguments)

        return broken

    def lake_fault(self, verb: str, key: str) -> Exception | None:
        return LakeUnavailable("away") if verb == "get" and self.breaks(0.02) else None

    # Requests

    async def step(self) -> None:
        verbs: list[tuple[Callable[[ObjectVersion], Awaitable[None]], float]] = [
            (self._fetch, 10),
            (self._fetch_all, 2),
            (self._fetch_unasked, 3),
            (self._want, 2),
            (self._use, 3),
            (self._expect, 3),
            (self._drop, 1),
            (self._move, 2),
            (self._drain, 0.5),
            (self._open_or_close, 3),
            (self._adopt, 2),
            (self._hand_over, 0.5),
            (self._rot, 0.5),
        ]
        chosen = self._random.choices(*zip(*verbs, strict=True), k=self._random.randrange(1, 9))
        async with trio.open_nursery() as nursery:
            for verb in chosen:
                nursery.start_soon(self._run, verb, self._random.choice(self._versions))
        await self._cache.idle()

    async def _run(self, verb: Callable[[ObjectVersion], Awaitable[None]], version: ObjectVersion) -> None:
        try:
            if verb in (self._fetch, self._drop, self._move, self._drain) and self._random.random() < 0.3:
                with trio.move_on_after(self._random.random() * 0.004):
                    await verb(version)
            else:
                await verb(version)
        except SluiceError:
            pass

    async def _fetch(self, version: ObjectVersion) -> None:
        offset = self._random.randrange(version.size_bytes)
        length = min(self._random.choice([4096, MIB, 16 * MIB]), version.size_bytes - offset)
        await self._cache.fetcher.fetch(version, offset, length)

    async def _fetch_all(self, version: ObjectVersion) -> None:
        await self._cache.fetch(version)

    async def _fetch_unasked(self, version: ObjectVersion) -> None:
        done = trio.Event()
        next = Next(self._random.randrange(100))
        if self._cache.fetcher.fetch_ahead_nowait(version, next, lambda _: done.set()) is Started.UNDER_WAY:
            await done.wait()
        else:
            await self._cache.fetcher.fetch_ahead(version, next)

    async def _want(self, version: ObjectVersion) -> None:
        blocks = range(min(FETCH_BLOCKS, block_count(version.size_bytes)))
        await self._cache.fetcher.fetch_wanted(
            version, blocks, Wanted(self._random.choice(["", "nvme", "dram"]))
        )

    async def _use(self, version: ObjectVersion) -> None:
        item = version.id if version.size_bytes <= 8 * MIB else group_key(version.id, 0)
        self._cache.residency.used([version.id, item], 1.0)

    async def _expect(self, version: ObjectVersion) -> None:
        residency, number = self._cache.residency, self._random.randrange(4)
        if number < 2:
            residency.expect(version.id, [SOME_TIME, Next(self._random.randrange(100))][number])
        else:
            [residency.release, residency.hold][number - 2](version.id)
            residency.let_go(version.id)

    async def _drop(self, version: ObjectVersion) -> None:
        await self._cache.residency.drop_version(version.id)

    async def _move(self, version: ObjectVersion) -> None:
        await self._cache.residency.move(version.id, to_memory=self._random.random() < 0.7)

    async def _drain(self, _: ObjectVersion) -> None:
        async for _ in self._cache.residency.drain_dram():
            pass

    async def _rot(self, version: ObjectVersion) -> None:
        row = self._cache.index.version(version.id)
        if row is None or version.id in self._cache.residency.busy:
            return
        number, group = self._random.choice(self._cache.index.groups_of(version.id))
        self._bad.add(version.id)
        rot(self._cache, version, (number * GROUP_BLOCKS + group.present.bit_length() - 1) * BLOCK_BYTES)
        for _ in range(20):  # As each reader does who finds it.
            with suppress(CacheError):
                return await self._cache.residency.drop(version.id, number)

    async def _open_or_close(self, version: ObjectVersion) -> None:
        """As a worker does it: note, look at the index, register; and later take it back."""
        if self._open and self._random.random() < 0.5:
            self.close(self._random.choice(list(self._open)))
            return
        inode = 10 + self._versions.index(version)
        if inode in self._open:
            return
        self._opens.note_object(version.id, inode)
        with self._opens.held(inode) as held:
            held.opened()
            if not held.answered_with(lambda: self._register(inode, version), lambda _: None):
                held.closed()

    def _register(self, inode: int, version: ObjectVersion) -> int:
        row = self._cache.index.version(version.id)
        if row is None or not row.whole:
            return 0
        path = self._cache.residency.tiers[row.tier].files.object_path(version.id)
        self._open[inode] = (version, path, os.stat(path).st_ino)
        return inode

    def close(self, inode: int) -> None:
        del self._open[inode]
        with self._opens.held(inode) as held:
            held.closed()
            held.forget_backing()

    def close_all(self) -> None:
        for inode in list(self._open):
            self.close(inode)

    async def _adopt(self, version: ObjectVersion) -> None:
        """As `Uploading` does it, of a file with the very content that others may be fetching."""
        body = self._content[version.key]
        path = self._staging_file(body)
        is_still_it = self._random.random() < 0.8

        def commit(land: Land | None) -> bool:
            self._cache.committer.flush()
            if not is_still_it:
                return False
            change = land() if land is not None else None
            if change is not None:
                self._cache.committer.commit_now(change)
            return True

        try:
            await self._cache.residency.adopt_staged(version, path, block_checksums(body), commit)
        finally:
            os.unlink(path)

    async def _hand_over(self, version: ObjectVersion) -> None:
        path = self._staging_file(b"")
        self._bad.add(version.id)  # Its file goes from the tier while it is open.
        try:
            await self._cache.residency.hand_over(version.id, path, 0, 1, lambda w: None)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _staging_file(self, body: bytes) -> str:
        self._serial += 1
        path = self._cache.path / f"staging{self._serial}"
        path.write_bytes(body)
        return str(path)

    # What must hold

    async def check(self, *, bytes_too: bool) -> None:
        assert all(tier.landing_bytes == 0 for tier in self._cache.residency.tiers)
        await check(self._cache, self._content if bytes_too else None)
        for version, path, file in self._open.values():
            # Both its eviction's commit and the one that would take that back are the index's.
            told = "open files left the cache", "moved while it was opened"
            if version.id not in self._bad and not any(text in self._caplog.text for text in told):
                assert os.stat(path).st_ino == file, (version.key, "left, or moved, while it was open")


def larger_than_a_tier() -> dict[str, bytes]:
    return bodies({"larger": 50 * MIB + 17, "half": 15 * MIB, **{f"small{i}": 300 * KIB for i in range(9)}})


WORLDS = {
    "three tiers": (TIERS, small_and_large),
    "objects larger than a tier": (
        (TierSpec("dram", 32 * MIB, is_memory=True), TierSpec("nvme", 24 * MIB)),
        larger_than_a_tier,
    ),
}


async def fetch_at_last(cache: Cache, version: ObjectVersion) -> None:
    """A reader waits two seconds for room at most, and what a slow disk is still writing can't leave."""
    while True:
        with suppress(CacheFull):
            await cache.fetcher.fetch(version, 0, 1)
            return


@pytest.mark.parametrize("policy", ["lru", "epoch"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_what_is_charged_is_there_whatever_fails(
    tmp_path: Path,
    seed: int,
    world: str,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiers, make_content = WORLDS[world]
    lake, content, opens = WatchedLake(), make_content(), OpenTable()
    versions = list(lake.fill(content).values())
    passes = seed % 2 == 1
    async with open_cache(
        tmp_path, lake, tiers=tiers, policy=policy, opens=opens, passes_disks=passes
    ) as cache:
        cache.nursery.start_soon(cache.residency.keep_dram_room)
        trouble = Trouble(cache, content, versions, opens, seed, caplog)
        lake.fault = trouble.lake_fault
        with monkeypatch.context() as patch:
            trouble.break_parts(patch)
            for number in range(STEPS):
                await trouble.step()
                trouble.is_quiet = True
                await trouble.check(bytes_too=number % 10 == 9)
                trouble.is_quiet = False
            trouble.is_quiet = True
        trouble.close_all()
        for version in versions:  # Nothing is refused for ever.
            with trio.fail_after(60):
                await fetch_at_last(cache, version)
        await cache.idle()
        await check(cache, content)
