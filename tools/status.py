"""`sluice status`: what is mounted and how it does. Also finds mounts for the other commands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import control
from cache.errors import SluiceError, UsageError
from tools.option_kinds import format_size
from tools.options import Parser

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOUNTINFO = Path("/proc/self/mountinfo")
FILESYSTEM_TYPE = "fuse.sluice"
_PIPED_COLUMNS = 160  # Rich would fold tables to 80 columns when nobody looks at them.
_BAR_CELLS = 20


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    mountpoint: Path
    filesystem_type: str
    uid: int | None  # Who mounted it, for FUSE.

    @property
    def is_ours(self) -> bool:
        return self.filesystem_type == FILESYSTEM_TYPE


def all_mounts() -> list[Mount]:
    """Return every mount that can be reached: where several are stacked, the topmost."""
    topmost: dict[Path, Mount] = {}
    for line in os.fsdecode(MOUNTINFO.read_bytes()).splitlines():
        fields, _, tail = line.partition(" - ")
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields.split(" ")[4])
        filesystem_type, _, options = tail.partition(" ")
        uid = re.search(r"\buser_id=(\d+)", options)
        topmost[Path(path)] = Mount(Path(path), filesystem_type, int(uid[1]) if uid else None)
    return list(topmost.values())


def own_mounts() -> list[Path]:
    """Return the mount points of this user's SluiceFS mounts."""
    return [m.mountpoint for m in all_mounts() if m.is_ours and m.uid in (None, os.geteuid())]


def find_mount(path: str) -> tuple[Path, str]:
    """Return the mount that holds *path*, and the path below its root ("" is the root).

    A symlink that is the last part of *path* is not followed if it lies in a mount: it is meant
    itself. Raises UsageError when *path* is in no SluiceFS mount.
    """
    mounts = {mount.mountpoint: mount for mount in all_mounts()}
    parent, name = os.path.split(os.path.abspath(path))
    for candidate in (Path(os.path.realpath(parent), name), Path(os.path.realpath(path))):
        for ancestor in (candidate, *candidate.parents):
            mount = mounts.get(ancestor)
            if mount is not None and mount.is_ours:
                relative = candidate.relative_to(ancestor)
                return ancestor, "" if relative == Path(".") else str(relative)
            if mount is not None:
                break  # Another file system lies between.
    raise UsageError(f"{path}: not in a SluiceFS mount; `sluice status` lists the mounts")


def console() -> Console:
    from rich.console import Console

    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=_PIPED_COLUMNS)


def printable(text: str) -> str:
    """Return *text* with what would disturb a terminal written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="sluice status", description="Show this user's mounts, or one of them.")
    parser.add_argument("directory", nargs="?", metavar="DIR", help="any path in a mount")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    if arguments.directory is not None:
        status = control.call(find_mount(arguments.directory)[0], "status")
        _show([status], json_value=status if arguments.json else None)
        return 0
    found = [_status_or_error(mountpoint) for mountpoint in own_mounts()]
    _show(found, json_value=found if arguments.json else None)
    return int(any("error" in status for status in found))


def _status_or_error(mountpoint: Path) -> dict[str, Any]:
    try:
        status: dict[str, Any] = control.call(mountpoint, "status")
        return status
    except SluiceError as error:
        return {"mountpoint": str(mountpoint), "error": str(error)}


def _show(found: list[dict[str, Any]], *, json_value: Any) -> None:
    if json_value is not None:
        print(json.dumps(json_value, indent=2))
    elif not found:
        print("nothing is mounted")
    else:
        out = console()
        for status in found:
            out.print(_table(status))


def _table(status: dict[str, Any]) -> Table:
    """Return one mount as rows of name and value. A key that is missing is a row less."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(printable(str(status.get("mountpoint", "")))), show_header=False, title_justify="left"
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(status):
        table.add_row(name, Text(printable(value)))
    return table


def _rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(key, str(status[key])) for key in ("error", "lake", "profile") if status.get(key)]
    if (uptime_s := status.get("uptime_s")) is not None:
        rows.append(("uptime", _duration(float(uptime_s))))
    if processes := status.get("processes"):
        rows.append(("processes", _processes(processes)))
    for tier in status.get("tiers", []):
        rows.append((f"tier {tier.get('name', '')}", _tier(tier)))
    if by_source := status.get("reads", {}).get("bytes_by_source"):
        rows.append(("read from", _reads(by_source, status["reads"])))
    if lake_io := status.get("lake_io"):
        rows.append(("lake traffic", _lake_io(lake_io)))
    rows += [(f"set {shown.get('path', '')}", _set(shown)) for shown in status.get("sets", [])]
    if (pins := status.get("pins")) and pins.get("paths"):
        rows.append(
            ("pinned", f"{', '.join(pins['paths'])}: {format_size(pins.get('bytes', 0))} of the disks")
        )
    rows += [("warming", _warming(job)) for job in status.get("warming", [])]
    if dirty_bytes := status.get("dirty_bytes"):
        rows.append(("not uploaded", format_size(dirty_bytes)))
    rows += [(f"feature {name}", _feature(value)) for name, value in status.get("features", {}).items()]
    return rows


def _duration(seconds: float) -> str:
    minutes, _ = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days or hours:
        return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


def _processes(processes: dict[str, Any]) -> str:
    workers = ", ".join(str(pid) for pid in processes.get("workers") or []) or "none"
    others = (
        f"{role} {processes[role]}, " for role in ("supervisor", "mover", "notifier") if processes.get(role)
    )
    return f"{''.join(others)}workers {workers}"


def _tier(tier: dict[str, Any]) -> str:
    used, size = tier.get("used_bytes") or 0, tier.get("size_bytes") or 0
    share = min(1.0, used / size) if size else 0.0
    bar = "█" * round(share * _BAR_CELLS)
    amount = f"{format_size(used)} of {format_size(size)} ({share:.0%}), {tier.get('objects', 0)} objects"
    return f"{bar:░<{_BAR_CELLS}} {amount}, {tier.get('path', '')}"


def _lake_io(lake_io: dict[str, Any]) -> str:
    requests = ", ".join(f"{verb} {count}" for verb, count in lake_io.get("requests", {}).items() if count)
    fetched, sent = (format_size(lake_io.get(key, 0)) for key in ("bytes_fetched", "bytes_sent"))
    return f"{fetched} fetched, {sent} sent; requests: {requests or 'none'}"


def _reads(by_source: dict[str, int], reads: dict[str, Any]) -> str:
    text = ", ".join(f"{name} {format_size(size)}" for name, size in by_source.items())
    if (hit_rate := reads.get("hit_rate")) is not None:
        text += f": {hit_rate:.1%} hits"
    if waits := reads.get("waits"):
        text += f"; {waits:,} reads waited {reads.get('wait_s', 0.0):.1f} s in all"
    return text


def _warming(job: dict[str, Any]) -> str:
    done, total = (format_size(job.get(key, 0)) for key in ("fetched_bytes", "fetch_bytes"))
    left_s = job.get("left_s")
    return f"{done} of {total}" + (f", {_duration(left_s)} left" if left_s is not None else "")


def _set(shown: dict[str, Any]) -> str:
    used, cached = (shown.get(key, 0.0) for key in ("used_share", "cached_share"))
    wasted_bytes = shown.get("wasted_bytes", 0)
    return (
        f"epoch {shown.get('epoch')}, {used:.0%} used, {cached:.0%} cached"
        f" of {shown.get('files', 0):,} files, {format_size(shown.get('bytes', 0))};"
        f" {shown.get('pattern')}, order {shown.get('order')}; read-ahead: {shown.get('read_ahead')}"
        + (f", {format_size(wasted_bytes)} wasted" if wasted_bytes else "")
        + _hits(shown)
        + (f"; read amplification {ratio:.2f}" if (ratio := shown.get("amplification")) else "")
    )


def _hits(shown: dict[str, Any]) -> str:
    if (hit_rate := shown.get("hit_rate")) is None:
        return ""
    return f"; {hit_rate:.1%} hits in this epoch, readers waited {shown.get('waited_s', 0.0):.1f} s"


def _feature(value: Any) -> str:
    """Return "on" or "off: reason" for the shapes a feature is told in: {"on", "reason"}, text or bool."""
    if isinstance(value, dict):
        state, reason = bool(value.get("on")), value.get("reason")
        return ("on" if state else "off") + (f": {reason}" if reason else "")
    return str(value) if not isinstance(value, bool) else ("on" if value else "off")
