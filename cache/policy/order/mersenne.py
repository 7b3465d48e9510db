"""The first outputs of the Mersenne Twister for many seeds at once.

MT19937 after Matsumoto and Nishimura, "Mersenne Twister" (1998), seeded by their init_genrand(), as
torch.Generator and numpy.random.RandomState seed it. One seed costs numpy 10 us; here it is one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

_MIDDLE = 397
DRAWS_MAX = 624 - _MIDDLE  # Outputs up to here need no word that the generator has already replaced.


def first_draws(seeds: Words, skip: int, count: int) -> Words:
    """Return outputs *skip* to *skip* + *count* of every seed, as an array [count, seeds]."""
    assert skip >= 0 and skip + count <= DRAWS_MAX, (skip, count)
    near, far = _states(seeds, skip, count)
    mixed = (near[:-1] & np.uint32(0x80000000)) | (near[1:] & np.uint32(0x7FFFFFFF))
    twisted = far ^ (mixed >> np.uint32(1)) ^ ((mixed & np.uint32(1)) * np.uint32(0x9908B0DF))
    return _temper(twisted)


def _states(seeds: Words, skip: int, count: int) -> tuple[Words, Words]:
    """Return the seeded words skip to skip + count, last included, and those 397 places on."""
    near = np.empty((count + 1, len(seeds)), np.uint32)
    far = np.empty((count, len(seeds)), np.uint32)
    word = seeds.astype(np.uint32)
    for i in range(_MIDDLE + skip + count):
        if i:
            word = np.uint32(1812433253) * (word ^ (word >> np.uint32(30))) + np.uint32(i)
        if skip <= i <= skip + count:
            near[i - skip] = word
        if i >= _MIDDLE + skip:
            far[i - _MIDDLE - skip] = word
    return near, far


def _temper(words: Words) -> Words:
    words = words ^ (words >> np.uint32(11))
    words = words ^ ((words << np.uint32(7)) & np.uint32(0x9D2C5680))
    words = words ^ ((words << np.uint32(15)) & np.uint32(0xEFC60000))
    return words ^ (words >> np.uint32(18))
