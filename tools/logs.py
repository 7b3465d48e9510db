"""Logging for an operator: `time level process message`, to standard error or to a file."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path

_CHATTY = ("boto3", "botocore", "s3transfer", "urllib3")  # One line or more for each request.


class _Formatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(process)d %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


class _PrivateFileHandler(WatchedFileHandler):
    """Appends to a file of mode 0600; opens it anew when logrotate has moved it away."""

    def _open(self) -> TextIOWrapper:
        def opener(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, "a", encoding="utf-8", errors="backslashreplace", opener=opener)


def configure(level: str, *, file: Path | None, stderr: bool) -> None:
    """Send every logger's lines of *level* and above to *file*, to standard error, or both.

    Raises OSError when the file can't be opened. Replaces what was configured before.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()] if stderr else []
    if file is not None:
        handlers.append(_PrivateFileHandler(file))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    for handler in handlers:
        handler.setFormatter(_Formatter())
        root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def last_line(path: Path, offset: int) -> str:
    """Return the last line that was written to *path* after byte *offset*, or ""."""
    try:
        with path.open("rb") as log:
            log.seek(max(offset, path.stat().st_size - 8192))
            lines = log.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
