"""Which orders a set may be read in: the first places of each, for the finder to compare.

torch's orders cost as many draws as places are wanted, so thousands of seeds are looked at; other
shuffles must be made whole, so their likely seeds only, as far as the work allowed goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.policy.order.mersenne import Words, first_draws
from cache.policy.order.samplers import FAMILIES, Places, first_places, leading_places
from cache.policy.order.spec import Spec

_FIRST_PLACES, _FIRST_PLACES_OF_FEW = 32, 16  # In a small set the first swaps often meet, which costs.
_FEW = 2048
LATE_PLACES = 4096
LEADING_PLACES_MAX = 65536  # 64 loader workers with batches of 1024.

# What people write, in the order of how often: the first ones are all that a large set gets of the
# families that must be made whole.
LIKELY_SEEDS = (0, 42, 1, 1337, 1234, 123, 2, 3, 7, 10, 100, 2023, 2024, 2025, 2026, 3407, 9176, 12345, 4, 5)
_ROUND_SEEDS = (666, 777, 888, 999, 1000, 1111, 4242, 31337, 54321, 65535, 123456, 1234567, 12345678)
MORE_SEEDS = (
    *_ROUND_SEEDS,
    123456789,
    1234567890,
    20240101,
    20250101,
    20260101,
    19260817,
    0xDEADBEEF,
    0xCAFE,
)
TORCH_SEED = 67280421310721  # What torch.initial_seed() is when nobody set one.
_EPOCHS = 200  # After each of the seeds above, by seed + epoch.

_SEEDS_TORCH, _SEEDS_OTHER = 16384, 2048  # Counted from 0.
_SEEDS_LATE = 32
_GLOBAL_EPOCHS = 4

# Nanoseconds for each place of a whole order: what the work allowed is counted in. Measured on one
# core of a server of 2023 with timeit, n = 50,000.
_NS_A_PLACE = {"numpy": 15, "numpy-legacy": 20, "mosaic-shards": 30, "torch": 160, "python": 300}
_NS_A_PLACE_OTHER = 900
_SHARDS_MAX = 4096  # A larger set holds no shards.


@dataclass(frozen=True, slots=True)
class Leading:
    """An order and the first of its places."""

    spec: Spec
    places: Places


@dataclass(frozen=True, slots=True, eq=False)
class TorchTable:
    """The *first* places [place, seed] of one torch family; *specs* says what each column is."""

    family: str
    seeds: NDArray[np.int64]
    drawn: Words  # What the generator of randperm is seeded with.
    epochs: NDArray[np.int64]
    first: NDArray[np.int64]
    skip: int

    def spec(self, column: int) -> Spec:
        return Spec(self.family, int(self.seeds[column]), int(self.epochs[column]))

    def leading(self, column: int, n: int, places_max: int) -> Leading:
        places = leading_places(int(self.drawn[column]), n, places_max, self.skip)
        return Leading(self.spec(column), places)


def torch_tables(n: int) -> list[TorchTable]:
    """Return the tables of all torch families for a listing of *n*: about 80 ms of work."""
    direct, other = _seeds(_SEEDS_TORCH, _EPOCHS), _seeds(_SEEDS_OTHER, 1)
    tables = [_direct_table("torch", direct, n, 0), _direct_table("torch-loader", other, n, 2)]
    return [*tables, _global_table(other, n)]


def _direct_table(family: str, seeds: NDArray[np.int64], n: int, skip: int) -> TorchTable:
    words = _words(seeds)
    return TorchTable(
        family, seeds, words, np.zeros(len(seeds), np.int64), first_places(words, n, _first(n), skip), skip
    )


def _global_table(seeds: NDArray[np.int64], n: int) -> TorchTable:
    """The sampler's generator is seeded with output 4 * epoch + 3 of the global one."""
    outputs = first_draws(_words(seeds), 0, 4 * _GLOBAL_EPOCHS)
    drawn = outputs[3::4].reshape(-1)
    epochs = np.repeat(np.arange(_GLOBAL_EPOCHS), len(seeds))
    every_seed = np.tile(seeds, _GLOBAL_EPOCHS)
    return TorchTable("torch-global", every_seed, drawn, epochs, first_places(drawn, n, _first(n)), 0)


def _seeds(below: int, epochs: int) -> NDArray[np.int64]:
    """Return the seeds to try, each once: 0 to *below*, and the well-known ones and their epochs."""
    known = np.array([*LIKELY_SEEDS, *MORE_SEEDS, TORCH_SEED], np.int64)
    later = (known[:, None] + np.arange(epochs)).reshape(-1)
    return np.unique(np.concatenate([np.arange(below), later]))


def _first(n: int) -> int:
    return _FIRST_PLACES_OF_FEW if n < _FEW else _FIRST_PLACES


def _words(seeds: NDArray[np.int64]) -> Words:
    return (seeds & 0xFFFFFFFF).astype(np.uint32)


def late_starters(n: int) -> Iterator[Leading]:
    """Yield more places of torch's orders under the likeliest seeds: some 20 ms of work.

    They are found even when the worker with the first batch starts long after the others, so that
    the first places of the order are not among the first opens.
    """
    for seed in sorted({*LIKELY_SEEDS, *range(_SEEDS_LATE)}):
        yield Leading(Spec("torch", seed), leading_places(seed, n, LATE_PLACES))


def whole_orders(n: int, work_ns_max: int) -> Iterator[Leading]:
    """Yield the likely orders of the other families, likeliest first, until the work is done."""
    for spec in _likely_specs(n):
        work_ns_max -= work_ns(spec, n)
        if work_ns_max < 0:
            return
        yield leading_of(spec, n)


def leading_of(spec: Spec, n: int) -> Leading:
    """Return the start of an order that has to be made whole."""
    return Leading(spec, spec.order(n)[:LEADING_PLACES_MAX].copy())


def work_ns(spec: Spec, n: int) -> int:
    """Return about how long it takes to make the order, in nanoseconds."""
    orders = 1 if spec.advance in ("reseed", "repeat") else spec.epoch + 1
    return _NS_A_PLACE.get(spec.family, _NS_A_PLACE_OTHER) * n * orders


def _likely_specs(n: int) -> Iterator[Spec]:
    families = ["numpy-legacy", "numpy", "python"]
    if n <= _SHARDS_MAX:
        families += ["mosaic-shards", *(family for family in FAMILIES if family.startswith("webdataset"))]
    for seeds in (LIKELY_SEEDS[:2], LIKELY_SEEDS[2:6], LIKELY_SEEDS[6:], MORE_SEEDS):
        for family in families:
            for seed in seeds:
                yield Spec(family, seed)
