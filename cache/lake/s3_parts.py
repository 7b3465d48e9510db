"""Multipart uploads: each part goes with a checksum that the server is known to look at.

That is CRC32 where the server says, at the upload's start, that it will use it, and Content-MD5, which all
know, where it does not. MD5 takes five times the processor time of CRC32. The SHA-256 of SigV4 would take
as much again, and not every server compares it (SeaweedFS 4.48 does not), so parts are sent without it.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from botocore.exceptions import ClientError

from cache.lake.base import Body, Part, crc32_text
from cache.lake.s3_client import Connection
from cache.lake.s3_errors import refused_header
from cache.lake.s3_ranges import quoted

_log = logging.getLogger(__name__)

# An upload whose parts have CRC32 says so in its id, so that who goes on with it after a restart knows.
_CRC32_MARK = "crc32:"


class PartUploads:
    """Raises what boto3 raises."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._knows_crc32: bool | None = None  # The lake; None: it was not asked yet.

    def start(self, connection: Connection, key: str, metadata: Mapping[str, str]) -> str:
        """Return the id of an upload whose parts `put` sends."""
        if self._knows_crc32 is False:
            return self.start_plain(connection, key, metadata)
        try:
            reply = self._create(connection, key, metadata, ChecksumAlgorithm="CRC32")
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if self._knows_crc32 or not refused_header(
                status, error.response.get("Error", {}).get("Code", "")
            ):
                raise
            upload_id = self.start_plain(connection, key, metadata)
            self._note_unknown()  # It was that.
            return upload_id
        if reply.get("ChecksumAlgorithm", "").upper() == "CRC32":
            self._knows_crc32 = True
            return _CRC32_MARK + str(reply["UploadId"])
        self.abort(connection, key, reply["UploadId"])  # It may ask for checksums all the same.
        self._note_unknown()
        return self.start_plain(connection, key, metadata)

    def _note_unknown(self) -> None:
        self._knows_crc32 = False
        _log.info("the lake knows no CRC32 of parts: they go with MD5")

    def start_plain(self, connection: Connection, key: str, metadata: Mapping[str, str]) -> str:
        """Return the id of an upload without checksums: of parts that the lake copies."""
        return str(self._create(connection, key, metadata)["UploadId"])

    def _create(
        self, connection: Connection, key: str, metadata: Mapping[str, str], **options: str
    ) -> dict[str, Any]:
        reply: dict[str, Any] = connection.client.create_multipart_upload(
            Bucket=self._bucket, Key=self._prefix + key, Metadata=dict(metadata), **options
        )
        return reply

    def put(self, connection: Connection, key: str, upload_id: str, number: int, body: Body) -> Part:
        # boto3 makes a file of bytes, asks the server whether it may send it, and then does in pieces of
        # 16 KiB. A bytearray it sends as it is.
        content = body if isinstance(body, bytearray) else bytearray(body)
        crc32 = crc32_text(content) if upload_id.startswith(_CRC32_MARK) else ""
        checksum = {"ChecksumCRC32": crc32} if crc32 else {"ContentMD5": content_md5(content)}
        reply = connection.unsigned_client().upload_part(
            **self.named(key, upload_id), PartNumber=number, Body=content, **checksum
        )
        return Part(number, quoted(reply["ETag"]), len(content), crc32)

    def stored(self, connection: Connection, key: str, upload_id: str) -> list[Part]:
        pages = connection.client.get_paginator("list_parts").paginate(**self.named(key, upload_id))
        parts = [
            Part(row["PartNumber"], quoted(row["ETag"]), row["Size"], row.get("ChecksumCRC32", ""))
            for page in pages
            for row in page.get("Parts", ())
        ]
        return sorted(parts, key=lambda part: part.number)

    def complete(
        self, connection: Connection, key: str, upload_id: str, parts: list[Part], **conditions: str
    ) -> dict[str, Any]:
        rows: list[dict[str, Any]] = [{"PartNumber": part.number, "ETag": part.etag} for part in parts]
        if upload_id.startswith(_CRC32_MARK):
            rows = [row | {"ChecksumCRC32": part.crc32} for row, part in zip(rows, parts, strict=True)]
        reply: dict[str, Any] = connection.client.complete_multipart_upload(
            **self.named(key, upload_id), MultipartUpload={"Parts": rows}, **conditions
        )
        return reply

    def abort(self, connection: Connection, key: str, upload_id: str) -> None:
        connection.client.abort_multipart_upload(**self.named(key, upload_id))

    def named(self, key: str, upload_id: str) -> dict[str, str]:
        """Return the arguments that name the upload in a request."""
        return {
            "Bucket": self._bucket,
            "Key": self._prefix + key,
            "UploadId": upload_id.removeprefix(_CRC32_MARK),
        }


def content_md5(content: Body) -> str:
    """Return the checksum header that every S3 server checks, old or new."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
