"""Which keys a path can show. A key is split at "/"; its parts are file names."""

from __future__ import annotations

import os

from cache.errors import NameRefused, NameTooLong
from cache.model import KEY_BYTES_MAX, KIND_DIRECTORY, KIND_FILE, KIND_SYMLINK, NAME_BYTES_MAX, SYMLINK_SUFFIX

SHADOWED = "a directory or file of this name is there too"
WRITTEN_HERE = "a file of this name was written here and is not in the lake yet"
CONTROL_DIRECTORY = "the mount's own control directory has this name"
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


def why_no_key(path: bytes, kind: int = KIND_FILE) -> str | None:
    """Return why the lake can't hold what is at *path*, a place in the mount; None if it can.

    Too long is another matter, see `check_key`. UTF-8: S3 User Guide, "Naming Amazon S3 objects".
    """
    if kind != KIND_DIRECTORY and path.endswith(os.fsencode(SYMLINK_SUFFIX)):
        return f"a name that ends in {SYMLINK_SUFFIX} would be a symlink in the lake"
    try:
        path.decode()
    except UnicodeDecodeError:
        return "the lake takes only names that are UTF-8"
    return None


def check_key(path: bytes, kind: int = KIND_FILE) -> None:
    """Raise NameTooLong or NameRefused if the lake can't hold what is at *path*, a place in the mount."""
    name = path.rsplit(b"/", 1)[-1]
    ending_bytes = {KIND_DIRECTORY: 1, KIND_SYMLINK: len(SYMLINK_SUFFIX)}.get(kind, 0)
    name_bytes = len(name) + (ending_bytes if kind == KIND_SYMLINK else 0)  # As the lake lists it.
    if name_bytes > NAME_BYTES_MAX or len(path) + ending_bytes > KEY_BYTES_MAX:
        raise NameTooLong(
            f"{os.fsdecode(path)}: a name has at most {NAME_BYTES_MAX} bytes, a key {KEY_BYTES_MAX}, of a"
            f" symlink with {SYMLINK_SUFFIX} behind it"
        )
    if (reason := why_no_key(path, kind)) is not None:
        raise NameRefused(f"{os.fsdecode(path)}: {reason}")
