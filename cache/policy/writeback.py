"""What is sent to the lake when, in which pieces and how fast."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass

from cache.errors import LakeUnavailable
from cache.model import MIB, OBJECT_BYTES_MAX, ceil_div

# One PUT carries so much. A part of this size takes long enough that its request's own cost is small.
SINGLE_PUT_BYTES_MAX = 16 * MIB
_PARTS_MAX = 9000  # S3 allows 10,000 (User Guide, "Multipart upload limits").
_SETTLED_S = 0.05  # The kernel's clock for ctime ticks every 1 to 10 ms: see `Quiet`.
_REFUSED_AGAIN_S = 600.0


def part_bytes(size_bytes: int, part_bytes_min: int = 0) -> int:
    """Return the size of an upload's parts but the last: whole MiB, so that 5 TiB fit in 10,000 parts."""
    assert 0 <= size_bytes <= OBJECT_BYTES_MAX, size_bytes
    needed = ceil_div(ceil_div(size_bytes, _PARTS_MAX), MIB) * MIB
    return max(SINGLE_PUT_BYTES_MAX, needed, part_bytes_min)


@dataclass(frozen=True, slots=True)
class Quiet:
    """How long a file's bytes stay unchanged before they are sent.

    *changed_at_s* is the last change's unix time. A clock that was set back must not delay for
    longer than the quiet time: what was changed in the future counts as changed now.
    """

    closed_s: float
    open_s: float

    def due_s(self, changed_at_s: float, now_s: float, *, is_open: bool, hurried: bool) -> float:
        """Return when to send it. Even the *hurried* waits until a change would show in its ctime."""
        delay_s = _SETTLED_S if hurried else max(_SETTLED_S, self.open_s if is_open else self.closed_s)
        return min(changed_at_s, now_s) + delay_s


@dataclass(frozen=True, slots=True)
class Backoff:
    """When an operation that failed is tried again. There is no last time."""

    first_s: float = 1.0
    longest_s: float = 60.0
    refused_s: float = _REFUSED_AGAIN_S

    def delay_s(self, error: Exception, attempt: int, jitter: float) -> float:
        """Return the pause after the failed *attempt* (from 1). *jitter*: uniform from [0, 1).

        What asking again can't mend is asked for again all the same, rarely: permissions change.
        """
        assert attempt >= 1 and 0 <= jitter < 1, (attempt, jitter)
        if not isinstance(error, LakeUnavailable):
            return self.refused_s
        longest_s = min(self.longest_s, self.first_s * 2.0 ** min(attempt - 1, 30))
        return longest_s * (1 + jitter) / 2


class TokenBucket:
    """Keeps the bytes sent to *bytes_per_s* on average. None: no limit."""

    def __init__(self, bytes_per_s: int | None, burst_s: float = 0.25) -> None:
        assert bytes_per_s is None or bytes_per_s > 0, bytes_per_s
        self._rate = bytes_per_s
        self._burst_s = burst_s
        self._free_at_s = 0.0  # When all that was taken so far is paid for.

    def take(self, size_bytes: int, now_s: float) -> float:
        """Return how long to wait before sending *size_bytes*, which are taken now."""
        if self._rate is None:
            return 0.0
        start_s = max(self._free_at_s, now_s - self._burst_s)
        self._free_at_s = start_s + size_bytes / self._rate
        return max(0.0, start_s - now_s)


class Slots:
    """Shares *total* requests under way between small files and the parts of large ones.

    Where both wait, neither gets all: each keeps a quarter. Large files take turns, part by part, so
    that several checkpoints are sent at the same rate, and a small file waits for no whole large one.
    """

    def __init__(self, total: int) -> None:
        assert total >= 1, total
        self._total = total
        self._reserved = max(1, total // 4) if total > 1 else 0
        self._small: deque[Hashable] = deque()
        self._large: OrderedDict[Hashable, deque[Hashable]] = OrderedDict()
        self._running = {True: 0, False: 0}  # By whether it is a part of a large file.
        self._turn = False  # Whose turn it was last when there is but one slot.

    def ask(self, ticket: Hashable, part_of: Hashable | None = None) -> None:
        """Queue *ticket*: a small file, or a part of the large file *part_of*."""
        if part_of is None:
            self._small.append(ticket)
        else:
            self._large.setdefault(part_of, deque()).append(ticket)

    def grant(self) -> Hashable | None:
        """Return the next ticket that may go, None if there is none or no slot is free."""
        if sum(self._running.values()) >= self._total:
            return None
        large = self._choose()
        if large is None:
            return None
        self._running[large] += 1
        self._turn = large
        return self._next_part() if large else self._small.popleft()

    def release(self, *, large: bool) -> None:
        assert self._running[large] > 0, self._running
        self._running[large] -= 1

    def withdraw(self, ticket: Hashable, part_of: Hashable | None = None) -> None:
        """Take back a ticket that was not granted."""
        queue = self._small if part_of is None else self._large[part_of]
        queue.remove(ticket)
        if part_of is not None and not queue:
            del self._large[part_of]

    def _choose(self) -> bool | None:
        if not (self._small and self._large):
            return None if not (self._small or self._large) else bool(self._large)
        for lane in (True, False):
            if self._running[lane] >= self._total - self._reserved:
                return not lane
        return not self._turn

    def _next_part(self) -> Hashable:
        file, parts = next(iter(self._large.items()))
        ticket = parts.popleft()
        if parts:
            self._large.move_to_end(file)
        else:
            del self._large[file]
        return ticket


class Schedule:
    """When each operation, by its sequence number, is to be looked at next."""

    def __init__(self) -> None:
        self._due_s: dict[int, float] = {}
        self._waiting: list[tuple[float, int]] = []  # A heap; `_due_s` says which are still true.

    def __len__(self) -> int:
        return len(self._due_s)

    def put(self, seq: int, due_s: float) -> None:
        """Have *seq* be due at *due_s*, and no other time."""
        if self._due_s.get(seq) != due_s:
            self._due_s[seq] = due_s
            heapq.heappush(self._waiting, (due_s, seq))

    def remove(self, seq: int) -> None:
        self._due_s.pop(seq, None)

    def pop_due(self, now_s: float) -> list[int]:
        """Take out what is due by *now_s*, longest due first."""
        found: list[int] = []
        while self._waiting and self._waiting[0][0] <= now_s:
            due_s, seq = heapq.heappop(self._waiting)
            if self._due_s.get(seq) == due_s:
                del self._due_s[seq]
                found.append(seq)
        return found

    def due_s(self, seq: int) -> float | None:
        return self._due_s.get(seq)

    def next_s(self) -> float | None:
        """Return when the next one is due."""
        while self._waiting and self._due_s.get(self._waiting[0][1]) != self._waiting[0][0]:
            heapq.heappop(self._waiting)
        return self._waiting[0][0] if self._waiting else None
