"""How residence is written to the index: changes for `Committer.commit`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cache.index_writer import IndexWriter
from cache.model import GROUP_BLOCKS, GroupIndex, ObjectVersion, blocks_in_group, group_count
from cache.policy.eviction import ItemId
from cache.records import Group, VersionRow


@dataclass(slots=True)
class Usage:
    hits: int = 0
    last_used_s: float = 0.0


def group_of(item: bytes) -> GroupIndex:
    return GroupIndex(int.from_bytes(item[16:], "big"))


def put_whole(w: IndexWriter, version: ObjectVersion, place: int, checksums: Sequence[int]) -> None:
    vid = version.id
    w.put_version(vid, _row(version, place, whole=True))
    for group in range(group_count(version.size_bytes)):
        part = checksums[group * GROUP_BLOCKS : (group + 1) * GROUP_BLOCKS]
        w.put_group(vid, group, Group.empty(len(part), time.time_ns()).with_blocks(0, list(part)))


def put_blocks(
    w: IndexWriter, version: ObjectVersion, place: int, group: GroupIndex, first: int, checksums: list[int]
) -> None:
    vid = version.id
    version_row = w.version(vid)
    if version_row is None:
        w.put_version(vid, _row(version, place, whole=False))
    elif version_row.tier != place:  # What is left of one without blocks, which was elsewhere.
        w.put_version(vid, msgspec.structs.replace(version_row, tier=place))
    row = w.group(vid, group)
    if row is None:
        row = Group.empty(blocks_in_group(version.size_bytes, group), time.time_ns())
    w.put_group(vid, group, row.with_blocks(first, checksums))


def _row(version: ObjectVersion, place: int, *, whole: bool) -> VersionRow:
    key = version.key.encode("utf-8", "surrogateescape")
    return VersionRow(key, version.etag, version.size_bytes, place, whole, 0, time.time())


def change(w: IndexWriter, vid: bytes, **changes: Any) -> None:
    row = w.version(vid)
    assert row is not None, vid.hex()
    w.put_version(vid, msgspec.structs.replace(row, **changes))


def put_usage(w: IndexWriter, usages: dict[bytes, Usage]) -> None:
    for vid, usage in usages.items():
        row = w.version(vid)
        if row is not None:
            last_used_s = max(row.last_used_s, usage.last_used_s)
            hits = row.hits + usage.hits
            w.put_version(vid, msgspec.structs.replace(row, hits=hits, last_used_s=last_used_s))


def drop_items(w: IndexWriter, items: list[ItemId], emptied: set[bytes]) -> None:
    for item in items:
        if len(item) == 16 or item[:16] in emptied:
            w.remove_version(item[:16])
        else:
            w.remove_group(item[:16], group_of(item))
