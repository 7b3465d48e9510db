"""A mount that only answers its control socket: for the tests of its clients."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from cache import control


class FakeMount:
    """A mount point without a mount: a line of mountinfo, and a thread on the control socket."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        self.requests: list[dict[str, Any]] = []
        self.answers: dict[str, list[dict[str, Any]]] = {}
        path = control.socket_path(mountpoint)
        path.parent.mkdir(exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rwb") as stream:
                if not (line := stream.readline()):
                    return
                request = json.loads(line)
                self.requests.append(request)
                for answer in self.answers[request["verb"]]:
                    stream.write(json.dumps(answer).encode() + b"\n")

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as connection:  # A connection without a request ends the thread.
            connection.connect(self._listener.getsockname())
        self._thread.join()
        os.unlink(self._listener.getsockname())
        self._listener.close()


STATUS = {
    "lake": "s3://bucket/prefix",
    "profile": "auto",
    "features": {"passthrough": {"on": False, "reason": "needs root"}, "resend": {"on": True}},
    "processes": {"supervisor": 11, "workers": [12, 13], "mover": 14, "notifier": 15},
    "tiers": [{"name": "dram", "path": "/t", "used_bytes": 1 << 29, "size_bytes": 1 << 30, "objects": 3}],
    "lake_io": {"bytes_fetched": 2048, "bytes_sent": 0, "requests": {"get": 5, "put": 0}},
    "reads": {"bytes_by_source": {"dram": 4096, "lake": 1024}},
    "dirty_bytes": 0,
    "uploads": [],
    "sets": [
        {
            "path": "train",
            "files": 5000,
            "bytes": 5 << 20,
            "epoch": 2,
            "used_share": 0.45,
            "cached_share": 1.0,
            "pattern": "shuffled",
            "order": "unknown",
            "read_ahead": "done",
            "wasted_bytes": 1 << 20,
        }
    ],
}


def entry(path: str, **values: Any) -> dict[str, Any]:
    return {
        "path": path,
        "kind": "file",
        "size_bytes": 2048,
        "tier": "nvme0",
        "cached_bytes": 1024,
        "hits": 3,
        "last_used_s": time.time() - 7205,
        "victim_rank": 2,
        **values,
    }
