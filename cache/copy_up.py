"""Gives a file of the lake a staging file, once it is written to.

What is cached of its content is copied, the rest fetched; what is to be cut off is neither. A cached file
that readers have open in passthrough becomes the staging file itself: the kernel writes to the file that
they read.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import dataclass, field
from functools import partial

import trio
import xxhash

from cache.committer import Committer
from cache.engine import Engine
from cache.errors import CacheError, NameRefused, ObjectMissing, SluiceError, StagingFull
from cache.fetcher import Fetcher
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.lake.base import Body
from cache.model import BLOCK_BYTES, GROUP_BLOCKS, GROUP_BYTES, KIND_FILE, ObjectVersion, ceil_div
from cache.opens import Mode, OpenTable
from cache.pending import Orphan, PendingTable, Put
from cache.records import Group, range_mask
from cache.renaming import RowChanges, replace
from cache.residency import Residency
from cache.staging import StagingFiles
from cache.tree import attributes_of, make_staging_file

log = logging.getLogger(__name__)

_PIECES_AT_ONCE = 4  # Of 8 MiB each: what one copy takes of the mover's memory.


@dataclass(eq=False)
class Flight:
    """The one copying of a file, however many want to write to it. *error* is set before *done*."""

    done: trio.Event = field(default_factory=trio.Event)
    error: SluiceError | None = None


class CopyUp:
    """Starts flights in *nursery*, so that who asked may leave. *owner*: uid and gid by default."""

    def __init__(
        self,
        nursery: trio.Nursery,
        index: Index,
        committer: Committer,
        table: PendingTable,
        staging: StagingFiles,
        residency: Residency,
        fetcher: Fetcher,
        disk_engine: Engine,
        opens: OpenTable | None,
        owner: tuple[int, int],
    ) -> None:
        self._opens = opens
        self._nursery = nursery
        self._index = index
        self._committer = committer
        self._table = table
        self._staging = staging
        self._residency = residency
        self._fetcher = fetcher
        self._disk_engine = disk_engine
        self._owner = owner
        self._flights: dict[int, Flight] = {}

    async def stage(self, inode: int, keep_bytes: int) -> int:
        """Return the number of the file's staging file, made if there is none: see `messages.Stage`.

        Raises LakeError, StagingFull, CacheError, NamespaceError.
        """
        while not (number := self._staged(inode)):
            flight = self._flights.get(inode)
            if flight is None:  # No await from here to start_soon.
                flight = self._flights[inode] = Flight()
                self._nursery.start_soon(self._fly, inode, keep_bytes, flight)
            await flight.done.wait()
            if flight.error is not None:
                raise flight.error
        return number

    def _staged(self, inode: int) -> int:
        node = self._index.node(inode)
        if node is None:
            raise ObjectMissing(f"inode {inode} is not known")
        if node.kind != KIND_FILE:
            raise NameRefused(f"{os.fsdecode(node.name)} is no file")
        return node.staged

    async def _fly(self, inode: int, keep_bytes: int, flight: Flight) -> None:
        try:
            await self._stage(inode, keep_bytes)
        except SluiceError as error:
            flight.error = error
        except Exception as error:  # A fault of ours fails this write, not every mount's mover.
            log.exception("inode %d can't be made ready for writing", inode)
            flight.error = SluiceError(f"{type(error).__name__}: {error}")
        except BaseException:
            flight.error = SluiceError("the mover is stopping")
            raise
        finally:
            del self._flights[inode]
            flight.done.set()

    async def _stage(self, inode: int, keep_bytes: int) -> None:
        node = self._index.node(inode)
        assert node is not None, inode
        key = os.fsdecode(self._index.key_of(inode))
        version = ObjectVersion(key, node.etag, node.size_bytes, node.vid)
        length = node.size_bytes if keep_bytes < 0 else min(keep_bytes, node.size_bytes)
        number = await self._committer.commit(lambda w: make_staging_file(w, self._staging))
        try:
            if self._opens is not None and self._opens.state(inode).mode is Mode.PASSTHROUGH:
                path, file = self._staging.path(number), self._opens.file_of(version.id)
                put = partial(self._put, inode, number, node.size_bytes, node.mtime_ns)
                await self._residency.hand_over(version.id, path, file, node.mtime_ns, put)
                return
            await self._copy(version, length, number)
            await self._committer.commit(partial(self._put, inode, number, length, time.time_ns()))
        except BaseException as error:
            if isinstance(error, SluiceError):
                await self._disk_engine.run(lambda: self._staging.remove(number))
            raise

    def _put(self, inode: int, number: int, length: int, mtime_ns: int, w: IndexWriter) -> None:
        """Have the staging file be the content from now on, for the lake too."""
        node = w.node(inode)
        if node is None:
            raise ObjectMissing(f"inode {inode} was removed while it was copied")
        assert not node.staged, inode
        attributes = attributes_of(node, self._owner)
        if w.is_detached(inode):
            self._table.add(w, Orphan(inode, number))
        else:
            path = w.path_of(inode)
            base = RowChanges(w, self._table).stage(inode, node, path)
            self._table.add(w, Put(path, inode, node.kind, number, base, attributes, mtime_ns=mtime_ns))
        staged = replace(node, staged=number, size_bytes=length, mtime_ns=mtime_ns, attributes=attributes)
        w.put_node(inode, replace(staged, etag="", origin=b""))

    async def _copy(self, version: ObjectVersion, length: int, number: int) -> None:
        """Copy the first *length* bytes into the staging file, which is empty.

        Raises LakeError, StagingFull and CacheError.
        """
        slots = trio.CapacityLimiter(_PIECES_AT_ONCE)
        errors: list[SluiceError] = []

        async def piece(offset: int) -> None:
            async with slots:
                if errors:
                    return
                try:
                    await self._copy_piece(version, offset, min(GROUP_BYTES, length - offset), number)
                except SluiceError as error:
                    errors.append(error)

        async with trio.open_nursery() as nursery:
            for offset in range(0, length, GROUP_BYTES):
                nursery.start_soon(piece, offset)
        if errors:
            raise errors[0]

    async def _copy_piece(self, version: ObjectVersion, offset: int, length: int, number: int) -> None:
        body: Body | None = await self._disk_engine.run(lambda: self._cached(version, offset, length))
        if body is None:
            body = await self._fetcher.read_through(version, offset, length)
        assert len(memoryview(body)) == length, (version, offset, length)
        await self._disk_engine.run(partial(self._write, number, offset, body))

    def _write(self, number: int, offset: int, body: Body) -> None:
        with self._staging.held(number) as fd:
            view = memoryview(body)
            try:
                while view:
                    written = os.pwrite(fd, view, offset)
                    view, offset = view[written:], offset + written
            except OSError as error:
                kind = StagingFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else CacheError
                raise kind(f"{self._staging.path(number)}: {error.strerror}") from error

    def _cached(self, version: ObjectVersion, offset: int, length: int) -> bytes | None:
        """Return the bytes if all of them are in a tier and match their checksums, else None."""
        number = offset // GROUP_BYTES
        row, groups = self._index.residence(version.id, range(number, number + 1))
        blocks = ceil_div(length, BLOCK_BYTES)
        group = groups[0]
        if row is None or group is None or ~group.present & range_mask(0, blocks - 1):
            return None
        # Whole blocks, for the checksums.
        whole_length = min(blocks * BLOCK_BYTES, version.size_bytes - offset)
        path = self._residency.tiers[row.tier].files.file_path(version.id, whole=row.whole)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None  # It moved or left meanwhile.
        try:
            body = os.pread(fd, whole_length, offset)
        except OSError:
            return None
        finally:
            os.close(fd)
        return body[:length] if len(body) == whole_length and _matches(group, body) else None


def _matches(group: Group, body: bytes) -> bool:
    view = memoryview(body)
    assert len(view) <= GROUP_BLOCKS * BLOCK_BYTES
    return all(
        xxhash.xxh3_64_intdigest(view[start : start + BLOCK_BYTES]) == group.checksums[start // BLOCK_BYTES]
        for start in range(0, len(view), BLOCK_BYTES)
    )
