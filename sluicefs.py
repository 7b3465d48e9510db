"""The launcher of the `sluice` command.

SluiceFS's packages are called `cache`, `fusefs` and `tools`, and training repositories often have
folders of these names, on PYTHONPATH too, where they would be found before ours. A module with a
name of its own is safe to find first; it sees to it that ours are found from then on.

Rejected: a script with `#!python -I` (pip drops the flag when it writes the interpreter's path
there, and isolated mode hides what `pip install --user` installed); taking PYTHONPATH's entries
out of `sys.path` (the same directory may be there for another reason, like site-packages).
"""

from __future__ import annotations

import os
import sys

__version__ = "0.1.0"


def python_path_wanted(python_path: str, home: str) -> str | None:
    """Return what PYTHONPATH must be for SluiceFS: *home*, the launcher's directory, or None for unset.

    *home* stays when *python_path* names it: it may be the only way to the packages beside the
    launcher (`pip install --target`).
    """
    entries = [os.path.abspath(entry) for entry in python_path.split(os.pathsep)]
    return home if home in entries else None


def main() -> int:
    """Run the `sluice` command and return its exit status; starts Python again if PYTHONPATH is set."""
    python_path = os.environ.get("PYTHONPATH")
    if python_path is not None:
        wanted = python_path_wanted(python_path, os.path.dirname(os.path.abspath(__file__)))
        if python_path != wanted:
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            if wanted is not None:
                environment["PYTHONPATH"] = wanted
            os.execve(sys.executable, [sys.executable, "-P", *sys.argv], environment)
    # The script's own directory comes first unless -P is given; ours are never there.
    script_directory = os.path.dirname(os.path.abspath(sys.argv[0]))
    if not sys.flags.safe_path and sys.path and sys.path[0] == script_directory:
        del sys.path[0]

    from tools.cli import main as command

    return command()
