"""The write path with its uploader over a lake, driven as a worker drives it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from cache import messages
from cache.dispatching import UploadConfig
from cache.errors import LakeError, ObjectMissing
from cache.lake.base import Lake
from cache.model import MIB, ROOT_INODE, Inode
from cache.policy.writeback import Backoff
from cache.uploader import Uploader
from tests.wiring import Cache, Shared, TierSpec, open_cache

QUICK = UploadConfig(
    delay_s=0.0, open_delay_s=0.0, threads=4, cache_id="c1", backoff=Backoff(first_s=0.001, longest_s=0.01)
)
_WAIT_S = 40.0


@dataclass
class Mount:
    """What a worker and its processes would do, one call each."""

    cache: Cache
    lake: Any

    @property
    def uploader(self) -> Uploader:
        assert self.cache.uploader is not None
        return self.cache.uploader

    @property
    def shared(self) -> Shared:
        assert self.cache.shared is not None
        return self.cache.shared

    async def apply(self, request: messages.Change) -> int:
        assert self.cache.writing is not None
        return (await self.cache.writing.changes.apply(request, 0)).value

    async def inode(self, path: str) -> int:
        inode: int = ROOT_INODE
        for part in filter(None, path.split("/")):
            assert await self.cache.lister.lookup(Inode(inode), part.encode()), path
            found = self.cache.index.child(inode, part.encode())
            assert found is not None, path
            inode = found[0]
        return inode

    async def shows(self, path: str) -> bool:
        parent, name = os.path.split(path)
        return await self.cache.lister.lookup(Inode(await self.inode(parent)), name.encode())

    async def create(self, path: str) -> int:
        """Make a file and leave it open for writing."""
        parent, name = os.path.split(path)
        inode = await self.apply(messages.Create(await self.inode(parent), name.encode(), 0o644, 7, 8))
        self.shared.opens.opened(inode, writing=True)
        return inode

    async def open(self, path: str, keep_bytes: int = -1) -> int:
        assert self.cache.writing is not None
        inode = await self.inode(path)
        self.shared.opens.opened(inode, writing=True)
        await self.cache.writing.changes.stage(inode, keep_bytes)
        return inode

    def write(self, inode: int, body: bytes, offset: int = 0) -> None:
        node = self.cache.index.node(inode)
        assert node is not None and node.staged and self.cache.writing is not None
        with open(self.cache.writing.ledger.staging.path(node.staged), "r+b") as file:
            file.seek(offset)
            file.write(body)

    async def close(self, inode: int) -> None:
        assert self.cache.writing is not None
        self.shared.opens.closed(inode, writing=True)
        await self.cache.writing.changes.closed(inode)

    async def put(self, path: str, body: bytes) -> int:
        inode = await self.create(path)
        self.write(inode, body)
        await self.close(inode)
        return inode

    async def replace(self, path: str, body: bytes) -> int:
        inode = await self.open(path, 0)
        self.write(inode, body)
        await self.close(inode)
        return inode

    async def mkdir(self, path: str) -> int:
        parent, name = os.path.split(path)
        return await self.apply(messages.MakeDirectory(await self.inode(parent), name.encode(), 0o755, 7, 8))

    async def rename(self, old: str, new: str, flags: int = 0) -> None:
        (parent, name), (new_parent, new_name) = os.path.split(old), os.path.split(new)
        places = await self.inode(parent), name.encode(), await self.inode(new_parent), new_name.encode()
        await self.apply(messages.Rename(*places, flags))

    async def unlink(self, path: str) -> None:
        parent, name = os.path.split(path)
        await self.apply(messages.Unlink(await self.inode(parent), name.encode()))

    async def rmdir(self, path: str) -> None:
        parent, name = os.path.split(path)
        await self.apply(messages.RemoveDirectory(await self.inode(parent), name.encode()))

    async def read(self, path: str) -> bytes:
        """Return the content as the mount shows it, from the staging file, the cache or the lake."""
        inode = await self.inode(path)
        node = self.cache.index.node(inode)
        assert node is not None
        if node.staged:
            assert self.cache.writing is not None
            return _read_file(self.cache.writing.ledger.staging.path(node.staged))
        row = self.cache.index.version(node.vid)
        if row is not None and row.whole:
            return _read_file(self.cache.residency.tiers[row.tier].files.object_path(node.vid))
        info = self.lake.head(os.fsdecode(self.cache.index.key_of(inode)))
        assert (info.version.etag, info.version.size_bytes) == (node.etag, node.size_bytes), path
        return content(self.lake, info.version.key)

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(_WAIT_S):
            while not condition():
                with trio.move_on_after(0.05):
                    await self.uploader._dispatcher.moved_on.wait()

    async def drain(self) -> None:
        with trio.fail_after(_WAIT_S):
            await self.uploader.drain()

    def staged_numbers(self) -> list[int]:
        assert self.cache.writing is not None
        return self.cache.writing.ledger.staging.numbers()


@asynccontextmanager
async def mounted(
    path: Path,
    lake: Lake,
    config: UploadConfig = QUICK,
    *,
    shared: Shared | None = None,
    first: bool = True,
    tier_bytes: int = 256 * MIB,
    **options: Any,
) -> AsyncIterator[Mount]:
    tiers = (TierSpec("nvme0", tier_bytes),)
    async with open_cache(
        path,
        lake,  # type: ignore[arg-type]
        tiers=tiers,
        writable=True,
        upload=config,
        shared=shared,
        first=first,
        ttl_s=options.pop("ttl_s", 3600.0),
        **options,
    ) as cache:
        yield Mount(cache, lake)


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def content(lake: Lake, key: str) -> bytes:
    version = lake.head(key).version
    return bytes(lake.get_range(version, 0, version.size_bytes)) if version.size_bytes else b""


def keys(lake: Lake) -> list[str]:
    """Return all keys, in order."""
    found: list[str] = []
    token: str | None = None
    while True:
        page = lake.list_page("", delimiter=False, token=token)
        found += [info.version.key for info in page.objects]
        token = page.next_token
        if token is None:
            return sorted(found)


def is_missing(lake: Lake, key: str) -> bool:
    try:
        lake.head(key)
    except ObjectMissing:
        return True
    return False


class Faults:
    """For `FakeLake.fault`: fails what is asked for, so many times."""

    def __init__(self, **times: int) -> None:
        self.times = times
        self.error: Callable[[str], LakeError] = LakeError

    def __call__(self, verb: str, key: str) -> LakeError | None:
        if self.times.get(verb, 0) <= 0:
            return None
        self.times[verb] -= 1
        return self.error(key)
