"""Fixtures with real S3 servers. Loaded with `pytest_plugins = ["tests.fixtures_servers"]`."""

from __future__ import annotations

import itertools
import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.servers import SeaweedServer, SlowProxy

_bucket_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SeaweedServer]:
    """A SeaweedFS server for the whole session. Tests use buckets of their own, see `bucket`."""
    with SeaweedServer() as server:
        yield server


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> Iterator[str]:
    """The name of a new, empty bucket, deleted after the test: the server's volumes are few."""
    name = f"test-{os.getpid()}-{next(_bucket_numbers)}"
    s3_server.create_bucket(name)
    yield name
    s3_server.delete_bucket(name)


@pytest.fixture(scope="session")
def shared_bucket(s3_server: SeaweedServer) -> str:
    """The name of a bucket that tests share, each below a prefix of its own. Cheaper than `bucket`."""
    s3_server.create_bucket("shared")
    return "shared"


@pytest.fixture
def s3_credentials(s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's credentials in the environment, and nothing else that configures AWS clients."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        if name != "AWS_ENDPOINT_URL":
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def proxy(s3_server: SeaweedServer) -> Iterator[SlowProxy]:
    """A proxy in front of the server, for faults."""
    with SlowProxy(s3_server.endpoint_url, seed=1) as proxy:
        yield proxy


@pytest.fixture(scope="session", params=["CA:FALSE", "CA:TRUE"])
def self_signed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEM file with a key and a self-signed certificate for 127.0.0.1, marked as a CA's or not."""
    directory = tmp_path_factory.mktemp(request.param.replace(":", "-"))
    key, certificate, both = (directory / name for name in ("key.pem", "certificate.pem", "both.pem"))
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    )
    extensions = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", f"basicConstraints={request.param}"]
    subprocess.run(
        [*command.split(), "-keyout", key, "-out", certificate, *extensions], check=True, capture_output=True
    )
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both


@pytest.fixture
def server_tls(self_signed: Path) -> ssl.SSLContext:
    """The server's side of TLS with the self-signed certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed)
    return context
