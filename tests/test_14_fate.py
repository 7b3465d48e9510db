"""Where a key goes with what is pending, and where it comes from: against a lake of names."""

from __future__ import annotations

import random
import stat

import pytest

from cache.pending import Delete, Move, PendingTable
from tests.test_14_claims import WRITER

NAMES = (b"a", b"b", b"c")


class Names:
    """A lake in which each object is told by the key that it had first."""

    def __init__(self, keys: list[bytes]) -> None:
        self.now = {key: key for key in keys}

    def delete(self, key: bytes) -> None:
        self.now.pop(key, None)

    def move(self, source: bytes, target: bytes) -> None:
        """A source with "/" at its end is a whole directory."""
        for key in [
            key for key in self.now if key == source or (source.endswith(b"/") and key.startswith(source))
        ]:
            self.now[target + key[len(source) :]] = self.now.pop(key)


def random_key(roll: random.Random) -> bytes:
    return b"/".join(roll.choice(NAMES) for _ in range(roll.randint(1, 3)))


@pytest.mark.parametrize("seed", range(60))
def test_a_key_is_followed_through_all_that_is_pending(seed: int) -> None:
    """Nothing is moved to where something is: the mount deletes that first."""
    roll, table = random.Random(seed), PendingTable()
    lake = Names([b"/".join((one, two, three)) for one in NAMES for two in NAMES for three in NAMES])
    first = list(lake.now)
    for _ in range(12):
        key, other = random_key(roll), random_key(roll)
        if roll.random() < 0.3:
            table.add(WRITER, Delete(key))
            lake.delete(key)
        elif roll.random() < 0.5 and not taken(lake, other) and not other.startswith(key + b"/"):
            table.add(WRITER, Move(key + b"/", other, 1, stat.S_IFDIR))
            lake.move(key + b"/", other + b"/")
        elif key in lake.now and not taken(lake, other):
            table.add(WRITER, Move(key, other, 1, stat.S_IFREG))
            lake.move(key, other)
    ends = {origin: key for key, origin in lake.now.items()}
    assert {key: table.fate(key) for key in first} == {key: ends.get(key) for key in first}
    assert {key: table.whereabouts(key) for key in lake.now} == lake.now


def taken(lake: Names, key: bytes) -> bool:
    """Return whether there is something at, above or below *key*."""
    return any(one == key or one.startswith(key + b"/") or key.startswith(one + b"/") for one in lake.now)


def test_of_what_was_copied_the_old_key_is_left_over_and_the_new_one_counts() -> None:
    table = PendingTable()
    table.add(WRITER, Move(b"a", b"b", 1, stat.S_IFREG, copied=True))
    table.add(WRITER, Move(b"b", b"c", 1, stat.S_IFREG))
    assert (table.fate(b"a"), table.fate(b"b"), table.whereabouts(b"c")) == (None, b"c", b"b")
