"""The control socket: JSON lines over a Unix socket, one request each connection.

Request:  {"verb": "status", ...}\n
Replies:  any number of {"progress": {"done": int, "total": int, "unit": "bytes"}}\n
          then one of {"result": ...}\n or {"error": "one line"}\n

The socket's mode is 0600 and the server checks the peer's uid (its own, or root).

Verbs (paths are relative to the mount's root, "" is the root):

status                     -> the stable keys of `sluice status --json`
ls      {"paths": [...], "recursive": bool, "limit": int}
                           -> {"entries": [{"path", "kind": "file"|"directory", "size_bytes",
                               "tier": str|null, "cached_bytes", "hits", "last_used_s": float|null (unix),
                               "victim_rank": int|null, "leaves": str|null (why), "pinned": bool,
                               "dirty": str|null}], "errors": [{"path", "error"}], "truncated": bool}
evict   {"paths": [...]}   -> {"objects": int, "bytes": int, "errors": [{"path", "error"}]}
paths   {"upload": str, "paths": [...]}
                           -> {"files": int, "failed": int}, of all parts so far: a list for `warm`
warm    {"paths": [...], "upload": str (optional), "tier": "dram"|"nvme"|null}
                           -> with progress {"phase": "listing"|"plan"|"fetch", and what the result has}:
                              {"files", "bytes", "cached_files", "cached_bytes", "fetch_files",
                               "fetch_bytes", "fetched_files", "fetched_bytes", "moved_files", "unfit_files",
                               "unfit_bytes", "failed_files", "failures": [{"reason", "files", "example"}],
                               "seconds", "left_s": float|null, "errors": [{"path", "error"}],
                               "error_count", "complete": bool}
pin     {"paths": [...], "fetch": bool}
                           -> as `warm`, and {"pinned": [...]}; without fetch {"files", "bytes", "pinned",
                               "errors", "error_count"}
unpin   {"paths": [...]}   -> {"unpinned": [...], "errors": [{"path", "error"}]}
hidden  {"limit": int}     -> {"count": int, "keys": [{"key", "reason"}]}
queue   {"limit": int}     -> {"entries": [{"path", "operation": "put"|"mark"|"delete"|"move"|"restate",
                               "state": "open"|"waiting"|"running"|"retrying"|"conflict"|"failed",
                               "bytes", "sent", "error", "since" (unix)}], "total": int, "dirty_bytes": int}
retry   {"paths": [...]}   -> {"retried": int}; no paths: all that failed
resolve {"paths": [...], "keep": "ours"|"theirs"}
                           -> {"errors": [{"path", "error"}]}
sync    {"paths": [...]}   -> with progress {"done", "total", "unit", "left": int, "trouble": str|null}:
                              {"receipts": [{"path", "key", "etag", "size", "checksum", "time" (unix)}],
                               "errors": [{"path", "error"}]}
hint    {"directory": str, and one of
         "sampler": {...}  -> the fields of `ToldSampler`, or in one or more requests
         "paths": [...] | "indices": [...], "upload": str (the same for all parts), "last": bool}
                           -> {"files": int, "missing": int, "examples": [str]}, of all parts so far
trace   {"seconds": float} -> with progress: {"uses": [[milliseconds, item, bytes], ...]}, every second;
                           {"dropped": int}
drain   {}                 -> with progress: moves what DRAM holds to the NVMe tiers; {"bytes": int}
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache.errors import SluiceError

REQUEST_BYTES_MAX = 16 << 20


class NotMounted(SluiceError):
    """No SluiceFS mount answers for this directory."""


class Unanswered(SluiceError):
    """Who listened ended before it answered: another may listen soon, or nobody any more."""


def runtime_directory() -> Path:
    """Return the directory of the control sockets of this user's mounts (mode 0700)."""
    if os.geteuid() == 0:
        return Path("/run/sluice")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "sluice" if runtime else Path(f"/tmp/sluice-{os.geteuid()}")


def socket_path(mountpoint: Path) -> Path:
    """Return the control socket's path for an absolute, resolved *mountpoint*."""
    name = hashlib.blake2b(os.fsencode(mountpoint), digest_size=8).hexdigest()
    return runtime_directory() / f"{name}.sock"


def call(
    mountpoint: Path,
    verb: str,
    *,
    on_progress: Callable[[dict[str, Any]], None] = lambda _: None,
    timeout_s: float | None = 60.0,
    **arguments: Any,
) -> Any:
    """Return the result of *verb* from the mount at *mountpoint*, blocking.

    Raises NotMounted when nobody listens, Unanswered, and SluiceError with the server's own line.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(socket_path(mountpoint)))
        except OSError as error:
            raise NotMounted(f"{mountpoint}: no SluiceFS is mounted there ({error.strerror})") from error
        try:
            connection.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    reply = json.loads(line)
                    if "progress" in reply:
                        on_progress(reply["progress"])
                    elif "error" in reply:
                        raise SluiceError(reply["error"])
                    else:
                        return reply["result"]
        except OSError as error:
            kind = Unanswered if isinstance(error, ConnectionError) else SluiceError
            raise kind(f"{mountpoint}: the mount stopped answering ({error})") from error
    raise Unanswered(f"{mountpoint}: the mount closed the connection without an answer")
