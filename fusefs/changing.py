"""The pyfuse3 adapter, second half: requests that change something, and those only writable mounts get.

Every handler reads the request's number as the very first thing: after an await it would be another's.
"""

from __future__ import annotations

import errno
import os
import stat

import pyfuse3

from cache.counters import CounterRow
from cache.messages import RemoveDirectory, Rename, SetAttributes, Unlink
from cache.model import NAME_BYTES_MAX, Inode
from fusefs.channel import last_unique, pass_through
from fusefs.filesystem import Filesystem
from fusefs.guarding import guarded
from fusefs.namespace import Entry
from fusefs.replies import IO_BYTES, attributes_of
from fusefs.writing import Owner, Writing

_RENAME_FLAGS = pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE
_FRAGMENT_BYTES = 4096


class ChangingOperations(pyfuse3.Operations):
    """*writing*: None on read-only mounts, where the kernel itself refuses what changes something."""

    filesystem: Filesystem
    counters: CounterRow
    writing: Writing | None = None
    _uid: int
    _gid: int

    def _writing(self) -> Writing:
        if self.writing is None:
            raise pyfuse3.FUSEError(errno.EROFS)
        return self.writing

    def _attributes(self, entry: Entry, *, is_unlinked: bool = False) -> pyfuse3.EntryAttributes:
        node, staged = self.filesystem.settled(entry.inode, entry.node)
        shown = Entry(entry.inode, node, entry.valid_s)
        return attributes_of(shown, staged, self._uid, self._gid, is_unlinked=is_unlinked)

    def _attributes_now(self, inode: int) -> pyfuse3.EntryAttributes:
        """Return the attributes of what this request made or changed."""
        entry = self.filesystem.namespace.own_entry(Inode(inode))
        if entry is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return self._attributes(entry)

    # Names

    @guarded
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        id = last_unique()
        self.counters.add("opens")
        writing = self._writing()
        handle, inode = await writing.create(Inode(parent_inode), name, mode, _owner(ctx), flags, id)
        attributes = self._attributes_now(inode)
        return self._opened(writing, handle, flags, id), attributes

    def _opened(self, writing: Writing, handle: int, flags: int, id: int) -> pyfuse3.FileInfo:
        """Return the answer to an open. It is to follow without an await.

        In cached mode the kernel itself sends all that is written: what its page cache holds is good for
        ever. In passthrough it writes past that, so it begins with nothing in it.
        """
        backing_id = writing.begin(handle, flags)
        if backing_id:
            pass_through(id, backing_id)
        elif flags & os.O_ACCMODE == os.O_RDONLY:
            writing.grant(handle)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=not backing_id)

    @guarded
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        id = last_unique()
        made = await self._writing().make_node(Inode(parent_inode), name, mode, rdev, _owner(ctx), id)
        return self._attributes_now(made)

    @guarded
    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        id = last_unique()
        made = await self._writing().make_directory(Inode(parent_inode), name, mode, _owner(ctx), id)
        return self._attributes_now(made)

    @guarded
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        id = last_unique()
        made = await self._writing().make_symlink(Inode(parent_inode), name, target, _owner(ctx), id)
        return self._attributes_now(made)

    @guarded
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)  # An object has one key.

    @guarded
    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        id = last_unique()
        await self._writing().change(Unlink(parent_inode, name), id)

    @guarded
    async def rmdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        id = last_unique()
        await self._writing().change(RemoveDirectory(parent_inode, name), id)

    @guarded
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        id = last_unique()
        if flags & ~_RENAME_FLAGS:
            raise pyfuse3.FUSEError(errno.EINVAL)
        if len(name_new) > NAME_BYTES_MAX:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        request = Rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)
        await self._writing().change(request, id)

    # Content

    @guarded
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        return await self._writing().write(fh, off, buf)

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        if self.writing is None or not self.writing.durability.may_be_remote:
            raise pyfuse3.FUSEError(errno.ENOSYS)  # The kernel then sends no more of them.
        await self._flush(self.writing, fh)

    @guarded
    async def _flush(self, writing: Writing, fh: pyfuse3.FileHandleT) -> None:
        await writing.flush(fh)

    @guarded
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        id = last_unique()
        if self.writing is not None:
            self.writing.release(fh, id)
        else:
            self.filesystem.end(fh, id)

    @guarded
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        if self.writing is not None:
            await self.writing.sync(fh)

    @guarded
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        if self.writing is not None:
            await self.writing.sync_directory(Inode(fh))

    # Attributes

    @guarded
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        id = last_unique()
        writing = self._writing()
        if fields.update_size:  # The times that come with it are those that it has anyway.
            await writing.set_size(Inode(inode), attr.st_size, id)
        request = _changed_attributes(inode, attr, fields)
        if request != SetAttributes(inode):
            await writing.set_attributes(request, id)
        return self._attributes_now(inode)

    @guarded
    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        id = last_unique()  # pyfuse3 asks `getxattr` before, which waits for nothing.
        await self._writing().set_xattr(Inode(inode), name, value, id)

    @guarded
    async def removexattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        id = last_unique()
        await self._writing().set_xattr(Inode(inode), name, None, id)

    @guarded
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        return self._xattrs().xattr(Inode(inode), name)

    @guarded
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[pyfuse3.XAttrNameT]:
        return [pyfuse3.XAttrNameT(name) for name in self._xattrs().xattrs(Inode(inode))]

    def _xattrs(self) -> Writing:
        if self.writing is None:  # The kernel then asks no more: `ls -l` would ask for each file.
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return self.writing

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """What may be written now. A lake has no size: zeroes, as for proc(5), on read-only mounts."""
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize, data.f_namemax = IO_BYTES, IO_BYTES, NAME_BYTES_MAX
        if self.writing is not None:
            room = self.writing.room()
            data.f_bsize = data.f_frsize = _FRAGMENT_BYTES  # One number: some multiply blocks by the first.
            data.f_blocks = room.total_bytes // _FRAGMENT_BYTES
            data.f_bfree = data.f_bavail = room.free_bytes // _FRAGMENT_BYTES
            data.f_files, data.f_ffree, data.f_favail = room.files, room.free_files, room.free_files
        return data


def _owner(ctx: pyfuse3.RequestContext) -> Owner:
    return Owner(ctx.uid, ctx.gid)


def _changed_attributes(
    inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields
) -> SetAttributes:
    sets_times = not fields.update_size
    return SetAttributes(
        inode,
        mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        atime_ns=attr.st_atime_ns if fields.update_atime and sets_times else None,
        mtime_ns=attr.st_mtime_ns if fields.update_mtime and sets_times else None,
    )
