"""When each pending operation is to be tried, and what is known of it besides its row."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import msgspec

from cache.committer import Committer
from cache.errors import BodyBroken, LakeUnavailable, MountReadOnly, SluiceError
from cache.index_writer import IndexWriter
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
from cache.policy.writeback import Backoff, Quiet, Schedule
from cache.staging import StagingFiles, as_written

log = logging.getLogger(__name__)

_MAPPED_S = 10.0  # What may be mapped for writing after its last close is looked at so often.
_ABANDONED_S = 5.0  # An OPEN row that nobody has open for so long was missed: it is sealed.
_DELETE_GATHER_S = 0.1  # Deletes wait so long for others, to go in one request.
replace = msgspec.structs.replace


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


class Plans:
    """Of all rows of *table* that were planned and not forgotten."""

    def __init__(
        self,
        committer: Committer,
        table: PendingTable,
        staging: StagingFiles,
        opens: OpenTable | None,
        config: UploadConfig,
    ) -> None:
        self._committer = committer
        self._table = table
        self._staging = staging
        self._opens = opens
        self._config = config
        self._quiet = Quiet(config.delay_s, config.open_delay_s)
        self._random = random.Random()
        self.schedule = Schedule()
        self.progress: dict[int, Progress] = {}
        self.open: set[int] = set()  # Rows to look at at each scan.
        self._uploads: dict[int, tuple[bytes, str]] = {}  # Multipart uploads that rows told of.
        self._dirty_bytes = 0
        self.hurries = 0
        self.urgent: Counter[int] = Counter()  # Inodes that somebody waits for,
        self.hurried: set[int] = set()  # and the rows that have to go before their uploads.

    def plan(self, seq: int, row: Pending, now_s: float, *, is_taken: bool) -> bool:
        """Decide when the row is to be looked at next; return False if not before it changes.

        *is_taken*: it is being carried out, or about to be; its time is up to whoever does that.
        """
        progress = self.progress.get(seq)
        if progress is None:
            progress = self.progress[seq] = Progress(now_s, now_s)
        if row is not progress.row:
            progress.row, progress.changed_at_s = row, now_s
        if is_taken:
            return True
        due_s = self._put_due_s(seq, row, progress, now_s) if isinstance(row, Put) else None
        if not isinstance(row, Put):
            due_s = self._change_due_s(seq, row, progress)
        if due_s is None:
            self.schedule.remove(seq)
        else:
            self.schedule.put(seq, max(due_s, progress.retry_at_s))
        return due_s is not None and not progress.refused

    def forget(self, seq: int) -> None:
        """The row is gone."""
        self.schedule.remove(seq)
        self.open.discard(seq)
        self.hurried.discard(seq)
        progress = self.progress.pop(seq, None)
        if progress is not None:
            self._dirty_bytes -= progress.dirty_bytes

    def note_upload(self, seq: int, key: bytes, upload_id: str) -> None:
        """The lake has this unfinished multipart upload of the row; "": none."""
        if upload_id:
            self._uploads[seq] = (key, upload_id)
        else:
            self._uploads.pop(seq, None)

    def take_upload(self, seq: int) -> tuple[bytes, str] | None:
        """Return key and id of a multipart upload that the row told of, once."""
        return self._uploads.pop(seq, None)

    def _change_due_s(self, seq: int, row: Pending, progress: Progress) -> float:
        if seq in self._table.running or self.hurries or seq in self.hurried:
            return progress.since_s
        if isinstance(row, Delete):
            return progress.since_s + _DELETE_GATHER_S
        return progress.changed_at_s + self._config.delay_s

    def _put_due_s(self, seq: int, row: Put, progress: Progress, now_s: float) -> float | None:
        """Return when the file is to be sent, None if not before it changes."""
        self.note_upload(seq, row.upload_key, row.upload_id)
        if row.state == CONFLICT:
            return None
        hurried = self.hurries > 0 or row.inode in self.urgent or seq in self.hurried
        if not row.staged:
            quiet_s = self._quiet.due_s(progress.since_s, now_s, is_open=False, hurried=hurried)
            return None if row.uploaded == upload_mark(row, row.attributes.ctime_ns) else quiet_s
        try:
            status = self._staging.stat(row.staged)
        except SluiceError as error:
            self.note_failure(seq, row, error)
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
            attributes = as_written(row.attributes, status)
            sealed = replace(sealed, attributes=attributes, sealed_at_s=time.time())
            self._committer.commit_now(lambda w: self._put_sealed(w, seq, sealed))

    def _put_sealed(self, w: IndexWriter, seq: int, row: Put) -> None:
        node = w.node(row.inode)
        if node is not None:
            own = node.attributes and replace(node.attributes, mode=row.attributes.mode)
            node = replace(node, size_bytes=row.size_bytes, mtime_ns=row.mtime_ns, attributes=own)
            w.put_node(row.inode, node)
        self._table.replace(w, seq, row)

    # Failures

    def note_failure(self, seq: int, row: Pending | None, error: SluiceError) -> None:
        """Plan the next try of what failed; the row says so if only somebody else can mend it."""
        progress = self.progress.get(seq)
        if row is None or progress is None:
            return
        again = isinstance(error, LakeUnavailable | MountReadOnly) and not isinstance(error, BodyBroken)
        kind = LakeUnavailable(str(error)) if again else SluiceError(str(error))
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

    # Telling

    @property
    def dirty_bytes(self) -> int:
        """The bytes in staging files that the lake has not: of open files now, of others when they closed."""
        now_s = time.time()
        for seq in list(self.open):
            row = self._table.rows.get(seq)
            if isinstance(row, Put):
                self._put_due_s(seq, row, self.progress[seq], now_s)
        return self._dirty_bytes

    def forgive(self, seq: int) -> None:
        """Have what failed tried at once, as if for the first time."""
        progress = self.progress[seq]
        progress.attempts, progress.retry_at_s, progress.error, progress.refused = 0, 0.0, "", False
