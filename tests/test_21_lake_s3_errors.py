"""What goes wrong with S3 becomes the right exception, with one clear line."""

from __future__ import annotations

import functools
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from cache.config import LakeConfig
from cache.errors import (
    AccessDenied,
    LakeError,
    LakeMisconfigured,
    LakeUnavailable,
    ObjectChanged,
    ObjectMissing,
    SlowDown,
    TruncatedBody,
)
from cache.lake import s3_client
from cache.lake.s3 import S3Lake
from cache.lake.s3_errors import Place, from_obstore, from_reply
from cache.lake.s3_ranges import can_name, quoted
from cache.model import ObjectVersion
from tools.servers import Faults, SeaweedServer, SlowProxy

pytestmark = pytest.mark.usefixtures("s3_credentials")

CONTENT = bytes(range(256)) * 400
PLACE = Place("s3://bucket/prefix", "http://127.0.0.1:9000", None)


@pytest.fixture(params=["obstore", "boto3"])
def lake(request: pytest.FixtureRequest, proxy: SlowProxy, shared_bucket: str) -> Iterator[S3Lake]:
    config = LakeConfig(f"s3://{shared_bucket}/errors", endpoint_url=proxy.endpoint_url, read_timeout_s=1.0)
    lake = S3Lake(config, use_obstore=request.param == "obstore")
    yield lake
    lake.close()


@pytest.fixture
def version(lake: S3Lake, proxy: SlowProxy) -> ObjectVersion:
    version = lake.put("sample", CONTENT).version
    proxy.reset_counts()
    return version


def read(lake: S3Lake, version: ObjectVersion) -> bytes:
    return bytes(lake.get_range(version, 0, version.size_bytes))


def failure(request: Callable[[], object], expected: type[LakeError]) -> str:
    """Return the text of the error, which must be of exactly this class and on one line."""
    with pytest.raises(LakeError) as caught:
        request()
    assert type(caught.value) is expected, repr(caught.value)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 400, text
    assert caught.value.__cause__ is not None or expected is LakeMisconfigured
    return text


def test_a_truncated_body_is_an_error_and_is_not_asked_for_again(
    lake: S3Lake, proxy: SlowProxy, version: ObjectVersion
) -> None:
    proxy.fail_next("truncate")
    text = failure(lambda: read(lake, version), TruncatedBody)
    assert text.endswith("/errors/sample: the body ended early")
    assert proxy.requests == {"GET": 1}
    assert read(lake, version) == CONTENT


def test_pieces_that_end_early_are_an_error_and_so_is_every_other_fault(
    lake: S3Lake, proxy: SlowProxy
) -> None:
    content = CONTENT * 20
    version = lake.put("large", content).version
    proxy.reset_counts()
    faults: list[tuple[Any, type[LakeError]]] = [
        ("truncate", TruncatedBody),
        ("slow_down", SlowDown),
        ("error", LakeUnavailable),
        ("reset", LakeUnavailable),
    ]
    for kind, expected in faults:
        proxy.fail_next(kind)
        failure(lambda: list(lake.get_pieces(version, 0, len(content))), expected)
    assert proxy.requests == {"GET": len(faults)}
    assert b"".join(lake.get_pieces(version, 0, len(content))) == content


def test_a_503_is_slow_down_and_a_500_unavailable(
    lake: S3Lake, proxy: SlowProxy, version: ObjectVersion
) -> None:
    proxy.fail_next("slow_down")
    assert "asks for fewer requests" in failure(lambda: read(lake, version), SlowDown)
    proxy.fail_next("error")
    assert "InternalError" in failure(lambda: read(lake, version), LakeUnavailable)
    assert proxy.requests == {"GET": 2}


def test_a_reset_connection_is_unavailable(lake: S3Lake, proxy: SlowProxy, version: ObjectVersion) -> None:
    proxy.fail_next("reset")
    assert "the connection to the lake broke" in failure(lambda: read(lake, version), LakeUnavailable)
    assert proxy.requests == {"GET": 1}
    assert read(lake, version) == CONTENT


def test_a_silent_lake_is_unavailable_after_the_read_timeout(
    lake: S3Lake, proxy: SlowProxy, version: ObjectVersion
) -> None:
    proxy.fail_next("hang")
    assert "no answer from the lake in time" in failure(lambda: read(lake, version), LakeUnavailable)
    assert proxy.requests == {"GET": 1}


@pytest.mark.parametrize("kind", ["slow_down", "error", "reset", "truncate"])
def test_a_fault_of_any_verb_is_retryable_and_no_verb_retries(
    lake: S3Lake, proxy: SlowProxy, version: ObjectVersion, kind: str
) -> None:
    upload_id = lake.start_multipart("upload")
    verbs: list[Callable[[], object]] = [
        lambda: lake.list_page("", delimiter=True),
        lambda: lake.put("other", CONTENT),
        lambda: lake.put_part("upload", upload_id, 1, CONTENT),
        lambda: lake.copy(version, "copy"),
    ]
    if kind != "truncate":  # Nothing to truncate there.
        verbs.append(lambda: lake.head("sample"))
    for verb in verbs:
        proxy.reset_counts()
        proxy.fail_next(kind)  # type: ignore[arg-type]
        try:
            verb()
        except LakeUnavailable:
            assert proxy.faults_dealt.total() == 1
        else:
            assert kind == "truncate"  # A reply that is empty anyway.
        assert proxy.requests.total() == 1
    lake.abort_multipart("upload", upload_id)


def test_deletes_that_failed_are_returned(lake: S3Lake, proxy: SlowProxy, version: ObjectVersion) -> None:
    proxy.fail_next("slow_down")
    failed = lake.delete_many(["sample", "other"])
    assert {key: type(error) for key, error in failed.items()} == {"sample": SlowDown, "other": SlowDown}
    assert lake.delete_many(["sample", "other"]) == {}


def test_a_bad_lake_never_gives_a_wrong_byte(lake: S3Lake, proxy: SlowProxy, version: ObjectVersion) -> None:
    proxy.faults = Faults(slow_down_share=0.2, error_share=0.1, reset_share=0.2, truncate_share=0.2)
    good = 0
    for _ in range(60):
        try:
            assert read(lake, version) == CONTENT
            good += 1
        except LakeUnavailable:
            pass
    assert 5 <= good <= 40
    assert proxy.requests.total() == 60


def test_a_wrong_secret_or_access_key_is_said_so(
    lake: S3Lake, version: ObjectVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    lake.close()  # The next verb signs in anew.
    assert "secret key does not fit" in failure(lake.check, LakeMisconfigured)
    assert "secret key does not fit" in failure(lambda: read(lake, version), LakeMisconfigured)
    failure(lambda: lake.head("sample"), AccessDenied)  # A HEAD's 403 tells no more.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    lake.close()
    assert "does not know this access key" in failure(lake.check, LakeMisconfigured)


def test_no_credentials_at_all_is_said_so(lake: S3Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    text = failure(lake.check, LakeMisconfigured)
    assert "no credentials found" in text and "--anonymous" in text


def test_an_anonymous_reader_of_a_private_bucket_is_denied(
    s3_server: SeaweedServer, shared_bucket: str
) -> None:
    config = LakeConfig(f"s3://{shared_bucket}", endpoint_url=s3_server.endpoint_url, anonymous=True)
    failure(S3Lake(config).check, AccessDenied)


@pytest.mark.parametrize(
    ("change", "expected", "text"),
    [
        ({"url": "s3://no-such-bucket/x"}, LakeMisconfigured, "s3://no-such-bucket/x: no such bucket"),
        ({"url": "s3://B!"}, LakeMisconfigured, "s3://B!: this is no valid bucket name"),
        (
            {"endpoint_url": "http://127.0.0.1:1"},
            LakeUnavailable,
            "--endpoint-url http://127.0.0.1:1: connection",
        ),
        (
            {"endpoint_url": "http://no.host.invalid"},
            LakeUnavailable,
            "--endpoint-url http://no.host.invalid: ",
        ),
        ({"endpoint_url": "here"}, LakeMisconfigured, "--endpoint-url here: Invalid endpoint"),
        ({"aws_profile": "none"}, LakeMisconfigured, "--aws-profile none: no such profile"),
        ({"ca_bundle": Path("/none.pem")}, LakeMisconfigured, "--ca-bundle /none.pem: No such file"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(
    s3_server: SeaweedServer, change: dict[str, object], expected: type[LakeError], text: str
) -> None:
    config = LakeConfig("s3://bucket", endpoint_url=s3_server.endpoint_url)
    config = replace(config, **change)  # type: ignore[arg-type]
    assert failure(S3Lake(config).check, expected).startswith(text)


def test_a_url_without_a_bucket_is_refused() -> None:
    with pytest.raises(LakeMisconfigured, match="s3://BUCKET"):
        S3Lake(LakeConfig("s3:///prefix"))


def test_a_profile_and_its_endpoint_are_taken_from_the_aws_files(
    s3_server: SeaweedServer, shared_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint_url}\n"
        f"aws_access_key_id = {s3_server.access_key}\naws_secret_access_key = {s3_server.secret_key}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for use_obstore in (True, False):
        lake = S3Lake(LakeConfig(f"s3://{shared_bucket}/p", aws_profile="lab"), use_obstore=use_obstore)
        assert read(lake, lake.put("sample", CONTENT).version) == CONTENT


def test_the_given_endpoint_overrules_the_environment(
    lake: S3Lake, version: ObjectVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    lake.close()
    assert read(lake, version) == CONTENT


def test_tls_needs_a_certificate_that_is_trusted(
    s3_server: SeaweedServer,
    shared_bucket: str,
    self_signed: Path,
    server_tls: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with SlowProxy(s3_server.endpoint_url, tls=server_tls) as proxy:
        config = LakeConfig(f"s3://{shared_bucket}/tls", endpoint_url=proxy.endpoint_url)
        distrustful = S3Lake(config)
        assert "--ca-bundle" in failure(distrustful.check, LakeMisconfigured)
        for use_obstore in (True, False):
            lake = S3Lake(replace(config, ca_bundle=self_signed), use_obstore=use_obstore)
            version = lake.put("sample", CONTENT).version
            assert read(lake, version) == CONTENT
            assert read(lake, version) == CONTENT  # Through boto3, if obstore refused the certificate.
        assert "TLS failed" in failure(lambda: read(distrustful, version), LakeMisconfigured)
    warned = any("obstore is not used" in record.message for record in caplog.records)
    assert warned == (self_signed.parent.name.startswith("CA-TRUE"))


def test_https_to_a_plain_server_is_said_so(s3_server: SeaweedServer) -> None:
    config = LakeConfig("s3://bucket", endpoint_url=s3_server.endpoint_url.replace("http:", "https:"))
    for use_obstore in (True, False):
        lake = S3Lake(config, use_obstore=use_obstore)
        assert "TLS failed" in failure(lake.check, LakeMisconfigured)
        get = functools.partial(read, lake, ObjectVersion("key", '"etag"', 1))
        assert "TLS failed" in failure(get, LakeMisconfigured)


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
@pytest.mark.parametrize("body", [b"<!doctype html><p>Hello", b"<html><body>Hello</body></html>"])
def test_a_server_that_is_no_s3_is_said_so(status: str, body: bytes) -> None:
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: text/html\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with _Canned(head.encode() + body) as server:
        lake = S3Lake(LakeConfig("s3://bucket", endpoint_url=server.endpoint_url))
        assert "does not answer as S3 does" in failure(lake.check, LakeMisconfigured)


def test_a_server_that_ignores_if_match_is_caught() -> None:
    raw = (
        b'HTTP/1.1 206 Partial Content\r\nConnection: close\r\nETag: "new"\r\nContent-Length: 4\r\n'
        b"Content-Range: bytes 0-3/4\r\nLast-Modified: Sun, 22 Nov 2026 10:00:00 GMT\r\n\r\nbyte"
    )
    for use_obstore in (True, False):
        with _Canned(raw) as server:
            lake = S3Lake(
                LakeConfig("s3://bucket", endpoint_url=server.endpoint_url), use_obstore=use_obstore
            )
            assert bytes(lake.get_range(ObjectVersion("key", '"new"', 4), 0, 4)) == b"byte"
            with pytest.raises(ObjectChanged):
                lake.get_range(ObjectVersion("key", '"old"', 4), 0, 4)
            with pytest.raises(ObjectChanged):
                lake.get_range(ObjectVersion("key", '"new"', 9), 0, 9)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "InvalidObjectState", AccessDenied),
        (403, "AccessDenied", AccessDenied),
        (403, "ExpiredToken", LakeMisconfigured),
        (403, "RequestTimeTooSkewed", LakeMisconfigured),
        (301, "PermanentRedirect", LakeMisconfigured),
        (400, "AuthorizationHeaderMalformed", LakeMisconfigured),
        (404, "NoSuchBucket", LakeMisconfigured),
        (404, "NoSuchKey", ObjectMissing),
        (412, "PreconditionFailed", ObjectChanged),
        (416, "InvalidRange", ObjectChanged),
        (409, "ConditionalRequestConflict", LakeUnavailable),
        (400, "RequestTimeout", LakeUnavailable),
        (429, "TooMany", SlowDown),
        (503, "SlowDown", SlowDown),
        (503, "ServiceUnavailable", LakeUnavailable),
        (500, "InternalError", LakeUnavailable),
        (400, "EntityTooSmall", LakeError),
    ],
)
def test_each_reply_has_its_class(status: int, code: str, expected: type[LakeError]) -> None:
    error = from_reply(status, code, "several\nlines", PLACE, "key\n")
    assert type(error) is expected
    assert str(error).isprintable()
    asked = Exception(f"Server returned non-2xx status code: {status} X: <Error><Code>{code}</Code></Error>")
    if status not in (301, 400):  # There boto3 is asked.
        assert type(from_obstore(asked, PLACE, "key")) is expected


@pytest.mark.parametrize(
    ("endpoint", "path_style", "bucket", "expected"),
    [
        ("https://s3.eu-west-1.amazonaws.com", None, "lake", "https://lake.s3.eu-west-1.amazonaws.com"),
        ("https://s3.eu-west-1.amazonaws.com", None, "my.lake", "https://s3.eu-west-1.amazonaws.com"),
        ("https://s3.eu-west-1.amazonaws.com", True, "lake", "https://s3.eu-west-1.amazonaws.com"),
        ("http://127.0.0.1:9000", None, "lake", "http://127.0.0.1:9000"),
        ("https://s3.example.com", False, "lake", "https://lake.s3.example.com"),
    ],
)
def test_obstore_gets_the_address_that_boto3_uses(
    endpoint: str, path_style: bool | None, bucket: str, expected: str
) -> None:
    client = SimpleNamespace(meta=SimpleNamespace(endpoint_url=endpoint, region_name="eu-west-1"))
    address = s3_client._obstore_address(client, LakeConfig(f"s3://{bucket}", path_style=path_style), bucket)
    assert address["endpoint"] == address["aws_endpoint_url_s3"] == expected
    assert address["virtual_hosted_style_request"] == (f"//{bucket}." in expected)
    assert address["region"] == "eu-west-1"


def test_on_aws_the_buckets_own_region_is_used() -> None:
    def head_bucket(Bucket: str) -> object:
        headers = {"x-amz-bucket-region": "ap-south-1"}
        reply: Any = {
            "Error": {"Code": "403"},
            "ResponseMetadata": {"HTTPStatusCode": 403, "HTTPHeaders": headers},
        }
        raise ClientError(reply, "HeadBucket")

    meta = SimpleNamespace(endpoint_url="https://s3.us-east-1.amazonaws.com", region_name="us-east-1")
    client = SimpleNamespace(meta=meta, head_bucket=head_bucket)
    config = LakeConfig("s3://lake", region="us-east-1")
    assert s3_client._settled(client, config, "lake") == replace(config, region="ap-south-1")


def test_a_ca_bundle_that_holds_no_certificate_is_said_so(
    s3_server: SeaweedServer, server_tls: ssl.SSLContext, tmp_path: Path
) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    with SlowProxy(s3_server.endpoint_url, tls=server_tls) as proxy:
        config = LakeConfig("s3://bucket", endpoint_url=proxy.endpoint_url, ca_bundle=tmp_path / "empty.pem")
        assert "--ca-bundle" in failure(S3Lake(config).check, LakeMisconfigured)


def test_what_obstore_leaves_unclear_is_asked_of_boto3() -> None:
    assert from_obstore(Exception("something new"), PLACE, "key") is None


@pytest.mark.parametrize("key", ["a//b", "/a", "a/", "./a", "a/..", "a\nb", "\x7f", "\udcff", ""])
def test_obstore_is_not_asked_for_keys_that_it_would_alter(key: str) -> None:
    assert not can_name(key)


@pytest.mark.parametrize("key", ["a", "a b/c+d", "100%", "..a/...", "über/日本語", "trailing."])
def test_obstore_is_asked_for_ordinary_keys(key: str) -> None:
    assert can_name(key)


def test_etags_have_one_form() -> None:
    assert quoted("abc") == quoted('"abc"') == '"abc"'
    assert quoted('W/"abc"') == 'W/"abc"'


def test_a_lake_works_in_a_forked_child(lake: S3Lake, version: ObjectVersion) -> None:
    assert read(lake, version) == CONTENT
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # Ends the child if it hangs.
        try:
            os.write(writer, b"same" if read(lake, version) == CONTENT else b"other")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"same"
    os.waitpid(pid, 0)


class _Canned:
    """A server that gives the same bytes to every connection. They are to say "Connection: close"."""

    def __init__(self, reply: bytes) -> None:
        self._reply = reply

    def __enter__(self) -> _Canned:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                asked = b""
                while b"\r\n\r\n" not in asked and (some := client.recv(1 << 16)):
                    asked += some
                client.sendall(self._reply)
                client.shutdown(socket.SHUT_WR)
