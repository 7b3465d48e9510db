"""How a large file is read: on and on, or in records here and there; and what to fetch for each read.

HDF5, Arrow, Parquet, memory-mapped tokens and uncompressed zip files are read in records: runs of
adjacent reads, short ones, each somewhere else. Of such a file only the records are worth fetching,
until what the requests have cost so far is as much as the rest of the file would cost in one go.

The kernel sends a read(2) at random as one READ of whole pages. A page fault is one READ of its
read-ahead size around the page, and after a hundred faults that lay apart, one of 4 KiB. Python's
buffered files read the end of a record by itself, which the kernel takes for reading on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum

from cache.model import GROUP_BYTES, MIB

# A request waits 20 ms; at 85 MB/s a connection, 1.7 MB could come in that time. Several are under way.
REQUEST_BYTES = MIB
_RUNS_MAX = 24  # That may still go on.
_OVER_AFTER = 8  # Newer runs, and a run that nobody went on with is over.
_EVIDENCE = 8  # Runs that are over, before a file is said to be read at random,
_LENGTHS_MAX = 32  # and how many of the last ones are looked at.
_RANDOM_SHARE = 0.75
_RECORD_BYTES_MAX = 4 * MIB  # What is longer is a stream, if a short one.
_STREAM_BYTES_MIN = MIB
_STREAM_RECORDS_MIN = 4  # A run of so many records is no record.
_ALIKE_MIN = 2  # Files of a family that were read in records, before the next one is taken for such,
_ALIKE_MAX = 4  # and how many of the last ones are looked at.
_PASS_BYTES = 4 * MIB  # Read on from a file's start for so long, a reader goes through all of it.


class Access(Enum):
    """How a file is read. The values are shown by `sluice ls --json`."""

    FEW = "too few reads"
    RANDOM = "random records"
    STREAM = "read on"


@dataclass(frozen=True, slots=True)
class Want:
    """What to fetch for a read: *demand*, in bytes, from which the reader waits for a part.

    *is_exact*: no more than that; else the usual unit. *may_stream*: the read may be one of a stream.
    """

    demand: range
    is_exact: bool
    may_stream: bool


@dataclass(slots=True)
class _Run:
    """Adjacent reads: bytes *start* to *end*. *serial*: how many runs had begun when it last grew."""

    start: int
    end: int
    serial: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(slots=True)
class FileReads:
    """What is known of one large file."""

    runs: deque[_Run] = field(default_factory=deque)  # The one that grew last comes last.
    serial: int = 0
    lengths: deque[int] = field(default_factory=lambda: deque(maxlen=_LENGTHS_MAX))  # Of runs that are over.
    paid_bytes: int = 0  # Fetched since it was empty, with what the requests cost.
    is_told: bool = False  # That a pass began, or that it is read at random.
    is_alike: bool = False  # Its family knows how it is read.

    @property
    def access(self) -> Access:
        if len(self.lengths) >= _EVIDENCE:
            short = sum(length <= _RECORD_BYTES_MAX for length in self.lengths)
            if short >= _RANDOM_SHARE * len(self.lengths):
                return Access.RANDOM
        is_stream = any(run.length > _STREAM_BYTES_MIN for run in self.runs)
        return Access.STREAM if is_stream else Access.FEW

    @property
    def record_bytes(self) -> int:
        """Return the size that three of four records have at least; 0 while too little is known."""
        if len(self.lengths) < _EVIDENCE:
            return 0
        return sorted(self.lengths)[len(self.lengths) // 4]

    def note(self, offset: int, length: int) -> _Run:
        """Note a read; return the run that it belongs to."""
        if offset == 0 and any(run.start == 0 and run.end >= _PASS_BYTES for run in self.runs):
            self.runs.clear()  # Another pass.
            self.is_told = False
        run = self._joined(offset, offset + length)
        if run is None:
            self.serial += 1
            run = _Run(offset, offset + length, self.serial)
        run.serial = self.serial
        self.runs.append(run)
        while len(self.runs) > _RUNS_MAX or self.serial - self.runs[0].serial > _OVER_AFTER:
            self.lengths.append(self.runs.popleft().length)
        return run

    def _joined(self, start: int, end: int) -> _Run | None:
        """Take out the runs that the read touches, as one that holds it as well; None: it touches none."""
        touched = [run for run in self.runs if run.start <= end and start <= run.end]
        if not touched:
            return None
        for run in touched:
            self.runs.remove(run)
        joined = touched[0]
        joined.start = min(start, *(run.start for run in touched), start)
        joined.end = max(end, *(run.end for run in touched), end)
        return joined


class RecordReads:
    """Holds the last FILES_MAX large files that were read, and of FAMILIES_MAX families how theirs were."""

    FILES_MAX = 1024
    FAMILIES_MAX = 256

    def __init__(self) -> None:
        self._files: OrderedDict[bytes, FileReads] = OrderedDict()
        # The sizes of the records of the last files of each that were judged; 0: they were read on.
        self._families: OrderedDict[str, deque[int]] = OrderedDict()

    def take_use(self, vid: bytes) -> Access | None:
        """Return once for each pass over the file that it is one, or once that it is read at random."""
        reads = self._files.get(vid)
        if reads is None or reads.is_told:
            return None
        access = reads.access
        passes = any(run.start == 0 and run.end >= _PASS_BYTES for run in reads.runs)
        reads.is_told = passes or access is Access.RANDOM
        return access if reads.is_told else None

    def read(self, vid: bytes, offset: int, length: int, size_bytes: int, family: str = "") -> Want:
        """Note a read of a file of *size_bytes*; return what to fetch if a part of it is missing.

        *family*: the files of one are read alike, as those of one directory are.
        """
        if vid not in self._files:
            self._file(vid).lengths.extend(self._expected_lengths(family))
        reads = self._file(vid)
        run = reads.note(offset, length)
        self._note_family(family, reads, run)
        end = min(offset + length, size_bytes)
        if reads.access is not Access.RANDOM or _is_stream(run, reads.record_bytes):
            is_start = offset == 0 and reads.serial <= 1
            return Want(range(offset, end), False, is_start or run.length > length)
        if run.length <= max(length, reads.record_bytes):
            record_end = run.start + reads.record_bytes
        else:  # Longer than most: the more of it was read, the more is expected.
            record_end = offset + min(run.length, _STREAM_BYTES_MIN)
        return Want(range(offset, min(max(end, record_end), size_bytes)), True, False)

    def fetched(self, vid: bytes, size_bytes: int) -> None:
        """A request for so many bytes of the file was sent."""
        self._file(vid).paid_bytes += size_bytes + REQUEST_BYTES

    def is_whole_cheaper(self, vid: bytes, rest_bytes: int) -> bool:
        """Return whether to fetch the *rest_bytes* that are missing: as much was paid already.

        So, whatever is read then, no more than twice the least possible is paid: nobody knows how
        long a reader goes on (the ski rental problem).
        """
        reads = self._files.get(vid)
        rest_requests = -(-rest_bytes // GROUP_BYTES)
        return reads is not None and reads.paid_bytes >= rest_bytes + rest_requests * REQUEST_BYTES

    def emptied(self, vid: bytes) -> None:
        """What was paid for the file is lost: it does not fit, or it left."""
        if (reads := self._files.get(vid)) is not None:
            reads.paid_bytes = 0

    def access(self, vid: bytes) -> Access:
        reads = self._files.get(vid)
        return Access.FEW if reads is None else reads.access

    def record_bytes(self, vid: bytes) -> int:
        reads = self._files.get(vid)
        return 0 if reads is None or reads.access is not Access.RANDOM else reads.record_bytes

    def _expected_lengths(self, family: str) -> list[int]:
        """Return what a file's runs are taken to be before it was read, one for each that is evidence."""
        alike = self._families.get(family, ())
        if len(alike) < _ALIKE_MIN or not all(alike):
            return []
        return [min(alike)] * _EVIDENCE

    def _note_family(self, family: str, reads: FileReads, run: _Run) -> None:
        """Judge a file for its family, once, by its own reads alone."""
        is_stream = _is_stream(run, reads.record_bytes)
        # With fewer runs, some that are over may be those that it was given by its family.
        is_random = reads.access is Access.RANDOM and reads.serial > _OVER_AFTER + _EVIDENCE
        if reads.is_alike or not (is_stream or is_random):
            return
        reads.is_alike = True
        alike = self._families.setdefault(family, deque(maxlen=_ALIKE_MAX))
        alike.append(0 if is_stream else reads.record_bytes)
        self._families.move_to_end(family)
        if len(self._families) > self.FAMILIES_MAX:
            self._families.popitem(last=False)

    def _file(self, vid: bytes) -> FileReads:
        reads = self._files.setdefault(vid, FileReads())
        self._files.move_to_end(vid)
        if len(self._files) > self.FILES_MAX:
            self._files.popitem(last=False)
        return reads


def _is_stream(run: _Run, record_bytes: int) -> bool:
    return run.length > max(_STREAM_BYTES_MIN, _STREAM_RECORDS_MIN * record_bytes)
