"""Which large files readers are going through: what of them is cached stays until they have ended."""

from __future__ import annotations

from collections import OrderedDict

_FILES_MAX = 64
_IDLE_S = 120.0  # Nobody began to read it for so long: who did has ended somewhere in the middle.


class Hands:
    """Object versions in hands, in the order in which they were taken. At most _FILES_MAX."""

    def __init__(self) -> None:
        self._since_s: OrderedDict[bytes, float] = OrderedDict()

    def take(self, vid: bytes, now_s: float) -> list[bytes]:
        """Note that a reader begins *vid*; return those to let go: too many, or forgotten."""
        self._since_s[vid] = now_s
        self._since_s.move_to_end(vid)
        gone = []
        while len(self._since_s) > _FILES_MAX or next(iter(self._since_s.values())) < now_s - _IDLE_S:
            gone.append(self._since_s.popitem(last=False)[0])
        return gone

    def ended(self, vid: bytes) -> bool:
        """A reader came to the end of *vid*; return whether it was in hands."""
        return self._since_s.pop(vid, None) is not None

    def __len__(self) -> int:
        return len(self._since_s)
