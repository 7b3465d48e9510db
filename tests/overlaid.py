"""A mount whose listings are laid under what is pending: for the tests of the overlay."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial

import msgspec
import pytest

from cache.index_writer import IndexWriter
from cache.model import (
    KIND_DIRECTORY,
    KIND_FILE,
    ROOT_INODE,
    Inode,
    ObjectVersion,
)
from cache.pending import SEALED, Delete, Mark, Move, Put
from cache.records import Attributes, Node
from tests import wiring
from tests.test_36_lister import expire, list_names
from tests.wiring import Cache, WatchedLake

open_cache = partial(wiring.open_cache, with_tiers=False)

ATTRIBUTES = Attributes(0o600, 1, 2, 3)


replace = msgspec.structs.replace


class Mount:
    """Changes as the mount makes them: rows and nodes in one transaction."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.table = cache.table

    async def commit(self, change: Callable[[IndexWriter], object]) -> None:
        await self.cache.committer.commit(change)

    async def put(self, name: bytes, parent: int = ROOT_INODE, path: bytes = b"") -> int:
        """Write a file; return the number of its row."""
        path = path or name

        def change(w: IndexWriter) -> int:
            node = Node(parent, name, KIND_FILE, 3, 5, staged=9, attributes=ATTRIBUTES)
            inode = w.attach(node)
            return self.table.add(w, Put(path, inode, KIND_FILE, 9, "", ATTRIBUTES, SEALED, 3))

        return await self.cache.committer.commit(change)

    async def uploaded(self, seq: int, etag: str = '"new"') -> None:
        """Have the lake acknowledge a Put."""
        row = self.table.rows[seq]

        def change(w: IndexWriter) -> None:
            node = w.node(row.inode)
            assert node is not None
            vid = ObjectVersion(os.fsdecode(row.key), etag, 3).id
            w.put_node(row.inode, replace(node, staged=0, etag=etag, size_bytes=3, vid=vid))
            self.table.remove(w, seq)

        await self.commit(change)

    async def unlink(self, name: bytes, key: bytes = b"") -> int:
        def change(w: IndexWriter) -> int:
            w.detach(ROOT_INODE, name)
            return self.table.add(w, Delete(key or name))

        return await self.cache.committer.commit(change)

    async def done(self, seq: int) -> None:
        await self.commit(lambda w: self.table.remove(w, seq))

    async def mkdir(self, name: bytes) -> tuple[Inode, int]:
        def change(w: IndexWriter) -> tuple[Inode, int]:
            inode = w.attach(Node(ROOT_INODE, name, KIND_DIRECTORY))
            return inode, self.table.add(w, Mark(name, inode))

        return await self.cache.committer.commit(change)

    async def rename(self, name: bytes, new_name: bytes) -> int:
        """Rename what the lake has."""

        def change(w: IndexWriter) -> int:
            found = w.child(ROOT_INODE, name)
            assert found is not None
            inode, node = found
            key = w.key_of(inode) + (b"/" if node.is_directory else b"")
            w.move(inode, replace(node, name=new_name, origin=key))
            return self.table.add(w, Move(key, new_name, inode, node.kind, node.etag, node.size_bytes))

        return await self.cache.committer.commit(change)

    async def copied(self, seq: int, lake: WatchedLake) -> None:
        """Have the lake acknowledge the copies of a move, whose ETags are others."""
        row = self.table.rows[seq]
        assert isinstance(row, Move)

        def renew(w: IndexWriter, inode: int) -> None:
            node = w.node(inode)
            assert node is not None
            if node.is_directory:
                for child, _ in list(w.names(inode)):
                    renew(w, child)
            else:
                etag = lake.head(os.fsdecode(w.key_of(inode))).version.etag
                w.put_node(inode, replace(node, etag=etag))

        def change(w: IndexWriter) -> None:
            node = w.node(row.inode)
            assert node is not None
            w.put_node(row.inode, replace(node, origin=b""))
            renew(w, row.inode)
            self.table.replace(w, seq, replace(row, copied=True))

        await self.commit(change)

    async def listed(self, inode: Inode = ROOT_INODE) -> list[str]:
        expire(self.cache, inode)
        return await list_names(self.cache, inode)

    def node(self, name: str, inode: Inode = ROOT_INODE) -> tuple[Inode, Node]:
        return self.cache.names(inode)[name]


async def looked_up(mount: Mount, name: bytes) -> bool:
    return await mount.cache.lister.refresh_entry(ROOT_INODE, name)


Ask = Callable[[Mount, Iterable[str]], object]


async def by_listing(mount: Mount, names: Iterable[str]) -> set[str]:
    """Return which of *names* are shown after a listing."""
    return set(await mount.listed()) & set(names)


async def by_single_keys(mount: Mount, names: Iterable[str]) -> set[str]:
    """Return which of *names* are shown after each was asked for by itself."""
    shown = {name for name in names if await looked_up(mount, os.fsencode(name))}
    assert shown == mount.cache.names().keys() & set(names)
    return shown


both_ways = pytest.mark.parametrize("ask", [by_listing, by_single_keys])
