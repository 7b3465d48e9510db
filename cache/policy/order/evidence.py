"""How much the files opened so far say for an order: the same test for every kind of it.

Under the right order opens fall on its first places, in runs: each loader worker reads on where it
is. Under a wrong one they fall anywhere. So count the opens that lie among the first M places and
have another open within a few places, and ask how likely so many are by chance.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cache.policy.order.samplers import Places

_SPANS = (64, 256, 1024, 4096, 16384, 65536)  # M: loader workers interleave whole batches.
_REACHES = (1, 2, 4, 16)  # Ranks interleave, too: the next place of a worker is that many on.


def surprise(leading: Places, opened: NDArray[np.bool_], count: int, share_min: float) -> float:
    """Return how surprising the opens are if *leading* were not the order: minus ln of a probability.

    *opened* says for each place of the listing whether it is one of the *count* opens. Zero when
    they do not speak for the order, or less than *share_min* of them do.
    """
    n, best = len(opened), 0.0
    hits = np.flatnonzero(opened[leading])
    if len(hits) < share_min * count:
        return 0.0
    gaps = np.diff(hits, prepend=-n, append=len(leading) + n)
    nearest = np.minimum(gaps[:-1], gaps[1:])
    for span in _SPANS:
        within = nearest[: int(np.searchsorted(hits, span))]
        for reach in _REACHES:
            # By chance: within the span, and one of the others within reach on either side.
            chance = min(1.0, span / n) * min(1.0, 2 * reach * count / n)
            explained = int(np.count_nonzero(within <= reach))
            if explained >= share_min * count:
                best = max(best, _surprise(explained, count, chance))
        if span >= len(leading):
            break
    return best


def _surprise(hits: int, count: int, chance: float) -> float:
    """Return minus ln of (a bound of) the probability of *hits* or more of *count* (Chernoff)."""
    share = hits / count
    if share <= chance:
        return 0.0
    rest = (1 - share) * math.log((1 - share) / (1 - chance)) if share < 1 else 0.0
    return count * (share * math.log(share / chance) + rest)


def least_hits(places: int, opened: int, n: int, candidates: int, survivors_max: int) -> int:
    """Return how many of a candidate's *places* must be open for it to be worth a closer look.

    So many that of *candidates* wrong ones at most *survivors_max* pass by chance.
    """
    mean = places * opened / n
    term, tail, hits = math.exp(-mean), 1.0, 0  # Poisson.
    while candidates * tail > survivors_max:
        tail -= term
        hits += 1
        term *= mean / hits
    return max(2, hits)
