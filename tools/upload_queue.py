"""`sluice queue`: what the lake does not know yet; has what failed tried again, and settles conflicts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cache import control
from cache.errors import UsageError
from tools.ls import age, by_mount, complain
from tools.option_kinds import format_size
from tools.options import Parser
from tools.status import console, find_mount, own_mounts, printable

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN_MAX = 1000
_WORDS = {"put": "upload", "mark": "directory", "restate": "metadata"}


def main(argv: Sequence[str]) -> int:
    """Show the queue, or act on it; 1 if something in it has failed, or could not be settled."""
    if argv and argv[0] == "retry":
        return _retry(argv[1:])
    if argv and argv[0] == "resolve":
        return _resolve(argv[1:])
    return _list(argv)


def _list(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="sluice queue",
        description="Show what waits for the lake, oldest first. `sluice queue retry [PATH…]` tries what"
        " failed again now; `sluice queue resolve --keep ours|theirs PATH…` settles conflicts.",
    )
    parser.add_argument("directory", nargs="?", metavar="DIR", help="any path in a mount")
    parser.add_argument(
        "--limit", type=int, default=_SHOWN_MAX, metavar="N", help=f"at most so many (default: {_SHOWN_MAX})"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    mounts = [find_mount(arguments.directory)[0]] if arguments.directory is not None else own_mounts()
    found = [
        {"mountpoint": str(mount), **control.call(mount, "queue", limit=arguments.limit)} for mount in mounts
    ]
    if arguments.json:
        print(json.dumps(found[0] if arguments.directory is not None else found, indent=2))
    else:
        for queue in found:
            _show(queue)
    return int(any(entry["state"] in ("failed", "conflict") for queue in found for entry in queue["entries"]))


def _show(queue: dict[str, Any]) -> None:
    if not queue["entries"]:
        print(f"{printable(queue['mountpoint'])}: the lake has everything")
        return
    print(
        f"{printable(queue['mountpoint'])}: {queue['total']} waiting,"
        f" {format_size(queue['dirty_bytes'])} to send"
    )
    console().print(_table(queue["entries"], time.time()))
    if queue["total"] > len(queue["entries"]):
        print(f"sluice: only the first {len(queue['entries'])} are shown; see --limit", file=sys.stderr)


def _table(entries: list[dict[str, Any]], now_s: float) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("path", overflow="fold")
    for name in ("what", "state", "size", "sent", "since"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for entry in entries:
        table.add_row(
            Text(printable(entry["path"])),
            _WORDS.get(entry["operation"], entry["operation"]),
            entry["state"],
            format_size(entry["bytes"]) if entry["operation"] == "put" else "-",
            format_size(entry["sent"]) if entry["operation"] == "put" else "-",
            age(entry["since"], now_s),
            Text(printable(entry["error"])),
        )
    return table


def _retry(argv: Sequence[str]) -> int:
    parser = Parser(prog="sluice queue retry", description="Try what failed again now.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="in a mount (default: all that failed)")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    wanted = by_mount(arguments.paths) if arguments.paths else {mount: [] for mount in own_mounts()}
    retried = sum(control.call(mount, "retry", paths=paths)["retried"] for mount, paths in wanted.items())
    print(json.dumps({"retried": retried}) if arguments.json else f"{retried} tried again")
    return 0


def _resolve(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="sluice queue resolve",
        description="Settle conflicts: the lake changed a file under our upload. `ours` overwrites the lake's"
        " version; `theirs` shows it, and keeps our bytes in lost+found of the cache directory.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="in a mount")
    parser.add_argument("--keep", metavar="ours|theirs", help="which of the two stays")
    arguments = parser.parse_args(argv)
    if arguments.keep not in ("ours", "theirs"):
        raise UsageError(f"--keep {arguments.keep or 'is missing'}: must be ours or theirs")
    errors: list[dict[str, Any]] = []
    for mount, paths in by_mount(arguments.paths).items():
        told = control.call(mount, "resolve", paths=paths, keep=arguments.keep)
        errors += [{**error, "path": str(mount / error["path"])} for error in told["errors"]]
    complain(errors)
    return int(bool(errors))
