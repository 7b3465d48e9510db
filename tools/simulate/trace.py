"""A recorded trace, as a file: lines of JSON.

  {"sluice_trace": 1, "mountpoint": "/data", "started_s": 1700000000.0}
  [12.5, "8f3a…", 112640]          milliseconds since the start, item, bytes
  {"end": 123456}                  how many uses the file holds: it is not cut off

An item is what a cache keeps or drops as one: a file, or 8 MiB of a file larger than that.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from cache.errors import UsageError

VERSION = 1
USES_MAX = 50_000_000
LINE_CHARACTERS_MAX = 4096


@dataclass(slots=True)
class Trace:
    """The uses in order: item numbers and milliseconds. *sizes_bytes*: of each item, as last seen."""

    items: array[int] = field(default_factory=lambda: array("I"))
    at_ms: array[float] = field(default_factory=lambda: array("d"))
    sizes_bytes: list[int] = field(default_factory=list)
    skipped: int = 0  # Lines that are no uses.
    is_cut_off: bool = False

    def __len__(self) -> int:
        return len(self.items)

    @property
    def distinct_bytes(self) -> int:
        return sum(self.sizes_bytes)


class TraceWriter:
    """Writes a trace to *file*, which stays the caller's to close."""

    def __init__(self, file: TextIO, mountpoint: str, started_s: float) -> None:
        self._file = file
        self.uses = 0
        self._line({"sluice_trace": VERSION, "mountpoint": mountpoint, "started_s": started_s})
        file.flush()

    def add(self, uses: Iterable[tuple[float, str, int]]) -> None:
        for use in uses:
            self._line(use)
            self.uses += 1
        self._file.flush()  # A recording that is killed leaves what it had.

    def finish(self) -> None:
        self._line({"end": self.uses})

    def _line(self, value: Any) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")


def read_trace(path: str) -> Trace:
    """Return what can be used of the file. Raises UsageError, with one line, when that is nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = _lines(file)
            _check_head(next(lines, ""), path)
            trace = _read_uses(lines)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if not len(trace):
        raise UsageError(f"{path}: the trace holds no uses; record one with `sluice trace`")
    return trace


def _lines(file: TextIO) -> Iterator[str]:
    """Yield lines in pieces of bounded length: a file of rubbish may be one line."""
    while line := file.readline(LINE_CHARACTERS_MAX):
        yield line


def _check_head(line: str, path: str) -> None:
    head = _parsed(line)
    if not isinstance(head, dict) or "sluice_trace" not in head:
        raise UsageError(f"{path}: not a trace; record one with `sluice trace`")
    if head["sluice_trace"] != VERSION:
        raise UsageError(
            f"{path}: a trace of version {head['sluice_trace']}, this reads version {VERSION}; record it anew"
        )


def _read_uses(lines: Iterator[str]) -> Trace:
    trace, numbers, end = Trace(), dict[str, int](), None
    for line in lines:
        match _parsed(line):
            case [int() | float() as at_ms, str(item), int(size_bytes)] if size_bytes >= 0:
                number = numbers.setdefault(item, len(numbers))
                if number == len(trace.sizes_bytes):
                    trace.sizes_bytes.append(size_bytes)
                trace.sizes_bytes[number] = size_bytes
                trace.items.append(number)
                trace.at_ms.append(at_ms)
            case {"end": int(uses)}:
                end = uses
            case _:
                trace.skipped += 1
        if len(trace) >= USES_MAX:
            break
    trace.is_cut_off = end is None or end > len(trace) + trace.skipped
    return trace


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
