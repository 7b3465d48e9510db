"""Keys of the lake and paths of the mount as a tree: what is under one of them, above it and below it.

Both are bytes, relative, without a leading slash; "/" parts them. A directory's key ends in "/".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import TypeVar

K = TypeVar("K")
ROOT = b""  # The prefix of all keys.


def prefixes(key: bytes) -> Iterator[bytes]:
    """Yield the prefixes of *key* that end in "/", itself not among them, longest first."""
    end = len(key) - 1 if key.endswith(b"/") else len(key)
    while (slash := key.rfind(b"/", 0, end)) > 0:
        yield key[: slash + 1]
        end = slash


class KeyTree:
    """Numbers by the keys that they are noted under. All takes as long as the key is deep."""

    def __init__(self) -> None:
        self._at: defaultdict[bytes, set[int]] = defaultdict(set)
        # Invariant: a key with numbers, or with something inside, is in the set of the prefix above it.
        self._inside: defaultdict[bytes, set[bytes]] = defaultdict(set)

    def add(self, key: bytes, number: int) -> None:
        self._at[key].add(number)
        for prefix in chain(prefixes(key), (ROOT,)):
            if key in self._inside[prefix]:
                return
            self._inside[prefix].add(key)
            key = prefix

    def discard(self, key: bytes, number: int) -> None:
        discard(self._at, key, number)
        for prefix in chain(prefixes(key), (ROOT,)):
            if key in self._at or key in self._inside:
                return
            discard(self._inside, prefix, key)
            key = prefix

    def at(self, key: bytes) -> Collection[int]:
        """Return the numbers that are noted under exactly *key*."""
        return self._at.get(key, ())

    def has_below(self, prefix: bytes) -> bool:
        return prefix in self._inside

    def below(self, prefix: bytes) -> Iterator[int]:
        """Yield the numbers noted below *prefix*, but not under itself; one may come several times."""
        left = [prefix]
        while left:
            for key in self._inside.get(left.pop(), ()):
                yield from self._at.get(key, ())
                if key in self._inside:
                    left.append(key)


class Claims:
    """Which operations, by their numbers, touch which keys, and which of these as whole trees."""

    def __init__(self) -> None:
        self._keys = KeyTree()
        self._trees: defaultdict[bytes, set[int]] = defaultdict(set)

    def add(self, number: int, keys: Iterable[bytes], trees: Iterable[bytes]) -> None:
        """*trees*: those of *keys*, each with "/" at its end, below which everything is touched."""
        for key in keys:
            self._keys.add(key, number)
        for tree in trees:
            self._trees[tree].add(number)

    def discard(self, number: int, keys: Iterable[bytes], trees: Iterable[bytes]) -> None:
        """Undo `add`."""
        for key in keys:
            self._keys.discard(key, number)
        for tree in trees:
            discard(self._trees, tree, number)

    def at(self, key: bytes) -> Collection[int]:
        """Return the operations that touch exactly *key*."""
        return self._keys.at(key)

    def on(self, key: bytes, *, whole_tree: bool) -> Iterator[int]:
        """Yield the operations that touch *key*, or a tree that holds it, and with *whole_tree* those
        that touch something below it. One may come several times.

        A file and a directory of one name are one key here: a lake may not have room for both.
        """
        yield from self._keys.at(key)
        for prefix in prefixes(key):
            yield from self._trees.get(prefix, ())
            yield from self._keys.at(prefix[:-1])
        if key.endswith(b"/"):
            yield from self._keys.at(key[:-1])
            if whole_tree:
                yield from self._keys.below(key)
        else:
            yield from self._keys.at(key + b"/")
            yield from self._keys.below(key + b"/")


def discard(sets: defaultdict[K, set[int]] | defaultdict[K, set[bytes]], key: K, item: int | bytes) -> None:
    """Take *item* out of a set of *sets*, and an empty set away."""
    sets[key].discard(item)
    if not sets[key]:
        del sets[key]
