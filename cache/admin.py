"""What the admin commands ask of the mover: see `cache/control.py` for the verbs."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio

from cache import traffic
from cache.counters import Features
from cache.errors import SluiceError, UsageError
from cache.keep_admin import KeepAdmin
from cache.model import Inode
from cache.mover import Mover
from cache.pinning import checked_evictable
from cache.policy.queues import PINNED
from cache.recorder import Recorder
from cache.records import Node, VersionRow
from cache.warming import items_of
from cache.write_admin import WriteAdmin

Progress = Callable[[dict[str, Any]], Awaitable[bool]]  # Returns whether the command still listens.

_REQUESTS_SHOWN = ("requests", "opens", "opens_granted", "opens_passed_through", "reads", "lookups")
_LS_LIMIT_MAX = 100_000
_TRACE_S_MAX = 7 * 86400.0
_TRACE_PART = 10_000
_TRACE_EVERY_S = 1.0
_PIPES_GONE_S = 2.0
_RANKED = 100_000  # How deep the order of leaving is looked at.


class Admin:
    """Answers the control socket."""

    def __init__(self, mover: Mover, features: Features, supervisor_pid: int) -> None:
        self._mover = mover
        self._features = features
        self._supervisor_pid = supervisor_pid
        self._writes = WriteAdmin(mover)
        self._keeps = KeepAdmin(mover)

    async def handle(self, request: dict[str, Any], progress: Progress) -> Any:
        """Return the verb's result, as JSON values. Raises SluiceError."""
        match request["verb"]:
            case "status":
                return self.status()
            case "ls":
                limit = min(int(request.get("limit", 1000)), _LS_LIMIT_MAX)
                return await self._ls(request["paths"], bool(request.get("recursive")), limit)
            case "evict":
                return await self._evict(request["paths"], progress)
            case "paths":
                return await self._keeps.add_paths(str(request["upload"]), list(request["paths"]))
            case "warm":
                return await self._keeps.warm(request, progress)
            case "pin":
                return await self._keeps.pin(request, progress)
            case "unpin":
                return await self._keeps.unpin(list(request["paths"]))
            case "hidden":
                return self._hidden(int(request.get("limit", 1000)))
            case "hint":
                return await self._mover.orders.hint(request)
            case "trace":
                return await self._trace(min(float(request["seconds"]), _TRACE_S_MAX), progress)
            case "drain":
                return await self._drain(progress)
            case "queue":
                return self._writes.queue(max(0, int(request.get("limit", 1000))))
            case "retry":
                return await self._writes.retry(list(request.get("paths", ())))
            case "resolve":
                return await self._writes.resolve(list(request["paths"]), request["keep"])
            case "sync":
                return await self._writes.sync(list(request["paths"]), progress)
            case verb:
                raise UsageError(f"no such verb: {verb}")

    def status(self) -> dict[str, Any]:
        mover, config = self._mover, self._mover.config
        totals = mover.counters.totals()
        pids = mover.counters.pids()
        return {
            "mountpoint": str(config.mountpoint),
            "lake": config.lake.url,
            "endpoint_url": config.lake.endpoint_url,
            "profile": config.profile,
            "read_only": config.read_only,
            "immutable": config.immutable,
            "ttl_s": config.ttl_s,
            "uptime_s": round(time.time() - mover.started_at_s, 1),
            "features": dict(self._features),
            "processes": {
                "supervisor": self._supervisor_pid,
                "workers": [pid for pid in pids if pid],
                "mover": os.getpid(),
                "notifier": mover.counters.row(0).get("notifier_pid") or None,
            },
            "tiers": [
                {
                    "name": tier.name,
                    "path": str(tier.files.path),
                    "used_bytes": tier.budget.used_bytes,
                    "size_bytes": tier.budget.size_bytes,
                    "objects": len(tier.policy),
                    "policy": tier.policy.name,
                }
                for tier in mover.residency.tiers
            ],
            "lake_io": {
                "bytes_fetched": mover.lake_io.bytes_fetched,
                "bytes_sent": mover.lake_io.bytes_sent,
                "requests": {
                    verb: mover.lake_io.requests[verb]
                    for verb in ("list", "head", "get", "put", "copy", "delete")
                },
                "retries": mover.lake_io.retries,
                "failing_for_s": mover.lake_io.failing_for_s(),
                "flights": mover.fetcher.flights_under_way,
            },
            "reads": {
                "bytes_by_source": {
                    "dram": totals["bytes_dram"],
                    "nvme": totals["bytes_nvme"],
                    "lake": totals["bytes_lake"] + totals["bytes_through"],
                },
                "requests": {name: totals[name] for name in _REQUESTS_SHOWN},
                "hit_rate": _hit_rate(totals),
                "waits": totals["waits"],
                "wait_s": totals["wait_us"] / 1e6,
                "errors": totals["errors"],
                "corrupt_blocks": totals["corrupt_blocks"],
            },
            "moved_bytes": {
                "demoted": mover.residency.demoted_bytes,
                "evicted": mover.residency.evicted_bytes,
            },
            "namespace": mover.index.entries(),
            "dirty_bytes": mover.uploader.dirty_bytes if mover.uploader is not None else 0,
            "uploads": self._writes.uploads(),
            "sets": mover.ahead.status() if mover.ahead is not None else [],
            "pins": self._keeps.pins(),
            "warming": mover.warmer.status(),
            "told": mover.control_files.status(),
        }

    def _below(self, inode: Inode, node: Node, path: str, *, deep: bool) -> Iterator[tuple[Inode, Node, str]]:
        """Yield (inode, node, path) of the file, or of what the directory holds."""
        if not node.is_directory:
            yield inode, node, path
            return
        after = b""
        while entries := self._mover.index.children(inode, after, 1000):
            for child, child_node in entries:
                child_path = (
                    f"{path}/{os.fsdecode(child_node.name)}" if path else os.fsdecode(child_node.name)
                )
                if deep and child_node.is_directory:
                    yield from self._below(child, child_node, child_path, deep=True)
                else:
                    yield child, child_node, child_path
            after = entries[-1][1].name

    async def _ls(self, paths: list[str], recursive: bool, limit: int) -> dict[str, Any]:
        entries: list[dict[str, Any]] = []
        errors: list[dict[str, str]] = []
        ranks = self._ranks()
        for path in paths:
            try:
                inode, node = await self._mover.walker.resolve(path)
                if node.is_directory:
                    await self._mover.lister.list_directory(inode)
            except SluiceError as error:
                errors.append({"path": path, "error": str(error)})
                continue
            for child_inode, child, child_path in self._below(inode, node, path.strip("/"), deep=recursive):
                if len(entries) >= limit:
                    return {"entries": entries, "errors": errors, "truncated": True}
                entries.append(self._entry(child_inode, child, child_path, ranks))
        return {"entries": entries, "errors": errors, "truncated": False}

    def _ranks(self) -> dict[bytes, int]:
        """Return version id -> how many items of its tier leave before it (0: the next)."""
        ranks: dict[bytes, int] = {}
        for tier in self._mover.residency.tiers:
            for rank, item in enumerate(tier.policy.order(_RANKED)):
                ranks.setdefault(item[:16], rank)
        return ranks

    def _entry(self, inode: Inode, node: Node, path: str, ranks: dict[bytes, int]) -> dict[str, Any]:
        row = self._mover.index.version(node.vid) if node.vid else None
        entry: dict[str, Any] = {
            "path": path,
            "kind": "directory" if node.is_directory else "file",
            "size_bytes": node.size_bytes,
            "tier": None,
            "cached_bytes": 0,
            "hits": 0,
            "last_used_s": None,
            "victim_rank": None,
            "leaves": None,
            "pinned": self._mover.keeper.pins.pinned_by(os.fsencode(path)) is not None,
            "dirty": self._writes.state_of(inode),
            "access": None,  # These five of large files, since the mover's start.
            "record_bytes": None,
            "fetched_bytes": None,
            "read_bytes": None,
            "amplification": None,
        }
        entry.update(traffic.of_file(self._mover.fetcher, node))
        if row is not None:
            usage = self._mover.residency.usage(node.vid, row)
            entry["tier"] = self._mover.residency.tiers[row.tier].name
            entry["cached_bytes"] = self._cached_bytes(node.vid, row)
            entry["hits"], entry["last_used_s"] = usage.hits, usage.last_used_s
            entry["victim_rank"] = ranks.get(node.vid)
            entry["leaves"] = self._why(node.vid, row)
        return entry

    def _why(self, vid: bytes, row: VersionRow) -> str | None:
        """Return what decides when the version leaves its tier."""
        if (stays := self._mover.residency.has_to_stay(vid)) is not None:
            return stays
        policy = self._mover.residency.tiers[row.tier].policy
        if self._mover.keeper.pins.is_pinned(vid):
            return PINNED
        return next((policy.why(item) for item in items_of(self._mover.index, vid, row)), None)

    def _cached_bytes(self, vid: bytes, row: VersionRow) -> int:
        if row.whole:
            return row.size_bytes
        groups = self._mover.index.groups_of(vid)
        return sum(group.present_bytes(number, row.size_bytes) for number, group in groups)

    async def _evict(self, paths: list[str], progress: Progress) -> dict[str, Any]:
        objects = freed_bytes = 0
        errors: list[dict[str, str]] = []
        for path in paths:
            try:
                inode, node = await self._mover.walker.resolve(path)
                checked_evictable(path, self._mover.keeper.pins.pinned_by(os.fsencode(path.strip("/"))))
            except SluiceError as error:
                errors.append({"path": path, "error": str(error)})
                continue
            pinned = 0
            for _, child, child_path in list(self._below(inode, node, path.strip("/"), deep=True)):
                if self._mover.keeper.pins.pinned_by(os.fsencode(child_path)) is not None:
                    pinned += 1
                    continue
                freed = await self._mover.residency.drop_version(child.vid) if child.vid else 0
                objects += freed > 0
                freed_bytes += freed
            if pinned:
                text = f"{pinned:,} pinned files below it stay: `sluice unpin` them first"
                errors.append({"path": path, "error": text})
        return {"objects": objects, "bytes": freed_bytes, "errors": errors}

    def _hidden(self, limit: int) -> dict[str, Any]:
        count, keys = self._mover.index.hidden(limit)
        return {"count": count, "keys": [{"key": os.fsdecode(hid.key), "reason": hid.reason} for hid in keys]}

    async def _trace(self, seconds: float, progress: Progress) -> dict[str, Any]:
        """Record for so long, or until the command goes away."""
        recorder = Recorder(self._mover.index, time.time())
        self._mover.recorders.append(recorder)
        try:
            with trio.move_on_after(seconds):
                is_heard = await self._send_uses(recorder, progress)  # At once: this has begun.
                while is_heard:
                    await trio.sleep(_TRACE_EVERY_S)
                    is_heard = await self._send_uses(recorder, progress)
        finally:
            self._mover.recorders.remove(recorder)
        await self._send_uses(recorder, progress)
        return {"dropped": recorder.dropped}

    async def _send_uses(self, recorder: Recorder, progress: Progress) -> bool:
        uses, is_heard = recorder.take(), True
        for start in range(0, len(uses) or 1, _TRACE_PART):  # An empty part says that the mount is there.
            is_heard = await progress({"uses": uses[start : start + _TRACE_PART]})
        return is_heard

    async def _drain(self, progress: Progress) -> dict[str, Any]:
        moved = 0
        with trio.move_on_after(_PIPES_GONE_S):
            await self._mover.pipes.let_go()  # They would keep the mount busy.
        async for done, total in self._mover.residency.drain_dram():
            moved = done
            await progress({"done": done, "total": total, "unit": "bytes"})
        return {"bytes": moved}


def _hit_rate(totals: dict[str, int]) -> float | None:
    """Return the share of the bytes read that came from a tier without waiting; None before any came."""
    hits = totals["bytes_dram"] + totals["bytes_nvme"]
    read_bytes = hits + totals["bytes_lake"] + totals["bytes_through"]
    return round(hits / read_bytes, 4) if read_bytes else None
