"""What workers and the mover tell each other: length-prefixed msgpack over a Unix socket."""

from __future__ import annotations

import struct

import msgspec

from cache import errors

_LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 64 << 20


class Lookup(msgspec.Struct, tag=1, array_like=True):
    """Make the index say what *name* in *parent* is now. Answered with 1: there is one, or 0."""

    parent: int
    name: bytes


class List(msgspec.Struct, tag=2, array_like=True):
    """Make the index hold all of the directory's entries."""

    inode: int


class Fetch(msgspec.Struct, tag=3, array_like=True):
    """Make these bytes of the inode's version resident.

    Fails with CacheFull when they can't be cached: ask with ReadThrough then.
    """

    inode: int
    offset: int
    length: int


class ReadThrough(msgspec.Struct, tag=4, array_like=True):
    """Answered with the bytes themselves, not cached."""

    inode: int
    offset: int
    length: int


class Corrupt(msgspec.Struct, tag=5, array_like=True):
    """The bytes of this group do not match their checksums: drop them."""

    vid: bytes
    group: int


class Used(msgspec.Struct, tag=6, array_like=True):
    """Whole objects (16-byte ids) or groups (20) that were hits. Not answered.

    *files*: the inodes of the small files that were used, in order, and *at_s* the unix time of
    each: what epochs are recognised by. A hit in the page cache of a mount without opens is none.
    """

    items: list[bytes]
    files: list[int] = []
    at_s: list[float] = []


class ReadSeen(msgspec.Struct, tag=7, array_like=True):
    """Hits in large files: (inode, offset, length), adjacent ones as one. Not answered."""

    reads: list[tuple[int, int, int]]


class RelistAhead(msgspec.Struct, tag=8, array_like=True):
    """The directory is in use and its listing expires soon. Not answered."""

    inode: int


class Create(msgspec.Struct, tag=9, array_like=True):
    """Make a file, its staging file included. Answered with its inode. NameExists if the name is taken."""

    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int


class MakeDirectory(msgspec.Struct, tag=10, array_like=True):
    """Answered with the inode."""

    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int


class MakeSymlink(msgspec.Struct, tag=11, array_like=True):
    """Answered with the inode."""

    parent: int
    name: bytes
    target: bytes
    uid: int
    gid: int


class MakeNode(msgspec.Struct, tag=12, array_like=True):
    """Make a FIFO or a socket, or an empty file (*mode* with its type bits). Answered with the inode."""

    parent: int
    name: bytes
    mode: int
    rdev: int
    uid: int
    gid: int


class Unlink(msgspec.Struct, tag=13, array_like=True):
    parent: int
    name: bytes


class RemoveDirectory(msgspec.Struct, tag=14, array_like=True):
    parent: int
    name: bytes


class Rename(msgspec.Struct, tag=15, array_like=True):
    """*flags*: RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2), as renameat2(2) has them."""

    parent: int
    name: bytes
    new_parent: int
    new_name: bytes
    flags: int


class SetAttributes(msgspec.Struct, tag=16, array_like=True):
    """chmod, chown, utimens; None leaves it. A staged file's times and size are set by the worker."""

    inode: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class SetXattr(msgspec.Struct, tag=17, array_like=True):
    """*value* None removes it. *flags*: XATTR_CREATE (1), XATTR_REPLACE (2), as setxattr(2) has them."""

    inode: int
    name: bytes
    value: bytes | None
    flags: int = 0


class Stage(msgspec.Struct, tag=18, array_like=True):
    """Give the file a staging file, if it has none, with its first *keep_bytes* (-1: all).

    Answered with the number of the staging file. The worker that asks has the file open for
    writing, as the OpenTable says, or holds it so itself while it truncates.
    """

    inode: int
    keep_bytes: int = -1


class Closed(msgspec.Struct, tag=19, array_like=True):
    """The last handle for writing, or the last at all of an unlinked file, is gone. Not answered."""

    inode: int


class Sync(msgspec.Struct, tag=20, array_like=True):
    """fsync: the staging file's *length_bytes* are on the disk (-1: nothing was); answered when the
    journal has all that was changed so far, and with *remote* when the lake has this file.
    """

    inode: int
    length_bytes: int = -1
    remote: bool = False


class Settle(msgspec.Struct, tag=22, array_like=True):
    """Answered once the transaction that was under way when it was asked is over."""


class Notifies(msgspec.Struct, tag=23, array_like=True):
    """Who asks is the notifier, and ready for the next Invalidate. Not answered otherwise."""


class AwaitRoom(msgspec.Struct, tag=21, array_like=True):
    """Answered when the dirty bytes are below --dirty-max again, or after minutes: ask again then."""


# The files of `.sluice/`: see cache/control_files.py. Their tags leave room for others above.


class TakeSnapshot(msgspec.Struct, tag=40, array_like=True):
    """Answered with the number of a snapshot of the control file."""

    name: bytes


class ReadSnapshot(msgspec.Struct, tag=41, array_like=True):
    """Answered with bytes of the snapshot. ObjectMissing if it is too old."""

    number: int
    offset: int
    length: int


class WriteText(msgspec.Struct, tag=42, array_like=True):
    """A piece of what is written to the control file *name* by *handle*. TextRefused if it is of no use."""

    handle: int
    name: bytes
    offset: int
    body: bytes


class FinishText(msgspec.Struct, tag=43, array_like=True):
    """Use what was written by *handle*, which *is_closed* or only synced. TextRefused as above."""

    handle: int
    is_closed: bool


class PipeLookedUp(msgspec.Struct, tag=44, array_like=True):
    """Somebody may open this FIFO of a read-only mount next. Answered once it has a reader."""

    name: bytes


Change = (
    Create
    | MakeDirectory
    | MakeSymlink
    | MakeNode
    | Unlink
    | RemoveDirectory
    | Rename
    | SetAttributes
    | SetXattr
)
Request = (
    Lookup
    | List
    | Fetch
    | ReadThrough
    | Corrupt
    | Used
    | ReadSeen
    | RelistAhead
    | Change
    | Stage
    | Closed
    | Sync
    | Settle
    | Notifies
    | AwaitRoom
    | TakeSnapshot
    | ReadSnapshot
    | WriteText
    | FinishText
    | PipeLookedUp
)
ControlRequest = TakeSnapshot | ReadSnapshot | WriteText | FinishText | PipeLookedUp
UNANSWERED = (Used, ReadSeen, RelistAhead, Closed, Notifies)


class Asked(msgspec.Struct, array_like=True):
    """A request with the number that its answer carries.

    *id* names a Change for ever: the kernel's own number of the request it came with, which it keeps
    when it sends the request again to another worker. One that comes twice happens once.

    *resends*: `OpenTable.resends` when the worker began. What a worker asked for that was replaced since
    has been, or will be, asked for again, so it changes nothing any more.
    """

    number: int
    request: Request
    id: int = 0
    resends: int = 0


class Answer(msgspec.Struct, tag=1, array_like=True):
    """*error* is the name of a class of `cache.errors`, or empty."""

    number: int
    error: str = ""
    text: str = ""
    value: int = 0
    body: bytes = b""


class Invalidate(msgspec.Struct, tag=2, array_like=True):
    """Unasked, to the notifier, or one worker: these names (parent, name) show something else now."""

    entries: list[tuple[int, bytes]]


FromMover = Answer | Invalidate

_encoder = msgspec.msgpack.Encoder()
decode_asked = msgspec.msgpack.Decoder(Asked).decode
decode_from_mover = msgspec.msgpack.Decoder(FromMover).decode


def frame(message: Asked | FromMover) -> bytes:
    packed = _encoder.encode(message)
    return _LENGTH.pack(len(packed)) + packed


class FrameReader:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes | memoryview) -> list[bytes]:
        """Return the frames that are complete now. Raises ValueError on a frame over the limit."""
        self._buffer += chunk
        frames: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > FRAME_BYTES_MAX:
                raise ValueError(f"frame of {length} bytes")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return frames


def failure(number: int, error: errors.SluiceError) -> Answer:
    """Return the answer that raises *error* where it was asked. Names in its text need not be UTF-8."""
    text = str(error).encode("utf-8", "backslashreplace").decode()
    return Answer(number, error=type(error).__name__, text=text)


def raise_failure(answer: Answer) -> None:
    """Raise what the mover raised, by the class's name."""
    kind = getattr(errors, answer.error, errors.SluiceError)
    raise kind(answer.text)
