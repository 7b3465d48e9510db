"""Real mounts for tests. Whatever a test does, its mounts end with it, and that is asserted.

`mounting` makes mounts below the test's temporary directory. At its end each is unmounted; what
then still runs is killed by its own pid, what is still mounted is detached, and either fails the
test. Shortly before pytest would end a test that takes too long its mount is killed, and the test says
so: no read hangs for ever. Should pytest itself be killed, a shell that waits for its end does the same.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from cache import control
from tests.memory_s3 import ENVIRONMENT, MemoryS3
from tools.mounted import Mounted, MountFailed, sluice_command
from tools.servers import SeaweedServer

PATIENCE_S = 100.0  # How long a mount may live: 20 s less than pytest's own limit for a test.
ENDS_WITHIN_S = 60.0  # A killed process ends once the disk has done what it waits for.
MIB = 1 << 20
_ACCESS = ("--read-only", "--no-read-only", "ro", "rw")
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def until(condition: Callable[[], T], what: str, within_s: float = 30.0) -> T:
    """Return the first true value of *condition*; fail the test when there is none in time."""
    deadline_s = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.02)
    return value


def content(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(f"{size_bytes}/{seed}").randbytes(size_bytes)


# --- Processes and mounts, as the kernel shows them --------------------------------------------


def processes_naming(path: Path) -> list[int]:
    """Return the processes that have *path*, or a path below it, on their `sluice` command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            is_sluice = any(word.endswith(b"/sluice") for word in words[:3])
            if is_sluice and any(os.fsencode(path) in word for word in words) and not _is_zombie(entry):
                found.append(int(entry.name))
    return found


def _is_zombie(process: Path) -> bool:
    return (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def is_alive(pid: int) -> bool:
    try:
        return not _is_zombie(Path(f"/proc/{pid}"))
    except OSError:
        return False


def mounts_below(path: Path) -> list[Path]:
    """Return the mount points at or below *path*, the last mounted first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [Path(p) for p in reversed(points) if p == str(path) or p.startswith(f"{path}/")]


def detach(mountpoint: Path) -> None:
    _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH)


def kill_each(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    if number == signal.SIGKILL:
        until(lambda: not any(map(is_alive, pids)), f"{pids} have ended", ENDS_WITHIN_S)


def leftovers(home: Path) -> str:
    """Return what still runs or is mounted for *home*, in words; "" if nothing does."""
    pids, mounts = processes_naming(home), mounts_below(home)
    return f"processes {pids}, mounts {[str(m) for m in mounts]}" if pids or mounts else ""


def end_all(home: Path) -> str:
    """Leave no process and no mount below *home*; return what there was to end by force."""
    deadline_s = time.monotonic() + ENDS_WITHIN_S
    while (left := leftovers(home)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for _ in range(5):  # A supervisor may fork while it is being killed.
        kill_each(processes_naming(home))
        for mountpoint in mounts_below(home):
            detach(mountpoint)
    assert not leftovers(home), leftovers(home)
    return left


# --- Mounts ------------------------------------------------------------------------------------


class LiveMount(Mounted):
    """A mount below *home* whose processes a test may look at and kill."""

    def __init__(
        self,
        lake: str,
        home: Path,
        options: list[str],
        environment: Mapping[str, str],
        patience_s: float = PATIENCE_S,
    ) -> None:
        if not any(option in _ACCESS for option in options):
            options = ["--read-only", *options]  # Most tests read; those that write say so.
        super().__init__(lake, home / "mount", home / "cache", options, environment)
        self.home = home
        self.program = [sluice_command()]  # What runs `sluice` here.
        self._patience_s = patience_s
        self._watchdog: threading.Timer | None = None
        self._was_killed = False

    def _sluice(self, *arguments: str) -> str:
        done = sluice(*arguments, environment=self._environment, program=self.program)
        if done.returncode != 0:
            raise MountFailed(f"`sluice {' '.join(arguments)}` failed: {done.stderr.strip()}")
        return done.stdout

    def mount(self) -> None:
        super().mount()
        self._watchdog = threading.Timer(self._patience_s, self._give_up)
        self._watchdog.daemon = True
        self._watchdog.start()

    def unmount(self) -> None:
        super().unmount()
        until(lambda: not processes_naming(self.home), "the mount's processes have ended", ENDS_WITHIN_S)
        self._cancel_watchdog()

    def remount(self) -> None:
        self.unmount()
        self.mount()

    def end(self) -> None:
        """Unmount if that is possible; `end_all` does the rest."""
        self._cancel_watchdog()
        if self._was_killed:
            detach(self.cache / "dram")  # Kept for the next mount: it holds what was cached.
        try:
            if self.directory in mounts_below(self.home):  # Not waiting for a lake that lacks something.
                self._sluice("umount", "--lazy", str(self.directory))
        except (MountFailed, subprocess.TimeoutExpired) as failure:
            print(failure)

    def _cancel_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()

    def _give_up(self) -> None:
        print(f"{self.directory}: killed, for the test took longer than {self._patience_s:.0f} s")
        self.kill_all()

    def kill_all(self) -> None:
        """End every process at once."""
        self._was_killed = True
        while pids := processes_naming(self.home):  # Before its own end the supervisor may replace a worker.
            kill_each(pids)

    def crash(self) -> None:
        """Kill everything and clear the dead mount away, as the user would."""
        self.kill_all()
        self.unmount()

    def status(self) -> dict[str, Any]:
        """Return what `sluice status --json` shows, without starting a process. Raises SluiceError."""
        status: dict[str, Any] = control.call(self.directory, "status")
        return status

    @property
    def supervisor(self) -> int:
        return self.pids()["supervisor"][0]

    def read(self, path: str) -> bytes:
        return (self.directory / path).read_bytes()

    def requests(self) -> dict[str, int]:
        """Return the requests to the lake since the mover started."""
        return dict(self.status()["lake_io"]["requests"])

    def reads(self) -> dict[str, Any]:
        return dict(self.status()["reads"])

    def asks_nothing(self, action: Callable[[], object], counter: str = "reads") -> bool:
        """Whether a run of *action* sends us no request of the kind.

        Several runs are tried: the kernel may drop a page at any time, and then asks for it.
        """
        for _ in range(5):
            before = self.reads()["requests"][counter]
            action()
            if self.reads()["requests"][counter] == before:
                return True
        return False

    def read_anew(self, path: str) -> bytes:
        """Read the file past the page cache: the reads come to us."""
        with (self.directory / path).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return file.read()

    def evict(self, *paths: str) -> None:
        self._sluice("evict", *(str(self.directory / path) for path in paths))

    def log(self) -> str:
        return (self.cache / "log").read_text("utf-8", "replace")


# Reads to the end of the pipe that pytest holds; a line before it says that all was ended in good order.
_GUARDIAN = r"""
trap "" INT TERM HUP
read -r line && exit
for pid in $(pgrep -f "sluice mount .*$1/"); do kill -9 "$pid"; done
grep -o " $1/[^ ]*" /proc/self/mountinfo | tac | while read -r point; do umount -f -l "$point"; done
"""


@contextmanager
def guardian(home: Path) -> Iterator[None]:
    """End what is mounted below *home* if the block fails, or this process dies before it ends."""
    watching = subprocess.Popen(
        ["sh", "-c", _GUARDIAN, "guardian", str(home)], stdin=subprocess.PIPE, start_new_session=True
    )
    said = b""
    try:
        yield
        said = b"ended\n"
    finally:
        watching.communicate(said, timeout=30)


class Mounting:
    """Makes mounts below *home*; `end` ends them and fails if one would not end by itself."""

    def __init__(self, home: Path, patience_s: float = PATIENCE_S) -> None:
        self.home = home
        self._patience_s = patience_s
        self._mounts: list[LiveMount] = []

    def prepare(
        self,
        lake: str,
        *options: str,
        size: str = "256M",
        name: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> LiveMount:
        """Return a mount that is not mounted yet. Small tiers and two workers unless *options* say so."""
        home = self.home / (name or f"m{len(self._mounts)}")
        home.mkdir(exist_ok=True)
        defaults = {
            "--cache": f"{home / 'cache'}:{size}",
            "--dram": "0",
            "--keep-free": "0",
            "--workers": "2",
        }
        given = {option.partition("=")[0] for option in options}
        wanted = [f"{option}={value}" for option, value in defaults.items() if option not in given]
        made = LiveMount(lake, home, [*wanted, *options], environment or {}, self._patience_s)
        self._mounts.append(made)
        return made

    def mount(self, lake: str, *options: str, **settings: Any) -> LiveMount:
        made = self.prepare(lake, *options, **settings)
        made.mount()
        return made

    def end(self) -> None:
        try:
            for made in reversed(self._mounts):
                made.end()
        finally:
            logs = "\n".join(made.log_tail(80) for made in self._mounts)
            print(logs)  # Shown when the test failed.
            forced = end_all(self.home)
        assert not forced, f"had to be ended by force: {forced}"


@contextmanager
def mounting_below(home: Path, patience_s: float = PATIENCE_S) -> Iterator[Mounting]:
    made = Mounting(home, patience_s)
    with guardian(home):
        try:
            yield made
        finally:
            made.end()
            shutil.rmtree(home, ignore_errors=True)  # Tests leave gigabytes else.


@pytest.fixture
def mounting(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mounting]:
    limit = request.node.get_closest_marker("timeout")
    with mounting_below(tmp_path, limit.args[0] - 20 if limit else PATIENCE_S) as made:
        yield made


def sluice(
    *arguments: object, environment: Mapping[str, str] | None = None, program: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a `sluice` command; never raises for its exit status."""
    return subprocess.run(
        [*(program or [sluice_command()]), *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- Lakes that tests write to -----------------------------------------------------------------


class Lake(Protocol):
    """*url* and *options* mount it."""

    @property
    def url(self) -> str: ...
    @property
    def options(self) -> tuple[str, ...]: ...
    def put(self, key: str, body: bytes) -> None: ...
    def delete(self, key: str) -> None: ...


class Folder:
    """A directory lake. Files are replaced by rename, as the lake's own clients do."""

    options: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)
        path.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, body: bytes) -> None:
        target = self.path / key
        if key.endswith("/"):
            target.mkdir(parents=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.parent / f"{self.path.name}.new"
        new.write_bytes(body)
        new.rename(target)

    def delete(self, key: str) -> None:
        (self.path / key).unlink()


class Prefix:
    """A prefix of a bucket on a real S3 server."""

    def __init__(self, server: SeaweedServer, bucket: str, prefix: str, endpoint_url: str = "") -> None:
        self.url = f"s3://{bucket}/{prefix}"
        self.options = (f"--endpoint-url={endpoint_url or server.endpoint_url}",)
        self._client, self._bucket, self._prefix = server.client(), bucket, prefix

    def put(self, key: str, body: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{key}", Body=body)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=f"{self._prefix}/{key}")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "lake")


@pytest.fixture
def prefix(s3_server: SeaweedServer, shared_bucket: str, s3_credentials: None, tmp_path: Path) -> Prefix:
    return Prefix(s3_server, shared_bucket, f"{os.getpid()}-{tmp_path.name}")


@pytest.fixture
def memory_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryS3]:
    """An S3 server made of a dict, and an environment that signs in to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with MemoryS3() as server:
        yield server
