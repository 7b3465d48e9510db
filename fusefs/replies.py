"""What pyfuse3 is given to tell the kernel: attributes of entries."""

from __future__ import annotations

import os
import stat

import pyfuse3

from cache.model import KIND_DIRECTORY, KIND_SYMLINK
from cache.records import Node
from fusefs.namespace import ATTRIBUTE_TTL_S, Entry

_DEFAULT_MODES = {KIND_DIRECTORY: 0o755, KIND_SYMLINK: 0o777}
_DEFAULT_MODE = 0o644
IO_BYTES = 1 << 17


def attributes_of(
    entry: Entry, staged: os.stat_result | None, uid: int, gid: int, *, is_unlinked: bool = False
) -> pyfuse3.EntryAttributes:
    """Return the entry's attributes. *staged*: those of its staging file, if it has one.

    *uid*, *gid*: of what has no attributes of its own.
    """
    node = entry.node
    shown = pyfuse3.EntryAttributes()
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
    return shown


def _show_owner(shown: pyfuse3.EntryAttributes, node: Node, uid: int, gid: int) -> None:
    own = node.attributes
    if own is None:
        shown.st_mode = pyfuse3.ModeT(node.kind | _DEFAULT_MODES.get(node.kind, _DEFAULT_MODE))
        shown.st_uid, shown.st_gid = uid, gid
    else:
        shown.st_mode = pyfuse3.ModeT(node.kind | stat.S_IMODE(own.mode))
        shown.st_uid, shown.st_gid, shown.st_rdev = own.uid, own.gid, own.rdev


def _show_content(shown: pyfuse3.EntryAttributes, node: Node) -> None:
    own = node.attributes
    size_bytes = len(own.target) if own is not None and own.target else node.size_bytes
    shown.st_size = size_bytes
    shown.st_blocks = (size_bytes + 511) // 512
    shown.st_mtime_ns = shown.st_ctime_ns = shown.st_atime_ns = node.mtime_ns
    if own is not None:
        # Entries that come and go change a directory's mtime alone.
        shown.st_ctime_ns = max(own.ctime_ns, node.mtime_ns) if node.is_directory else own.ctime_ns
        shown.st_atime_ns = own.atime_ns or node.mtime_ns


def _show_staged(shown: pyfuse3.EntryAttributes, node: Node, staged: os.stat_result) -> None:
    own = node.attributes
    shown.st_size, shown.st_blocks = staged.st_size, staged.st_blocks
    shown.st_mtime_ns, shown.st_atime_ns = staged.st_mtime_ns, staged.st_atime_ns
    shown.st_ctime_ns = max(staged.st_ctime_ns, own.ctime_ns if own is not None else 0)


def absent(valid_s: float) -> pyfuse3.EntryAttributes:
    """Return what makes the kernel remember for *valid_s* that there is no such name."""
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = pyfuse3.InodeT(0)
    attributes.entry_timeout = valid_s
    return attributes
