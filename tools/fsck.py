"""`sluice fsck`: reads all of a cache directory that is not mounted, and says what is wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from cache.checking import Checker, Report, directories_of
from cache.store import note_owner, open_to_check
from tools.option_kinds import format_size
from tools.options import Parser


def main(argv: Sequence[str]) -> int:
    """Check, and mend if asked; 1 if a fault is left."""
    parser = Parser(prog="sluice fsck", description="Check the cache of a lake that is not mounted.")
    parser.add_argument("directories", nargs="+", metavar="DIR", help="as --cache had them, in that order")
    parser.add_argument("--repair", action="store_true", help="mend what can be; else nothing is changed")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    store = open_to_check(directories_of(arguments.directories))
    note_owner(store, f"checked by `sluice fsck`, process {os.getpid()}")
    try:
        report = Checker(store, repair=arguments.repair).run()
    finally:
        store.release()
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _show(report)
    return int(report.mended < len(report.faults))


def _show(report: Report) -> None:
    for line in report.faults:
        print(f"sluice: {line}", file=sys.stderr)
    for line in report.notes:
        print(line)
    print(
        f"checked {report.changes:,} changes that the lake has not got, {report.staging_files:,} staging"
        f" files, {report.objects:,} cached objects, {format_size(report.object_bytes)}: {_verdict(report)}"
    )


def _verdict(report: Report) -> str:
    if not report.faults:
        return "no fault"
    count = f"{len(report.faults)} fault{'s' if len(report.faults) > 1 else ''}"
    return f"{count}, mended" if report.mended else f"{count}; `sluice fsck --repair` mends what can be"
