"""`sluice trace`: records for a while what is read through a mount, for `sluice simulate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from cache import control
from cache.errors import UsageError
from tools.options import Parser
from tools.simulate.trace import TraceWriter
from tools.status import find_mount

_SECONDS_MAX = 7 * 86400.0


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="sluice trace", description="Record what is read; page cache hits are not seen.")
    parser.add_argument("directory", metavar="DIR", help="in a mount; all of the mount is recorded")
    parser.add_argument("file", metavar="FILE", help="the trace to write")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="for how long (default: 60)")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.seconds <= _SECONDS_MAX:
        raise UsageError(f"--seconds {arguments.seconds:g}: must be from 0 to {_SECONDS_MAX:.0f}, and not 0")
    mountpoint, _ = find_mount(arguments.directory)
    with open(arguments.file, "w", encoding="utf-8") as file:
        writer = TraceWriter(file, str(mountpoint), time.time())

        def write(progress: dict[str, Any]) -> None:
            writer.add((at_ms, item, size_bytes) for at_ms, item, size_bytes in progress["uses"])

        timeout_s = 60.0  # Of silence: the mount says something every second.
        result = control.call(
            mountpoint, "trace", on_progress=write, timeout_s=timeout_s, seconds=arguments.seconds
        )
        writer.finish()
    if result["dropped"]:
        print(f"sluice: {result['dropped']:,} uses came too fast and are missing", file=sys.stderr)
    print(f"{arguments.file}: {writer.uses:,} uses")
    return 0
