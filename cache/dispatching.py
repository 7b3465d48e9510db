"""Starts what is pending when it is due, in the order that the keys ask for, and after failures again.

What is under way stays in `PendingTable.running` until it is known how it ended, pauses after failures
included: so long the lake may have any of it.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import msgspec
import trio

from cache.committer import Committer
from cache.errors import LakeUnavailable, MountReadOnly, SluiceError
from cache.index import Index, IndexWriter
from cache.journaling import JournalKeeper
from cache.lake_io import LakeIO
from cache.model import Inode
from cache.moving import DELETE_KEYS_MAX, Moves
from cache.opens import Mode, OpenTable
from cache.pending import (
    CONFLICT,
    FAILED,
    OPEN,
    SEALED,
    Delete,
    Local,
    Mark,
    Move,
    Orphan,
    Pending,
    PendingTable,
    Put,
    Restate,
    upload_mark,
)
from cache.policy.writeback import SINGLE_PUT_BYTES_MAX, Backoff, Quiet, Schedule, TokenBucket
from cache.residency import Residency
from cache.sending import Sender, SlotGate, Stale
from cache.staging import StagingFiles
from cache.uploading import Puts, Receipt

log = logging.getLogger(__name__)

_SCAN_S = 1.0  # Open files are looked at so often: nobody tells when they were written to.
_MAPPED_S = 10.0  # What may be mapped for writing after its last close is looked at so often.
_ABANDONED_S = 5.0  # An OPEN row that nobody has open for so long was missed: it is sealed.
_DELETE_GATHER_S = 0.1  # Deletes wait so long for others, to go in one request.
_BLOCKED_SHARE = 20  # Looking at what is blocked takes at most this part of the time.
_LANES = {"small": 2, "large": 4, "move": 4, "delete": 2}  # Operations of a kind at once; small: a slot.
replace = msgspec.structs.replace
RefreshEntry = Callable[[Inode, bytes], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class UploadConfig:
    """*cache_id* names the cache directory: what it sent is recognised by it."""

    delay_s: float = 2.0
    open_delay_s: float = 30.0
    threads: int = 8
    bandwidth: int | None = None
    cache_id: str = ""
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(slots=True)
class Progress:
    """What is known of a pending operation besides its row. *since_s*, *retry_at_s*: unix time."""

    since_s: float
    changed_at_s: float
    retry_at_s: float = 0.0
    attempts: int = 0
    error: str = ""
    refused: bool = False
    sent_bytes: int = 0
    dirty_bytes: int = 0
    is_idle: bool = False  # The lake has all that was written so far; it is open.
    uploaded_ns: int = 0  # The ctime of the newest state that the lake got from this process.
    row: Pending | None = None  # As it was seen last.


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
        self._staging = staging
        self._residency = residency
        self._opens = opens
        self._config = config
        self._refresh_entry = refresh_entry
        self._quiet = Quiet(config.delay_s, config.open_delay_s)
        self._random = random.Random()
        gate = SlotGate(config.threads)
        sender = Sender(lake, gate, TokenBucket(config.bandwidth))
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
        )
        self._moves = Moves(lake, index, committer, table, keeper)
        self._schedule = Schedule()
        self._lanes: dict[str, deque[int]] = {lane: deque() for lane in _LANES}
        self._active = dict.fromkeys(_LANES, 0)
        self._lane_max = {**_LANES, "small": _LANES["small"] * config.threads}
        self._queued: set[int] = set()  # In a lane.
        self.busy: set[int] = set()  # Being carried out.
        self.blocked: set[int] = set()
        self._look_at_blocked_s = 0.0  # time.monotonic()
        self.open: set[int] = set()  # Rows to look at at each scan.
        self.progress: dict[int, Progress] = {}
        self._uploads: dict[int, tuple[bytes, str]] = {}  # Multipart uploads that rows told of.
        self._dirty_bytes = 0
        self.hurries = 0
        self.urgent: Counter[int] = Counter()  # Inodes that somebody waits for.
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
                self._table.unseen.update(self.open)
            self._look(now_s)
            self._dispatch(now_s)
            with trio.move_on_after(self._pause_s(now_s)):
                await self._wake.wait()

    def wake(self) -> None:
        """Have rows that changed looked at. To be called after each commit that changed some."""
        self._wake.set()

    def _pause_s(self, now_s: float) -> float:
        due_s = self._schedule.next_s()
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
        self._schedule.remove(seq)
        self.open.discard(seq)
        self.blocked.discard(seq)
        if seq not in self.busy:
            # Removed while it paused after a failure: what took its place may go on.
            self._table.running.end(seq)
            abandoned = self._uploads.pop(seq, None)
            if abandoned is not None:
                self._nursery.start_soon(self._abort, *abandoned)
        progress = self.progress.pop(seq, None)
        if progress is not None:
            self._dirty_bytes -= progress.dirty_bytes
        self.move_on()

    async def _abort(self, key: bytes, upload_id: str) -> None:
        try:
            await self._lake.abort_multipart(os.fsdecode(key), upload_id)
        except SluiceError as error:
            log.warning("an abandoned upload stays in the lake: %s", error)

    def _plan(self, seq: int, row: Pending, now_s: float) -> None:
        """Decide when the row is to be looked at next."""
        progress = self.progress.get(seq)
        if progress is None:
            progress = self.progress[seq] = Progress(now_s, now_s)
        if row is not progress.row:
            progress.row, progress.changed_at_s = row, now_s
        if seq in self.busy or seq in self._queued:
            return
        due_s = self._put_due_s(seq, row, progress, now_s) if isinstance(row, Put) else None
        if not isinstance(row, Put):
            due_s = self._change_due_s(seq, row, progress)
        if due_s is None:
            self._schedule.remove(seq)
            self.move_on()  # Who waits for all that can be sent wants to know.
        else:
            self._schedule.put(seq, max(due_s, progress.retry_at_s))

    def _change_due_s(self, seq: int, row: Pending, progress: Progress) -> float:
        if seq in self._table.running or self.hurries:
            return progress.since_s
        if isinstance(row, Delete):
            return progress.since_s + _DELETE_GATHER_S
        return progress.changed_at_s + self._config.delay_s

    def _put_due_s(self, seq: int, row: Put, progress: Progress, now_s: float) -> float | None:
        """Return when the file is to be sent, None if not before it changes."""
        if row.upload_id:
            self._uploads[seq] = (row.upload_key, row.upload_id)
        else:
            self._uploads.pop(seq, None)
        if row.state == CONFLICT:
            return None
        hurried = self.hurries > 0 or row.inode in self.urgent
        if not row.staged:
            quiet_s = self._quiet.due_s(progress.since_s, now_s, is_open=False, hurried=hurried)
            return None if row.uploaded == upload_mark(row, row.attributes.ctime_ns) else quiet_s
        try:
            status = self._staging.stat(row.staged)
        except SluiceError as error:
            self._note_failure(seq, row, error)
            self.move_on()
            return now_s + self._config.backoff.refused_s
        self._note_dirty(progress, status.st_size)
        written = self._may_be_written(row)
        kept = written or self._is_passed_through(row)
        if kept or row.state == OPEN:
            self.open.add(seq)
        else:
            self.open.discard(seq)
        if row.state == OPEN and not written and now_s - progress.since_s > _ABANDONED_S:
            self._seal(seq, row.inode)
        is_uploaded = row.uploaded == upload_mark(row, status.st_ctime_ns)
        may_be_mapped = self._opens is not None and self._opens.may_be_mapped(row.inode)
        progress.is_idle = is_uploaded and (kept or may_be_mapped)
        if is_uploaded:
            self._note_dirty(progress, 0)
            return None if kept else now_s + (_MAPPED_S if may_be_mapped else 0.0)
        if seq in self._table.running:
            return now_s  # To be settled: it was begun before.
        changed_at_s = max(status.st_ctime, row.sealed_at_s)
        return self._quiet.due_s(changed_at_s, now_s, is_open=written or row.state == OPEN, hurried=hurried)

    def _may_be_written(self, row: Put) -> bool:
        return self._opens is None or self._opens.state(row.inode).may_be_written

    def _is_passed_through(self, row: Put) -> bool:
        return self._opens is not None and self._opens.state(row.inode).mode is Mode.PASSTHROUGH

    def _note_dirty(self, progress: Progress, size_bytes: int) -> None:
        self._dirty_bytes += size_bytes - progress.dirty_bytes
        progress.dirty_bytes = size_bytes

    def _seal(self, seq: int, inode: int) -> None:
        """Seal a file whose Closed message was lost, with the process that should have sent it."""
        assert self._opens is not None
        self._committer.flush()
        with self._opens.held(inode) as held:
            row = self._table.rows.get(seq)
            if held.state.may_be_written or not isinstance(row, Put) or row.state != OPEN:
                return
            status = self._staging.stat(row.staged)
            size_bytes, mtime_ns = status.st_size, status.st_mtime_ns
            sealed = replace(row, state=SEALED, size_bytes=size_bytes, mtime_ns=mtime_ns)
            sealed = replace(sealed, sealed_at_s=time.time())
            self._committer.commit_now(lambda w: self._put_sealed(w, seq, sealed))

    def _put_sealed(self, w: IndexWriter, seq: int, row: Put) -> None:
        node = w.node(row.inode)
        if node is not None:
            w.put_node(row.inode, replace(node, size_bytes=row.size_bytes, mtime_ns=row.mtime_ns))
        self._table.replace(w, seq, row)

    # Lanes

    def _dispatch(self, now_s: float) -> None:
        """Start what is due, as far as there is room."""
        for seq in self._schedule.pop_due(now_s):
            self._enqueue(seq)
        self._requeue_blocked()
        for lane in self._lanes:
            self._start_lane(lane)

    def _enqueue(self, seq: int) -> None:
        row = self._table.rows.get(seq)
        if row is None:
            return
        lane = self._lane(seq, row)
        if isinstance(row, Put) and row.inode in self.urgent:
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
            case Put() if self.progress[seq].dirty_bytes > SINGLE_PUT_BYTES_MAX:
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
        if isinstance(row, Put) and row.upload_key not in (b"", row.key):
            return False  # First of all it is settled what became of the earlier key.
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
                        self.move_on()
                        continue
                    batch.append(seq)
                    self._table.running.begin(seq, self._table.rows[seq])
            if batch:
                self.busy.update(batch)
                self._active[lane] += 1
                self._nursery.start_soon(self._operate, lane, batch)

    def _is_due(self, seq: int) -> bool:
        """Return whether a row is still to be carried out now; else have it planned anew."""
        now_s = time.time()
        self._plan(seq, self._table.rows[seq], now_s)
        due_s = self._schedule.due_s(seq)
        if due_s is None or due_s > now_s:
            return False
        self._schedule.remove(seq)
        return True

    async def _operate(self, lane: str, seqs: list[int]) -> None:
        try:
            if lane == "delete":
                for seq, error in (await self._moves.delete(seqs)).items():
                    self._note_failure(seq, self._table.rows.get(seq), error)
            else:
                await self._operation(seqs[0])
        except Stale:
            pass
        except SluiceError as error:
            for seq in seqs:
                self._note_failure(seq, self._table.rows.get(seq), error)
        except Exception as error:  # A fault of ours fails this operation, not every mount's mover.
            log.exception("a pending operation failed")
            for seq in seqs:
                self._note_failure(seq, self._table.rows.get(seq), SluiceError(repr(error)))
        finally:
            self._active[lane] -= 1
            self.busy.difference_update(seqs)
            self._end(seqs)
        await self._follow_up()

    async def _operation(self, seq: int) -> None:
        row = self._table.rows.get(seq)
        match row:
            case Put() if row.upload_key not in (b"", row.key):
                await self._puts.settle_earlier(seq)
            case Put():
                self.progress[seq].sent_bytes = 0
                state_ns = await self._puts.put(seq, partial(self._note_sent, seq))
                if seq in self.progress:
                    self.progress[seq].uploaded_ns = state_ns
            case Move():
                await self._moves.move(seq)
            case Mark():
                await self._moves.mark(seq)
            case Restate():
                await self._moves.restate(seq)

    def _note_sent(self, seq: int, size_bytes: int) -> None:
        if seq in self.progress:
            self.progress[seq].sent_bytes += size_bytes

    def _end(self, seqs: list[int]) -> None:
        for seq in seqs:
            row, progress = self._table.rows.get(seq), self.progress.get(seq)
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

    # Failures

    def _note_failure(self, seq: int, row: Pending | None, error: SluiceError) -> None:
        """Plan the next try of what failed; the row says so if only somebody else can mend it."""
        progress = self.progress.get(seq)
        if row is None or progress is None:
            return
        again = isinstance(error, LakeUnavailable | MountReadOnly)
        kind: Exception = LakeUnavailable(str(error)) if again else error
        progress.attempts += 1
        delay_s = self._config.backoff.delay_s(kind, progress.attempts, self._random.random())
        progress.retry_at_s = time.time() + delay_s
        progress.error, progress.refused = str(error), not again
        if not again and not isinstance(row, Local | Orphan) and row.error != str(error):
            log.error("%s; it is kept, and tried again in %.0f s: `sluice queue`", error, delay_s)
            self._committer.commit_nowait(partial(self.put_error, seq, str(error)))

    def put_error(self, seq: int, text: str, w: IndexWriter) -> None:
        row = self._table.rows.get(seq)
        if isinstance(row, Put):
            state = FAILED if row.state == SEALED and text else row.state
            self._table.replace(w, seq, replace(row, error=text, state=state))
        elif isinstance(row, Mark | Delete | Move | Restate):
            self._table.replace(w, seq, replace(row, error=text))

    # For the Uploader

    @property
    def dirty_bytes(self) -> int:
        """The bytes in staging files that the lake has not: of open files now, of others when they closed."""
        now_s = time.time()
        for seq in list(self.open):
            row = self._table.rows.get(seq)
            if isinstance(row, Put):
                self._put_due_s(seq, row, self.progress[seq], now_s)
        return self._dirty_bytes

    def look_again(self, seqs: Iterable[int]) -> None:
        """Look at these rows and their files now: whoever waits for them goes by what is seen."""
        self._table.unseen.update(seqs)
        self._look(time.time())
        self.wake()

    def forgive(self, seq: int) -> None:
        """Have what failed tried at once, as if for the first time."""
        progress = self.progress[seq]
        progress.attempts, progress.retry_at_s, progress.error, progress.refused = 0, 0.0, "", False

    def count_left(self, is_wanted: Callable[[Pending], bool] | None = None) -> int:
        """Return how many operations are left that go on without anybody's help.

        *is_wanted*: the rows asked about. None: all, and what is under way even if it lost its row.
        """
        rows = self._table.rows.items()
        wanted = [
            seq for seq, row in rows if self._goes_on(seq, row) and (is_wanted is None or is_wanted(row))
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
            seq for seq, row in rows.items() if not self._goes_on(seq, row) or self._waits_for_close(row)
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

    def _goes_on(self, seq: int, row: Pending) -> bool:
        if isinstance(row, Local | Orphan) or (isinstance(row, Put) and row.state == CONFLICT):
            return False
        progress = self.progress.get(seq)
        return progress is None or not (progress.refused or (progress.is_idle and seq not in self.busy))
