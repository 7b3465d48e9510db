"""What is shown of the reads of large files: how they are read, and how much was fetched for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cache.fetcher import Fetcher
from cache.index import Index
from cache.policy.amplification import Traffic
from cache.records import Node

_MEMBERS_MAX = 10_000


def of_file(fetcher: Fetcher, node: Node) -> dict[str, Any]:
    """Return "access", "record_bytes" and what `shown` does, empty for a file nothing is known of."""
    traffic = fetcher.amplification.of(node.vid) if node.vid else None
    if traffic is None:
        return {}
    access, record_bytes = fetcher.access(node.vid)
    return {"access": access.value, "record_bytes": record_bytes or None, **shown(traffic)}


def of_set(fetcher: Fetcher, index: Index, inodes: Sequence[int]) -> dict[str, Any]:
    """Return what `shown` does, of the files *inodes* together: of the first _MEMBERS_MAX."""
    total = Traffic()
    for node in index.nodes(inodes[:_MEMBERS_MAX]):
        found = fetcher.amplification.of(node.vid) if node is not None and node.vid else None
        if found is not None:
            total.add(found)
    return shown(total)


def shown(traffic: Traffic) -> dict[str, Any]:
    """Return "fetched_bytes", "read_bytes" and "amplification" (None where nothing was read)."""
    ratio = traffic.amplification
    return {
        "fetched_bytes": traffic.fetched_bytes,
        "read_bytes": traffic.read_bytes,
        "amplification": None if ratio is None else round(ratio, 3),
    }
