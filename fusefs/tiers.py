"""Lays the tiers out before anything is forked: directories, tmpfs, sizes."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from cache.config import MountConfig
from cache.counters import Features
from cache.errors import UsageError
from cache.model import MIB
from cache.mover import TierPlan
from cache.store import CacheStore
from fusefs import device

log = logging.getLogger(__name__)

_TIER_BYTES_MIN = 16 * MIB


def lay_out(config: MountConfig, store: CacheStore, features: Features) -> list[TierPlan]:
    """Return the tiers, DRAM first. Raises UsageError where a size makes no sense on its disk."""
    plans: list[TierPlan] = []
    if config.dram_bytes:
        path, reason = _memory_directory(config, store)
        features["dram_tier"] = {"on": True, "reason": reason}
        plans.append(TierPlan("dram", path, True, config.dram_bytes))
    else:
        features["dram_tier"] = {"on": False, "reason": "--dram 0"}
    for number, cache in enumerate(config.caches):
        plans.append(TierPlan(f"nvme{number}", cache.path, False, _disk_size(cache.path, cache.size_bytes)))
    return plans


def take_down(config: MountConfig, store: CacheStore) -> None:
    """Give the DRAM tier's memory back: what it held has moved to NVMe, as far as it fitted."""
    shutil.rmtree(_shared_directory(store), ignore_errors=True)
    path = config.index_directory / "dram"
    if os.path.ismount(path):
        try:
            device.unmount(path)
        except OSError as error:
            log.warning("%s: %s", path, error.strerror)


def _memory_directory(config: MountConfig, store: CacheStore) -> tuple[Path, str]:
    """Return a directory in memory: a tmpfs of our own, else one in /dev/shm."""
    path = config.index_directory / "dram"
    path.mkdir(mode=0o700, exist_ok=True)
    failure = "not root" if os.geteuid() else device.mount_tmpfs(path, _with_slack(config.dram_bytes))
    if failure is None:
        return path, f"tmpfs at {path}"
    shared = _shared_directory(store)
    shared.mkdir(mode=0o700, exist_ok=True)
    if shared.stat().st_uid != os.geteuid():
        raise UsageError(f"{shared}: belongs to another user; remove it, or give --dram 0")
    return shared, f"{shared} ({failure})"


def _shared_directory(store: CacheStore) -> Path:
    return Path(f"/dev/shm/sluice-{os.geteuid()}-{store.id}")


def _with_slack(size_bytes: int) -> int:
    """Return the tmpfs size: the budget counts content, tmpfs counts its directories too."""
    return size_bytes + size_bytes // 16 + 16 * MIB


def _disk_size(path: Path, size_bytes: int | None) -> int:
    """Return the budget: as given, or half of what is free, an earlier cache there included."""
    if size_bytes is not None:
        return size_bytes
    status = os.statvfs(path)
    size_bytes = status.f_bavail * status.f_frsize // 2
    if size_bytes < _TIER_BYTES_MIN:
        raise UsageError(f"--cache {path}: only {2 * size_bytes // MIB} MiB are free; free some space")
    return size_bytes
