"""Orders of samples that `sluice hint` told, by directory, and the order of each set that is read.

The read-ahead of sample sets asks `Orders.make_upcoming` for what says which file comes next. What is
work (finding an order, making one) is done in one thread at a time, never where requests are served.
"""

from __future__ import annotations

import logging
import os
import weakref
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import trio

from cache.errors import SluiceError, UsageError
from cache.index import Index
from cache.lister import Lister
from cache.model import ROOT_INODE, Inode

if TYPE_CHECKING:  # They need numpy, which takes a tenth of a second: imported where an order is made.
    from cache.policy.order.told import ToldSampler
    from cache.policy.order.upcoming import Fallback, Order, OrderedUpcoming

log = logging.getLogger(__name__)

_NEEDED = "cache.policy.order.upcoming"
_LOOKED_ABOVE = 64  # Files of a hint, for the directory that they lie below.
_TOLD_MAX = 64  # Directories.
_UPLOADS_MAX = 4
_ABSENT_MAX = 32  # Directories of a hint that are not there, until the lake is no longer asked for more.
_EXAMPLES = 3  # Of missing paths, in the answer.
_STEPS = 500  # Index lookups between two checkpoints: a few milliseconds.


def _import_needed() -> None:
    # Of numpy nothing here is linear algebra, for which it would start a thread on each core, to spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import_module(_NEEDED)


class Members(Protocol):
    """The files of a set by place: their number in listing order."""

    @property
    def inodes(self) -> Sequence[int]: ...

    def place(self, inode: int) -> int | None: ...


class InListingOrder:
    """What comes next while nothing is known: the first that is wanted."""

    def used(self, places: Sequence[int], now_s: float) -> None:
        pass

    def epoch_began(self, epoch: int) -> None:
        pass

    def next_place(self, status: bytearray, frontier: int | None) -> int | None:
        place = status.find(0, 0 if frontier is None else frontier)
        return None if place < 0 else place


@dataclass(frozen=True, slots=True)
class Told:
    """What was told for a directory: files in their order, or a sampler of its listing."""

    directory: Inode
    inodes: array[int]
    sampler: ToldSampler | None = None


@dataclass(slots=True)
class _Upload:
    """A hint that arrives in parts."""

    inodes: array[int] = field(default_factory=lambda: array("Q"))
    directories: dict[bytes, Inode | None] = field(default_factory=dict)
    absent: int = 0  # Of these.
    missing: int = 0
    examples: list[str] = field(default_factory=list)


class Orders:
    """For the mover's trio thread. *nursery*: where orders are searched for."""

    def __init__(
        self,
        nursery: trio.Nursery,
        index: Index,
        lister: Lister,
        make_fallback: Callable[[], Fallback] = InListingOrder,
    ) -> None:
        self._nursery = nursery
        self._index = index
        self._lister = lister
        self._make_fallback = make_fallback
        self._told: OrderedDict[Inode, Told] = OrderedDict()  # The one told last comes last.
        self._uploads: OrderedDict[str, _Upload] = OrderedDict()
        self._sets: weakref.WeakKeyDictionary[OrderedUpcoming, Members] = weakref.WeakKeyDictionary()
        self._is_prepared = False
        # Of who reads ahead, which is made later: something else is known of an order; an order was told
        # for what is below a directory of which no set is known.
        self.on_change: Callable[[], None] = lambda: None
        self.on_told: Callable[[Inode], None] = lambda directory: None
        self._one_thread = trio.CapacityLimiter(1)

    # What comes next

    async def prepare(self) -> None:
        """Import what orders need, unless that was done: a fifth of a second in which nobody would be served.

        In a thread, from the first use of a file on: until a set is recognised the mover waits for the lake.
        """
        if not self._is_prepared:
            await trio.to_thread.run_sync(_import_needed, limiter=self._one_thread)
            self._is_prepared = True

    def make_upcoming(self, members: Members) -> OrderedUpcoming:
        """Return what says which of *members* comes next, as soon as their order is told or found."""
        from cache.policy.order.upcoming import OrderedUpcoming

        upcoming = OrderedUpcoming(
            len(members.inodes), lambda: self._paths(members), self._search, self._make_fallback()
        )
        self._sets[upcoming] = members
        told = self.told_for(members)
        if told is not None:
            upcoming.tell(lambda: self._order(told, members), is_news=False)
        return upcoming

    def told_for(self, members: Members) -> Told | None:
        """Return what was told last for a directory that holds the set."""
        if not members.inodes:
            return None
        above = set(self._above(Inode(members.inodes[0])))
        return next((told for told in reversed(self._told.values()) if told.directory in above), None)

    def _above(self, inode: Inode) -> Iterator[Inode]:
        while (node := self._index.node(inode)) is not None:
            inode = Inode(node.parent)
            yield inode
            if inode == ROOT_INODE:
                return

    def _order(self, told: Told, members: Members) -> Order | None:
        """Return the told order of a set; None when it does not concern it. Work: not for trio's thread."""
        import numpy as np

        from cache.policy.order.upcoming import order_of_places, order_of_sampler

        count = len(members.inodes)
        if told.sampler is not None:
            return order_of_sampler(told.sampler, count, lambda: self._paths(members))
        places = [place for inode in told.inodes if (place := members.place(inode)) is not None]
        return order_of_places(np.array(places, np.uint32), count) if places else None

    def _paths(self, members: Members) -> list[bytes]:
        """Return the members' paths below the mount's root."""
        directories: dict[int, bytes] = {}
        paths = []
        for node in self._index.nodes(members.inodes):
            if node is None:
                paths.append(b"")
                continue
            if node.parent not in directories:
                directories[node.parent] = self._index.path_of(node.parent)
            paths.append(directories[node.parent] + b"/" + node.name)
        return paths

    def _search(self, work: Callable[[], Order | None], then: Callable[[Order | None], None]) -> None:
        self._nursery.start_soon(self._run_search, work, then)

    async def _run_search(
        self, work: Callable[[], Order | None], then: Callable[[Order | None], None]
    ) -> None:
        try:
            # Not abandoned when the mover stops: it may be reading the index, which is closed next.
            order = await trio.to_thread.run_sync(work, limiter=self._one_thread)
        except Exception:  # An order that can't be had costs speed only.
            log.exception("the search for the order of a set failed")
            order = None
        then(order)
        self.on_change()

    # What is told

    async def hint(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take one part of a hint; with the last one, use it. For the verb of `cache/control.py`.

        Raises UsageError where the directory is none, or nothing of the hint is there.
        """
        directory = await self._directory(os.fsencode(request["directory"]).strip(b"/"))
        if "sampler" in request:
            return self._tell_sampler(directory, request["sampler"])
        upload = self._uploads.setdefault(str(request["upload"]), _Upload())
        if len(self._uploads) > _UPLOADS_MAX:
            self._uploads.popitem(last=False)
        await self._add_paths(upload, request.get("paths", []))
        if "indices" in request:
            await self._add_indices(upload, directory, request["indices"])
        if request.get("last"):
            self._uploads.pop(str(request["upload"]), None)
            self._tell_files(directory, upload)
        return {"files": len(upload.inodes), "missing": upload.missing, "examples": upload.examples}

    def _tell_files(self, directory: Inode, upload: _Upload) -> None:
        if not upload.inodes:
            raise UsageError(f"none of the {upload.missing:,} files of the hint is there")
        self._tell(Told(directory, upload.inodes))

    def _tell_sampler(self, directory: Inode, fields: dict[str, Any]) -> dict[str, Any]:
        from cache.policy.order.told import ToldSampler

        sampler = ToldSampler(**{**fields, "ranks": tuple(fields["ranks"])})
        self._tell(Told(directory, array("Q"), sampler))
        return {"files": 0, "missing": 0, "examples": []}

    def _tell(self, told: Told) -> None:
        self._told.pop(told.directory, None)
        self._told[told.directory] = told
        if len(self._told) > _TOLD_MAX:
            self._told.popitem(last=False)
        concerned = [(one, members) for one, members in self._sets.items() if self.told_for(members) is told]
        for upcoming, members in concerned:
            upcoming.tell(lambda members=members: self._order(told, members))  # type: ignore[misc]
        if not concerned:
            self.on_told(self._root_of(told))

    def _root_of(self, told: Told) -> Inode:
        """Return the directory that a sampler shuffles, or the lowest one above all files that were named."""
        if told.sampler is not None:
            return told.directory
        step = max(1, len(told.inodes) // _LOOKED_ABOVE)
        above = [list(self._above(Inode(inode))) for inode in told.inodes[::step]]
        shared = set(above[0]).intersection(*above)
        return next((directory for directory in above[0] if directory in shared), told.directory)

    async def _add_paths(self, upload: _Upload, paths: list[str]) -> None:
        for step, path in enumerate(paths):
            if step % _STEPS == 0:
                await trio.lowlevel.checkpoint()
            parent, _, name = os.fsencode(path).strip(b"/").rpartition(b"/")
            if parent not in upload.directories and upload.absent < _ABSENT_MAX:
                upload.directories[parent] = listed = await self._listed(parent)
                upload.absent += listed is None
            above = upload.directories.get(parent)
            found = None if above is None else self._index.child(above, name)
            if found is not None and not found[1].is_directory:
                upload.inodes.append(found[0])
                continue
            upload.missing += 1
            upload.examples += [path] * (len(upload.examples) < _EXAMPLES)

    async def _add_indices(self, upload: _Upload, directory: Inode, indices: list[int]) -> None:
        files = array("Q", [inode async for inode in self._files_below(directory)])
        for index in indices:
            if index < len(files):
                upload.inodes.append(files[index])
                continue
            upload.missing += 1
            upload.examples += [f"number {index} of {len(files)}"] * (len(upload.examples) < _EXAMPLES)

    async def _files_below(self, directory: Inode) -> AsyncIterator[Inode]:
        """Yield the files in listing order, listing what was never listed."""
        await self._lister.list_directory(directory)
        after = b""
        while entries := self._index.children(directory, after, _STEPS):
            for inode, node in entries:
                if not node.is_directory:
                    yield inode
                    continue
                async for below in self._files_below(inode):
                    yield below
            after = entries[-1][1].name
            await trio.lowlevel.checkpoint()

    async def _listed(self, path: bytes) -> Inode | None:
        """Return the directory with all its entries in the index; None when it is not there."""
        try:
            directory = await self._directory(path)
            await self._lister.list_directory(directory)
        except SluiceError:
            return None
        return directory

    async def _directory(self, path: bytes) -> Inode:
        inode: Inode = ROOT_INODE
        for name in path.split(b"/") if path else ():
            found = self._index.child(inode, name)
            if found is None and await self._lister.lookup(inode, name):
                found = self._index.child(inode, name)
            if found is None or not found[1].is_directory:
                raise UsageError(f"{os.fsdecode(path)}: no such directory in the mount")
            inode = found[0]
        return inode
