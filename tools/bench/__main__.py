"""`sluice bench`: run the benchmarks, print a table, and write the results as JSON on request."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cache.errors import SluiceError
from tools.bench import (
    checkpoint,
    cold_epoch,
    epoch_bytes,
    find,
    large_hits,
    namespace_memory,
    opens,
    order_found,
    order_known,
    sequential,
    set_ahead,
    small_writes,
    warm_epochs,
    watching,
)
from tools.bench.figures import Figure, MeasurementFailed, machine, progress, table
from tools.bench.settings import Settings
from tools.mounted import MountFailed
from tools.servers import ServerError

BENCHMARKS: dict[str, Callable[[Settings], list[Figure]]] = {
    module.NAME: module.measure
    for module in (
        warm_epochs,
        watching,
        opens,
        large_hits,
        cold_epoch,
        set_ahead,
        epoch_bytes,
        sequential,
        find,
        namespace_memory,
        order_found,
        order_known,
        checkpoint,
        small_writes,
    )
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="sluice bench",
        description="Measure SluiceFS against its baselines, in alternating rounds. "
        f"The benchmarks: {', '.join(BENCHMARKS)}. At full scale they take 15 GB of disk.",
    )
    made.add_argument("--only", action="append", choices=list(BENCHMARKS), help="run this one (repeatable)")
    made.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds each (default: 5)")
    made.add_argument("--scale", type=float, default=1.0, metavar="F", help="factor for counts and sizes")
    made.add_argument("--workdir", type=Path, metavar="DIR", help="where files go (default: temporary)")
    made.add_argument("--mount-options", default="", metavar="TEXT", help="more words for `sluice mount`")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    made.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    return made


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and return the exit status. Raises SluiceError when one could not run."""
    arguments = parser().parse_args(argv)
    if arguments.rounds < 1 or arguments.scale <= 0:
        parser().error("--rounds and --scale must be positive")
    signal.signal(signal.SIGTERM, _terminate)
    work = Path(tempfile.mkdtemp(prefix="sluice-bench-", dir=arguments.workdir)).resolve()
    settings = Settings(work, arguments.scale, arguments.rounds, tuple(shlex.split(arguments.mount_options)))
    figures: list[Figure] = []
    try:
        for name in arguments.only or BENCHMARKS:
            figures += BENCHMARKS[name](settings)
            _write_json(arguments, figures)
    except (MeasurementFailed, MountFailed, RuntimeError, ServerError) as error:
        raise SluiceError(f"{type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if figures:
            print(table(figures), flush=True)
    missed = [figure.name for figure in figures if not figure.is_met]
    if missed:
        progress(f"missed: {', '.join(missed)}")
    return 1 if missed and arguments.check else 0


def _write_json(arguments: argparse.Namespace, figures: Sequence[Figure]) -> None:
    if arguments.json is None:
        return
    settings = {name: arguments.__dict__[name] for name in ("rounds", "scale", "mount_options")}
    results = {
        "machine": machine(),
        "settings": settings,
        "figures": [figure.to_json() for figure in figures],
    }
    arguments.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SluiceError as failure:
        sys.exit(f"sluice bench: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
