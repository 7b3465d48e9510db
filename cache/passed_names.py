"""Which names inodes had before, in shared memory: where in its directory a reader of it was.

readdir goes on behind the entry that came last, and names it by a cookie: a number that the kernel keeps
(getdents64(2): d_off). Entries come in the order of their names. So a cookie stands for an inode under one
name; should the inode be renamed or removed meanwhile, the place is still that of the name it had.

The mover notes each name that an inode loses, before anybody sees that it has, and the last `NAMES` are
kept. What is noted is true for ever: a cookie never stands for another name.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterable

from cache.model import NAME_BYTES_MAX

NAMES = 1 << 15
_INODE_BITS = 40  # A million files a second take a fortnight to use them up. The kernel's number has 63.
_INODE_MASK = (1 << _INODE_BITS) - 1
_HASH_MASK = (1 << (63 - _INODE_BITS)) - 1
_KEY_BYTES = 8
_NAME_BYTES = 1 + NAME_BYTES_MAX  # Its length goes before it.


def cookie_of(inode: int, name: bytes) -> int:
    """Return what stands for the entry *name* of *inode*, never 0. Rarely two names of an inode share it."""
    return inode & _INODE_MASK | (zlib.crc32(name) & _HASH_MASK) << _INODE_BITS


def inode_of_cookie(cookie: int) -> int:
    return cookie & _INODE_MASK


class PassedNames:
    """Make it before the fork. The mover alone writes."""

    def __init__(self) -> None:
        # Pages that nobody touches take no memory. Behind the cookies: which place is the next one's.
        self._cookies = mmap.mmap(-1, _KEY_BYTES * (NAMES + 1))
        self._next = memoryview(self._cookies)[_KEY_BYTES * NAMES :].cast("Q")
        self._names = mmap.mmap(-1, _NAME_BYTES * NAMES)

    def note(self, lost: Iterable[tuple[int, bytes]]) -> None:
        """Note for each (inode, name) that the inode has the name no more, or soon won't."""
        for inode, name in lost:
            place = self._next[0] % NAMES
            self._put(place, 0)  # Who reads what is there finds afterwards that it has gone.
            start = place * _NAME_BYTES
            self._names[start : start + 1 + len(name)] = bytes([len(name)]) + name
            self._put(place, cookie_of(inode, name))
            self._next[0] += 1

    def _put(self, place: int, cookie: int) -> None:
        self._cookies[place * _KEY_BYTES : (place + 1) * _KEY_BYTES] = cookie.to_bytes(_KEY_BYTES, "little")

    def name_of(self, cookie: int) -> bytes | None:
        """Return the name that *cookie* stands for, None if it was not lost, or too long ago."""
        key = cookie.to_bytes(_KEY_BYTES, "little")
        at = self._cookies.find(key, 0, _KEY_BYTES * NAMES)
        while at >= 0 and at % _KEY_BYTES:
            at = self._cookies.find(key, at + 1, _KEY_BYTES * NAMES)
        if at < 0:
            return None
        start = at // _KEY_BYTES * _NAME_BYTES
        packed = self._names[start : start + _NAME_BYTES]
        is_there_still = self._cookies[at : at + _KEY_BYTES] == key
        return packed[1 : 1 + packed[0]] if is_there_still else None
