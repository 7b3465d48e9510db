"""Staging files: names, space, descriptors, and what is kept of what nobody owns."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from cache import staging as staging_module
from cache.errors import CacheError, StagingFull
from cache.staging import StagingFiles, is_open_for_writing


@pytest.fixture
def staging(tmp_path: Path) -> StagingFiles:
    files = StagingFiles(tmp_path, fds_max=3)
    files.prepare()
    return files


def fill(staging: StagingFiles, number: int, body: bytes = b"body") -> None:
    staging.create(number)
    Path(staging.path(number)).write_bytes(body)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_is_named_by_its_number_in_hex(staging: StagingFiles, tmp_path: Path) -> None:
    staging.create(0x1A2B)
    assert Path(staging.path(0x1A2B)) == tmp_path / "staging" / "1a2b"
    assert staging.exists(0x1A2B) and not staging.exists(1)
    assert staging.stat(0x1A2B).st_mode & 0o777 == 0o600
    staging.prepare()
    assert staging.numbers() == [0x1A2B]


def test_no_number_is_used_twice(staging: StagingFiles) -> None:
    fill(staging, 5)
    assert not staging.create(5)
    assert staging.stat(5).st_size == 4


def test_numbers_are_those_of_our_files_only(staging: StagingFiles) -> None:
    for number in (0x10, 2, 0xF):
        staging.create(number)
    for name in ("0", "02", "F", "0x3", "1_0", "+4", "note", "-5"):
        (staging.directory / name).touch()
    assert staging.numbers() == [2, 0xF, 0x10]


def test_removing_twice_is_no_error_and_a_missing_file_is_one(staging: StagingFiles) -> None:
    fill(staging, 1)
    staging.remove(1)
    staging.remove(1)
    assert staging.numbers() == []
    for call in (staging.stat, staging.fd, lambda number: staging.truncate(number, 0)):
        with pytest.raises(CacheError, match="staging/1: No such file"):
            call(1)


def test_used_bytes_are_those_on_the_disk(staging: StagingFiles) -> None:
    assert staging.used_bytes() == 0
    fill(staging, 1, b"x" * 100_000)
    staging.create(2)
    os.truncate(staging.path(2), 1 << 30)  # A hole takes nothing.
    staging.sync_all()
    assert 100_000 <= staging.used_bytes() <= 150_000


def test_truncating_leaves_the_time_of_the_last_change(staging: StagingFiles) -> None:
    fill(staging, 1, b"0123456789")
    os.utime(staging.path(1), ns=(5, 12345))
    staging.truncate(1, 4)
    assert Path(staging.path(1)).read_bytes() == b"0123"
    assert staging.stat(1).st_mtime_ns == 12345


@pytest.mark.parametrize(
    ("name", "kept_as"),
    [
        (b"d/e/model.pt", b"model.pt-ab"),
        (b"", b"unnamed-ab"),
        (b"d/" + b"x" * 255, b"x" * 252 + b"-ab"),
        (b"\xff", b"\xff-ab"),
        (b"a-ff", b"a-ff-ab"),
    ],
)
def test_what_is_lost_keeps_its_name_and_number(
    staging: StagingFiles, tmp_path: Path, name: bytes, kept_as: bytes
) -> None:
    fill(staging, 0xAB)
    path = staging.to_lost_found(0xAB, name)
    assert os.fsencode(path) == os.fsencode(tmp_path) + b"/lost+found/" + kept_as
    assert Path(path).read_bytes() == b"body"
    assert staging.numbers() == [] and staging.lost_numbers() == {0xAB}


def test_nothing_is_lost_where_there_is_no_lost_found(staging: StagingFiles, tmp_path: Path) -> None:
    assert staging.lost_numbers() == set()
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "lost+found" / "#1234").touch()
    (tmp_path / "lost+found" / "other").touch()
    assert staging.lost_numbers() == set()


@pytest.mark.parametrize("count", [1, 20])
def test_few_files_are_synced_by_themselves_and_many_at_once(
    staging: StagingFiles, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = range(1, count + 1)
    for number in numbers:
        staging.create(number)
    staging.remove(1)  # One that is gone is no error.
    synced: list[int] = []
    monkeypatch.setattr(staging, "sync_all", lambda: synced.append(0))
    monkeypatch.setattr(staging_module.os, "fdatasync", synced.append)
    staging.sync(numbers)
    assert synced == ([0] if count > 1 else [])
    staging.sync([2] if count > 1 else [])
    assert len(synced) == (2 if count > 1 else 0)


def test_syncing_works_and_its_failure_is_told(
    staging: StagingFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(staging, 1)
    staging.sync([1])
    staging.sync_all()
    staging.sync_entries()

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(staging_module.os, "fdatasync", fail)
    with pytest.raises(CacheError, match="Input/output"):
        staging.sync([1])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_staging_full(
    staging: StagingFiles, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(staging_module.os, "open", fail)
    with pytest.raises(StagingFull):
        staging.create(1)


def test_a_staging_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "staging").touch()
    with pytest.raises(CacheError, match="staging"):
        StagingFiles(tmp_path).prepare()


# Descriptors


def test_descriptors_are_kept_and_bounded(staging: StagingFiles) -> None:
    for number in range(1, 10):
        fill(staging, number, b"%d" % number)
    before = open_fds()
    for _ in range(3):
        for number in range(1, 10):
            assert os.pread(staging.fd(number), 9, 0) == b"%d" % number
            assert staging.fd(number) == staging.fd(number)
            os.pwrite(staging.fd(number), b"%d" % number, 0)
    assert open_fds() == before + 3
    staging.close()
    assert open_fds() == before


def test_a_held_descriptor_outlives_all_others(staging: StagingFiles) -> None:
    for number in range(1, 10):
        fill(staging, number, b"%d" % number)
    before = open_fds()
    with staging.held(1) as fd, staging.held(1) as same, staging.held(2), staging.held(3), staging.held(4):
        assert fd == same
        for number in range(5, 10):
            staging.fd(number)
        assert os.pread(fd, 9, 0) == b"1"
        assert open_fds() == before + 5  # The four that are held, and the last one.
    assert open_fds() == before + 3
    staging.close()


def test_a_descriptor_that_is_released_while_held_is_closed_after_it(staging: StagingFiles) -> None:
    fill(staging, 1)
    before = open_fds()
    with staging.held(1) as fd:
        staging.remove(1)
        assert os.pread(fd, 9, 0) == b"body"
    assert open_fds() == before
    staging.release(1)


def test_descriptors_of_removed_files_give_their_space_back(staging: StagingFiles) -> None:
    for number in (1, 2, 3):
        fill(staging, number)
        staging.fd(number)
    before = open_fds()
    os.unlink(staging.path(1))  # By another process.
    os.unlink(staging.path(3))
    with staging.held(3):
        staging.release_removed()
        assert open_fds() == before - 1
    assert open_fds() == before - 2
    staging.fd(2)
    staging.close()


def test_idle_descriptors_are_closed_and_used_ones_stay(tmp_path: Path) -> None:
    staging = StagingFiles(tmp_path)
    staging.prepare()
    for number in (1, 2, 3):
        staging.create(number)
    kept, _ = staging.fd(1), staging.fd(2)
    with staging.held(3) as held:
        staging.release_idle()
        assert staging.fd(1) == kept
        staging.release_idle()
        assert staging.fd(1) == kept
        os.fstat(held)
    assert is_open_for_writing_path(staging.path(1)) and not is_open_for_writing_path(staging.path(2))
    staging.close()


def is_open_for_writing_path(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return is_open_for_writing(fd)
    finally:
        os.close(fd)


def test_a_file_that_is_open_or_mapped_for_writing_is_known_as_such(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    assert not is_open_for_writing_path(str(path))
    with path.open("rb"):
        assert not is_open_for_writing_path(str(path))
    with path.open("r+b") as file:
        assert is_open_for_writing_path(str(path))
        mapped = mmap.mmap(file.fileno(), 0)
    assert is_open_for_writing_path(str(path))
    mapped.close()
    assert not is_open_for_writing_path(str(path))
