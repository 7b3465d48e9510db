"""A bucket, or a prefix of one, as a lake.

boto3 does everything; obstore, where it is installed, carries the bytes of GETs and of whole PUTs, at a
fifth of the processor time.
"""

from __future__ import annotations

import calendar
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any
from urllib.parse import unquote_plus

import urllib3
from botocore.exceptions import BotoCoreError, ClientError

from cache.config import LakeConfig
from cache.errors import (
    LakeError,
    LakeMisconfigured,
    LakeUnavailable,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
)
from cache.lake.base import Body, ListPage, Part
from cache.lake.s3_client import Connection
from cache.lake.s3_errors import (
    Place,
    answers_html,
    from_exception,
    from_obstore,
    from_reply,
    no_s3,
    obstore_refused_header,
)
from cache.lake.s3_parts import PartUploads, content_md5
from cache.lake.s3_ranges import RangeReader, can_name, quoted, verify
from cache.model import GIB, MIB, ObjectInfo, ObjectVersion

DELETE_KEYS_MAX = 1000  # S3 API, DeleteObjects.
_FAILURES = (BotoCoreError, ClientError, urllib3.exceptions.HTTPError, OSError, ValueError)
_HEADERS_KEPT = (  # Of an object whose metadata is replaced.
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
    "ContentType",
    "StorageClass",
)
_NO_DELETE_MANY = {
    "MissingContentMD5",
    "NotImplemented",
    "MethodNotAllowed",
    "InvalidRequest",
    "MalformedXML",
}


class _Quick(Enum):
    """What came of a PUT through obstore that boto3 is to do."""

    UNABLE = 1
    REFUSED = 2  # Perhaps for its checksum.


class S3Lake:
    """Implements `cache.lake.base.Lake`. Makes its clients at the first verb, and after a fork anew.

    Metadata names are lower case and values ASCII: they travel as headers. The times that `put`,
    `copy` and `complete_multipart` return are those of the reply, exact to a second or so.
    """

    part_bytes_min = 5 * MIB
    has_directories = False
    copy_bytes_max = 5 * GIB  # S3 API, CopyObject. Beyond it, UploadPartCopy.
    copy_part_bytes = 512 * MIB

    def __init__(self, config: LakeConfig, *, use_obstore: bool = True) -> None:
        bucket, _, prefix = config.url.removeprefix("s3://").partition("/")
        if not config.is_s3 or not bucket:
            raise LakeMisconfigured(f"{config.url}: no bucket named; write the lake as s3://BUCKET[/PREFIX]")
        prefix = prefix.rstrip("/")
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._bucket = bucket
        self._config = config
        self._use_obstore = use_obstore
        self._place = Place(self.url, config.endpoint_url, config.aws_profile)
        self._uploads = PartUploads(bucket, self._prefix)
        self._ranges = RangeReader(bucket, self._prefix, self._place, self._translated)
        self._opening = threading.Lock()
        self._connection: Connection | None = None

    def check(self) -> None:
        """Ask for the bucket (HEAD); when that fails, for one key, whose reply says why."""
        with suppress(LakeError), self._translated(None):
            reply = self._connected().client.head_bucket(Bucket=self._bucket)
            if "x-amz-request-id" in reply["ResponseMetadata"]["HTTPHeaders"]:
                return  # A web server answers 200 to anything, but not with this header.
        try:
            reply = self._list(Prefix=self._prefix, MaxKeys=1)
        except LakeUnavailable as error:
            if answers_html(error.__cause__):
                raise no_s3(self._place, "it sends a web page") from error
            raise
        if "Name" not in reply and "KeyCount" not in reply:
            raise no_s3(self._place, "its listing names no bucket")

    def list_page(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        keys_max: int = 1000,
    ) -> ListPage:
        request: dict[str, Any] = {"Prefix": self._prefix + prefix, "MaxKeys": keys_max}
        if delimiter:
            request["Delimiter"] = "/"
        if token is not None:
            request["ContinuationToken"] = token
        elif start_after:
            request["StartAfter"] = self._prefix + start_after
        reply = self._list(**request)
        encoded = reply.get("EncodingType") == "url"
        prefixes = [self._relative(row["Prefix"], encoded) for row in reply.get("CommonPrefixes", ())]
        return ListPage(
            [info for row in reply.get("Contents", ()) if (info := self._listed(row, encoded)).version.key],
            [prefix for prefix in prefixes if prefix],
            reply.get("NextContinuationToken") if reply.get("IsTruncated") else None,
        )

    def head(self, key: str) -> ObjectInfo:
        with self._translated(key):
            reply = self._connected().client.head_object(Bucket=self._bucket, Key=self._prefix + key)
            version = ObjectVersion(key, quoted(reply["ETag"]), reply["ContentLength"])
            return ObjectInfo(version, _nanoseconds(reply["LastModified"]), reply.get("Metadata", {}))

    def get_range(self, version: ObjectVersion, offset: int, length: int) -> Body:
        assert length > 0 and 0 <= offset <= version.size_bytes - length, (version, offset, length)
        return self._ranges.get(self._connected(), version, offset, length)

    def get_pieces(self, version: ObjectVersion, offset: int, length: int) -> Iterator[Body]:
        assert length > 0 and 0 <= offset <= version.size_bytes - length, (version, offset, length)
        return self._ranges.pieces(self._connected(), version, offset, length)

    def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str] | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        content = bytes(body)  # boto3 takes no memoryview.
        stored = self._put_quickly(key, content, metadata or {}, if_match, if_none_match)
        if isinstance(stored, ObjectInfo):
            return stored
        with self._translated(key, if_match=if_match, if_none_match=if_none_match):
            reply = self._connected().client.put_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Body=content,
                ContentMD5=content_md5(content),
                Metadata=dict(metadata or {}),
                **_conditions(if_match, if_none_match),
            )
            if stored is _Quick.REFUSED:  # The same without obstore's checksum was welcome.
                self._connected().drop_checksums()
            version = ObjectVersion(key, quoted(reply["ETag"]), len(content))
            return ObjectInfo(version, _reply_time_ns(reply), dict(metadata or {}))

    def _put_quickly(
        self, key: str, content: bytes, metadata: Mapping[str, str], if_match: str | None, if_none_match: bool
    ) -> ObjectInfo | _Quick:
        """Store through obstore, at a fifth of boto3's processor time.

        Raises what is certain. Of all else boto3 tells more, and storing the same twice does no harm:
        a condition that the first request has made false is for the caller to see through, as after
        any lost answer.
        """
        connection = self._connected()
        byte_store = connection.byte_store() if can_name(self._prefix + key) else None
        if byte_store is None or not byte_store.signs:
            return _Quick.UNABLE
        mode: Any = "create" if if_none_match else "overwrite" if if_match is None else {"e_tag": if_match}
        try:
            reply = byte_store.put(
                byte_store.store,
                self._prefix + key,
                content,
                attributes=dict(metadata),
                mode=mode,
                use_multipart=False,
            )
        except Exception as error:  # Its classes are few and change between releases.
            if connection.checksums_fit is None and obstore_refused_header(error):
                return _Quick.REFUSED
            known = self._refused_put(error, key, if_match, if_none_match)
            if known is not None:
                raise known from error
            return _Quick.UNABLE
        if not reply.get("e_tag"):
            return _Quick.UNABLE
        if connection.checksums_fit is None:
            connection.checksums_fit = True
        version = ObjectVersion(key, quoted(reply["e_tag"]), len(content))
        return ObjectInfo(version, time.time_ns() // 10**9 * 10**9, dict(metadata))

    def _refused_put(
        self, error: Exception, key: str, if_match: str | None, if_none_match: bool
    ) -> LakeError | None:
        """Return the error for what obstore raised, None where boto3 is to be asked."""
        if type(error).__name__ == "AlreadyExistsError" and if_none_match:
            return ObjectExists(f"{self._place.object(key)}: exists already")
        known = from_obstore(error, self._place, key)
        if isinstance(known, ObjectChanged) and if_none_match:
            return ObjectExists(f"{self._place.object(key)}: exists already")
        if isinstance(known, ObjectMissing):
            gone = f"{self._place.object(key)}: was deleted from the lake"
            return ObjectChanged(gone) if if_match is not None else None
        return known

    def start_multipart(self, key: str, *, metadata: Mapping[str, str] | None = None) -> str:
        with self._translated(key):
            return self._uploads.start(self._connected(), key, metadata or {})

    def put_part(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        with self._translated(key):
            return self._uploads.put(self._connected(), key, upload_id, number, body)

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        with self._translated(key):
            return self._uploads.stored(self._connected(), key, upload_id)

    def complete_multipart(
        self,
        key: str,
        upload_id: str,
        parts: Iterable[Part],
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        parts = sorted(parts, key=lambda part: part.number)
        conditions = _conditions(if_match, if_none_match)
        with self._translated(key, if_match=if_match, if_none_match=if_none_match):
            reply = self._uploads.complete(self._connected(), key, upload_id, parts, **conditions)
            size_bytes = sum(part.size_bytes for part in parts)
            return ObjectInfo(ObjectVersion(key, quoted(reply["ETag"]), size_bytes), _reply_time_ns(reply))

    def abort_multipart(self, key: str, upload_id: str) -> None:
        try:
            with self._translated(key):
                self._uploads.abort(self._connected(), key, upload_id)
        except ObjectMissing:
            pass  # Unknown, or completed: there is nothing left to forget.

    def copy(
        self, source: ObjectVersion, key: str, *, metadata: Mapping[str, str] | None = None
    ) -> ObjectInfo:
        if source.size_bytes > self.copy_bytes_max:
            return self._copy_in_parts(source, key, metadata)
        described = {"MetadataDirective": "COPY"} if metadata is None else self._described(source, metadata)
        with self._translated(source.key):
            reply = self._connected().client.copy_object(
                Bucket=self._bucket, Key=self._prefix + key, **self._source(source), **described
            )
            result = reply["CopyObjectResult"]
            version = ObjectVersion(key, quoted(result["ETag"]), source.size_bytes)
            return ObjectInfo(version, _nanoseconds(result["LastModified"]), dict(metadata or {}))

    def delete_many(self, keys: Iterable[str]) -> dict[str, LakeError]:
        failed: dict[str, LakeError] = {}
        remaining = iter(keys)
        while batch := list(itertools.islice(remaining, DELETE_KEYS_MAX)):
            in_xml = [key for key in batch if _fits_in_xml(key)]
            failed |= self._delete_together(in_xml) if in_xml else {}
            failed |= self._delete_singly(key for key in batch if not _fits_in_xml(key))
        return failed

    def close(self) -> None:
        with self._opening:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connected(self) -> Connection:
        """Return this process's clients. Raises LakeError when they can't be made (yet)."""
        connection = self._connection
        if connection is not None and connection.is_ours:
            return connection
        with self._opening:
            if self._connection is None or not self._connection.is_ours:
                self._connection = Connection(self._config, self._bucket, use_obstore=self._use_obstore)
            return self._connection

    def _list(self, **request: Any) -> Any:
        with self._translated(None):
            return self._connected().client.list_objects_v2(
                Bucket=self._bucket, EncodingType="url", **request
            )

    def _relative(self, name: str, encoded: bool) -> str:
        if encoded:
            name = unquote_plus(name, errors="surrogateescape")
        return name.removeprefix(self._prefix)

    def _listed(self, row: Any, encoded: bool) -> ObjectInfo:
        version = ObjectVersion(self._relative(row["Key"], encoded), quoted(row["ETag"]), row["Size"])
        return ObjectInfo(version, _nanoseconds(row["LastModified"]))

    def _source(self, source: ObjectVersion) -> dict[str, Any]:
        return {
            "CopySource": {"Bucket": self._bucket, "Key": self._prefix + source.key},
            "CopySourceIfMatch": source.etag,
        }

    def _described(self, source: ObjectVersion, metadata: Mapping[str, str]) -> dict[str, Any]:
        """Return what makes a copy have *metadata*, and the source's other headers: REPLACE drops them."""
        with self._translated(source.key):
            reply = self._connected().client.head_object(Bucket=self._bucket, Key=self._prefix + source.key)
        verify(self._place, source, reply["ETag"], reply["ContentLength"])
        kept = {name: reply[name] for name in _HEADERS_KEPT if reply.get(name)}
        return {"MetadataDirective": "REPLACE", "Metadata": dict(metadata), **kept}

    def _copy_in_parts(
        self, source: ObjectVersion, key: str, metadata: Mapping[str, str] | None
    ) -> ObjectInfo:
        info = self.head(source.key)
        if info.version != source:
            raise ObjectChanged(f"{self._place.object(source.key)}: has changed in the lake")
        described = info.metadata if metadata is None else metadata
        with self._translated(key):
            upload_id = self._uploads.start_plain(self._connected(), key, described)
        try:
            parts = [
                self._copy_part(source, key, upload_id, number, offset)
                for number, offset in enumerate(range(0, source.size_bytes, self.copy_part_bytes), 1)
            ]
            return self.complete_multipart(key, upload_id, parts)
        except BaseException:
            self.abort_multipart(key, upload_id)
            raise

    def _copy_part(self, source: ObjectVersion, key: str, upload_id: str, number: int, offset: int) -> Part:
        length = min(self.copy_part_bytes, source.size_bytes - offset)
        with self._translated(source.key):
            reply = self._connected().client.upload_part_copy(
                **self._uploads.named(key, upload_id),
                **self._source(source),
                PartNumber=number,
                CopySourceRange=f"bytes={offset}-{offset + length - 1}",
            )
            return Part(number, quoted(reply["CopyPartResult"]["ETag"]), length)

    def _delete_together(self, keys: list[str]) -> dict[str, LakeError]:
        """Delete at most 1000 keys in one request, or singly where the server knows no DeleteObjects."""
        rows = [{"Key": self._prefix + key} for key in keys]
        try:
            with self._translated(None):
                client = self._connected().client
                reply = client.delete_objects(Bucket=self._bucket, Delete={"Objects": rows, "Quiet": True})
        except LakeError as refused:
            if _code(refused.__cause__) in _NO_DELETE_MANY:
                return self._delete_singly(keys)
            return dict.fromkeys(keys, refused)
        failed: dict[str, LakeError] = {}
        for row in reply.get("Errors", ()):
            key = row["Key"].removeprefix(self._prefix)
            code = row.get("Code", "")
            error = from_reply(_delete_status(code), code, row.get("Message", ""), self._place, key)
            if not isinstance(error, ObjectMissing):
                failed[key] = error
        return failed

    def _delete_singly(self, keys: Iterable[str]) -> dict[str, LakeError]:
        failed: dict[str, LakeError] = {}
        for key in keys:
            try:
                with self._translated(key):
                    self._connected().client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
            except ObjectMissing:
                pass
            except LakeError as error:
                failed[key] = error
        return failed

    @contextmanager
    def _translated(
        self, key: str | None, *, if_match: str | None = None, if_none_match: bool = False
    ) -> Iterator[None]:
        """Turn whatever boto3 raises into a LakeError about *key*. None: about the bucket."""
        try:
            yield
        except _FAILURES as error:
            known = from_exception(error, self._place, key)
            if if_none_match and isinstance(known, ObjectChanged):
                known = ObjectExists(f"{self._place.object(key)}: exists already")
            elif if_match is not None and _code(error) == "NoSuchKey":
                known = ObjectChanged(f"{self._place.object(key)}: was deleted from the lake")
            raise known from error


def _conditions(if_match: str | None, if_none_match: bool) -> dict[str, str]:
    assert not (if_match and if_none_match)
    if if_none_match:
        return {"IfNoneMatch": "*"}
    return {} if if_match is None else {"IfMatch": if_match}


def _nanoseconds(time: datetime) -> int:
    """Return whole seconds only: a HEAD's header tells no more, and must agree with a listing."""
    return calendar.timegm(time.utctimetuple()) * 1_000_000_000


def _reply_time_ns(reply: Any) -> int:
    """Return the server's time at its reply; S3 tells no modification time to writers."""
    header = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
    return _nanoseconds(parsedate_to_datetime(header)) if header else 0


def _code(error: BaseException | None) -> str:
    if not isinstance(error, ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))


def _delete_status(code: str) -> int:
    """Return the status that belongs to a code in DeleteObjects' reply, which gives none."""
    return {"AccessDenied": 403, "InternalError": 500, "ServiceUnavailable": 503}.get(code, 400)


def _fits_in_xml(key: str) -> bool:
    return all(character >= " " and not "\ud800" <= character <= "\udfff" for character in key)
