"""At the mover's start: make index, files, budgets and policies agree.

After a clean unmount or a killed process this finds next to nothing to do. After a machine crash
the index is gone, and whole files on NVMe are taken over once their bytes match their labels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import msgspec

from cache.committer import Committer
from cache.engine import Engine
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.model import GROUP_BLOCKS, GroupIndex, VersionId, block_count
from cache.places import Tier
from cache.policy.eviction import ItemId
from cache.records import Group, VersionRow, group_key
from cache.residency import Residency
from cache.sparse import Sparse

log = logging.getLogger(__name__)

Rows = dict[VersionId, VersionRow]


@dataclass
class Found:
    """The files in the tiers: those with a row, by version and place, and whole ones without."""

    disk_bytes: dict[VersionId, dict[int, int]] = field(default_factory=dict)
    unknown: list[tuple[int, VersionId, int]] = field(default_factory=list)


async def restore(residency: Residency, index: Index, committer: Committer, engine: Engine) -> None:
    """Fill budgets and policies from what is on disk; drop rows and files that lack each other.

    Raises CacheError when a tier's directory can't be used.
    """
    rows: Rows = dict(index.versions())
    found = await _look(residency.tiers, rows, engine)
    moved = await _settle_places(residency.tiers, rows, found, engine)
    lost = [vid for vid in rows if vid not in found.disk_bytes]
    over = _take_in(residency, index, {vid: row for vid, row in rows.items() if vid in found.disk_bytes})
    if lost or over or moved:

        def apply(w: IndexWriter) -> None:
            for vid in moved:
                w.put_version(vid, rows[vid])
            w.remove_versions(lost + over)

        await committer.commit(apply)
        log.info("cache: %d objects were gone, %d are over the tiers' sizes now", len(lost), len(over))
    for vid in over:
        await engine.run(partial(residency.tiers[rows[vid].tier].files.remove, vid))
    kept = {vid: rows[vid] for vid in rows.keys() - set(lost) - set(over)}
    await _punch_excess(residency.tiers, index, kept, found, engine)
    for place, vid, disk_bytes in found.unknown:
        if not residency.add_unverified(place, vid, disk_bytes):
            await engine.run(partial(residency.tiers[place].files.remove, vid))


async def _look(tiers: list[Tier], rows: Rows, engine: Engine) -> Found:
    """Return what is in the tiers; unlink what nobody can use."""
    found = Found()
    for place, tier in enumerate(tiers):
        await engine.run(tier.files.prepare)
        for vid, whole, disk_bytes in await engine.run(partial(_stored, tier)):
            row = rows.get(vid)
            if row is not None and row.whole == whole:
                found.disk_bytes.setdefault(vid, {})[place] = disk_bytes
            elif row is None and whole and not tier.files.is_memory:
                found.unknown.append((place, vid, disk_bytes))
            else:
                await engine.run(partial(tier.files.unlink, vid, whole=whole))
    return found


def _stored(tier: Tier) -> list[tuple[VersionId, bool, int]]:
    return list(tier.files.stored())


async def _settle_places(tiers: list[Tier], rows: Rows, found: Found, engine: Engine) -> list[VersionId]:
    """Leave one file to each version; return those whose row changed to name another tier.

    Two files: the process ended while it moved one. None where the row says: the tiers were
    given in another order, or with or without DRAM, than last time.
    """
    moved = []
    for vid, places in found.disk_bytes.items():
        row = rows[vid]
        place = row.tier if row.tier in places else min(places)
        for other in places.keys() - {place}:
            await engine.run(partial(tiers[other].files.unlink, vid, whole=row.whole))
        if place != row.tier:
            rows[vid] = msgspec.structs.replace(row, tier=place)
            moved.append(vid)
    return moved


def _take_in(residency: Residency, index: Index, rows: Rows) -> list[VersionId]:
    """Charge what is there, pinned and most recently used first; return what has no room any more."""
    over: list[VersionId] = []
    kept: list[tuple[VersionId, VersionRow, dict[ItemId, int]]] = []

    def rank(pair: tuple[VersionId, VersionRow]) -> tuple[bool, float]:
        return residency.tiers[pair[1].tier].is_pinned(pair[0]), pair[1].last_used_s

    for vid, row in sorted(rows.items(), key=rank, reverse=True):
        sizes = _sizes(residency.tiers, index, vid, row)
        budget = residency.tiers[row.tier].budget
        if sum(sizes.values()) > budget.room_bytes:
            over.append(vid)
            continue
        budget.take(sum(sizes.values()))
        kept.append((vid, row, sizes))
    for vid, row, sizes in reversed(kept):
        for item, size_bytes in sizes.items():
            residency.tiers[row.tier].added(item, size_bytes, used=False)
        if not row.whole:
            blocks = sum(group.present.bit_count() for _, group in index.groups_of(vid))
            residency.add_sparse(vid, Sparse(row.version, row.tier, blocks))
    return over


def _sizes(tiers: list[Tier], index: Index, vid: VersionId, row: VersionRow) -> dict[ItemId, int]:
    if row.whole:
        return {ItemId(vid): tiers[row.tier].files.whole_bytes(row.size_bytes)}
    return {
        ItemId(group_key(vid, number)): group.charged_bytes(number, row.size_bytes)
        for number, group in index.groups_of(vid)
    }


async def _punch_excess(tiers: list[Tier], index: Index, rows: Rows, found: Found, engine: Engine) -> None:
    """Give back what was written to sparse files and never committed: nobody charged it."""
    for vid, row in rows.items():
        charged = sum(_sizes(tiers, index, vid, row).values())
        if row.whole or found.disk_bytes[vid][row.tier] <= charged:
            continue
        for blocks in _absent_runs(index.groups_of(vid), block_count(row.size_bytes)):
            await engine.run(partial(tiers[row.tier].files.punch, vid, blocks))


def _absent_runs(groups: list[tuple[GroupIndex, Group]], blocks: int) -> Iterator[range]:
    """Yield the runs of blocks that are not present, of an object of so many *blocks*."""
    start = 0
    for number, group in groups:
        for i in range(len(group.checksums)):
            if group.present >> i & 1:
                block = number * GROUP_BLOCKS + i
                if block > start:
                    yield range(start, block)
                start = block + 1
    if start < blocks:
        yield range(start, blocks)
