"""The benchmarks' lakes: a real S3 server filled with objects, slowed down or not.

obstore's threads do not survive a fork, and these benchmarks fork their readers. So whatever uses
obstore runs in a child process of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tools.servers import Faults, NginxProxy, SeaweedServer, ServerError, SlowProxy

BUCKET = "lake"
FILL_THREADS = 16
PIECE_BYTES = 1 << 20  # randbytes() takes no more than 256 MiB.


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and as whom to reach an S3 server."""

    url: str
    access_key: str
    secret_key: str
    region: str
    filer: str = (
        ""  # Of SeaweedFS, "host:port.grpc-port": what its own mount speaks to. "": can't be reached so.
    )

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def obstore(self, bucket: str = BUCKET) -> Any:
        """Return an obstore S3Store. Only for a process that won't fork."""
        from obstore.store import S3Store

        return S3Store(
            bucket,
            endpoint=self.url,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region=self.region,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def boto3(self) -> Any:
        """Return a boto3 S3 client."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(s3={"addressing_style": "path"}),
        )


@contextmanager
def seaweed(directory: Path) -> Iterator[Endpoint]:
    """Run a SeaweedFS server with its data in *directory* and the empty bucket BUCKET."""
    # Its memory is not measured; at the default limit a garbage collector under pressure would be.
    with SeaweedServer(directory, memory="2GiB") as server:
        server.create_bucket(BUCKET)
        yield Endpoint(
            server.endpoint_url, server.access_key, server.secret_key, server.region, server.filer_address
        )


@contextmanager
def slowed(
    endpoint: Endpoint, latency_s: float, connection_bytes_per_s: int | None = None
) -> Iterator[tuple[Endpoint, str]]:
    """Yield *endpoint* behind a proxy that delays each request, and what it does for the notes.

    nginx alone can keep each connection to *connection_bytes_per_s*.
    """
    proxy, name = _proxy(endpoint.url, latency_s, connection_bytes_per_s)
    with proxy:
        yield Endpoint(proxy.endpoint_url, endpoint.access_key, endpoint.secret_key, endpoint.region), name


def _proxy(
    upstream_url: str, latency_s: float, connection_bytes_per_s: int | None
) -> tuple[NginxProxy | SlowProxy, str]:
    """Return nginx, which is cheaper at high concurrency, or where it is missing our own proxy."""
    nginx = NginxProxy(upstream_url, latency_s=latency_s, connection_bytes_per_s=connection_bytes_per_s)
    try:
        with nginx:
            pass
    except ServerError:
        uncapped = ", connections not capped" if connection_bytes_per_s else ""
        return SlowProxy(upstream_url, Faults(latency_s=latency_s)), f"tools.servers.SlowProxy{uncapped}"
    cap = f", {connection_bytes_per_s / 1e6:g} MB/s a connection" if connection_bytes_per_s else ""
    return nginx, f"nginx with echo_sleep{cap}"


def body(key: str, size_bytes: int) -> bytes:
    """Return the object of *key*: bytes that don't compress, the same in every run."""
    generator = random.Random(key)
    pieces = [PIECE_BYTES] * (size_bytes // PIECE_BYTES) + [size_bytes % PIECE_BYTES]
    return b"".join(map(generator.randbytes, pieces))


def fill(endpoint: Endpoint, objects: Mapping[str, int]) -> None:
    """Put the objects, keys to sizes in bytes, into the bucket. Raises RuntimeError."""
    in_child(_fill, endpoint, objects)


def _fill(endpoint: Endpoint, objects: Mapping[str, int]) -> None:
    store = endpoint.obstore()

    def put(item: tuple[str, int]) -> None:
        store.put(item[0], body(*item))

    with ThreadPoolExecutor(FILL_THREADS) as pool:
        for _ in pool.map(put, objects.items(), chunksize=64):
            pass


def in_child(work: Any, *arguments: Any) -> None:
    """Run *work* in a fresh process and wait for it. Raises RuntimeError when it fails."""
    child = get_context("spawn").Process(target=work, args=arguments, daemon=True)
    child.start()
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"{work.__name__} ended with status {child.exitcode}")


def keys_in_folders(count: int, folder: int, suffix: str = ".bin") -> list[str]:
    """Return *count* keys, *folder* of them under each prefix: "0003/000017.bin"."""
    return [f"{i // folder:04d}/{i % folder:06d}{suffix}" for i in range(count)]


def write_tree(root: Path, objects: Mapping[str, int]) -> None:
    """Write the same objects as plain files below *root*."""
    made: set[Path] = set()
    for key, size_bytes in objects.items():
        path = root / key
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.write_bytes(body(key, size_bytes))


def paths_below(root: Path, keys: Sequence[str]) -> list[str]:
    return [f"{root}/{key}" for key in keys]
