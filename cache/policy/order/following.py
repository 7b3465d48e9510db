"""What comes next in a known order, whoever reads it with how many ranks and workers.

Readers of one epoch are a number of heads that move along the order, each a batch ahead of another.
A place is due the sooner the closer it lies behind a place that was opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cache.policy.order.listings import NOWHERE
from cache.policy.order.samplers import Places

GRACE_TOLD = 256  # Opens before an order that was told is doubted: every worker starts somewhere.
_JUDGED = 32  # The last so many opens decide whether the order holds.
_EXPECTED_MIN = 12  # Of those. A wrong order has some 6 by chance, a right one 28.
_CHANCE = 10  # An open is within reach of a recent one by chance once in 1 / (2 * _CHANCE) * 4.
_FITTING_MIN = 64  # Fewer opens than these fit any order.
_READ_SHARE = 0.9  # An order of which so much is read is over.
_GAP_MAX = 1 << 16
_LOOK_SHARE = (
    8  # Looking for what is read here takes the longer the more was read: it is made ever less often.
)
_PERIOD_ROWS = 16  # So often must a part of the order have been left out for us to call it another's.
_PERIODS = sorted({factor << power for factor in (1, 3, 5, 7) for power in range(12)} - {1})


class Following:
    """One epoch's order and how far it has been read. Files are told by number."""

    def __init__(
        self, files: Places, files_all: int, *, opened: Iterable[int] = (), grace: int = GRACE_TOLD
    ) -> None:
        """*files*: in the order in which they are read, out of *files_all*. *opened*: so far.

        A file that comes twice (as DistributedSampler pads its ranks) counts where it comes first.
        """
        self._files = files
        self._position_of = np.full(files_all, NOWHERE, np.uint32)
        self._position_of[files[::-1]] = np.arange(len(files) - 1, -1, -1, dtype=np.uint32)
        self._window = min(1024, max(32, len(files) // 256))
        self._reach = max(1, len(files) // _CHANCE // self._window)
        self._opened_at = np.zeros(len(files), np.uint32)  # By position: number of the open, or 0.
        self._recent = np.zeros(self._window, np.uint32)  # Positions of the last opens, in a ring.
        self._opens = 0
        self._passed = 0  # Positions before this one will not be read any more.
        self._ours: NDArray[np.bool_] | None = None  # By position modulo its length: read here.
        self._look_at = 0  # With so many opens it is looked for again.
        self._verdicts = (1 << _JUDGED) - 1  # A bit for each of the last opens: was it expected.
        self._grace = grace
        self._doubted_from = grace
        self.catch_up(opened)

    @property
    def holds(self) -> bool:
        """Return whether what is opened still is what the order says."""
        return self._verdicts.bit_count() >= _EXPECTED_MIN

    @property
    def is_confirmed(self) -> bool:
        """Return whether enough opens were judged, and spoke for the order."""
        return self.holds and self._opens >= self._doubted_from + _JUDGED

    @property
    def opens(self) -> int:
        """Return how many of the order's files have been opened."""
        return self._opens

    def __len__(self) -> int:
        return len(self._files)

    def note_open(self, file: int) -> None:
        """A reader opened *file*. Files that are not in the order speak against it."""
        position = int(self._position_of[file])
        if position != NOWHERE and self._opened_at[position]:
            return
        if self._opens >= self._doubted_from:
            self._verdicts = (self._verdicts << 1 | self._is_expected(position)) & ((1 << _JUDGED) - 1)
        self._note(position)

    def catch_up(self, files: Iterable[int]) -> None:
        """Note what was opened before, in whatever order: the order is not judged by these."""
        positions = self._position_of[np.fromiter(files, np.int64)]
        positions = positions[positions != NOWHERE]
        positions = positions[self._opened_at[positions] == 0]
        positions = positions[np.sort(np.unique(positions, return_index=True)[1])]  # Each once.
        before, self._opens = self._opens, self._opens + len(positions)
        numbers = np.arange(before + 1, self._opens + 1)
        self._opened_at[positions] = numbers
        self._recent[numbers[-self._window :] % self._window] = positions[-self._window :]
        if self._ours is None and before // self._window != self._opens // self._window:
            self._ours = self._find_ours()
        self._doubted_from = max(self._opens, self._grace)

    def fits(self, files: Sequence[int]) -> bool:
        """Return whether *files*, all that was opened in an epoch so far, may be the part of it that is read.

        Its readers leave no holes but where each of them is now: the same step lies between most positions,
        1, or the number of ranks. Of another epoch's files most are chance.
        """
        positions = self._position_of[np.asarray(files, np.int64)]
        positions = positions[positions != NOWHERE]
        share = len(positions) / len(self._files)
        if share >= _READ_SHARE:
            return False
        if len(files) < _FITTING_MIN:
            return True
        if 2 * len(positions) < len(files):
            return False
        steps = np.bincount(np.minimum(np.diff(np.sort(positions).astype(np.int64)), _GAP_MAX))
        return bool(steps.max() >= (1 + share) / 2 * (len(positions) - 1))

    def upcoming(
        self, limit: int, wanted: NDArray[np.bool_] | None = None, within: int | None = None
    ) -> list[int]:
        """Return the next *limit* files that are not opened nor passed by, soonest first.

        *wanted*: by file, whether it may be returned; those that are resident need not be. *within*:
        no further than so many positions behind one that was opened.
        """
        self._pass_by()
        start, top = self._passed, self._top()
        for stop in self._stops(limit, top, within):
            positions = np.arange(start, stop)
            due = self._opened_at[start:stop] == 0
            last_opened = np.maximum.accumulate(np.where(due, start - 1, positions))
            if wanted is not None:
                due &= wanted[self._files[start:stop]]
            if self._ours is not None:
                due &= self._ours[positions % len(self._ours)]
            if np.count_nonzero(due[top + 1 - start :]) >= limit:
                break
        behind = (positions - last_opened)[due]
        soonest = np.argsort(behind, kind="stable")[:limit]
        if within is not None:
            soonest = soonest[behind[soonest] <= within]
        files: list[int] = self._files[positions[due][soonest]].tolist()
        return files

    def _stops(self, limit: int, top: int, within: int | None) -> Iterator[int]:
        """Yield up to where to look: ever further, the end of what may be looked at last."""
        last = len(self._files) if within is None else min(len(self._files), top + 1 + within)
        stretch = limit + (0 if self._ours is None else len(self._ours))
        while (stop := top + 1 + stretch) < last:
            yield stop
            stretch *= 4
        yield last

    @property
    def spread(self) -> int:
        """Return how many positions lie between the slowest and the fastest reader."""
        return self._top() + 1 - self._passed

    def still_due(self, files: Iterable[int]) -> set[int]:
        """Return those of *files* that will be read: not opened, not passed by, not another's."""
        return {file for file in files if self._is_due(int(self._position_of[file]))}

    def due_at(self, file: int) -> int | None:
        """Return the file's place in the order if it will still be read: what comes last may leave first."""
        position = int(self._position_of[file])
        return position if self._is_due(position) else None

    def share_here(self) -> float:
        """Return which part of the order is read through this mount: less than 1 with ranks elsewhere."""
        return 1.0 if self._ours is None else float(self._ours.mean())

    def then(self, files: Places, grace: int) -> Following:
        """Return a Following of the next epoch's order, with what is known of the ranks."""
        following = Following(files, len(self._position_of), grace=grace)
        following.take_over(self)
        return following

    def take_over(self, previous: Following) -> None:
        """Take over what *previous*, of the epoch before, knows of the ranks by now."""
        self._ours = previous._ours

    def _note(self, position: int) -> None:
        if position == NOWHERE or self._opened_at[position]:
            return
        self._opens += 1
        self._opened_at[position] = self._opens
        self._recent[self._opens % self._window] = position
        if self._opens % self._window == 0 and self._ours is None and self._opens >= self._look_at:
            self._ours = self._find_ours()
            self._look_at = self._opens + self._opens // _LOOK_SHARE

    def _is_due(self, position: int) -> bool:
        if position == NOWHERE or position < self._passed or self._opened_at[position]:
            return False
        return self._ours is None or bool(self._ours[position % len(self._ours)])

    def _is_expected(self, position: int) -> bool:
        if position == NOWHERE:
            return False
        around = self._opened_at[max(0, position - self._reach) : position + self._reach + 1]
        return int(around.max()) > max(0, self._opens - self._window)

    def _top(self) -> int:
        """Return the highest position that was opened lately, or -1."""
        if self._opens == 0:
            return -1
        return int(self._last_positions().max())

    def _last_positions(self) -> NDArray[np.uint32]:
        return self._recent if self._opens >= self._window else self._recent[1 : self._opens + 1]

    def _pass_by(self) -> None:
        """Give up what lies behind all recent opens: hits are not always seen."""
        if self._opens >= self._window:
            self._passed = max(self._passed, int(self._recent.min()) - self._reach)

    def _find_ours(self) -> NDArray[np.bool_] | None:
        """Return which positions, modulo a period, are read here if whole parts never are.

        With ranks on other machines: of DistributedSampler's turns the period is the world size, of
        accelerate's turns of batches the batch size times that.
        """
        self._pass_by()
        for period in _PERIODS:
            rows = self._passed // period
            if rows < _PERIOD_ROWS:
                return None
            opened = self._opened_at[: rows * period].reshape(rows, period) != 0
            seen: NDArray[np.bool_] = opened.any(axis=0)
            if seen.any() and not seen.all() and opened[:, seen].mean() > 0.75:
                return seen
        return None
