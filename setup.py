"""Build of the optional C extension; everything else is in setup.cfg and pyproject.toml.

`fusefs._channel` gives access to kernel features that pyfuse3 does not expose. Without a compiler
or libfuse's headers SluiceFS works without those features, and `sluice doctor` says which.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

from setuptools import Extension, setup

SOURCES = [
    "fusefs/channel.c",
    "fusefs/counted.c",
    "fusefs/direct.c",
    "fusefs/grants.c",
    "fusefs/reads.c",
    "fusefs/receiver.c",
    "fusefs/written.c",
]
HEADER = "fusefs/channel.h"


def pkg_config(*arguments: str) -> list[str]:
    """Return the flags that pkg-config prints for libfuse. Raises OSError or CalledProcessError."""
    command = [os.environ.get("PKG_CONFIG", "pkg-config"), *arguments, "fuse3"]
    return shlex.split(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def extensions() -> list[Extension]:
    """Return the extension when it can be built here, else nothing and one line that says why."""
    for path in [*SOURCES, HEADER]:
        if not os.path.exists(path):
            print(f"sluicefs: {path} is not there; building without fusefs._channel", file=sys.stderr)
            return []
    try:
        compile_flags, link_flags = pkg_config("--cflags"), pkg_config("--libs")
    except (OSError, subprocess.CalledProcessError) as error:
        print(
            f"sluicefs: libfuse's headers were not found ({error}); building without fusefs._channel."
            " Install libfuse3-dev and pkg-config (Debian, Ubuntu) to have it.",
            file=sys.stderr,
        )
        return []
    # Optional: a compiler that is missing or fails is a warning of the build, no failure.
    return [
        Extension(
            "fusefs._channel",
            SOURCES,
            depends=[HEADER],
            extra_compile_args=[*compile_flags, "-pthread"],
            extra_link_args=[*link_flags, "-pthread"],
            optional=True,
        )
    ]


setup(ext_modules=extensions())
