"""The orders that training libraries shuffle into, made without those libraries.

A family yields the orders of one generator's successive epochs: arrays of the places 0 to n - 1 in
the order in which they are read. What is computed here is checked against the real libraries, and
against their recorded answers, in tests/test_15_samplers.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from cache.policy.order.mersenne import Words, first_draws

Places = NDArray[np.uint32]
Family = Callable[[int, int], Iterator[Places]]

# torch.randperm draws 64 bits for each place from here on (ATen, randperm_cpu): no set is so large.
PLACES_MAX = 2**32 // 20
_SEED_MASK = 0xFFFFFFFF  # mt19937 takes the low half of torch's 64-bit seeds.


def torch_generator(seed: int, n: int) -> Iterator[Places]:
    """Yield RandomSampler's orders under a seeded generator of its own.

    The first is torch.randperm(n), which is also that of DistributedSampler and of accelerate's
    SeedableRandomSampler under seed + epoch. An epoch ends with a second randperm, of which the
    sampler uses nothing.
    """
    state = np.random.RandomState(seed & _SEED_MASK)
    while True:
        yield _randperm(state, n)
        _skip(state, n - 1)


def torch_loader(seed: int, n: int) -> Iterator[Places]:
    """Yield the orders of DataLoader(shuffle=True, generator=seeded).

    The loader first draws 64 bits from the same generator, as the base of its workers' seeds.
    """
    state = np.random.RandomState(seed & _SEED_MASK)
    while True:
        _skip(state, 2)
        yield _randperm(state, n)
        _skip(state, n - 1)


def torch_global(seed: int, n: int) -> Iterator[Places]:
    """Yield the orders of DataLoader(shuffle=True) after torch.manual_seed(seed).

    Each epoch the loader and then the sampler draw 64 bits, the latter to seed a generator. Holds
    while nothing else draws random numbers on the CPU, as when the model works on a GPU.
    """
    state = np.random.RandomState(seed & _SEED_MASK)
    while True:
        _skip(state, 3)
        (drawn,) = _draws(state, 1).tolist()
        yield _randperm(np.random.RandomState(drawn), n)


def numpy_legacy(seed: int, n: int) -> Iterator[Places]:
    """Yield RandomState(seed).permutation(n), which is also its shuffle of n things."""
    state = np.random.RandomState(seed & _SEED_MASK)
    while True:
        yield state.permutation(n).astype(np.uint32)


def numpy_generator(seed: int, n: int) -> Iterator[Places]:
    """Yield default_rng(seed).permutation(n), which is also its shuffle of n things.

    With seed + epoch it is MosaicML's "naive" order.
    """
    generator = np.random.default_rng(seed)
    while True:
        yield generator.permutation(n).astype(np.uint32)


def python_shuffle(seed: int, n: int) -> Iterator[Places]:
    """Yield random.Random(seed).shuffle of n things."""
    draws = _Draws(np.random.RandomState(_key_words(seed)))
    while True:
        listed = list(range(n))
        for i, j in zip(range(n - 1, 0, -1), _falling(draws, n), strict=True):
            listed[i], listed[j] = listed[j], listed[i]
        yield np.array(listed, np.uint32)


def mosaic_shards(seed: int, n: int) -> Iterator[Places]:
    """Yield the order of shards of MosaicML's py1s and py1e on one canonical node.

    One shuffle for the run, and upon it one for each epoch, by seed + epoch.
    """
    of_the_run = np.random.default_rng(seed).permutation(n).astype(np.uint32)
    for epoch in count():
        yield of_the_run[np.random.default_rng(seed + epoch).permutation(n)]


def webdataset(workers: int, buffer: int) -> Family:
    """Return the family of WebDataset(shardshuffle=buffer, detshuffle=True) over *workers*.

    Worker w has every *workers*-th shard from the w-th on and shuffles them by seed + epoch; all
    of them read at one speed here.
    """

    def orders(seed: int, n: int) -> Iterator[Places]:
        for epoch in count():
            parts = [
                list(_through_buffer(range(worker, n, workers), buffer, random.Random(seed + epoch)))
                for worker in range(workers)
            ]
            turns = [part[i] for i in range(-(-n // workers)) for part in parts if i < len(part)]
            yield np.array(turns, np.uint32)

    return orders


def distributed(order: Places, world: int, ranks: tuple[int, ...], *, drop_last: bool = False) -> Places:
    """Return what *ranks* out of *world* read of *order*, as torch's DistributedSampler deals it.

    In turns; what is missing for equal parts is taken from the start again, or with *drop_last*
    the last ones are dropped.
    """
    if drop_last and len(order) % world:
        order = order[: len(order) // world * world]
    elif padding := -len(order) % world:
        order = np.concatenate([order, np.resize(order, padding)])
    turns = order.reshape(-1, world)[:, list(ranks)]
    return turns.reshape(-1)


FAMILIES: dict[str, Family] = {
    "torch": torch_generator,
    "torch-loader": torch_loader,
    "torch-global": torch_global,
    "numpy-legacy": numpy_legacy,
    "numpy": numpy_generator,
    "python": python_shuffle,
    "mosaic-shards": mosaic_shards,
    **{
        f"webdataset-{workers}-{buffer}": webdataset(workers, buffer)
        for workers in (1, 2, 4, 8, 16)
        for buffer in (100, 1000)
    },
}


def first_places(seeds: Words, n: int, places_max: int, skip: int = 0) -> NDArray[np.int64]:
    """Return the first places of torch.randperm(n) of every seed: an array [places, seeds].

    *skip*: 32-bit outputs drawn before. Place i depends on the first i + 1 of them only.
    """
    steps = np.arange(min(places_max, n - 1))[:, None]
    draws = first_draws(seeds, skip, len(steps)).astype(np.int64)
    places = steps + draws % (n - steps)
    # Where no place is swapped twice, each step finds what was there from the start.
    ordered = np.sort(places, axis=0)
    twice = (ordered[0] < len(steps)) | (ordered[1:] == ordered[:-1]).any(axis=0)
    places[:, twice] = _swapped(places[:, twice])
    return places


def _swapped(swaps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what step i takes from place *swaps*[i], for every column."""
    places, moved = np.empty_like(swaps), np.empty_like(swaps)
    for i in range(len(swaps)):
        places[i] = _content(swaps[i], swaps[:i], moved[:i])
        moved[i] = _content(np.full(swaps.shape[1], i), swaps[:i], moved[:i])
    return places


def _content(
    at: NDArray[np.int64], swapped: NDArray[np.int64], moved: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return what is at places *at* after the steps so far: the last thing put there, or itself."""
    content = at
    for put_at, put in zip(swapped, moved, strict=True):
        content = np.where(put_at == at, put, content)
    return content


def leading_places(seed: int, n: int, places_max: int, skip: int = 0) -> Places:
    """Return the first places of torch.randperm(n) under one seed, for as many draws."""
    state = np.random.RandomState(seed & _SEED_MASK)
    _skip(state, skip)
    return _taken(_swaps(state, n, min(places_max, n - 1)))


def nth(orders: Iterator[Places], number: int) -> Places:
    """Return order *number* of a family, counted from 0."""
    return next(islice(orders, number, None))


def _randperm(state: np.random.RandomState, n: int) -> Places:
    """Return torch.randperm(n): Fisher and Yates from the front, a 32-bit draw for each place."""
    assert n < PLACES_MAX, n
    return _taken(np.append(_swaps(state, n, max(0, n - 1)), n - 1))


def _swaps(state: np.random.RandomState, n: int, count: int) -> NDArray[np.int64]:
    """Return with which place each of the first *count* is swapped."""
    steps = np.arange(count)
    return steps + _draws(state, count) % (n - steps)


def _taken(swaps: NDArray[np.int64]) -> Places:
    """Return what each step finds at place swaps[i] >= i, where it then puts what was at place i.

    Step i finds what the last step before it that went to the same place has put there, else what
    was there from the start. What step i puts is i, or what the last step put that went to place i.
    """
    steps = np.arange(len(swaps))
    by_place = np.argsort(swaps, kind="stable")
    again = np.flatnonzero(swaps[by_place[1:]] == swaps[by_place[:-1]])
    puts = steps.copy()
    ahead = np.flatnonzero((swaps < len(swaps)) & (swaps != steps))
    puts[swaps[ahead]] = ahead  # Of several the last one counts.
    while not np.array_equal(puts, further := puts[puts]):
        puts = further
    taken = swaps.copy()
    taken[by_place[again + 1]] = puts[by_place[again]]
    return taken.astype(np.uint32)


def _draws(state: np.random.RandomState, count: int) -> Words:
    """Return the generator's next *count* outputs as they are."""
    return state.randint(0, 2**32, size=count, dtype=np.uint32)


def _skip(state: np.random.RandomState, count: int) -> None:
    if count > 0:
        state.bytes(4 * count)


def _through_buffer(items: range, buffer: int, generator: random.Random, initial: int = 100) -> Iterator[int]:
    """Yield *items* as webdataset's shuffle does: two in for one out until the buffer is full."""
    rest, held = iter(items), list[int]()
    for item in rest:
        held.append(item)
        if len(held) < buffer:
            held += islice(rest, 1)
        if len(held) >= min(initial, buffer):
            yield _pick(held, generator)
    while held:
        yield _pick(held, generator)


def _pick(held: list[int], generator: random.Random) -> int:
    place = generator.randint(0, len(held) - 1)
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


class _Draws:
    """The outputs of a generator, of which some can be looked at before it is known who takes them."""

    def __init__(self, state: np.random.RandomState) -> None:
        self._state = state
        self._held = np.empty(0, np.uint32)

    def look(self, count: int) -> Words:
        if (missing := count - len(self._held)) > 0:
            self._held = np.concatenate([self._held, _draws(self._state, missing)])
        return self._held[:count]

    def take(self, count: int) -> None:
        self._held = self._held[count:]


def _key_words(seed: int) -> list[int]:
    """Return what random.seed() hands to init_by_array for an integer: its 32-bit words, lowest first."""
    rest, words = abs(seed), list[int]()
    while rest or not words:
        words.append(rest & 0xFFFFFFFF)
        rest >>= 32
    return words


def _falling(draws: _Draws, n: int) -> list[int]:
    """Return randbelow(n), randbelow(n - 1), … randbelow(2) of Python's random, in that order.

    randbelow(limit) takes the upper bits of output after output until they are below the limit.
    """
    found: list[int] = []
    limit = n
    while limit >= 2:
        bits = limit.bit_length()
        wanted = limit - max(2, 1 << (bits - 1)) + 1  # The limits of as many bits.
        values = draws.look(wanted * 3 // 2 + 8) >> np.uint32(32 - bits)
        taken = np.flatnonzero(_accepted(values.astype(np.int64), limit))[:wanted]
        draws.take(int(taken[-1]) + 1 if len(taken) == wanted else len(values))
        found += values[taken].tolist()
        limit -= len(taken)
    return found


def _accepted(values: NDArray[np.int64], limit: int) -> NDArray[np.bool_]:
    """Return which *values* are below a limit that falls by one with each value accepted.

    Each is judged by how many the last round accepted before it, until a round changes nothing;
    what such a round says of the first value is right, so it is of the second, and so on.
    """
    accepted = values < limit
    while True:
        before: NDArray[np.int64] = np.cumsum(accepted) - accepted
        judged = values < limit - before
        if np.array_equal(judged, accepted):
            return accepted
        accepted = judged
