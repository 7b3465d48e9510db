"""The handlers for `.sluice/`, in front of those for all else: one look at an inode's number tells.

They take nothing over that costs a request more elsewhere: the kernel asks about `.sluice` only when
somebody names it. Where a handler of `Operations` reads the request's number first, it does so still:
nothing is awaited before.
"""

from __future__ import annotations

import errno
import stat
import time

import pyfuse3

from cache.errors import NamespaceError
from fusefs.control import CONTROL_BIT, ControlDirectory, ControlEntry
from fusefs.guarding import guarded
from fusefs.operations import Operations
from fusefs.replies import absent


class ControlOperations(Operations):
    """*control*: set by a worker after the fork."""

    control: ControlDirectory

    def _shown(self, entry: ControlEntry) -> pyfuse3.EntryAttributes:
        """Return the attributes; the kernel keeps neither them nor the name."""
        shown = pyfuse3.EntryAttributes()
        shown.st_ino = pyfuse3.InodeT(entry.inode)
        shown.st_mode = pyfuse3.ModeT(entry.mode)
        shown.st_nlink = 2 if stat.S_ISDIR(entry.mode) else 1
        shown.st_size = entry.size_bytes
        shown.st_blocks = (entry.size_bytes + 511) // 512
        shown.st_uid, shown.st_gid = self._uid, self._gid
        shown.st_mtime_ns = shown.st_ctime_ns = shown.st_atime_ns = time.time_ns()
        shown.entry_timeout = shown.attr_timeout = 0
        return shown

    @guarded
    async def _control_lookup(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        if inode := self.control.in_root(parent, name):
            return self._shown(self.control.entry(inode))
        if name == b".":
            return self._shown(self.control.entry(parent))
        try:
            return self._shown(await self.control.lookup(parent, name))
        except NamespaceError:
            return absent(0.0)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if parent_inode & CONTROL_BIT or self.control.in_root(parent_inode, name):
            return await self._control_lookup(parent_inode, name)
        return await super().lookup(parent_inode, name, ctx)

    @guarded
    async def _control_attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        return self._shown(self.control.entry(inode))

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if inode & CONTROL_BIT:
            return await self._control_attributes(inode)
        return await super().getattr(inode, ctx)

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if inode & CONTROL_BIT:  # O_TRUNC, and times: there is nothing to set.
            return await self._control_attributes(inode)
        return await super().setattr(inode, attr, fields, fh, ctx)

    # Directories

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        if inode & CONTROL_BIT:
            return pyfuse3.FileHandleT(inode)
        return await super().opendir(inode, ctx)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if fh & CONTROL_BIT:
            await self._control_readdir(start_id, token)
        else:
            await super().readdir(fh, start_id, token)

    @guarded
    async def _control_readdir(self, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for number, entry in enumerate(await self.control.entries(), 1):
            name = pyfuse3.FileNameT(entry.name)
            if number > start_id and not pyfuse3.readdir_reply(token, name, self._shown(entry), number):
                return

    # Files

    @guarded
    async def _control_open(self, inode: int) -> pyfuse3.FileInfo:
        self.control.entry(inode)
        # A snapshot is one for ever. What is written is a text, not a file: no page of it is kept.
        handle = self.control.open_file(inode)
        return pyfuse3.FileInfo(
            fh=pyfuse3.FileHandleT(handle), direct_io=handle != inode, keep_cache=handle == inode
        )

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        if inode & CONTROL_BIT and not self.no_open:
            return await self._control_open(inode)
        return await super().open(inode, flags, ctx)

    @guarded
    async def _control_read(self, fh: int, off: int, size: int) -> bytes:
        return await self.control.read(fh, off, size)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        if fh & CONTROL_BIT:
            return await self._control_read(fh, off, size)
        return await super().read(fh, off, size)

    @guarded
    async def _control_write(self, fh: int, off: int, buf: bytes) -> int:
        return await self.control.write(fh, off, buf)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        if fh & CONTROL_BIT:
            return await self._control_write(fh, off, buf)
        return await super().write(fh, off, buf)

    @guarded
    async def _control_finish(self, fh: int, is_closed: bool) -> None:
        await self.control.finish(fh, is_closed=is_closed)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        if fh & CONTROL_BIT:
            await self._control_finish(fh, False)
        else:
            await super().fsync(fh, datasync)

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        if fh & CONTROL_BIT and self.writing is not None and self.writing.durability.may_be_remote:
            await self._control_finish(fh, False)
        else:
            await super().flush(fh)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        if fh & CONTROL_BIT:
            await self._control_finish(fh, True)
        else:
            await super().release(fh)

    # What would change the directory

    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        self._refuse(parent_inode, name)
        return await super().create(parent_inode, name, mode, flags, ctx)

    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        self._refuse(parent_inode, name)
        return await super().mknod(parent_inode, name, mode, rdev, ctx)

    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        self._refuse(parent_inode, name)
        return await super().mkdir(parent_inode, name, mode, ctx)

    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        self._refuse(parent_inode, name)
        return await super().symlink(parent_inode, name, target, ctx)

    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        self._refuse(parent_inode, name)
        await super().unlink(parent_inode, name, ctx)

    async def rmdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        self._refuse(parent_inode, name)
        await super().rmdir(parent_inode, name, ctx)

    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._refuse(parent_inode_old, name_old)
        self._refuse(parent_inode_new, name_new)
        await super().rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx)

    def _refuse(self, parent: int, name: bytes) -> None:
        if parent & CONTROL_BIT or self.control.in_root(parent, name):
            raise pyfuse3.FUSEError(errno.EPERM)

    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        if inode & CONTROL_BIT:
            raise pyfuse3.FUSEError(errno.EPERM)
        await super().setxattr(inode, name, value, ctx)

    async def removexattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        if inode & CONTROL_BIT:
            raise pyfuse3.FUSEError(errno.EPERM)
        await super().removexattr(inode, name, ctx)

    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        if inode & CONTROL_BIT and self.writing is not None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return await super().getxattr(inode, name, ctx)

    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[pyfuse3.XAttrNameT]:
        if inode & CONTROL_BIT and self.writing is not None:
            return []
        return await super().listxattr(inode, ctx)
