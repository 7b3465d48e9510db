"""Durability, space and the mount itself, where files are written."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import MIB, Folder, LiveMount, Mounting, content, until
from tests.writable_mounts import KINDS, LARGE, SMALL, WRITABLE, fails_with, mounted_writable


@pytest.fixture(scope="module", params=KINDS)
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveMount]:
    with mounted_writable(request, tmp_path_factory) as mount:
        yield mount


@pytest.fixture
def work(mount: LiveMount, request: pytest.FixtureRequest) -> Path:
    """A directory of the test's own."""
    made = mount.directory / "".join(c if c.isalnum() else "-" for c in request.node.name)
    made.mkdir()
    return made


def test_fsync_of_files_and_directories_returns(mount: LiveMount, work: Path) -> None:
    with (work / "file").open("wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
        os.rename(work / "file", work / "renamed")
    for path in (work, mount.directory, mount.directory / "lake/large"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def test_statfs_tells_the_room_there_is(mount: LiveMount) -> None:
    room, disk = os.statvfs(mount.directory), os.statvfs(mount.cache)
    assert 0 < room.f_bavail * room.f_frsize <= disk.f_bavail * disk.f_frsize + 64 * MIB
    assert room.f_blocks * room.f_frsize == disk.f_blocks * disk.f_frsize
    assert room.f_namemax == 255 and room.f_favail > 0
    assert subprocess.run(["df", mount.directory], capture_output=True, check=False).returncode == 0


def test_a_small_write_costs_one_request(mounting: Mounting, folder: Folder) -> None:
    """The kernel's question about security.capability, before each of them, is answered in C."""
    mount = mounting.mount(folder.url, *WRITABLE, "--passthrough=off")
    with (mount.directory / "file").open("wb", buffering=0) as file:
        file.write(b"first")
        before = mount.reads()["requests"]["requests"]
        for number in range(200):
            os.pwrite(file.fileno(), b"x" * 100, number * 100)
        assert 200 <= mount.reads()["requests"]["requests"] - before <= 210
        fails_with(errno.ENODATA, os.getxattr, file.fileno(), "security.capability")


def test_what_was_written_is_read_from_the_page_cache(mounting: Mounting, folder: Folder) -> None:
    """Its mtime has changed, but nobody but the kernel wrote it."""
    mount = mounting.mount(folder.url, *WRITABLE)
    body = content(3 * MIB, seed=9)

    def write_and_read() -> None:
        (mount.directory / "file").write_bytes(body)
        os.stat(mount.directory / "file")
        assert mount.read("file") == body

    assert mount.asks_nothing(write_and_read)


def test_all_of_it_is_there_after_a_remount(mounting: Mounting, folder: Folder) -> None:
    folder.put("lake/file", SMALL)
    mount = mounting.mount(folder.url, *WRITABLE, "--upload-delay=600")
    root = mount.directory
    os.makedirs(root / "d/empty")
    (root / "d/new").write_bytes(LARGE)
    os.setxattr(root / "d/new", "user.x", b"kept")
    os.chmod(root / "d/new", 0o604)
    os.utime(root / "d/new", ns=(3, 4_000_000_000))
    os.rename(root / "lake/file", root / "d/moved")
    os.symlink("new", root / "d/link")
    os.mkfifo(root / "d/fifo")
    mount.remount()
    assert sorted(os.listdir(root / "d")) == ["empty", "fifo", "link", "moved", "new"]
    assert (root / "d/link").read_bytes() == LARGE and (root / "d/moved").read_bytes() == SMALL
    shown = os.stat(root / "d/new")
    assert (stat.S_IMODE(shown.st_mode), shown.st_mtime_ns) == (0o604, 4_000_000_000)
    assert os.getxattr(root / "d/new", "user.x") == b"kept"
    assert os.listdir(root / "d/empty") == [] and not (root / "lake/file").exists()


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_it_works_with_any_number_of_workers(mounting: Mounting, folder: Folder, workers: str) -> None:
    mount = mounting.mount(folder.url, *WRITABLE, f"--workers={workers}", "--upload-delay=0.1")
    root = mount.directory
    for number in range(40):
        path = root / f"d{number % 4}" / f"{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(10_000 + number, seed=number))
        os.rename(path, f"{path}.done")
    for number in range(40):
        body = (root / f"d{number % 4}" / f"{number}.done").read_bytes()
        assert body == content(10_000 + number, seed=number)
        assert len(os.listdir(root / f"d{number % 4}")) == 10


def test_past_dirty_max_writers_wait_and_go_on(mounting: Mounting, folder: Folder) -> None:
    mount = mounting.mount(folder.url, *WRITABLE, "--dirty-max=64M", "--upload-delay=0")
    room = os.statvfs(mount.directory)
    assert room.f_bavail * room.f_frsize <= 64 * MIB
    body = content(20 * MIB, seed=3)
    for number in range(6):
        (mount.directory / f"{number}").write_bytes(body)
    for number in range(6):
        assert mount.read(f"{number}") == body
    until(lambda: all((folder.path / f"{number}").exists() for number in range(6)), "all was sent")
    assert "writers wait" in mount.log()


@pytest.mark.parametrize("how", ["close", "fsync"])
def test_where_that_is_asked_for_the_lake_has_it_when_close_and_fsync_return(
    mounting: Mounting, folder: Folder, how: str
) -> None:
    options = ("--durability=local", "--durability=ckpt/*.pt=remote", "--upload-delay=600")
    mount = mounting.mount(folder.url, *WRITABLE, *options)
    os.mkdir(mount.directory / "ckpt")
    for number in range(3):
        fd = os.open(mount.directory / f"ckpt/{number}.pt", os.O_WRONLY | os.O_CREAT)
        os.write(fd, SMALL)
        if how == "fsync":
            os.fsync(fd)
            assert (folder.path / f"ckpt/{number}.pt").read_bytes() == SMALL
        os.close(fd)
        assert (folder.path / f"ckpt/{number}.pt").read_bytes() == SMALL
    (mount.directory / "ckpt/other").write_bytes(SMALL)
    assert not (folder.path / "ckpt/other").exists()


def test_files_that_are_written_while_they_are_sent_end_as_they_were_left(
    mounting: Mounting, folder: Folder
) -> None:
    """Everything is sent at once, so each step meets uploads at another point of theirs."""
    mount = mounting.mount(folder.url, *WRITABLE, "--upload-delay=0")
    seed = random.randrange(1 << 32)
    print("seed", seed)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            models[number] = churn(mount.directory, number, random.Random(seed + number))
        except BaseException as error:
            failures.append(error)

    models: dict[int, dict[str, bytes]] = {}
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(80)
    assert failures == []
    model = {name: body for found in models.values() for name, body in found.items()}
    assert sorted(os.listdir(mount.directory)) == sorted(model)
    assert {name: mount.read(name) for name in model} == model
    mount.unmount()
    assert {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == model


def churn(root: Path, number: int, roll: random.Random) -> dict[str, bytes]:
    """Change files at random, checking each before; return what they hold in the end."""
    model: dict[str, bytes] = {}
    for _ in range(150):
        name = f"{number}-{roll.randrange(4)}"
        path, body = root / name, model.get(name)
        if body is not None:
            assert path.read_bytes() == body, name
        piece, offset = roll.randbytes(roll.choice([10, 5000, 200_000])), roll.randrange(1000)
        match roll.randrange(6):
            case 0 | 1:
                path.write_bytes(piece)
                model[name] = piece
            case 2 if body is not None:
                with path.open("ab") as file:
                    file.write(piece)
                model[name] = body + piece
            case 3 if body is not None and len(body) > offset:
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(piece)
                    file.truncate(offset + len(piece))
                model[name] = body[:offset] + piece
            case 4 if body is not None:
                other = f"{number}-{roll.randrange(4)}"
                os.rename(path, root / other)
                model[other] = model.pop(name)
            case 5 if body is not None:
                path.unlink()
                del model[name]
    return model


def test_a_read_only_mount_refuses_every_change(mounting: Mounting, folder: Folder) -> None:
    folder.put("d/file", b"content")
    mount = mounting.mount(folder.url, "--read-only")
    d = mount.directory / "d"
    for call in (
        lambda: (d / "new").write_bytes(b""),
        lambda: (d / "file").open("r+b"),
        lambda: os.truncate(d / "file", 0),
        lambda: os.unlink(d / "file"),
        lambda: os.mkdir(d / "x"),
        lambda: os.rmdir(d),
        lambda: os.rename(d / "file", d / "x"),
        lambda: os.symlink("x", d / "x"),
        lambda: os.chmod(d / "file", 0o600),
        lambda: os.utime(d / "file"),
        lambda: os.setxattr(d / "file", "user.x", b""),
    ):
        fails_with(errno.EROFS, call)
    assert (d / "file").read_bytes() == b"content"
