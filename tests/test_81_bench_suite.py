"""`sluice bench` as a user runs it, each workload as small as it goes; and its end by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounting import until
from tools.bench.__main__ import CONTESTS, MODULES
from tools.bench.bursts import await_object
from tools.bench.figures import MeasurementFailed

pytestmark = [
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may drop the page cache"),
    pytest.mark.timeout(300),
]
# The others are larger than it takes to see that they run: they have a tier's least size to fill, or a
# second of training to wait for.
QUICK = [module.NAME for module in CONTESTS] + ["find", "order-found"]


def bench(*words: str) -> list[str]:
    return [sys.executable, "-m", "tools.bench", *words]


def left_behind(work: Path) -> list[str]:
    """Return mounts below *work* and processes that name it."""
    found = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(work) in line]
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            found += [line] if str(work) in line else []
    return found


@pytest.mark.parametrize("name", QUICK)
def test_a_workload_runs_and_writes_its_results(name: str, tmp_path: Path) -> None:
    work, results, page = tmp_path / "work", tmp_path / "r.json", tmp_path / "r.html"
    work.mkdir()
    words = bench(f"--only={name}", "--scale=0.001", "--rounds=1", f"--workdir={work}")
    done = subprocess.run(
        [*words, f"--json={results}", f"--html={page}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(results.read_text())
    assert told["figures"] and not told["not_measured"]
    for figure in told["figures"]:
        assert f"{figure['name']}: " in done.stdout
        assert page.read_text().count(f">{figure['name']}, ") == 1
    if MODULES[name] in CONTESTS:
        assert any("sluice mount s3://lake" in line for line in told["commands"].values())
        assert any(figure["costs"]["sluice"]["rss_bytes"] for figure in told["figures"] if figure["costs"])
    assert not left_behind(work)
    assert not list(work.iterdir())


@pytest.mark.skipif("SLUICE_PEERS" not in os.environ, reason="takes minutes; SLUICE_PEERS=1 runs it")
def test_peers_take_part_and_ctrl_c_leaves_no_mount_and_no_process(tmp_path: Path) -> None:
    """rclone and weed are among the tests' packages, so nothing is installed here."""
    work, said = tmp_path / "work", tmp_path / "said"
    work.mkdir()
    words = ["--only=bursts", "--scale=0.002", "--rounds=900", f"--workdir={work}"]
    with said.open("wb") as file:
        process = subprocess.Popen(
            bench(*words, "--peers=rclone,weed", f"--peers-dir={sys.prefix}"),
            stderr=file,
            stdout=subprocess.DEVNULL,
        )
    try:
        until(lambda: "round 1 of" in said.read_text() or process.poll() is not None, "a round", within_s=120)
        first = said.read_text()
        assert all(f"{side} " in first for side in ("sluice", "native", "rclone", "weed")), first
        mounts = [line for line in left_behind(work) if " fuse." in line]
        assert len(mounts) == 3, mounts
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(100)
        finally:
            process.kill()
    assert process.returncode == 130, said.read_text()
    until(lambda: not left_behind(work), "nothing is left")


def test_an_object_that_never_comes_is_no_result(s3_server: object, shared_bucket: str) -> None:
    client = s3_server.client()  # type: ignore[attr-defined]
    with pytest.raises(MeasurementFailed, match="is not in the lake"):
        await_object(client, "never", 1, within_s=0.0)
