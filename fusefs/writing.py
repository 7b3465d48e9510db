"""The POSIX verbs that change something. Knows no pyfuse3, so it is tested without a mount.

Bytes go straight into staging files. Every change of the namespace is one message to the mover, with
the number of the kernel's request (*id*): should this worker die, the kernel sends the request again
to another one, with the same number, and the mover sees that it was carried out already.

While a file is counted as open for writing (`OpenTable`), its staging file stays what it is. So a
verb that writes either has a handle for writing, or counts itself as one (`OpenCounts.as_writer`).
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from functools import partial

import trio

from cache.client import MoverClient
from cache.errors import (
    AttributeMissing,
    CacheError,
    FileTooLarge,
    NameExists,
    NameTooLong,
    NotSupported,
    ObjectChanged,
    ObjectMissing,
)
from cache.index import Index
from cache.messages import (
    Change,
    Create,
    MakeDirectory,
    MakeNode,
    MakeSymlink,
    SetAttributes,
    SetXattr,
    Stage,
    Sync,
)
from cache.model import KIB, MIB, NAME_BYTES_MAX, OBJECT_BYTES_MAX, PASSTHROUGH_BYTES_MIN, Inode
from cache.opens import Mode, OpenTable
from cache.records import Node
from cache.staging import StagingFiles
from fusefs.durability import Durability
from fusefs.filesystem import GRANTED_BIT, WRITING_BIT, Filesystem, inode_of
from fusefs.open_counts import OpenCounts
from fusefs.passthrough import Passthrough
from fusefs.staged_io import (
    Room,
    pwrite_all,
    room_of,
    set_times,
    set_while_written,
    staging_errors,
    sync_bytes,
)
from fusefs.write_gate import WriteGate
from fusefs.written import WrittenFiles

log = logging.getLogger(__name__)

# A thread costs 0.1 ms, about what writing so many bytes to the page cache does.
_THREAD_BYTES = 64 * KIB
_CUT_IN_THREAD_BYTES = 64 * MIB  # Giving so much back to the disk's file system takes a while.
_TRIES_MAX = 6
_XATTR_PREFIX = b"user."
_KINDS = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who makes something, as the kernel says."""

    uid: int
    gid: int


class Writing:
    """*opens*: None where nobody counts (tests): then the mover is told of every close."""

    def __init__(
        self,
        index: Index,
        mover: MoverClient,
        filesystem: Filesystem,
        staging: StagingFiles,
        opens: OpenTable | None,
        gate: WriteGate,
        durability: Durability,
        passthrough: Passthrough | None = None,
        *,
        passes_staged: bool = False,
    ) -> None:
        """*passes_staged*: files that the lake has not got are passed through, besides cached ones.

        Without *passthrough* that means nothing.
        """
        self._index = index
        self._mover = mover
        self._filesystem = filesystem
        self.staging = staging
        self._opens = opens
        self._passthrough = passthrough
        self._counts = OpenCounts(index, mover, opens, passthrough)
        self.passes_staged = passes_staged and passthrough is not None
        self._staging_device = os.stat(staging.directory).st_dev
        self._gate = gate
        self.durability = durability
        self.written: WrittenFiles | None = None  # Those for which the channel answers, if it does.

    async def change(self, request: Change, id: int) -> Inode:
        """Have the mover carry out *request*; return the inode that it made, if it made one."""
        return Inode((await self._mover.ask(request, id)).value)

    def _node(self, inode: Inode) -> Node:
        node = self._index.node(inode)
        if node is None:
            raise ObjectMissing(f"inode {inode} is not known")
        return node

    # What is made

    async def create(
        self, parent: Inode, name: bytes, mode: int, owner: Owner, flags: int, id: int
    ) -> tuple[int, Inode]:
        """Make a file; return a handle for it, and its inode. Raises NameExists with O_EXCL."""
        request = self.creation(parent, name, mode, owner)
        if self.passes_staged:
            await self._gate.enter()
        try:
            inode = await self.change(request, id)
        except NameExists as error:
            if flags & os.O_EXCL:
                raise
            # The kernel did not know the name: it looks again, and asks for the file's permissions.
            raise ObjectChanged("the name was taken just now") from error
        return self.created(inode, id), inode

    def creation(self, parent: Inode, name: bytes, mode: int, owner: Owner) -> Create:
        """Return what makes a file, to be asked of the mover. Raises NameTooLong, ObjectMissing."""
        _check_name(name)
        return Create(parent, name, stat.S_IMODE(mode), owner.uid, self._gid_below(parent, owner))

    def created(self, inode: Inode, id: int) -> int:
        """Return the handle of a file that the mover has just made."""
        if self._passthrough is None or self.passes_staged:
            self._counts.opened(inode, writing=True, id=id)
        else:  # What `begin` would do comes with it.
            self._passthrough.opened(inode, None, writing=True, request=id)
        return inode | WRITING_BIT

    async def make_node(
        self, parent: Inode, name: bytes, mode: int, rdev: int, owner: Owner, id: int
    ) -> Inode:
        _check_name(name)
        if stat.S_IFMT(mode) not in _KINDS:
            raise NotSupported("a lake holds no device nodes")
        gid = self._gid_below(parent, owner)
        return await self.change(MakeNode(parent, name, mode, rdev, owner.uid, gid), id)

    async def make_directory(self, parent: Inode, name: bytes, mode: int, owner: Owner, id: int) -> Inode:
        _check_name(name)
        gid, mode = self._gid_below(parent, owner), stat.S_IMODE(mode)
        if self._hands_group_down(parent):
            mode |= stat.S_ISGID
        return await self.change(MakeDirectory(parent, name, mode, owner.uid, gid), id)

    async def make_symlink(self, parent: Inode, name: bytes, target: bytes, owner: Owner, id: int) -> Inode:
        _check_name(name)
        gid = self._gid_below(parent, owner)
        return await self.change(MakeSymlink(parent, name, target, owner.uid, gid), id)

    def _hands_group_down(self, directory: Inode) -> bool:
        own = self._node(directory).attributes
        return own is not None and bool(own.mode & stat.S_ISGID)

    def _gid_below(self, directory: Inode, owner: Owner) -> int:
        """Return the group of what *owner* makes in *directory*: its own where it is set-group-ID."""
        own = self._node(directory).attributes
        return own.gid if own is not None and own.mode & stat.S_ISGID else owner.gid

    # Open files

    async def open_file(self, inode: Inode, flags: int, id: int) -> int:
        """Return a handle; with O_TRUNC the file is empty then. Raises SluiceError."""
        cuts = bool(flags & os.O_TRUNC)
        writing = cuts or flags & os.O_ACCMODE != os.O_RDONLY
        if writing and (self.passes_staged or self._is_passed_through(inode)):
            await self._gate.enter()  # The kernel might send no write afterwards.
        self._counts.opened(inode, writing=writing, id=id)
        try:
            await self._counts.settled(inode)
            if cuts:
                await self._cut(inode, 0)
                return inode | WRITING_BIT
            if writing and (self._node(inode).staged or self._is_passed_through(inode)):
                # It may be sealed: the mover is to know that it is open again. And to a cached file that its
                # readers have open the kernel is about to write: it is to be a staging file by then.
                await self._stage(inode, -1)
            handle = await self._filesystem.open_file(inode)
        except BaseException:
            self._counts.failed(inode, writing=writing, id=id)
            raise
        return handle | (WRITING_BIT if writing else 0)

    def begin(self, handle: int, flags: int) -> int:
        """Return the backing id to answer an open with that was counted; 0 for cached mode.

        No await from here to the answer.
        """
        if self._passthrough is None:
            return 0
        inode = inode_of(handle)
        node = self._node(inode)
        backing_file = partial(self._backing_file, inode, flags) if self._may_pass(node, flags) else None
        backing_id = self._passthrough.answered(inode, backing_file, vid=b"" if node.staged else node.vid)
        if not backing_id:
            return 0
        if flags & os.O_ACCMODE == os.O_RDWR:
            self._passthrough.opens.note_mapped(inode)
        self._filesystem.note_passed_through(inode, node)
        return backing_id

    def _may_pass(self, node: Node, flags: int) -> bool:
        """Return whether the first open of a file is to have a backing file.

        What is opened first for reading and writing may be mapped for both, and the mapping would
        outlive the release: such files take the way of old.
        """
        access = flags & os.O_ACCMODE
        if node.staged:
            return self.passes_staged and access != os.O_RDWR
        return access == os.O_RDONLY and node.size_bytes >= PASSTHROUGH_BYTES_MIN

    def _backing_file(self, inode: Inode, flags: int) -> int | None:
        """Return a descriptor of the staging file, or of the whole cached file that could become one.

        None: this open is to be in cached mode.
        """
        node = self._index.node(inode)
        if node is None or not self._may_pass(node, flags):
            return None
        if not node.staged:
            return self._clean_file(inode, node)
        try:
            fd = os.open(self.staging.path(node.staged), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None  # Cached mode sees to that.
        if flags & os.O_ACCMODE == os.O_RDONLY and os.fstat(fd).st_size < PASSTHROUGH_BYTES_MIN:
            os.close(fd)
            return None
        return fd

    def _clean_file(self, inode: Inode, node: Node) -> int | None:
        """Who is about to write has it copied to a staging file, if nobody has it open in passthrough."""
        assert self._passthrough is not None
        if self._passthrough.opens.state(inode).may_be_written:
            return None
        fd = self._filesystem.whole_file(node)
        if fd is not None and os.fstat(fd).st_dev != self._staging_device:
            os.close(fd)
            return None
        return fd

    def _is_passed_through(self, inode: Inode) -> bool:
        return self._passthrough is not None and self._passthrough.opens.state(inode).mode is Mode.PASSTHROUGH

    def grant(self, handle: int) -> None:
        """Have further opens for reading answered by the channel, if nobody writes to the file.

        Who is about to write, or to take the file's name, does first what is looked at here, and
        withdraws the grant then: so one of us two sees the other.
        """
        if handle & WRITING_BIT or self._opens is None:
            return
        inode = inode_of(handle)
        self._filesystem.grant(handle)
        if self._opens.state(inode).may_be_written or self._index.is_detached(inode):
            self._opens.withdraw_grant(inode)

    def release(self, handle: int, id: int) -> None:
        inode = inode_of(handle)
        if not handle & GRANTED_BIT:
            self._counts.closed(inode, writing=bool(handle & WRITING_BIT), id=id)
            return
        self._filesystem.end(handle, id)
        self._counts.closed_granted(inode)

    # Bytes

    async def write(self, handle: int, offset: int, body: bytes) -> int:
        """Return how many bytes were written: fewer than given only where the disk is full then.

        Raises StagingFull, FileTooLarge, or what kept the file from being staged.
        """
        if offset + len(body) > OBJECT_BYTES_MAX:
            raise FileTooLarge(f"no object of a lake has more than {OBJECT_BYTES_MAX} bytes")
        await self._gate.enter()
        number = await self._staged(inode_of(handle))
        with self.staging.held(number) as fd:
            if len(body) < _THREAD_BYTES:
                written = pwrite_all(fd, body, offset)
            else:
                written = await trio.to_thread.run_sync(pwrite_all, fd, body, offset)
                if self.written is not None:
                    self.written.written_to(inode_of(handle))
        self._gate.wrote(written)
        return written

    def write_nowait(self, handle: int, offset: int, body: bytes) -> bool:
        """Write a few bytes; return False, with nothing done that counts, where that has to wait or fails."""
        if offset + len(body) > OBJECT_BYTES_MAX or len(body) >= _THREAD_BYTES or not self._gate.is_open:
            return False
        number = self._node(inode_of(handle)).staged
        if not number:
            return False
        with self.staging.held(number) as fd:
            if pwrite_all(fd, body, offset) < len(body):
                return False
        self._gate.wrote(len(body))
        return True

    async def _staged(self, inode: Inode) -> int:
        """Return the number of the file's staging file, which it gets here if it has none."""
        return self._node(inode).staged or await self._stage(inode, -1)

    async def _stage(self, inode: Inode, keep_bytes: int) -> int:
        return (await self._mover.ask(Stage(inode, keep_bytes))).value

    async def set_size(self, inode: Inode, size_bytes: int, id: int) -> None:
        """truncate(2) and ftruncate(2). A file of that size already is not touched."""
        if size_bytes > OBJECT_BYTES_MAX:
            raise FileTooLarge(f"no object of a lake has more than {OBJECT_BYTES_MAX} bytes")
        async with self._counts.as_writer(inode, id):
            node = self._node(inode)
            if node.staged or node.size_bytes != size_bytes:
                await self._cut(inode, size_bytes)

    async def _cut(self, inode: Inode, size_bytes: int) -> None:
        """Give the file that size; what it has beyond the bytes it had reads as zeroes."""
        node = self._node(inode)  # Of a staged file its size is not the one that the file has now.
        kept_bytes = size_bytes if node.staged else min(size_bytes, node.size_bytes)
        number = await self._stage(inode, kept_bytes)
        with self.staging.held(number) as fd, staging_errors():
            if os.fstat(fd).st_size - size_bytes < _CUT_IN_THREAD_BYTES:
                os.ftruncate(fd, size_bytes)
            else:
                await trio.to_thread.run_sync(os.ftruncate, fd, size_bytes)

    # Durability

    async def sync(self, handle: int) -> None:
        """fsync(2): return when no power loss can take back what was written and changed so far."""
        await self._sync(inode_of(handle), remote=self._is_remote(inode_of(handle)))

    async def flush(self, handle: int) -> None:
        """close(2) of one descriptor. Waits for the lake where that is asked for."""
        if handle & WRITING_BIT and self._is_remote(inode_of(handle)):
            await self._sync(inode_of(handle), remote=True)

    async def sync_directory(self, inode: Inode) -> None:
        await self._mover.ask(Sync(inode))

    async def _sync(self, inode: Inode, *, remote: bool) -> None:
        length = -1
        for _ in range(_TRIES_MAX):
            number = self._node(inode).staged
            if number == 0:
                break
            try:
                with self.staging.held(number) as fd:
                    length = await trio.to_thread.run_sync(sync_bytes, fd)
                break
            except CacheError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise  # Else the lake has it by now.
        else:
            raise CacheError(f"inode {inode}: its staging file is not there")
        await self._mover.ask(Sync(inode, length, remote))

    def _is_remote(self, inode: Inode) -> bool:
        if not self.durability.may_be_remote or self._index.is_detached(inode):
            return False
        return self.durability.is_remote(self._index.path_of(inode))

    # Attributes

    async def set_attributes(self, request: SetAttributes, id: int) -> None:
        """chmod, chown, utimens. A staged file's times are those of its staging file."""
        inode = Inode(request.inode)
        if self.set_attributes_nowait(request):
            return
        await self.change(request, id)
        if request.atime_ns is not None or request.mtime_ns is not None:
            _, staged = self._filesystem.settled(inode, self._node(inode))
            if staged is not None:
                set_times(self.staging, self._node(inode).staged, staged, request)

    def set_attributes_nowait(self, request: SetAttributes) -> bool:
        """Set a staging file's mtime and mode, and with them its ctime, where that is all there is to do.

        It is while somebody has the file open for writing: it is sealed once he is gone, with what its
        staging file says then. tar(1) sets time, owner and mode of each file that it has open: three
        messages less. Returns False, with nothing done, else.
        """
        inode = Inode(request.inode)
        if request.atime_ns is not None or self._opens is None or not self._opens.state(inode).writers:
            return False
        with self._opens.held(inode) as held:  # No seal comes in between.
            node = self._node(inode)
            if not (held.state.writers and node.staged and node.attributes):
                return False
            with staging_errors():
                return set_while_written(self.staging, node.staged, node.attributes, request)

    def xattr(self, inode: Inode, name: bytes) -> bytes:
        """Return the value. Raises AttributeMissing."""
        if not name.startswith(_XATTR_PREFIX):  # The kernel asks for security.capability before each write.
            raise AttributeMissing(f"no attribute {name!r}")
        own = self._node(inode).attributes
        if own is None or name not in own.xattrs:
            raise AttributeMissing(f"no attribute {name!r}")
        return own.xattrs[name]

    def xattrs(self, inode: Inode) -> list[bytes]:
        own = self._node(inode).attributes
        return sorted(own.xattrs) if own is not None else []

    async def set_xattr(self, inode: Inode, name: bytes, value: bytes | None, id: int) -> None:
        """Set the attribute; None removes it. Raises NotSupported for all but "user." ones."""
        if not name.startswith(_XATTR_PREFIX):
            raise NotSupported("only extended attributes of the namespace user are kept")
        await self.change(SetXattr(inode, name, value), id)

    # The mount

    def room(self) -> Room:
        """Return what df(1) shows. Raises CacheError."""
        return room_of(self.staging, self._gate.room_bytes)

    async def release_descriptors_regularly(self) -> None:
        """Give the space of files free that are gone but for our descriptors, for ever."""
        while True:
            await trio.sleep(1.0)
            self.staging.release_removed()
            self.staging.release_idle()
            if self.written is not None:
                self.written.drop_closed()


def _check_name(name: bytes) -> None:
    """The kernel's own limit for FUSE is 1024 (fs/fuse/fuse_i.h: FUSE_NAME_MAX)."""
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLong(f"a name has at most {NAME_BYTES_MAX} bytes")
