"""Which large files readers are going through: what of them is cached stays until they have ended."""

from __future__ import annotations

from collections import OrderedDict

_FILES_MAX = 64
_IDLE_S = 120.0  # Nothing was read of it for so long: its reader has ended somewhere in the middle.


class Hands:
    """Object versions in hands, the one read last comes last. At most _FILES_MAX."""

    def __init__(self) -> None:
        self._read_at_s: OrderedDict[bytes, float] = OrderedDict()

    def take(self, vid: bytes, now_s: float) -> list[bytes]:
        """Note that a reader begins *vid*; return those to let go: too many, or forgotten."""
        self._read_at_s[vid] = now_s
        self._read_at_s.move_to_end(vid)
        gone = []
        while len(self._read_at_s) > _FILES_MAX or next(iter(self._read_at_s.values())) < now_s - _IDLE_S:
            gone.append(self._read_at_s.popitem(last=False)[0])
        return gone

    def seen(self, vid: bytes, now_s: float) -> None:
        """Something of *vid* was read, in hands or not."""
        if vid in self._read_at_s:
            self._read_at_s[vid] = now_s
            self._read_at_s.move_to_end(vid)

    def ended(self, vid: bytes) -> bool:
        """A reader came to the end of *vid*; return whether it was in hands."""
        return self._read_at_s.pop(vid, None) is not None

    def __len__(self) -> int:
        return len(self._read_at_s)
