"""What all processes of a mount share in memory."""

from __future__ import annotations

from dataclasses import dataclass

from cache.config import MountConfig
from cache.counters import Counters, Features, WriteBudget
from cache.opens import OpenTable


@dataclass(frozen=True, slots=True)
class Shared:
    """Made before the fork. *features*: what the mount can do, once the kernel has answered INIT."""

    counters: Counters
    opens: OpenTable
    budget: WriteBudget
    features: Features

    @classmethod
    def make(cls, config: MountConfig) -> Shared:
        return cls(Counters(max(1, config.workers) + 1), OpenTable(), WriteBudget(), Features())
