"""Sequential read-ahead within one file: which bytes to fetch next, from the reads seen.

One `Stream` for each place where somebody reads on. The kernel sends its reads slightly out
of order and several readers may share a file, so a read belongs to the stream whose frontier
lies within SLACK_BYTES of it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from cache.model import GROUP_BYTES, MIB

SLACK_BYTES = 4 * MIB  # Hits are told about every 2 MiB only, see `Filesystem`.


@dataclass(slots=True)
class Stream:
    """*frontier*: end of what was read. *fetched*: end of what was asked for ahead."""

    frontier: int
    fetched: int
    window_bytes: int
    reads: int = 1


@dataclass(slots=True)
class FileStreams:
    """The streams of one open file, most recent last."""

    streams: OrderedDict[int, Stream] = field(default_factory=OrderedDict)
    serial: int = 0


class SequentialReadAhead:
    """Windows start at one group, double while readers stall, and end at *window_bytes_max*."""

    STREAMS_MAX = 8  # A file.
    FILES_MAX = 1024

    def __init__(self, window_bytes_max: int) -> None:
        self._window_bytes_max = max(GROUP_BYTES, window_bytes_max)
        self._files: OrderedDict[bytes, FileStreams] = OrderedDict()

    def read(
        self,
        vid: bytes,
        offset: int,
        length: int,
        size_bytes: int,
        *,
        stalled: bool,
        goes_on: bool = False,
    ) -> range | None:
        """Note a read; return the bytes to fetch ahead now, as a range, or None.

        *stalled*: the reader has to wait for the lake. *goes_on*: it is known to read on from where
        somebody read, also where no stream is.
        """
        streams = self._files.setdefault(vid, FileStreams())
        self._files.move_to_end(vid)
        if len(self._files) > self.FILES_MAX:
            self._files.popitem(last=False)
        stream = self._match(streams, offset)
        end = offset + length
        if stream is None:
            streams.serial += 1
            streams.streams[streams.serial] = Stream(frontier=end, fetched=end, window_bytes=GROUP_BYTES)
            if len(streams.streams) > self.STREAMS_MAX:
                streams.streams.popitem(last=False)
            # The start of a file is read on more often than not.
            goes_on = goes_on or offset == 0
            return self._advance(streams.streams[streams.serial], size_bytes) if goes_on else None
        stream.reads += 1
        stream.frontier = max(stream.frontier, end)
        stream.fetched = max(stream.fetched, stream.frontier)
        if stalled:
            stream.window_bytes = min(2 * stream.window_bytes, self._window_bytes_max)
        return self._advance(stream, size_bytes)

    def forget(self, vid: bytes) -> None:
        self._files.pop(vid, None)

    def _match(self, streams: FileStreams, offset: int) -> Stream | None:
        for number in reversed(streams.streams):
            stream = streams.streams[number]
            if -SLACK_BYTES <= offset - stream.frontier <= SLACK_BYTES:
                streams.streams.move_to_end(number)
                return stream
        return None

    def _advance(self, stream: Stream, size_bytes: int) -> range | None:
        """Fetch on whenever a whole group of the window has been read.

        In larger steps the lake would have nothing to do while the reader goes through what came, and the
        reader would wait for all of the next step: its groups share the bandwidth and end together.
        """
        if stream.fetched >= size_bytes:
            return None
        end = -(-(stream.frontier + stream.window_bytes) // GROUP_BYTES) * GROUP_BYTES
        start, end = stream.fetched, min(end, size_bytes)
        if end <= start:
            return None
        stream.fetched = end
        return range(start, end)
