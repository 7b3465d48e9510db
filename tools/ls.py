"""`sluice ls`: where each file is, how much of it, and when it would leave."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import control
from tools.option_kinds import format_size
from tools.options import Parser
from tools.status import console, find_mount, printable

if TYPE_CHECKING:
    from rich.table import Table


def main(argv: Sequence[str]) -> int:
    """List; 1 if a path could not be listed."""
    arguments = _parser().parse_args(argv)
    found = listing(arguments.paths, recursive=arguments.recursive, limit=arguments.limit)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        console().print(_table(found["entries"], time.time()))
    complain(found["errors"])
    if found["truncated"]:
        print(f"sluice: only the first {arguments.limit} are shown; see --limit", file=sys.stderr)
    return int(bool(found["errors"]))


def _parser() -> Parser:
    parser = Parser(prog="sluice ls", description="Show what the cache has of files and directories.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="in a mount")
    parser.add_argument("--recursive", "-r", action="store_true", help="with all that is below")
    parser.add_argument(
        "--limit", type=int, default=1000, metavar="N", help="at most so many (default: 1000)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def listing(paths: Sequence[str], *, recursive: bool, limit: int) -> dict[str, Any]:
    """Return {"entries", "errors", "truncated"} of the control verb `ls`, with absolute paths."""
    result: dict[str, Any] = {"entries": [], "errors": [], "truncated": False}
    for mountpoint, relative in by_mount(paths).items():
        rest = limit - len(result["entries"])
        part = control.call(mountpoint, "ls", paths=relative, recursive=recursive, limit=rest)
        for key in ("entries", "errors"):
            result[key] += [{**item, "path": str(mountpoint / item["path"])} for item in part[key]]
        result["truncated"] |= part["truncated"]
    return result


def by_mount(paths: Sequence[str]) -> dict[Path, list[str]]:
    """Return for each mount the paths below its root, in the order given. Raises UsageError."""
    grouped: dict[Path, list[str]] = {}
    for path in paths:
        mountpoint, relative = find_mount(path)
        grouped.setdefault(mountpoint, []).append(relative)
    return grouped


def complain(errors: list[dict[str, Any]]) -> None:
    for item in errors:
        print(f"sluice: {printable(item['path'])}: {item['error']}", file=sys.stderr)


def _table(entries: list[dict[str, Any]], now_s: float) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("path", overflow="fold")
    for name in ("size", "tier", "cached", "hits", "last used"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "leaves", *_names_of_reads(entries)):
        table.add_column(name)
    for entry in entries:
        table.add_row(Text(printable(entry["path"])), *_cells(entry, now_s))
    return table


def _cells(entry: dict[str, Any], now_s: float) -> list[str]:
    if entry["kind"] == "directory":
        return ["directory", "", "", "", "", _state(entry).strip("-")]
    size = entry["size_bytes"]
    share = min(1.0, entry["cached_bytes"] / size) if size else float(entry["tier"] is not None)
    return [
        format_size(size),
        entry["tier"] or "-",
        f"{share:.0%}",
        str(entry["hits"]),
        age(entry["last_used_s"], now_s),
        _state(entry),
        _leaving(entry),
        *_reads(entry),
    ]


def _state(entry: dict[str, Any]) -> str:
    words = ["pinned"] if entry.get("pinned") else []
    return ", ".join([*words, *filter(None, [entry.get("dirty")])]) or "-"


def _leaving(entry: dict[str, Any]) -> str:
    """Return "#0: used in this epoch": the next to leave its tier, and why."""
    rank, why = entry["victim_rank"], entry.get("leaves")
    if why == "pinned":
        return "stays: pinned"
    return f"{'-' if rank is None else f'#{rank}'}{f': {why}' if why else ''}"


def _names_of_reads(entries: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the names of the columns of `_reads`: there if a large file was read."""
    return ("read as", "amplif.") if any(entry.get("access") for entry in entries) else ()


def _reads(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return how a large file is read, and the bytes fetched over the bytes read."""
    if entry.get("access") is None:
        return ()
    access, ratio, record_bytes = (entry.get(key) for key in ("access", "amplification", "record_bytes"))
    how = str(access)
    if record_bytes:
        how += f" of {format_size(record_bytes)}"
    return how, "-" if ratio is None else f"{ratio:.2f}"


def age(then_s: float | None, now_s: float) -> str:
    """Return "3 min ago"; times are unix time."""
    if then_s is None:
        return "-"
    age_s = max(0, int(now_s - then_s))
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= unit_s:
            return f"{age_s // unit_s} {unit} ago"
    return f"{age_s} s ago"
