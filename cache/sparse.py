"""Versions that are not whole: where their files are, and how many of their blocks are there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cache.busy import Busy
from cache.committer import Committer
from cache.index import Index
from cache.model import BLOCK_BYTES, ObjectVersion, block_count
from cache.places import Tier, remove
from cache.rows import group_of


@dataclass(slots=True)
class Sparse:
    """A version under partial/: how many of its blocks are there.

    Invariant: no more than the index has; as many once nobody fills it or has groups of it leave.
    """

    version: ObjectVersion
    tier: int
    blocks_present: int = 0

    @property
    def is_full(self) -> bool:
        return self.blocks_present == block_count(self.version.size_bytes)


class SparseVersions:
    """All sparse versions by their ids. For the mover's trio thread."""

    def __init__(self, tiers: list[Tier], index: Index, committer: Committer, busy: Busy) -> None:
        self._tiers = tiers
        self._index = index
        self._committer = committer
        self._busy = busy
        self._states: dict[bytes, Sparse] = {}

    def __contains__(self, vid: bytes) -> bool:
        return vid in self._states

    def __getitem__(self, vid: bytes) -> Sparse:
        return self._states[vid]

    def __len__(self) -> int:
        return len(self._states)

    def get(self, vid: bytes) -> Sparse | None:
        return self._states.get(vid)

    def ids(self) -> set[bytes]:
        return set(self._states)

    def add(self, vid: bytes, state: Sparse) -> Sparse:
        assert vid not in self._states, vid.hex()
        self._states[vid] = state
        return state

    def take(self, vid: bytes) -> Sparse | None:
        """Have the version to oneself: nobody counts its blocks any more. None: somebody else did."""
        return self._states.pop(vid, None)

    def present_bytes(self, vid: bytes) -> int:
        """Return about how many bytes are there of a large object that is not whole: full blocks."""
        state = self._states.get(vid)
        return 0 if state is None else state.blocks_present * BLOCK_BYTES

    def blocks_left(self, items: Iterable[bytes]) -> dict[bytes, int]:
        """Return how many blocks stay of each sparse version that some of *items* are groups of."""
        left: dict[bytes, int] = {}
        for item in items:
            vid = item[:16]
            if len(item) == 16 or vid not in self._states:
                continue
            row = self._index.residence(vid, range(group_of(item), group_of(item) + 1))[1][0]
            blocks_present = left.get(vid, self._states[vid].blocks_present)
            left[vid] = blocks_present - (row.present.bit_count() if row is not None else 0)
        return left

    def forget_if_empty(self, vid: bytes) -> None:
        """Remove what is left of a version without blocks, unless somebody besides the caller is at it."""
        state = self._states.get(vid)
        if state is None or state.blocks_present or self._busy.is_shared(vid):
            return
        del self._states[vid]
        if self._index.version(vid) is not None:
            self._committer.commit_nowait(lambda w: w.remove_version(vid))
        remove(self._tiers[state.tier].files, vid)
