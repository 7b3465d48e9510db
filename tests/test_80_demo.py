"""The demo does what it says, its training script is an ordinary one, and it leaves nothing behind."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools import demo_dataset, demo_driver, demo_train
from tools.demo_driver import Counters, Epoch

CHECKOUT = Path(__file__).resolve().parent.parent
needs_fuse = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a plain directory with the dataset."""
    root = tmp_path_factory.mktemp("digits")
    for key, body in demo_dataset.samples():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return root


def test_the_dataset_is_real_images_in_class_folders(digits: Path) -> None:
    files = list(digits.glob("*/*/*.pgm"))
    assert len(files) == 1797
    assert {path.parent.name for path in files} == {str(digit) for digit in range(10)}
    assert len(list(digits.glob("val/*/*"))) == pytest.approx(1797 / 5, abs=10)
    shown = {path.read_bytes()[10:] for path in files}
    assert len(shown) > 1700  # Hardly two people write alike.


def test_the_training_script_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(demo_train.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & {"cache", "fusefs", "tools", "sluicefs"}


def test_it_reaches_its_accuracy_on_a_plain_directory(digits: Path, tmp_path: Path) -> None:
    """So that the mount has nothing to do with it; and goes on from its checkpoint."""
    command = [sys.executable, demo_train.__file__, str(digits), "--checkpoint", str(tmp_path / "model")]
    first = subprocess.run([*command, "--accuracy", "0.95"], capture_output=True, text=True, check=True)
    again = subprocess.run([*command, "--epochs", "1"], capture_output=True, text=True, check=True)
    lines = [demo_driver.EPOCH_LINE.match(line) for line in (first.stdout + again.stdout).splitlines()]
    assert len(lines) == 11
    read = sum(path.stat().st_size for path in digits.glob("*/*/*"))
    for line in lines:
        assert line is not None
        assert (int(line["files"]), int(line["bytes"])) == (1797, read)
    assert lines[-1] is not None
    assert float(lines[-1]["accuracy"]) > 0.95


def test_an_accuracy_out_of_reach_is_a_failure(digits: Path) -> None:
    command = [sys.executable, demo_train.__file__, str(digits), "--epochs", "1", "--accuracy", "1.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is below 1.100" in done.stderr


def test_what_did_not_reach_the_mount_came_from_the_page_cache() -> None:
    before = Counters({"dram": 5, "lake": 10}, get_requests=1, fetched_bytes=10)
    after = Counters({"dram": 25, "lake": 10, "nvme": 30}, get_requests=4, fetched_bytes=40)
    spent = after.since(before)
    assert spent == Counters({"dram": 20, "lake": 0, "nvme": 30}, get_requests=3, fetched_bytes=30)
    assert Epoch(1, 1.0, 0.9, files=2, read_bytes=100, spent=spent).page_cache_bytes == 50


def start_demo(work: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.demo_driver", "--workdir", str(work)]
    return subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def assert_nothing_is_left(work: Path) -> None:
    assert list(work.iterdir()) == []
    assert str(work) not in Path("/proc/self/mountinfo").read_text()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(work) not in entry.read_text(), entry
        except (FileNotFoundError, ProcessLookupError):
            pass  # It ended meanwhile.


@needs_fuse
@pytest.mark.timeout(240)
def test_the_demo_trains_over_a_mount_and_cleans_up(tmp_path: Path) -> None:
    demo = start_demo(tmp_path)
    said, complaints = demo.communicate()
    assert demo.returncode == 0, said + complaints
    assert re.search(r"^ok: the model reached 0.95", said, re.MULTILINE)
    assert re.search(r"^ok: the other epochs fetched nothing", said, re.MULTILINE)
    assert_nothing_is_left(tmp_path)


@needs_fuse
@pytest.mark.timeout(240)
@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up(tmp_path: Path, with_signal: signal.Signals) -> None:
    """Ctrl-C in the terminal reaches the whole process group; `kill` only the demo."""
    demo = start_demo(tmp_path)
    assert demo.stdout is not None
    while not demo.stdout.readline().startswith("== training"):
        assert demo.poll() is None
    if with_signal == signal.SIGINT:
        os.killpg(demo.pid, with_signal)
    else:
        demo.send_signal(with_signal)
    said, complaints = demo.communicate()
    assert demo.returncode == 130, said + complaints
    assert "interrupted" in complaints
    assert_nothing_is_left(tmp_path)
