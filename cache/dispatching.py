"""Starts what is pending when it is due, in the order that the keys ask for, and after failures again.

What is under way stays in `PendingTable.running` until it is known how it ended, pauses after failures
included: so long the lake may have any of it.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import trio

from cache.checkpoints import CheckpointNotes
from cache.committer import Committer
from cache.contents import Stale
from cache.errors import SluiceError
from cache.index import Index
from cache.journaling import JournalKeeper
from cache.lake_io import LakeIO
from cache.model import Inode
from cache.moving import DELETE_KEYS_MAX, Moves
from cache.opens import OpenTable
from cache.pending import (
    CONFLICT,
    Delete,
    Local,
    Mark,
    Move,
    Orphan,
    Pending,
    PendingTable,
    Put,
    Restate,
)
from cache.planning import Plans
from cache.planning import UploadConfig as UploadConfig
from cache.policy.writeback import SINGLE_PUT_BYTES_MAX, TokenBucket
from cache.residency import Residency
from cache.send_limits import SlotGate
from cache.sending import Sender
from cache.staging import StagingFiles
from cache.uploading import Puts, Receipt

log = logging.getLogger(__name__)

_GATHER_S = 0.005  # So long rows that changed wait for others to be looked at with them.
_SCAN_S = 1.0  # Open files are looked at so often: nobody tells when they were written to.
_BLOCKED_SHARE = 20  # Looking at what is blocked takes at most this part of the time.
_LANES = {"small": 2, "large": 4, "move": 4, "delete": 2}  # Operations of a kind at once; small: a slot.
RefreshEntry = Callable[[Inode, bytes], Awaitable[object]]


class Dispatcher:
    """Runs the operations of *table*. What asks for something else than the next step is in Uploader."""

    def __init__(
        self,
        nursery: trio.Nursery,
        lake: LakeIO,
        index: Index,
        committer: Committer,
        table: PendingTable,
        staging: StagingFiles,
        residency: Residency,
        opens: OpenTable | None,
        keeper: JournalKeeper,
        config: UploadConfig,
        refresh_entry: RefreshEntry,
        on_receipt: Callable[[Receipt], None],
    ) -> None:
        self._nursery = nursery
        self._lake = lake
        self._committer = committer
        self._table = table
        self._residency = residency
        self._opens = opens
        self._keeper = keeper
        self._refresh_entry = refresh_entry
        gate = SlotGate(config.threads)
        sender = Sender(lake, gate, TokenBucket(config.bandwidth))
        self.plans = Plans(committer, table, staging, opens, config)
        self.checkpoints = CheckpointNotes(nursery, index, residency)
        self._puts = Puts(
            lake,
            sender,
            committer,
            table,
            staging,
            residency,
            opens,
            keeper,
            on_receipt,
            config.cache_id,
            self.checkpoints,
            self.plans.note_upload,
        )
        self._moves = Moves(lake, index, committer, table, keeper, self._waits_for_close)
        self._lanes: dict[str, deque[int]] = {lane: deque() for lane in _LANES}
        self._active = dict.fromkeys(_LANES, 0)
        self._lane_max = {**_LANES, "small": _LANES["small"] * config.threads}
        self._queued: set[int] = set()  # In a lane.
        self.busy: set[int] = set()  # Being carried out.
        self.blocked: set[int] = set()
        self._look_at_blocked_s = 0.0  # time.monotonic()
        self._told_of_deadlock = False
        self._wake = trio.Event()
        self.moved_on = trio.Event()  # Set, and replaced, whenever an operation ended.
        self._claim_interrupted()

    def _claim_interrupted(self) -> None:
        """Take what an earlier process may have begun as being under way, before anybody changes it.

        It was not blocked when it began, and only later operations came since.
        """
        self._table.unseen.update(self._table.rows)
        begun = [
            seq
            for seq, row in self._table.rows.items()
            if isinstance(row, Move | Mark)  # Of these no row says whether it was begun.
            or (isinstance(row, Put) and row.upload_key and row.state != CONFLICT)
        ]
        for seq in [seq for seq in begun if not self._table.blocked(seq)]:
            self._table.running.begin(seq, self._table.rows[seq])

    # Scheduling

    async def run(self) -> None:
        """Work for ever."""
        scanned_s = 0.0
        while True:
            self._wake = trio.Event()
            now_s = time.time()
            if abs(now_s - scanned_s) >= _SCAN_S:
                scanned_s = now_s
                self._table.unseen.update(self.plans.open)
            self._look(now_s)
            self._dispatch(now_s)
            with trio.move_on_after(self._pause_s(now_s)):
                await self._wake.wait()
                await trio.sleep(_GATHER_S)

    def wake(self) -> None:
        """Have rows that changed looked at. To be called after each commit that changed some."""
        self._wake.set()

    def _pause_s(self, now_s: float) -> float:
        due_s = self.plans.schedule.next_s()
        pause_s = _SCAN_S if due_s is None else min(_SCAN_S, max(0.0, due_s - now_s))
        if self.blocked:
            pause_s = min(pause_s, max(0.001, self._look_at_blocked_s - time.monotonic()))
        return pause_s

    def _look(self, now_s: float) -> None:
        """Take note of the rows that changed."""
        unseen, self._table.unseen = self._table.unseen, set()
        for seq in sorted(unseen):
            row = self._table.rows.get(seq)
            if row is None:
                self._forget(seq)
            elif not isinstance(row, Local | Orphan):
                self._plan(seq, row, now_s)

    def _forget(self, seq: int) -> None:
        self.plans.forget(seq)
        self.blocked.discard(seq)
        if seq not in self.busy:
            # Removed while it paused after a failure: what took its place may go on.
            self._table.running.end(seq)
            abandoned = self.plans.take_upload(seq)
            if abandoned is not None:
                self._nursery.start_soon(self._abort, *abandoned)
        self.move_on()

    async def _abort(self, key: bytes, upload_id: str) -> None:
        try:
            await self._lake.abort_multipart(os.fsdecode(key), upload_id)
        except SluiceError as error:
            log.warning("an abandoned upload stays in the lake: %s", error)

    def _plan(self, seq: int, row: Pending, now_s: float) -> None:
        is_taken = seq in self.busy or seq in self._queued
        if not self.plans.plan(seq, row, now_s, is_taken=is_taken):
            self.move_on()  # Who waits for all that can be sent wants to know.

    # Lanes

    def _dispatch(self, now_s: float) -> None:
        """Start what is due, as far as there is room."""
        for seq in self.plans.schedule.pop_due(now_s):
            self._enqueue(seq)
        self._requeue_blocked()
        for lane in self._lanes:
            self._start_lane(lane)

    def _enqueue(self, seq: int) -> None:
        row = self._table.rows.get(seq)
        if row is None:
            return
        lane = self._lane(seq, row)
        if isinstance(row, Put) and row.inode in self.plans.urgent:
            self._lanes[lane].appendleft(seq)
        else:
            self._lanes[lane].append(seq)
        self._queued.add(seq)

    def _lane(self, seq: int, row: Pending) -> str:
        match row:
            case Move():
                return "move"
            case Delete():
                return "delete"
            case Put() if self.plans.progress[seq].dirty_bytes > SINGLE_PUT_BYTES_MAX:
                return "large"
            case _:
                return "small"

    def _requeue_blocked(self) -> None:
        started_s = time.monotonic()
        if not self.blocked or started_s < self._look_at_blocked_s:
            return
        for seq in sorted(self.blocked):
            if seq not in self._table.rows or not self.must_wait(seq):
                self.blocked.discard(seq)
                self._enqueue(seq)
        ended_s = time.monotonic()
        self._look_at_blocked_s = ended_s + _BLOCKED_SHARE * (ended_s - started_s)

    def must_wait(self, seq: int) -> bool:
        row = self._table.rows[seq]
        return self._waits_for_close(row) or self._table.blocked(seq)

    def _waits_for_close(self, row: Pending) -> bool:
        if not isinstance(row, Delete) or not row.inode or self._opens is None:
            return False
        return self._opens.state(row.inode).is_open

    def _start_lane(self, lane: str) -> None:
        waiting = self._lanes[lane]
        while waiting and self._active[lane] < self._lane_max[lane]:
            batch: list[int] = []
            while waiting and len(batch) < (DELETE_KEYS_MAX if lane == "delete" else 1):
                seq = waiting.popleft()
                self._queued.discard(seq)
                if seq not in self._table.rows:
                    self._forget(seq)
                elif self._is_due(seq) and seq in self._table.rows:
                    if self.must_wait(seq):
                        self.blocked.add(seq)
                        self._hurry_blockers(seq)
                        self.move_on()
                        continue
                    batch.append(seq)
                    self._table.running.begin(seq, self._table.rows[seq])
            if batch:
                self.busy.update(batch)
                self._active[lane] += 1
                self._nursery.start_soon(self._operate, lane, batch)

    def _hurry_blockers(self, seq: int) -> None:
        """What an upload has to wait for that somebody waits for is in the same hurry."""
        row, hurried = self._table.rows[seq], self.plans.hurried
        if seq in hurried or (isinstance(row, Put) and row.inode in self.plans.urgent):
            blockers = set(self._table.blockers(seq)) - hurried
            hurried |= blockers
            self.look_again(blockers)

    def _is_due(self, seq: int) -> bool:
        """Return whether a row is still to be carried out now; else have it planned anew."""
        now_s = time.time()
        self._plan(seq, self._table.rows[seq], now_s)
        due_s = self.plans.schedule.due_s(seq)
        if due_s is None or due_s > now_s:
            return False
        self.plans.schedule.remove(seq)
        return True

    async def _operate(self, lane: str, seqs: list[int]) -> None:
        try:
            await self._keeper.known(seqs)
            if lane == "delete":
                for seq, error in (await self._moves.delete(seqs)).items():
                    self.plans.note_failure(seq, self._table.rows.get(seq), error)
            else:
                await self._operation(seqs[0])
        except Stale:
            pass
        except SluiceError as error:
            for seq in seqs:
                self.plans.note_failure(seq, self._table.rows.get(seq), error)
        except Exception as error:  # A fault of ours fails this operation, not every mount's mover.
            log.exception("a pending operation failed")
            for seq in seqs:
                self.plans.note_failure(seq, self._table.rows.get(seq), SluiceError(repr(error)))
        finally:
            self._active[lane] -= 1
            self.busy.difference_update(seqs)
            self._end(seqs)
        await self._follow_up()

    async def _operation(self, seq: int) -> None:
        row = self._table.rows.get(seq)
        match row:
            case Put():
                self.plans.progress[seq].sent_bytes = 0
                state_ns = await self._puts.put(seq, partial(self._note_sent, seq))
                if seq in self.plans.progress:
                    self.plans.progress[seq].uploaded_ns = state_ns
            case Move():
                await self._moves.move(seq)
            case Mark():
                await self._moves.mark(seq)
            case Restate():
                await self._moves.restate(seq)

    def _note_sent(self, seq: int, size_bytes: int) -> None:
        if seq in self.plans.progress:
            self.plans.progress[seq].sent_bytes += size_bytes

    def _end(self, seqs: list[int]) -> None:
        for seq in seqs:
            row, progress = self._table.rows.get(seq), self.plans.progress.get(seq)
            stays = isinstance(row, Put | Mark | Move) and progress is not None and progress.attempts > 0
            if not stays or (isinstance(row, Put) and not row.upload_key):
                self._table.running.end(seq)
            if row is None:
                self._forget(seq)
            else:
                self._table.unseen.add(seq)
        self._look_at_blocked_s = min(self._look_at_blocked_s, time.monotonic() + 0.05)
        self.move_on()
        self._wake.set()

    def move_on(self) -> None:
        self.moved_on.set()
        self.moved_on = trio.Event()

    async def _follow_up(self) -> None:
        """Do what an operation left for after it, which nobody waits for."""
        superseded, self._puts.superseded = self._puts.superseded, []
        changed, self._moves.changed = self._moves.changed, []
        try:
            for vid in superseded:
                await self._residency.drop_version(vid)
            for parent, name in changed:
                await self._refresh_entry(parent, name)
        except SluiceError as error:
            log.warning("after an upload: %s", error)

    # For the Uploader

    def look_again(self, seqs: Iterable[int]) -> None:
        """Look at these rows and their files now: whoever waits for them goes by what is seen."""
        self._table.unseen.update(seqs)
        self._look(time.time())
        self.wake()

    def count_left(self, is_wanted: Callable[[Pending], bool] | None = None) -> int:
        """Return how many operations are left that go on without anybody's help.

        *is_wanted*: the rows asked about. None: all, and what is under way even if it lost its row.
        """
        rows = self._table.rows.items()
        wanted = [
            seq for seq, row in rows if self.goes_on(seq, row) and (is_wanted is None or is_wanted(row))
        ]
        if not self.blocked.issuperset(wanted):
            return len(wanted)
        left = set(wanted) - self._held_up()
        if not (self.busy or self._table.unseen) and all(map(self.must_wait, left)):
            self._tell_of_deadlock(left)
        return len(left) or (len(self.busy) if is_wanted is None else 0)

    def _held_up(self) -> set[int]:
        """Return the rows that need help, or a close, and those that wait for such a one."""
        rows = self._table.rows
        held_up = {
            seq for seq, row in rows.items() if not self.goes_on(seq, row) or self._waits_for_close(row)
        }
        waiting: defaultdict[int, list[int]] = defaultdict(list)
        for seq in self.blocked - held_up:
            for other in self._table.blockers(seq) if seq in rows else ():
                waiting[other].append(seq)
        left = list(held_up)
        while left:
            found = set(waiting.pop(left.pop(), ())) - held_up
            held_up |= found
            left += found
        return held_up

    def _tell_of_deadlock(self, seqs: set[int]) -> None:
        if seqs and not self._told_of_deadlock:
            self._told_of_deadlock = True
            named = ", ".join(str(self._table.rows[seq]) for seq in sorted(seqs)[:5])
            log.error("pending operations wait for each other, a fault of SluiceFS: %s", named)

    def goes_on(self, seq: int, row: Pending) -> bool:
        """Return whether nobody's help is needed for it."""
        if isinstance(row, Local | Orphan) or (isinstance(row, Put) and row.state == CONFLICT):
            return False
        progress = self.plans.progress.get(seq)
        return progress is None or not (progress.refused or (progress.is_idle and seq not in self.busy))
