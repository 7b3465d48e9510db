"""A peer's daemon: started in the foreground, fed, asked, and ended by its process id, whatever happens."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tools.bench.costs import disk_bytes, with_descendants
from tools.bench.figures import MeasurementFailed
from tools.bench.peers.recipes import PEERS, Recipe, Request
from tools.servers import end_with_parent

COMMAND_S = 60.0
MOUNTED_S = 60.0
ENDED_S = 20.0
SENT_S = 600.0
LOAD_THREADS = 8
_POLL_S = 0.02


class PeerSide:
    """One peer on its mountpoint. Made by `mounted_peer`, which ends it."""

    kind: Literal["peer"] = "peer"

    def __init__(self, name: str, request: Request, recipe: Recipe) -> None:
        self.name = name
        self.directory = request.mountpoint
        self._request = request
        self._recipe = recipe
        self._log = request.home / "log"
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> str:
        """Return how it is mounted, for a shell; secrets are in files and in the environment only."""
        return shlex.join(self._recipe.mount)

    def pids(self) -> Sequence[int]:
        assert self._daemon is not None, "not mounted"
        return with_descendants([self._daemon.pid])

    def forget(self) -> None:
        """Mount it anew with an empty cache. Raises MeasurementFailed."""
        self.end()
        shutil.rmtree(self._request.cache, ignore_errors=True)
        self.start(self._recipe.mount)

    def settle(self) -> None:
        """Wait until it says that nothing is unsent. Raises MeasurementFailed."""
        if self._recipe.unsent:
            self._wait(self._is_sent, SENT_S, "sent everything")

    def _is_sent(self) -> bool:
        said = self._run(self._recipe.unsent)
        try:
            return self._recipe.is_sent(said)
        except (KeyError, ValueError) as error:
            raise MeasurementFailed(f"does not say what is unsent: {said[:200]!r}") from error

    def prepare(self, tree: Path | None) -> None:
        """Run what comes before the first mount; copy *tree* in if it must go through the peer itself."""
        for name, text in self._recipe.files.items():
            path = self._request.home / name
            path.touch(0o600)
            path.write_text(text)
        for command in self._recipe.prepare:
            self._run(command)
        if tree is not None and self._recipe.load:
            self.start(self._recipe.load)
            copy_tree(tree, self.directory)
            self.settle()
            self.end()
            shutil.rmtree(self._request.cache, ignore_errors=True)

    def clean_up(self) -> None:
        """Undo `prepare`. Never raises."""
        for command in self._recipe.clean_up:
            with contextlib.suppress(MeasurementFailed, OSError, subprocess.SubprocessError):
                self._run(command)

    def cache_bytes(self) -> int:
        return disk_bytes(self._request.cache)

    def start(self, command: Sequence[str]) -> None:
        """Start the daemon and wait until it has mounted. Raises MeasurementFailed; `end` it all the same."""
        self._request.cache.mkdir(exist_ok=True)
        self.directory.mkdir(exist_ok=True)
        with self._log.open("ab") as log:
            self._daemon = subprocess.Popen(
                command,
                cwd=self._request.home,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, who end it in order.
                preexec_fn=end_with_parent,
            )
        self._wait(lambda: os.path.ismount(self.directory), MOUNTED_S, "mounted")

    def end(self) -> None:
        """Unmount it and see its processes end. Never raises, and may be called at any time."""
        daemon, self._daemon = self._daemon, None
        if daemon is None:
            return
        pids = with_descendants([daemon.pid])
        unmount(self.directory)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(ENDED_S)
        for pid in pids:
            if (
                pid == daemon.pid or _session(pid) == daemon.pid
            ):  # Ended ones may have given their number away.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        daemon.wait()
        unmount(self.directory)

    def _wait(self, is_done: Callable[[], bool], within_s: float, what: str) -> None:
        deadline_s = time.monotonic() + within_s
        while not is_done():
            assert self._daemon is not None
            if (status := self._daemon.poll()) is not None:
                raise MeasurementFailed(f"ended with status {status}: {self._last_words()}")
            if time.monotonic() > deadline_s:
                raise MeasurementFailed(f"has not {what} within {within_s:g} s: {self._last_words()}")
            time.sleep(_POLL_S)

    def _run(self, command: Sequence[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self._request.home,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if done.returncode != 0:
            words = (done.stderr or done.stdout).strip()[-300:]
            raise MeasurementFailed(f"`{Path(command[0]).name} {command[1]}` failed: {words}")
        return done.stdout

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self._recipe.environment}

    def _last_words(self) -> str:
        return " | ".join(self._log.read_text("utf-8", "replace").splitlines()[-6:])[-600:]


@contextmanager
def mounted_peer(name: str, request: Request, tree: Path | None) -> Iterator[PeerSide]:
    """Yield the peer *name*, mounted with an empty cache. Raises MeasurementFailed, OSError, SubprocessError.

    Its lake has the files of *tree*; None: it is empty.
    """
    side = PeerSide(name, request, PEERS[name](request))
    try:
        side.prepare(tree)
        side.start(side._recipe.mount)
        yield side
    finally:
        side.end()
        side.clean_up()


def unmount(directory: Path) -> None:
    """Unmount what is there: properly, and when it is busy or hangs by force. Never raises."""
    for options in ([], ["-z"]):
        if not _is_mounted(directory):
            return
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            subprocess.run(
                ["fusermount3", "-u", *options, str(directory)],
                stderr=subprocess.DEVNULL,
                timeout=ENDED_S,
                check=False,
            )


def _is_mounted(directory: Path) -> bool:
    """Return whether the kernel lists it: to look at a mount whose daemon is dead fails."""
    return any(
        line.split()[1] == str(directory) for line in Path("/proc/self/mounts").read_text().splitlines()
    )


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def copy_tree(tree: Path, to: Path) -> None:
    """Copy the files below *tree*, some at a time: each waits for the lake."""
    for path in tree.rglob("*"):
        if path.is_dir():
            (to / path.relative_to(tree)).mkdir(parents=True, exist_ok=True)
    files = [path for path in tree.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        for _ in pool.map(lambda path: shutil.copyfile(path, to / path.relative_to(tree)), files):
            pass
