"""Fills that nobody waits for, without a task of their own: what most of a first epoch comes by.

A task each for the fetch, the flight and its steps costs more processor time than the GET. Here all of
a fill is one job of a lake thread, and what follows it is done for all jobs that ended together: one
transaction of the index, at once, and one word to each tier. What has to wait for anything (room, another
fill, a lake that fails) is left to `Filling.fill_whole`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import outcome

from cache.committer import Committer
from cache.engine import Engine
from cache.errors import CacheError, SluiceError
from cache.index_writer import IndexWriter
from cache.lake.base import Body
from cache.model import ObjectVersion
from cache.policy.due import Next
from cache.policy.eviction import ItemId
from cache.residency import Residency
from cache.rows import put_whole
from cache.tier import TierFiles

Then = Callable[[BaseException | None], None]


@dataclass(eq=False, slots=True)
class _Fill:
    """One object on its way. *then* is called once, when it is resident or has failed."""

    version: ObjectVersion
    vid: bytes
    next: Next
    then: Then
    place: int
    charged_bytes: int


class QuickFills:
    """For the mover's trio thread."""

    def __init__(self, residency: Residency, committer: Committer, lake_engine: Engine) -> None:
        self._residency = residency
        self._committer = committer
        self._lake_engine = lake_engine

    def start(self, version: ObjectVersion, get: Callable[[], Body], next: Next, then: Then) -> bool:
        """Start to get and store a small object that is not there; return False where that must wait.

        *then* is called with None, or with what *get* or the storing raised: nothing of it is there then.
        """
        vid = version.id
        begun = self._residency.begin_fill_nowait(vid, version.size_bytes, next.due)
        if begun is None:
            return False
        fill = _Fill(version, vid, next, then, *begun)
        files = self._residency.tiers[fill.place].files
        self._lake_engine.submit_gathered(partial(_land, files, version, vid, get), fill, self._landed)
        return True

    def _landed(self, results: list[tuple[_Fill, outcome.Outcome[list[int]]]]) -> None:
        landed: list[tuple[_Fill, list[int]]] = []
        for fill, result in results:
            if isinstance(result, outcome.Error):
                self._fail(fill, result.error)
            else:
                landed.append((fill, result.unwrap()))
        if not landed:
            return
        try:  # Not with the next transaction: a turn of trio's loop until then costs more than this one.
            self._committer.commit_now(partial(_put_all, landed))
        except SluiceError as error:
            for fill, _ in landed:
                self._take_back(fill, error)
        else:
            self._committed([fill for fill, _ in landed])

    def _committed(self, fills: list[_Fill]) -> None:
        for place, tier in enumerate(self._residency.tiers):
            here = [fill for fill in fills if fill.place == place]
            for fill in here:
                self._residency.end_fill_nowait(fill.vid, place, fill.charged_bytes, landed=True)
            tier.brought([(ItemId(fill.vid), fill.charged_bytes, fill.next) for fill in here])
        for fill in fills:
            fill.then(None)

    def _take_back(self, fill: _Fill, error: SluiceError) -> None:
        """Remove the file, which has no row. By a job: it may block."""
        files = self._residency.tiers[fill.place].files
        self._lake_engine.submit(
            lambda: files.remove(fill.vid), lambda _: self._fail(fill, error), demand=False
        )

    def _fail(self, fill: _Fill, error: BaseException) -> None:
        self._residency.end_fill_nowait(fill.vid, fill.place, fill.charged_bytes, landed=False)
        fill.then(error)


def _put_all(landed: list[tuple[_Fill, list[int]]], w: IndexWriter) -> None:
    for fill, checksums in landed:
        put_whole(w, fill.version, fill.place, checksums)


def _land(files: TierFiles, version: ObjectVersion, vid: bytes, get: Callable[[], Body]) -> list[int]:
    """Get and store; what a failed storing left is removed. Raises LakeError and CacheError."""
    body = get()
    try:
        return files.land_whole(version, vid, body)
    except CacheError:
        files.remove(vid)
        raise
