"""The sample sets that are followed, and what all who work for them share.

One list of sets, one event that says there may be something to fetch, one switch that a fault of ours
turns off for good.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from cache.errors import SluiceError
from cache.keeping import Kept
from cache.policy.hands import Hands
from cache.policy.ledger import Account
from cache.policy.recognise import Directory
from cache.policy.sets import Members, SampleSet

log = logging.getLogger(__name__)
T = TypeVar("T")

IDLE_S = 120.0  # Nothing is fetched for a set that nobody has used for so long.
_SETS_MAX = 64
_FILES_MAX = 16_000_000  # Of all sets, at some 20 bytes each.


@dataclass(eq=False)
class Followed:
    """A set and what the coordinator knows of it."""

    samples: SampleSet
    account: Account = field(default_factory=Account)
    evicted_bytes_seen: int = -1  # Of all tiers, when the epoch began; then the status bytes were right.
    is_looked_over: bool = False  # What is resident of it has been found and is expected.
    is_looking: bool = False
    is_surveying: bool = False
    is_released: bool = False
    surveyed_at_s: float = 0.0
    has_no_room: bool = False
    waits_for_use: bool = False  # A fetch failed: none is tried before somebody reads of the set again.
    kept: Kept = field(default_factory=Kept)
    hands: Hands = field(default_factory=Hands)  # Large members.
    large_under_way: int = 0
    # Of this epoch: uses that were seen, how many of them waited for bytes, and how long in all.
    uses: int = 0
    misses: int = 0
    waited_s: float = 0.0

    def epoch_began(self) -> None:
        self.uses, self.misses, self.waited_s = 0, 0, 0.0
        self.account.epoch_began()


class FollowedSets:
    """The sets, the one used last first. For the mover's trio thread.

    Invariants: at most _SETS_MAX, with _FILES_MAX members in all unless it is a single one; once
    `is_broken` nobody does anything for them any more.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        """*nursery*: for the tasks that `start` starts."""
        self._nursery = nursery
        self._sets: list[Followed] = []
        self._wake = trio.Event()
        self.is_broken = False

    def __iter__(self) -> Iterator[Followed]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def find(self, inode: int) -> Followed | None:
        """Return the set that the file is a member of; it is the one used last from here on."""
        for number, followed in enumerate(self._sets):
            if followed.samples.members.place(inode) is not None:
                if number:
                    self._sets.insert(0, self._sets.pop(number))
                return followed
        return None

    def at(self, directory: Directory, *, large: bool) -> Followed | None:
        """Return the set that a file in *directory* belongs to, as a member or by and by."""
        roots = {
            followed.samples.root: followed for followed in self._sets if followed.samples.large == large
        }
        for above in directory.chain():
            followed = roots.get(above.inode)
            if followed is not None and (followed.samples.deep or above is directory):
                return followed
        return None

    def have_some_of(self, members: Members) -> bool:
        """Return whether some of *members* belong to a set already."""
        some = (members.inodes[0], members.inodes[-1])
        return any(other.samples.members.place(inode) is not None for other in self._sets for inode in some)

    def add(self, followed: Followed) -> list[Followed]:
        """Follow one more, and those no longer that were used longest ago if it is too much; return these."""
        left: list[Followed] = []
        self._sets.insert(0, followed)
        while len(self._sets) > 1 and (
            len(self._sets) > _SETS_MAX
            or sum(len(other.samples.members) for other in self._sets) > _FILES_MAX
        ):
            left.append(self._sets.pop())
        return left

    # Who works for them

    def wake(self) -> None:
        """There may be something to fetch that there was not."""
        self._wake.set()

    async def woken(self) -> None:
        """Return once `wake` was called since the last time."""
        await self._wake.wait()
        self._wake = trio.Event()

    def start(self, task: Callable[[T], Awaitable[None]], argument: T) -> None:
        """Start a task that may fail as `guarded` says."""
        self._nursery.start_soon(self.guarded, task, argument)

    async def guarded(self, task: Callable[[T], Awaitable[None]], argument: T) -> None:
        """Run a task; a fault of ours ends the read-ahead, not the mover."""
        with self.guard():
            try:
                await task(argument)
            except SluiceError as error:
                log.warning("read-ahead of a sample set: %s", error)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Have a fault in the block end the read-ahead, not the mover."""
        try:
            yield
        except Exception:
            log.exception("sample sets are no longer watched, nothing is read ahead of epochs")
            self.is_broken = True
