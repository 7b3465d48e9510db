"""Replays a trace over caches of several sizes and policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.simulate.caches import make_cache
from tools.simulate.trace import Trace


@dataclass(frozen=True, slots=True)
class Lake:
    """How long a miss waits: *latency_s* to the first byte, then *bandwidth_bytes* a second."""

    latency_s: float
    bandwidth_bytes: float

    def wait_s(self, misses: int, fetched_bytes: int) -> float:
        """Return how long readers wait in all when each miss is waited for by itself."""
        return misses * self.latency_s + fetched_bytes / self.bandwidth_bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy with one size would have given over the whole trace."""

    policy: str
    size_bytes: int
    share: float  # Of the bytes of all items that the trace names.
    uses: int
    hits: int
    fetched_bytes: int
    wait_s: float

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses


def replay(trace: Trace, policy: str, size_bytes: int, lake: Lake) -> Outcome:
    cache = make_cache(policy, size_bytes, trace.items)
    hits = fetched_bytes = 0
    for item in trace.items:
        item_bytes = trace.sizes_bytes[item]
        if cache.use(item, item_bytes):
            hits += 1
        else:
            fetched_bytes += item_bytes
    wait_s = lake.wait_s(len(trace) - hits, fetched_bytes)
    share = size_bytes / max(1, trace.distinct_bytes)
    return Outcome(policy, size_bytes, share, len(trace), hits, fetched_bytes, wait_s)


def replay_all(
    trace: Trace, policies: Sequence[str], sizes_bytes: Sequence[int], lake: Lake
) -> Iterator[Outcome]:
    for size_bytes in sizes_bytes:
        for policy in policies:
            yield replay(trace, policy, size_bytes, lake)
