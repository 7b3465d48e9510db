"""At the mover's start: make index, files, budgets and policies agree.

After a clean unmount or a killed process this finds next to nothing to do. After a machine crash
the index is gone, and whole files on NVMe are taken over once their bytes match their labels.
"""

from __future__ import annotations

import logging
import os
from functools import partial

from cache.committer import Committer
from cache.engine import Engine
from cache.index import Index
from cache.model import VersionId
from cache.policy.eviction import ItemId
from cache.records import VersionRow, charge, group_key
from cache.residency import Residency, Sparse, Tier

log = logging.getLogger(__name__)


async def restore(residency: Residency, index: Index, committer: Committer, engine: Engine) -> None:
    """Fill budgets and policies from what is on disk; drop rows and files that lack each other."""
    rows = dict(index.versions())
    found: dict[tuple[int, bytes], None] = {}
    for place, tier in enumerate(residency.tiers):
        await engine.run(tier.files.prepare)
        stored = await engine.run(partial(_stored, tier))
        for vid, whole, disk_bytes in stored:
            row = rows.get(vid)
            if row is not None and row.tier == place and row.whole == whole:
                found[place, vid] = None
            elif row is None and whole and not tier.files.is_memory:
                if not residency.add_unverified(place, vid, disk_bytes):
                    tier.files.remove(vid)
            else:
                os.unlink(tier.files.file_path(vid, whole=whole))
    lost = [vid for vid, row in rows.items() if (row.tier, vid) not in found]
    over = _take_in(residency, index, {vid: row for vid, row in rows.items() if (row.tier, vid) in found})
    if lost or over:
        await committer.commit(lambda w: w.remove_versions(lost + over))
        for vid in over:
            residency.tiers[rows[vid].tier].files.remove(vid)
        log.info("cache: %d objects were gone, %d are over the tiers' sizes now", len(lost), len(over))


def _stored(tier: Tier) -> list[tuple[VersionId, bool, int]]:
    return list(tier.files.stored())


def _take_in(residency: Residency, index: Index, rows: dict[VersionId, VersionRow]) -> list[VersionId]:
    """Charge what is there, most recently used first; return what has no room any more."""
    over: list[VersionId] = []
    kept: list[tuple[VersionId, VersionRow, dict[ItemId, int]]] = []
    for vid, row in sorted(rows.items(), key=lambda pair: pair[1].last_used_s, reverse=True):
        sizes = _sizes(index, vid, row)
        budget = residency.tiers[row.tier].budget
        if sum(sizes.values()) > budget.room_bytes:
            over.append(vid)
            continue
        budget.take(sum(sizes.values()))
        kept.append((vid, row, sizes))
    for vid, row, sizes in reversed(kept):
        for item, size_bytes in sizes.items():
            residency.tiers[row.tier].policy.added(item, size_bytes, used=False)
        if not row.whole:
            blocks = sum(group.present.bit_count() for _, group in index.groups_of(vid))
            residency.add_sparse(vid, Sparse(row.version, row.tier, blocks))
    return over


def _sizes(index: Index, vid: VersionId, row: VersionRow) -> dict[ItemId, int]:
    if row.whole:
        return {ItemId(vid): charge(row.size_bytes)}
    return {
        ItemId(group_key(vid, number)): group.charged_bytes(number, row.size_bytes)
        for number, group in index.groups_of(vid)
    }
