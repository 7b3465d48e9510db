"""Which state of each node of the index is the latest, for all processes of a mount, in shared memory.

What a process remembers of a node it may go on believing for as long as the node's generation is the
one that it took before it read the node. The mover, which alone writes the index, changes it once
the transaction is committed and before anybody hears that it is. A mover that dies in between has
told nobody; the next one begins a new epoch, and all generations with it.

Nodes that share a cell share their generation: what is remembered of one is read again when the other
changes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable


class Generations:
    """Make it before the fork. The mover alone writes, and 64-bit stores do not tear: no lock is needed."""

    CELLS = 1 << 16

    def __init__(self) -> None:
        self.cells = memoryview(mmap.mmap(-1, 8 * (self.CELLS + 1))).cast("Q")  # The last is the epoch.

    def of(self, inode: int) -> tuple[int, int]:
        """Return the node's generation. To be asked before the node is read."""
        return self.cells[inode % self.CELLS], self.cells[self.CELLS]

    def changed(self, inodes: Iterable[int]) -> None:
        """These nodes are others, or gone, as of the transaction that was just committed."""
        cells = self.cells
        for inode in inodes:
            cells[inode % self.CELLS] += 1

    def begin(self) -> None:
        """Begin an epoch: a mover's first step after it has looked the index over."""
        self.cells[self.CELLS] += 1
