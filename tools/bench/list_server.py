"""An S3 server that lists millions of keys which it makes up: SeaweedFS takes ten minutes to store them.

It answers ListObjectsV2 as Amazon's reference describes it (prefix, delimiter, start-after,
continuation-token, max-keys; keys in byte order), HEAD of bucket and objects, and GET of objects,
which are empty. Signatures are not looked at. It runs in a process of its own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import overload
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tools.bench.lakes import BUCKET, Endpoint

KEYS_A_PAGE_MAX = 1000
ETAG = "&quot;d41d8cd98f00b204e9800998ecf8427e&quot;"
DATE = "2026-01-01T00:00:00.000Z"
HTTP_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class GeneratedKeys(Sequence[str]):
    """*count* keys in byte order, *folder* of them under each prefix; held as two numbers."""

    def __init__(self, count: int, folder: int) -> None:
        self._count = count
        self._folder = folder

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return f"{index // self._folder:06d}/{index % self._folder:08d}.jpg"

    def has(self, key: str) -> bool:
        index = bisect_left(self, key)
        return index < self._count and self[index] == key


@dataclass(frozen=True, slots=True)
class Page:
    """One answer to ListObjectsV2. *next_after*: where the next page begins, None at the end."""

    keys: Sequence[str]
    prefixes: Sequence[str]
    next_after: str | None


def list_page(keys: Sequence[str], prefix: str, delimiter: str, after: str, count_max: int) -> Page:
    """Return the first *count_max* keys and common prefixes after *after*."""
    found: list[str] = []
    prefixes: list[str] = []
    last = after
    index = max(bisect_right(keys, after), bisect_left(keys, prefix)) if after else bisect_left(keys, prefix)
    while index < len(keys) and (key := keys[index]).startswith(prefix):
        if len(found) + len(prefixes) == count_max:
            return Page(found, prefixes, last)
        rest, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
        if cut:
            common = prefix + rest + cut
            if common != after:
                prefixes.append(common)
            last = common
            index = bisect_left(keys, common + "\U0010ffff")
        else:
            found.append(key)
            last = key
            index += 1
    return Page(found, prefixes, None)


def to_xml(page: Page, query: dict[str, str]) -> bytes:
    """Return the XML of API reference "ListObjectsV2"."""
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>{DATE}</LastModified><ETag>{ETAG}</ETag>"
        f"<Size>0</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key in page.keys
    )
    common = "".join(
        f"<CommonPrefixes><Prefix>{escape(prefix)}</Prefix></CommonPrefixes>" for prefix in page.prefixes
    )
    token = page.next_after
    more = "" if token is None else f"<NextContinuationToken>{escape(token)}</NextContinuationToken>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{escape(query.get('prefix', ''))}</Prefix>"
        f"<Delimiter>{escape(query.get('delimiter', ''))}</Delimiter><MaxKeys>{KEYS_A_PAGE_MAX}</MaxKeys>"
        f"<KeyCount>{len(page.keys) + len(page.prefixes)}</KeyCount>"
        f"<IsTruncated>{str(token is not None).lower()}</IsTruncated>{contents}{common}{more}"
        "</ListBucketResult>"
    ).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # Head and body in one packet.
    keys: GeneratedKeys

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        if bucket != BUCKET:
            self._error(HTTPStatus.NOT_FOUND, "NoSuchBucket")
        elif key:
            self._object(key)
        elif "location" in query:
            self._reply(b'<LocationConstraint xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>')
        elif query.get("list-type") != "2":
            self._error(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented")
        else:
            self._list(query)

    do_HEAD = do_GET

    def _list(self, query: dict[str, str]) -> None:
        after = query.get("continuation-token") or query.get("start-after", "")
        count_max = min(KEYS_A_PAGE_MAX, int(query.get("max-keys", KEYS_A_PAGE_MAX)))
        page = list_page(self.keys, query.get("prefix", ""), query.get("delimiter", ""), after, count_max)
        self._reply(to_xml(page, query))

    def _object(self, key: str) -> None:
        if self.keys.has(key):
            self._reply(b"", ETag=ETAG.replace("&quot;", '"'), Last_Modified=HTTP_DATE)
        else:
            self._error(HTTPStatus.NOT_FOUND, "NoSuchKey")

    def _error(self, status: HTTPStatus, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>{status.phrase}</Message></Error>"
        self._reply(body.encode(), status)

    def _reply(self, body: bytes, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/xml")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _serve(connection: Connection, count: int, folder: int) -> None:
    _Handler.keys = GeneratedKeys(count, folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    connection.send(server.server_port)
    server.serve_forever()


@contextmanager
def list_server(count: int, folder: int) -> Iterator[Endpoint]:
    """Run a server whose bucket BUCKET has *count* keys, *folder* of them under each prefix."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=_serve, args=(theirs, count, folder), daemon=True)
    child.start()
    try:
        theirs.close()
        yield Endpoint(f"http://127.0.0.1:{ours.recv()}", "nobody", "nothing", "us-east-1")
    finally:
        child.terminate()
        child.join()
