"""Which keys a path can show. A key is split at "/"; its parts are file names."""

from __future__ import annotations

import os

from cache.errors import NameRefused, NameTooLong
from cache.model import KEY_BYTES_MAX, NAME_BYTES_MAX, SYMLINK_SUFFIX

SHADOWED = "a directory or file of this name is there too"
WRITTEN_HERE = "a file of this name was written here and is not in the lake yet"
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


def why_no_key(path: bytes, *, utf8_only: bool = True) -> str | None:
    """Return why the lake can't hold an object for *path*, a place in the mount; None if it can.

    Too long is another matter, see `check_key`. *utf8_only*: as S3 (User Guide, "Naming Amazon S3
    objects"); a directory as a lake holds any bytes.
    """
    name = os.fsdecode(path.rsplit(b"/", 1)[-1])
    if name.endswith(SYMLINK_SUFFIX):
        return f"a name that ends in {SYMLINK_SUFFIX} would be a symlink in the lake"
    if utf8_only:
        try:
            path.decode()
        except UnicodeDecodeError:
            return "the lake takes only names that are UTF-8"
    return None


def check_key(
    path: bytes, *, is_symlink: bool = False, is_directory: bool = False, utf8_only: bool = True
) -> None:
    """Raise NameTooLong or NameRefused if the lake can't hold what is at *path*, a place in the mount."""
    name = path.rsplit(b"/", 1)[-1]
    ending_bytes = len(SYMLINK_SUFFIX) if is_symlink else int(is_directory)
    if len(name) > NAME_BYTES_MAX or len(path) + ending_bytes > KEY_BYTES_MAX:
        raise NameTooLong(
            f"{os.fsdecode(path)}: a name has at most {NAME_BYTES_MAX} bytes, a key {KEY_BYTES_MAX}"
        )
    if (reason := why_no_key(path, utf8_only=utf8_only)) is not None:
        raise NameRefused(f"{os.fsdecode(path)}: {reason}")
