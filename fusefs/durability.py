"""Which files are durable only once the lake has them: `--durability`, for the mount and by pattern."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase

LOCAL, REMOTE = "local", "remote"


class Durability:
    """*rules*: (pattern, "local" or "remote"); the first whose pattern fits decides, else *default*.

    A pattern is a shell's, over the path below the mount point; "*" stands for slashes too.
    """

    def __init__(self, rules: Sequence[tuple[str, str]], default: str) -> None:
        self._rules = [(pattern.lstrip("/"), kind) for pattern, kind in rules]
        self._default = default

    @property
    def may_be_remote(self) -> bool:
        return REMOTE in (self._default, *(kind for _, kind in self._rules))

    def is_remote(self, path: bytes) -> bool:
        text = os.fsdecode(path)
        kinds = (kind for pattern, kind in self._rules if fnmatchcase(text, pattern))
        return next(kinds, self._default) == REMOTE
