"""Counters in shared memory: each process adds to its own row, `totals` sums them all.

The memory is mapped before the fork. A row has one writer at a time and 64-bit stores do not
tear, so no lock is needed. A process that replaces a dead one goes on with its row.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, MutableMapping

import xxhash

NAMES = (
    "requests",  # FUSE requests of any kind.
    "opens",
    "opens_granted",  # The channel extension answered them.
    "opens_passed_through",  # Their reads go to the tier's file without a request.
    "reads",
    "lookups",
    "bytes_dram",  # READ bytes by where they were found.
    "bytes_nvme",
    "bytes_lake",  # The reader waited for the lake.
    "bytes_through",  # Passed through without being cached.
    "bytes_written",  # Into staging files.
    "waits",  # Requests that waited for the lake, and for how long in all.
    "wait_us",
    "errors",
    "corrupt_blocks",
    "pid",
    "notifier_pid",  # In the supervisor's row.
    "receives",  # 1 from the moment on when a worker may have received a request.
)
_NO_SUMS = ("pid", "notifier_pid", "receives")
_PLACE = {name: place for place, name in enumerate(NAMES)}


class WriteBudget:
    """How much all workers together may write before they have to wait, in shared memory.

    The mover sets it, the workers compare it with the sum of their `bytes_written`.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self.cell = self._cell = memoryview(self._memory).cast("Q")
        self._cell[0] = (1 << 64) - 1

    @property
    def allowed_until(self) -> int:
        """Return up to which sum of `bytes_written` nobody waits."""
        return self._cell[0]

    @allowed_until.setter
    def allowed_until(self, bytes_written: int) -> None:
        self._cell[0] = bytes_written


class Counters:
    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._memory = mmap.mmap(-1, rows * len(NAMES) * 8)
        self.cells = self._cells = memoryview(self._memory).cast("Q")

    def row(self, number: int) -> CounterRow:
        start = number * len(NAMES)
        return CounterRow(self._cells[start : start + len(NAMES)])

    def totals(self) -> dict[str, int]:
        width = len(NAMES)
        cells = self._cells.tolist()
        return {name: sum(cells[place::width]) for name, place in _PLACE.items() if name not in _NO_SUMS}

    def places(self, row: int, *names: str) -> tuple[int, ...]:
        """Return the width of a row, where *row* begins in `cells`, and where *names* are in each row."""
        return len(NAMES), row * len(NAMES), *(_PLACE[name] for name in names)

    def total(self, name: str) -> int:
        """Return the sum of one counter: cheaper than all `totals`."""
        return sum(self._cells[_PLACE[name] :: len(NAMES)])

    def pids(self) -> list[int]:
        """Return the pid in each row; 0 where no process has written it."""
        return self._cells.tolist()[_PLACE["pid"] :: len(NAMES)]


class CounterRow:
    def __init__(self, cells: memoryview[int]) -> None:
        self._cells = cells

    def add(self, name: str, amount: int = 1) -> None:
        self._cells[_PLACE[name]] += amount

    def set(self, name: str, value: int) -> None:
        self._cells[_PLACE[name]] = value

    def get(self, name: str) -> int:
        return self._cells[_PLACE[name]]


class Features(MutableMapping[str, dict[str, object]]):
    """What the mount can do and why: name -> {"on": bool, "reason": str}, in shared memory.

    The supervisor writes it, the mover shows it, and some is known only once the mover runs.
    """

    BYTES_MAX = 1 << 14

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.BYTES_MAX)

    def _all(self) -> dict[str, dict[str, object]]:
        packed = self._memory[:].rstrip(b"\0")
        return dict(json.loads(packed)) if packed else {}

    def _store(self, features: dict[str, dict[str, object]]) -> None:
        packed = json.dumps(features).encode()
        self._memory[:] = packed.ljust(self.BYTES_MAX, b"\0")

    def __getitem__(self, name: str) -> dict[str, object]:
        return self._all()[name]

    def __setitem__(self, name: str, feature: dict[str, object]) -> None:
        self._store({**self._all(), name: feature})

    def __delitem__(self, name: str) -> None:
        self._store({key: feature for key, feature in self._all().items() if key != name})

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


class ShownDirectories:
    """Which state of each directory the kernel has cached, for all workers, in shared memory.

    One cell for each of CELLS hashes of inodes: two directories that share one push each other
    out, and are then sent to the kernel again.
    """

    CELLS = 1 << 16

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.CELLS * 8)
        self._cells = memoryview(self._memory).cast("Q")

    def note(self, inode: int, changed_at_ns: int) -> None:
        """The kernel is being sent the entries as they are since *changed_at_ns*."""
        self._cells[inode % self.CELLS] = self._mark(inode, changed_at_ns)

    def has(self, inode: int, changed_at_ns: int) -> bool:
        return self._cells[inode % self.CELLS] == self._mark(inode, changed_at_ns)

    @staticmethod
    def _mark(inode: int, changed_at_ns: int) -> int:
        return xxhash.xxh3_64_intdigest(struct.pack("<QQ", inode, changed_at_ns))
