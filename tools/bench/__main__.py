"""`sluice bench`: run the benchmarks, print a table, and write the results as JSON and HTML on request."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from cache.errors import SluiceError, UsageError
from tools.bench import (
    bursts,
    checkpoint,
    cold,
    cold_epoch,
    epoch_bytes,
    find,
    large_hits,
    larger,
    mapped_load,
    metadata,
    namespace_memory,
    opens,
    order_found,
    order_known,
    random_records,
    report,
    sequential,
    set_ahead,
    shards,
    small_writes,
    warm_epochs,
    watching,
)
from tools.bench.figures import Figure, MeasurementFailed, machine, progress
from tools.bench.peers.install import default_directory, install
from tools.bench.peers.recipes import PEERS
from tools.bench.settings import Settings
from tools.mounted import MountFailed
from tools.options import Parser, check_output, closest
from tools.servers import ServerError

MODULES: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        large_hits,
        opens,
        warm_epochs,
        bursts,
        cold,
        larger,
        metadata,
        small_writes,
        checkpoint,
        cold_epoch,
        set_ahead,
        shards,
        epoch_bytes,
        sequential,
        mapped_load,
        random_records,
        find,
        namespace_memory,
        order_found,
        order_known,
        watching,
    )
}
# Where peers take part.
CONTESTS = (large_hits, opens, bursts, cold, larger, metadata, small_writes)
BENCHMARKS: dict[str, Callable[[Settings], list[Figure]]] = {
    name: module.measure for name, module in MODULES.items()
}
ROUNDS_MAX = 1000
SCALE_MAX = 100.0


def parser() -> Parser:
    made = Parser(
        prog="sluice bench",
        description="Measure SluiceFS against its baselines, in alternating rounds. At full scale this takes"
        " 20 GB of disk, and with peers 40 GB and hours.",
    )
    made.add_argument("--list", action="store_true", help="print the benchmarks, and run none")
    made.add_argument("--only", action="append", metavar="NAME", help="run this one (repeatable)")
    made.add_argument("--rounds", default="5", metavar="N", help="rounds each (default: 5)")
    made.add_argument("--scale", default="1", metavar="F", help="factor for counts and sizes (default: 1)")
    made.add_argument(
        "--peers",
        nargs="?",
        const=",".join(PEERS),
        metavar="NAMES",
        help=f"install and measure other file systems, too: all of {','.join(PEERS)}, or some of these",
    )
    made.add_argument(
        "--peers-dir", type=Path, metavar="DIR", help="where their programs are kept (default: ~/.cache/…)"
    )
    made.add_argument("--workdir", type=Path, metavar="DIR", help="where files go (default: temporary)")
    made.add_argument("--mount-options", default="", metavar="TEXT", help="more words for `sluice mount`")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    made.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots there, too")
    made.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and return the exit status. Raises SluiceError when one could not run."""
    arguments = parser().parse_args(argv)
    if arguments.list:
        print(listing())
        return 0
    check(arguments)
    names = arguments.only or list(MODULES)
    _end_in_order()
    work = Path(tempfile.mkdtemp(prefix="sluice-bench-", dir=arguments.workdir)).resolve()
    figures: list[Figure] = []
    settings = Settings(work, arguments.scale, arguments.rounds, tuple(arguments.mount_options))
    try:
        settings = _with_peers(settings, arguments)
        for name in names:
            figures += BENCHMARKS[name](settings)
            _write(arguments, settings, figures)
    except (MeasurementFailed, MountFailed, RuntimeError, ServerError) as error:
        raise SluiceError(f"{type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if figures:
            print(report.text(figures, settings.complaints), flush=True)
    missed = [figure.name for figure in figures if not figure.is_met]
    if missed:
        progress(f"missed: {', '.join(missed)}")
    return 1 if missed and arguments.check else 0


def listing() -> str:
    """Return a line for each benchmark: its name, and what it is."""
    lines = []
    for name, module in MODULES.items():
        about = (module.__doc__ or "").splitlines()[0]
        lines.append(f"{name:<18}{about}{' (--peers)' if module in CONTESTS else ''}")
    return "\n".join(lines)


def check(arguments: argparse.Namespace) -> None:
    """Turn the words of *arguments* into values. Raises UsageError before anything is done."""
    arguments.rounds = int(_number("--rounds", arguments.rounds, 1, ROUNDS_MAX, whole=True))
    arguments.scale = _number("--scale", arguments.scale, 0, SCALE_MAX, whole=False)
    for name in arguments.only or ():
        if name not in MODULES:
            raise UsageError(f"--only {name}: no such benchmark{closest(name, list(MODULES))} (see --list)")
    arguments.peers = _peers(arguments.peers)
    try:
        arguments.mount_options = shlex.split(arguments.mount_options)
    except ValueError as error:
        raise UsageError(f"--mount-options {arguments.mount_options}: {error}") from error
    if arguments.workdir is not None and not arguments.workdir.is_dir():
        raise UsageError(f"--workdir {arguments.workdir}: must be a directory that exists")
    for option in ("json", "html"):
        if (path := getattr(arguments, option)) is not None:
            check_output(f"--{option}", path)


def _number(option: str, text: str, least: float, most: float, *, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not (least <= value <= most and value > 0):
        wanted = f"a whole number from {least} to {most}" if whole else f"a number above 0, up to {most:g}"
        raise UsageError(f"{option} {text}: must be {wanted}")
    return value


def _peers(text: str | None) -> tuple[str, ...]:
    names = tuple(filter(None, (text or "").split(",")))
    if text is not None and not names:
        raise UsageError(f"--peers {text!r}: must name some of {', '.join(PEERS)}, or be given without names")
    for name in names:
        if name not in PEERS:
            raise UsageError(
                f"--peers {name}: no such peer{closest(name, list(PEERS))}; one of {', '.join(PEERS)}"
            )
    return names


def _end_in_order() -> None:
    """Have each signal that asks us to end unmount everything first; under nohup a hang-up is none."""
    signal.signal(signal.SIGINT, _interrupt)  # A shell's background jobs are born with it ignored.
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _with_peers(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """Return *settings* with those of the peers that could be installed."""
    if not arguments.peers:
        return settings
    programs = (arguments.peers_dir or default_directory()).resolve()
    found = install(arguments.peers, programs, settings.complain)
    return replace(settings, peers=tuple(found), programs=programs)


def _write(arguments: argparse.Namespace, settings: Settings, figures: Sequence[Figure]) -> None:
    """Write what there is so far: a run that is ended has its results up to there."""
    about = machine(settings.work)
    if arguments.html is not None:
        arguments.html.write_text(
            report.page(figures, settings.complaints, about, settings.commands), "utf-8"
        )
    if arguments.json is None:
        return
    results = {
        "machine": about,
        "settings": {
            "rounds": settings.rounds,
            "scale": settings.scale,
            "mount_options": shlex.join(settings.mount_options),
            "peers": list(settings.peers),
        },
        "figures": [figure.to_json() for figure in figures],
        "not_measured": settings.complaints,
        "commands": settings.commands,
    }
    arguments.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    from tools import cli

    sys.exit(cli.main(["bench", *sys.argv[1:]]))
