"""`sluice evict`: drops files from the cache. The lake keeps them; the next read fetches them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cache import control
from tools.ls import by_mount, complain
from tools.option_kinds import format_size
from tools.options import Parser


def main(argv: Sequence[str]) -> int:
    """Evict; 1 if a path could not be evicted."""
    parser = Parser(prog="sluice evict", description="Drop files, or all that is below directories.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="in a mount")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    total = _evict(arguments.paths)
    if arguments.json:
        print(json.dumps(total, indent=2))
    else:
        print(f"evicted {total['objects']} objects, {format_size(total['bytes'])}")
    complain(total["errors"])
    return int(bool(total["errors"]))


def _evict(paths: Sequence[str]) -> dict[str, Any]:
    """Return {"objects", "bytes", "errors"} over all mounts that *paths* lie in, with absolute paths."""
    total: dict[str, Any] = {"objects": 0, "bytes": 0, "errors": []}
    for mountpoint, relative in by_mount(paths).items():
        part = control.call(mountpoint, "evict", timeout_s=600.0, paths=relative)
        total["objects"] += part["objects"]
        total["bytes"] += part["bytes"]
        total["errors"] += [{**item, "path": str(mountpoint / item["path"])} for item in part["errors"]]
    return total
