"""How long what the lake said may be believed."""

from __future__ import annotations

from dataclasses import dataclass

FOREVER_S = 365 * 86400.0  # What the kernel is told on immutable mounts.
_RELIST_AHEAD = 0.25  # Of the ttl: a directory in use is listed again this long before it expires.


@dataclass(frozen=True, slots=True)
class Freshness:
    """*ttl_s* seconds after it was seen, a listing or an entry must be asked for again."""

    ttl_s: float
    immutable: bool

    def remaining_s(self, seen_at_s: float, now_s: float) -> float:
        """Return for how long a thing seen at *seen_at_s* (0: never) is good; 0 when it expired.

        A time of seeing in the future (the clock was set back) counts as expired.
        """
        if self.immutable and seen_at_s:
            return FOREVER_S
        age_s = now_s - seen_at_s
        return max(0.0, self.ttl_s - age_s) if age_s >= 0 else 0.0

    def is_fresh(self, seen_at_s: float, now_s: float) -> bool:
        return self.remaining_s(seen_at_s, now_s) > 0

    def wants_relist_ahead(self, listed_at_s: float, duration_s: float, now_s: float) -> bool:
        """Return whether a directory in use should be listed again before it expires.

        Not where a listing takes longer than half of the ttl: it would never stop.
        """
        if self.immutable or duration_s > self.ttl_s / 2:
            return False
        margin_s = max(2 * duration_s, _RELIST_AHEAD * self.ttl_s)
        return 0 < self.remaining_s(listed_at_s, now_s) < margin_s
