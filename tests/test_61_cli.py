"""The command `sluice`: exit statuses, and the daemon's readiness."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from cache.config import MountConfig
from cache.errors import LakeMisconfigured, SluiceError, UsageError
from tools import cli, logs, mount, status

HOME = Path(__file__).resolve().parent.parent

# The command


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from tools import cli, doctor, evict, ls, mount, status, umount\n"
        "print([name for name in ('pyfuse3', 'trio', 'boto3', 'rich', 'lmdb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sluice 0.")


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"  {name} " not in shown] == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "a command is missing; one of mount, umount"),
        (["statsu"], "'statsu' is not a command; did you mean status?"),
        (["statsu", "/mnt"], "'statsu' is not a command; did you mean status?"),
        (["--verson"], "'--verson' is not a command"),
        (["ls"], "the following arguments are required: PATH"),
        (["ls", "--recursiv", "/"], "--recursiv: not an option of `sluice ls`; did you mean --recursive?"),
        (["ls", "--limit", "x", "/"], "--limit"),
        (["evict", "/"], "/: not in a SluiceFS mount"),
        (["status", "/"], "/: not in a SluiceFS mount"),
        (["umount", "/proc"], "/proc: a mount of type proc, not of SluiceFS; use umount(8)"),
        (["umount", "/proc/self"], "nothing is mounted there"),
    ],
)
def test_wrong_usage_gets_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("sluice: ") and said in captured.err


@pytest.mark.parametrize(
    ("error", "exit_status", "said"),
    [
        (UsageError("--x 1: bad; mend it"), 2, "sluice: --x 1: bad; mend it\n"),
        (SluiceError("failed\nin two lines"), 1, "sluice: failed in two lines\n"),
        (PermissionError(13, "Permission denied", "/a"), 1, "sluice: /a: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("x"), 1, "sluice: internal error, please report it: ZeroDivisionError: x\n"),
    ],
)
def test_what_goes_wrong_is_one_line_without_traceback(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    exit_status: int,
    said: str,
) -> None:
    def fails(argv: list[str]) -> NoReturn:
        raise error

    monkeypatch.setattr(status, "main", fails)
    assert cli.main(["status"]) == exit_status
    assert capsys.readouterr().err == said


def test_the_form_of_fstab_is_a_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def record(argv: list[str]) -> int:
        seen.append(argv)
        return 0

    monkeypatch.setattr(mount, "main", record)
    for argv in (["s3://bucket", "/mnt", "-o", "rw,nofail"], ["/lake", "/mnt"], ["lake", "/mnt", "-o", "ro"]):
        assert cli.main(argv) == 0
        assert seen.pop() == argv


# The daemon


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    for name in ("lake", "mnt"):
        (tmp_path / name).mkdir()
    return [str(tmp_path / "lake"), str(tmp_path / "mnt"), "--cache", f"{tmp_path}/cache:64M"]


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    """Give the root logger back as it was: --foreground configures it in this process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_mount_returns_when_the_mount_answers_and_the_daemon_lives_on(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "end")

    def supervise(config: MountConfig, announce: Callable[[], None]) -> int:
        logging.getLogger("test").warning("cwd %s, session %s", os.getcwd(), os.getsid(0) == os.getpid())
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.write(1, b"to nobody")
        signal.alarm(60)  # Nothing stays if the test fails.
        announce()
        announce()  # Says nothing more, and touches no file that has the pipe's number by now.
        (tmp_path / "end").read_text()
        return 0

    assert mount.main(arguments, supervise) == 0
    cache = tmp_path / "cache"
    line = f"mounted {tmp_path}/lake on {tmp_path}/mnt; cache {cache} (64.0 MiB); log {cache}/log\n"
    assert capfd.readouterr() == (line, "")
    child = int((tmp_path / "pid").read_text())
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    (tmp_path / "end").write_text("")
    assert os.waitpid(child, 0)[1] == 0
    log = cache / "log"
    assert f"WARNING {child} cwd /, session True\n" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("error", "exit_status", "said"),
    [
        (LakeMisconfigured("s3://b: no such bucket"), 1, "sluice: s3://b: no such bucket\n"),
        (UsageError("--cache c: in use by process 7"), 2, "sluice: --cache c: in use by process 7\n"),
    ],
)
def test_the_daemons_error_is_mounts_error(
    arguments: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    exit_status: int,
    said: str,
) -> None:
    def supervise(config: MountConfig, announce: Callable[[], None]) -> int:
        raise error

    monkeypatch.setattr(mount, "_supervise", supervise)
    assert cli.main(["mount", *arguments]) == exit_status
    assert capfd.readouterr() == ("", said)


def test_an_unexpected_error_is_a_line_here_and_a_traceback_in_the_log(
    arguments: list[str], tmp_path: Path
) -> None:
    def supervise(config: MountConfig, announce: Callable[[], None]) -> int:
        raise ZeroDivisionError("by zero")

    with pytest.raises(SluiceError, match=r"internal error: ZeroDivisionError: by zero; see the log .*/log"):
        mount.main(arguments, supervise)
    assert "Traceback" in (tmp_path / "cache" / "log").read_text()


def test_a_daemon_that_dies_is_told_with_its_last_words_even_if_a_worker_lives(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "log").write_text("of an earlier mount\n")

    def supervise(config: MountConfig, announce: Callable[[], None]) -> int:
        if (worker := os.fork()) == 0:  # Holds the pipe: its end does not come.
            signal.alarm(60)
            signal.pause()
        (tmp_path / "worker").write_text(str(worker))
        logging.getLogger("test").error("last words")
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(
        SluiceError, match=r"killed by signal 9 before .* its log .*/log ends with: .*last words"
    ):
        mount.main(arguments, supervise)
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    with pytest.raises(SluiceError, match=r"ended with status 3 before the mount was ready; .* says nothing"):
        mount.main(arguments, lambda config, announce: 3)


def test_ending_mount_while_it_waits_ends_the_daemon(arguments: list[str], tmp_path: Path) -> None:
    waiter = os.getpid()

    def supervise(config: MountConfig, announce: Callable[[], None]) -> int:
        (tmp_path / "pid").write_text(str(os.getpid()))
        signal.alarm(60)
        os.kill(waiter, signal.SIGTERM)
        signal.pause()  # SIGTERM ends it.
        return 0

    with pytest.raises(SystemExit) as end:
        mount.main(arguments, supervise)
    assert end.value.code == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("abstract", [False, True])
def test_the_foreground_tells_systemd_and_returns_supervises_status(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quiet_logging: None,
    abstract: bool,
) -> None:
    address = f"@sluice-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)

    def supervise(config: MountConfig, announce: Callable[[], None]) -> int:
        logging.getLogger("test").info("to the operator")
        announce()
        return 7

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0"))
        systemd.settimeout(10)
        assert mount.main([*arguments, "--foreground"], supervise) == 7
        assert systemd.recv(4096).startswith(b"READY=1\n")
        assert systemd.recv(4096) == b"STOPPING=1"
    out, err = capsys.readouterr()
    assert out.startswith("mounted ") and out.endswith("log standard error\n")
    assert f"INFO {os.getpid()} to the operator\n" in err


def test_the_log_goes_on_in_a_new_file_after_rotation(tmp_path: Path, quiet_logging: None) -> None:
    log = tmp_path / "log"
    logs.configure("info", file=log, stderr=False)
    logging.getLogger("test").info("one")
    log.rename(tmp_path / "log.1")
    logging.getLogger("test").info("two")
    assert logs.last_line(log, 0).endswith(" two")
    assert logs.last_line(log, log.stat().st_size) == ""
