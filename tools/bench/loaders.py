"""Data loaders as a file system sees them: which file is opened when, by ranks of workers each."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence

Worker = tuple[float, int, Iterator[int]]


def opens(
    order: Sequence[int],
    seed: int,
    *,
    ranks: int = 2,
    workers: int = 4,
    batch: int = 256,
    ranks_here: Sequence[int] | None = None,
) -> Iterator[int]:
    """Yield the files of *order* as they are opened, dealt as torch's DataLoader deals them.

    Each rank has every *ranks*-th file; its batches go to its workers in turns. A worker opens one
    file after the other, starts late by up to 20 files, and takes a random time for each.
    """
    generator = random.Random(seed)
    waiting: list[Worker] = []
    for rank in ranks_here if ranks_here is not None else range(ranks):
        for worker in range(workers):
            files = _files_of(order[rank::ranks], worker, workers, batch)
            waiting.append((20 * generator.random(), len(waiting), files))
    heapq.heapify(waiting)
    while waiting:
        at, number, files = heapq.heappop(waiting)
        for file in files:
            yield file
            heapq.heappush(waiting, (at + generator.expovariate(1.0), number, files))
            break


def _files_of(order: Sequence[int], worker: int, workers: int, batch: int) -> Iterator[int]:
    for start in range(worker * batch, len(order), workers * batch):
        yield from order[start : start + batch]
