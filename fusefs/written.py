"""Files that this worker makes and that are written to: the channel answers for them until they are closed.

Of files that it did not make, or that are opened again, it answers the WRITEs. See written.c: it knows of
each the staging file and what the node says of owner and mode, and believes that for as long as the node's
generation stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable

from cache.counters import Counters, WriteBudget
from cache.model import Inode
from cache.opens import LAYOUT, OpenTable
from cache.staging import StagingFiles
from fusefs import channel
from fusefs.namespace import ATTRIBUTE_TTL_S, Entry, Namespace


class WrittenFiles:
    """One in a process: the channel has one table of them. Needs the extension.

    *row*: of *counters*, this process's. *answers_cached*: opens are answered in one of two modes, and
    that of a new file is the cached one. *closed* gets each inode that nobody writes to any more.
    """

    def __init__(
        self,
        namespace: Namespace,
        staging: StagingFiles,
        opens: OpenTable,
        counters: Counters,
        row: int,
        budget: WriteBudget,
        closed: Callable[[int], None],
        *,
        answers_cached: bool,
    ) -> None:
        self._namespace = namespace
        self._staging = staging
        self._generations = opens.generations
        self._answers_cached = answers_cached
        self._extension = channel.module()
        self._extension.set_up_counted(opens.cells, opens.fd, opens.is_held, LAYOUT)
        self._extension.set_up_written(
            self._generations.cells,
            counters.cells,
            counters.places(row, "requests", "bytes_written"),
            budget.cell,
            int(ATTRIBUTE_TTL_S),
            closed,
        )

    def made(self, inode: Inode, request: int) -> bytes | None:
        """Count the first open of a file that was just made; return the body of CREATE's reply.

        None, with nothing done, where the usual way is to be gone. *request*: its number.
        """
        generation = self._generations.of(inode)  # Before the node is read.
        entry = self._namespace.own_entry(inode)
        return None if entry is None else self._noted(entry, generation, request)

    def _noted(self, entry: Entry, generation: tuple[int, int], request: int) -> bytes | None:
        node, own = entry.node, entry.node.attributes
        if not node.staged or own is None:
            return None
        reply: bytes | None = self._extension.made(
            entry.inode,
            request,
            self._staging.path(node.staged),
            own.mode,
            own.uid,
            own.gid,
            own.ctime_ns,
            generation,
            self._answers_cached,
            entry.valid_s,
        )
        return reply

    def written_to(self, inode: Inode) -> None:
        """Have the channel answer further WRITEs of a file that has a staging file and a writer."""
        generation = self._generations.of(inode)  # Before the node is read.
        node = self._namespace.node(inode)
        if node is not None and node.staged:
            self._extension.written_to(inode, self._staging.path(node.staged), generation)

    def drop_closed(self) -> None:
        """Give the space of files free that another worker has closed. To be called every so often."""
        self._extension.drop_closed()
