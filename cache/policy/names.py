"""Which keys a path can show. A key is split at "/"; its parts are file names."""

from __future__ import annotations

import os

from cache.model import NAME_BYTES_MAX

SHADOWED = "a directory of this name is there too"
MARKER_WITH_CONTENT = "a directory marker with content"


def why_no_name(part: str) -> str | None:
    """Return why *part*, one component of a key, can't be a file name; None if it can."""
    if part == "":
        return "an empty component (//)"
    if part in (".", ".."):
        return f"a component that is {part!r}"
    if "\0" in part:
        return "a NUL in a component"
    if len(os.fsencode(part)) > NAME_BYTES_MAX:
        return f"a component of over {NAME_BYTES_MAX} bytes"
    return None
