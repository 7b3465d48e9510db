"""`sluice warm`: fetches files into the cache before anybody reads them."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import control
from cache.errors import UsageError
from tools.located import by_mount, expanded, read_list
from tools.option_kinds import format_size
from tools.options import Parser
from tools.status import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Show = Callable[[dict[str, Any]], None]

# The mover tells how far it is several times a second, but for while a lake that is away is waited for.
SILENCE_S = 600.0
_PART_BYTES = 1 << 20  # Of paths in one request: JSON makes up to six of a byte, and 16 MiB is the limit.
_ERRORS_SHOWN = 5
_SUMS = (
    "files",
    "bytes",
    "cached_files",
    "cached_bytes",
    "fetch_files",
    "fetch_bytes",
    "fetched_files",
    "fetched_bytes",
    "moved_files",
    "unfit_files",
    "unfit_bytes",
    "failed_files",
    "error_count",
    "seconds",
)


def main(argv: Sequence[str]) -> int:
    """Warm; 1 if something could not be, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    if not arguments.paths and arguments.from_list is None:
        raise UsageError("nothing is named; write `sluice warm PATH…` or `sluice warm --from-list FILE`")
    paths = expanded(arguments.paths)
    if arguments.from_list is not None:
        paths += read_list(arguments.from_list)
    total = fetch_each(by_mount(paths), "warm", quiet=arguments.json, tier=arguments.tier)
    if arguments.json:
        print(json.dumps(total, indent=2))
    else:
        print(summary(total))
    complain(total)
    return int(not total["complete"])


def _parser() -> Parser:
    parser = Parser(
        prog="sluice warm",
        description="Fetch files, all files below directories, and what fits patterns into the cache.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="in a mount; patterns with * may be quoted")
    parser.add_argument("--from-list", metavar="FILE", help="paths, one a line; - for standard input")
    parser.add_argument("--tier", choices=("dram", "nvme"), help="where to (default: as reads have it)")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def fetch_each(grouped: dict[Path, list[str]], verb: str, *, quiet: bool, **settings: Any) -> dict[str, Any]:
    """Have each mount carry out *verb*; return the sums, with absolute paths.

    Says on standard error what it takes before it starts, and draws a bar there if it is a terminal.
    """
    total: dict[str, Any] = {**dict.fromkeys(_SUMS, 0), "failures": [], "errors": [], "complete": True}
    for mountpoint, relative in grouped.items():
        told = _fetch(mountpoint, relative, verb, quiet, settings)
        for key in _SUMS:
            total[key] += told.get(key, 0)
        for item in told.get("failures", []):
            total["failures"].append({**item, "example": str(mountpoint / item["example"])})
        for item in told.get("errors", []):
            total["errors"].append({**item, "path": str(mountpoint / item["path"])})
        total.setdefault("pinned", []).extend(str(mountpoint / path) for path in told.get("pinned", []))
        total["complete"] &= told.get("complete", not told.get("error_count"))
    if verb == "warm":
        total.pop("pinned", None)
    return total


def _fetch(
    mountpoint: Path, relative: list[str], verb: str, quiet: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    parts = list(_parts(relative))
    arguments: dict[str, Any] = {"paths": parts[-1], **settings}
    if len(parts) > 1:
        if verb != "warm":
            raise UsageError(f"{len(relative):,} paths are too many; name directories")
        arguments["upload"] = secrets.token_hex(8)
        for part in parts[:-1]:
            control.call(mountpoint, "paths", timeout_s=SILENCE_S, upload=arguments["upload"], paths=part)
    with _Shown(quiet) as shown:
        told: dict[str, Any] = control.call(
            mountpoint, verb, on_progress=shown.show, timeout_s=SILENCE_S, **arguments
        )
    return told


def _parts(paths: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size_bytes = 0
    for path in paths:
        if size_bytes > _PART_BYTES:
            yield part
            part, size_bytes = [], 0
        part.append(path)
        size_bytes += len(path)
    yield part


class _Shown:
    """What a person sees meanwhile."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _Shown:
        if not self._quiet and sys.stderr.isatty():
            self._bar = _progress_bar()
            self._task = self._bar.add_task("looking what is there", total=None)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, told: dict[str, Any]) -> None:
        if told["phase"] == "plan" and not self._quiet:
            self._say([f"sluice: {line}" for line in plan_lines(told)])
        if self._bar is not None and self._task is not None and told["phase"] != "listing":
            files = f"{told['fetched_files']:,} of {told['fetch_files']:,} files"
            files += f", {told['moved_files']:,} moved" if told["moved_files"] else ""
            self._bar.update(
                self._task,
                completed=told["fetched_bytes"],
                total=told["fetch_bytes"],
                description=files + (f", {told['failed_files']:,} failed" if told["failed_files"] else ""),
            )

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            if self._bar is not None:  # It is redrawn below.
                self._bar.console.print(line, markup=False, highlight=False)
            else:
                print(line, file=sys.stderr)


def _progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, transient=True, console=Console(stderr=True))


def plan_lines(told: dict[str, Any]) -> list[str]:
    """Return what is said before anything is fetched."""
    lines = [
        f"{told['files']:,} files, {format_size(told['bytes'])}: {format_size(told['cached_bytes'])} are"
        f" cached, {told['fetch_files']:,} files, {format_size(told['fetch_bytes'])}, to fetch"
    ]
    if told["unfit_files"]:
        lines.append(
            f"{told['unfit_files']:,} files, {format_size(told['unfit_bytes'])}, do not fit in the tiers"
            " beside what has to stay there: they are left out"
        )
    return lines


def summary(total: dict[str, Any]) -> str:
    rate = format_size(int(total["fetched_bytes"] / total["seconds"])) if total["seconds"] > 0 else "0"
    text = f"fetched {total['fetched_files']:,} files, {format_size(total['fetched_bytes'])}"
    text += f", in {total['seconds']:.1f} s ({rate}/s)" if total["fetched_files"] else ""
    if total["moved_files"]:
        text += f"; moved {total['moved_files']:,} to the other tier"
    return f"{text}; {total['cached_files']:,} of {total['files']:,} were there"


def complain(total: dict[str, Any]) -> None:
    """Tell once, with counts, what could not be done."""
    for item in total["failures"]:
        text = f"{item['files']:,} files: {item['reason']} ({item['example']})"
        print(f"sluice: {printable(text)}", file=sys.stderr)
    for item in total["errors"][:_ERRORS_SHOWN]:
        print(f"sluice: {printable(item['path'])}: {item['error']}", file=sys.stderr)
    more = total["error_count"] - min(len(total["errors"]), _ERRORS_SHOWN)
    if more > 0:
        print(f"sluice: and {more:,} more like these", file=sys.stderr)
    if total["unfit_files"]:
        print(f"sluice: {total['unfit_files']:,} files did not fit in the tiers", file=sys.stderr)
