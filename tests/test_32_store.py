"""The cache directory: who holds it, whose it is, and when its index is believed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache import store
from cache.config import CacheDirectory, LakeConfig, MountConfig
from cache.errors import UsageError
from cache.store import CacheStore, forget_power_loss, kept_all_bytes, note_owner, open_store

LAKE = LakeConfig("s3://bucket/prefix")


def config_of(*paths: Path, lake: LakeConfig = LAKE) -> MountConfig:
    return MountConfig(lake, Path("/mnt/nowhere"), tuple(CacheDirectory(path) for path in paths))


@contextmanager
def opened(*paths: Path, lake: LakeConfig = LAKE) -> Iterator[CacheStore]:
    held = open_store(config_of(*paths, lake=lake))
    try:
        yield held
    finally:
        held.release()


def put_index(directory: Path) -> Path:
    """Make something stand where the index is."""
    path = directory / "index.lmdb" / "data.mdb"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"index")
    return path


def end_of_machine(monkeypatch: pytest.MonkeyPatch, boot: str = "another boot") -> None:
    monkeypatch.setattr(store, "boot_id", lambda: boot)


def test_a_missing_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "b") as held:
        assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
        assert len(held.id) == 16


def test_a_directory_is_held_by_one_mount_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as held:
        note_owner(held, "pid 42, /mnt/data")
        with pytest.raises(UsageError, match=r"in use by another mount \(pid 42, /mnt/data\)"):
            open_store(config_of(tmp_path / "c"))
    with opened(tmp_path / "c"):
        pass


def test_a_refused_mount_lets_go_of_the_directories_that_it_had(tmp_path: Path) -> None:
    with opened(tmp_path / "b"):
        with pytest.raises(UsageError, match="in use"):
            open_store(config_of(tmp_path / "a", tmp_path / "b"))
        with opened(tmp_path / "a"):
            pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from tests.test_32_store import config_of;"
        "from cache.store import open_store; open_store(config_of(Path(sys.argv[1]))); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, timeout=60)
    with opened(tmp_path / "c"):
        pass


def test_a_directory_with_foreign_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="no SluiceFS cache; name an empty directory"):
        open_store(config_of(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("name", ["lock", "log", "lost+found", "format.new"])
def test_what_may_lie_in_an_unused_directory_is_not_foreign(tmp_path: Path, name: str) -> None:
    """format.new: the machine stopped, or the disk was full, when the directory was first used."""
    (tmp_path / name).write_bytes(b"")
    with opened(tmp_path):
        pass


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sluicefs-cache 99\nid\nlake\n",
        "sluicefs-cache 2\nid\n",
        "sluicefs-cache 1\nid\nlake\n",
        "\xff\xfe",
    ],
)
def test_an_unknown_format_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "format").write_text(text)
    with pytest.raises(UsageError, match="its format is"):
        open_store(config_of(tmp_path))


def test_a_cache_serves_one_lake(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as held:
        held.note_lake_answered()
    other = LakeConfig("s3://other")
    with pytest.raises(UsageError, match=r"holds the cache of .*bucket/prefix.*, not of .*s3://other"):
        open_store(config_of(tmp_path / "c", lake=other))
    endpoint = LakeConfig(LAKE.url, endpoint_url="http://127.0.0.1:1")
    with pytest.raises(UsageError, match="holds the cache of"):
        open_store(config_of(tmp_path / "c", lake=endpoint))


def test_a_lake_that_never_answered_has_no_cache(tmp_path: Path) -> None:
    with opened(tmp_path / "c", lake=LakeConfig("s3://mistyped")) as held:
        first = held.id
    with opened(tmp_path / "c", tmp_path / "d") as held:
        assert held.id == first, "what was made for it is used on"
        held.note_lake_answered()
    for directory in (tmp_path / "c", tmp_path / "d"):
        with pytest.raises(UsageError, match="holds the cache of"):
            open_store(config_of(directory, lake=LakeConfig("s3://mistyped")))


def test_directories_used_together_share_an_id_and_new_ones_may_join(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as held:
        first = held.id
    with opened(tmp_path / "a", tmp_path / "b") as held:
        assert held.id == first
    with opened(tmp_path / "b") as held:
        assert held.id == first


def test_directories_of_two_caches_are_not_mixed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with opened(tmp_path / name):
            pass
    with pytest.raises(UsageError, match="another set of cache directories"):
        open_store(config_of(tmp_path / "a", tmp_path / "b"))


def test_the_index_is_believed_after_a_killed_process(tmp_path: Path) -> None:
    with opened(tmp_path):
        index = put_index(tmp_path)
    with opened(tmp_path):
        assert index.exists()


def test_the_index_is_removed_after_a_machine_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path):
        index = put_index(tmp_path)
    end_of_machine(monkeypatch)
    with opened(tmp_path):
        assert not index.exists()


def test_the_index_is_believed_after_a_clean_unmount_and_a_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as held:
        index = put_index(tmp_path)
        held.mark_clean()
    end_of_machine(monkeypatch)
    with opened(tmp_path):
        assert index.exists()


def test_a_clean_mark_holds_for_one_mount_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as held:
        held.mark_clean()
    with opened(tmp_path):
        index = put_index(tmp_path)
    end_of_machine(monkeypatch)
    with opened(tmp_path):
        assert not index.exists()


def test_an_index_of_unknown_boot_is_not_believed(tmp_path: Path) -> None:
    with opened(tmp_path):
        index = put_index(tmp_path)
    (tmp_path / "boot").unlink()
    with opened(tmp_path):
        assert not index.exists()


def test_a_power_loss_is_known_of_until_its_recovery_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not kept_all_bytes(tmp_path)
    with opened(tmp_path):
        forget_power_loss(tmp_path)
    with opened(tmp_path):
        assert kept_all_bytes(tmp_path)
    end_of_machine(monkeypatch)
    assert not kept_all_bytes(tmp_path)
    for _ in range(2):  # The first mount may end before it has recovered anything.
        with opened(tmp_path) as held:
            assert not kept_all_bytes(tmp_path)
            held.mark_clean()
    forget_power_loss(tmp_path)
    with opened(tmp_path) as held:
        assert kept_all_bytes(tmp_path)
        held.mark_clean()
    end_of_machine(monkeypatch, "a third boot")
    with opened(tmp_path):
        assert kept_all_bytes(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_gets_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="permission denied; name a directory that you may write to"):
        open_store(config_of(tmp_path / "c"))
    tmp_path.chmod(0o700)


def test_a_file_in_the_directorys_place_gets_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(UsageError, match="not a directory; name a directory"):
        open_store(config_of(tmp_path / "c"))
