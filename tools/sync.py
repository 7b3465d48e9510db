"""`sluice sync`: waits until the lake has all that was written, and prints its receipts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cache import control
from cache.errors import UsageError
from tools.ls import by_mount, complain
from tools.option_kinds import format_size
from tools.options import Parser
from tools.status import own_mounts, printable

# The mover tells its progress every second, so this is for a mover that hangs.
SILENCE_S = 120.0


def main(argv: Sequence[str]) -> int:
    """Wait and print a line for each object; 1 if something could not be sent."""
    parser = Parser(
        prog="sluice sync",
        description="Wait until the lake has all that was written below the paths, and print receipts: what"
        " the lake acknowledged since the mount began.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="in a mount (default: all mounts)")
    parser.add_argument("--quiet", "-q", action="store_true", help="no receipts")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    wanted = by_mount(arguments.paths) if arguments.paths else {mount: [""] for mount in own_mounts()}
    if not wanted:
        raise UsageError("nothing is mounted; mount a lake with `sluice mount LAKE DIR`")
    told = [upload_all(mount, paths) for mount, paths in wanted.items()]
    receipts = [receipt for part in told for receipt in part["receipts"]]
    errors = [error for part in told for error in part["errors"]]
    if arguments.json:
        print(json.dumps({"receipts": receipts, "errors": errors}, indent=2))
    elif not arguments.quiet:
        for receipt in receipts:
            print(_line(receipt))
    complain(errors)
    return int(bool(errors))


def upload_all(mountpoint: Path, paths: list[str]) -> dict[str, Any]:
    """Return {"receipts", "errors"} once the lake has what is below *paths*, with absolute paths.

    Draws a progress bar where standard error is a terminal. Raises SluiceError.
    """
    call = _with_bar if sys.stderr.isatty() else _call
    told = call(mountpoint, paths)
    for key in ("receipts", "errors"):
        told[key] = [{**item, "path": str(mountpoint / item["path"])} for item in told[key]]
    return told


def _call(
    mountpoint: Path, paths: list[str], on_progress: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    told: dict[str, Any] = control.call(
        mountpoint, "sync", on_progress=on_progress, timeout_s=SILENCE_S, paths=paths
    )
    return told


def _with_bar(mountpoint: Path, paths: list[str]) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("to the lake"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)

        def show(told: dict[str, Any]) -> None:
            note = f"lake: {told['trouble']}" if told.get("trouble") else f"{told['left']} to go"
            progress.update(task, completed=told["done"], total=told["total"], description=printable(note))

        return _call(mountpoint, paths, show)


def _line(receipt: dict[str, Any]) -> str:
    checksum = f"  {receipt['checksum']}" if receipt.get("checksum") else ""
    return printable(f"{receipt['path']}  {format_size(receipt['size'])}  etag {receipt['etag']}{checksum}")
