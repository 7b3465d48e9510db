"""A mount made with the `sluice` command, as a user makes it: for the demo, the benchmarks and tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

COMMAND_TIMEOUT_S = 120.0


class MountFailed(RuntimeError):
    """A `sluice` command failed. The text holds the command and what it said."""


def sluice_command() -> str:
    """Return the path of `sluice`: the one beside this Python, else that on PATH. Raises MountFailed."""
    beside = Path(sys.executable).parent / "sluice"
    found = str(beside) if beside.exists() else shutil.which("sluice")
    if found is None:
        raise MountFailed("the command `sluice` is not installed; get it with: pip install .")
    return found


class Mounted:
    """`sluice mount` of *lake* on *directory* with *options*. Mounts on entry, unmounts on exit.

    It may be mounted and unmounted any number of times in between. *environment* is added to
    this process's own. The directory is made when absent; neither it nor the cache is removed.
    """

    def __init__(
        self,
        lake: str,
        directory: Path,
        cache: Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.cache = cache
        self._lake = lake
        self._options = [f"--cache={cache}", *options] if not _names_cache(options) else list(options)
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Self:
        self.mount()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.unmount_if_mounted(lazy=kind is not None)

    def mount(self) -> None:
        """Mount it; returns when it answers. Raises MountFailed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sluice("mount", self._lake, str(self.directory), *self._options)

    def unmount(self) -> None:
        self._sluice("umount", str(self.directory))

    def unmount_if_mounted(self, *, lazy: bool = False) -> None:
        """Leave nothing mounted, whatever happened before. *lazy*: what is not sent waits for nobody."""
        if not os.path.ismount(self.directory):
            return
        try:
            if lazy:  # The lake may be gone.
                self._sluice("umount", "--lazy", str(self.directory))
            else:
                self.unmount()
        except (MountFailed, subprocess.TimeoutExpired) as error:
            print(f"{error}; unmounting by force", file=sys.stderr)
            subprocess.run(["fusermount3", "-u", "-z", str(self.directory)], check=False)

    def status(self) -> dict[str, Any]:
        """Return what `sluice status --json` prints for it."""
        status: dict[str, Any] = json.loads(self._sluice("status", "--json", str(self.directory)))
        return status

    def ls(self, *paths: str) -> list[dict[str, Any]]:
        """Return the entries that `sluice ls --json` prints for *paths*."""
        entries: list[dict[str, Any]] = json.loads(self._sluice("ls", "--json", *paths))["entries"]
        return entries

    def pids(self) -> dict[str, list[int]]:
        """Return the processes of the mount by role: supervisor, workers, mover, notifier."""
        processes = self.status()["processes"]
        return {
            role: pids if isinstance(pids, list) else [pids]
            for role, pids in processes.items()
            if pids is not None
        }

    def log_tail(self, lines: int = 10) -> str:
        log = self.cache / "log"
        return "\n".join(log.read_text("utf-8", "replace").splitlines()[-lines:]) if log.exists() else ""

    def _sluice(self, *arguments: str) -> str:
        done = subprocess.run(
            [sluice_command(), *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise MountFailed(f"`sluice {' '.join(arguments)}` failed: {done.stderr.strip()}")
        return done.stdout


def _names_cache(options: Sequence[str]) -> bool:
    return any(option == "--cache" or option.startswith("--cache=") for option in options)
