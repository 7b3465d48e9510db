"""What is sent to S3 goes with a checksum that the server at hand compares: broken bytes are not stored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cache.config import LakeConfig
from cache.errors import BodyBroken, ObjectMissing
from cache.lake.base import crc32_text
from cache.lake.s3 import S3Lake
from cache.lake.s3_parts import content_md5
from tools.servers import SlowProxy

pytestmark = pytest.mark.usefixtures("s3_credentials")

CONTENT = bytes(range(256)) * 400
ERROR = "<Error><Code>{}</Code><Message>no such header here</Message></Error>"
STARTED = (
    "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>U1</UploadId>"
    "</InitiateMultipartUploadResult>"
)


@pytest.fixture(params=["obstore", "boto3"])
def lake(request: pytest.FixtureRequest, proxy: SlowProxy, shared_bucket: str) -> Iterator[S3Lake]:
    config = LakeConfig(f"s3://{shared_bucket}/checksums", endpoint_url=proxy.endpoint_url)
    lake = S3Lake(config, use_obstore=request.param == "obstore")
    yield lake
    lake.close()


def test_an_object_that_broke_on_its_way_is_not_stored(
    lake: S3Lake, proxy: SlowProxy, request: pytest.FixtureRequest
) -> None:
    key = f"object-{request.node.callspec.id}"
    proxy.fail_next("garble")
    try:
        lake.put(key, CONTENT)
    except BodyBroken as error:
        assert "BadDigest" in str(error)
        with pytest.raises(ObjectMissing):
            lake.head(key)
        lake.put(key, CONTENT)
    assert proxy.faults_dealt["garble"] == 1
    assert bytes(lake.get_range(lake.head(key).version, 0, len(CONTENT))) == CONTENT


def test_a_part_that_broke_on_its_way_is_not_stored(lake: S3Lake, proxy: SlowProxy) -> None:
    upload_id = lake.start_multipart("parts")
    proxy.fail_next("garble")
    with pytest.raises(BodyBroken, match="BadDigest"):
        lake.put_part("parts", upload_id, 1, CONTENT)
    assert lake.list_parts("parts", upload_id) == []
    part = lake.put_part("parts", upload_id, 1, CONTENT)
    assert part.crc32 == crc32_text(CONTENT)
    info = lake.complete_multipart("parts", upload_id, [part])
    assert bytes(lake.get_range(info.version, 0, len(CONTENT))) == CONTENT


def test_an_upload_that_another_process_goes_on_with_keeps_its_kind_of_checksum(lake: S3Lake) -> None:
    first, second = CONTENT * 60, CONTENT
    upload_id = lake.start_multipart("resumed")
    lake.put_part("resumed", upload_id, 1, first)
    lake.close()  # Makes its clients anew.
    lake.put_part("resumed", upload_id, 2, second)
    parts = [
        replace(part, crc32=crc32_text(content))
        for part, content in zip(lake.list_parts("resumed", upload_id), (first, second), strict=True)
    ]
    info = lake.complete_multipart("resumed", upload_id, parts)
    assert info.version.size_bytes == len(first) + len(second)


class OldServer(ThreadingHTTPServer):
    """Answers writes as a server does that has never heard of S3's additional checksums.

    *refusal*: the status and code that it answers such a header with; None if it takes no notice of it.
    """

    daemon_threads = True

    def __init__(self, refusal: tuple[int, str] | None) -> None:
        super().__init__(("127.0.0.1", 0), _OldHandler)
        self.refusal = refusal
        self.headers: list[tuple[str, dict[str, str]]] = []  # Method, and headers, of each request.

    @property
    def lake(self) -> S3Lake:
        return S3Lake(LakeConfig("s3://b", endpoint_url=f"http://127.0.0.1:{self.server_port}"))


class _OldHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OldServer

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        names = {name.lower(): value for name, value in self.headers.items()}
        self.server.headers.append((self.command, names))
        status, body = 200, STARTED if self.command == "POST" else ""
        if self.server.refusal and any(name.startswith("x-amz-checksum-") for name in names):
            status, code = self.server.refusal
            body = ERROR.format(code)
        self.send_response(status)
        self.send_header("ETag", '"0123"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Not on the terminal."""


@pytest.fixture(
    params=[(501, "NotImplemented"), (400, "UnsupportedHeader"), (403, "SignatureDoesNotMatch"), None]
)
def old_server(request: pytest.FixtureRequest) -> Iterator[OldServer]:
    server = OldServer(request.param)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    serving.start()
    yield server
    server.shutdown()
    serving.join()
    server.server_close()


def test_parts_have_the_old_checksum_where_the_server_knows_no_other(old_server: OldServer) -> None:
    lake = old_server.lake
    for _ in range(2):
        upload_id = lake.start_multipart("k")
        assert upload_id == "U1"
    asked_anew = ["POST", "POST"] if old_server.refusal else ["POST", "DELETE", "POST"]
    assert [method for method, _ in old_server.headers] == [*asked_anew, "POST"]
    lake.put_part("k", upload_id, 1, CONTENT)
    method, headers = old_server.headers[-1]
    assert (method, headers["content-md5"]) == ("PUT", content_md5(CONTENT))
    assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert not any(name.startswith("x-amz-checksum-") for name in headers)
    lake.close()


def test_objects_go_without_the_new_checksum_once_it_was_the_reason_of_a_refusal(
    old_server: OldServer,
) -> None:
    lake = old_server.lake
    for _ in range(3):
        lake.put("k", CONTENT)
    kinds = [
        "new" if "x-amz-checksum-sha256" in headers else "md5" if "content-md5" in headers else "signed"
        for _, headers in old_server.headers
    ]
    assert kinds == (["new", "md5", "signed", "signed"] if old_server.refusal else ["new"] * 3)
    lake.close()
