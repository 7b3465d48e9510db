"""The bound on what the lake lacks: writers wait at it."""

from __future__ import annotations

import logging

from cache.client import MoverClient
from cache.counters import CounterRow, Counters, WriteBudget
from cache.messages import AwaitRoom

log = logging.getLogger(__name__)


class WriteGate:
    """Holds writers up while the lake lacks more bytes than --dirty-max.

    *counters*: of all processes, *row*: this one's.
    """

    def __init__(self, counters: Counters, row: CounterRow, budget: WriteBudget, mover: MoverClient) -> None:
        self._counters = counters
        self._row = row
        self._budget = budget
        self._mover = mover
        self._is_held_up = False

    @property
    def room_bytes(self) -> int:
        return max(0, self._budget.allowed_until - self._counters.total("bytes_written"))

    @property
    def is_open(self) -> bool:
        """Return whether `enter` would neither wait nor have anything to say."""
        return not self._is_held_up and self.room_bytes > 0

    async def enter(self) -> None:
        """Return when there is room. Raises SluiceError when the mover can't be asked."""
        while self.room_bytes == 0:
            if not self._is_held_up:
                self._is_held_up = True
                log.warning("writers wait: the lake lacks as many bytes as --dirty-max allows")
            await self._mover.ask(AwaitRoom())
        if self._is_held_up:
            self._is_held_up = False
            log.info("writers go on")

    def wrote(self, length: int) -> None:
        self._row.add("bytes_written", length)
