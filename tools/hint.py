"""`sluice hint`: tells a mount the order in which the coming epoch reads its samples."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import control
from cache.errors import SluiceError, UsageError
from tools.options import Parser
from tools.status import find_mount, printable

if TYPE_CHECKING:  # It needs numpy: imported when the command runs.
    from cache.policy.order.told import Hint

_PART_BYTES = 4 << 20  # Of paths, in one request: 16 MiB is the limit, and JSON makes six of one byte.
_PART_NUMBERS = 400_000
_FILE_BYTES_MAX = 4 << 30


def main(argv: Sequence[str]) -> int:
    """Tell; 0 when any of it is of use. What is not is told in one line on standard error."""
    arguments = _parser().parse_args(argv)
    hint = _read(arguments.file)
    told = _tell(hint, arguments.file, arguments.directory)
    useless = dict(hint.useless)
    if told["missing"]:
        useless["are not in the mount"] = told["missing"]
    if arguments.json:
        print(json.dumps({**told, "useless": useless}, indent=2))
    else:
        print(_summary(hint, told))
    _complain(arguments.file, hint, told, useless)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="sluice hint",
        description="Tell the order in which the next epoch reads its samples: FILE holds paths, one a"
        " line, or places in the listing of DIR, or sampler=torch seed=0 (see the README).",
    )
    parser.add_argument("file", metavar="FILE", help="the hint; - for standard input")
    parser.add_argument(
        "directory", nargs="?", metavar="DIR", help="what relative paths, places and samplers are about"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def _read(file: str) -> Hint:
    """Return what FILE says. Raises UsageError that names it."""
    from cache.policy.order.told import parse

    try:
        if file == "-":
            return parse(sys.stdin.buffer.read(_FILE_BYTES_MAX))
        with open(file, "rb") as opened:
            return parse(opened.read(_FILE_BYTES_MAX))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _tell(hint: Hint, file: str, directory: str | None) -> dict[str, Any]:
    """Return {"directory", "files", "missing", "examples"}: what the mount could use."""
    if directory is None and hint.directory is not None:
        directory = os.fsdecode(hint.directory)
    if directory is None and (hint.sampler is not None or hint.indices):
        raise UsageError(f"{file}: a sampler or places need the directory, too: sluice hint {file} DIR")
    base = Path(directory) if directory is not None else _common_directory(hint.paths, file)
    mountpoint, relative = find_mount(str(base))
    answer: dict[str, Any] = {}
    for part in _parts(hint, mountpoint, relative):
        answer = control.call(mountpoint, "hint", timeout_s=600.0, directory=relative, **part)
    return {"directory": str(base), **answer}


def _common_directory(paths: list[bytes], file: str) -> Path:
    if not all(path.startswith(b"/") for path in paths):
        raise UsageError(f"{file}: relative paths need their directory, too: sluice hint {file} DIR")
    return Path(os.fsdecode(os.path.commonpath([os.path.dirname(path) for path in paths])))


def _parts(hint: Hint, mountpoint: Path, relative: str) -> Iterator[dict[str, Any]]:
    """Yield the requests' arguments; the last one says so."""
    if hint.sampler is not None:
        yield {"sampler": asdict(hint.sampler)}
        return
    upload = secrets.token_hex(8)
    parts = _parts_of_numbers(hint) if hint.indices else _parts_of_paths(hint.paths, mountpoint, relative)
    held: dict[str, Any] | None = None
    for part in parts:
        if held is not None:
            yield {**held, "upload": upload, "last": False}
        held = part
    yield {**(held or {}), "upload": upload, "last": True}


def _parts_of_numbers(hint: Hint) -> Iterator[dict[str, Any]]:
    for start in range(0, len(hint.indices), _PART_NUMBERS):
        yield {"indices": hint.indices[start : start + _PART_NUMBERS].tolist()}


def _parts_of_paths(paths: list[bytes], mountpoint: Path, relative: str) -> Iterator[dict[str, Any]]:
    root, below = os.fsencode(mountpoint) + b"/", os.fsencode(relative) + b"/" if relative else b""
    part: list[str] = []
    size_bytes = 0
    for path in paths:
        if path.startswith(root):
            path = path[len(root) :]
        elif not path.startswith(b"/"):
            path = below + path.removeprefix(b"./")
        part.append(os.fsdecode(path))
        size_bytes += len(path)
        if size_bytes > _PART_BYTES // 2:
            yield {"paths": part}
            part, size_bytes = [], 0
    if part:
        yield {"paths": part}


def _summary(hint: Hint, told: dict[str, Any]) -> str:
    if hint.sampler is not None:
        sampler = f"{hint.sampler.family} with seed {hint.sampler.seed}"
        return f"{told['directory']}: {sampler}, in this epoch and the next ones"
    return f"{told['directory']}: the order of {told['files']:,} files"


def _complain(file: str, hint: Hint, told: dict[str, Any], useless: dict[str, int]) -> None:
    said = []
    if useless:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in useless.items())
        said += [
            f"lines of no use: {counts}" + "".join(f" ({printable(one)})" for one in told["examples"][:1])
        ]
    if hint.count is not None and hint.sampler is None and hint.count != told["files"]:
        said += [f"the first line says {hint.count:,} files, of use are {told['files']:,}"]
    if said:
        print(f"sluice: {file}: {'; '.join(said)}", file=sys.stderr)
    if not told["files"] and hint.sampler is None:
        raise SluiceError(f"{file}: nothing of it could be used")
