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
    """A hit in a file that is not whole: the read-ahead wants to know. Not answered."""

    inode: int
    offset: int
    length: int


class RelistAhead(msgspec.Struct, tag=8, array_like=True):
    """The directory is in use and its listing expires soon. Not answered."""

    inode: int


Request = Lookup | List | Fetch | ReadThrough | Corrupt | Used | ReadSeen | RelistAhead
UNANSWERED = (Used, ReadSeen, RelistAhead)


class Asked(msgspec.Struct, array_like=True):
    """A request with the number that its answer carries."""

    number: int
    request: Request


class Answer(msgspec.Struct, tag=1, array_like=True):
    """*error* is the name of a class of `cache.errors`, or empty."""

    number: int
    error: str = ""
    text: str = ""
    value: int = 0
    body: bytes = b""


class Invalidate(msgspec.Struct, tag=2, array_like=True):
    """Unasked, to one worker: these names (parent, name) show something else now."""

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

    def feed(self, chunk: bytes) -> list[bytes]:
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
    return Answer(number, error=type(error).__name__, text=str(error))


def raise_failure(answer: Answer) -> None:
    """Raise what the mover raised, by the class's name."""
    kind = getattr(errors, answer.error, errors.SluiceError)
    raise kind(answer.text)
