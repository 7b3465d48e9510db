"""The POSIX verbs that change nothing. Knows no pyfuse3, so it is tested without a mount.

File handles are numbers that mean the same in every worker: the inode, one bit that says that this
open waited for the lake, so that its reads are counted as the lake's, and one that it may write.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import trio

from cache.client import MoverClient
from cache.counters import CounterRow
from cache.errors import CacheError, ObjectMissing
from cache.index import Index
from cache.lake.base import Body
from cache.messages import Corrupt, Fetch, ReadThrough, Request
from cache.model import (
    BLOCK_BYTES,
    GROUP_BLOCKS,
    GROUP_BYTES,
    PASSTHROUGH_BYTES_MIN,
    SMALL_OBJECT_BYTES_MAX,
    Inode,
)
from cache.records import Group, Node, VersionRow, block_checksums, group_key
from cache.staging import StagingFiles
from cache.tier import TierFiles
from fusefs.grants import Grants
from fusefs.namespace import Namespace
from fusefs.passthrough import Passthrough
from fusefs.use_notes import UseNotes

log = logging.getLogger(__name__)

# Of a file handle. Inodes are far smaller; the bits between are those of channel.c.
WAITED_BIT, WRITING_BIT = 1 << 62, 1 << 59
COUNTED_BIT = 1 << 58  # The open is counted in the OpenTable, and so is its release.
GRANTED_BIT = 1 << 63  # channel.c answered the open, see grants.py.
_TRIES_MAX = 6  # Then the bytes are evicted as fast as they come: read past the cache.

_MOVED: tuple[Body, str] = (b"", "")


@dataclass(slots=True)
class Hit:
    """Where the bytes are that a read asks for: in the blocks from *start* to *end* of the file *path*.

    *checksums*: of these blocks, 8 bytes each. *items*: what the eviction policies know them by.
    """

    inode: Inode
    node: Node
    waited: bool
    offset: int
    length: int
    tier: TierFiles
    path: str
    start: int
    end: int
    checksums: array[int]
    items: list[bytes]

    @property
    def source(self) -> str:
        """Return the name of the counter of its bytes."""
        if self.waited:
            return "bytes_lake"
        return "bytes_dram" if self.tier.is_memory else "bytes_nvme"


class Filesystem:
    """*tiers*: in the order of the index's tier numbers. *counters*: this process's row."""

    def __init__(
        self,
        index: Index,
        tiers: list[TierFiles],
        mover: MoverClient,
        namespace: Namespace,
        counters: CounterRow,
        staging: StagingFiles | None = None,
        *,
        no_open: bool = False,
        passthrough: Passthrough | None = None,
        grants: Grants | None = None,
    ) -> None:
        """*staging*: there on writable mounts. *no_open*: `open_file` is never called, so reads
        tell which objects are used. *grants*: this process's channel answers from it.
        """
        self._grants = grants
        self._no_open = no_open
        self._passthrough = passthrough
        self.namespace = namespace
        self._index = index
        self._tiers = tiers
        self._mover = mover
        self._counters = counters
        self._staging = staging
        self.used = UseNotes(mover, self.note_granted_opens)

    # Open

    async def open_file(self, inode: Inode) -> int:
        """Return the handle. A small object is resident afterwards; a large one comes as it is read.

        Raises ObjectChanged or ObjectMissing when the lake holds another version by now: the
        kernel then looks the path up again.
        """
        node = self._node(inode)
        self._counters.add("opens")
        if node.staged or not 0 < node.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            return inode
        row = self._index.version(node.vid)
        if row is not None and row.whole:
            self._note_file_used(inode, node)
            return inode
        try:
            await self._wait(Fetch(inode, 0, node.size_bytes))
        except CacheError:
            pass  # The reads will ask the lake.
        return inode | WAITED_BIT

    def begin(self, handle: int, request: int) -> tuple[int, int]:
        """Return the handle for the kernel and the backing id, 0 in cached mode, of a file just opened.

        *request*: its number. No await from here to the answer.
        """
        inode = inode_of(handle)
        if self._passthrough is None or (node := self._node(inode)).size_bytes < PASSTHROUGH_BYTES_MIN:
            return handle, 0
        backing_id = self._passthrough.opened(
            inode, lambda: self.whole_file(node), vid=node.vid, request=request
        )
        if backing_id:
            self.note_passed_through(inode, node)
        return handle | COUNTED_BIT, backing_id

    def note_passed_through(self, inode: int, node: Node) -> None:
        """Note an open in passthrough; of a cached file it is the use, for its reads are not seen."""
        self._counters.add("opens_passed_through")
        if node.staged:
            return
        if node.size_bytes > SMALL_OBJECT_BYTES_MAX:  # Opens of the others are noted anyway.
            self.used.file(inode)
        self.used.items(node.vid)

    def grant(self, handle: int) -> None:
        """Have further opens of a file that was opened in cached mode answered by the channel.

        For what is not read in the page cache such an open costs a READ that finds the bytes, or waits.
        """
        inode = inode_of(handle)
        if self._grants is None or (node := self._index.node(inode)) is None or node.staged:
            return
        if not 0 < node.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            return
        row = self._index.version(node.vid)
        if row is not None and row.whole:
            self._grants.give(inode)

    def note_granted_opens(self) -> None:
        """Note what the channel answered since the last time, for the mover and the counters."""
        if self._grants is None:
            return
        requests, opened = self._grants.drained()
        if not requests:
            return
        self._counters.add("requests", requests)
        self._counters.add("opens", len(opened))
        self._counters.add("opens_granted", len(opened))
        for inode, at_s in opened:
            node = self._index.node(Inode(inode))
            if node is not None and not node.staged:
                self.used.file(inode, at_s)
                self.used.item(node.vid)

    def end(self, handle: int, request: int) -> None:
        """The last descriptor of what was opened as *handle* is closed. *request*: its number."""
        if handle & GRANTED_BIT and self._grants is not None:
            self._grants.closed(inode_of(handle))
        elif self._passthrough is not None and handle & COUNTED_BIT:
            self._passthrough.closed(inode_of(handle), request=request)

    def whole_file(self, node: Node) -> int | None:
        """Return a descriptor of the cached file that holds all of the object, or None."""
        row = self._index.version(node.vid)
        if row is None or not row.whole:
            return None
        try:
            fd = os.open(self._tiers[row.tier].object_path(node.vid), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None  # Just evicted, or the disk fails: cached mode sees to either.
        if os.fstat(fd).st_size != node.size_bytes:  # Damaged, which the first read will find.
            os.close(fd)
            return None
        return fd

    # Attributes

    def settled(self, inode: Inode, node: Node) -> tuple[Node, os.stat_result | None]:
        """Return the node as it is now and, where it has a staging file, what stat(2) says of that."""
        for _ in range(_TRIES_MAX):
            if not node.staged:
                return node, None
            assert self._staging is not None
            try:
                return node, os.stat(self._staging.path(node.staged))
            except FileNotFoundError:  # The lake has it by now.
                node = self._node(inode)
            except OSError as error:
                raise CacheError(f"{self._staging.directory}: {error.strerror}") from error
        raise CacheError(f"inode {inode}: its staging file {node.staged:x} is not there")

    async def read_link(self, inode: Inode) -> bytes:
        """Return the target of a symlink. Raises SluiceError."""
        node = self._node(inode)
        if node.attributes is not None and node.attributes.target:
            return node.attributes.target
        return bytes(await self.read(inode, 0, node.size_bytes))

    def _node(self, inode: Inode) -> Node:
        node = self._index.node(inode)
        if node is None:
            raise ObjectMissing(f"inode {inode} is not known")
        return node

    # Read

    async def read(self, handle: int, offset: int, length: int) -> Body:
        """Return the bytes; fewer than *length* only at the end of the file. Raises SluiceError."""
        inode, waited = inode_of(handle), bool(handle & WAITED_BIT)
        node = self._node(inode)
        for _ in range(_TRIES_MAX):
            if not node.staged:
                return await self._read_object(inode, node, waited, offset, length)
            staged = await self._read_staged(node.staged, offset, length)
            if staged is not None:
                return staged
            node = self._node(inode)  # The lake has it by now, and the staging file is gone.
        raise CacheError(f"inode {inode}: its staging file {node.staged:x} is not there")

    def hit(self, handle: int, offset: int, length: int) -> Hit | None:
        """Return where all bytes of a read are, of an object that the cache has; else None.

        It may leave the cache meanwhile. Once it is read, `note_hit` is to be called.
        """
        if not length:
            return None
        inode = inode_of(handle)
        groups = range(offset // GROUP_BYTES, (offset + length - 1) // GROUP_BYTES + 1)
        found = self._index.content(inode, groups)
        if found is None or found[0].staged or offset >= found[0].size_bytes:
            return None
        node, row, rows = found
        length = min(length, node.size_bytes - offset)
        groups = groups[: (offset + length - 1) // GROUP_BYTES - groups.start + 1]
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        checksums = _expected(rows[: len(groups)], groups, first, last)
        if checksums is None:
            return None
        tier = self._tiers[row.tier]
        return Hit(
            inode,
            node,
            bool(handle & WAITED_BIT),
            offset,
            length,
            tier,
            tier.file_path(node.vid, whole=row.whole),
            first * BLOCK_BYTES,
            min((last + 1) * BLOCK_BYTES, node.size_bytes),
            checksums,
            [] if row.whole else [group_key(node.vid, group) for group in groups],
        )

    def note_hit(self, hit: Hit) -> None:
        """Count a read, and note it for the mover."""
        self._counters.add("reads")
        self._counters.add(hit.source, hit.length)
        node = hit.node
        if hit.items:
            self.used.items(*hit.items)
        if self._no_open and not hit.waited and node.vid not in self.used:
            self._note_file_used(hit.inode, node)
        if node.size_bytes > SMALL_OBJECT_BYTES_MAX:
            self.used.read(hit.inode, hit.offset, hit.length)

    async def _read_staged(self, number: int, offset: int, length: int) -> Body | None:
        """Return the bytes of a staging file, holes included; None where the file is not there."""
        assert self._staging is not None
        try:
            with self._staging.held(number) as fd:
                length = min(length, os.fstat(fd).st_size - offset)
                if length <= 0:
                    return b""
                body = await _pread_disk(fd, length, offset)
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        except OSError as error:
            raise CacheError(f"{self._staging.path(number)}: {error.strerror}") from error
        self._counters.add("reads")
        self._counters.add("bytes_nvme", len(body))
        return body

    async def _read_object(self, inode: Inode, node: Node, waited: bool, offset: int, length: int) -> Body:
        length = min(length, node.size_bytes - offset)
        if length <= 0:
            return b""
        self._counters.add("reads")
        missed = False  # Then the mover heard of the read.
        for _ in range(_TRIES_MAX):
            try:
                found = await self._read_resident(inode, node, offset, length)
                if found is _MOVED:
                    continue
                if found is not None:
                    body, source = found
                    if self._no_open and not waited and node.vid not in self.used:
                        self._note_file_used(inode, node)
                    self._counters.add("bytes_lake" if waited else source, length)
                    if node.size_bytes > SMALL_OBJECT_BYTES_MAX and not missed:
                        self.used.read(inode, offset, length)
                    return body
                waited = missed = True
                await self._wait(Fetch(inode, offset, length))
            except CacheError:
                break  # A failed cache never fails a read: ask the lake for the bytes themselves.
        answer = await self._wait(ReadThrough(inode, offset, length))
        self._counters.add("bytes_through", length)
        return answer

    async def _wait(self, request: Request) -> bytes:
        """Ask the mover and count the time. It hears first what was used before, in this order."""
        self.used.tell()
        started_ns = time.monotonic_ns()
        try:
            return (await self._mover.ask(request)).body
        finally:
            self._counters.add("waits")
            self._counters.add("wait_us", (time.monotonic_ns() - started_ns) // 1000)

    async def _read_resident(
        self, inode: Inode, node: Node, offset: int, length: int
    ) -> tuple[Body, str] | None:
        """Return the bytes and their counter's name; None where a block is not there (any more).

        _MOVED: it went to another tier meanwhile, or was made whole.
        """
        groups = range(offset // GROUP_BYTES, (offset + length - 1) // GROUP_BYTES + 1)
        row, rows = self._index.residence(node.vid, groups)
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        if row is None or (expected := _expected(rows, groups, first, last)) is None:
            return None
        if not row.whole:
            self.used.items(*(group_key(node.vid, group) for group in groups))
        start, end = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, node.size_bytes)
        body = await self._pread(row, node.vid, start, end - start)
        if body is None:
            if self._is_being_made_whole(row, node.vid):
                return None
            return await self._drop_bad(node, row, groups, rows, "is gone from the tier")
        if block_checksums(body) != expected.tolist():
            return await self._drop_bad(node, row, groups, rows, "does not match its checksum")
        tier = self._tiers[row.tier]
        source = "bytes_dram" if tier.is_memory else "bytes_nvme"
        if end - start == length:
            return body, source
        return memoryview(body)[offset - start : offset - start + length], source

    async def _pread(self, row: VersionRow, vid: bytes, offset: int, length: int) -> Body | None:
        tier = self._tiers[row.tier]
        try:
            fd = os.open(tier.file_path(vid, whole=row.whole), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None  # Moved, made whole or evicted since we looked.
        except OSError as error:
            log.warning("%s: %s; read from the lake", tier.path, error.strerror)
            raise CacheError(f"{tier.path}: {error.strerror}") from error
        try:
            if tier.is_memory:
                return os.pread(fd, length, offset)
            return await _pread_disk(fd, length, offset)
        except OSError as error:
            log.warning("%s: %s; the object is dropped and fetched again", tier.path, error.strerror)
            return b""  # Fails the checksum, so the mover drops it.
        finally:
            os.close(fd)

    def _is_being_made_whole(self, row: VersionRow, vid: bytes) -> bool:
        """Return whether a sparse file is under objects/ by now: it moves before the index says so."""
        return not row.whole and os.path.exists(self._tiers[row.tier].object_path(vid))

    async def _drop_bad(
        self, node: Node, row: VersionRow, groups: range, seen: list[Group | None], how: str
    ) -> tuple[Body, str] | None:
        """Tell a block that left while it was read from one that went bad, and have that dropped.

        Return _MOVED for the first, where it is elsewhere in the cache now.
        """
        row_now, now = self._index.residence(node.vid, groups)
        if row_now is None:
            return None
        if (row_now.tier, row_now.whole) != (row.tier, row.whole):
            return _MOVED
        for before, after in zip(seen, now, strict=True):
            if after is None or before is None or after.generation != before.generation:
                return None
        self._counters.add("corrupt_blocks")
        log.error("%s: a cached block of it %s: dropped, fetched again", os.fsdecode(node.name), how)
        for group in groups:
            await self._mover.ask(Corrupt(node.vid, group))
        return None

    def _note_file_used(self, inode: Inode, node: Node) -> None:
        self.note_granted_opens()  # They came before.
        if node.size_bytes <= SMALL_OBJECT_BYTES_MAX:  # Of such are sample sets.
            self.used.file(inode)
        self.used.items(node.vid)


def inode_of(handle: int) -> Inode:
    return Inode(handle & (COUNTED_BIT - 1))


def _expected(rows: Iterable[Group | None], groups: range, first: int, last: int) -> array[int] | None:
    """Return the checksums of blocks *first* to *last*, or None where one is missing."""
    checksums = array("Q")
    for group, row in zip(groups, rows, strict=True):
        if row is None:
            return None
        start = max(first - group * GROUP_BLOCKS, 0)
        stop = min(last - group * GROUP_BLOCKS + 1, GROUP_BLOCKS)
        wanted = (1 << stop) - (1 << start)
        if row.present & wanted != wanted:
            return None
        part: array[int] = row.checksums[start:stop]
        checksums += part
    return checksums


async def _pread_disk(fd: int, length: int, offset: int) -> bytes | bytearray:
    """Read what the page cache has at once; wait for the disk in a thread."""
    body = bytearray(length)
    try:
        if os.preadv(fd, [body], offset, os.RWF_NOWAIT) == length:
            return body
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
    return await trio.to_thread.run_sync(os.pread, fd, length, offset)
