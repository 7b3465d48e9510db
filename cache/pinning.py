"""Pins carried out: what a pinned path shows never leaves the cache, and what it showed before may.

The eviction policies of the disk tiers know which items are pinned (`Tier.added`). Here is what sets
them right when pins change, when names come to show something else, and at the mover's start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import trio

from cache.errors import SluiceError, UsageError
from cache.index import Index
from cache.model import Inode
from cache.pins import Pins
from cache.residency import Residency
from cache.walking import Found, Walker
from cache.warming import items_of

log = logging.getLogger(__name__)

_STEPS = 200
_GATHER_S = 1.0  # So long changes of names are gathered before the pins are looked over,
_GATHER_SHARE = 10  # or so many times as long as that took last.
_SPARE_SHARE = 16  # Of each disk tier, this part is never pinned: other content has to pass through.


class Keeper:
    """For the mover's trio thread."""

    def __init__(self, index: Index, residency: Residency, walker: Walker, pins: Pins) -> None:
        self.pins = pins
        self._index = index
        self._residency = residency
        self._walker = walker
        self._is_stale = trio.Event()
        self._moved: list[Inode] = []  # Renamed here, maybe to below a pinned directory.

    # What is asked

    async def pin(self, paths: Iterable[str]) -> tuple[Found, list[str]]:
        """Pin what is there of *paths*; return its files and the new pins. What is not there is noted.

        Raises SluiceError, with nothing changed, where more would be pinned than the disks hold.
        """
        found, new = Found(), []
        for path in paths:
            failed = found.failed
            await self._walker.add(found, path)
            if found.failed == failed or await self._is_there(path):
                new.append(_normal(path))
        wanted = {os.fsencode(path) for path in new}
        everything = Found()
        for pin in sorted(wanted.union(self.pins.paths)):
            await self._walker.add(everything, os.fsdecode(pin))
        await self._check_room(everything)
        if not wanted.issubset(self.pins.paths):
            self.pins.replace(wanted.union(self.pins.paths))
        await self._settle(found.inodes)
        return found, new

    async def _is_there(self, path: str) -> bool:
        """Return whether there is such an entry, though something below it could not be listed."""
        try:
            await self._walker.resolve(path)
            return True
        except SluiceError:
            return False

    async def _check_room(self, found: Found) -> None:
        disks = [tier for tier in self._residency.tiers if not tier.files.is_memory]
        sizes = [tier.budget.size_bytes - tier.budget.size_bytes // _SPARE_SHARE for tier in disks]
        charged_bytes = largest = 0
        for number, inode in enumerate(found.inodes):
            if number % _STEPS == 0:
                await trio.lowlevel.checkpoint()
            node = self._index.node(inode)
            if node is not None:
                file_bytes = disks[0].files.whole_bytes(node.size_bytes)
                charged_bytes, largest = charged_bytes + file_bytes, max(largest, file_bytes)
        if charged_bytes > sum(sizes) or largest > max(sizes):
            raise SluiceError(
                f"all that would be pinned takes {charged_bytes:,} bytes, the disk tiers have room for"
                f" {sum(sizes):,}; pin less, unpin something, or mount with a larger --cache"
            )

    async def unpin(self, paths: Iterable[str]) -> tuple[list[str], list[dict[str, str]]]:
        """Take back the pins at and below *paths*; return them, and what is wrong with the others."""
        gone: set[bytes] = set()
        errors = []
        for path in paths:
            packed = os.fsencode(_normal(path))
            below = {pin for pin in self.pins.paths if _is_below(pin, packed)}
            gone |= below
            if not below:
                by = self.pins.pinned_by(packed)
                text = (
                    "is not pinned" if by is None else f"is pinned by its directory {_shown(by)}: unpin that"
                )
                errors.append({"path": path, "error": text})
        if gone:
            self.pins.replace(set(self.pins.paths) - gone)
            await self._sweep()
        return [os.fsdecode(pin) for pin in sorted(gone)], errors

    def pinned_bytes(self) -> int:
        """Return the bytes of the disk tiers that are taken by what is pinned."""
        return sum(tier.policy.pinned_bytes for tier in self._residency.tiers)

    # What changes

    def names_changed(self) -> None:
        """Names show something else now: some of what is pinned may be no longer."""
        if self.pins:
            self._is_stale.set()

    def renamed(self, parent: int, name: bytes) -> None:
        """Something got this name through the mount."""
        found = self._index.child(parent, name) if self.pins else None
        if found is not None:
            self._moved.append(found[0])
        self.names_changed()

    async def run(self) -> None:
        """Set the pins right at the start, and whenever names have changed, for ever."""
        took_s = await self._guarded_look(start=True)
        while True:
            await self._is_stale.wait()
            await trio.sleep(max(_GATHER_S, _GATHER_SHARE * took_s))
            self._is_stale = trio.Event()
            took_s = await self._guarded_look(start=False)

    async def _guarded_look(self, *, start: bool) -> float:
        """Look the pins over; return how many seconds that took."""
        began_s = trio.current_time()
        try:
            moved, self._moved = self._moved, []
            paths = self.pins.paths if start else [self._index.path_of(inode) for inode in moved]
            for path in paths:
                if self.pins.pinned_by(path) is not None:
                    found = Found()
                    await self._walker.add(found, os.fsdecode(path))
                    await self._settle(found.inodes)
            await self._sweep()
        except SluiceError as error:
            log.warning("pins could not be looked over: %s", error)
        except Exception:  # A fault of ours costs pins of late comers, not the mover.
            log.exception("pins could not be looked over")
        return trio.current_time() - began_s

    async def _settle(self, inodes: Iterable[int]) -> None:
        """Pin what is cached of these files, if their paths are pinned."""
        for number, inode in enumerate(inodes):
            if number % _STEPS == 0:
                await trio.lowlevel.checkpoint()
            node = self._index.node(inode)
            row = self._index.version(node.vid) if node is not None and node.vid else None
            if node is None or row is None:
                continue
            self.pins.note_place(Inode(inode), node.vid)
            tier = self._residency.tiers[row.tier]
            if not tier.files.is_memory and self.pins.is_pinned(node.vid):
                for item in items_of(self._index, node.vid, row):
                    tier.policy.pin(item)

    async def _sweep(self) -> None:
        """Let go of what is pinned no longer."""
        for tier in self._residency.tiers:
            for number, item in enumerate(tier.policy.pinned()):
                if number % _STEPS == 0:
                    await trio.lowlevel.checkpoint()
                if not self.pins.is_pinned(item[:16]):
                    tier.policy.unpin(item)


def checked_evictable(path: str, by: bytes | None) -> None:
    """Raise UsageError where *path* is pinned."""
    if by is not None:
        which = "is pinned" if by == os.fsencode(path.strip("/")) else f"is pinned by {_shown(by)}"
        raise UsageError(f"{which}: `sluice unpin` it first")


def _shown(pin: bytes) -> str:
    return os.fsdecode(pin) or "the mount's root"


def _normal(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _is_below(path: bytes, directory: bytes) -> bool:
    return not directory or path == directory or path.startswith(directory + b"/")
