"""How many have each inode open, over all processes of a mount, and in which of the kernel's modes.

A request for an open file may reach any worker, and the mover must know what may leave. So the
counts lie in memory that all of them share: an `OpenTable` is made before the fork.

A bucket holds the entries of the inodes that hash to it, and has one lock: a record lock
(fcntl(2)) on a byte of the table's memory file, which the kernel takes from a process that dies. What
such a process had begun is finished by the next that takes the lock, or had not happened at all:

  1  the new value is written beside the entries
  2  one 64-bit store says that it is valid. From here on the change has happened.
  3  it is copied to its place, and 2 is taken back.

The kernel sends a request again when the worker that had it dies, counted or not. So a change may
carry the request's own number, and with a number that the table has seen nothing is counted.

An open is counted first and answered later, and what is answered first decides for all: either with
a backing id, the kernel's number for the file that it reads and writes in our place
(FUSE_PASSTHROUGH), or without one. All answers that follow are the same, until the last is closed.

Where a bucket is full, opens are counted for the bucket only. Until these are closed, the table
says UNKNOWN of every inode in it that it can't vouch for: take it as open, for writing too.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import TracebackType
from typing import NamedTuple, Protocol

from cache.generations import Generations

BUCKETS = 4096
# Of as many requests the table knows whether they were counted. A request may wait for the lake, with
# another worker answering it meanwhile, for as long as half a million others are answered.
REQUESTS = 1 << 19
_SLOTS = 28
# Words of a bucket. The first four are the change under way; PLACE is 0 when there is none.
_PLACE, _VALUE, _KEY, _REQUEST, _EXCESS, _KEYS = 0, 1, 2, 3, 4, 8
_VALUES = _KEYS + _SLOTS
_WORDS = _VALUES + _SLOTS
# In front of the buckets: the numbers of requests, which objects were last given to the kernel (eight
# bytes of the version id, the inode, the file's number on its disk), who is registering a backing file
# just now, and how often the kernel was made to send requests again.
OBJECTS = 1 << 16
_OBJECT_WORDS = 3
_FIRST_OBJECT = REQUESTS
_REGISTERING = _FIRST_OBJECT + _OBJECT_WORDS * OBJECTS
_LARGEST_ID = _REGISTERING + 1
_RESENDS = _REGISTERING + 2
_FIRST_BUCKET = _REGISTERING + 8
# An entry's value: readers in bits 0 to 19, writers in bits 20 to 31, the backing id above, and in the
# highest bit whether an open was answered without one.
_READERS_MAX, _WRITERS_MAX = (1 << 20) - 1, (1 << 12) - 1
_WRITERS_SHIFT, _BACKING_SHIFT = 20, 32
BACKING_ID_MAX = (1 << 31) - 1
_ANSWERED_CACHED = 1 << 63
_MAPPED_CELLS = _LEAVING_CELLS = 1 << 16

# For fusefs/counted.c, which changes entries, too.
LAYOUT = (REQUESTS, _FIRST_BUCKET, BUCKETS, _WORDS, _KEYS, _SLOTS)


class Mode(Enum):
    """How the kernel has an inode open. While it is open, every further open has to agree."""

    CLOSED = "closed"
    CACHED = "cached"
    PASSTHROUGH = "passthrough"
    UNKNOWN = "unknown"  # Take it as open in cached mode.


class OpenState(NamedTuple):
    """*backing_id*: what the kernel calls the file that it reads; 0 unless there is one.

    CLOSED with a backing id: whoever closed the inode last died before it took that back.
    """

    readers: int
    writers: int
    mode: Mode
    backing_id: int

    @property
    def is_open(self) -> bool:
        return self.mode is not Mode.CLOSED

    @property
    def may_be_written(self) -> bool:
        return self.writers > 0 or self.mode is Mode.UNKNOWN


class Grants(Protocol):
    """Opens for reading that no process counts one by one, see fusefs/grants.py."""

    def count(self, inode: int) -> int: ...

    def withdraw(self, inode: int) -> int: ...


class OpenTable:
    """Make it before the fork. All processes together may have `BUCKETS * 28` inodes open."""

    def __init__(self, grants: Grants | None = None) -> None:
        self._grants = grants
        size_bytes = 8 * (_FIRST_BUCKET + BUCKETS * _WORDS)
        self.fd = self._fd = os.memfd_create("sluice-opens", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size_bytes)  # Pages that nobody touches take no memory.
        self.cells = self._cells = memoryview(mmap.mmap(self._fd, size_bytes)).cast("Q")
        # A record lock is the process's: it does not hold off that process's other threads.
        self._thread_lock = threading.Lock()
        self._holder = 0
        self.is_held = bytearray(1)  # Whether a thread of this process has the lock: for fusefs/counted.c.
        self._mapped = mmap.mmap(-1, _MAPPED_CELLS)
        self._leaving = mmap.mmap(-1, _LEAVING_CELLS)
        self._marked: list[int] = []  # Cells of `_leaving`: the mover's.
        self.generations = Generations()

    def opened(self, inode: int, *, writing: bool = False, request: int = 0) -> OpenState:
        """Count one more open; return the state with it. *request*: see `Held.opened`."""
        with self.held(inode) as held:
            return held.opened(writing=writing, request=request)

    def closed(self, inode: int, *, writing: bool = False, request: int = 0) -> OpenState:
        """Count one open less; return the state without it."""
        with self.held(inode) as held:
            return held.closed(writing=writing, request=request)

    def state(self, inode: int) -> OpenState:
        """Return the state of this moment, without the lock: the next may be another."""
        base = self._base(inode)
        return self._state(base, inode, self._value(base, inode))

    def held(self, inode: int) -> Held:
        """Return a block's view of one inode: `with table.held(inode) as held: ... held.state`.

        While the block runs no process opens or closes the inode. It must not wait for anything
        (no await, no I/O but what belongs to the decision), and hold no second inode.
        """
        assert 0 < inode < 1 << 64, inode
        return Held(self, inode)

    def abandoned(self) -> list[int]:
        """Return the inodes that are closed but have a backing id still."""
        cells = self._cells
        found = []
        for base in range(_FIRST_BUCKET, len(cells), _WORDS):
            for inode in filter(None, cells[base + _KEYS : base + _VALUES]):
                state = self.state(inode)
                if state.backing_id and not state.is_open:
                    found.append(inode)
        return found

    def withdraw_grant(self, inode: int) -> bool:
        """Have each open and release of the inode counted here; return whether some are not.

        These are in cached mode, are part of `state`, and come here when they are released.
        """
        return self._grants is not None and self._grants.withdraw(inode) > 0

    # Requests that are sent again

    @property
    def resends(self) -> int:
        """Return how often the kernel was made to send again what was unanswered.

        It is another number before anybody receives such a request, and no worker of before is left then.
        """
        return self._cells[_RESENDS]

    def note_resend(self) -> None:
        """The workers are dead, and the kernel is about to be told to send their requests again."""
        self._cells[_RESENDS] += 1

    # Inodes that leave

    def leave_unless_open(self, inode: int) -> bool:
        """Return whether nobody has *inode* open; the mover then takes its node out of the index.

        Who opens it from now on finds `may_leave`, until `left` says that the transaction is over: he waits
        for that, and looks whether the node is there. One of the two sees the other.
        """
        cell = inode % _LEAVING_CELLS
        self._leaving[cell] = 1
        self._marked.append(cell)
        self.withdraw_grant(inode)
        with self.held(inode) as held:
            return not held.state.is_open

    def left(self) -> None:
        """The mover's transaction is over."""
        for cell in self._marked:
            self._leaving[cell] = 0
        self._marked.clear()

    def begin_leaving(self) -> None:
        """A mover begins: what an earlier one was about to take out is still there, or gone."""
        self._leaving[:] = bytes(_LEAVING_CELLS)

    def may_leave(self, inode: int) -> bool:
        """Return whether *inode*, or one that shares its cell, may be about to leave.

        To be asked once the open is counted.
        """
        return bool(self._leaving[inode % _LEAVING_CELLS])

    # Objects in passthrough

    def note_object(self, vid: bytes, inode: int) -> None:
        """*inode* is about to be open in passthrough, and shows the object version *vid*.

        Of two versions that share a cell the first is forgotten, and takes disk space uncounted if
        it is evicted while it is open.
        """
        place, word = _object_place(vid)
        self._cells[place : place + _OBJECT_WORDS] = _words(word, inode, 0)

    def note_file(self, vid: bytes, file: int) -> None:
        """The file of the object that was noted last is number *file* of its disk (stat(2): st_ino)."""
        self._cells[_object_place(vid)[0] + 2] = file

    def file_of(self, vid: bytes) -> int:
        """Return which file of the object the kernel was given last; 0: not known."""
        place, word = _object_place(vid)
        return self._cells[place + 2] if self._cells[place] == word else 0

    def is_passed_through(self, vid: bytes) -> bool:
        """Return whether the kernel has a file of this object version open in passthrough, or is given it.

        Who opens a file in a tier while it is registered looks at the index first, and who takes it out of
        the index asks here afterwards: so one of the two sees the other.
        """
        place, word = _object_place(vid)
        if self._cells[place] != word:
            return False
        inode = self._cells[place + 1]
        return self._cells[_REGISTERING] == inode or self.state(inode).mode is Mode.PASSTHROUGH

    # Mappings

    def note_mapped(self, inode: int) -> None:
        """*inode* is about to be open for reading and writing in passthrough.

        A mapping of it is one of the backing file: unlike any other it may be written to after the
        kernel has sent RELEASE (fs/backing-file.c: backing_file_mmap).
        """
        self._mapped[inode % _MAPPED_CELLS] = 1

    def may_be_mapped(self, inode: int) -> bool:
        """Return whether that was ever noted of *inode*, or of one that shares its cell."""
        return bool(self._mapped[inode % _MAPPED_CELLS])

    # The lock

    def _lock(self, base: int) -> None:
        assert self._holder != threading.get_ident(), "one inode at a time"
        self._thread_lock.acquire()
        self._holder = threading.get_ident()
        self.is_held[0] = 1
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, base)
        except BaseException:
            self._holder = self.is_held[0] = 0
            self._thread_lock.release()
            raise
        self._finish(base)

    def _unlock(self, base: int) -> None:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, base)
        finally:
            self._holder = self.is_held[0] = 0
            self._thread_lock.release()

    @contextmanager
    def _registering(self, inode: int, close: Callable[[int], None]) -> Iterator[None]:
        """Let one process at a time register a backing file, after it took back what a dead one left.

        The kernel gives out ids in order (fs/fuse/passthrough.c: idr_alloc_cyclic), so a process that
        died between its registration and the entry has left the one after the largest.
        """
        cells = self._cells
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, _REGISTERING)
        try:
            if dead := cells[_REGISTERING]:
                its_id = self.state(dead).backing_id
                if its_id > cells[_LARGEST_ID]:
                    cells[_LARGEST_ID] = its_id
                else:
                    close(cells[_LARGEST_ID] + 1)
            cells[_REGISTERING] = inode
            yield
            cells[_LARGEST_ID] = max(cells[_LARGEST_ID], self.state(inode).backing_id)
            cells[_REGISTERING] = 0
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _REGISTERING)

    # Entries. All but `_value` and `_state` hold the bucket's lock.

    def _base(self, inode: int) -> int:
        # Inodes are given out in order, so neighbours go to different buckets.
        return _FIRST_BUCKET + (inode ^ inode >> 12) % BUCKETS * _WORDS

    def _value(self, base: int, inode: int) -> int:
        """Return the entry's value, 0 where there is none."""
        cells = self._cells
        if cells[base + _PLACE] >= _VALUES and cells[base + _KEY] == inode:
            return cells[base + _VALUE]
        slot = self._slot(base, inode)
        if slot is None:
            return 0
        value = cells[base + _VALUES + slot]
        return value if cells[base + _KEYS + slot] == inode else 0  # It may just have left.

    def _slot(self, base: int, key: int) -> int | None:
        """Return where *key*'s entry is; for key 0, where one is free."""
        try:
            return self._cells[base + _KEYS : base + _VALUES].tolist().index(key)
        except ValueError:
            return None

    def _state(self, base: int, inode: int, value: int) -> OpenState:
        readers, writers = value & _READERS_MAX, value >> _WRITERS_SHIFT & _WRITERS_MAX
        granted = 0 if self._grants is None else self._grants.count(inode)
        backing_id = value >> _BACKING_SHIFT & BACKING_ID_MAX
        if backing_id:
            mode = Mode.PASSTHROUGH if readers or writers else Mode.CLOSED
        elif self._cells[base + _EXCESS]:
            mode = Mode.UNKNOWN
        else:
            mode = Mode.CACHED if value or granted else Mode.CLOSED
        return OpenState(readers + granted, writers, mode, backing_id)

    def _put(self, base: int, inode: int, value: int, request: int) -> None:
        """Change or make the inode's entry; 0 takes it away. Where there is no room: the excess."""
        slot = self._slot(base, inode)
        if slot is None:
            slot = self._slot(base, 0)
        if slot is None:
            self._change(base, _EXCESS, self._cells[base + _EXCESS] + 1, 0, request)
        else:
            self._change(base, _VALUES + slot, value, inode, request)

    def _change(self, base: int, place: int, value: int, key: int, request: int) -> None:
        cells = self._cells
        cells[base + _VALUE] = value
        cells[base + _KEY] = key
        cells[base + _REQUEST] = request
        cells[base + _PLACE] = place  # Whoever dies before this has changed nothing.
        self._finish(base)

    def _finish(self, base: int) -> None:
        """Carry out the change that is under way, if there is one. Twice does the same as once."""
        cells = self._cells
        place = cells[base + _PLACE]
        if not place:
            return
        value, request = cells[base + _VALUE], cells[base + _REQUEST]
        cells[base + place] = value
        if place >= _VALUES:
            cells[base + place - _SLOTS] = cells[base + _KEY] if value else 0
        if request:
            cells[(request >> 1) % REQUESTS] = request
        cells[base + _PLACE] = 0

    def _was_counted(self, request: int) -> bool:
        # FUSE numbers requests in steps of 2 (linux/fuse.h: FUSE_UNIQUE_RESEND and the lowest bit are flags).
        return request != 0 and self._cells[(request >> 1) % REQUESTS] == request


class Held:
    """One inode, for as long as the block of `OpenTable.held` runs."""

    def __init__(self, table: OpenTable, inode: int) -> None:
        self._table = table
        self._inode = inode
        self._base = table._base(inode)

    def __enter__(self) -> Held:
        self._table._lock(self._base)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table._unlock(self._base)

    @property
    def state(self) -> OpenState:
        return self._table._state(self._base, self._inode, self._table._value(self._base, self._inode))

    def opened(self, *, writing: bool = False, request: int = 0) -> OpenState:
        """Count one more open; return the state with it.

        *request*: its number, without the bit that says that it was sent again; 0: not known.
        """
        table, base, inode = self._table, self._base, self._inode
        value = table._value(base, inode)
        if not table._was_counted(request):
            if not table._state(base, inode, value).is_open:
                value = 0  # Nor does an id count that the last closer left.
            table._put(base, inode, _counted(value, writing, 1), request)
            value = table._value(base, inode)
        return table._state(base, inode, value)

    @property
    def may_get_backing(self) -> bool:
        """Return whether it is counted as open, and no open of it was answered yet."""
        table, value = self._table, self._table._value(self._base, self._inode)
        is_counted = value & ((1 << _BACKING_SHIFT) - 1) != 0
        return is_counted and not value >> _BACKING_SHIFT and not table._cells[self._base + _EXCESS]

    def answered_cached(self) -> None:
        """An open, counted before, is answered without a backing id: so are all that follow."""
        table, value = self._table, self._table._value(self._base, self._inode)
        assert not self.state.backing_id, self.state
        if value:
            table._put(self._base, self._inode, value | _ANSWERED_CACHED, 0)

    def answered_with(self, register: Callable[[], int], close: Callable[[int], None]) -> int:
        """An open, counted before, is answered with the backing id that *register* returns; return it.

        It returns 0 for none after all. *close* takes back an id, known or not. Nobody's id is
        lost, whoever dies in between.
        """
        assert self.may_get_backing, self.state
        table = self._table
        with table._registering(self._inode, close):
            backing_id = register()
            assert 0 <= backing_id <= BACKING_ID_MAX, backing_id
            value = table._value(self._base, self._inode)
            chosen = backing_id << _BACKING_SHIFT if backing_id else _ANSWERED_CACHED
            table._put(self._base, self._inode, value | chosen, 0)
        return backing_id

    def closed(self, *, writing: bool = False, request: int = 0) -> OpenState:
        """Count one open less; return the state without it.

        A backing id stays, to be closed by the caller, who calls `forget_backing` then.
        """
        table, value = self._table, self._table._value(self._base, self._inode)
        if table._was_counted(request):
            return self.state
        changed = _counted(value, writing, -1)
        excess = table._cells[self._base + _EXCESS]
        if changed != value:
            table._put(self._base, self._inode, changed, request)
        elif not _is_full(value, writing) and excess:
            table._change(self._base, _EXCESS, excess - 1, 0, request)
        return self.state

    def forget_backing(self) -> None:
        """The kernel knows the backing id no more. Nobody has the inode open."""
        state = self.state
        assert not state.is_open, state
        if state.backing_id:
            self._table._put(self._base, self._inode, 0, 0)


def _object_place(vid: bytes) -> tuple[int, int]:
    word = int.from_bytes(vid[:8], "little")
    return _FIRST_OBJECT + _OBJECT_WORDS * (word % OBJECTS), word


def _words(*numbers: int) -> memoryview:
    return memoryview(array("Q", numbers))


def _counted(value: int, writing: bool, step: int) -> int:
    """Return *value* with one open more or less. A count at its end stays there: open for ever."""
    shift, most = (_WRITERS_SHIFT, _WRITERS_MAX) if writing else (0, _READERS_MAX)
    count = value >> shift & most
    if count == most or count + step < 0:
        return value
    value += step << shift
    is_open = value & ((1 << _BACKING_SHIFT) - 1)
    return value if is_open else value & ~_ANSWERED_CACHED


def _is_full(value: int, writing: bool) -> bool:
    shift, most = (_WRITERS_SHIFT, _WRITERS_MAX) if writing else (0, _READERS_MAX)
    return value >> shift & most == most
