"""Which inodes the channel extension may open for a reader by itself, and who has them open by it.

An OPEN through Python costs some 140 us, in C a tenth of that. So once Python has opened a file, it may
give a grant for those that follow: an object version that is whole in the cache, which nobody
writes to. From then on every worker's channel.c answers OPEN and RELEASE (page cache kept, as for
any other open in cached mode), and Python hears every so often which files were opened. What needs to
know of each open withdraws the grant first: releases of those that are open then come to Python.

A process that dies within such an answer leaves the file counted as open, for ever. Nothing is lost
by it: should it be unlinked, its space is given back at the next mount.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

from fusefs import channel

# Files that share a word have no grant at the same time. Pages that nobody touches take no memory.
WORDS = 1 << 21


class Drained(NamedTuple):
    """*requests*: that were answered. *opened*: inodes and when, in seconds since the epoch."""

    requests: int
    opened: list[tuple[int, float]]


class Grants:
    """Make it before the fork. Needs the channel extension. Inodes of 2**40 or more get no grant."""

    def __init__(self, words: int = WORDS) -> None:
        """*words*: a power of two."""
        self._extension = channel.module()
        self._table = mmap.mmap(-1, 8 * words)

    def give(self, inode: int) -> bool:
        """Return whether the channel answers for it now: not while another has its place and is open."""
        return bool(self._extension.give(self._table, inode))

    def withdraw(self, inode: int) -> int:
        """Have Python asked again from now on; return how many have it open still."""
        return int(self._extension.withdraw(self._table, inode))

    def count(self, inode: int) -> int:
        """Return how many have it open by a grant."""
        return int(self._extension.count_open(self._table, inode))

    def closed(self, inode: int) -> None:
        """One of those was released, and its grant had been withdrawn."""
        self._extension.count_closed(self._table, inode)

    def answer(self) -> None:
        """Have this process answer, a worker."""
        self._extension.answer_from(self._table)

    def drained(self) -> Drained:
        """Return what this process answered since the last call."""
        return Drained(*self._extension.drained())


def feature(table: Grants | None, *, no_open: bool) -> dict[str, object]:
    """Return what `status` says of it."""
    if no_open:
        return {"on": False, "reason": "opens send no request"}
    if table is not None:
        return {"on": True, "reason": "a cached file that was opened once is opened in C from then on"}
    return {"on": False, "reason": channel.load() or "--workers 0"}


def made() -> Grants | None:
    """Return a table of grants; None where the extension is not there."""
    return Grants() if channel.load() is None else None
