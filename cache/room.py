"""Space in the tiers: it is charged here before bytes are written, and made where it is short."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from cache.errors import CacheFull
from cache.places import Tier
from cache.placing import Placing, step_bytes

_ROOM_S, _LANDS_S = 2.0, 0.01  # A miss waits for room in a tier that is being filled, and looks so often.
_PASSED_OVER_S = 5.0  # A tier that had none for it is passed over so long, if there is another one.

MakeRoom = Callable[[int, int], Awaitable[bool]]


class Room:
    """Charges the tiers' budgets. Whoever takes room gives it back to the budget after the unlink.

    *make_room* frees about so many bytes of a tier, whose `room_lock` is held, and returns whether
    anything came free. What makes room in memory needs room on disks: that is another `Room`.
    """

    def __init__(self, tiers: list[Tier], placing: Placing, make_room: MakeRoom) -> None:
        self._tiers = tiers
        self._placing = placing
        self._make_room = make_room

    def take_nowait(self, place: int, charged_bytes: int, due: int | None) -> bool:
        """Charge what nobody asked for, if there is room; return whether. *due*: see `reserve`."""
        tier = self._tiers[place]
        if not self._placing.can_spare(place, charged_bytes, due) or not tier.has_room(charged_bytes):
            return False
        tier.take(charged_bytes)
        return True

    async def find(
        self,
        choose: Callable[[], int],
        charge_at: Callable[[Tier], int],
        *,
        demand: bool = True,
        due: int | None = None,
    ) -> int:
        """Charge the tier that *choose* names what *charge_at* says; return it. Raises CacheFull.

        If that has no room *choose* is asked again, and may name another one: one may be full of what is
        pinned or open while others are not.
        """
        tried: set[int] = set()
        while True:
            place = choose()
            try:
                await self.reserve(place, charge_at(self._tiers[place]), demand=demand, due=due)
                return place
            except CacheFull:
                tried.add(place)
                if choose() in tried:
                    raise

    def refused(self, place: int) -> None:
        """Have the tier passed over for a moment: it had no room for what was demanded."""
        self._tiers[place].full_until_s = trio.current_time() + _PASSED_OVER_S

    async def disk_refused(self, place: int) -> None:
        """Something leaves a tier whose disk took no more, though there was room by all accounts.

        It may be out of inodes. Else nothing new would ever get in.
        """
        self.refused(place)
        tier = self._tiers[place]
        async with tier.room_lock:
            await self._make_room(place, step_bytes(tier))

    async def reserve(
        self, place: int, charged_bytes: int, *, demand: bool = True, due: int | None = None
    ) -> None:
        """Charge *charged_bytes* to a tier, making room first. Raises CacheFull.

        Without *demand* nothing is pushed out that a recognised epoch still needs, unless it is known
        to need it only after *due*.
        """
        tier = self._tiers[place]
        if charged_bytes > tier.budget.size_bytes:
            raise CacheFull(f"{tier.name}: {charged_bytes} bytes are more than the tier's size")
        if not demand:
            self._placing.check_spare(place, charged_bytes, due)
        if tier.has_room(charged_bytes):  # No await from here to take().
            tier.take(charged_bytes)
            return
        deadline_s = trio.current_time() + _ROOM_S  # Also of those who wait for the lock.
        async with tier.room_lock:
            while not tier.has_room(charged_bytes):
                if not demand:  # Again: others were let in while we waited for the lock.
                    self._placing.check_spare(place, charged_bytes, due)
                    if tier.guard_shortfall_bytes() > 0:
                        raise CacheFull(f"{tier.name}: its disk has no room for what nobody asked for")
                need_bytes = max(charged_bytes - tier.budget.room_bytes, tier.guard_shortfall_bytes())
                if await self._make_room(place, max(need_bytes, step_bytes(tier))):
                    continue
                if demand and tier.landing_bytes and trio.current_time() < deadline_s:
                    await trio.sleep(_LANDS_S)  # What others are filling lands, and can leave then.
                else:
                    if demand:
                        self.refused(place)
                    raise CacheFull(f"{tier.name}: no room for {charged_bytes} bytes, all of it is in use")
            tier.take(charged_bytes)
