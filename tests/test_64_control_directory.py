"""`.sluice/` on real mounts: plain file I/O, on every kind of mount, whoever answers."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.mounting import Folder, LiveMount, Mounting, content, kill_each, sluice, until

FILES = 60
NAMES = ["config", "order", "stats", "version", "warm"]
CHECKOUT = Path(__file__).resolve().parent.parent
KINDS = {
    "no opens": ("--read-only", "--profile=dataset"),
    "opens": ("--read-only", "--profile=checkpoint"),
    "one process": ("--read-only", "--workers=0"),
    "writable": ("--no-read-only",),
    "writable, passed through": ("--no-read-only", "--passthrough=all"),
    "remote": ("--no-read-only", "--durability=remote"),
}


def fill(folder: Folder) -> None:
    for number in range(FILES):
        folder.put(f"train/c{number % 3}/{number:02d}.jpg", content(3000, number))


@pytest.fixture(params=KINDS)
def mount(request: pytest.FixtureRequest, mounting: Mounting, folder: Folder) -> LiveMount:
    fill(folder)
    return mounting.mount(folder.url, *KINDS[request.param])


@pytest.fixture
def read_only(mounting: Mounting, folder: Folder) -> LiveMount:
    fill(folder)
    return mounting.mount(folder.url)


def control(mount: LiveMount, name: str = "") -> Path:
    return mount.directory / ".sluice" / name


def write(mount: LiveMount, name: str, text: str | bytes) -> int:
    """Write as a script does; return the errno of what it hears."""
    body = text if isinstance(text, bytes) else text.encode()
    try:
        control(mount, name).write_bytes(body)
    except OSError as error:
        return error.errno or -1
    return 0


def heard(mount: LiveMount, name: str, before: object = None) -> dict[str, object]:
    """Return what became of the text that was written last, once that is known."""

    def told() -> dict[str, object] | None:
        found = mount.status()["told"].get(name)
        return found if found is not None and found != before else None

    return dict(until(told, f"{name} is heard") or {})


def fails_with(code: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


# What is there, and is not seen


def test_it_is_listed_nowhere_and_reached_by_name(mount: LiveMount, tmp_path: Path) -> None:
    root = mount.directory
    assert os.listdir(root) == ["train"]
    for command in (["ls", "-la", root], ["find", root], ["du", "-a", root]):
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert ".sluice" not in output
    shutil.copytree(root, tmp_path / "copy")
    assert sorted(os.listdir(tmp_path / "copy")) == ["train"]
    assert sorted(os.listdir(control(mount))) == NAMES
    assert subprocess.run(["ls", "-la", control(mount)], capture_output=True, check=True).stderr == b""
    assert not control(mount, "nothing").exists() and stat.S_ISDIR(control(mount).stat().st_mode)
    assert os.path.samefile(control(mount) / ".", control(mount))


def test_status_config_and_version_are_read(mount: LiveMount) -> None:
    for _ in range(3):
        stats = json.loads(control(mount, "stats").read_text())
        assert stats["mountpoint"] == str(mount.directory) and stats["reads"]
        config = json.loads(control(mount, "config").read_text())
        assert config["mountpoint"] == str(mount.directory)
        done = sluice("--version").stdout.split()[1]
        assert control(mount, "version").read_text() == f"{done}\n"
    size = control(mount, "version").stat().st_size
    assert size == len(control(mount, "version").read_bytes())


def test_each_reading_is_of_its_moment(mount: LiveMount) -> None:
    """However the page cache holds it; and one that is open does not change."""
    with control(mount, "stats").open("rb") as file:
        first = file.read(100)
        mount.read("train/c0/00.jpg")
        rest = file.read()
    json.loads(first + rest)

    def requests() -> int:
        return int(json.loads(control(mount, "stats").read_text())["lake_io"]["requests"]["get"])

    before = requests()
    mount.read("train/c1/01.jpg")
    until(lambda: requests() == before + 1, "the next reading knows")


def test_it_stays_as_it_is(mount: LiveMount) -> None:
    root = mount.directory
    refused = errno.EROFS if "--read-only" in mount._options else errno.EPERM
    for call in (
        lambda: control(mount, "stats").unlink(),
        lambda: control(mount).rmdir() if refused == errno.EPERM else control(mount, "x").mkdir(),
        lambda: control(mount, "new").write_text("x"),
        lambda: control(mount, "d").mkdir(),
        lambda: os.rename(root / "train", control(mount, "train")),
        lambda: os.rename(control(mount), root / "elsewhere"),
        lambda: os.symlink("a", control(mount, "link")),
    ):
        fails_with(refused, call)
    fails_with(errno.EEXIST, lambda: control(mount).mkdir())
    assert sorted(os.listdir(control(mount))) == NAMES
    assert os.listdir(root) == ["train"]


def test_removing_all_there_is_does_not_see_it(mounting: Mounting, folder: Folder) -> None:
    fill(folder)
    mount = mounting.mount(folder.url, "--no-read-only")
    subprocess.run(f"rm -r {mount.directory}/*", shell=True, check=True)
    shutil.rmtree(mount.directory, ignore_errors=True)  # It can't remove the mount point itself.
    assert os.listdir(mount.directory) == [] and sorted(os.listdir(control(mount))) == NAMES


def test_the_lakes_own_entries_of_that_name_are_hidden_and_counted(
    mounting: Mounting, folder: Folder
) -> None:
    folder.put(".sluice/stats", b"from the lake")
    folder.put("a/.sluice/kept", b"further down")
    mount = mounting.mount(folder.url)
    assert os.listdir(mount.directory) == ["a"]
    assert json.loads(control(mount, "stats").read_text())["lake"] == folder.url
    assert (mount.directory / "a/.sluice/kept").read_bytes() == b"further down"
    done = sluice("doctor", mount.directory)
    assert ".sluice/" in done.stdout and "the mount's own control directory has this name" in done.stdout


# Orders


def order(numbers: range) -> str:
    return "".join(f"train/c{number % 3}/{number:02d}.jpg\n" for number in numbers)


def test_an_order_is_told_by_writing_it(mount: LiveMount) -> None:
    assert write(mount, "order", order(range(FILES))) == 0
    assert heard(mount, "order")["files"] == FILES
    until(lambda: ".sluice/order: the order of 60 files" in mount.log(), "the log says so")
    for text, said in (
        ("directory=train sampler=torch seed=3 world=2 ranks=0\n", "torch with seed 3"),
        ("directory=train\n5\n3\n1\n", "the order of 3 files"),
        ("directory=train/c0\n00.jpg\n03.jpg\n", "the order of 2 files"),
        (f'{{"directory": "{mount.directory}/train", "lines": "paths"}}\nc0/00.jpg\n', "of 1 files"),
    ):
        before = mount.status()["told"]["order"]
        assert write(mount, "order", text) == 0
        assert said in str(heard(mount, "order", before)["said"])


def test_an_order_is_used(mounting: Mounting, folder: Folder) -> None:
    """By the set that is read next."""
    for number in range(200):
        folder.put(f"set/{number:03d}", content(2000, number))
    mount = mounting.mount(folder.url, "--dram=64M")
    shuffled = [number * 77 % 200 for number in range(200)]
    assert write(mount, "order", "".join(f"set/{number:03d}\n" for number in shuffled)) == 0
    heard(mount, "order")
    for number in shuffled[:60]:
        mount.read(f"set/{number:03d}")
    until(lambda: mount.status()["sets"] and mount.status()["sets"][0]["order"] == "told", "it is the order")


def test_paths_of_another_mount_namespace_are_understood(mount: LiveMount) -> None:
    """A container has the mount elsewhere."""
    text = "".join(f"/data/in/the/container/{line}\n" for line in order(range(9)).split())
    assert write(mount, "order", text) == 0
    assert heard(mount, "order")["files"] == 9


def test_what_is_of_no_use_is_told_once_with_counts(mount: LiveMount) -> None:
    text = order(range(6)).encode() + b"train/c0/00.jpg\ntrain/none\n\0\1\2\n"
    assert write(mount, "order", text) == 0
    told = heard(mount, "order")
    counts = {"are there twice": 1, "are no text": 1, "are not in the mount": 1}
    assert (told["files"], told["useless"]) == (6, counts)
    until(lambda: "1 are there twice" in mount.log(), "the log says so")
    (line,) = (line for line in mount.log().splitlines() if "1 are there twice" in line)
    assert "(line 7)" in line and "1 are not in the mount" in line


def test_what_is_for_reading_takes_nothing(mounting: Mounting, folder: Folder) -> None:
    mount = mounting.mount(folder.url, "--no-read-only")
    for name in ("stats", "config", "version"):
        fails_with(errno.EINVAL, lambda name=name: control(mount, name).write_text("x"))
    assert control(mount, "order").read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("order", b"nothing\nof/it\n", "none of the 2 files of the hint is there"),
        ("order", b"sampler=nonsense seed=1\n", "sampler=nonsense: must be one of"),
        ("order", b"directory=nowhere\n1\n2\n", "nowhere: no such directory"),
        ("order", b"\0\1\2\3\n\0\n", "no line names a file (1 are no text, 1 are there twice)|2 are no text"),
        ("order", b'{"directory": \n', "the first line is no JSON object"),
        ("warm", b"nothing\nof/it\n", "no line is a path in the mount (nothing is not there)"),
        ("warm", b"\0\1\n", "no line is a path in the mount (line 1 is none)"),
    ],
)
@pytest.mark.parametrize("kind", ["no opens", "writable"])
def test_what_is_of_no_use_at_all_is_refused(
    mounting: Mounting, folder: Folder, kind: str, name: str, text: bytes, said: str
) -> None:
    """With EINVAL where the kernel lets us: a FIFO of a read-only mount only takes."""
    fill(folder)
    mount = mounting.mount(folder.url, *KINDS[kind])
    assert write(mount, name, text) == (errno.EINVAL if kind == "writable" else 0)
    error = str(heard(mount, name)["error"])
    assert any(part in error for part in said.split("|"))
    until(lambda: f".sluice/{name}: {error}" in mount.log(), "the log says so")


def test_a_long_order_in_many_pieces_is_one(mount: LiveMount) -> None:
    """Two hundred thousand lines, of which sixty are files."""
    lines = order(range(FILES)) + "".join(f"train/c0/{'long-' * 6}{n}.jpg\n" for n in range(200_000))
    with control(mount, "order").open("w") as file:
        for line in lines.splitlines(keepends=True):
            file.write(line)
    told = heard(mount, "order")
    while told["useless"] != {"are not in the mount": 200_000}:  # A part may be taken over before.
        told = heard(mount, "order", told)
    assert told["files"] == FILES and "lines of no use: 200,000 are not in the mount" in mount.log()


def test_an_error_is_heard_by_who_syncs_a_long_text(mounting: Mounting, folder: Folder) -> None:
    fill(folder)
    mount = mounting.mount(folder.url, "--no-read-only")
    fd = os.open(control(mount, "order"), os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, b"no/such/file")
        fails_with(errno.EINVAL, lambda: os.fsync(fd))
        os.write(fd, b"\ntrain/c0/00.jpg")
        os.fsync(fd)
    finally:
        os.close(fd)
    assert mount.status()["told"]["order"]["files"] == 1


def test_the_shell_writes_it(mount: LiveMount) -> None:
    for command in ("echo {} > {}", "echo {} >> {}", "echo {} | tee {}", "echo {} | dd of={} status=none"):
        before = mount.status()["told"].get("order")
        line = command.format("train/c0/00.jpg", control(mount, "order"))
        assert subprocess.run(line, shell=True, timeout=30).returncode == 0
        assert heard(mount, "order", before)["files"] == 1
    source = mount.home / "text"
    source.write_text(order(range(5)))
    assert subprocess.run(["cp", source, control(mount, "order")], timeout=30).returncode == 0
    until(lambda: mount.status()["told"]["order"].get("files") == 5, "what was copied is heard")


# Warming


def test_paths_are_warmed_by_writing_them(mount: LiveMount) -> None:
    assert write(mount, "warm", "train/c0\n/elsewhere/train/c1/01.jpg\nnone\n") == 0
    told = heard(mount, "warm")
    assert (told["files"], told["useless"]) == (2, {"are not in the mount": 1})
    until(lambda: "fetched 21 files" in mount.log(), "they are fetched")
    before = mount.requests()["get"]
    for number in range(0, FILES, 3):
        assert mount.read(f"train/c0/{number:02d}.jpg") == content(3000, number)
    assert mount.requests()["get"] == before


# Processes and mounts


def test_the_mount_can_be_unmounted_after_it_was_used(read_only: LiveMount) -> None:
    assert write(read_only, "order", order(range(3))) == 0
    os.stat(control(read_only, "warm"))
    read_only.unmount()
    read_only.mount()
    assert write(read_only, "order", order(range(3))) == 0
    heard(read_only, "order")
    until(lambda: subprocess.run(["umount", read_only.directory]).returncode == 0, "umount(8) as well")


def test_a_killed_mover_is_followed_by_one_that_listens(read_only: LiveMount) -> None:
    write(read_only, "order", order(range(3)))
    mover = read_only.pids()["mover"]
    kill_each(mover)
    until(lambda: read_only.pids()["mover"] != mover, "there is another one")
    assert json.loads(control(read_only, "stats").read_text())["processes"]["mover"] != mover[0]
    assert write(read_only, "order", order(range(7))) == 0
    assert heard(read_only, "order")["files"] == 7


def test_a_mover_that_is_killed_while_it_opens_pipes_is_replaced(mounting: Mounting, folder: Folder) -> None:
    """It would not be gone if it waited for the mount itself: for a lock, which no signal ends."""
    fill(folder)
    mount = mounting.mount(folder.url, "--workers=1")
    (worker,) = mount.pids()["workers"]
    os.kill(worker, signal.SIGSTOP)
    try:
        kill_each(mount.pids()["mover"])  # Its follower opens both pipes, first of all.
        until(lambda: _openers(mount), "its pipes are being opened")
        kill_each(mount.pids()["mover"])
        until(lambda: mount.log().count("mover ended with signal 9") == 2, "it is gone")
    finally:
        os.kill(worker, signal.SIGCONT)
    assert write(mount, "order", order(range(3))) == 0
    assert heard(mount, "order")["files"] == 3


def _openers(mount: LiveMount) -> list[int]:
    """Return the processes that open pipes of the mount."""
    pipes = f"{mount.directory}/.sluice".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if any(word.startswith(pipes) and word != pipes for word in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found


def test_a_reading_that_was_open_when_the_mover_died_gets_an_error_not_another_text(
    mounting: Mounting, folder: Folder
) -> None:
    fill(folder)
    mount = mounting.mount(folder.url, *KINDS["opens"])
    with control(mount, "stats").open("rb") as file:
        mover = mount.pids()["mover"]
        kill_each(mover)
        until(lambda: mount.pids()["mover"] != mover, "there is another one")
        fails_with(errno.ESTALE, file.read)


def test_writers_at_one_time_do_not_mix_on_a_writable_mount(mounting: Mounting, folder: Folder) -> None:
    fill(folder)
    mount = mounting.mount(folder.url, "--no-read-only", "--workers=3")
    with control(mount, "order").open("w") as one, control(mount, "order").open("w") as other:
        one.write("train/c0/")
        other.write("train/c1/")
        one.flush(), other.flush()
        one.write("00.jpg")
        other.write("01.jpg")
    until(lambda: mount.log().count("the order of 1 files") == 2, "both are heard")


def test_others_may_write_where_they_may_read(mounting: Mounting, folder: Folder) -> None:
    """With --allow-other, as containers with another user need it."""
    fill(folder)
    for kind in ("--read-only", "--no-read-only"):
        mount = mounting.mount(folder.url, "--allow-other", kind)
        for directory in (mount.home, *mount.home.parents):
            if directory != Path("/") and directory != Path("/tmp"):
                os.chmod(directory, 0o755)
        script = f"cat {control(mount, 'version')} && echo train/c0/00.jpg > {control(mount, 'order')}"
        done = subprocess.run(["sh", "-c", script], user=65534, group=65534, timeout=30, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert heard(mount, "order")["files"] == 1


def test_a_bind_mount_for_reading_only_takes_orders(read_only: LiveMount) -> None:
    """As containers get their volumes."""
    point = read_only.home / "container"
    point.mkdir()
    for arguments in (["--bind", read_only.directory, point], ["-o", "remount,bind,ro", point]):
        subprocess.run(["mount", *map(str, arguments)], check=True)
    try:
        (point / ".sluice/order").write_text(order(range(4)))
        assert heard(read_only, "order")["files"] == 4
        assert json.loads((point / ".sluice/stats").read_text())["lake"]
    finally:
        subprocess.run(["umount", point], check=True)


def test_the_recipe_of_a_sampler_that_writes_its_order_runs(read_only: LiveMount) -> None:
    """Without torch: the base class is only a name there."""
    readme = (CHECKOUT / "README.md").read_text("utf-8")
    (source,) = [text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if ".sluice" in text]
    torch = SimpleNamespace(utils=SimpleNamespace(data=SimpleNamespace(Sampler=object)))
    names: dict[str, object] = {"torch": torch}
    exec(compile(source, "README.md", "exec"), names)
    paths = [str(read_only.directory / line) for line in order(range(FILES)).split()]
    told = names["Told"](range(FILES)[::-1], paths, str(read_only.directory))  # type: ignore[operator]
    assert list(told) == list(range(FILES))[::-1]
    assert heard(read_only, "order")["files"] == FILES


def test_hits_ask_nothing_more(read_only: LiveMount) -> None:
    """A file in the page cache is opened and read without a request, as before."""
    path = read_only.directory / "train/c0/00.jpg"
    path.read_bytes()
    assert read_only.asks_nothing(lambda: [path.read_bytes() for _ in range(50)], "requests")
