"""What people run on a training machine works on the mount, and what it wrote is the same after a remount."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.mounting import MIB, Folder, LiveMount, Mounting, content

Entry = tuple[int, bytes, int]  # Mode with the kind, content or target, mtime in ns.


@pytest.fixture
def mount(mounting: Mounting, folder: Folder) -> Iterator[LiveMount]:
    """An empty lake, mounted. What a test left in it must be there after a remount."""
    made = mounting.mount(folder.url, "--no-read-only", "--upload-delay=0.1")
    yield made
    before = snapshot(made.directory)
    made.remount()
    assert snapshot(made.directory) == before
    assert "Traceback" not in made.log()


def snapshot(root: Path) -> dict[str, Entry]:
    """Return all files, directories and symlinks below *root*. A directory's time is left out."""
    found: dict[str, Entry] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            found[str(path.relative_to(root))] = (status.st_mode, os.fsencode(os.readlink(path)), 0)
        elif stat.S_ISREG(status.st_mode):
            found[str(path.relative_to(root))] = (status.st_mode, path.read_bytes(), status.st_mtime_ns)
        elif stat.S_ISDIR(status.st_mode):
            found[str(path.relative_to(root))] = (status.st_mode, b"", 0)
    return found


def run(*command: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Return what the command printed. Fails with what it said when it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def tree_of_files(root: Path) -> None:
    """Make files, a symlink, an empty directory and a program, with times of their own."""
    for number in range(30):
        path = root / f"d{number % 3}" / f"file {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number * 5000, seed=73))
        os.utime(path, ns=(10**18 + number, 10**18 + number * 1000))
    (root / "program").write_text("#!/bin/sh\necho it runs\n")
    (root / "program").chmod(0o755)
    (root / "link").symlink_to("d0/file 3")
    (root / "empty").mkdir()


# --- Archives and copies -------------------------------------------------------------------------


def test_tar_unpacks_and_packs(mount: LiveMount, tmp_path: Path) -> None:
    needs("tar")
    tree_of_files(tmp_path / "tree")
    run("tar", "--format=posix", "-cf", tmp_path / "t.tar", "-C", tmp_path / "tree", ".")
    (mount.directory / "tree").mkdir()
    run("tar", "-xf", tmp_path / "t.tar", "-C", mount.directory / "tree")
    assert snapshot(mount.directory / "tree") == snapshot(tmp_path / "tree")
    run("tar", "-czf", mount.directory / "t.tgz", "-C", mount.directory / "tree", ".")
    with tarfile.open(mount.directory / "t.tgz") as packed:
        assert len(packed.getnames()) == len(snapshot(tmp_path / "tree")) + 1


def test_cp_keeps_everything_in_both_directions(mount: LiveMount, tmp_path: Path) -> None:
    tree_of_files(tmp_path / "tree")
    run("cp", "-a", tmp_path / "tree", mount.directory / "copy")
    assert snapshot(mount.directory / "copy") == snapshot(tmp_path / "tree")
    assert run(mount.directory / "copy/program") == "it runs\n"
    run("cp", "-a", mount.directory / "copy", mount.directory / "second")
    run("cp", "-a", mount.directory / "second", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "tree")


def test_rsync_copies_and_then_has_nothing_left_to_do(mount: LiveMount, tmp_path: Path) -> None:
    needs("rsync")
    tree_of_files(tmp_path / "tree")
    command = ("rsync", "-a", "--itemize-changes", f"{tmp_path / 'tree'}/", f"{mount.directory / 'tree'}/")
    assert "file 3" in run(*command)
    assert snapshot(mount.directory / "tree") == snapshot(tmp_path / "tree")
    (tmp_path / "tree/d0/file 3").write_bytes(b"changed")
    assert [line.split(" ", 1)[1] for line in run(*command).splitlines()] == ["d0/file 3"]
    assert run(*command) == ""
    mount.remount()
    assert run(*command) == ""


def test_zip_files_are_written_grown_and_read(mount: LiveMount) -> None:
    bodies = {f"{number}.bin": content(100_000 * number, seed=1) for number in range(6)}
    path = mount.directory / "a.zip"
    for mode, names in (("w", list(bodies)[:4]), ("a", list(bodies)[4:])):
        with zipfile.ZipFile(path, mode, zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, bodies[name])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == bodies
        archive.extractall(mount.directory / "out")
    assert {p.name: p.read_bytes() for p in (mount.directory / "out").iterdir()} == bodies


# --- Programs that keep their state in files -----------------------------------------------------

GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "LC_ALL": "C"} | {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "somebody"), ("EMAIL", "somebody@localhost"))
}


def git(*arguments: object, cwd: Path) -> str:
    return run("git", "-c", "protocol.file.allow=always", *arguments, cwd=cwd, environment=GIT)


def test_git_clones_commits_packs_and_finds_nothing_wrong(mount: LiveMount, tmp_path: Path) -> None:
    needs("git")
    origin = tmp_path / "origin"
    tree_of_files(origin)
    git("init", "-q", ".", cwd=origin)
    git("add", ".", cwd=origin)
    git("commit", "-q", "-m", "first", cwd=origin)
    git("clone", "-q", "--no-local", origin, "clone", cwd=mount.directory)
    clone = mount.directory / "clone"
    git("fsck", "--full", "--strict", cwd=clone)
    (clone / "d0/file 3").write_bytes(content(100_000))
    git("mv", "d1", "moved", cwd=clone)
    git("commit", "-q", "-a", "-m", "second", cwd=clone)
    git("checkout", "-q", "-b", "old", "HEAD~1", cwd=clone)
    git("checkout", "-q", "-", cwd=clone)
    git("gc", "-q", "--prune=now", cwd=clone)
    git("fsck", "--full", "--strict", cwd=clone)
    assert git("status", "--porcelain", cwd=clone) == ""
    mount.remount()
    git("fsck", "--full", "--strict", cwd=clone)
    assert git("status", "--porcelain", cwd=clone) == ""
    assert git("log", "--format=%s", cwd=clone) == "second\nfirst\n"


INSERTING = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for number in range(100):
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO rows VALUES (?, ?)", (sys.argv[2], number))
    connection.execute("COMMIT")
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_sqlite_serves_several_processes(mount: LiveMount, mode: str) -> None:
    path = mount.directory / "data.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        assert connection.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
        connection.execute("CREATE TABLE rows (who TEXT, number INTEGER)")
        inserting = [
            subprocess.Popen([sys.executable, "-c", INSERTING, path, str(who)], stderr=subprocess.PIPE)
            for who in range(3)
        ]
        said = [process.communicate(timeout=90)[1].decode() for process in inserting]
        assert said == ["", "", ""]
        assert connection.execute("SELECT count(*), sum(number) FROM rows").fetchone() == (300, 3 * 4950)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.execute("UPDATE rows SET number = -1 WHERE who = '1'")
        connection.execute("VACUUM")
    finally:
        connection.close()
    mount.remount()
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM rows WHERE number = -1").fetchone() == (100,)
    finally:
        connection.close()


def make_wheel(directory: Path) -> Path:
    """Return a wheel with a package, a module of data and a console script."""
    path = directory / "applied-1.0-py3-none-any.whl"
    information = "applied-1.0.dist-info"
    files = {
        "applied/__init__.py": "def main():\n    print('applied')\n",
        **{f"applied/module{n}.py": f"VALUE = {n}\n" for n in range(40)},
        f"{information}/METADATA": "Metadata-Version: 2.1\nName: applied\nVersion: 1.0\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/entry_points.txt": "[console_scripts]\napplied = applied:main\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{information}/RECORD"])
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {**files, f"{information}/RECORD": record}.items():
            wheel.writestr(name, text)
    return path


def test_pip_installs_a_package_and_it_runs(mount: LiveMount, tmp_path: Path) -> None:
    target, wheel = mount.directory / "site", make_wheel(tmp_path)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-cache-dir", "--no-deps")
    here = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "TMPDIR": str(mount.directory)}
    run(*pip, "--target", target, wheel, environment=here)
    run(*pip, "--target", target, "--upgrade", wheel, environment=here)
    mount.remount()
    reading = "import applied, applied.module7; applied.main(); print(applied.module7.VALUE)"
    assert run(sys.executable, "-c", reading, environment={"PYTHONPATH": str(target)}) == "applied\n7\n"
    assert run(target / "bin/applied", environment={"PYTHONPATH": str(target)}) == "applied\n"


# --- Data ----------------------------------------------------------------------------------------


def test_numpy_saves_loads_and_maps(mount: LiveMount) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(300_000, dtype="f8").reshape(300, 1000)
    numpy.save(mount.directory / "a.npy", array)
    numpy.savez(mount.directory / "a.npz", one=array, two=array[:3])
    assert numpy.array_equal(numpy.load(mount.directory / "a.npy", mmap_mode="r"), array)
    mapped = numpy.load(mount.directory / "a.npy", mmap_mode="r+")
    mapped[7] = -1.0
    mapped.flush()
    del mapped
    fresh = numpy.memmap(mount.directory / "raw", dtype="f8", mode="w+", shape=(300, 1000))
    fresh[:] = array
    fresh.flush()
    del fresh
    mount.remount()
    array[7] = -1.0
    assert numpy.array_equal(numpy.load(mount.directory / "a.npy"), array)
    assert numpy.fromfile(mount.directory / "raw")[8000] == 8000.0
    with numpy.load(mount.directory / "a.npz") as both:
        assert numpy.array_equal(both["two"], numpy.arange(3000, dtype="f8").reshape(3, 1000))


def test_h5py_grows_and_changes_a_dataset(mount: LiveMount) -> None:
    h5py, numpy = pytest.importorskip("h5py"), pytest.importorskip("numpy")
    with h5py.File(mount.directory / "a.h5", "w") as file:
        file.create_dataset("x", data=numpy.arange(10_000), maxshape=(None,), chunks=True)
    with h5py.File(mount.directory / "a.h5", "r+") as file:
        file["x"].resize((20_000,))
        file["x"][10_000:] = 5
    with h5py.File(mount.directory / "a.h5", "r") as file:
        assert file["x"][9_999] == 9_999 and file["x"][19_999] == 5


def test_torch_saves_over_the_last_checkpoint(mount: LiveMount) -> None:
    torch = pytest.importorskip("torch")
    for step in range(3):
        torch.save({"weights": torch.full((1000, 300), float(step))}, mount.directory / "tmp.pt")
        (mount.directory / "tmp.pt").replace(mount.directory / "last.pt")
    assert torch.load(mount.directory / "last.pt")["weights"][0, 0] == 2.0


def test_safetensors_writes_and_maps(mount: LiveMount) -> None:
    files, numpy = pytest.importorskip("safetensors.numpy"), pytest.importorskip("numpy")
    files.save_file({"x": numpy.arange(100_000)}, mount.directory / "a.safetensors")
    assert files.load_file(mount.directory / "a.safetensors")["x"][99_999] == 99_999


# --- The mount as a place for temporary files ----------------------------------------------------

POOLING = """
import multiprocessing, os, sys, tempfile

def work(number):
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(number * 1000))
        file.flush()
        return os.path.getsize(file.name)

def serve(queue, shared):
    shared["answer"] = queue.get()

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    assert tempfile.gettempdir() == os.environ["TMPDIR"]
    with multiprocessing.Pool(3) as pool:
        assert pool.map(work, range(20)) == [number * 1000 for number in range(20)]
    with multiprocessing.Manager() as manager:
        shared, queue = manager.dict(), multiprocessing.Queue()
        process = multiprocessing.Process(target=serve, args=(queue, shared))
        process.start()
        queue.put("served")
        process.join()
        assert dict(shared) == {"answer": "served"}
    print("done")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_has_its_temporary_files_here(mount: LiveMount, tmp_path: Path, method: str) -> None:
    (tmp_path / "pooling.py").write_text(POOLING)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # unix(7): a socket's path has 107 bytes.
        short = Path(folder, "t")
        short.symlink_to(mount.directory)
        here = {"TMPDIR": str(short)}
        assert run(sys.executable, tmp_path / "pooling.py", method, environment=here) == "done\n"
    assert list(mount.directory.iterdir()) == [], "all of it was removed, sockets too"


def test_sort_merges_through_temporary_files(mount: LiveMount) -> None:
    numbers = [number * 7919 % 100_003 for number in range(100_003)]
    (mount.directory / "in").write_text("".join(f"{number}\n" for number in numbers))
    directory = mount.directory
    run("sort", "-n", "-S", "64K", "-T", directory, "-o", directory / "out", directory / "in")
    assert (directory / "out").read_text().split() == [str(number) for number in range(100_003)]
    assert {path.name for path in directory.iterdir()} == {"in", "out"}


def test_dd_writes_holes_and_truncates(mount: LiveMount) -> None:
    path = mount.directory / "sparse"
    run("dd", "if=/dev/urandom", f"of={path}", "bs=64k", "count=1", "seek=100", "status=none", "conv=fsync")
    assert path.stat().st_size == 101 * 65536
    assert path.read_bytes()[: 100 * 65536] == bytes(100 * 65536)
    run("truncate", "-s", "3M", path)
    run("truncate", "-s", "8M", path)
    assert path.stat().st_size == 8 * MIB
    assert path.read_bytes() == bytes(8 * MIB)
