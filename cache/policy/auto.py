"""The eviction policy that switches by what is seen: epochs, scans, and files read again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from itertools import chain

from cache.policy.due import SOME_TIME, Next
from cache.policy.eviction import EpochPolicy
from cache.policy.queues import AnyQueue, ItemId, Queue

_HOT_USES_MIN = 3  # The second use may be the next epoch's.
_HOT_TIMES_MEAN = 3  # In epochs, all are used about equally often.
_GONE_MIN = 64
_HOT_SHARE_MAX = 2  # Of the tier's content at most this part is held for being hot.


class AutoPolicy(EpochPolicy):
    """`EpochPolicy`, with two queues more:

      scanned  leaves before all but `outdated`, newest first: a scan has read it once and gone on (`passed`),
               so what it brings next takes its place, and nobody else's
      hot      leaves after `expected`, least recently used first: used three times as often as the
               rest. Each of its items would be fetched again within moments

    What only scans have used says nothing about epochs: its leaving does not end one.
    Uses are halved at the end of each epoch, so that what was hot once does not stay for ever, and known
    for a while of what has left: else nothing that leaves soon after its use would ever become hot.
    What is pinned is compared with nothing: no use of it is counted.
    Invariants: `_uses` has the items that are here and not pinned, `_uses_sum` is its sum; `_gone` is at
    most as long, or as _GONE_MIN.
    """

    name = "auto"

    def __init__(self) -> None:
        self._scanned = Queue()
        self._hot = Queue()
        super().__init__()
        self._uses: dict[ItemId, int] = {}
        self._uses_sum = 0
        self._gone: OrderedDict[ItemId, int] = OrderedDict()  # Uses of what has left, the latest last.

    def added(self, item: ItemId, size_bytes: int, *, used: bool) -> None:
        super().added(item, size_bytes, used=used)
        if item in self._pinned:
            return
        if item not in self._uses:  # Else it is a group that grows.
            self._set_uses(item, self._gone.pop(item, 0) + used)
        if used:
            self._heat(item)

    def brought(self, items: Iterable[tuple[ItemId, int, Next]]) -> None:
        for item, size_bytes, next in items:
            if item in self._uses or item in self._pinned:
                super().brought([(item, size_bytes, next)])
            else:
                self._put_expected(item, size_bytes, next)
                self._set_uses(item, self._gone.pop(item, 0))

    def _touch(self, item: ItemId, recent_max: int) -> None:
        if item not in self._uses:
            return  # It is not here, or pinned.
        is_new_use = item not in self._recent  # Else it may be the next piece of the same file.
        if item in self._hot:
            self._hot.move_to_end(item)
            self._gone_unused = 0
        else:
            super()._touch(item, recent_max)
        if is_new_use:
            self._uses[item] += 1
            self._uses_sum += 1
            if item not in self._hot:
                self._heat(item)

    def removed(self, item: ItemId) -> None:
        if self._scanned.take(item) is None:
            super().removed(item)
        if uses := self._uses.get(item, 0):
            self._gone[item] = uses
        self._set_uses(item, None)
        while len(self._gone) > max(_GONE_MIN, len(self._uses)):
            self._gone.popitem(last=False)

    def expect(self, item: ItemId, next: Next = SOME_TIME) -> None:
        if item not in self._hot:  # Which leaves later still.
            super().expect(item, next)

    def want(self, item: ItemId) -> None:
        if item not in self._hot:
            super().want(item)

    def pin(self, item: ItemId) -> None:
        super().pin(item)
        if item in self._pinned:
            self._set_uses(item, None)

    def unpin(self, item: ItemId) -> None:
        if item in self._pinned:
            super().unpin(item)
            self._set_uses(item, 0)

    def passed(self, item: ItemId) -> None:
        is_scanned_only = self._uses.get(item, 0) <= 1 and (item in self._recent or item in self._used)
        if is_scanned_only and (size_bytes := self._take_out(item)) is not None:
            self._scanned.put(item, size_bytes)

    def outdated(self, item: ItemId) -> None:
        if item not in self._hot:
            super().outdated(item)

    def epoch_began(self) -> None:
        super().epoch_began()
        self._uses = {item: uses // 2 for item, uses in self._uses.items()}
        self._uses_sum = sum(self._uses.values())
        self._gone = OrderedDict((item, uses // 2) for item, uses in self._gone.items() if uses > 1)
        for item in [item for item in self._hot if self._uses[item] < _HOT_USES_MIN]:
            self._needed.put(item, self._hot.take(item) or 0)

    @property
    def spare_bytes(self) -> int:
        return super().spare_bytes + self._scanned.size_bytes

    def _reasons(self) -> tuple[tuple[Container[ItemId], str], ...]:
        scanned = (self._scanned, "read once by a scan")
        return (scanned, (self._hot, "used far more often than the others"), *super()._reasons())

    def _list_queues(self) -> tuple[AnyQueue, ...]:
        return (*super()._list_queues(), self._scanned, self._hot)

    def _leave_gladly(self) -> Iterator[tuple[ItemId, int]]:
        return chain(reversed(self._scanned.items()), super()._leave_gladly())

    def _held(self) -> Iterator[tuple[ItemId, int]]:
        return iter(self._hot.items())

    def _set_uses(self, item: ItemId, uses: int | None) -> None:
        self._uses_sum += (uses or 0) - self._uses.pop(item, 0)
        if uses is not None:
            self._uses[item] = uses

    def _heat(self, item: ItemId) -> None:
        """Hold the item if it is used far more often than the others; let go of what is too much."""
        uses = self._uses[item]
        if uses < _HOT_USES_MIN or uses * len(self._uses) < _HOT_TIMES_MEAN * self._uses_sum:
            return
        self._hot.put(item, self._take_out(item) or 0)
        total_bytes = sum(queue.size_bytes for queue in self._queues) - self.pinned_bytes
        while self._hot.size_bytes * _HOT_SHARE_MAX > total_bytes:
            coldest = next(iter(self._hot))
            self._needed.put(coldest, self._hot.take(coldest) or 0)
