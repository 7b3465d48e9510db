"""Reads of what the cache has: where the bytes are, and what happens when they go elsewhere meanwhile."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from cache import messages
from cache.counters import Counters
from cache.messages import Answer
from cache.model import BLOCK_BYTES, GROUP_BYTES, KIND_FILE, MIB, ROOT_INODE, Inode, ObjectVersion
from cache.policy.freshness import Freshness
from cache.records import Node, block_checksums
from fusefs.filesystem import WAITED_BIT, Filesystem
from fusefs.namespace import Namespace
from tests.wiring import Cache, TierSpec, WatchedLake, bodies, open_cache

TIERS = (TierSpec("dram", 64 * MIB, is_memory=True), TierSpec("nvme0", 64 * MIB))


@dataclass
class Reads:
    """A worker's file system over a cache, and what it asked the mover for."""

    cache: Cache
    filesystem: Filesystem
    counters: Counters
    content: dict[str, bytes]
    versions: dict[str, ObjectVersion]
    asked: list[messages.Request] = field(default_factory=list)
    inodes: dict[str, Inode] = field(default_factory=dict)

    async def ask(self, request: messages.Request, id: int = 0) -> Answer:
        self.asked.append(request)
        assert isinstance(request, messages.Fetch)
        name = next(name for name, inode in self.inodes.items() if inode == request.inode)
        await self.cache.fetcher.fetch(self.versions[name], request.offset, request.length)
        return Answer(0)

    def tell(self, message: Any) -> None:
        pass


@asynccontextmanager
async def reads(path: Path, sizes: dict[str, int]) -> AsyncIterator[Reads]:
    lake, content = WatchedLake(), bodies(sizes)
    versions = lake.fill(content)
    async with open_cache(path, lake, tiers=TIERS) as cache:
        counters = Counters(1)
        made = Reads(cache, None, counters, content, versions)  # type: ignore[arg-type]
        mover: Any = made
        tiers = [tier.files for tier in cache.residency.tiers]
        namespace = Namespace(cache.index, mover, Freshness(60.0, False))
        made.filesystem = Filesystem(cache.index, tiers, mover, namespace, counters.row(0), no_open=True)
        with cache.index.write() as w:
            for name, version in versions.items():
                node = Node(
                    ROOT_INODE, name.encode(), KIND_FILE, version.size_bytes, 7, version.etag, version.id
                )
                made.inodes[name] = w.attach(node)
        yield made


async def test_a_hit_names_the_blocks_that_hold_what_is_asked_for(tmp_path: Path) -> None:
    sizes = {"small": 110_000, "tiny": 1, "large": 2 * GROUP_BYTES + 5000}
    async with reads(tmp_path, sizes) as made:
        for version in made.versions.values():
            await made.cache.fetch(version)
        roll = random.Random(46)
        for _ in range(200):
            name = roll.choice(list(sizes))
            offset, length = roll.randrange(sizes[name]), roll.choice([1, 4096, 131_072, MIB])
            hit = made.filesystem.hit(made.inodes[name], offset, length)
            assert hit is not None and hit.start <= offset and hit.start % BLOCK_BYTES == 0
            assert hit.length == min(length, sizes[name] - offset) and offset + hit.length <= hit.end
            blocks = (await trio.Path(hit.path).read_bytes())[hit.start : hit.end]
            assert hit.checksums.tolist() == block_checksums(blocks)
            wanted = made.content[name][offset : offset + hit.length]
            assert blocks[offset - hit.start :][: hit.length] == wanted
            assert await made.filesystem.read(made.inodes[name], offset, length) == wanted
        assert made.asked == []


async def test_what_is_not_all_there_is_no_hit(tmp_path: Path) -> None:
    async with reads(tmp_path, {"small": 110_000, "large": 20 * MIB}) as made:
        small, large = made.inodes["small"], made.inodes["large"]
        assert made.filesystem.hit(small, 0, 10) is None
        await made.cache.fetcher.fetch(made.versions["large"], 0, MIB)
        await made.cache.idle()
        there = made.cache.residency.present_bytes(made.versions["large"].id)
        assert made.filesystem.hit(large, there - 10, 10) is not None
        assert made.filesystem.hit(large, there - 10, 11) is None
        assert made.filesystem.hit(large, 20 * MIB, 10) is None  # Behind the end.
        assert made.filesystem.hit(large, 0, 0) is None
        assert made.filesystem.hit(999, 0, 10) is None


async def test_a_hit_is_counted_as_a_read_is(tmp_path: Path) -> None:
    async with reads(tmp_path, {"small": 110_000}) as made:
        await made.cache.fetch(made.versions["small"])
        inode = made.inodes["small"]
        for handle, name in ((inode, "bytes_dram"), (inode | WAITED_BIT, "bytes_lake")):
            before = made.counters.total(name)
            hit = made.filesystem.hit(handle, 0, 131_072)
            assert hit is not None
            made.filesystem.note_hit(hit)
            assert made.counters.total(name) == before + 110_000
            await made.filesystem.read(handle, 0, 131_072)
            assert made.counters.total(name) == before + 220_000
        assert made.counters.total("reads") == 4


async def test_a_file_that_moves_while_it_is_read_is_no_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reads(tmp_path, {"small": 110_000}) as made:
        version = made.versions["small"]
        await made.cache.fetch(version)
        pread = made.filesystem._pread

        async def after_a_move(*arguments: Any) -> Any:
            await made.cache.residency.move(version.id, to_memory=False)
            return await pread(*arguments)

        monkeypatch.setattr(made.filesystem, "_pread", after_a_move)
        assert await made.filesystem.read(made.inodes["small"], 0, 131_072) == made.content["small"]
        assert made.asked == [] and made.counters.total("bytes_nvme") == 110_000
        assert made.counters.total("waits") == made.counters.total("bytes_lake") == 0
