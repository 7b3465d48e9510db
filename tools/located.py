"""Many paths at once: which mount each lies in. One look at the mounts for each directory."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from cache.errors import UsageError
from tools.status import find_mount

_FILE_BYTES_MAX = 4 << 30


def by_mount(paths: Iterable[str]) -> dict[Path, list[str]]:
    """Return for each mount the paths below its root, in the order given. Raises UsageError."""
    grouped: dict[Path, list[str]] = {}
    known: dict[str, tuple[Path, str]] = {}
    for path in paths:
        parent, name = os.path.split(os.path.abspath(path))
        if parent not in known:
            known[parent] = _mount_of(parent)
        mountpoint, directory = known[parent]
        if mountpoint == Path() or (not directory and os.path.ismount(path)):
            mountpoint, relative = find_mount(path)  # The mount's own root, or a link into a mount.
        else:
            relative = f"{directory}/{name}" if directory else name
        grouped.setdefault(mountpoint, []).append(relative)
    return grouped


def _mount_of(directory: str) -> tuple[Path, str]:
    try:
        return find_mount(directory)
    except UsageError:
        return Path(), ""


def expanded(paths: Sequence[str]) -> list[str]:
    """Return *paths* with patterns that the shell left as they are replaced by what fits them.

    A pattern that is also a name stays. Raises UsageError for one that fits nothing.
    """
    found: list[str] = []
    for path in paths:
        if not glob.has_magic(path) or os.path.lexists(path):
            found.append(path)
            continue
        fitting = sorted(glob.glob(path, recursive=True))
        if not fitting:
            raise UsageError(f"{path}: nothing fits this pattern")
        found += fitting
    return found


def read_list(file: str) -> list[str]:
    """Return the paths that FILE ("-": standard input) names, one a line. Raises UsageError.

    Lines that can't be paths are told once on standard error, with their number.
    """
    try:
        if file == "-":
            text = sys.stdin.buffer.read(_FILE_BYTES_MAX)
        else:
            with open(file, "rb") as opened:
                text = opened.read(_FILE_BYTES_MAX)
    except OSError as error:
        raise UsageError(f"--from-list {file}: {error.strerror}") from error
    lines = [line.rstrip(b"\r") for line in text.split(b"\n") if line.strip()]
    good = list(dict.fromkeys(line for line in lines if b"\0" not in line and len(line) < 4096))
    if not good:
        raise UsageError(f"--from-list {file}: no line is a path; write one path a line")
    bad = sum(b"\0" in line or len(line) >= 4096 for line in lines)
    if bad:
        print(f"sluice: {file}: {bad:,} lines are no paths", file=sys.stderr)
    return [os.fsdecode(line) for line in good]
