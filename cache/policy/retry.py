"""When a failed request to the lake is made again: full-jitter exponential back-off.

"Full jitter" (AWS, "Exponential Backoff And Jitter"): a uniform draw from zero to the back-off,
so that many clients that failed together do not come back together.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache.errors import LakeUnavailable, SlowDown

_DOUBLINGS_MAX = 30  # Beyond any longest_s; keeps the power small for absurd attempts.


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to wait, and for how long to go on. *budget_s* counts from the first attempt."""

    budget_s: float = 30.0
    first_s: float = 0.1
    longest_s: float = 5.0
    slow_down_first_s: float = 1.0

    def __post_init__(self) -> None:
        assert self.budget_s >= 0, self
        assert 0 < self.first_s <= self.longest_s, self
        assert 0 < self.slow_down_first_s <= self.longest_s, self

    def delay_s(self, error: Exception, attempt: int, elapsed_s: float, jitter: float) -> float | None:
        """Return how long to wait before the next attempt, or None to give up.

        *attempt* counts the attempts that failed so far, from 1. *elapsed_s* is the time since the
        first began. *jitter* is a fresh uniform draw from [0, 1). Gives up on errors that asking
        again can't mend, and when the wait would end past the budget.
        """
        assert attempt >= 1 and elapsed_s >= 0 and 0 <= jitter < 1, (attempt, elapsed_s, jitter)
        if not isinstance(error, LakeUnavailable):
            return None
        delay_s = jitter * self._backoff_s(error, attempt)
        if isinstance(error, SlowDown):  # The lake asked for a pause: at least half of it is kept.
            delay_s = (self._backoff_s(error, attempt) + delay_s) / 2
        return delay_s if elapsed_s + delay_s < self.budget_s else None

    def _backoff_s(self, error: LakeUnavailable, attempt: int) -> float:
        first_s = self.slow_down_first_s if isinstance(error, SlowDown) else self.first_s
        return min(self.longest_s, first_s * 2.0 ** min(attempt - 1, _DOUBLINGS_MAX))
