"""The pyfuse3 adapter: kernel requests in, verbs of `Filesystem` and `Writing` called, replies out.

No decisions. Here is what all mounts have; `changing.py` has the requests that change something.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

import pyfuse3

from cache.config import MountConfig
from cache.counters import ShownDirectories
from cache.model import NAME_BYTES_MAX, Inode
from cache.passed_names import cookie_of
from fusefs import direct, grants
from fusefs.changing import ChangingOperations
from fusefs.channel import last_unique, pass_through
from fusefs.guarding import guarded
from fusefs.namespace import Entry
from fusefs.passthrough import Passthrough
from fusefs.replies import absent
from fusefs.shared import Shared

_READDIR_CHUNK = 200
CACHE_ENTRIES, KEEP_ENTRIES = 1 << 60, 1 << 61  # Of a directory handle, for channel.c.


class Operations(ChangingOperations):
    """Answers the kernel with *filesystem* and *writing*, which a worker sets after the fork."""

    shown: ShownDirectories | None = None  # Where the kernel caches directories, see channel.c.
    passthrough: Passthrough | None = None  # Where the kernel agreed to it.

    def __init__(self, config: MountConfig, on_init: Callable[[], None]) -> None:
        super().__init__()
        self.no_open = False  # Decided before the first request.
        self._uid, self._gid = config.uid, config.gid
        self._on_init = on_init

    def take_features(self, shared: Shared, device: int) -> None:
        """Do as was chosen once the kernel had answered, before the first request."""
        self.no_open = bool(shared.features["no_open"]["on"])
        shared.features["granted_opens"] = grants.feature(shared.grants, no_open=self.no_open)
        shared.features["direct_answers"] = direct.feature(is_on=shared.grants is not None)
        shared.features["direct_reads"] = direct.reads_feature(is_on=shared.grants is not None)
        if shared.features["passthrough"]["on"]:
            self.passthrough = Passthrough(shared.opens, device)

    def init(self) -> None:
        self._on_init()

    @guarded
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self.counters.add("lookups")
        namespace = self.filesystem.namespace
        if len(name) > NAME_BYTES_MAX:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        if name in (b".", b".."):
            return self._dots(Inode(parent_inode), name)
        entry, valid_s = await namespace.lookup(Inode(parent_inode), name)
        if entry is None:
            return absent(valid_s)
        return self._attributes(entry)

    def _dots(self, inode: Inode, name: bytes) -> pyfuse3.EntryAttributes:
        """Look up "." or "..", which an NFS server on top asks for."""
        node = self.filesystem.namespace.node(inode)
        if node is not None and name == b"..":
            inode = Inode(node.parent)
            node = self.filesystem.namespace.node(inode)
        if node is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return self._attributes(Entry(inode, node, 0.0))

    @guarded
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        node = self.filesystem.namespace.node(Inode(inode))
        if node is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        is_unlinked = self.writing is not None and self.filesystem.namespace.is_detached(Inode(inode))
        return self._attributes(Entry(Inode(inode), node, 0.0), is_unlinked=is_unlinked)

    @guarded
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        return pyfuse3.FileNameT(await self.filesystem.read_link(Inode(inode)))

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Nothing is kept for an inode that the kernel knows."""

    @guarded
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        if self.shown is None:
            return pyfuse3.FileHandleT(inode)
        changed_at_ns = self.filesystem.namespace.changed_at_ns(Inode(inode))
        is_good = changed_at_ns is not None and self.shown.has(inode, changed_at_ns)
        return pyfuse3.FileHandleT(inode | CACHE_ENTRIES | (KEEP_ENTRIES if is_good else 0))

    @guarded
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        namespace, inode = self.filesystem.namespace, Inode(fh)
        if start_id == 0:
            await namespace.make_listed(inode)
            changed_at_ns = namespace.changed_at_ns(inode)
            if self.shown is not None and changed_at_ns is not None:
                self.shown.note(inode, changed_at_ns)  # The kernel caches from the start again.
        while entries := namespace.entries(inode, start_id, _READDIR_CHUNK):
            for entry in entries:
                name, cookie = entry.node.name, cookie_of(entry.inode, entry.node.name)
                attributes = self._attributes(entry)
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, cookie):
                    return
                start_id = cookie

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self.counters.add("requests")

    @guarded
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        if self.no_open:  # Once for the whole mount: the kernel then sends no OPEN and no RELEASE.
            raise pyfuse3.FUSEError(errno.ENOSYS)
        id = last_unique()
        if self.writing is not None:
            handle = await self.writing.open_file(Inode(inode), flags, id)
            return self._opened(self.writing, handle, flags, id)
        handle = await self.filesystem.open_file(Inode(inode))
        handle, backing_id = self.filesystem.begin(handle, id)  # No await from here on.
        if backing_id:
            pass_through(id, backing_id)
        else:
            self.filesystem.grant(handle)
        # The inode is one object version, so what the page cache holds of it is good for ever.
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=True)

    @guarded
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return await self.filesystem.read(fh, off, size)  # type: ignore[return-value]  # Any buffer does.
