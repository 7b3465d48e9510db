"""Clients of the control socket, which a thread answers, and `sluice doctor`: nothing is mounted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache import control
from cache.errors import SluiceError, UsageError
from tests.commands import STATUS, FakeMount, entry
from tools import cli, doctor, option_kinds, status, umount


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMount]:
    mountpoint = tmp_path / "my mount"
    (mountpoint / "a").mkdir(parents=True)
    monkeypatch.setattr(control, "runtime_directory", lambda: tmp_path / "run")
    monkeypatch.setattr(status, "MOUNTINFO", tmp_path / "mountinfo")
    written = str(mountpoint).replace(" ", "\\040")
    (tmp_path / "mountinfo").write_text(
        "22 1 254:0 / / rw - ext4 /dev/root rw\n"
        f"30 22 0:50 / {written} rw,nosuid - fuse.sluice s3://b rw,user_id={os.geteuid()},group_id=0\n"
        f"31 30 0:51 / {written}/a/other rw - tmpfs tmpfs rw\n"
        f"32 22 0:52 / {tmp_path}/elsewhere rw - fuse.sluice s3://c rw,user_id={os.geteuid() + 1}\n"
    )
    made = FakeMount(mountpoint)
    made.answers["status"] = [{"result": {"mountpoint": str(mountpoint), **STATUS}}]
    yield made
    made.close()


def test_a_path_belongs_to_the_innermost_mount(fake: FakeMount, tmp_path: Path) -> None:
    root = fake.mountpoint
    (tmp_path / "link").symlink_to(root)
    (root / "inner").symlink_to("/etc")
    for path, below in (
        (root, ""),
        (f"{root}/", ""),
        (root / "a/b", "a/b"),
        (root / "a/..", ""),
        (tmp_path / "link", ""),
        (tmp_path / "link/a", "a"),
        (root / "inner", "inner"),  # The link is meant, not what it points to.
    ):
        assert status.find_mount(str(path)) == (root, below)
    for path in (tmp_path, root / "a/other/x", root / "inner/passwd", f"{root}2"):
        with pytest.raises(UsageError, match="not in a SluiceFS mount; `sluice status` lists the mounts"):
            status.find_mount(str(path))


def test_status_passes_the_json_through(fake: FakeMount, capsys: pytest.CaptureFixture[str]) -> None:
    expected = fake.answers["status"][0]["result"]
    assert cli.main(["status", str(fake.mountpoint / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert cli.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [expected], "this user's mounts, and no other's"


def test_status_is_a_table_for_people(fake: FakeMount, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out
    for text in (
        str(fake.mountpoint),
        "s3://bucket/prefix",
        "supervisor 11, mover 14, notifier 15, workers 12, 13",
        "██████████░░░░░░░░░░ 512.0 MiB of 1.0 GiB (50%), 3 objects, /t",
        "dram 4.0 KiB, lake 1.0 KiB",
        "2.0 KiB fetched, 0 B sent; requests: get 5",
        "off: needs root",
    ):
        assert text in shown


def test_a_mount_that_does_not_answer_is_shown_with_its_error(
    fake: FakeMount, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers["status"] = [{"error": "starting"}]
    assert cli.main(["status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [{"mountpoint": str(fake.mountpoint), "error": "starting"}]
    assert cli.main(["status", str(fake.mountpoint)]) == 1
    assert capsys.readouterr().err == "sluice: starting\n"


def test_without_a_mount_status_says_so(fake: FakeMount, capsys: pytest.CaptureFixture[str]) -> None:
    status.MOUNTINFO.write_text("22 1 254:0 / / rw - ext4 /dev/root rw\n")
    assert cli.main(["status"]) == 0
    assert capsys.readouterr().out == "nothing is mounted\n"
    assert cli.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_ls_shows_how_large_files_are_read(fake: FakeMount, capsys: pytest.CaptureFixture[str]) -> None:
    read = {"access": "random records", "record_bytes": 102_400, "amplification": 1.234}
    entries = [entry("a", **read), entry("b"), entry("c", access="read on", amplification=None)]
    fake.answers["ls"] = [{"result": {"entries": entries, "errors": [], "truncated": False}}]
    assert cli.main(["ls", str(fake.mountpoint)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["read", "as", "amplif."]
    text = " ".join(" ".join(rows).split())  # Long paths take several lines.
    assert "random records of 100.0 KiB 1.23" in text and "read on -" in text


def test_ls_lists_what_the_cache_has(fake: FakeMount, capsys: pytest.CaptureFixture[str]) -> None:
    directory = entry("d", kind="directory", size_bytes=0, tier=None, cached_bytes=0, last_used_s=None)
    never = entry("n\x1b[0m", tier=None, cached_bytes=0, last_used_s=None, victim_rank=None)
    entries = [entry("a/b"), directory, never, entry("[red]", size_bytes=0, cached_bytes=0)]
    errors = [{"path": "x", "error": "no such file"}]
    fake.answers["ls"] = [{"result": {"entries": entries, "errors": errors, "truncated": True}}]
    argv = ["ls", "-r", "--limit", "9", str(fake.mountpoint / "a"), str(fake.mountpoint / "x")]
    assert cli.main(argv) == 1
    assert fake.requests == [{"verb": "ls", "paths": ["a", "x"], "recursive": True, "limit": 9}]
    out, err = capsys.readouterr()
    lines = [line.removeprefix(f"{fake.mountpoint}/").split() for line in out.splitlines()]
    assert lines[1:] == [
        ["a/b", "2.0", "KiB", "nvme0", "50%", "3", "2", "h", "ago", "-", "#2"],
        ["d", "directory"],
        ["n\\x1b[0m", "2.0", "KiB", "-", "0%", "3", "-", "-", "-"],
        ["[red]", "0", "B", "nvme0", "100%", "3", "2", "h", "ago", "-", "#2"],
    ]
    assert err == (
        f"sluice: {fake.mountpoint}/x: no such file\nsluice: only the first 9 are shown; see --limit\n"
    )
    assert cli.main([*argv, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["entries"][0] == {**entries[0], "path": str(fake.mountpoint / "a/b")}
    assert (found["truncated"], len(found["errors"])) == (True, 1)


def test_evict_tells_what_was_freed(fake: FakeMount, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["evict"] = [{"result": {"objects": 2, "bytes": 3072, "errors": []}}]
    assert cli.main(["evict", str(fake.mountpoint)]) == 0
    assert fake.requests == [{"verb": "evict", "paths": [""]}]
    assert capsys.readouterr().out == "evicted 2 objects, 3.0 KiB\n"
    fake.answers["evict"][0]["result"]["errors"] = [{"path": "a", "error": "is open"}]
    assert cli.main(["evict", "--json", str(fake.mountpoint / "a")]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["bytes"] == 3072
    assert err == f"sluice: {fake.mountpoint}/a: is open\n"


NOTHING_LEFT: dict[str, Any] = {"receipts": [], "errors": []}


def test_umount_drains_then_unmounts_then_waits_for_the_supervisor(
    fake: FakeMount, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = subprocess.Popen(["sleep", "600"])
    fake.answers["status"][0]["result"]["processes"]["supervisor"] = supervisor.pid
    progress = {"done": 1024, "total": 2048, "unit": "bytes"}
    fake.answers["sync"] = [{"progress": {**progress, "left": 1, "trouble": None}}, {"result": NOTHING_LEFT}]
    fake.answers["drain"] = [{"progress": progress}, {"result": {"bytes": 2048}}]
    verbs_at_unmount: list[str] = []

    def unmount(mountpoint: Path) -> None:
        verbs_at_unmount.extend(request["verb"] for request in fake.requests)
        threading.Timer(0.05, supervisor.kill).start()

    assert umount.main([str(fake.mountpoint)], unmount) == 0
    assert supervisor.wait() == -signal.SIGKILL
    assert verbs_at_unmount == ["status", "sync", "drain"]
    assert capsys.readouterr().out == f"moved 2.0 KiB from memory to disk\nunmounted {fake.mountpoint}\n"


def test_umount_refuses_while_the_lake_lacks_something_and_lazy_leaves_it(fake: FakeMount) -> None:
    fake.answers["status"][0]["result"]["processes"]["supervisor"] = os.getpid()
    failed = {"path": "a/b", "error": "conflict: exists already"}
    fake.answers["sync"] = [{"result": {"receipts": [], "errors": [failed]}}]
    fake.answers["drain"] = [{"result": {"bytes": 0}}]
    with pytest.raises(SluiceError, match=r"1 failed, the first: .*/a/b: conflict: .*--lazy"):
        umount.main([str(fake.mountpoint)], lambda mountpoint: pytest.fail("unmounted"))

    def unmount(mountpoint: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        umount.main(["--lazy", str(fake.mountpoint)], unmount)
    assert [request["verb"] for request in fake.requests] == ["status", "sync", "status", "drain"]


def test_umount_of_a_mount_that_is_dying_unmounts_it(
    fake: FakeMount, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who listens ends without an answer, and nobody follows: there is nothing to wait for."""
    monkeypatch.setattr(umount, "MOVER_RESTART_S", 0.2)
    fake.answers["status"] = []
    unmounted: list[Path] = []
    assert umount.main([str(fake.mountpoint)], unmounted.append) == 0
    assert unmounted == [fake.mountpoint]
    assert len(fake.requests) > 1, "another mover might have come"
    assert capsys.readouterr().out == f"unmounted {fake.mountpoint}\n"


RECEIPT = {"path": "a", "key": "a", "etag": '"e"', "size": 3, "checksum": "xxh3:1", "time": 1.5}


def test_sync_prints_receipts_and_fails_for_what_the_lake_lacks(
    fake: FakeMount, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers["sync"] = [{"result": {"receipts": [RECEIPT], "errors": []}}]
    assert cli.main(["sync", str(fake.mountpoint / "a")]) == 0
    assert fake.requests == [{"verb": "sync", "paths": ["a"]}]
    assert capsys.readouterr().out == f'{fake.mountpoint}/a  3 B  etag "e"  xxh3:1\n'
    fake.answers["sync"][0]["result"]["errors"] = [{"path": "b", "error": "failed: denied"}]
    assert cli.main(["sync", "--quiet", str(fake.mountpoint)]) == 1
    assert capsys.readouterr() == ("", f"sluice: {fake.mountpoint}/b: failed: denied\n")
    assert cli.main(["sync", "--json", str(fake.mountpoint)]) == 1
    assert json.loads(capsys.readouterr().out)["receipts"][0]["etag"] == '"e"'


ENTRY = {
    "path": "c/d",
    "operation": "put",
    "state": "conflict",
    "bytes": 2048,
    "sent": 0,
    "error": "exists already",
    "since": 1.0,
}


def test_queue_shows_what_waits_and_fails_for_what_failed(
    fake: FakeMount, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers["queue"] = [{"result": {"entries": [ENTRY], "total": 1, "dirty_bytes": 2048}}]
    assert cli.main(["queue", str(fake.mountpoint)]) == 1
    out = capsys.readouterr().out
    assert "1 waiting, 2.0 KiB to send" in out and "c/d" in out and "exists already" in out
    assert cli.main(["queue", "--json", str(fake.mountpoint)]) == 1
    assert json.loads(capsys.readouterr().out)["entries"] == [ENTRY]
    fake.answers["queue"] = [{"result": {"entries": [], "total": 0, "dirty_bytes": 0}}]
    assert cli.main(["queue", str(fake.mountpoint)]) == 0
    assert capsys.readouterr().out == f"{fake.mountpoint}: the lake has everything\n"


def test_queue_retries_and_resolves(fake: FakeMount, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["retry"] = [{"result": {"retried": 2}}]
    assert cli.main(["queue", "retry", str(fake.mountpoint / "a")]) == 0
    assert capsys.readouterr().out == "2 tried again\n"
    fake.answers["resolve"] = [{"result": {"errors": [{"path": "a", "error": "a: there is no conflict"}]}}]
    assert cli.main(["queue", "resolve", "--keep", "ours", str(fake.mountpoint / "a")]) == 1
    assert capsys.readouterr().err == f"sluice: {fake.mountpoint}/a: a: there is no conflict\n"
    assert fake.requests[-1] == {"verb": "resolve", "paths": ["a"], "keep": "ours"}
    assert cli.main(["queue", "resolve", "--keep", "both", str(fake.mountpoint / "a")]) == 2
    assert "--keep both: must be ours or theirs" in capsys.readouterr().err


def test_a_supervisor_that_stays_is_a_failure(fake: FakeMount, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers["status"][0]["result"]["processes"]["supervisor"] = os.getpid()
    fake.answers["sync"] = [{"result": NOTHING_LEFT}]
    fake.answers["drain"] = [{"error": "disk full"}]  # Costs the tier in memory, not the unmount.
    monkeypatch.setattr(umount, "SUPERVISOR_EXIT_S", 0.01)
    with pytest.raises(SluiceError, match="unmounted, but its processes still run"):
        umount.main([str(fake.mountpoint)], lambda mountpoint: None)


def test_a_dead_mount_is_unmounted_without_asking(fake: FakeMount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "socket_path", lambda mountpoint: Path("/nowhere"))
    monkeypatch.setattr(umount, "_is_dead", lambda mountpoint: True)
    unmounted: list[Path] = []
    assert umount.main([str(fake.mountpoint)], unmounted.append) == 0
    assert unmounted == [fake.mountpoint]
    monkeypatch.undo()  # Else the fixture would not find its socket.


def test_umount_of_what_is_no_mount_point_names_the_mount(fake: FakeMount) -> None:
    with pytest.raises(UsageError, match=rf"not a mount point; it lies in the mount {fake.mountpoint}"):
        umount.main([str(fake.mountpoint / "a")])


def test_processes_that_keep_a_mount_busy_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert umount.busy_processes(tmp_path) == ""
    inside = subprocess.Popen(["sleep", "600"], cwd=tmp_path)
    with (tmp_path / "file").open() as held:
        try:
            found = umount.busy_processes(tmp_path)
        finally:
            inside.kill()
            inside.wait()
        assert f"sleep (pid {inside.pid})" in found and f"(pid {os.getpid()})" in found, held
    assert umount.busy_processes(Path(f"{tmp_path}x")) == ""


def test_an_unmount_that_the_kernel_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = (16, "Device or resource busy")
    for way in ("_umount2", "_fusermount"):
        monkeypatch.setattr(umount, way, lambda mountpoint: refusal)
    monkeypatch.setattr(umount, "busy_processes", lambda mountpoint: "python (pid 7)")
    with pytest.raises(SluiceError, match=r"in use by python \(pid 7\)"):
        umount._unmount(tmp_path)
    refusal = (22, "Invalid argument")
    with pytest.raises(SluiceError, match="can't be unmounted: Invalid argument"):
        umount._unmount(tmp_path)


# doctor


def test_doctor_tells_machines_and_people_the_same(
    fake: FakeMount, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_status = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (exit_status == 0) == all(check["state"] != "bad" for check in found["checks"])
    assert found["hidden"] is None
    for check in found["checks"]:
        assert (check["state"] == "ok") == (check["cost"] == "") == (check["mend"] == ""), check
    cli.main(["doctor"])
    shown = capsys.readouterr().out
    assert [check["name"] for check in found["checks"] if check["name"] not in shown] == []


def test_doctor_lists_the_keys_that_a_mount_hides(
    fake: FakeMount, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = {"count": 2, "keys": [{"key": "a//b", "reason": "an empty part"}]}
    fake.answers["hidden"] = [{"result": hidden}]
    cli.main(["doctor", str(fake.mountpoint), "--json"])
    assert json.loads(capsys.readouterr().out)["hidden"] == hidden
    cli.main(["doctor", str(fake.mountpoint)])
    assert "2 keys of the lake can't be shown as paths\n  a//b: an empty part\n" in capsys.readouterr().out


def test_a_missing_piece_is_told_with_its_cost_and_mend(tmp_path: Path) -> None:
    absent = doctor.device_check(tmp_path / "fuse")
    assert (absent.state, absent.detail, absent.cost) == ("bad", "missing", "nothing can be mounted")
    old = doctor.kernel_check("kernel: passthrough", (6, 1), "slower")
    assert (old.state, old.cost, old.mend) == ("off", "slower", "Linux 6.9 or later")
    assert doctor.package_check("no_such_package").state == "bad"
    assert doctor.package_check("no_such_package", cost="slower").state == "off"
    assert doctor.tmpfs_check(tmp_path / "absent", (6, 9)).state == "off"


def test_sizes_are_written_for_people() -> None:
    assert [option_kinds.format_size(n) for n in (0, 1023, 1536, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 TiB",
    ]
