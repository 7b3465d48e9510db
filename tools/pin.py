"""`sluice pin` and `sluice unpin`: files that never leave the cache, and such no longer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache import control
from cache.errors import UsageError
from tools.located import by_mount, expanded
from tools.ls import complain as complain_of_paths
from tools.option_kinds import format_size
from tools.options import Parser
from tools.status import find_mount, own_mounts, printable
from tools.warm import complain, fetch_each, summary

_ANSWER_S = 600.0


def main(argv: Sequence[str]) -> int:
    """Pin, and fetch what is missing; 1 if something could not be."""
    arguments = _parser().parse_args(argv)
    if arguments.list:
        return _list(arguments.paths, as_json=arguments.json)
    if not arguments.paths:
        raise UsageError("nothing is named; write `sluice pin PATH…`, or `sluice pin --list`")
    grouped = by_mount(expanded(arguments.paths))
    total = fetch_each(
        grouped, "pin", quiet=arguments.json or arguments.no_fetch, fetch=not arguments.no_fetch
    )
    if arguments.json:
        print(json.dumps(total, indent=2))
    else:
        print(f"pinned {', '.join(map(printable, total['pinned'])) or 'nothing'}", end="")
        print("" if arguments.no_fetch else f"; {summary(total)}")
    complain(total)
    return int(not total["complete"])


def _parser() -> Parser:
    parser = Parser(
        prog="sluice pin",
        description="Keep files, or all that is and will be below directories, in the cache for good.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="in a mount; patterns with * may be quoted")
    parser.add_argument("--no-fetch", action="store_true", help="keep what is cached, and what will be")
    parser.add_argument("--list", action="store_true", help="show what is pinned, of all mounts or of PATHs'")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def _list(paths: Sequence[str], *, as_json: bool) -> int:
    mounts = dict.fromkeys(find_mount(path)[0] for path in paths) if paths else own_mounts()
    pinned = {str(mount): _pins_of(mount) for mount in mounts}
    if as_json:
        print(json.dumps(pinned, indent=2))
        return 0
    for pins in pinned.values():
        for path in pins["paths"]:
            print(printable(path))
        if pins["paths"]:
            print(f"{format_size(pins['bytes'])} of the disk tiers are pinned")
    return 0


def _pins_of(mount: Path) -> dict[str, Any]:
    pins = control.call(mount, "status")["pins"]
    return {**pins, "paths": [str(mount / path) for path in pins["paths"]]}


def unpin(argv: Sequence[str]) -> int:
    """Take pins back; 1 if a path was not pinned."""
    parser = Parser(prog="sluice unpin", description="Take back the pins at and below the paths.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="in a mount; patterns with * may be quoted")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    total: dict[str, Any] = {"unpinned": [], "errors": []}
    for mountpoint, relative in by_mount(expanded(arguments.paths)).items():
        part = control.call(mountpoint, "unpin", timeout_s=_ANSWER_S, paths=relative)
        total["unpinned"] += [str(mountpoint / path) for path in part["unpinned"]]
        total["errors"] += [{**item, "path": str(mountpoint / item["path"])} for item in part["errors"]]
    if arguments.json:
        print(json.dumps(total, indent=2))
    elif total["unpinned"]:
        print(f"unpinned {', '.join(map(printable, total['unpinned']))}")
    complain_of_paths(total["errors"])
    return int(bool(total["errors"]))
