"""What became of the bytes that were read ahead: used, or evicted before anybody used them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from cache.model import MIB

_WASTED_FREE_BYTES = 32 * MIB  # Not worth stopping for.
_WASTED_SHARE_MAX = 0.125


@dataclass(slots=True)
class Account:
    """Bytes read ahead for one set. used_bytes + wasted_bytes <= fetched_bytes."""

    fetched_bytes: int = 0
    used_bytes: int = 0
    wasted_bytes: int = 0
    # So much of fetched_bytes and wasted_bytes is not judged any more.
    _past_fetched_bytes: int = 0
    _past_wasted_bytes: int = 0

    @property
    def is_wasteful(self) -> bool:
        fetched_bytes = self.fetched_bytes - self._past_fetched_bytes
        wasted_bytes = self.wasted_bytes - self._past_wasted_bytes
        return wasted_bytes > max(_WASTED_FREE_BYTES, _WASTED_SHARE_MAX * fetched_bytes)

    def epoch_began(self) -> None:
        """What was so far counts half: who fetches nothing ahead could never show that he wastes less."""
        self._past_fetched_bytes = (self._past_fetched_bytes + self.fetched_bytes) // 2
        self._past_wasted_bytes = (self._past_wasted_bytes + self.wasted_bytes) // 2


class Ledger:
    """Object versions that were read ahead and are neither used nor gone yet."""

    def __init__(self) -> None:
        self._open: dict[bytes, tuple[Account, int]] = {}

    def fetched(self, vid: bytes, size_bytes: int, account: Account) -> None:
        """A version is being read ahead. Told before it lands: a reader may be waiting then."""
        if vid in self._open:
            return
        self._open[vid] = (account, size_bytes)
        account.fetched_bytes += size_bytes

    def not_fetched(self, vid: bytes) -> None:
        """The fetch failed, so nothing was fetched after all."""
        if (entry := self._open.pop(vid, None)) is not None:
            entry[0].fetched_bytes -= entry[1]

    def used_all(self, vids: Set[bytes]) -> None:
        for vid in vids & self._open.keys() if self._open else ():
            self.used(vid)

    def used(self, vid: bytes) -> None:
        if (entry := self._open.pop(vid, None)) is not None:
            entry[0].used_bytes += entry[1]

    def left(self, vid: bytes) -> None:
        """The version has left the cache."""
        if (entry := self._open.pop(vid, None)) is not None:
            entry[0].wasted_bytes += entry[1]

    def left_in_part(self, vid: bytes, size_bytes: int) -> None:
        """So much of the version has left the cache, and the rest is there."""
        if (entry := self._open.get(vid)) is not None:
            account, rest_bytes = entry
            wasted_bytes = min(size_bytes, rest_bytes)
            account.wasted_bytes += wasted_bytes
            self._open[vid] = (account, rest_bytes - wasted_bytes)

    def __len__(self) -> int:
        return len(self._open)
