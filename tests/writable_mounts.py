"""What the tests of writable mounts share."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.mounting import MIB, Folder, Lake, LiveMount, Prefix, content, mounting_below
from tools.servers import SeaweedServer

WRITABLE = ("-o", "rw")


SMALL, LARGE = content(300_000, seed=58), content(9 * MIB + 7, seed=58)


@contextmanager
def mounted_writable(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveMount]:
    """One writable mount for all tests; what is closed is sent after a moment, while they go on."""
    home = tmp_path_factory.mktemp("write")
    lake: Lake
    environment: dict[str, str] = {}
    if request.param != "S3":
        lake = Folder(home / "lake")
    else:
        server: SeaweedServer = request.getfixturevalue("s3_server")
        lake = Prefix(server, request.getfixturevalue("shared_bucket"), f"write-{os.getpid()}")
        environment = {k: v for k, v in server.environment().items() if k != "AWS_ENDPOINT_URL"}
    for name in ("small", "again", "cut", "grown", "emptied", "appended", "moved", "gone", "mapped", "odd"):
        lake.put(f"lake/{name}", SMALL)
    for name in ("large", "large-cut", "large-mapped"):
        lake.put(f"lake/{name}", LARGE)
    lake.put("lake/tree/a/leaf", b"leaf")
    with mounting_below(home) as mounting:
        options = (*lake.options, *WRITABLE, "--ttl=600", "--upload-delay=0.3", "--workers=2")
        if request.param == "no passthrough":
            options += ("--passthrough=off",)
        yield mounting.mount(lake.url, *options, environment=environment)


KINDS = ["directory", "S3", "no passthrough"]


def fails_with(code: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code, f"{errno.errorcode[caught.value.errno]}, not {errno.errorcode[code]}"


def drop_pages(fd: int) -> None:
    """Have the next read come to us."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
