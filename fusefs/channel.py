"""Loads `_channel` (channel.c) before pyfuse3, so that several processes can share a session."""

from __future__ import annotations

import os
import sys
from typing import Any


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


def last_unique() -> int:
    """Return the number of the request that the running handler answers; 0: not known.

    It is the same when the kernel sends the request again because the worker that had it died.
    Call it before the handler's first await: then the next request may have been received.
    """
    extension = module()
    return 0 if extension is None else extension.last_unique()


def can_receive_in_thread() -> bool:
    """Return whether `receive_in_thread` works. Call it once the session has shaken hands."""
    extension = module()
    return extension is not None and bool(extension.can_receive_in_thread())


def receive_in_thread() -> int:
    """Have a thread wait for requests, and answer those of `fusefs.grants`; return the device's descriptor.

    Of several workers the kernel then wakes one for each request. Call it after the fork, once.
    The session's own descriptor is readable from then on while a request waits for Python. The device
    is to be in blocking mode. Raises ValueError where `can_receive_in_thread` says no, and OSError.
    """
    return int(module().receive_in_thread())


def reads_failure() -> str | None:
    """Return None where the extension can bring the bytes of cached files to the kernel, else why not."""
    extension = module()
    if extension is None:
        return load()
    return None if extension.can_read_files() else "libxxhash.so.0 (0.8 or later) is not there"


def want_passthrough() -> None:
    """Have the session that is initialised next ask the kernel for FUSE_PASSTHROUGH, if possible."""
    extension = module()
    if extension is not None:
        extension.want_passthrough()


def passthrough_failure() -> str | None:
    """Return None where the kernel agreed to FUSE_PASSTHROUGH, else why it did not."""
    extension = module()
    return load() if extension is None else extension.passthrough_failure()


def pass_through(unique: int, backing_id: int) -> None:
    """Have the kernel read and write the file behind *backing_id* for this OPEN or CREATE.

    Call it just before the handler returns; an error as the answer takes it back. Raises
    ValueError where the kernel did not agree.
    """
    module().pass_through(unique, backing_id)


def module() -> Any:
    """Return the module `_channel`, None where `load` did not load it."""
    return sys.modules.get("fusefs._channel")
