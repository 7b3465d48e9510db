"""The pyfuse3 adapter: kernel requests in, verbs of `Filesystem` called, replies out. No decisions.

pyfuse3 ends the mount when a handler raises anything but FUSEError, so every handler goes through
`_guarded`: the only place that turns exceptions into errno.
"""

from __future__ import annotations

import errno
import functools
import logging
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import pyfuse3

from cache import errors
from cache.config import MountConfig
from cache.counters import CounterRow, Features, ShownDirectories
from cache.model import Inode
from cache.opens import OpenTable
from fusefs import channel
from fusefs.filesystem import Filesystem
from fusefs.namespace import ATTRIBUTE_TTL_S, Entry
from fusefs.passthrough import Passthrough

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

# The first class that fits counts. ESTALE makes the kernel look the path up again (open(2) is
# then tried once more with the new inode), which is right when the lake holds another version.
ERRNO_OF = (
    (errors.ObjectChanged, errno.ESTALE),
    (errors.ObjectMissing, errno.ESTALE),
    (errors.AccessDenied, errno.EACCES),
    (errors.CacheFull, errno.ENOSPC),
    (errors.SluiceError, errno.EIO),
)
_READDIR_CHUNK = 200
CACHE_ENTRIES, KEEP_ENTRIES = 1 << 60, 1 << 61  # Of a directory handle, for channel.c.


def errno_of(error: Exception) -> int:
    return next((code for kind, code in ERRNO_OF if isinstance(error, kind)), errno.EIO)


Handler = Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]]


def _guarded(handler: Handler[P, T]) -> Handler[P, T]:
    @functools.wraps(handler)
    async def guard(self: Operations, *args: P.args, **kwargs: P.kwargs) -> T:
        self.counters.add("requests")
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except errors.SluiceError as error:
            self.counters.add("errors")
            code = errno_of(error)
            if code == errno.EIO:
                log.error("%s: %s", handler.__name__, error)
            raise pyfuse3.FUSEError(code) from error
        except Exception as error:
            self.counters.add("errors")
            log.exception("%s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return cast("Handler[P, T]", guard)


class Operations(pyfuse3.Operations):
    """Answers the kernel with *filesystem*, which a worker sets after the fork."""

    filesystem: Filesystem
    counters: CounterRow
    shown: ShownDirectories | None = None  # Where the kernel caches directories, see channel.c.
    passthrough: Passthrough | None = None  # Where the kernel agreed to it.

    def __init__(self, config: MountConfig, on_init: Callable[[], None]) -> None:
        super().__init__()
        self.no_open = False  # Decided before the first request.
        self._uid, self._gid = config.uid, config.gid
        self._on_init = on_init

    def take_features(self, features: Features, opens: OpenTable, device: int) -> None:
        """Do as was chosen once the kernel had answered, before the first request."""
        self.no_open = bool(features["no_open"]["on"])
        self.passthrough = Passthrough(opens, device) if features["passthrough"]["on"] else None

    def init(self) -> None:
        self._on_init()

    def _attributes(self, entry: Entry) -> pyfuse3.EntryAttributes:
        node = entry.node
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = pyfuse3.InodeT(entry.inode)
        attributes.entry_timeout = entry.valid_s
        attributes.attr_timeout = ATTRIBUTE_TTL_S
        attributes.st_mode = pyfuse3.ModeT(node.kind | (0o755 if stat.S_ISDIR(node.kind) else 0o644))
        attributes.st_nlink = 2 if node.is_directory else 1
        attributes.st_uid, attributes.st_gid = self._uid, self._gid
        attributes.st_size = node.size_bytes
        attributes.st_blksize = 1 << 17
        attributes.st_blocks = (node.size_bytes + 511) // 512
        attributes.st_mtime_ns = attributes.st_ctime_ns = attributes.st_atime_ns = node.mtime_ns
        return attributes

    @_guarded
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self.counters.add("lookups")
        namespace = self.filesystem.namespace
        if name in (b".", b".."):
            return self._dots(Inode(parent_inode), name)
        entry, valid_s = await namespace.lookup(Inode(parent_inode), name)
        if entry is None:
            return _absent(valid_s)
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

    @_guarded
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        node = self.filesystem.namespace.node(Inode(inode))
        if node is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return self._attributes(Entry(Inode(inode), node, 0.0))

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Nothing is kept for an inode that the kernel knows."""

    @_guarded
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        if self.shown is None:
            return pyfuse3.FileHandleT(inode)
        changed_at_ns = self.filesystem.namespace.changed_at_ns(Inode(inode))
        is_good = changed_at_ns is not None and self.shown.has(inode, changed_at_ns)
        return pyfuse3.FileHandleT(inode | CACHE_ENTRIES | (KEEP_ENTRIES if is_good else 0))

    @_guarded
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        namespace, inode = self.filesystem.namespace, Inode(fh)
        if start_id == 0:
            await namespace.make_listed(inode)
            changed_at_ns = namespace.changed_at_ns(inode)
            if self.shown is not None and changed_at_ns is not None:
                self.shown.note(inode, changed_at_ns)  # The kernel caches from the start again.
        while entries := namespace.entries(inode, start_id, _READDIR_CHUNK):
            for entry in entries:
                name = pyfuse3.FileNameT(entry.node.name)
                if not pyfuse3.readdir_reply(token, name, self._attributes(entry), entry.inode):
                    return
                start_id = entry.inode

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self.counters.add("requests")

    @_guarded
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        if self.no_open:  # Once for the whole mount: the kernel then sends no OPEN and no RELEASE.
            raise pyfuse3.FUSEError(errno.ENOSYS)
        request = channel.last_unique()
        handle = await self.filesystem.open_file(Inode(inode))
        handle, backing_id = self.filesystem.begin(handle, request)  # No await from here on.
        if backing_id:
            channel.pass_through(request, backing_id)
        # The inode is one object version, so what the page cache holds of it is good for ever.
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=True)

    @_guarded
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return await self.filesystem.read(fh, off, size)  # type: ignore[return-value]  # Any buffer does.

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # The kernel then sends no more of them.

    @_guarded
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self.filesystem.end(fh, channel.last_unique())

    @_guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """A lake has no size; zeroes, as for proc(5), keep df(1) from inventing one."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 1 << 17
        data.f_namemax = 255
        return data


def _absent(valid_s: float) -> pyfuse3.EntryAttributes:
    """Return what makes the kernel remember for *valid_s* that there is no such name."""
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = pyfuse3.InodeT(0)
    attributes.entry_timeout = valid_s
    return attributes
