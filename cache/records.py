"""What the index stores, and how each record is packed. Reading one costs 1 to 3 us."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import msgspec
import xxhash

from cache.model import (
    BLOCK_BYTES,
    GROUP_BLOCKS,
    KIND_DIRECTORY,
    GroupIndex,
    Inode,
    ObjectVersion,
    VersionId,
    ceil_div,
)

PAGE_BYTES = 4096


def charge(size_bytes: int) -> int:
    """Return the bytes of disk that *size_bytes* of content take: whole pages, as on ext4 and tmpfs."""
    return ceil_div(size_bytes, PAGE_BYTES) * PAGE_BYTES


class Attributes(msgspec.Struct, array_like=True, frozen=True):
    """What chmod, chown, utimens and setxattr set; a node without them has the mount's defaults.

    *mode*: permission bits. *rdev*: of a device node. *target*: of a symlink.
    """

    mode: int
    uid: int
    gid: int
    ctime_ns: int
    atime_ns: int = 0
    xattrs: dict[bytes, bytes] = {}
    target: bytes = b""
    rdev: int = 0


class Node(msgspec.Struct, array_like=True, frozen=True):
    """One inode. Its bytes change only by writes through the mount: a change in the lake gives
    the path another inode.

    *name* is the last path component; *vid* is empty for what is no file of the lake. *seen_at_s*
    (unix time) is when a request for this one key last confirmed it; a listing confirms all of a
    directory in its DirectoryState instead.

    *staged* is the number of the staging file that holds the content, 0 when the object version
    does: size and times of a staged file are those of its staging file. *origin* is where the lake
    has it (a key, or a directory's prefix with "/" at its end) while a move to its path is pending;
    empty when path and key agree.
    """

    parent: int
    name: bytes
    kind: int  # stat.S_IFDIR, S_IFREG, S_IFLNK, S_IFIFO or S_IFSOCK
    size_bytes: int = 0
    mtime_ns: int = 0
    etag: str = ""
    vid: bytes = b""
    seen_at_s: float = 0.0
    staged: int = 0
    origin: bytes = b""
    attributes: Attributes | None = None

    @property
    def is_directory(self) -> bool:
        return self.kind == KIND_DIRECTORY


class DirectoryState(msgspec.Struct, array_like=True, frozen=True):
    """What is known of a directory's listing. *listed_at_s* is unix time when it *began*.

    *changed_at_ns* is when an entry came, went or changed last, or the first listing ended.
    """

    listed_at_s: float
    entries: int
    pages: int
    duration_s: float
    changed_at_ns: int = 0


class HiddenKey(msgspec.Struct, array_like=True, frozen=True):
    key: bytes
    reason: str


class VersionRow(msgspec.Struct, array_like=True, frozen=True):
    """Where an object version's bytes are. Whole: under objects/; else a sparse file in partial/."""

    key: bytes
    etag: str
    size_bytes: int
    tier: int  # Position in the list of tiers.
    whole: bool
    hits: int = 0
    last_used_s: float = 0.0

    @property
    def version(self) -> ObjectVersion:
        return ObjectVersion(self.key.decode("utf-8", "surrogateescape"), self.etag, self.size_bytes)


_GROUP_HEAD = struct.Struct("<Q")  # generation; the mask of presence and the checksums follow.


class Group:
    """Presence and xxh3 checksums of the up to GROUP_BLOCKS blocks of one group.

    *generation* grows whenever a block goes, so a reader that finds the same generation before
    and after it read the file knows that no block was punched out in between.
    """

    __slots__ = ("checksums", "generation", "present")

    def __init__(self, generation: int, present: int, checksums: array[int]) -> None:
        assert len(checksums) <= GROUP_BLOCKS and present >> len(checksums) == 0
        self.generation = generation
        self.present = present
        self.checksums = checksums

    @classmethod
    def empty(cls, blocks: int, generation: int = 0) -> Group:
        return cls(generation, 0, array("Q", bytes(8 * blocks)))

    @classmethod
    def unpack(cls, packed: bytes) -> Group:
        (generation,) = _GROUP_HEAD.unpack_from(packed)
        blocks = (len(packed) - _GROUP_HEAD.size) * 8 // 65  # A bit and eight bytes each.
        start = len(packed) - 8 * blocks
        present = int.from_bytes(packed[_GROUP_HEAD.size : start], "little")
        return cls(generation, present, array("Q", packed[start:]))

    def pack(self) -> bytes:
        mask = self.present.to_bytes(ceil_div(len(self.checksums), 8), "little")
        return _GROUP_HEAD.pack(self.generation) + mask + self.checksums.tobytes()

    @property
    def is_complete(self) -> bool:
        return self.present == (1 << len(self.checksums)) - 1

    def present_bytes(self, index: int, size_bytes: int) -> int:
        """Return how many of the object's bytes are there; *index* is the group's own."""
        missing_tail = max(0, (index * GROUP_BLOCKS + GROUP_BLOCKS) * BLOCK_BYTES - size_bytes)
        last_block = len(self.checksums) - 1
        short = missing_tail % BLOCK_BYTES if self.present >> last_block & 1 else 0
        return self.present.bit_count() * BLOCK_BYTES - short

    def charged_bytes(self, index: int, size_bytes: int) -> int:
        """Return the disk space of the blocks that are there; *index* is the group's own."""
        return charge(self.present_bytes(index, size_bytes))

    def with_blocks(self, first: int, checksums: list[int]) -> Group:
        """Return this group with the blocks from *first* on (within the group) present."""
        assert first + len(checksums) <= len(self.checksums)
        renewed = array("Q", self.checksums)
        renewed[first : first + len(checksums)] = array("Q", checksums)
        present = self.present | range_mask(first, first + len(checksums) - 1)
        return Group(self.generation, present, renewed)


def range_mask(first: int, last: int) -> int:
    """Return the mask of the blocks *first* to *last* (inclusive) of a group."""
    return (1 << (last + 1)) - (1 << first)


def block_checksums(body: bytes | bytearray | memoryview) -> list[int]:
    """Return the xxh3 of each block of *body*, which starts at a block boundary."""
    view = memoryview(body)
    return [
        xxhash.xxh3_64_intdigest(view[start : start + BLOCK_BYTES])
        for start in range(0, len(view), BLOCK_BYTES)
    ]


class BlockChecksums:
    """The same of bytes that come in pieces of any size, the first of which starts at a block boundary."""

    def __init__(self) -> None:
        self._checksums: list[int] = []
        self._begun = bytearray()  # Of the block that the last piece ended in.

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        view = memoryview(piece)
        if self._begun:
            missing_bytes = BLOCK_BYTES - len(self._begun)
            self._begun += view[:missing_bytes]
            view = view[missing_bytes:]
            if len(self._begun) == BLOCK_BYTES:
                self._end_block()
        whole_bytes = len(view) // BLOCK_BYTES * BLOCK_BYTES
        self._checksums += block_checksums(view[:whole_bytes])
        self._begun += view[whole_bytes:]

    def end(self) -> list[int]:
        """Return the checksums of all that was added; the last block may be short."""
        if self._begun:
            self._end_block()
        return self._checksums

    def _end_block(self) -> None:
        self._checksums.append(xxhash.xxh3_64_intdigest(self._begun))
        self._begun.clear()


def whole_checksum(checksums: Sequence[int]) -> bytes:
    """Return one checksum for all of a file: the xxh3_128 of its blocks' checksums, 8 bytes each."""
    return xxhash.xxh3_128_digest(array("Q", checksums).tobytes())


def inode_key(inode: int) -> bytes:
    return inode.to_bytes(8, "big")


def child_key(parent: int, name: bytes) -> bytes:
    return parent.to_bytes(8, "big") + name


def group_key(vid: bytes, group: GroupIndex | int) -> bytes:
    return vid + group.to_bytes(4, "big")


def hidden_key(parent: int, key: bytes) -> bytes:
    return parent.to_bytes(8, "big") + xxhash.xxh3_64_digest(key)


def as_inode(packed: bytes) -> Inode:
    return Inode(int.from_bytes(packed, "big"))


def as_vid(packed: bytes) -> VersionId:
    return VersionId(bytes(packed))


encode = msgspec.msgpack.Encoder().encode
decode_node = msgspec.msgpack.Decoder(Node).decode
decode_directory = msgspec.msgpack.Decoder(DirectoryState).decode
decode_version = msgspec.msgpack.Decoder(VersionRow).decode
decode_hidden = msgspec.msgpack.Decoder(HiddenKey).decode
