"""`sluice trace`: records for a while what is read through a mount, for `sluice simulate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cache import control
from cache.errors import UsageError
from tools.options import Parser, check_output
from tools.simulate.trace import TraceWriter
from tools.status import find_mount

_SECONDS_MAX = 7 * 86400.0
_SILENCE_S_MAX = 60.0  # The mount says something every second.


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="sluice trace", description="Record what is read; page cache hits are not seen.")
    parser.add_argument("directory", metavar="DIR", help="in a mount; all of the mount is recorded")
    parser.add_argument("file", metavar="FILE", help="the trace to write")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="N",
        help="for how long, unless interrupted (default: 60)",
    )
    arguments = parser.parse_args(argv)
    if not 0 < arguments.seconds <= _SECONDS_MAX:
        raise UsageError(f"--seconds {arguments.seconds:g}: must be from 0 to {_SECONDS_MAX:.0f}, and not 0")
    check_output("FILE", Path(arguments.file))
    mountpoint, _ = find_mount(arguments.directory)
    uses, dropped = _record(mountpoint, arguments.file, arguments.seconds)
    if dropped:
        print(f"sluice: {dropped:,} uses came too fast and are missing", file=sys.stderr)
    print(f"{arguments.file}: {uses:,} uses")
    return 0


def _record(mountpoint: Path, path: str, seconds: float) -> tuple[int, int]:
    """Write the trace; return how many uses it holds and how many are missing."""
    with open(path, "w", encoding="utf-8") as file:
        writers: list[TraceWriter] = []

        def write(progress: dict[str, Any]) -> None:
            if not writers:  # The first part says that recording has begun.
                writers.append(TraceWriter(file, str(mountpoint), time.time()))
            writers[0].add((at_ms, item, size_bytes) for at_ms, item, size_bytes in progress["uses"])

        result = {"dropped": 0}
        with suppress(KeyboardInterrupt):  # Enough was recorded.
            result = control.call(
                mountpoint, "trace", on_progress=write, timeout_s=_SILENCE_S_MAX, seconds=seconds
            )
        if not writers:
            raise KeyboardInterrupt
        writers[0].finish()
    return writers[0].uses, result["dropped"]
