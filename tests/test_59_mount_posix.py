"""Programs as they are find on the mount what they find on a local disk."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.mounting import (
    MIB,
    Folder,
    LiveMount,
    Mounting,
    content,
    kill_each,
    mounting_below,
)

WRITABLE = ("-o", "rw")


@pytest.fixture(scope="module")
def mount() -> Iterator[LiveMount]:
    """One writable mount for all tests. Its path is short: sockets are made in it."""
    home = Path(tempfile.mkdtemp(prefix="sluice-"))
    lake = Folder(home / "lake")
    lake.put("data/known", b"of the lake")
    with mounting_below(home) as mounting:
        yield mounting.mount(lake.url, *WRITABLE, "--ttl=600", "--upload-delay=0.3", "--workers=2")


@pytest.fixture
def work(mount: LiveMount, request: pytest.FixtureRequest) -> Path:
    """A directory of the test's own, with a short name."""
    made = mount.directory / f"w{len(os.listdir(mount.directory))}"
    made.mkdir()
    return made


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """Run a program; return what it printed. Fails the test when the program fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def needs(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def python(code: str, *arguments: object, **environment: str) -> str:
    return run(sys.executable, "-c", code, *arguments, **environment)


def make_tree(root: Path) -> None:
    """Files, links, modes, times, an empty directory."""
    for number in range(40):
        path = root / f"d{number % 5}" / f"file {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number * 1000, seed=number))
        os.chmod(path, 0o600 | number)
        os.utime(path, ns=(10**18 + number, 10**18 + 7 * number))
    (root / "empty").mkdir()
    os.symlink("d0/file 0", root / "link")
    for directory in [*root.iterdir(), root]:
        if directory.is_dir() and not directory.is_symlink():
            os.utime(directory, ns=(10**18, 10**18))


def tree(root: Path) -> dict[str, object]:
    """Return all of a tree that tools copy."""
    found: dict[str, object] = {}
    for where, directories, names in os.walk(root):
        for name in [*directories, *names]:
            path = Path(where, name)
            shown = os.lstat(path)
            if path.is_symlink():
                found[str(path.relative_to(root))] = os.readlink(path)
            else:
                body = path.read_bytes() if path.is_file() else b""
                found[str(path.relative_to(root))] = (stat.S_IMODE(shown.st_mode), shown.st_mtime_ns, body)
    return found


# Checkpoints and arrays


def test_checkpoints_replace_each_other(work: Path) -> None:
    """As torch.save and its callers do it: a temporary file, fsync, os.replace, fsync of the directory."""
    for step in range(10):
        with (work / "last.tmp").open("wb") as file:
            file.write(content(2 * MIB, seed=step))
            file.flush()
            os.fsync(file.fileno())
        os.replace(work / "last.tmp", work / "last.pt")
        directory = os.open(work, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        assert (work / "last.pt").read_bytes() == content(2 * MIB, seed=step)
    assert os.listdir(work) == ["last.pt"]


def test_arrays_are_saved_loaded_and_mapped(work: Path) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(300_000, dtype="float32").reshape(300, 1000)
    numpy.save(work / "a.npy", array)
    numpy.savez_compressed(work / "a.npz", one=array, two=array * 2)
    assert (numpy.load(work / "a.npy") == array).all()
    assert (numpy.load(work / "a.npz")["two"] == array * 2).all()
    mapped = numpy.lib.format.open_memmap(work / "m.npy", mode="w+", dtype="int64", shape=(1000, 100))
    mapped[:] = numpy.arange(100)
    mapped.flush()
    del mapped
    assert (numpy.load(work / "m.npy", mmap_mode="r")[500] == numpy.arange(100)).all()


def test_archives_are_written_appended_to_and_read(work: Path) -> None:
    with zipfile.ZipFile(work / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"{number}", content(20_000, seed=number))
    with zipfile.ZipFile(work / "a.zip", "a") as archive:
        archive.writestr("more", b"more")
    with zipfile.ZipFile(work / "a.zip") as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 21
        assert archive.read("7") == content(20_000, seed=7)


@pytest.mark.parametrize("module", ["torch", "safetensors.numpy", "h5py"])
def test_formats_of_training_are_written_and_read(work: Path, module: str) -> None:
    library = pytest.importorskip(module)
    numpy = pytest.importorskip("numpy")
    array, path = numpy.arange(10_000, dtype="float32"), work / "file"
    if module == "torch":
        library.save({"w": library.from_numpy(array)}, path)
        got = library.load(path)["w"].numpy()
    elif module == "h5py":
        with library.File(path, "w") as file:
            file["w"] = array
        with library.File(path, "r+") as file:
            got = file["w"][:]
    else:
        library.save_file({"w": array}, path)
        got = library.load_file(path)["w"]
    assert (got == array).all()


# Databases and locks

_INSERT = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for number in range(int(sys.argv[3])):
    db.execute("INSERT INTO t VALUES (?, ?)", (sys.argv[2], number))
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_database_takes_rows_from_two_processes(work: Path, mode: str) -> None:
    path = work / "db"
    database = sqlite3.connect(path, isolation_level=None)
    assert database.execute(f"PRAGMA journal_mode={mode}").fetchone()[0] == mode
    database.execute("CREATE TABLE t (who TEXT, number INTEGER)")
    command = [sys.executable, "-c", _INSERT, str(path)]
    running = [subprocess.Popen([*command, who, "25"]) for who in "ab"]
    assert [process.wait(90) for process in running] == [0, 0]
    rows = database.execute("SELECT who, number FROM t ORDER BY who, number").fetchall()
    assert rows == [(who, number) for who in "ab" for number in range(25)]
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    with closing(sqlite3.connect(path)) as again:
        assert again.execute("SELECT count(*) FROM t").fetchone() == (50,)


_TRY_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
try:
    getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError as error:
    print("taken")
else:
    print("free")
"""


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_locks_hold_between_processes(work: Path, kind: str) -> None:
    path = work / "lock"
    path.write_bytes(b"")
    with path.open("r+b") as file:
        getattr(fcntl, kind)(file, fcntl.LOCK_EX)
        assert python(_TRY_LOCK, path, kind) == "taken\n"
        getattr(fcntl, kind)(file, fcntl.LOCK_UN)
        assert python(_TRY_LOCK, path, kind) == "free\n"


# Programs that copy


def test_tar_unpacks_and_packs(work: Path, tmp_path: Path) -> None:
    tar = needs("tar")
    make_tree(tmp_path / "tree")
    run(tar, "--format=posix", "-cf", tmp_path / "a.tar", "-C", tmp_path, "tree")
    run(tar, "-xpf", tmp_path / "a.tar", "-C", work)
    assert tree(work / "tree") == tree(tmp_path / "tree")
    run(tar, "-czf", work / "b.tar.gz", "-C", work, "tree")
    with tarfile.open(work / "b.tar.gz") as archive:
        member = archive.extractfile("tree/d3/file 3")
        assert member is not None and member.read() == content(3000, seed=3)


def test_cp_keeps_all_it_is_told_to_keep(work: Path, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    run("cp", "-a", tmp_path / "tree", work / "in")
    run("cp", "-a", work / "in", work / "within")
    run("cp", "-a", work / "within", tmp_path / "out")
    assert tree(work / "in") == tree(work / "within") == tree(tmp_path / "out") == tree(tmp_path / "tree")
    run("rm", "-r", work / "in", work / "within")
    assert os.listdir(work) == []


def test_rsync_copies_once(work: Path, tmp_path: Path) -> None:
    rsync = needs("rsync")
    make_tree(tmp_path / "tree")
    run(rsync, "-a", tmp_path / "tree/", work / "copy")
    assert tree(work / "copy") == tree(tmp_path / "tree")
    assert run(rsync, "-ai", tmp_path / "tree/", work / "copy") == ""


def test_python_copies_moves_and_removes_trees(work: Path, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    shutil.copytree(tmp_path / "tree", work / "a", symlinks=True)
    shutil.move(work / "a", work / "b")
    assert tree(work / "b") == tree(tmp_path / "tree")
    shutil.move(work / "b", tmp_path / "c")
    assert tree(tmp_path / "c") == tree(tmp_path / "tree")
    assert os.listdir(work) == []


# Development


def test_git_clones_commits_and_finds_nothing_wrong(work: Path, tmp_path: Path) -> None:
    git = needs("git")
    who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    source = tmp_path / "source"
    make_tree(source)
    run(git, "init", "-q", source)
    for step in range(3):
        (source / "changing").write_bytes(content(50_000, seed=step))
        run(git, "-C", source, "add", ".")
        run(git, "-C", source, "commit", "-q", "-m", f"step {step}", **who)
    run(git, "clone", "-q", "--no-local", source, work / "clone")
    run(git, "-C", work / "clone", "fsck", "--full", "--strict")
    assert run(git, "-C", work / "clone", "status", "--porcelain") == ""
    (work / "clone/new").write_text("new")
    run(git, "-C", work / "clone", "add", "new")
    run(git, "-C", work / "clone", "commit", "-q", "-m", "new", **who)
    run(git, "-C", work / "clone", "checkout", "-q", "HEAD~2")
    assert (work / "clone/changing").read_bytes() == content(50_000, seed=1)
    run(git, "-C", work / "clone", "gc", "-q")
    run(git, "-C", work / "clone", "fsck", "--full")


def test_a_module_that_was_just_written_is_imported(work: Path) -> None:
    """The import system looks at a directory's mtime to see whether it knows its entries."""
    code = """
import importlib, os, sys
sys.path.insert(0, sys.argv[1])
for number in range(20):
    with open(os.path.join(sys.argv[1], f"made_{number}.py"), "w") as file:
        file.write(f"value = {number}")
    assert importlib.import_module(f"made_{number}").value == number
"""
    python(code, work)


def make_wheel(directory: Path) -> Path:
    path = directory / "tiny_thing-1.0-py3-none-any.whl"
    about = "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_thing/__init__.py", "value = 42\n")
        wheel.writestr("tiny_thing/data.bin", content(500_000, seed=5))
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    return path


def test_pip_installs_into_a_directory(work: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    wheel = make_wheel(tmp_path)
    options = ("--no-index", "--no-deps", "--no-cache-dir", "-q", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "install", *options, "--target", work / "site", wheel, TMPDIR=str(work))
    assert python("import tiny_thing; print(tiny_thing.value)", PYTHONPATH=str(work / "site")) == "42\n"
    assert (work / "site/tiny_thing/data.bin").read_bytes() == content(500_000, seed=5)


_PROCESSES = """
import multiprocessing as mp, os, sys, tempfile
from multiprocessing.managers import BaseManager

def work(number):
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(number))
        file.flush()
        return os.path.getsize(file.name)

if __name__ == "__main__":
    assert tempfile.gettempdir() == os.environ["TMPDIR"]
    context = mp.get_context("forkserver")
    with context.Pool(2) as pool:
        assert pool.map(work, range(20)) == list(range(20))
    with mp.Manager() as manager:
        shared = manager.dict(one=1)
        assert shared["one"] == 1
    print("done")
"""


def test_multiprocessing_has_its_temporary_files_on_the_mount(work: Path, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(_PROCESSES)
    assert run(sys.executable, tmp_path / "main.py", TMPDIR=str(work)) == "done\n"
    assert os.listdir(work) == []


def test_files_without_a_name_are_used_as_temporary_files(work: Path) -> None:
    with tempfile.TemporaryFile(dir=work) as file:
        file.write(b"x" * 100_000)
        file.seek(0)
        assert len(file.read()) == 100_000
    with tempfile.SpooledTemporaryFile(max_size=10, dir=work) as spooled:
        spooled.write(b"y" * 1000)
        spooled.seek(-5, io.SEEK_END)
        assert spooled.read() == b"y" * 5
    assert os.listdir(work) == []


# Processes that die


def test_nothing_is_lost_or_done_twice_when_workers_and_mover_are_killed(
    mounting: Mounting, folder: Folder
) -> None:
    """The kernel sends what was unanswered again; a rename or an O_EXCL that came twice would fail."""
    mount = mounting.mount(folder.url, *WRITABLE, "--workers=2", "--upload-delay=0.2")
    root, stop, kills = mount.directory, threading.Event(), [0]

    def kill_on() -> None:
        for turn in range(1, 1000):
            if stop.wait(0.3):
                return
            for pid in mount_pids(mount, "mover" if turn % 3 == 0 else "workers")[:1]:
                kill_each([pid])
                kills[0] += 1

    killer = threading.Thread(target=kill_on)
    killer.start()
    try:
        log = os.open(root / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        number = 0
        while kills[0] < 6 and killer.is_alive():
            os.mkdir(root / f"d{number}")
            path = root / f"d{number}/file"
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(fd, content(50_000, seed=number))
            os.fsync(fd)
            os.close(fd)
            os.rename(path, root / f"{number}.done")
            os.rmdir(root / f"d{number}")
            os.write(log, b"%08d\n" % number)
            number += 1
        os.close(log)
    finally:
        stop.set()
        killer.join(60)
    assert kills[0] >= 6
    assert sorted(os.listdir(root)) == sorted([*(f"{n}.done" for n in range(number)), "log"])
    for n in range(number):
        assert mount.read(f"{n}.done") == content(50_000, seed=n)
    assert mount.read("log") == b"".join(b"%08d\n" % n for n in range(number))


def mount_pids(mount: LiveMount, kind: str) -> list[int]:
    try:
        return mount.pids()[kind]
    except Exception:  # The mover, which would say so, is the one that was killed last.
        return []
