"""The command `sluice`: finds the subcommand, and turns what goes wrong into one line and a status.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Subcommands are imported when they
are called, so that `sluice status` does not wait for what only `sluice mount` needs.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cache.errors import SluiceError, UsageError
from tools.options import closest


@dataclass(frozen=True, slots=True)
class Command:
    module: str  # Has main(argv) -> exit status.
    usage: str
    help: str


COMMANDS = {
    "mount": Command("tools.mount", "LAKE DIR", "mount s3://bucket[/prefix] or a directory"),
    "umount": Command("tools.umount", "DIR", "unmount, and keep the cache for the next time"),
    "status": Command("tools.status", "[DIR]", "what is mounted: tiers, hits, requests, features"),
    "ls": Command("tools.ls", "PATH…", "tier, cached share and hits of files, and what leaves next"),
    "sync": Command("tools.sync", "[PATH…]", "wait until the lake has it; prints receipts"),
    "queue": Command("tools.upload_queue", "[DIR]", "what waits for the lake, what failed and why"),
    "warm": Command("tools.warm", "PATH…", "fetch files into the cache before they are read"),
    "pin": Command("tools.pin", "PATH…", "keep files in the cache for good"),
    "unpin": Command("tools.unpin", "PATH…", "let them leave again"),
    "evict": Command("tools.evict", "PATH…", "drop files from the cache"),
    "hint": Command("tools.hint", "FILE [DIR]", "tell in which order samples will be read"),
    "trace": Command("tools.trace", "DIR FILE", "record what is read"),
    "simulate": Command("tools.simulate.command", "TRACE", "what other caches would have made of a trace"),
    "fsck": Command("tools.fsck", "DIR…", "check a cache directory that is not mounted; --repair"),
    "doctor": Command("tools.doctor", "[DIR]", "what this machine supports, and how to get the rest"),
    "bench": Command("tools.bench.__main__", "", "the benchmark suite"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Prints at most one line on standard error."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        return _complain(error, 2)
    except SluiceError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `sluice ls … | head`: nobody reads on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except SystemExit as end:  # argparse after --help.
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if logging.getLogger().handlers:  # Else logging would print the traceback for want of a log.
            logging.getLogger(__name__).exception("this should not have happened")
        return _complain(f"internal error, please report it: {type(error).__name__}: {error}", 1)


def _complain(error: object, status: int) -> int:
    text = " ".join(str(error).split("\n"))
    print(f"sluice: {text}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return status


def _dispatch(argv: list[str]) -> int:
    if not argv:
        raise UsageError(f"a command is missing; one of {', '.join(COMMANDS)} (see `sluice --help`)")
    if argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"sluice {version()}")
        return 0
    name, rest = ("mount", argv) if _is_fstab_form(argv) else (argv[0], argv[1:])
    if name not in COMMANDS:
        raise UsageError(f"{name!r} is not a command{closest(name, list(COMMANDS))} (see `sluice --help`)")
    module = importlib.import_module(COMMANDS[name].module)
    status: int = module.main(rest)
    sys.stdout.flush()  # So that a reader who went away is met here, not at exit.
    return status


def _is_fstab_form(argv: list[str]) -> bool:
    """Return whether this is `sluice SOURCE DIR -o …`, as mount.fuse3 runs it (mount.fuse3(8))."""
    if argv[0] in COMMANDS or argv[0].startswith("-") or len(argv) < 2:
        return False
    return "-o" in argv or "/" in argv[0]


def _help() -> str:
    lines = ["usage: sluice COMMAND …", "", "A data lake as a local directory, for AI training.", ""]
    lines += [f"  {f'{name} {command.usage}':<18} {command.help}" for name, command in COMMANDS.items()]
    lines += ["", "`sluice COMMAND --help` tells the options; `sluice --version` the version."]
    return "\n".join(lines)


def version() -> str:
    from sluicefs import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
