"""`sluice simulate`: what other sizes and policies would have given."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache.config import parse_size
from cache.errors import UsageError
from tools.option_kinds import format_size
from tools.options import Parser, check_output
from tools.simulate.caches import NAMES
from tools.simulate.replay import Lake, Outcome, replay_all
from tools.simulate.synthetic import KINDS
from tools.simulate.trace import Trace, TraceWriter, read_trace
from tools.status import console

_SHARES = ("10%", "20%", "50%", "80%")
_FILES, _PASSES, _SIZE_BYTES = 2000, 5, 110_000  # Of a generated trace.


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.plot is not None:
        check_output("--plot", Path(arguments.plot))
    if arguments.generate is not None:
        check_output("TRACE", Path(arguments.trace))
        _generate(arguments.generate, arguments.trace)
        return 0
    if not 0 <= arguments.latency < 3600:
        raise UsageError(f"--latency {arguments.latency:g}: must be from 0 to 3600 seconds")
    lake = Lake(arguments.latency, _bandwidth_bytes(arguments.bandwidth))
    trace = read_trace(arguments.trace)
    _complain(trace, arguments.trace)
    sizes = sorted({_size_bytes(text, trace) for text in arguments.size or _SHARES})
    outcomes = list(replay_all(trace, arguments.policy or NAMES, sizes, lake))
    _show(trace, outcomes, as_json=arguments.json)
    if arguments.plot is not None:
        from tools.simulate.plot import page

        Path(arguments.plot).write_text(page(outcomes, f"{arguments.trace}: {len(trace):,} uses"), "utf-8")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="sluice simulate", description="Replay a trace over other caches.")
    parser.add_argument("trace", metavar="TRACE", help="recorded by `sluice trace`")
    parser.add_argument(
        "--size", action="append", metavar="SIZE", help="of the cache: 100G, or 20%% of what was read"
    )
    parser.add_argument("--policy", action="append", choices=NAMES, help="(default: all)")
    parser.add_argument(
        "--latency", type=float, default=0.02, metavar="SECONDS", help="to the first byte (default: 0.02)"
    )
    parser.add_argument(
        "--bandwidth", default="1G", metavar="SIZE", help="bytes a second from the lake (default: 1G)"
    )
    parser.add_argument("--plot", metavar="FILE", help="write an HTML page with drawings")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--generate", choices=sorted(KINDS), help="write a made-up TRACE, and no more")
    return parser


def _size_bytes(text: str, trace: Trace) -> int:
    try:
        size = float(text[:-1]) / 100 * trace.distinct_bytes if text.endswith("%") else parse_size(text)
    except ValueError:
        size = 0
    if not 1 <= size < 2**63:
        raise UsageError(f"--size {text}: must be a size, like 100G, or a share of what was read, like 20%")
    return int(size)


def _bandwidth_bytes(text: str) -> int:
    try:
        bandwidth_bytes = parse_size(text)
    except ValueError:
        bandwidth_bytes = 0
    if bandwidth_bytes < 1:
        raise UsageError(f"--bandwidth {text}: must be the bytes of a second, like 1G")
    return bandwidth_bytes


def _complain(trace: Trace, path: str) -> None:
    wrong = [f"{trace.skipped:,} lines are no uses"] if trace.skipped else []
    wrong += ["it is cut off"] if trace.is_cut_off else []
    if wrong:
        print(f"sluice: {path}: {' and '.join(wrong)}; {len(trace):,} uses are replayed", file=sys.stderr)


def _show(trace: Trace, outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    if as_json:
        told: dict[str, Any] = {
            "uses": len(trace),
            "items": len(trace.sizes_bytes),
            "distinct_bytes": trace.distinct_bytes,
            "is_cut_off": trace.is_cut_off,
            "skipped": trace.skipped,
            "outcomes": [{**asdict(one), "hit_rate": one.hit_rate} for one in outcomes],
        }
        print(json.dumps(told, indent=2))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("cache", "share", "policy", "hits", "fetched", "readers wait"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for one in outcomes:
        table.add_row(
            format_size(one.size_bytes),
            f"{one.share:.0%}",
            one.policy,
            f"{one.hit_rate:.1%}",
            format_size(one.fetched_bytes),
            f"{one.wait_s:,.1f} s",
        )
    console().print(table)


def _generate(kind: str, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        writer = TraceWriter(file, "", 0.0)
        writer.add(KINDS[kind](_FILES, _PASSES, _SIZE_BYTES))
        writer.finish()
    print(f"{path}: {writer.uses:,} uses of {_FILES:,} files of {format_size(_SIZE_BYTES)}")
