"""The lake changes under a mount: paths follow within the ttl, and no reader sees a mixture.

An inode is one object version. A handle opened on an old one reads the old bytes or ESTALE. On
the default profile open(2) sends no request, so there the first read may be the one that learns
of a change: ESTALE then, and the path is right when it is opened again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.memory_s3 import MemoryS3
from tests.mounting import MIB, Folder, Lake, LiveMount, Mounting, content, until

TTL_S = 0.4
# The default profile, and the one whose open(2) asks; each with one kind of lake, which does not matter.
PAIRS = {"directory-checkpoint": ("folder", "checkpoint"), "S3-dataset": ("prefix", "dataset")}


@pytest.fixture(params=list(PAIRS.values()), ids=list(PAIRS))
def lake_and_profile(request: pytest.FixtureRequest) -> tuple[Lake, str]:
    lake, profile = request.param
    return request.getfixturevalue(lake), f"--profile={profile}"


@pytest.fixture
def lake(lake_and_profile: tuple[Lake, str]) -> Lake:
    return lake_and_profile[0]


@pytest.fixture
def profile(lake_and_profile: tuple[Lake, str]) -> str:
    return lake_and_profile[1]


def mount_it(mounting: Mounting, lake: Lake, *options: str, ttl_s: float = TTL_S) -> LiveMount:
    return mounting.mount(lake.url, *lake.options, f"--ttl={ttl_s}", *options)


def read_or_stale(path: Path) -> bytes | None:
    """Return the file's bytes; None where the kernel says that they are another version's by now."""
    try:
        return path.read_bytes()
    except OSError as error:
        assert error.errno == errno.ESTALE, error
        return None


def test_an_overwritten_object_shows_its_new_bytes_under_a_new_inode(
    mounting: Mounting, lake: Lake, profile: str
) -> None:
    old, new, longer = content(300_000, seed=1), content(300_000, seed=2), content(9 * MIB, seed=3)
    lake.put("d/file", old)
    mount = mount_it(mounting, lake, profile)
    path = mount.directory / "d/file"
    before = path.read_bytes(), os.stat(path).st_ino
    assert before[0] == old
    for replaced, replacing in ((old, new), (new, longer), (longer, b"")):
        lake.put("d/file", replacing)

        def shows_new(replaced: bytes = replaced, replacing: bytes = replacing) -> bool:
            found = read_or_stale(path)
            assert found in (replaced, replacing, None), "a mixture"
            return found == replacing

        until(shows_new, "the new bytes show")
        assert os.stat(path).st_size == len(replacing)
    assert os.stat(path).st_ino != before[1]


def test_a_deleted_object_is_gone_and_a_new_one_is_there_after_the_ttl(
    mounting: Mounting, lake: Lake, profile: str
) -> None:
    for name in ("d/goes", "d/stays"):
        lake.put(name, name.encode())
    mount = mount_it(mounting, lake, profile)
    assert sorted(os.listdir(mount.directory / "d")) == ["goes", "stays"]
    assert mount.read("d/goes") == b"d/goes"
    assert not (mount.directory / "d/comes").exists()
    assert not (mount.directory / "e").exists()
    lake.delete("d/goes")
    lake.put("d/comes", b"new")
    lake.put("e/f/deep", b"deep")
    until(lambda: not (mount.directory / "d/goes").exists(), "the deleted name is gone")
    until((mount.directory / "d/comes").exists, "the new name is there")
    until((mount.directory / "e/f/deep").exists, "the new directory is there")
    assert sorted(os.listdir(mount.directory / "d")) == ["comes", "stays"]
    assert (mount.read("d/comes"), mount.read("e/f/deep")) == (b"new", b"deep")
    lake.put("d/goes", b"again")
    until((mount.directory / "d/goes").exists, "the name is back")
    until(lambda: read_or_stale(mount.directory / "d/goes") == b"again", "with its new bytes")


@pytest.mark.parametrize(
    ("kind", "profile"), [("folder", "--profile=dataset"), ("memory_s3", "--profile=checkpoint")]
)
def test_a_file_becomes_a_directory_and_a_file_again(
    mounting: Mounting, request: pytest.FixtureRequest, kind: str, profile: str
) -> None:
    """On lakes that show no directory without a key below it: SeaweedFS does, for a while."""
    lake: Lake = request.getfixturevalue(kind)
    lake.put("x", b"file")
    lake.put("other", b"other")
    mount = mount_it(mounting, lake, profile)
    path = mount.directory / "x"
    assert path.read_bytes() == b"file"
    for _ in range(2):
        lake.delete("x")
        lake.put("x/inside", b"inside")
        until(lambda: (path / "inside").is_file(), "the file is a directory")
        assert os.listdir(path) == ["inside"]
        assert (path / "inside").read_bytes() == b"inside"
        lake.delete("x/inside")
        if isinstance(lake, Folder):
            (lake.path / "x").rmdir()
        until(lambda: not path.is_dir(), "the directory is gone")
        lake.put("x", b"file again")
        until(path.is_file, "the directory is a file")
        until(lambda: read_or_stale(path) == b"file again", "with its bytes")


def preads(fd: int, size: int, step: int) -> Iterator[tuple[int, bytes]]:
    for offset in range(0, size, step):
        try:
            yield offset, os.pread(fd, step, offset)
        except OSError as error:
            assert error.errno == errno.ESTALE, error


@pytest.mark.parametrize("evicted", [False, True], ids=["cached", "evicted"])
def test_a_handle_opened_before_a_change_reads_old_bytes_or_estale(
    mounting: Mounting, lake: Lake, profile: str, evicted: bool
) -> None:
    old, new = content(21 * MIB, seed=4), content(21 * MIB, seed=5)
    lake.put("large", old)
    mount = mount_it(mounting, lake, profile)
    path = mount.directory / "large"
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(fd, MIB, 3 * MIB) == old[3 * MIB : 4 * MIB]
        lake.put("large", new)
        if evicted:
            mount.evict("large")
        for offset, piece in preads(fd, len(old), MIB):
            assert piece == old[offset : offset + MIB], "not the bytes of the version that was opened"
        until(lambda: read_or_stale(path) == new, "the path shows the new bytes")
        for offset, piece in preads(fd, len(old), MIB):
            assert piece == old[offset : offset + MIB]
    finally:
        os.close(fd)


def test_an_open_handle_outlives_the_deletion_of_its_cached_object(mounting: Mounting, lake: Lake) -> None:
    body = content(2 * MIB, seed=6)
    lake.put("d/file", body)
    mount = mount_it(mounting, lake)
    with (mount.directory / "d/file").open("rb", buffering=0) as file:
        assert file.read() == body
        lake.delete("d/file")
        until(lambda: not (mount.directory / "d/file").exists(), "the name is gone")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), len(body), 0) == body
        assert os.fstat(file.fileno()).st_size == len(body)


def test_within_the_ttl_an_open_finds_the_version_that_the_lake_has_now(
    mounting: Mounting, lake: Lake
) -> None:
    """The index says the old version, the cache has lost it: open(2) is tried again by the kernel."""
    lake.put("d/file", content(200_000, seed=7))
    lake.put("d/gone", content(1000, seed=7))
    mount = mount_it(mounting, lake, "--profile=checkpoint", ttl_s=600)
    os.listdir(mount.directory / "d")
    lake.put("d/file", content(250_000, seed=8))
    lake.delete("d/gone")
    assert mount.read("d/file") == content(250_000, seed=8)
    with pytest.raises(FileNotFoundError):
        mount.read("d/gone")
    assert os.stat(mount.directory / "d/file").st_size == 250_000


@pytest.mark.parametrize("size_bytes", [200_000, 9 * MIB], ids=["small", "large"])
def test_within_the_ttl_a_path_is_right_after_one_estale(
    mounting: Mounting, lake: Lake, profile: str, size_bytes: int
) -> None:
    old, new = content(size_bytes, seed=9), content(size_bytes, seed=10)
    lake.put("d/file", old)
    mount = mount_it(mounting, lake, profile, ttl_s=600)
    os.listdir(mount.directory / "d")
    lake.put("d/file", new)
    first = read_or_stale(mount.directory / "d/file")
    assert first in (new, None)
    until(lambda: read_or_stale(mount.directory / "d/file") == new, "the path shows what the lake has", 5)


def test_endless_overwriting_never_shows_a_mixture(mounting: Mounting, lake: Lake, profile: str) -> None:
    """Each version is one byte repeated, so that any mixture shows, in the small and the large file."""
    sizes = {"small": 400_000, "large": 9 * MIB}
    for name, size in sizes.items():
        lake.put(name, bytes([1]) * size)
    mount = mount_it(mounting, lake, profile, "--dram=64M")
    stop, wrong, seen = threading.Event(), [], {name: set[int]() for name in sizes}

    def read_on(name: str) -> None:
        while not stop.is_set():
            body = read_or_stale(mount.directory / name)
            if body is None:
                continue
            kinds = set(body)
            if len(kinds) != 1 or len(body) != sizes[name]:
                wrong.append((name, len(body), kinds))
                return
            seen[name] |= kinds

    readers = [threading.Thread(target=read_on, args=(name,)) for name in sizes for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for version in range(2, 8):
            for name, size in sizes.items():
                lake.put(name, bytes([version]) * size)
            stop.wait(0.1)
        until(lambda: wrong or all(7 in kinds for kinds in seen.values()), "the last version shows")
    finally:
        stop.set()
        for reader in readers:
            reader.join(20)
    assert wrong == []
    assert all(len(kinds) > 1 for kinds in seen.values()), seen


def test_a_handle_reads_right_while_its_object_comes_back(mounting: Mounting, memory_s3: MemoryS3) -> None:
    """A to B to A: the same ETag is the same version, so bytes of the first A still count."""
    first, second = content(300_000, seed=11), content(300_000, seed=12)
    memory_s3.put("file", first)
    mount = mounting.mount(memory_s3.url, f"--endpoint-url={memory_s3.endpoint_url}", f"--ttl={TTL_S}")
    assert mount.read("file") == first
    memory_s3.put("file", second)
    until(lambda: mount.read("file") == second, "the second version shows")
    memory_s3.put("file", first)
    until(lambda: mount.read("file") == first, "the first version shows again")
    assert memory_s3.gets["file"] == 2
