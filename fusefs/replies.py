"""What the kernel is told of entries: by pyfuse3, or packed as it reads it (linux/fuse.h)."""

from __future__ import annotations

import os
import stat
import struct
from typing import Any

import pyfuse3

from cache.model import KIND_DIRECTORY, KIND_SYMLINK
from cache.records import Node
from cache.staging import mode_said
from fusefs.namespace import ATTRIBUTE_TTL_S, Entry

_DEFAULT_MODES = {KIND_DIRECTORY: 0o755, KIND_SYMLINK: 0o777}
_DEFAULT_MODE = 0o644
IO_BYTES = 1 << 17


_NS = 1_000_000_000
# struct fuse_attr; in front of it what is left of fuse_entry_out or fuse_attr_out.
_ATTRIBUTES = "QQQqqq10I"
_ENTRY_REPLY = struct.Struct("=QQQQII" + _ATTRIBUTES)
_ATTRIBUTES_REPLY = struct.Struct("=QII" + _ATTRIBUTES)


class Plain:
    """What `pyfuse3.EntryAttributes` has, where nobody but `pack_entry` and `pack_attributes` needs it."""

    st_ino: int
    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int = 0
    st_size: int
    st_blocks: int
    st_blksize: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int
    entry_timeout: float
    attr_timeout: float


Shown = Any  # pyfuse3.EntryAttributes or Plain: the same names.


def attributes_of(
    entry: Entry, staged: os.stat_result | None, uid: int, gid: int, *, is_unlinked: bool = False
) -> pyfuse3.EntryAttributes:
    """Return the entry's attributes. *staged*: those of its staging file, if it has one.

    *uid*, *gid*: of what has no attributes of its own.
    """
    shown = pyfuse3.EntryAttributes()
    _show(shown, entry, staged, uid, gid, is_unlinked=is_unlinked)
    return shown


def plain_attributes_of(
    entry: Entry, staged: os.stat_result | None, uid: int, gid: int, *, is_unlinked: bool = False
) -> Plain:
    """Return the same to be packed."""
    shown = Plain()
    _show(shown, entry, staged, uid, gid, is_unlinked=is_unlinked)
    return shown


def pack_entry(shown: Plain) -> bytes:
    """Return a struct fuse_entry_out: what LOOKUP and, first, CREATE are answered with."""
    entry_s, entry_ns = _split(shown.entry_timeout)
    attr_s, attr_ns = _split(shown.attr_timeout)
    return _ENTRY_REPLY.pack(shown.st_ino, 0, entry_s, attr_s, entry_ns, attr_ns, *_packed(shown))


def pack_absent(valid_s: float) -> bytes:
    """Return what `absent` is, packed."""
    seconds, nanoseconds = _split(valid_s)
    return _ENTRY_REPLY.pack(0, 0, seconds, 0, nanoseconds, 0, *(0,) * 16)


def pack_attributes(shown: Plain) -> bytes:
    """Return a struct fuse_attr_out: what GETATTR and SETATTR are answered with."""
    seconds, nanoseconds = _split(shown.attr_timeout)
    return _ATTRIBUTES_REPLY.pack(seconds, nanoseconds, 0, *_packed(shown))


def _packed(shown: Plain) -> tuple[int, ...]:
    atime_ns, mtime_ns, ctime_ns = shown.st_atime_ns, shown.st_mtime_ns, shown.st_ctime_ns
    return (
        shown.st_ino,
        shown.st_size,
        shown.st_blocks,
        atime_ns // _NS,
        mtime_ns // _NS,
        ctime_ns // _NS,
        atime_ns % _NS,
        mtime_ns % _NS,
        ctime_ns % _NS,
        shown.st_mode,
        shown.st_nlink,
        shown.st_uid,
        shown.st_gid,
        shown.st_rdev,
        shown.st_blksize,
        0,
    )


def _split(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * _NS)


def _show(
    shown: Shown, entry: Entry, staged: os.stat_result | None, uid: int, gid: int, *, is_unlinked: bool
) -> None:
    node = entry.node
    shown.st_ino = pyfuse3.InodeT(entry.inode)
    shown.entry_timeout = entry.valid_s
    shown.attr_timeout = ATTRIBUTE_TTL_S
    shown.st_nlink = 0 if is_unlinked else 2 if node.is_directory else 1
    shown.st_blksize = IO_BYTES
    _show_owner(shown, node, uid, gid)
    if staged is None:
        _show_content(shown, node)
    else:
        _show_staged(shown, node, staged)


def _show_owner(shown: Shown, node: Node, uid: int, gid: int) -> None:
    own = node.attributes
    if own is None:
        shown.st_mode = pyfuse3.ModeT(node.kind | _DEFAULT_MODES.get(node.kind, _DEFAULT_MODE))
        shown.st_uid, shown.st_gid = uid, gid
    else:
        shown.st_mode = pyfuse3.ModeT(node.kind | stat.S_IMODE(own.mode))
        shown.st_uid, shown.st_gid, shown.st_rdev = own.uid, own.gid, own.rdev


def _show_content(shown: Shown, node: Node) -> None:
    own = node.attributes
    size_bytes = len(own.target) if own is not None and own.target else node.size_bytes
    shown.st_size = size_bytes
    shown.st_blocks = (size_bytes + 511) // 512
    shown.st_mtime_ns = shown.st_ctime_ns = shown.st_atime_ns = node.mtime_ns
    if own is not None:
        # Entries that come and go change a directory's mtime alone.
        shown.st_ctime_ns = max(own.ctime_ns, node.mtime_ns) if node.is_directory else own.ctime_ns
        shown.st_atime_ns = own.atime_ns or node.mtime_ns


def _show_staged(shown: Shown, node: Node, staged: os.stat_result) -> None:
    own, mode = node.attributes, mode_said(staged)
    if mode is not None:
        shown.st_mode = pyfuse3.ModeT(node.kind | mode)
    shown.st_size, shown.st_blocks = staged.st_size, staged.st_blocks
    shown.st_mtime_ns, shown.st_atime_ns = staged.st_mtime_ns, staged.st_atime_ns
    shown.st_ctime_ns = max(staged.st_ctime_ns, own.ctime_ns if own is not None else 0)


def absent(valid_s: float) -> pyfuse3.EntryAttributes:
    """Return what makes the kernel remember for *valid_s* that there is no such name."""
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = pyfuse3.InodeT(0)
    attributes.entry_timeout = valid_s
    return attributes
