"""How many read-ahead fetches to have under way: more while that brings more, less when asked."""

from __future__ import annotations

_INTERVAL_S_MIN = 0.1
_LANDINGS_PER_FLIGHT = 2  # An interval sees each of the fetches land about so often.
_GAIN_MIN = 1.05
_LOSS_MAX = 0.8
_TRY_EVERY = 16  # Intervals at one level before the next one is tried again.
_CALM_INTERVALS = 4  # Without growth, after the lake asked for less.


class Parallelism:
    """Climbs to the least number of fetches that gives about the most bytes a second.

    Only intervals in which `limit` fetches were under way all the time count: tell of others
    with `idle`. Invariant: 1 <= limit <= most.
    """

    def __init__(self, most: int, first: int = 16) -> None:
        assert most >= 1 and first >= 1
        self.most = most
        self.limit = min(first, most)
        self._rate = 0.0  # Bytes a second in the last interval.
        self._held = 0
        self._calm = 0
        self._slowed_at_s = -1.0
        self._restart(None)

    def _restart(self, now_s: float | None) -> None:
        self._started_at_s, self._landed, self._bytes = now_s, 0, 0

    def idle(self) -> None:
        """Fewer than `limit` fetches are under way, for want of something to fetch."""
        self._restart(None)

    def landed(self, size_bytes: int, now_s: float) -> None:
        if self._started_at_s is None:
            self._restart(now_s)
            return
        self._landed += 1
        self._bytes += size_bytes
        took_s = now_s - self._started_at_s
        if self._landed >= _LANDINGS_PER_FLIGHT * self.limit and took_s >= _INTERVAL_S_MIN:
            self._judge(self._bytes / took_s)
            self._restart(now_s)

    def _judge(self, rate: float) -> None:
        before, self._rate = self._rate, rate
        if self._calm:
            self._calm -= 1
        elif rate > _GAIN_MIN * before or self._held >= _TRY_EVERY:
            self._held = 0
            self.limit = min(self.most, self.limit + max(1, self.limit // 2))
        elif rate < _LOSS_MAX * before and self.limit > 2:
            self._held = 0
            self.limit -= max(1, self.limit // 4)
        else:
            self._held += 1

    def slowed(self, now_s: float) -> None:
        """The lake refused or failed a request: halve, at most once a second."""
        self._calm = _CALM_INTERVALS
        self._rate = 0.0
        if 0 <= now_s - self._slowed_at_s < 1.0:
            return
        self._slowed_at_s = now_s
        self.limit = max(1, self.limit // 2)
        self._restart(None)
