"""How much memory processes have for themselves, from /proc/PID/smaps_rollup (proc_pid_smaps(5))."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True)
class Memory:
    """*private_bytes*: pages that no other process maps, pages of mapped files (LMDB's) included.
    *anonymous_bytes*: those of no file, the heap above all; shared ones after a fork included."""

    private_bytes: int = 0
    anonymous_bytes: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.private_bytes + other.private_bytes, self.anonymous_bytes + other.anonymous_bytes)


def of_process(pid: int) -> Memory:
    """Return the memory of *pid*; none when it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return Memory()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    private = kib["Private_Clean"] + kib["Private_Dirty"] + kib.get("Private_Hugetlb", 0)
    return Memory(private * 1024, kib["Anonymous"] * 1024)


def of_processes(pids: Iterable[int]) -> Memory:
    return sum(map(of_process, pids), Memory())


class PeakSampler:
    """Keeps the peaks of the memory of the processes that *pids* names, while the block runs."""

    def __init__(self, pids: Callable[[], Iterable[int]], interval_s: float = 0.05) -> None:
        self._pids = pids
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.private_bytes_max = 0
        self.anonymous_bytes_max = 0
        self.samples = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            memory = of_processes(self._pids())
            self.private_bytes_max = max(self.private_bytes_max, memory.private_bytes)
            self.anonymous_bytes_max = max(self.anonymous_bytes_max, memory.anonymous_bytes)
            self.samples += 1
            if self._ended.wait(self._interval_s):
                return
