"""Steps that are taken to their end, also when whoever takes them is cancelled meanwhile.

What leaves a tier or moves is in the index, on the disk and in the accounts: a command that is
interrupted between two of these would leave them at odds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from cache.committer import Change, Committer
from cache.engine import Engine
from cache.errors import SluiceError

T = TypeVar("T")


async def commit(committer: Committer, change: Change[object]) -> None:
    """Commit *change*. Raises what `Committer.commit` raises, and never Cancelled.

    It does not need `Committer.run`, which ends together with whoever is cancelled last.
    """
    outcomes: list[SluiceError | None] = []
    committer.commit_then(change, outcomes.append)
    await trio.lowlevel.cancel_shielded_checkpoint()  # Others may share the transaction.
    if not outcomes:
        committer.flush()
    (error,) = outcomes
    if error is not None:
        raise error


async def run(engine: Engine, call: Callable[[], T], *, demand: bool = True) -> T:
    """Return what *call* returns, run by *engine*. Raises what it raises, and never Cancelled."""
    with trio.CancelScope(shield=True):
        result = await engine.run(call, demand=demand)
    return result
