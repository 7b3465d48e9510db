"""An import points down only: the contracts of pyproject.toml hold, and would be reported if not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = ("cache", "fusefs", "tools")


def lint_imports(directory: Path) -> tuple[bool, str]:
    """Return whether the packages in *directory* keep the contracts, and what import-linter said."""
    command = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [command, "--no-cache", "--no-logo"], cwd=directory, capture_output=True, text=True, check=False
    )
    return done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Return a directory with a copy of the packages and the contracts, free to be changed."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(CHECKOUT / package, tmp_path / package, ignore=ignored)
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    return tmp_path


def add_import(directory: Path, importer: str, imported: str) -> None:
    """Make module *importer* import *imported*; creates either when it is not there."""
    for module in (importer, imported):
        path = directory / Path(*module.split("."))
        if not path.with_suffix(".py").exists() and not path.is_dir():
            path.with_suffix(".py").touch()
    path = directory / Path(*importer.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    with path.open("a") as source:
        source.write(f"\nimport {imported}\n")


def test_the_contracts_hold() -> None:
    kept, said = lint_imports(CHECKOUT)
    assert kept, said


def test_an_unchanged_copy_keeps_the_contracts(copied: Path) -> None:
    """So that the failures below come from the import that they add."""
    kept, said = lint_imports(copied)
    assert kept, said


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("cache.model", "fusefs.supervisor"),
        ("fusefs.supervisor", "tools.servers"),
        ("cache.errors", "cache.lake.base"),
        ("cache.tier", "cache.index"),
        ("cache.index", "cache.lake.base"),
        ("cache.policy.eviction", "cache.index"),
        ("cache.policy.eviction", "time"),
        ("cache.fetcher", "cache.mover"),
        ("cache.control", "pyfuse3"),
        ("fusefs.namespace", "fusefs.operations"),
        ("fusefs.filesystem", "pyfuse3"),
    ],
)
def test_a_violation_is_reported(copied: Path, importer: str, imported: str) -> None:
    add_import(copied, importer, imported)
    kept, said = lint_imports(copied)
    assert not kept, said
    assert importer in said
    assert imported in said


@pytest.mark.parametrize("package", ["cache", "fusefs"])
def test_a_module_that_has_no_layer_is_reported(copied: Path, package: str) -> None:
    (copied / package / "homeless.py").touch()
    kept, said = lint_imports(copied)
    assert not kept
    assert f"{package}.homeless" in said
