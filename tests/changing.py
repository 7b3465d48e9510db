"""Changes through `cache.changes.Changes`, by path, as a worker would ask for them; no FUSE."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from cache import messages
from cache.errors import ObjectChanged, ObjectMissing
from cache.messages import Answer
from cache.model import ROOT_INODE, Inode, ObjectVersion
from cache.pending import Local, Pending, Put
from cache.records import Node
from tests.wiring import Cache, WatchedDirectory

UID, GID = 7, 8


class Files:
    """A user of the mount. Paths are like "a/b"."""

    def __init__(self, cache: Cache) -> None:
        assert cache.writing is not None and cache.shared is not None
        self.cache = cache
        self.changes = cache.writing.changes
        self.opens = cache.shared.opens
        self.staging = cache.writing.ledger.staging
        # Behind the ids of an earlier mover of the same mount.
        self._id = max(cache.index.answer_ids(), default=0)

    async def apply(self, request: messages.Change) -> Answer:
        self._id += 2
        return await self.changes.apply(request, self._id)

    async def find(self, path: str) -> Inode:
        """Return the inode. Raises KeyError."""
        inode = ROOT_INODE
        for name in filter(None, path.split("/")):
            await self.cache.lister.lookup(inode, name.encode())
            found = self.cache.index.child(inode, name.encode())
            if found is None:
                raise KeyError(path)
            inode = found[0]
        return inode

    async def node(self, path: str) -> Node:
        node = self.cache.index.node(await self.find(path))
        assert node is not None
        return node

    async def place(self, path: str) -> tuple[Inode, bytes]:
        above, _, name = path.rpartition("/")
        return await self.find(above), name.encode()

    # Verbs

    async def create(self, path: str, body: bytes = b"") -> Inode:
        """Make a file, write *body* and close it."""
        inode = await self.create_open(path)
        self.write_open(inode, body)
        await self.close(inode)
        return inode

    async def create_open(self, path: str, mode: int = 0o644) -> Inode:
        request = messages.Create(*await self.place(path), mode | stat.S_IFREG, UID, GID)
        inode = Inode((await self.apply(request)).value)
        self.opens.opened(inode, writing=True)
        return inode

    def write_open(self, inode: Inode, body: bytes) -> None:
        node = self.cache.index.node(inode)
        assert node is not None and node.staged
        with open(self.staging.path(node.staged), "wb") as file:
            file.write(body)

    def content(self, number: int) -> bytes:
        with open(self.staging.path(number), "rb") as file:
            return file.read()

    async def close(self, inode: Inode) -> None:
        state = self.opens.closed(inode, writing=True)
        if not state.may_be_written:
            await self.changes.closed(inode)

    async def write(self, path: str, body: bytes) -> Inode:
        """Open with O_TRUNC, write and close."""
        inode = await self.find(path)
        self.opens.opened(inode, writing=True)
        await self.changes.stage(inode, 0)
        self.write_open(inode, body)
        await self.close(inode)
        return inode

    async def append(self, path: str, more: bytes) -> None:
        inode = await self.find(path)
        self.opens.opened(inode, writing=True)
        number = await self.changes.stage(inode, -1)
        self.write_open(inode, self.content(number) + more)
        await self.close(inode)

    async def mkdir(self, path: str, mode: int = 0o755) -> Inode:
        request = messages.MakeDirectory(*await self.place(path), mode, UID, GID)
        return Inode((await self.apply(request)).value)

    async def symlink(self, path: str, target: bytes) -> Inode:
        request = messages.MakeSymlink(*await self.place(path), target, UID, GID)
        return Inode((await self.apply(request)).value)

    async def mknod(self, path: str, mode: int) -> Inode:
        request = messages.MakeNode(*await self.place(path), mode, 0, UID, GID)
        return Inode((await self.apply(request)).value)

    async def unlink(self, path: str) -> None:
        await self.apply(messages.Unlink(*await self.place(path)))

    async def rmdir(self, path: str) -> None:
        await self.apply(messages.RemoveDirectory(*await self.place(path)))

    async def rename(self, old: str, new: str, flags: int = 0) -> None:
        await self.apply(messages.Rename(*await self.place(old), *await self.place(new), flags))

    @contextmanager
    def opened(self, inode: Inode) -> Iterator[None]:
        """Have the file open for reading; the caller calls `changes.closed` if it is gone by then."""
        self.opens.opened(inode)
        try:
            yield
        finally:
            self.opens.closed(inode)

    async def swept(self) -> None:
        """Return once the staging files that no row names any more are unlinked."""
        assert self.cache.writing is not None
        for _ in range(2):  # The second time comes after what the first one leaves to be unlinked.
            await self.cache.writing.keeper.settled()

    # What there is

    async def read(self, path: str) -> bytes:
        return await self.read_inode(await self.find(path))

    async def read_inode(self, inode: Inode) -> bytes:
        node = self.cache.index.node(inode)
        assert node is not None, inode
        if node.attributes is not None and stat.S_ISLNK(node.kind) and not node.etag:
            return node.attributes.target
        if node.staged:
            return self.content(node.staged)
        if not node.size_bytes:
            return b""
        key = os.fsdecode(self.cache.index.key_of(inode))
        version = ObjectVersion(key, node.etag, node.size_bytes)
        try:
            return bytes(await self.cache.fetcher.read_through(version, 0, node.size_bytes))
        except (ObjectMissing, ObjectChanged):
            if self.cache.index.node(inode) == node and os.fsdecode(self.cache.index.key_of(inode)) == key:
                raise
            return await self.read_inode(inode)  # It has been moved meanwhile.

    async def tree(self, below: str = "") -> dict[str, bytes | None]:
        """Return every path with its content; None for directories."""
        found: dict[str, bytes | None] = {}
        inode = await self.find(below)
        await self.cache.lister.list_directory(inode)
        for name, (child, node) in self.cache.names(inode).items():
            path = f"{below}/{name}" if below else name
            if node.is_directory:
                found[path] = None
                found |= await self.tree(path)
            else:
                found[path] = await self.read_inode(child)
        return found

    def rows(self) -> list[Pending]:
        """Return the pending rows in their order; they are what the index says too."""
        table = self.cache.table
        packed = dict(self.cache.index.pending_rows())
        assert packed.keys() == table.rows.keys()
        return [table.rows[seq] for seq in sorted(table.rows)]

    def paths(self, kind: type[Put] | type[Local] = Put) -> list[bytes]:
        return [row.path for row in self.rows() if isinstance(row, kind)]

    def staged(self) -> list[int]:
        return self.staging.numbers()


def objects(cache: Cache) -> dict[str, bytes]:
    """Return all keys of the lake with their bodies."""
    if isinstance(cache.lake, WatchedDirectory):
        return cache.lake.objects()
    return {key: stored.body for key, stored in sorted(cache.lake._objects.items())}
