"""What the files of `.sluice/` say and take, in the mount's root: see `fusefs/control.py` for their shape.

`stats`, `config` and `version` are read as snapshots: each look at the name makes one that never
changes, so that whatever caches it, the kernel too, is right. `order` takes what `sluice hint` does,
`warm` paths, one a line.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from cache.config import MountConfig
from cache.errors import ObjectMissing, SluiceError, TextRefused, UsageError
from cache.model import MIB
from cache.orders import Orders
from cache.walking import Found, Walker
from cache.warming import Warmer

if TYPE_CHECKING:  # It needs numpy: imported when an order is told.
    from cache.policy.order.told import Hint

log = logging.getLogger(__name__)

READABLE, WRITABLE = (b"stats", b"config", b"version"), (b"order", b"warm")
SIZE_BITS = 32  # Of a snapshot's number: its size. So a worker knows it without asking.
_SNAPSHOTS_MAX = 64
_SAME_S = 0.05  # The kernel looks a name up twice to open it: it is one snapshot, until that is read.
_TEXTS_MAX = 64  # Written at one time.
TEXT_BYTES_MAX = 512 * MIB
_PAGE_BYTES = 4096
_FOREIGN_TRIED = 8  # Paths that are tried to see where another mount namespace has this mount.
_EXAMPLES = 3
_STEPS = 200  # Paths looked up between two checkpoints.


@dataclass
class _Text:
    """What is being written to a file. *taken_bytes*: how long it was when it was taken over."""

    name: bytes
    body: bytearray = field(default_factory=bytearray)
    taken_bytes: int = 0


class ControlFiles:
    """For the mover's trio thread. *nursery*: for what is warmed."""

    stats: Callable[[], dict[str, Any]] = dict  # What `sluice status --json` shows: set once there is one.

    def __init__(
        self,
        nursery: trio.Nursery,
        config: MountConfig,
        orders: Orders,
        walker: Walker,
        warmer: Warmer,
        version: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._nursery = nursery
        self._config = config
        self._orders = orders
        self._walker = walker
        self._warmer = warmer
        self._version = version
        self._clock = clock
        self._snapshots: OrderedDict[int, bytes] = OrderedDict()
        self._latest: dict[bytes, tuple[float, int]] = {}  # Name -> when, and the snapshot's number.
        self._count = int(clock() * 1000) % (1 << 24)  # Not that of a mover before.
        self._texts: OrderedDict[int, _Text] = OrderedDict()
        self._told: dict[str, dict[str, Any]] = {}

    def status(self) -> dict[str, Any]:
        """Return what became of the last text of each file, for `status --json`."""
        return dict(self._told)

    # Reading

    def snapshot(self, name: bytes) -> int:
        """Return the number of a snapshot of the file; its low SIZE_BITS are the size in bytes."""
        now_s = self._clock()
        at_s, number = self._latest.get(name, (0.0, 0))
        if number in self._snapshots and 0 <= now_s - at_s < _SAME_S:
            return number
        body = self._body(name)
        self._count = (self._count + 1) % (1 << 24)
        number = self._count << SIZE_BITS | len(body)
        self._snapshots[number] = body
        if len(self._snapshots) > _SNAPSHOTS_MAX:
            self._snapshots.popitem(last=False)
        self._latest[name] = (now_s, number)
        return number

    def _body(self, name: bytes) -> bytes:
        match name:
            case b"stats":
                return json.dumps(self.stats(), indent=2).encode() + b"\n"
            case b"config":
                return json.dumps(asdict(self._config), indent=2, default=str).encode() + b"\n"
            case _:
                return self._version.encode() + b"\n"

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return bytes of a snapshot. Raises ObjectMissing for one that is too old."""
        if number not in self._snapshots:
            raise ObjectMissing("this reading of the file is too old: open it again")
        self._latest = {name: latest for name, latest in self._latest.items() if latest[1] != number}
        return self._snapshots[number][offset : offset + length]

    # Writing

    async def write(self, handle: int, name: bytes, offset: int, body: bytes) -> None:
        """Take a piece of a text. Raises TextRefused.

        What looks like a whole text is taken over at once, so that who wrote it hears what is wrong with
        it. What is cut into pieces has them in whole pages.
        """
        text = self._texts.setdefault(handle, _Text(name))
        if len(self._texts) > _TEXTS_MAX:
            self._texts.popitem(last=False)
        if offset > len(text.body):
            raise TextRefused(f".sluice/{os.fsdecode(name)}: what comes before byte {offset} is missing")
        if offset + len(body) > TEXT_BYTES_MAX:
            raise TextRefused(f".sluice/{os.fsdecode(name)}: longer than {TEXT_BYTES_MAX} bytes")
        text.body[offset : offset + len(body)] = body
        if offset == 0 and body.endswith(b"\n") and len(body) % _PAGE_BYTES:
            await self._take(text)

    async def finish(self, handle: int, *, is_closed: bool) -> None:
        """Take over what was written. Raises TextRefused."""
        text = self._texts.get(handle)
        if is_closed:
            self._texts.pop(handle, None)
        if text is not None and len(text.body) != text.taken_bytes:
            await self._take(text)

    async def _take(self, text: _Text) -> None:
        text.taken_bytes = len(text.body)
        await self.take(text.name, bytes(text.body))

    async def take(self, name: bytes, text: bytes) -> None:
        """Take over the whole text of a file; the log says what of it is of no use.

        Raises TextRefused where that is all of it.
        """
        take: Callable[[bytes], Awaitable[dict[str, Any]]]
        take = self._take_order if name == b"order" else self._take_warm
        shown = os.fsdecode(name)
        try:
            told = await take(text)
        except SluiceError as error:
            self._told[shown] = {"at_s": self._clock(), "error": str(error)}
            log.error(".sluice/%s: %s; nothing of it is used", shown, error)
            raise TextRefused(str(error)) from error
        useless = told["useless"]
        self._told[shown] = {"at_s": self._clock(), "error": None, **told}
        counts = ", ".join(f"{count:,} {reason}" for reason, count in useless.items())
        level = logging.WARNING if useless else logging.INFO
        example = f" ({told['examples'][0]})" if useless and told["examples"] else ""
        said = f"; lines of no use: {counts}{example}" if useless else ""
        log.log(level, ".sluice/%s: %s%s", shown, told["said"], said)

    # Orders

    async def _take_order(self, text: bytes) -> dict[str, Any]:
        from cache.policy.order.told import parse

        hint = await trio.to_thread.run_sync(parse, text)
        told = await self._tell(hint)
        useless = dict(hint.useless)
        if told["missing"]:
            useless["are not in the mount"] = told["missing"]
        if hint.sampler is not None:
            said = f"{hint.sampler.family} with seed {hint.sampler.seed}"
        else:
            said = f"the order of {told['files']:,} files"
        if hint.count is not None and hint.sampler is None and hint.count != told["files"]:
            said += f", where its first line says {hint.count:,}"
        examples = hint.examples() + told["examples"]
        return {"said": said, "files": told["files"], "useless": useless, "examples": examples}

    async def _tell(self, hint: Hint) -> dict[str, Any]:
        upload = f"control {self._clock()}"
        if hint.sampler is not None or hint.indices:
            directory = await self._directory(hint.directory)
            if hint.sampler is not None:
                request: dict[str, Any] = {"sampler": asdict(hint.sampler)}
            else:
                request = {"indices": hint.indices, "upload": upload, "last": True}
            return await self._orders.hint({"directory": directory, **request})
        base = await self._directory(hint.directory) if hint.directory is not None else ""
        paths = await self._relative(hint.paths, base)
        directory = base or await trio.to_thread.run_sync(_common_directory, paths)
        while True:
            try:
                return await self._orders.hint(
                    {"directory": directory, "paths": paths, "upload": upload, "last": True}
                )
            except UsageError:
                if not directory or base:
                    raise
                directory, upload = "", upload + " again"  # What they share need not be there.

    async def _directory(self, directory: bytes | None) -> str:
        """Return the directory that a hint names, below the mount's root; the root where it names none."""
        if directory is None:
            return ""
        return (await self._relative([directory], ""))[0]

    # Paths

    async def _relative(self, paths: list[bytes], base: str) -> list[str]:
        """Return *paths* as they are below the mount's root; relative ones are below *base*.

        Absolute ones may be those of a container that has the mount elsewhere: what leads to the
        mount there is found by trying.
        """
        root = os.fsencode(self._config.mountpoint)
        foreign = [path for path in paths if path.startswith(b"/") and not _is_below(path, root)]
        cut = await self._foreign_parts(foreign[:_FOREIGN_TRIED])
        return await trio.to_thread.run_sync(_cut_all, paths, root, base, cut)  # Seconds for a million.

    async def _foreign_parts(self, paths: list[bytes]) -> int:
        """Return how many leading parts of *paths* have no place in the mount; 0 where none fits."""
        for path in paths:
            parts = os.fsdecode(path).strip("/").split("/")
            for cut in range(1, len(parts)):
                if await self._exists("/".join(parts[cut:])):
                    return cut
        return 0

    async def _exists(self, path: str) -> bool:
        try:
            await self._walker.resolve(path)
            return True
        except SluiceError:
            return False

    # Warming

    async def _take_warm(self, text: bytes) -> dict[str, Any]:
        lines = [line.rstrip(b"\r") for line in text.split(b"\n")]
        named = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        bad = [number for number, line in named if b"\0" in line or len(line) >= _PAGE_BYTES]
        good = list(dict.fromkeys(line for _, line in named if b"\0" not in line and len(line) < _PAGE_BYTES))
        paths: list[str] = []
        missing: list[str] = []
        for number, path in enumerate(await self._relative(good, "")):
            if number % _STEPS == 0:
                await trio.lowlevel.checkpoint()
            (paths if await self._exists(path) else missing).append(path)
        if not paths:
            at = (
                f"line {bad[0]} is none"
                if bad
                else f"{missing[0]} is not there"
                if missing
                else "it is empty"
            )
            raise UsageError(f"no line is a path in the mount ({at})")
        useless = {"are no paths": len(bad), "are not in the mount": len(missing)}
        examples = [f"line {number}" for number in bad[:_EXAMPLES]] + missing[:_EXAMPLES]
        self._nursery.start_soon(self._warm, paths)
        return {
            "said": f"{len(paths):,} paths are warmed",
            "files": len(paths),
            "useless": {reason: count for reason, count in useless.items() if count},
            "examples": examples,
        }

    async def _warm(self, paths: list[str]) -> None:
        try:
            found = Found()
            await self._walker.add_all(found, paths)
            job = await self._warmer.plan(found)
            await self._warmer.run(job, found)
        except SluiceError as error:
            log.error(".sluice/warm: %s", error)
            return
        except Exception:  # A fault of ours ends this job, not the mover.
            log.exception(".sluice/warm: the job failed")
            return
        told = job.told(self._clock())
        level = logging.INFO if job.is_complete and not found.failed else logging.WARNING
        log.log(
            level,
            ".sluice/warm: fetched %d files, %d bytes; %d did not fit, %d failed",
            told["fetched_files"],
            told["fetched_bytes"],
            told["unfit_files"],
            told["failed_files"] + found.failed,
        )


def _is_below(path: bytes, root: bytes) -> bool:
    return path == root or path.startswith(root + b"/")


def _cut_all(paths: list[bytes], root: bytes, base: str, cut: int) -> list[str]:
    """Return *paths* below the mount's root: *cut* parts are taken off those from elsewhere."""
    prefix = f"{base}/" if base else ""
    found = []
    for path in paths:
        if not path.startswith(b"/"):
            found.append(prefix + os.fsdecode(path).removeprefix("./"))
        elif _is_below(path, root):
            found.append(os.fsdecode(path[len(root) :]).strip("/"))
        else:
            found.append("/".join(os.fsdecode(path).strip("/").split("/")[cut:]))
    return found


def _common_directory(paths: list[str]) -> str:
    return os.path.commonpath({os.path.dirname(path) for path in paths})
