"""What all processes of a mount share in memory."""

from __future__ import annotations

from dataclasses import dataclass

from cache.config import MountConfig
from cache.counters import Counters, Features, WriteBudget
from cache.opens import OpenTable
from cache.passed_names import PassedNames
from fusefs import grants
from fusefs.grants import Grants


@dataclass(frozen=True, slots=True)
class Shared:
    """Made before the fork. *features*: what the mount can do, once the kernel has answered INIT.

    *grants*: None without the channel extension.
    """

    counters: Counters
    opens: OpenTable
    grants: Grants | None
    budget: WriteBudget
    features: Features
    passed_names: PassedNames

    @classmethod
    def make(cls, config: MountConfig) -> Shared:
        given = grants.made() if config.workers else None  # 0: all of it in Python, for debugging.
        counters = Counters(max(1, config.workers) + 1)
        return cls(counters, OpenTable(given), given, WriteBudget(), Features(), PassedNames())
