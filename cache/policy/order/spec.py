"""Which order it is, in a few words: the family, the seed, and how epoch follows epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cache.policy.order.samplers import FAMILIES, Places, nth

# How the order of one epoch leads to the next one's, likeliest first where a family leaves it open:
#   reseed     the seed is one more (DistributedSampler with set_epoch, accelerate)
#   repeat     the same again (set_epoch forgotten, or shuffled once at the start)
#   continue   the generator draws on
#   reshuffle  the generator draws on, and shuffles what it shuffled before
_ADVANCES = {
    "torch": ("reseed", "repeat", "continue"),
    "torch-loader": ("continue", "repeat"),
    "torch-global": ("continue",),
    "numpy-legacy": ("reseed", "reshuffle", "continue", "repeat"),
    "numpy": ("reseed", "reshuffle", "continue", "repeat"),
    "python": ("reshuffle", "reseed", "repeat", "continue"),
}
ADVANCES = ("reseed", "repeat", "continue", "reshuffle")


def advances_of(family: str) -> tuple[str, ...]:
    return _ADVANCES.get(family, ("continue",))


@dataclass(frozen=True, slots=True)
class Spec:
    """One epoch's order of any number of places. *advance* is empty as long as it is not known."""

    family: str
    seed: int
    epoch: int = 0
    advance: str = ""

    def __post_init__(self) -> None:
        assert self.family in FAMILIES and self.advance in ("", *ADVANCES) and self.epoch >= 0, self
        assert self.advance or self.epoch == 0 or len(advances_of(self.family)) == 1, self

    def order(self, n: int) -> Places:
        """Return the places 0 to *n* - 1 in the order in which this epoch reads them."""
        family, advance = FAMILIES[self.family], self.advance or advances_of(self.family)[0]
        if advance == "reseed":
            return next(family(self.seed + self.epoch, n))
        if advance == "repeat":
            return next(family(self.seed, n))
        if advance == "continue":
            return nth(family(self.seed, n), self.epoch)
        orders = family(self.seed, n)
        order = next(orders)
        for _ in range(self.epoch):
            order = order[next(orders)]
        return order

    def successors(self) -> list[Spec]:
        """Return what the next epoch may be, likeliest first: several after the first epoch only."""
        advances = (self.advance,) if self.advance else advances_of(self.family)
        return [replace(self, epoch=self.epoch + 1, advance=advance) for advance in advances]

    def __str__(self) -> str:
        epoch = f", epoch {self.epoch}" if self.epoch else ""
        return f"{self.family} with seed {self.seed}{epoch}"
