"""A hint of the coming order, as text: what it says, and what of it is of no use.

Either one path a line (below the set's directory, or anywhere in the mount), or one number a line:
a place in the directory's own listing, see `listings`. Or no lines but a sampler and its seed. The
first line may say more, as a JSON object or as words: sampler=torch seed=0 world=8 ranks=0,1,2,3
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cache.errors import UsageError
from cache.policy.order.samplers import FAMILIES
from cache.policy.order.spec import advances_of

LINES_MAX = 10_000_000
LINE_BYTES_MAX = 4096  # PATH_MAX of Linux.
WORLD_MAX = 65536
_SEED_MAX = 2**64
_KEYS = (
    "sampler",
    "seed",
    "epoch",
    "advance",
    "listing",
    "world",
    "ranks",
    "drop_last",
    "count",
    "lines",
    "directory",
)
_WORD = re.compile(rb"(%s)=(\S*)" % "|".join(_KEYS).encode())
_SAMPLER = b"sampler="  # What begins with it is no path.
_RUBBISH = re.compile(rb"[\0-\x08\x0e-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class ToldSampler:
    """A sampler by name, see `samplers.FAMILIES`. *ranks*: those that read through this mount."""

    family: str
    seed: int
    epoch: int = 0
    advance: str = ""
    listing: str = "names"
    world: int = 1
    ranks: tuple[int, ...] = (0,)
    drop_last: bool = False


@dataclass(slots=True)
class Hint:
    """What was told: one of the three. *useless*: reason -> number of lines that were left out."""

    paths: list[bytes] = field(default_factory=list)
    indices: array[int] = field(default_factory=lambda: array("Q"))
    sampler: ToldSampler | None = None
    count: int | None = None  # Of the files, as the hint says.
    useless: Counter[str] = field(default_factory=Counter)
    directory: bytes | None = None  # What relative paths, numbers and samplers are about, if it says so.
    first_useless: dict[str, int] = field(default_factory=dict)  # Reason -> number of the first such line.

    def examples(self) -> list[str]:
        return [f"line {number}" for number in self.first_useless.values()]

    def __len__(self) -> int:
        return len(self.paths) or len(self.indices)


def parse(text: bytes) -> Hint:
    """Return what *text* says. Raises UsageError, without the file's name, when that is nothing."""
    first, _, rest = text.partition(b"\n")
    head = _read_head(first.strip())
    if head is not None and rest.startswith(_SAMPLER):
        more, _, rest = rest.partition(b"\n")
        head |= _read_head(more.strip()) or {}
    hint = Hint() if head is None else Hint(sampler=_read_sampler(head), count=_integer(head, "count"))
    if head is not None and "directory" in head:
        hint.directory = os.fsencode(str(head["directory"]))
    if hint.sampler is not None and rest.strip():
        raise UsageError("a sampler and lines; give the one or the other")
    if hint.sampler is None:
        kind = str((head or {}).get("lines", ""))
        _read_lines(hint, text if head is None else rest, kind, 1 if head is None else 2)
        if not len(hint):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in hint.useless.items())
            at = f", the first is {hint.examples()[0]}" if hint.examples() else ""
            raise UsageError(f"no line names a file ({reasons or 'there are none'}){at}")
    return hint


def _read_head(line: bytes) -> dict[str, Any] | None:
    """Return the first line's keys; None when it is a path or a number like the others."""
    if line.startswith(b"{"):
        try:
            head = json.loads(line)
        except ValueError as error:
            raise UsageError(f"the first line is no JSON object ({error})") from error
    elif line.startswith(_SAMPLER) or (line and all(_WORD.fullmatch(word) for word in line.split())):
        head = dict(word.decode(errors="replace").partition("=")[::2] for word in line.split())
    else:
        return None
    unknown = set(head) - set(_KEYS)
    if unknown:
        raise UsageError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(_KEYS)}")
    return dict(head)


def _read_sampler(head: dict[str, Any]) -> ToldSampler | None:
    if "sampler" not in head:
        return None
    world = _integer(head, "world") or 1
    ranks = _read_ranks(head.get("ranks"), world)
    if not 1 <= world <= WORLD_MAX or not all(0 <= rank < world for rank in ranks):
        raise UsageError(f"world={world} ranks={','.join(map(str, ranks))}: ranks go from 0 to world - 1")
    family, advance = str(head["sampler"]), str(head.get("advance", ""))
    if family not in FAMILIES:
        raise UsageError(f"sampler={family}: must be one of {', '.join(FAMILIES)}")
    if advance not in ("", *advances_of(family)):
        raise UsageError(f"advance={advance}: of {family} it is one of {', '.join(advances_of(family))}")
    return ToldSampler(
        family,
        _integer(head, "seed") or 0,
        _integer(head, "epoch") or 0,
        advance or advances_of(family)[0],
        str(head.get("listing", "names")),
        world,
        ranks,
        str(head.get("drop_last", "")).lower() in ("1", "true", "yes"),
    )


def _read_ranks(value: Any, world: int) -> tuple[int, ...]:
    if value is None:
        return tuple(range(min(world, WORLD_MAX)))
    parts = value if isinstance(value, list) else str(value).split(",")
    try:
        return tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError):
        raise UsageError(f"ranks={value}: must be numbers, like 0,1") from None


def _integer(head: dict[str, Any], key: str) -> int | None:
    value = head.get(key)
    if value is None:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < _SEED_MAX:
        raise UsageError(f"{key}={value}: must be a whole number, not below 0")
    return number


def _read_lines(hint: Hint, text: bytes, kind: str, first: int) -> None:
    """*first*: the number of the first line of *text*."""
    if kind not in ("", "paths", "indices"):
        raise UsageError(f"lines={kind}: must be paths or indices")
    lines = _usable_lines(hint, text, first)
    numbers = [line for line in lines if line.isdigit() and len(line) < 16]
    if kind == "indices" or (not kind and len(numbers) > len(lines) // 2):
        hint.useless["no numbers"] += len(lines) - len(numbers)
        hint.indices = array("Q", map(int, numbers))
    else:
        hint.paths = lines
    hint.useless = +hint.useless


def _usable_lines(hint: Hint, text: bytes, first: int) -> list[bytes]:
    """Return the lines that can be paths or numbers, each once, and count the others."""
    seen: dict[bytes, None] = {}
    for number, line in enumerate(text.split(b"\n", LINES_MAX)[:LINES_MAX], first):
        line = line.rstrip(b"\r")
        if not line.strip():
            continue
        if len(line) > LINE_BYTES_MAX or _RUBBISH.search(line):
            _leave_out(hint, "are no text", number)
        elif line in seen:
            _leave_out(hint, "are there twice", number)
        else:
            seen[line] = None
    hint.useless[f"beyond the first {LINES_MAX:,}"] = max(0, text.count(b"\n") + 1 - LINES_MAX - 1)
    return list(seen)


def _leave_out(hint: Hint, reason: str, number: int) -> None:
    hint.useless[reason] += 1
    hint.first_useless.setdefault(reason, number)
