"""Loads `_channel` (channel.c) before pyfuse3, so that several processes can share a session."""

from __future__ import annotations

import os
import sys

from cache.config import MountConfig


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


def no_open_feature(config: MountConfig, no_channel: str | None) -> dict[str, object]:
    """Return whether open(2) sends no request on this mount, and why: a feature of `status`.

    Such a mount is fast (a hit in the page cache costs no request at all), but it learns only
    when it reads that the lake holds another version: read(2) then fails with ESTALE, where
    otherwise open(2) would have found the new version.
    """
    if config.profile == "checkpoint":
        return {
            "on": False,
            "reason": "--profile checkpoint: an open that meets a changed object looks it up again",
        }
    if not config.read_only:
        return {"on": False, "reason": "the mount is writable"}
    if no_channel is not None:
        return {"on": False, "reason": no_channel}
    return {"on": True, "reason": f"--profile {config.profile}, read-only: opens cost no request"}
