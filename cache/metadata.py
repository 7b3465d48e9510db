"""What travels with an object as user metadata: mode, owner, time, extended attributes, and whose it is.

`mode` (octal), `uid`, `gid` and `mtime` (seconds, with a fraction) are as rclone writes them; ours are
`sluice-id`, `sluice-checksum` and `sluice-restated`, and `sluice-xattrs` (base64 of msgpack). S3 takes 2 KB
in all.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from cache.model import ObjectInfo, ObjectVersion
from cache.records import Attributes, whole_checksum

METADATA_BYTES_MAX = 2048  # S3 User Guide, "Working with object metadata".
_MODE, _UID, _GID, _MTIME = "mode", "uid", "gid", "mtime"
_ID, _CHECKSUM, _XATTRS = "sluice-id", "sluice-checksum", "sluice-xattrs"
_CHECKSUM_KIND = "xxh3-128k"  # Of the xxh3_64 of each 128 KiB, little-endian, the xxh3_128.
_RESTATED = "sluice-restated"
_ALL = (_MODE, _UID, _GID, _MTIME, _ID, _CHECKSUM, _XATTRS, _RESTATED)


@dataclass(frozen=True, slots=True)
class SentId:
    """Names what was sent: which content (*source*, the same for all its states), and which state."""

    source: str
    state: str

    def __str__(self) -> str:
        return f"{self.source}.{self.state}"

    @classmethod
    def parse(cls, metadata: Mapping[str, str]) -> SentId | None:
        source, dot, state = lower(metadata).get(_ID, "").rpartition(".")
        return cls(source, state) if dot else None


def checksum_text(checksums: Sequence[int]) -> str:
    return f"{_CHECKSUM_KIND}:{whole_checksum(checksums).hex()}"


def checksum_of(metadata: Mapping[str, str]) -> str:
    """Return the checksum that the object was sent with, "" if there is none."""
    return lower(metadata).get(_CHECKSUM, "")


def metadata_of(attributes: Attributes | None, mtime_ns: int) -> dict[str, str]:
    """Return the metadata that says this. Extended attributes that do not fit are left out, all of them."""
    metadata = {_MTIME: time_text(mtime_ns)} if mtime_ns else {}
    if attributes is None:
        return metadata
    metadata |= {_MODE: f"{attributes.mode:o}", _UID: str(attributes.uid), _GID: str(attributes.gid)}
    if attributes.xattrs:
        packed = base64.b64encode(msgspec.msgpack.encode(attributes.xattrs)).decode()
        if _size(metadata) + len(_XATTRS) + len(packed) <= METADATA_BYTES_MAX - _RESERVED_BYTES:
            metadata[_XATTRS] = packed
    return metadata


_RESERVED_BYTES = 256  # For id, checksum and what an object was made of.


def with_id(metadata: Mapping[str, str], sent: SentId, checksum: str) -> dict[str, str]:
    return {**metadata, _ID: str(sent), _CHECKSUM: checksum}


def restated(
    present: Mapping[str, str], attributes: Attributes, mtime_ns: int, source: ObjectVersion
) -> dict[str, str]:
    """Return *present*, of *source*, with the attributes changed, and a mark that says whose copy has them:
    what others, and the upload, noted there stays.
    """
    present = lower(present)
    stays = {name: value for name, value in present.items() if name not in _ALL or name in (_ID, _CHECKSUM)}
    if not mtime_ns and _MTIME in present:
        stays[_MTIME] = present[_MTIME]
    metadata = {**stays, **metadata_of(attributes, mtime_ns)}
    marked = {**metadata, _RESTATED: _mark_of(metadata, source)}
    return marked if _size(marked) <= METADATA_BYTES_MAX else metadata


def is_restated(info: ObjectInfo, source: ObjectVersion) -> bool:
    """Return whether *info* is what giving *source* other metadata has made of it: the same bytes."""
    metadata = lower(info.metadata)
    mark = metadata.pop(_RESTATED, "")
    version = info.version
    is_same = (version.key, version.size_bytes) == (source.key, source.size_bytes)
    return is_same and mark == _mark_of(metadata, source)


def _mark_of(metadata: Mapping[str, str], source: ObjectVersion) -> str:
    """Return what names *source* and the metadata of its copy: who changes either makes it void."""
    named = msgspec.msgpack.encode((source.key, source.etag, source.size_bytes, sorted(metadata.items())))
    return hashlib.blake2b(named, digest_size=16).hexdigest()


def attributes_of(metadata: Mapping[str, str], ctime_ns: int) -> tuple[Attributes | None, int]:
    """Return the attributes and the mtime (ns; 0: none) that *metadata* tells. What makes no sense counts as
    absent: other tools write there too.
    """
    metadata = lower(metadata)
    mtime_ns = _parsed_time(metadata.get(_MTIME, ""))
    try:
        mode = int(metadata[_MODE], 8) & 0o7777
        uid, gid = int(metadata.get(_UID, "0")), int(metadata.get(_GID, "0"))
    except (KeyError, ValueError):
        return None, mtime_ns
    return Attributes(mode, uid, gid, ctime_ns, xattrs=_parsed_xattrs(metadata.get(_XATTRS, ""))), mtime_ns


def time_text(time_ns: int) -> str:
    return f"{time_ns // 10**9}.{time_ns % 10**9:09}"


def lower(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return it with names in lower case: some servers capitalise them, as headers."""
    return {name.lower(): value for name, value in metadata.items()}


def _parsed_time(text: str) -> int:
    seconds, _, fraction = text.partition(".")
    if not (seconds.isdecimal() and (fraction or "0").isdecimal()):
        return 0
    return int(seconds) * 10**9 + int(f"{fraction:0<9}"[:9])


def _parsed_xattrs(text: str) -> dict[bytes, bytes]:
    try:
        return msgspec.msgpack.decode(base64.b64decode(text), type=dict[bytes, bytes]) if text else {}
    except (binascii.Error, msgspec.MsgspecError):
        return {}


def _size(metadata: Mapping[str, str]) -> int:
    return sum(len(name) + len(value) for name, value in metadata.items())
