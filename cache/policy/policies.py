"""The eviction policies by the names that `--policy` gives them."""

from __future__ import annotations

from collections.abc import Callable

from cache.policy.auto import AutoPolicy
from cache.policy.eviction import EpochPolicy, EvictionPolicy, LruPolicy

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "auto": AutoPolicy,
    "epoch": EpochPolicy,
    "lru": LruPolicy,
}


def make_policy(name: str) -> EvictionPolicy:
    return POLICIES[name]()
