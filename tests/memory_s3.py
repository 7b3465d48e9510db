"""An S3 server in this process whose objects are a dict: for what SeaweedFS can't hold or refuse.

It keeps every key as it is written ("a//b", "../x", a key that is another's directory), counts
requests by kind, and can be told to be slow, to deny or to fail. It answers ListObjectsV2, HEAD
and GET with Range and If-Match as Amazon's reference describes them; signatures are not looked at.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from tools.bench.list_server import Page, list_page

BUCKET = "memory"
KEYS_A_PAGE_MAX = 1000
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True, slots=True)
class Stored:
    body: bytes
    etag: str
    written_s: float


class MemoryS3:
    """*latency_s* is slept before each answer. *denied*: kinds of requests answered with 403."""

    def __init__(self, objects: Mapping[str, bytes] | None = None) -> None:
        self.latency_s = 0.0
        self.denied: frozenset[str] = frozenset()
        self._mutex = threading.Lock()
        self._objects: dict[str, Stored] = {}
        self._keys: list[str] = []  # Sorted.
        self._requests: Counter[str] = Counter()
        self._gets: Counter[str] = Counter()
        self._server: ThreadingHTTPServer | None = None
        self.put_many(objects or {})

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def endpoint_url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def options(self) -> tuple[str, ...]:
        return (f"--endpoint-url={self.endpoint_url}",)

    def put_many(self, objects: Mapping[str, bytes]) -> None:
        with self._mutex:
            for key, body in objects.items():
                etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
                self._objects[key] = Stored(body, etag, time.time())
            self._sort()

    def put(self, key: str, body: bytes) -> None:
        self.put_many({key: body})

    def delete(self, *keys: str) -> None:
        with self._mutex:
            for key in keys:
                self._objects.pop(key, None)
            self._sort()

    def _sort(self) -> None:
        self._keys = sorted(self._objects, key=lambda key: key.encode("utf-8", "surrogateescape"))

    @property
    def requests(self) -> Counter[str]:
        """Return how many LIST, HEAD and GET requests there were ("list", "head", "get")."""
        with self._mutex:
            return self._requests.copy()

    @property
    def gets(self) -> Counter[str]:
        """Return how many GETs each key had."""
        with self._mutex:
            return self._gets.copy()

    def reset_counts(self) -> None:
        with self._mutex:
            self._requests.clear()
            self._gets.clear()

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"lake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    # For the handler

    def note(self, kind: str, key: str) -> bool:
        """Count a request; return whether it is allowed."""
        with self._mutex:
            self._requests[kind] += 1
            self._gets[key] += kind == "get"
        time.sleep(self.latency_s)
        return kind not in self.denied

    def stored(self, key: str) -> Stored | None:
        with self._mutex:
            return self._objects.get(key)

    def page(self, query: dict[str, str]) -> tuple[Page, dict[str, Stored]]:
        after = query.get("continuation-token") or query.get("start-after", "")
        count_max = min(KEYS_A_PAGE_MAX, int(query.get("max-keys", KEYS_A_PAGE_MAX)))
        with self._mutex:
            found = list_page(
                self._keys, query.get("prefix", ""), query.get("delimiter", ""), after, count_max
            )
            return found, {key: self._objects[key] for key in found.keys}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # Head and body in one packet.
    lake: MemoryS3

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path, errors="surrogateescape")[1:].partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        kind = "list" if not key else "head" if self.command == "HEAD" else "get"
        if not self.lake.note(kind, key):
            self._error(403, "AccessDenied")
        elif bucket != BUCKET:
            self._error(404, "NoSuchBucket")
        elif key:
            self._object(key)
        else:
            self._reply(200, _xml(*self.lake.page(query), query), [("Content-Type", "application/xml")])

    do_HEAD = do_GET

    def _object(self, key: str) -> None:
        stored = self.lake.stored(key)
        if stored is None:
            return self._error(404, "NoSuchKey")
        if self.headers.get("If-Match", stored.etag) != stored.etag:
            return self._error(412, "PreconditionFailed")
        total = len(stored.body)
        headers = [
            ("ETag", stored.etag),
            ("Last-Modified", formatdate(stored.written_s, usegmt=True)),
            ("Accept-Ranges", "bytes"),
        ]
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranged is None:
            return self._reply(200, stored.body, headers)
        first, last = int(ranged[1]), min(total - 1, int(ranged[2] or total - 1))
        headers.append(("Content-Range", f"bytes {first}-{last}/{total}"))
        return self._reply(206, stored.body[first : last + 1], headers)

    def _error(self, status: int, code: str) -> None:
        self._reply(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _reply(self, status: int, body: bytes, headers: Iterable[tuple[str, str]] = ()) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _xml(page: Page, stored: dict[str, Stored], query: dict[str, str]) -> bytes:
    encode = _url_encoded if query.get("encoding-type") == "url" else escape
    contents = "".join(
        f"<Contents><Key>{encode(key)}</Key><LastModified>{_iso(stored[key].written_s)}</LastModified>"
        f"<ETag>{escape(stored[key].etag)}</ETag><Size>{len(stored[key].body)}</Size></Contents>"
        for key in page.keys
    )
    common = "".join(
        f"<CommonPrefixes><Prefix>{encode(prefix)}</Prefix></CommonPrefixes>" for prefix in page.prefixes
    )
    token = page.next_after
    more = "" if token is None else f"<NextContinuationToken>{escape(token)}</NextContinuationToken>"
    encoding = "<EncodingType>url</EncodingType>" if encode is _url_encoded else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
        f"<Name>{BUCKET}</Name><Prefix>{encode(query.get('prefix', ''))}</Prefix>{encoding}"
        f"<Delimiter>{escape(query.get('delimiter', ''))}</Delimiter><MaxKeys>{KEYS_A_PAGE_MAX}</MaxKeys>"
        f"<IsTruncated>{str(token is not None).lower()}</IsTruncated>{contents}{common}{more}"
        "</ListBucketResult>"
    ).encode()


def _url_encoded(key: str) -> str:
    return quote(key, errors="surrogateescape")


def _iso(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time_s))
