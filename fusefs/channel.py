"""Loads `_channel` (channel.c) before pyfuse3, so that several processes can share a session."""

from __future__ import annotations

import os
import sys


def load() -> str | None:
    """Load the extension; return None, or why there can be one worker only.

    Call it before anything imports pyfuse3. A second call does nothing.
    """
    if "pyfuse3" in sys.modules and "fusefs._channel" not in sys.modules:
        return "pyfuse3 was loaded before the channel extension"
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_GLOBAL | os.RTLD_NOW)
    try:
        import fusefs._channel  # noqa: F401
    except ImportError as error:
        return (
            f"the channel extension was not built ({error}); needs a C compiler and libfuse3-dev at install"
        )
    finally:
        sys.setdlopenflags(flags)
    return None
