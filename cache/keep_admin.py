"""What `sluice warm`, `pin` and `unpin` ask of the mover: see `cache/control.py` for the verbs."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from cache.errors import SluiceError
from cache.mover import Mover
from cache.walking import Found
from cache.warming import Job

Progress = Callable[[dict[str, Any]], Awaitable[bool]]

_TELL_EVERY_S = 0.25
_UPLOADS_MAX = 4


class KeepAdmin:
    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._uploads: OrderedDict[str, Found] = OrderedDict()  # Lists of paths that come in parts.

    async def add_paths(self, upload: str, paths: list[str]) -> dict[str, Any]:
        """Take one part of a list of paths that a `warm` will name."""
        found = self._uploads.setdefault(upload, Found())
        if len(self._uploads) > _UPLOADS_MAX:
            self._uploads.popitem(last=False)
        await self._mover.walker.add_all(found, paths)
        return {"files": len(found.inodes), "failed": found.failed}

    async def warm(self, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Make all files resident, as far as they fit; return how that went."""
        tier = request.get("tier") or ""
        self._mover.warmer.check_tier(tier)
        found = self._uploads.pop(str(request.get("upload", "")), None) or Found()

        async def find() -> Found:
            await self._mover.walker.add_all(found, request.get("paths", ()))
            return found

        return await self._fetch(find, tier, progress)

    async def pin(self, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Pin, and fetch what is missing; with fetch=False only pin."""
        pinned: list[str] = []

        async def find() -> Found:
            found, new = await self._mover.keeper.pin(request["paths"])
            pinned.extend(new)
            return found

        if request.get("fetch", True):
            return {**await self._fetch(find, "", progress), "pinned": pinned}
        found = await find()
        return {"files": len(found.inodes), "bytes": found.total_bytes, "pinned": pinned, **_errors(found)}

    async def unpin(self, paths: list[str]) -> dict[str, Any]:
        gone, errors = await self._mover.keeper.unpin(paths)
        return {"unpinned": gone, "errors": errors}

    def pins(self) -> dict[str, Any]:
        """Return what is pinned, for `status`."""
        keeper = self._mover.keeper
        paths = [path.decode("utf-8", "surrogateescape") for path in keeper.pins.paths]
        return {"paths": paths, "bytes": keeper.pinned_bytes()}

    async def _fetch(
        self, find: Callable[[], Awaitable[Found]], tier: str, progress: Progress
    ) -> dict[str, Any]:
        told = _Telling(progress)

        async def work() -> dict[str, Any]:
            found = await find()
            job = await self._mover.warmer.plan(found, tier)
            await told.plan(job)
            await self._mover.warmer.run(job, found)
            complete = job.is_complete and not found.failed
            return {**job.told(time.time()), **_errors(found), "complete": complete}

        return await told.until_done(work)


def _errors(found: Found) -> dict[str, Any]:
    return {"errors": found.errors, "error_count": found.failed}


class _Telling:
    """Says every so often how far a job is, and ends it when nobody listens any more."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._job: Job | None = None
        self._is_planned = trio.Event()
        self._plan_told = trio.Event()
        self._is_done = trio.Event()

    async def plan(self, job: Job) -> None:
        """Return once it was told what is to be done."""
        self._job = job
        self._is_planned.set()
        await self._plan_told.wait()

    async def until_done(self, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Return what *work* returns. Raises what it raises of ours, not a group of it."""
        results: list[dict[str, Any]] = []
        errors: list[SluiceError] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, nursery.cancel_scope)
            try:
                results.append(await work())
            except SluiceError as error:
                errors.append(error)
            self._is_done.set()
            self._is_planned.set()
        if errors:
            raise errors[0]
        return results[0] if results else {}

    async def _tell(self, work: trio.CancelScope) -> None:
        """Not cancelled in good order: half a line would spoil the result's."""
        while not self._is_done.is_set():
            phase = "listing" if self._job is None else "fetch" if self._plan_told.is_set() else "plan"
            told = self._job.told(time.time()) if self._job is not None else {}
            if not await self._progress({"phase": phase, **told}):
                work.cancel()
                return
            if self._job is not None and phase == "plan":
                self._plan_told.set()
            with trio.move_on_after(_TELL_EVERY_S):
                await (self._is_done if self._plan_told.is_set() else self._is_planned).wait()
