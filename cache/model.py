"""Values that every layer shares. Standard library only."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass, field
from functools import cached_property
from typing import NewType

Inode = NewType("Inode", int)
BlockIndex = NewType("BlockIndex", int)  # Counted from the start of the object.
GroupIndex = NewType("GroupIndex", int)  # Counted from the start of the object.
VersionId = NewType("VersionId", bytes)  # 16 bytes, see ObjectVersion.id.

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# The unit of presence and of checksums. A record of 100 KB that lies anywhere touches 116 KB of such
# blocks; of 128 KiB ones it would touch 231 KB. Checksums of 110 KB take 5 us instead of 4.
BLOCK_BYTES = 16 * KIB
# The unit of eviction within a large object and of sequential GETs: at 20 ms to first byte and 85 MB/s
# a connection, waiting is then a sixth of transferring. Presence of its blocks is one mask.
GROUP_BLOCKS = 512
GROUP_BYTES = GROUP_BLOCKS * BLOCK_BYTES
# A large object is fetched in aligned units of 1 MiB: waiting costs more than the bytes. Not so where
# its reads are known to be random records, see `cache/policy/records.py`.
FETCH_BLOCKS = 64
# Objects up to this size are fetched whole when they are opened.
SMALL_OBJECT_BYTES_MAX = GROUP_BYTES

# Cached files of this size and more the kernel reads itself, where it can (fusefs/passthrough.py).
# Opened, read and closed in page-cache state warm / cold, passthrough takes 1.28 / 0.79 of the time of
# cached mode at 128 KiB, 1.42 / 0.66 at 1 MiB, 1.03 / 0.48 at 2 MiB and 0.79 / 0.46 at 8 MiB: the open
# costs 40 us more, each READ that it saves some 150 us. (One reader, medians of 5 alternating rounds.)
PASSTHROUGH_BYTES_MIN = 2 * MIB

ROOT_INODE = Inode(1)
CONTROL_NAME = b".sluice"  # In the root: see fusefs/control.py. The lake's own of this name is hidden.
NAME_BYTES_MAX = 255

KIND_DIRECTORY = stat.S_IFDIR
KIND_FILE = stat.S_IFREG
KIND_SYMLINK = stat.S_IFLNK
KIND_FIFO = stat.S_IFIFO
KIND_SOCKET = stat.S_IFSOCK

# A symlink is an object of this name's ending that holds the target: rclone's convention.
SYMLINK_SUFFIX = ".rclonelink"
KEY_BYTES_MAX = 1024  # S3 User Guide, "Naming Amazon S3 objects".
OBJECT_BYTES_MAX = 5 << 40  # S3 User Guide, "Multipart upload limits": 5 TiB.


def ceil_div(value: int, unit: int) -> int:
    return -(-value // unit)


@dataclass(frozen=True)
class ObjectVersion:
    """What a key held at one time. Immutable: another ETag is another version.

    *key* is relative to the lake's prefix. *etag* is as the lake sent it, quotes included.
    *cached_id*: of the object that it was moved from within the lake, whose cached bytes it shares.
    """

    key: str
    etag: str
    size_bytes: int
    cached_id: bytes = field(default=b"", compare=False)

    def __post_init__(self) -> None:
        assert self.size_bytes >= 0, self

    @cached_property
    def id(self) -> VersionId:
        """Return the 16 bytes that name this version's files in the tiers."""
        if self.cached_id:
            return VersionId(self.cached_id)
        text = f"{self.size_bytes}\0{self.etag}\0{self.key}"
        digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16)
        return VersionId(digest.digest())


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing or HEAD shows it. *mtime_ns*: nanoseconds since the epoch."""

    version: ObjectVersion
    mtime_ns: int
    metadata: dict[str, str] = field(default_factory=dict)  # Empty when it comes from a listing.


def block_count(size_bytes: int) -> int:
    return ceil_div(size_bytes, BLOCK_BYTES)


def group_count(size_bytes: int) -> int:
    return ceil_div(size_bytes, GROUP_BYTES)


def blocks_in_group(size_bytes: int, group: GroupIndex) -> int:
    """Return how many blocks group *group* of an object of *size_bytes* has: 0 to GROUP_BLOCKS."""
    return max(0, min(GROUP_BLOCKS, block_count(size_bytes) - group * GROUP_BLOCKS))
