"""`sluice hint` and `sluice trace` on a real mount."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from cache.policy.order.spec import Spec
from tests.mounting import Folder, LiveMount, Mounting, content, sluice, until
from tools.mounted import sluice_command
from tools.simulate.trace import read_trace

FILES = 60


@pytest.fixture
def mount(mounting: Mounting, folder: Folder) -> LiveMount:
    for number in range(FILES):
        folder.put(f"train/c{number % 3}/{number:02d}.jpg", content(3000, number))
    return mounting.mount(folder.url, "--dram=64M", "--workers=1")


def told(
    mount: LiveMount, tmp_path: Path, text: bytes, *arguments: object
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "hint").write_bytes(text)
    return sluice("hint", tmp_path / "hint", *arguments)


def test_absolute_paths_need_no_directory(mount: LiveMount, tmp_path: Path) -> None:
    paths = [mount.directory / f"train/c{number % 3}/{number:02d}.jpg" for number in range(FILES)]
    done = told(mount, tmp_path, "\n".join(map(str, paths)).encode())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{mount.directory}/train: the order of {FILES} files\n"


def test_what_is_of_no_use_is_told_once_with_counts(mount: LiveMount, tmp_path: Path) -> None:
    text = b"c0/00.jpg\nc0/00.jpg\nnone.jpg\nc9/1.jpg\n\x00\x01\x02\nc1/01.jpg\n"
    done = told(mount, tmp_path, text, mount.directory / "train", "--json")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    counts = {"are there twice": 1, "are no text": 1, "are not in the mount": 2}
    answer = json.loads(done.stdout)
    assert (answer["files"], answer["useless"]) == (2, counts)
    assert "2 are not in the mount (train/none.jpg)" in done.stderr


def test_places_and_samplers_are_told_for_a_directory(mount: LiveMount, tmp_path: Path) -> None:
    done = told(mount, tmp_path, b"count=61\n5\n3\n99\n", mount.directory / "train")
    assert done.returncode == 0 and "the order of 2 files" in done.stdout
    assert (
        "1 are not in the mount (number 99 of 60)" in done.stderr
        and "the first line says 61 files, of use are 2" in done.stderr
    )
    done = told(mount, tmp_path, b"sampler=torch seed=3 world=2 ranks=0", mount.directory / "train")
    assert (done.returncode, done.stderr) == (0, "")
    assert "torch with seed 3, in this epoch and the next ones" in done.stdout


def test_what_was_told_is_fetched_before_anybody_reads(mount: LiveMount, tmp_path: Path) -> None:
    assert told(mount, tmp_path, b"sampler=torch seed=3", mount.directory / "train").returncode == 0

    def cached_share() -> float:
        return sum(float(one["cached_share"]) for one in mount.status()["sets"])

    until(lambda: cached_share() >= 48 / FILES, "the least that is ahead of a reader is cached")
    (shown,) = mount.status()["sets"]
    assert (shown["path"], shown["uses"], shown["order"]) == ("train", 0, "told: torch with seed 3")
    files = sorted(f"train/c{number % 3}/{number:02d}.jpg" for number in range(FILES))
    for place in Spec("torch", 3).order(FILES)[:8]:
        assert mount.read_anew(files[place]) == content(3000, int(files[place][-6:-4]))
    assert mount.reads()["bytes_by_source"]["lake"] == 0


def test_a_hint_may_name_its_directory_itself(mount: LiveMount, tmp_path: Path) -> None:
    done = told(mount, tmp_path, f"directory={mount.directory}/train\nc0/00.jpg\nc1/01.jpg\n".encode())
    assert (done.returncode, done.stderr) == (0, "") and "the order of 2 files" in done.stdout


@pytest.mark.parametrize(
    ("text", "directory", "said"),
    [
        (b"c0/00.jpg\n", None, "relative paths need their directory"),
        (b"1\n2\n", None, "places need the directory"),
        (b"1\n2\n", "nowhere", "nowhere: no such directory"),
        (b"1\n2\n", "train/c0/00.jpg", "no such directory"),
        (b"\0\1\n", "train", "no line names a file (1 are no text)"),
        (b"sampler=x", "train", "sampler=x: must be one of"),
        (b"x/y\nz\n", "train", "none of the 2 files of the hint is there"),
        (b"/etc/passwd\n", None, "not in a SluiceFS mount"),
    ],
)
def test_a_hint_of_no_use_is_refused_in_one_line(
    mount: LiveMount, tmp_path: Path, text: bytes, directory: str | None, said: str
) -> None:
    where = () if directory is None else (mount.directory / directory,)
    done = told(mount, tmp_path, text, *where)
    assert done.returncode in (1, 2) and done.stdout == ""
    assert done.stderr.count("\n") == 1 and said in done.stderr


def test_a_hint_that_is_not_there_is_refused(mount: LiveMount, tmp_path: Path) -> None:
    done = sluice("hint", tmp_path / "none", mount.directory)
    assert done.returncode == 2 and "No such file or directory" in done.stderr


def test_a_hint_longer_than_a_request_goes_in_parts(mount: LiveMount, tmp_path: Path) -> None:
    """A quarter of a million paths, sixty of which are there."""
    paths = [b"c%d/%02d.jpg" % (number % 3, number) for number in range(FILES)]
    paths += [b"c0/" + b"long-name-" * 4 + b"%d.jpg" % number for number in range(250_000)]
    done = told(mount, tmp_path, b"\n".join(paths), mount.directory / "train")
    assert done.returncode == 0 and f"the order of {FILES} files" in done.stdout
    assert "250,000 are not in the mount" in done.stderr


def test_what_is_read_is_recorded_and_can_be_replayed(mount: LiveMount, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    recording = subprocess.Popen(
        [sluice_command(), "trace", mount.directory, path, "--seconds=600"], stdout=subprocess.PIPE, text=True
    )
    try:
        until(lambda: path.exists() and path.stat().st_size > 0, "the recording has begun")
        for number in range(FILES):
            mount.read(f"train/c{number % 3}/{number:02d}.jpg")
        until(lambda: path.read_bytes().count(b"\n") > FILES, "all uses have arrived")
        recording.send_signal(signal.SIGINT)
        output, _ = recording.communicate(timeout=60)
    finally:
        recording.kill()
        recording.wait()
    assert recording.returncode == 0 and output.startswith(f"{path}: ")
    trace = read_trace(str(path))
    assert len(trace.sizes_bytes) == FILES and not trace.is_cut_off
    done = sluice("simulate", path, "--size=50%", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)["outcomes"]) == 6


def test_a_recording_of_no_mount_is_refused(tmp_path: Path) -> None:
    done = sluice("trace", tmp_path, tmp_path / "trace")
    assert done.returncode == 2 and "not in a SluiceFS mount" in done.stderr
    assert not (tmp_path / "trace").exists()
