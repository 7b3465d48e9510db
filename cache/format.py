"""What makes a directory a cache of ours: the first line of its file `format`. Imports nothing heavy."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KIND = "sluicefs-cache"
FORMAT = f"{_KIND} 2"  # 1 had blocks of 128 KiB.


def cache_around(path: Path) -> Path | None:
    """Return the cache directory that *path* is, or lies in; None if there is none."""
    return next((directory for directory in (path, *path.parents) if _is_cache(directory)), None)


def _is_cache(directory: Path) -> bool:
    """Others may have a file of that name, however large, or a FIFO."""
    try:
        fd = os.open(directory / "format", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.read(fd, len(_KIND)) == _KIND.encode()
    except OSError:
        return False
    finally:
        os.close(fd)
