"""What the admin commands ask of the write path: `sluice queue` and `sluice sync`."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from cache.errors import SluiceError, UsageError
from cache.mover import Mover
from cache.pending import CONFLICT, FAILED, OPEN, SEALED, Move, Put
from cache.uploader import Uploader
from cache.walking import Walker

Progress = Callable[[dict[str, Any]], Awaitable[object]]

_TELL_EVERY_S = 1.0
_STATES = {OPEN: "being written", SEALED: "waits for its upload", CONFLICT: "in conflict", FAILED: "failed"}
_FAILED = ("failed", "conflict")


class WriteAdmin:
    def __init__(self, mover: Mover) -> None:
        self._mover = mover

    def queue(self, limit: int) -> dict[str, Any]:
        """Return the oldest *limit* pending operations; none on a read-only mount."""
        uploader = self._mover.uploader
        entries = [] if uploader is None else uploader.queue()
        dirty_bytes = 0 if uploader is None else uploader.dirty_bytes
        return {"entries": entries[:limit], "total": len(entries), "dirty_bytes": dirty_bytes}

    def uploads(self) -> dict[str, int]:
        """Return how many operations wait, are under way, and have failed, for `status`."""
        counts = {"waiting": 0, "under_way": 0, "failed": 0, "conflicts": 0}
        names = {"running": "under_way", "failed": "failed", "conflict": "conflicts"}
        for entry in [] if self._mover.uploader is None else self._mover.uploader.queue():
            counts[names.get(str(entry["state"]), "waiting")] += 1
        return counts

    def state_of(self, inode: int) -> str | None:
        """Return what the lake does not know yet of a file or directory; None if it knows all."""
        rows = [row for _, row in self._mover.table.of_inode(inode)]
        puts = [_STATES.get(row.state, row.state) for row in rows if isinstance(row, Put)]
        return puts[0] if puts else "renamed" if any(isinstance(row, Move) for row in rows) else None

    async def retry(self, paths: list[str]) -> dict[str, Any]:
        if not paths and self._mover.uploader is None:
            return {"retried": 0}  # Whoever names none means all mounts.
        uploader = self._writable()
        if not paths or "" in paths:
            return {"retried": await uploader.retry(None)}
        return {"retried": sum([await uploader.retry(os.fsencode(path)) for path in paths])}

    async def resolve(self, paths: list[str], keep: str) -> dict[str, Any]:
        if keep not in ("ours", "theirs"):
            raise UsageError(f"keep {keep!r}: must be ours or theirs")
        errors = []
        for path in paths:
            try:
                await self._writable().resolve(os.fsencode(path), keep)
            except SluiceError as error:
                errors.append({"path": path, "error": str(error)})
        return {"errors": errors}

    def _writable(self) -> Uploader:
        if self._mover.uploader is None:
            raise SluiceError(
                f"{self._mover.config.mountpoint}: mounted for reading only; nothing is written"
            )
        return self._mover.uploader

    async def sync(self, paths: list[str], progress: Progress) -> dict[str, Any]:
        """Return receipts and failures below *paths* once the lake has all else that was written there."""
        write_path, uploader = self._mover.write_path, self._mover.uploader
        below = [os.fsencode(path) for path in paths if path]
        below = below if len(below) == len(paths) else []
        if write_path is None or uploader is None:
            return {"receipts": [], "errors": await self._missing(below)}
        await write_path.keeper.settled()
        wanted = below or [b""]
        for path in wanted:
            await self._drain(uploader, path, progress)
        entries = [entry for entry in uploader.queue() if entry["state"] in _FAILED]
        return {
            "receipts": await uploader.receipts({path.rstrip(b"/") for path in wanted}),
            "errors": await self._missing(below)
            + [
                {"path": entry["path"], "error": f"{entry['state']}: {entry['error']}"}
                for entry in entries
                if any(_is_below(os.fsencode(str(entry["path"])), path) for path in wanted)
            ],
        }

    async def _missing(self, paths: list[bytes]) -> list[dict[str, str]]:
        """Return an error for each path that shows nothing: a mistyped one is not to pass for durable."""
        errors, walker = [], Walker(self._mover.index, self._mover.lister)
        for path in map(os.fsdecode, paths):
            try:
                await walker.resolve(path)
            except UsageError:
                errors.append({"path": path, "error": "no such file or directory"})
            except SluiceError as error:
                errors.append({"path": path, "error": str(error)})
        return errors

    async def _drain(self, uploader: Uploader, below: bytes, progress: Progress) -> None:
        """Wait; tell every second what is left, also while nothing moves: nobody shall think us dead."""
        total_bytes, left = uploader.dirty_bytes, 0

        def note(operations: int, _: int) -> None:
            nonlocal left
            left = operations

        async def tell() -> None:
            nonlocal total_bytes
            while True:
                total_bytes = max(total_bytes, uploader.dirty_bytes)
                await progress(self._progress(total_bytes, uploader.dirty_bytes, left))
                await trio.sleep(_TELL_EVERY_S)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            await uploader.drain(note, below)
            nursery.cancel_scope.cancel()

    def _progress(self, total_bytes: int, dirty_bytes: int, left: int) -> dict[str, Any]:
        failing_s = self._mover.lake_io.failing_for_s()
        return {
            "done": total_bytes - dirty_bytes,
            "total": total_bytes,
            "unit": "bytes",
            "left": left,
            "trouble": None if failing_s is None else f"no answer for {failing_s:.0f} s",
        }


def _is_below(path: bytes, directory: bytes) -> bool:
    return not directory or path == directory or path.startswith(directory + b"/")
