"""Traces that nobody recorded: what a policy makes of them is known beforehand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Use = tuple[float, str, int]  # Milliseconds, item, bytes: as in a trace.

_MS_A_USE = 1.0


def shuffled(files: int, passes: int, size_bytes: int, seed: int = 1) -> Iterator[Use]:
    """Yield epochs: every file once each, in a new random order."""
    generator, order = random.Random(seed), list(range(files))
    for number in range(passes):
        generator.shuffle(order)
        for place, file in enumerate(order):
            yield (number * files + place) * _MS_A_USE, f"{file:x}", size_bytes


def scan(files: int, passes: int, size_bytes: int, seed: int = 1) -> Iterator[Use]:
    """Yield passes in listing order."""
    for use in range(files * passes):
        yield use * _MS_A_USE, f"{use % files:x}", size_bytes


def zipf(files: int, passes: int, size_bytes: int, seed: int = 1) -> Iterator[Use]:
    """Yield draws with replacement, the file of rank r in proportion to 1 / r."""
    weights = [1 / rank for rank in range(1, files + 1)]
    drawn = random.Random(seed).choices(range(files), weights, k=files * passes)
    for use, file in enumerate(drawn):
        yield use * _MS_A_USE, f"{file:x}", size_bytes


KINDS: dict[str, Callable[[int, int, int], Iterator[Use]]] = {
    "shuffled": shuffled,
    "scan": scan,
    "zipf": zipf,
}
