"""`pip install .` gives the command, and foreign folders with our packages' names don't break it."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import sluicefs

CHECKOUT = Path(__file__).resolve().parent.parent
INSTALLED = Path(sys.executable).parent / "sluice"
OURS = ("cache", "fusefs", "tools")


def run(
    command: list[str | Path], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel that pip builds from the checkout's files, built in a copy."""
    source = tmp_path_factory.mktemp("source") / "sluicefs"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "dist")
    shutil.copytree(CHECKOUT, source, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = run([*command, "--wheel-dir", out, source], source, {})
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def install(wheel: Path, environment: Path) -> Path:
    """Install *wheel* with pip into a new virtual environment; return the command's path.

    Its dependencies are those of the running environment, which come after its own packages.
    """
    made = run([sys.executable, "-m", "venv", "--without-pip", environment], wheel.parent, {})
    assert made.returncode == 0, made.stderr
    command = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python"]
    done = run([*command, "install", "--quiet", "--no-deps", "--no-index", wheel], wheel.parent, {})
    assert done.returncode == 0, done.stderr
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin" / "sluice"


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of `sluice` as `pip install` of the wheel puts it there."""
    return install(wheel, tmp_path_factory.mktemp("installed") / "venv")


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """Return a training repository whose folders have our packages' names and can't be imported."""
    for name in OURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('a foreign {name}/')\n")
    return tmp_path


def assert_prints_version(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert sluicefs.__version__ in done.stdout
    assert done.stderr == ""


def test_the_poison_would_work(poisoned: Path) -> None:
    """So that the tests below show something."""
    done = run([sys.executable, "-c", "import tools"], poisoned, {"PYTHONPATH": str(poisoned)})
    assert done.returncode != 0
    assert "a foreign tools/" in done.stderr


@pytest.mark.parametrize("python_path", ["{0}", "", "{0}:/nonexistent", ":{0}", "."])
def test_the_installed_command_ignores_pythonpath_and_the_current_directory(
    poisoned: Path, python_path: str
) -> None:
    environment = {"PYTHONPATH": python_path.format(poisoned)}
    assert_prints_version(run([INSTALLED, "--version"], poisoned, environment))


def test_the_command_from_the_wheel_ignores_them_too(from_wheel: Path, poisoned: Path) -> None:
    assert_prints_version(run([from_wheel, "--version"], poisoned, {"PYTHONPATH": str(poisoned)}))
    assert_prints_version(run([from_wheel, "--version"], poisoned, {}))


def test_the_command_from_the_wheel_uses_its_own_files(from_wheel: Path, poisoned: Path) -> None:
    """Not those of the checkout, that the running environment knows as well."""
    code = "import tools, sluicefs; print(tools.__file__, sluicefs.__file__)"
    done = run([from_wheel.parent / "python", "-P", "-c", code], poisoned, {})
    assert done.stdout.count(str(from_wheel.parent.parent)) == 2, done.stdout + done.stderr


def test_a_target_install_found_through_pythonpath_works(wheel: Path, poisoned: Path, tmp_path: Path) -> None:
    """`pip install --target` puts everything where only PYTHONPATH leads to it."""
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    done = run([*command, "--target", target, wheel], tmp_path, {})
    assert done.returncode == 0, done.stderr
    environment = {"PYTHONPATH": f"{poisoned}{os.pathsep}{target}"}
    assert_prints_version(run([target / "bin" / "sluice", "--version"], poisoned, environment))


@pytest.mark.parametrize("name", ["with a space", "long/" * 60])
def test_the_command_works_from_odd_places(wheel: Path, poisoned: Path, tmp_path: Path, name: str) -> None:
    """The kernel reads no spaces and no more than 255 bytes after `#!`: pip writes a detour there."""
    command = install(wheel, tmp_path / "odd" / name)
    assert_prints_version(run([command, "--version"], poisoned, {"PYTHONPATH": str(poisoned)}))


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {*OURS, "sluicefs.py"}
    modules = {str(path.relative_to(CHECKOUT)) for top in OURS for path in (CHECKOUT / top).rglob("*.py")}
    assert modules <= set(names)
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_changelog_names_the_version() -> None:
    text = (CHECKOUT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert sluicefs.__version__ in headings or headings[0] == "Unreleased"


def test_the_tests_are_not_packaged_and_every_package_is_a_package() -> None:
    """`find:` passes by a folder without `__init__.py` silently."""
    for top in OURS:
        for path in (CHECKOUT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_a_launcher_keeps_only_its_own_directory_of_pythonpath() -> None:
    home = site.getsitepackages()[0]
    assert sluicefs.python_path_wanted("/a:/b", home) is None
    assert sluicefs.python_path_wanted(f"/a:{home}", home) == home
