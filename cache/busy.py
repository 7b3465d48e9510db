"""Who is at which object version, so that nobody else moves, evicts or fills it meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import trio


class Busy:
    """Which versions and groups are in use by the mover itself. For its trio thread.

    Nothing here waits for its turn: ask first (`in`, `is_moving`, `may_leave_alone`), or await
    `settled`, and enter the block without an await in between.
    """

    def __init__(self) -> None:
        # Versions that are being filled, moved, verified or evicted, by how many. They are no victims.
        self._users: Counter[bytes] = Counter()
        # Invariant: a version in here has one user, who has it alone: fills of it wait. A block that
        # landed while its version moves or leaves would be indexed and then unlinked or punched.
        self._moving: dict[bytes, trio.Event] = {}
        # The same for groups (20 bytes): those being filled, by how many, and those that leave alone
        # while others of their version are filled. Invariant: their versions have users; no group is both.
        self._filling: Counter[bytes] = Counter()
        self._leaving: dict[bytes, trio.Event] = {}
        self._freed: dict[bytes, trio.Event] = {}  # Of versions that somebody waits for, see `free`.

    def __repr__(self) -> str:
        return (
            f"<busy: {len(self._users)} versions, {len(self._moving)} of them moving;"
            f" {len(self._filling)} groups filling, {len(self._leaving)} leaving>"
        )

    def __contains__(self, vid: bytes) -> bool:
        return vid in self._users

    def __len__(self) -> int:
        return len(self._users)

    def is_shared(self, vid: bytes) -> bool:
        """Return whether the version has more than one user."""
        return self._users[vid] > 1

    def is_moving(self, vid: bytes) -> bool:
        """Return whether somebody has the version alone."""
        return vid in self._moving

    def may_leave_alone(self, item: bytes) -> bool:
        """Return whether a group may go while other groups of its version are being filled."""
        return item[:16] not in self._moving and item not in self._filling and item not in self._leaving

    async def settled(self, vid: bytes, item: bytes = b"") -> None:
        """Wait until nobody has the version alone, and its group *item* does not leave."""
        while vid in self._moving or item in self._leaving:
            done = self._moving[vid] if vid in self._moving else self._leaving[item]
            await done.wait()

    async def free(self, vid: bytes) -> None:
        """Wait until the version has no user."""
        while vid in self._users:
            await self._freed.setdefault(vid, trio.Event()).wait()

    # Versions

    def begin(self, vid: bytes) -> None:
        """Keep the version where it is, until `end`."""
        assert vid not in self._moving, vid.hex()
        self._users[vid] += 1

    def end(self, vid: bytes) -> None:
        """Take `begin` back."""
        assert self._users[vid] > 0, vid.hex()
        self._users[vid] -= 1
        if not self._users[vid]:
            del self._users[vid]
            if (freed := self._freed.pop(vid, None)) is not None:
                freed.set()

    @contextmanager
    def used(self, vid: bytes) -> Iterator[None]:
        """Keep the version where it is, for as long as the block runs."""
        self.begin(vid)
        try:
            yield
        finally:
            self.end(vid)

    @contextmanager
    def moved(self, vids: Iterable[bytes]) -> Iterator[None]:
        """Have the versions, none of which may have a user, to oneself for as long as the block runs."""
        done, vids = trio.Event(), set(vids)
        assert self._users.keys().isdisjoint(vids)
        for vid in vids:
            self._users[vid] = 1
            self._moving[vid] = done
        try:
            yield
        finally:
            for vid in vids:
                assert self._users[vid] == 1, vid.hex()
                del self._moving[vid]
                self.end(vid)
            done.set()

    # Groups

    @contextmanager
    def filled(self, item: bytes) -> Iterator[None]:
        """Keep a group from leaving, for as long as the block runs."""
        assert item not in self._leaving and item[:16] in self._users
        self._filling[item] += 1
        try:
            yield
        finally:
            self._filling[item] -= 1
            if not self._filling[item]:
                del self._filling[item]

    @contextmanager
    def left(self, items: Iterable[bytes]) -> Iterator[None]:
        """Have fills of these groups wait, for as long as the block runs."""
        done, items = trio.Event(), list(items)
        assert all(self.may_leave_alone(item) and item[:16] in self._users for item in items)
        self._leaving.update(dict.fromkeys(items, done))
        try:
            yield
        finally:
            for item in items:
                del self._leaving[item]
            done.set()
