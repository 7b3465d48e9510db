"""Read amplification: bytes fetched over bytes read, of each large file."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """*fetched_bytes*: from the lake, for whatever reason. *read_bytes*: of the READs that came to us.

    What the page cache answers, and what the kernel reads in passthrough, is in neither: a file that
    is read there again and again is better than it looks here. What the kernel reads ahead counts as read.
    """

    fetched_bytes: int = 0
    read_bytes: int = 0

    @property
    def amplification(self) -> float | None:
        return self.fetched_bytes / self.read_bytes if self.read_bytes else None

    def add(self, other: Traffic) -> None:
        self.fetched_bytes += other.fetched_bytes
        self.read_bytes += other.read_bytes


class Amplification:
    """Since the mover's start, of the last FILES_MAX object versions that anything was known of."""

    FILES_MAX = 4096

    def __init__(self) -> None:
        self._files: OrderedDict[bytes, Traffic] = OrderedDict()

    def fetched(self, vid: bytes, size_bytes: int) -> None:
        self._file(vid).fetched_bytes += size_bytes

    def read(self, vid: bytes, size_bytes: int) -> None:
        self._file(vid).read_bytes += size_bytes

    def of(self, vid: bytes) -> Traffic | None:
        return self._files.get(vid)

    def _file(self, vid: bytes) -> Traffic:
        traffic = self._files.setdefault(vid, Traffic())
        self._files.move_to_end(vid)
        if len(self._files) > self.FILES_MAX:
            self._files.popitem(last=False)
        return traffic
