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

SOURCE = "fusefs/channel.c"
SOURCES = [SOURCE, "fusefs/direct.c"]


def pkg_config(*arguments: str) -> list[str]:
    """Return the flags that pkg-config prints for libfuse. Raises OSError or CalledProcessError."""
    command = [os.environ.get("PKG_CONFIG", "pkg-config"), *arguments, "fuse3"]
    return shlex.split(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def extensions() -> list[Extension]:
    """Return the extension when it can be built here, else nothing and one line that says why."""
    if not os.path.exists(SOURCE):
        print(f"sluicefs: {SOURCE} is not there; building without fusefs._channel", file=sys.stderr)
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
            depends=["fusefs/direct.h"],
            extra_compile_args=compile_flags,
            extra_link_args=link_flags,
            optional=True,
        )
    ]


setup(ext_modules=extensions())
