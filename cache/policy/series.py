"""Which files are checkpoints of one series, and which of them are not its latest.

Told by paths alone. The numbers behind words like "step" and "epoch" count; all else in the path names
the series: so the shards of one checkpoint, and the runs of a sweep, are none of each other's.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import NamedTuple

_STEP = re.compile(
    rb"((?:^|[^a-z])(?:global_?step|steps?|epochs?|iter(?:ation)?s?|ckpt|checkpoint|snapshot|update)[-_=.]*)"
    rb"([0-9]+)",
    re.IGNORECASE,
)
_SERIES_MAX = 1024  # Of some hundred bytes each.

Steps = tuple[int, ...]


class _Checkpoint(NamedTuple):
    """In the order of their writing."""

    written_ns: int
    steps: Steps
    vid: bytes


def series_of(path: bytes) -> tuple[bytes, Steps] | None:
    """Return what all checkpoints of the series have in common, and the numbers in which they differ.

    The greater numbers are the later checkpoint's. None where nothing says that the file is a checkpoint.
    """
    steps = tuple(int(number) for _, number in _STEP.findall(path))
    return (_STEP.sub(rb"\1#", path), steps) if steps else None


class Checkpoints:
    """The latest checkpoint of each series; what was not heard of for longest is forgotten."""

    def __init__(self) -> None:
        self._latest: OrderedDict[bytes, _Checkpoint] = OrderedDict()
        self._series: dict[bytes, bytes] = {}  # Of the versions in _latest.

    def stored(self, path: bytes, vid: bytes, written_ns: int) -> bytes | None:
        """Take note of a file; return the version that is outdated now, None if there is none.

        It is the file's own if a later one was stored before it. What was written earlier but has the
        greater number is of a training that began anew, and not outdated. A file that was noted by
        another name, a temporary one, has only this one now.
        """
        found = series_of(path)
        series, steps = found if found is not None else (b"", ())
        if self._series.get(vid, series) != series:
            self._take(self._series[vid])
        if found is None:
            return None
        known, new = self._take(series), _Checkpoint(written_ns, steps, vid)
        if known is None or known.vid == vid:
            self._put(series, new)
            return None
        self._put(series, max(known, new))
        earlier, later = sorted((known, new))
        return earlier.vid if earlier.steps < later.steps else None

    def _take(self, series: bytes) -> _Checkpoint | None:
        known = self._latest.pop(series, None)
        if known is not None:
            del self._series[known.vid]
        return known

    def _put(self, series: bytes, checkpoint: _Checkpoint) -> None:
        self._latest[series] = checkpoint
        self._series[checkpoint.vid] = series
        if len(self._latest) > _SERIES_MAX:
            self._take(next(iter(self._latest)))
        assert len(self._series) == len(self._latest)
