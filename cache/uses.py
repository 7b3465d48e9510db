"""What the tiers' policies and the index are told of the uses of what is cached."""

from __future__ import annotations

from itertools import islice

from cache.committer import Committer
from cache.places import Tier
from cache.policy.due import SOME_TIME, Next
from cache.policy.eviction import ItemId
from cache.policy.ledger import Ledger
from cache.records import VersionRow
from cache.rows import Usage, put_usage


class Uses:
    """For the mover's trio thread."""

    def __init__(self, tiers: list[Tier], committer: Committer) -> None:
        self._tiers = tiers
        self._committer = committer
        self._usage: dict[bytes, Usage] = {}  # Since the last `save_usage`.
        # Large versions that readers go through, see `hold`, and their use after this one, if it was told.
        self._held: dict[bytes, Next | None] = {}
        self.ledger = Ledger()

    def used(self, items: list[bytes], now_s: float) -> None:
        """Note that readers hit *items*: whole objects (16 bytes) or groups (20)."""
        free = [ItemId(item) for item in items if item not in self._held]
        for tier in self._tiers:
            tier.policy.touched_all(free)
        self.ledger.used_all({item[:16] for item in items})
        for item in items:
            usage = self._usage.get(item[:16])
            if usage is None:
                usage = self._usage[item[:16]] = Usage()
            usage.hits += len(item) == 16
            usage.last_used_s = now_s

    def touched(self, item: ItemId) -> None:
        """Tell the eviction policies that a reader uses *item*."""
        if item not in self._held:
            for tier in self._tiers:
                tier.policy.touched(item)
        self.ledger.used(item[:16])

    def hold(self, vid: bytes) -> None:
        """Keep a large object, if it is whole, while a reader goes through it: it is used at its end."""
        self._held[vid] = None
        self.expect(vid)

    def is_held(self, vid: bytes) -> bool:
        return vid in self._held

    def let_go(self, vid: bytes) -> None:
        """The reader of an object that was held has come to its end, or nothing was heard of it since."""
        next = self._held.pop(vid, None)
        self.touched(ItemId(vid))
        if next is not None:
            self.expect(vid, next)

    def expect(self, vid: bytes, next: Next = SOME_TIME) -> None:
        """Keep a whole object for an epoch that will use it. What is held stays as that is, meanwhile."""
        if vid in self._held and next != SOME_TIME:
            self._held[vid] = next
            return
        for tier in self._tiers:
            tier.policy.expect(ItemId(vid), next)

    def release(self, vid: bytes) -> None:
        """Take `expect` back."""
        for tier in self._tiers:
            tier.policy.release(ItemId(vid))

    def passed(self, vid: bytes) -> None:
        """Note that a scan has read a whole object and gone on."""
        for tier in self._tiers:
            tier.policy.passed(ItemId(vid))

    def outdated(self, vid: bytes) -> None:
        """Note that a later checkpoint was written than this one, a whole object."""
        for tier in self._tiers:
            tier.policy.outdated(ItemId(vid))

    def left(self, item: ItemId, size_bytes: int) -> None:
        """Note that *item* left the cache, for the account of what was fetched in vain."""
        if len(item) == 16:
            self.ledger.left(item)
        else:
            self.ledger.left_in_part(item[:16], size_bytes)

    def usage(self, vid: bytes, row: VersionRow) -> Usage:
        """Return how often and when the version was used last, saved or not."""
        recent = self._usage.get(vid, Usage())
        return Usage(row.hits + recent.hits, max(row.last_used_s, recent.last_used_s))

    def save_usage(self, count: int | None = None) -> bool:
        """Put what `used` gathered into the index with the next commit, *count* versions at most.

        Return whether there is more.
        """
        usage = {vid: self._usage.pop(vid) for vid in list(islice(self._usage, count))}
        if usage:
            self._committer.commit_nowait(lambda w: put_usage(w, usage))
        return bool(self._usage)
