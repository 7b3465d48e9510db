"""What can't be mounted says so in one line that names what to mend, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.disks import fill_up, make_read_only, small_disk
from tests.memory_s3 import MemoryS3
from tests.mounting import MIB, Folder, Mounting, end_all, guardian, leftovers, sluice, until
from tools.mounted import sluice_command
from tools.servers import SeaweedServer, SlowProxy, free_ports

QUICK = ("--dram=0", "--keep-free=0", "--retry=1", "--connect-timeout=0.5", "--read-timeout=0.5")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A directory with an empty mount point; whatever is mounted below it ends with the test."""
    (tmp_path / "mount").mkdir()
    with guardian(tmp_path):
        yield tmp_path
        end_all(tmp_path)


def refused(home: Path, lake: str, *options: object, status: int, cache: Path | None = None) -> str:
    """Return the one line with which the mount is refused; fail if anything stays behind."""
    done = sluice("mount", lake, home / "mount", f"--cache={cache or home / 'cache'}", *QUICK, *options)
    assert leftovers(home) == ""
    assert (done.returncode, done.stdout) == (status, ""), done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("sluice: ")
    return lines[0]


# --- The lake ----------------------------------------------------------------------------------


def test_no_such_bucket(home: Path, s3_server: SeaweedServer, s3_credentials: None) -> None:
    line = refused(home, "s3://no-such-bucket", f"--endpoint-url={s3_server.endpoint_url}", status=1)
    assert "no-such-bucket" in line and "no such bucket" in line.lower()


def test_wrong_credentials(
    home: Path,
    s3_server: SeaweedServer,
    shared_bucket: str,
    s3_credentials: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    line = refused(home, f"s3://{shared_bucket}", f"--endpoint-url={s3_server.endpoint_url}", status=1)
    assert shared_bucket in line and "key" in line and "--aws-profile" in line


def test_no_credentials(home: Path, memory_s3: MemoryS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    line = refused(home, memory_s3.url, *memory_s3.options, status=1)
    assert "credentials" in line and "--anonymous" in line


def test_no_permission(home: Path, memory_s3: MemoryS3) -> None:
    memory_s3.denied = frozenset({"list", "head", "get"})
    line = refused(home, memory_s3.url, *memory_s3.options, status=1)
    assert "memory" in line and ("denied" in line.lower() or "permission" in line.lower())


def test_an_endpoint_where_nobody_listens(home: Path, memory_s3: MemoryS3) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert endpoint in refused(home, memory_s3.url, f"--endpoint-url={endpoint}", status=1)


def test_an_endpoint_that_never_answers(home: Path, memory_s3: MemoryS3) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert endpoint in refused(home, memory_s3.url, f"--endpoint-url={endpoint}", status=1)


def test_an_endpoint_that_is_no_s3_server(home: Path, memory_s3: MemoryS3) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{web.server_port}"
        assert endpoint in refused(home, memory_s3.url, f"--endpoint-url={endpoint}", status=1)
        web.shutdown()


def test_a_certificate_that_nobody_vouches_for(
    home: Path,
    s3_server: SeaweedServer,
    shared_bucket: str,
    s3_credentials: None,
    server_tls: ssl.SSLContext,
    self_signed: Path,
) -> None:
    with SlowProxy(s3_server.endpoint_url, tls=server_tls) as proxy:
        lake, endpoint = f"s3://{shared_bucket}", f"--endpoint-url={proxy.endpoint_url}"
        line = refused(home, lake, endpoint, status=1)
        assert "certificate" in line and "--ca-bundle" in line
        with_bundle = (f"--ca-bundle={self_signed}", f"--cache={home / 'cache'}:64M")
        done = sluice("mount", lake, home / "mount", endpoint, *with_bundle, *QUICK)
        assert done.returncode == 0, done.stderr
        assert sluice("umount", home / "mount").returncode == 0


def test_https_to_a_server_without_it(home: Path, memory_s3: MemoryS3) -> None:
    endpoint = memory_s3.endpoint_url.replace("http:", "https:")
    assert endpoint in refused(home, memory_s3.url, f"--endpoint-url={endpoint}", status=1)


def test_a_lake_directory_that_is_not_there(home: Path) -> None:
    assert str(home / "nothing") in refused(home, str(home / "nothing"), status=2)


# --- The mount point ---------------------------------------------------------------------------


def test_a_mount_point_that_cannot_be_used(home: Path, folder: Folder) -> None:
    mountpoint = home / "mount"
    (mountpoint / "file").touch()
    assert "not empty" in refused(home, folder.url, status=2)
    (mountpoint / "file").unlink()
    mountpoint.rmdir()
    line = refused(home, folder.url, status=2)
    assert str(mountpoint) in line and "mkdir" in line
    mountpoint.touch()
    assert "not a directory" in refused(home, folder.url, status=2)


def test_a_mount_point_where_something_is_mounted(mounting: Mounting, folder: Folder) -> None:
    folder.put("file", b"1")
    mount = mounting.mount(folder.url)
    done = sluice("mount", folder.url, mount.directory, f"--cache={mount.home / 'other'}:64M", *QUICK)
    assert done.returncode == 2 and str(mount.directory) in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "mounted there already" in done.stderr
    assert mount.read("file") == b"1"


# --- The cache ---------------------------------------------------------------------------------


def test_a_cache_that_another_mount_uses(mounting: Mounting, folder: Folder) -> None:
    folder.put("file", b"1")
    mount = mounting.mount(folder.url)
    second = mounting.home / "second"
    second.mkdir()
    done = sluice("mount", folder.url, second, f"--cache={mount.cache}:64M", *QUICK)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"--cache {mount.cache}: in use by another mount" in done.stderr
    assert str(mount.supervisor) in done.stderr, "it names the mount that uses it"
    assert not os.path.ismount(second)
    assert mount.read("file") == b"1"


def test_what_lies_inside_a_cache_or_another_mount(mounting: Mounting, folder: Folder) -> None:
    """A cache's files would become objects of the lake, or be taken for a stranger's."""
    folder.put("file", b"1")
    mount = mounting.mount(folder.url)
    second, other = mounting.home / "second", Folder(mounting.home / "other lake")
    within = mount.cache / "mount"
    for directory in (second, within):
        directory.mkdir()
    fresh = mounting.home / "fresh"
    inside = "lies inside the cache directory"
    for lake, directory, cache, said in (
        (other.url, second, mount.directory / "c", "lies inside the SluiceFS mount"),
        (other.url, second, mount.cache / "sub", f"--cache {mount.cache / 'sub'}: {inside}"),
        (other.url, within, fresh, f"{within}': {inside} {mount.cache}"),
        (str(mount.cache), second, fresh, "is a cache directory of SluiceFS"),
        (other.url, second / "in", second, f"{second / 'in'}': {inside} {second}"),
    ):
        directory.mkdir(exist_ok=True)
        done = sluice("mount", lake, directory, f"--cache={cache}:64M", *QUICK)
        assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1, done
        assert said in done.stderr
        assert not os.path.ismount(directory) and not fresh.exists()
    assert os.listdir(mount.directory) == ["file"]


@pytest.mark.parametrize(
    "text",
    [
        "sluicefs-cache 999\nabc\n/lake\n",
        "",
        "\0\xff",
        "sluicefs-cache 2\n",
        "sluicefs-cache 1\nabc\n/lake\n",
    ],
)
def test_a_cache_of_an_unknown_format(home: Path, folder: Folder, text: str) -> None:
    (home / "cache").mkdir()
    (home / "cache/format").write_text(text)
    line = refused(home, folder.url, status=2)
    assert f"--cache {home / 'cache'}: its format is" in line
    assert (home / "cache/format").read_text() == text, "it is left as it was"


def test_a_directory_of_other_files_as_a_cache(home: Path, folder: Folder) -> None:
    (home / "cache").mkdir()
    (home / "cache/thesis.tex").write_text("precious")
    assert f"--cache {home / 'cache'}: holds files that are no" in refused(home, folder.url, status=2)
    assert (home / "cache/thesis.tex").read_text() == "precious"


def test_the_cache_of_another_lake(mounting: Mounting, folder: Folder) -> None:
    folder.put("file", b"1")
    mount = mounting.mount(folder.url)
    mount.read("file")
    mount.unmount()
    other = Folder(mounting.home / "other lake")
    done = sluice("mount", other.url, mount.directory, f"--cache={mount.cache}:64M", *QUICK)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert folder.url in done.stderr and other.url in done.stderr
    mount.mount()
    assert mount.read("file") == b"1" and mount.requests()["get"] == 0


def test_a_cache_on_a_full_disk(home: Path, folder: Folder) -> None:
    with small_disk(home, 100 * MIB) as disk:
        fill_up(disk)
        line = refused_on_disk(home, folder, disk)
        assert str(disk / "cache") in line and "full" in line


def test_a_cache_on_a_read_only_disk(home: Path, folder: Folder) -> None:
    with small_disk(home, 100 * MIB) as disk:
        make_read_only(disk)
        line = refused_on_disk(home, folder, disk)
        assert str(disk / "cache") in line


def refused_on_disk(home: Path, folder: Folder, disk: Path) -> str:
    done = sluice("mount", folder.url, home / "mount", f"--cache={disk / 'cache'}:64M", *QUICK)
    assert done.returncode in (1, 2) and not os.path.ismount(home / "mount"), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


# --- The options -------------------------------------------------------------------------------


def test_an_unknown_key_of_the_file(home: Path, folder: Folder) -> None:
    file = home / "options.toml"
    file.write_text("ttl = 5\nwrokers = 3\n")
    line = refused(home, folder.url, f"--config={file}", status=2)
    assert "wrokers" in line and "workers" in line and str(file) in line


@pytest.mark.parametrize(
    "option", ["--cache=/tmp/x:1K", "--dram=5", "--dram=900T", "--ttl=-1", "--workers=many", "--ttll=5"]
)
def test_a_value_that_makes_no_sense(home: Path, folder: Folder, option: str) -> None:
    line = refused(home, folder.url, option, status=2)
    assert option.partition("=")[0] in line


# --- An interrupted mount ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_mount_that_is_interrupted_while_it_waits_for_the_lake_leaves_nothing(
    home: Path, memory_s3: MemoryS3, number: signal.Signals, workers: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"--endpoint-url=http://127.0.0.1:{silent.getsockname()[1]}"
        cache = f"--cache={home / 'cache'}:64M"
        command = [sluice_command(), "mount", memory_s3.url, str(home / "mount"), cache]
        options = (endpoint, "--dram=64M", "--read-timeout=50", f"--workers={workers}")
        mounting = subprocess.Popen([*command, *options], start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            with silent.accept()[0]:
                mounting.send_signal(number)
                assert mounting.wait(30) != 0
                until(lambda: leftovers(home) == "", "nothing is left", 20)
        finally:
            mounting.kill()
            mounting.wait()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_lake_that_fails_while_a_mount_starts_leaves_the_cache_usable(
    home: Path, memory_s3: MemoryS3, workers: str
) -> None:
    memory_s3.put("file", b"1")
    memory_s3.denied = frozenset({"list", "head"})
    for _ in range(2):
        refused(home, memory_s3.url, *memory_s3.options, f"--workers={workers}", status=1)
    memory_s3.denied = frozenset()
    options = (*memory_s3.options, f"--workers={workers}", *QUICK)
    done = sluice("mount", memory_s3.url, home / "mount", f"--cache={home / 'cache'}:64M", *options)
    assert done.returncode == 0, done.stderr
    assert (home / "mount/file").read_bytes() == b"1"
    assert sluice("umount", home / "mount").returncode == 0
