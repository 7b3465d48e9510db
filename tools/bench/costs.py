"""What daemons cost while work is done: processor time and memory, from /proc (proc(5))."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_FORGET_PEAK = "5"  # For clear_refs: VmHWM begins anew.
_UTIME, _CSTIME = 11, 14  # utime, stime, cutime, cstime: fields 14 to 17, counted behind the name.
_PARENT = 1
_BLOCK_BYTES = 512  # stat(2), st_blocks.


@dataclass(frozen=True, slots=True)
class Cost:
    """*rss_bytes*: the sum of the processes' peaks. *pss_bytes*: at the end, shared pages counted once."""

    cpu_s: float = 0.0
    rss_bytes: int = 0
    pss_bytes: int = 0


class Meter:
    """Measures *pids* from its making to `cost()`. Processes that have ended count as far as was seen."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        for pid in pids:
            with contextlib.suppress(OSError):  # Not ours: then the peak is that of its whole life.
                Path(f"/proc/{pid}/clear_refs").write_text(_FORGET_PEAK)
        self._before = {pid: cpu_s(pid) for pid in pids}

    def cost(self) -> Cost:
        spent_s = sum(max(0.0, cpu_s(pid) - before) for pid, before in self._before.items())
        rss_bytes = sum(_kib(pid, "status", "VmHWM") for pid in self._pids) * 1024
        pss_bytes = sum(_kib(pid, "smaps_rollup", "Pss") for pid in self._pids) * 1024
        return Cost(spent_s, rss_bytes, pss_bytes)


def cpu_s(pid: int) -> float:
    """Return the processor time of *pid* and of the children it waited for; 0 when it has ended."""
    fields = _stat(pid)
    return sum(map(int, fields[_UTIME : _CSTIME + 1])) / _TICKS_A_SECOND if fields else 0.0


def with_descendants(pids: Iterable[int]) -> list[int]:
    """Return *pids* and all that descend from them."""
    parents = {int(name): _stat(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    found = list(pids)
    for pid in found:  # Grows on the way.
        found += [child for child, fields in parents.items() if fields and int(fields[_PARENT]) == pid]
    return found


def disk_bytes(directory: Path) -> int:
    """Return how much of the disk the files below *directory* take."""
    found = 0
    for where, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # Evicted meanwhile.
                found += os.lstat(f"{where}/{name}").st_blocks * _BLOCK_BYTES
    return found


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _kib(pid: int, file: str, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
