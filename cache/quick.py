"""Fills that nobody waits for, without a task of their own: what most of a first epoch comes by.

A task each for the fetch, the flight and its steps costs more processor time than the GET. Here all of
a fill is one job of a lake thread, and what follows it is done for all jobs that ended together. What
has to wait for anything (room, another fill, a lake that fails) is left to `Filling.fill_whole`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import outcome

from cache.committer import Committer
from cache.engine import Engine
from cache.errors import CacheError, SluiceError
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
        job = partial(_land, files, version, vid, get)
        self._lake_engine.submit(job, partial(self._landed, fill), demand=False)
        return True

    def _landed(self, fill: _Fill, result: outcome.Outcome[list[int]]) -> None:
        if isinstance(result, outcome.Error):
            self._fail(fill, result.error)
            return
        checksums = result.unwrap()
        self._committer.commit_then(
            lambda w: put_whole(w, fill.version, fill.place, checksums), partial(self._committed, fill)
        )

    def _committed(self, fill: _Fill, error: SluiceError | None) -> None:
        if error is not None:  # The file without a row is removed by a job: it may block.
            files = self._residency.tiers[fill.place].files
            self._lake_engine.submit(
                lambda: files.remove(fill.vid), lambda _: self._fail(fill, error), demand=False
            )
            return
        self._residency.end_fill_nowait(fill.vid, fill.place, fill.charged_bytes, landed=True)
        tier = self._residency.tiers[fill.place]
        tier.added(ItemId(fill.vid), fill.charged_bytes, used=False)
        tier.policy.expect(ItemId(fill.vid), fill.next)
        fill.then(None)

    def _fail(self, fill: _Fill, error: BaseException) -> None:
        self._residency.end_fill_nowait(fill.vid, fill.place, fill.charged_bytes, landed=False)
        fill.then(error)


def _land(files: TierFiles, version: ObjectVersion, vid: bytes, get: Callable[[], Body]) -> list[int]:
    """Get and store; what a failed storing left is removed. Raises LakeError and CacheError."""
    body = get()
    try:
        return files.land_whole(version, vid, body)
    except CacheError:
        files.remove(vid)
        raise
