"""Requests that are answered at once, in the call that receives them: see direct.c.

The same verbs as in `operations.py` and `changing.py`, for those of their requests that wait for
nothing, and for CREATE and SETATTR, which wait for the mover. What is anything else, or fails,
returns None: it goes the usual way then, to be waited for, counted and told of there. So nothing here
has an effect that would be wrong twice.

Formats: linux/fuse.h.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
from functools import partial

import trio

from cache import errors
from cache.client import SocketMoverClient
from cache.counters import CounterRow
from cache.messages import Answer, SetAttributes
from cache.model import NAME_BYTES_MAX, Inode
from fusefs import channel
from fusefs.control import CONTROL_BIT, ControlDirectory
from fusefs.filesystem import WRITING_BIT, Filesystem
from fusefs.guarding import errno_of
from fusefs.namespace import Entry
from fusefs.replies import Plain, pack_absent, pack_attributes, pack_entry, plain_attributes_of
from fusefs.writing import Owner, Writing
from fusefs.written import WrittenFiles

log = logging.getLogger(__name__)

LOOKUP, GETATTR, SETATTR, READ, WRITE, RELEASE, CREATE = 1, 3, 4, 15, 16, 18, 35
_LATER, _TAKEN = -1, -2
_KEEP_CACHE = 1 << 1  # FOPEN_KEEP_CACHE
_MODE, _UID, _GID, _MTIME, _HANDLE, _LOCK_OWNER = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 9
_SETS = _MODE | _UID | _GID | _MTIME
_CREATE_REQUEST = struct.Struct("=IIII")  # flags, mode, umask, open_flags; the name follows.
_READ_REQUEST = struct.Struct("=QQI")  # fh, offset, size and more.
_WRITE_REQUEST = struct.Struct("=QQIIQII")  # fh, offset, size and more; the bytes follow.
_SETATTR_REQUEST = struct.Struct("=IIQQQqqqIIIIIIII")
_OPEN_REPLY = struct.Struct("=QII")
_WRITE_REPLY = struct.Struct("=II")
_HANDLE_ONLY = struct.Struct("=Q")
_DONE = 0

Result = bytes | int | None  # The reply's body, an errno (0: none), _LATER, _TAKEN; None: the usual way.


class DirectAnswers:
    """*writing*: None on read-only mounts. *owner*: uid and gid of what has no attributes of its own.

    *written*: gets the files that are made here. None: Python answers for them.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        writing: Writing | None,
        control: ControlDirectory,
        mover: SocketMoverClient,
        counters: CounterRow,
        owner: tuple[int, int],
        written: WrittenFiles | None = None,
    ) -> None:
        self._filesystem = filesystem
        self._namespace = filesystem.namespace
        self._writing = writing
        self._control = control
        self._mover = mover
        self._counters = counters
        self._owner = owner
        self._written = written
        self._reads_failed = -1  # A descriptor, readable while `_answer_failed` has something to do.

    def start(self) -> None:
        """Have the channel ask here first. Needs the extension."""
        extension = channel.module()
        extension.answer_directly(self.answer, self._mover.receive_nowait)
        self._mover.on_socket = extension.wait_for_mover
        if channel.reads_failure() is None:
            self._reads_failed = extension.start_reads()

    def answer(self, opcode: int, unique: int, inode: int, uid: int, gid: int, body: bytes) -> Result:
        """Return how the request is answered. *inode*: of the file, or of the directory of the name."""
        if inode & CONTROL_BIT:
            return None
        try:
            result = self._answer(opcode, unique, Inode(inode), Owner(uid, gid), body)
        except Exception:  # The usual way says what is wrong.
            return None
        if result is not None:
            self._counters.add("requests")
        return result

    def _answer(self, opcode: int, unique: int, inode: Inode, owner: Owner, body: bytes) -> Result:
        if opcode == READ:
            return self._read(unique, inode, body)
        if opcode == WRITE:
            return self._write(body)
        if opcode == LOOKUP:
            return self._lookup(inode, body)
        if opcode == GETATTR:
            return self._getattr(inode)
        if opcode == RELEASE:
            return self._release(unique, body)
        if opcode == CREATE:
            return self._create(unique, inode, owner, body)
        return self._setattr(unique, inode, body) if opcode == SETATTR else None

    # Names

    def _lookup(self, parent: Inode, body: bytes) -> Result:
        name = body[:-1]
        if len(name) > NAME_BYTES_MAX or name in (b".", b"..") or self._control.in_root(parent, name):
            return None
        found = self._namespace.lookup_nowait(parent, name)
        if found is None:
            return None
        self._counters.add("lookups")
        entry, valid_s = found
        return pack_absent(valid_s) if entry is None else pack_entry(self._shown(entry))

    def _create(self, unique: int, parent: Inode, owner: Owner, body: bytes) -> Result:
        if self._writing is None or self._writing.passes_staged:  # That may have to wait for room.
            return None
        flags, mode, _, _ = _CREATE_REQUEST.unpack_from(body)
        name = body[_CREATE_REQUEST.size : -1]
        if self._control.in_root(parent, name):
            return None
        request = self._writing.creation(parent, name, mode, owner)
        self._mover.ask_then(request, unique, partial(self._created, self._writing, unique, flags))
        return _LATER

    def _created(self, writing: Writing, unique: int, flags: int, answer: Answer) -> None:
        """Answer a CREATE with what the mover says to it."""
        handle = 0
        try:
            reply: Result = self._failed(answer, flags)
            if not answer.error:
                inode = Inode(answer.value)
                handle = inode | WRITING_BIT
                reply = self._written.made(inode, unique) if self._written is not None else None
                if reply is None:
                    handle = writing.created(inode, unique)
                    reply = self._opened_reply(inode, handle)
                self._counters.add("opens")
        except Exception:  # What it failed at is met again by whoever opens the file.
            log.exception("a file was made, and can't be opened")
            reply = errno.EIO
        is_heard = channel.module().reply(unique, reply)
        # Not heard: another worker answered the request that was sent again. It counted the same open.
        if handle and is_heard and isinstance(reply, int):
            writing.release(handle, unique | 1)

    def _failed(self, answer: Answer, flags: int) -> int:
        """Return the errno of what the mover refused or failed at, 0 where it did not."""
        if not answer.error:
            return _DONE
        kind = getattr(errors, answer.error, errors.SluiceError)
        if kind is errors.NameExists and not flags & os.O_EXCL:
            # The kernel did not know the name: it looks again, and asks for the file's permissions.
            return errno.ESTALE
        code = errno_of(kind(answer.text))
        if not issubclass(kind, errors.NamespaceError):
            self._counters.add("errors")
        if code == errno.EIO:
            log.error("%s", answer.text)
        return code

    def _opened_reply(self, inode: Inode, handle: int) -> bytes:
        entry = self._namespace.own_entry(inode)
        if entry is None:
            raise errors.ObjectMissing(f"inode {inode} is not known")
        return pack_entry(self._shown(entry)) + _OPEN_REPLY.pack(handle, _KEEP_CACHE, 0)

    # Attributes

    def _shown(self, entry: Entry, *, is_unlinked: bool = False) -> Plain:
        node, staged = self._filesystem.settled(entry.inode, entry.node)
        shown = Entry(entry.inode, node, entry.valid_s)
        return plain_attributes_of(shown, staged, *self._owner, is_unlinked=is_unlinked)

    def _getattr(self, inode: Inode) -> Result:
        node = self._namespace.node(inode)
        if node is None:
            return None
        is_unlinked = self._writing is not None and self._namespace.is_detached(inode)
        return pack_attributes(self._shown(Entry(inode, node, 0.0), is_unlinked=is_unlinked))

    def _setattr(self, unique: int, inode: Inode, body: bytes) -> Result:
        fields = _SETATTR_REQUEST.unpack_from(body)
        valid = fields[0]
        if self._writing is None or not valid & _SETS or valid & ~(_SETS | _HANDLE | _LOCK_OWNER):
            return None
        mtime_s, mtime_ns, mode, uid, gid = fields[6], fields[9], fields[11], fields[13], fields[14]
        request = SetAttributes(
            inode,
            mode=stat.S_IMODE(mode) if valid & _MODE else None,
            uid=uid if valid & _UID else None,
            gid=gid if valid & _GID else None,
            mtime_ns=mtime_s * 1_000_000_000 + mtime_ns if valid & _MTIME else None,
        )
        if self._writing.set_attributes_nowait(request):
            return self._attributes_reply(inode)
        if request.mtime_ns is not None:  # It may be for the staging file as well.
            return None
        self._mover.ask_then(request, unique, partial(self._set, unique, inode))
        return _LATER

    def _set(self, unique: int, inode: Inode, answer: Answer) -> None:
        """Answer a SETATTR with what the mover says to it."""
        try:
            reply: Result = self._failed(answer, 0)
            if not answer.error:
                reply = self._attributes_reply(inode)
        except Exception:
            log.exception("a file's attributes were set, and can't be shown")
            reply = errno.EIO
        channel.module().reply(unique, reply)

    def _attributes_reply(self, inode: Inode) -> bytes:
        entry = self._namespace.own_entry(inode)
        if entry is None:
            raise errors.ObjectMissing(f"inode {inode} is not known")
        return pack_attributes(self._shown(entry))

    # Content

    def _read(self, unique: int, inode: Inode, body: bytes) -> Result:
        handle, offset, length = _READ_REQUEST.unpack_from(body)
        if self._reads_failed < 0 or handle & CONTROL_BIT:
            return None
        handle = handle or inode  # Where nothing is opened, there are no handles.
        hit = self._filesystem.hit(handle, offset, length)
        if hit is None:
            return None
        is_taken = channel.module().read_file(
            unique,
            handle,
            offset,
            hit.length,
            hit.path,
            hit.start,
            hit.end,
            hit.checksums,
            hit.tier.is_memory,
        )
        if not is_taken:
            return None
        self._filesystem.note_hit(hit)
        return _TAKEN

    async def answer_failed_reads(self) -> None:
        """Answer what the channel began to read and could not, the usual way. For ever."""
        if self._reads_failed < 0:
            return
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(self._reads_failed)
                for read in channel.module().failed_reads():
                    nursery.start_soon(self._read_again, *read)

    async def _read_again(self, unique: int, handle: int, offset: int, length: int) -> None:
        reply: bytes | int
        try:
            reply = bytes(await self._filesystem.read(handle, offset, length))
        except Exception as error:
            reply = self._errno_of(error)
        channel.module().reply_read(unique, reply)

    def _errno_of(self, error: Exception) -> int:
        """Return the errno of a failed read; count and log it as `guarded` does."""
        self._counters.add("errors")
        code = errno_of(error)
        if not isinstance(error, errors.SluiceError):
            log.error("a read failed", exc_info=error)
        elif code == errno.EIO:
            log.error("read: %s", error)
        return code

    def _write(self, body: bytes) -> Result:
        handle, offset, length, *_ = _WRITE_REQUEST.unpack_from(body)
        if self._writing is None or handle & CONTROL_BIT:
            return None
        content = body[_WRITE_REQUEST.size : _WRITE_REQUEST.size + length]
        if not self._writing.write_nowait(handle, offset, content):
            return None
        return _WRITE_REPLY.pack(length, 0)

    def _release(self, unique: int, body: bytes) -> Result:
        (handle,) = _HANDLE_ONLY.unpack_from(body)
        if handle & CONTROL_BIT:
            return None
        try:
            if self._writing is not None:
                self._writing.release(handle, unique)
            else:
                self._filesystem.end(handle, unique)
        except Exception:  # Not the usual way: what is counted already is not to be counted twice.
            log.exception("a file is closed, and stays counted as open")
        return _DONE


def feature(*, is_on: bool) -> dict[str, object]:
    """Return what `status` says of it. *is_on*: the channel extension is there, and so are workers."""
    if is_on:
        return {"on": True, "reason": "requests that wait for nothing are answered where they are received"}
    return {"on": False, "reason": channel.load() or "--workers 0"}


def reads_feature(*, is_on: bool) -> dict[str, object]:
    """The same of reads: who brings the bytes of cached files to the kernel."""
    failure = channel.reads_failure()
    if is_on and failure is None:
        return {"on": True, "reason": "cached bytes are checked and handed to the kernel outside of Python"}
    return {"on": False, "reason": failure or "--workers 0"}
