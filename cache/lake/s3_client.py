"""The clients of one bucket: boto3 for everything, obstore for the bytes where it can serve.

obstore's threads do not survive a fork, and a child that uses it then hangs. So its store is made
at the first GET, and a child of a process that made one goes on with boto3 alone.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.utils import parse_timestamp

from cache.config import LakeConfig
from cache.errors import LakeMisconfigured
from cache.lake.s3_errors import Place, from_exception

_log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
_REGION_FALLBACK = "us-east-1"
# Longer than the 5 minutes before expiry at which obstore asks again, shorter than the 15 at which
# botocore renews: obstore never signs with what botocore would already have renewed.
_CREDENTIALS_TTL = timedelta(minutes=10)
# obstore's `timeout` covers the whole body. Silence is bounded by read_timeout instead.
_WHOLE_REQUEST_TIMEOUT = timedelta(minutes=10)


# The process that started obstore's threads. Inherited over fork, as what it tells of is.
_obstore_pid: int | None = None


@dataclass(frozen=True, slots=True)
class ByteStore:
    """*get*, *put*: `obstore.get`, `obstore.put`. *store*: its S3Store for the bucket.

    *signs*: each body's SHA-256 goes with it, in the signature and, unless the server knows no such
    checksum, in a header of its own, which more servers compare than the signature's.
    """

    get: Any
    put: Any
    store: Any
    signs: bool


class Connection:
    """The clients of one process. *client* is boto3's; `byte_store()` carries the bytes of whole requests."""

    def __init__(self, config: LakeConfig, bucket: str, *, use_obstore: bool = True) -> None:
        """Make clients that agree on credentials, region, endpoint and style of address.

        On AWS this asks for the bucket's region (one HEAD), so that a wrong or missing region
        is no error. Raises LakeError.
        """
        self._bucket = bucket
        self._place = Place.of(config)
        self._owner_pid = os.getpid()
        self._making = threading.Lock()
        self._byte_store: ByteStore | None = None
        self._unsigned_client: Any = None
        # Whether obstore's checksums are welcome: once False, it sends none. None: nobody knows yet.
        self.checksums_fit: bool | None = None
        self._made = not use_obstore or _is_special_bucket(bucket)
        self._ca_certificates = _read_ca_bundle(config)
        with self._translated():
            self._session = _session(config)
            self.client = _client(self._session, config)
            self._config = _settled(self.client, config, bucket)
            if self._config != config:
                self.client = _client(self._session, self._config)

    @property
    def is_ours(self) -> bool:
        """Whether this process made it: after a fork, the child makes its own."""
        return self._owner_pid == os.getpid()

    def unsigned_client(self) -> Any:
        """Return the client for requests that bring a checksum: their bodies are no part of the signature.

        Made at the first call. One that is told in ~/.aws/config to sign bodies does so all the same.
        """
        if self._unsigned_client is None:
            with self._making, self._translated():
                if self._unsigned_client is None:
                    self._unsigned_client = _unsigned(self._session, self.client, self._config)
        return self._unsigned_client

    def byte_store(self) -> ByteStore | None:
        """Return obstore's store, made at the first call, or None where boto3 has to do."""
        if not self._made:
            with self._making, self._translated():
                if not self._made:
                    self._byte_store = self._make_byte_store()
                    self._made = True
        return self._byte_store

    def drop_byte_store(self, reason: str) -> None:
        """Go on with boto3 alone."""
        with self._making:
            dropped, self._byte_store = self._byte_store, None
        if dropped is not None:
            _log.warning("obstore is not used: %s; reading through boto3, slower", reason)

    def drop_checksums(self) -> None:
        """Have obstore send no checksum headers any more: the server knows none."""
        with self._making:
            if self.checksums_fit is None and self._byte_store is not None:
                self.checksums_fit, self._made = False, False
                _log.info("the lake knows no SHA-256 of objects in a header: it goes with the signature only")

    def close(self) -> None:
        self.client.close()
        if self._unsigned_client is not None:
            self._unsigned_client.close()

    def _make_byte_store(self) -> ByteStore | None:
        global _obstore_pid
        try:
            obstore: Any = importlib.import_module("obstore")
            stores: Any = importlib.import_module("obstore.store")
            auth: Any = importlib.import_module("obstore.auth.boto3")
        except ImportError:
            _log.info("obstore is not installed: objects are read through boto3, several times slower")
            return None
        if _obstore_pid not in (None, os.getpid()):
            _log.warning("obstore was in use before this process was forked: reading through boto3, slower")
            return None
        credentials = _obstore_credentials(self._session, self._config, auth)
        try:
            store = stores.S3Store(
                self._bucket,
                config=_obstore_address(self.client, self._config, self._bucket)
                | ({"checksum_algorithm": "sha256"} if self.checksums_fit is not False else {}),
                client_options=_obstore_options(self.client, self._config, self._ca_certificates),
                retry_config={"max_retries": 0, "retry_timeout": _WHOLE_REQUEST_TIMEOUT},
                **credentials,
            )
        except Exception as error:  # A certificate that it can't parse, an address that it refuses.
            _log.warning("obstore is not used: %s; reading through boto3, slower", error)
            return None
        _obstore_pid = os.getpid()
        return ByteStore(obstore.get, obstore.put, store, not self._config.anonymous)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, OSError, ValueError) as error:
            raise from_exception(error, self._place, None) from error


def _session(config: LakeConfig) -> Any:
    botocore_session: Any = importlib.import_module("botocore.session").get_session()
    # Of each page of a listing, botocore's parser takes 95 ms for 1000 dates, this one 0.4 (timed alone).
    factory = botocore_session.get_component("response_parser_factory")
    factory.set_parser_defaults(timestamp_parser=_parse_timestamp)
    return boto3.session.Session(botocore_session=botocore_session, profile_name=config.aws_profile)


def _parse_timestamp(value: Any) -> datetime:
    """Return an aware datetime for S3's dates in XML (ISO 8601), in headers, or in numbers."""
    if isinstance(value, str) and value.endswith("Z"):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            pass
    parsed: datetime = parse_timestamp(value)
    return parsed


def _unsigned(session: Any, client: Any, config: LakeConfig) -> Any:
    s3_options: Any = client.meta.config.s3 or {}
    if s3_options.get("payload_signing_enabled") is not None:
        return client
    return _client(session, config, Config(s3=s3_options | {"payload_signing_enabled": False}))


def _client(session: Any, config: LakeConfig, besides: Config | None = None) -> Any:
    options: dict[str, Any] = {
        "connect_timeout": config.connect_timeout_s,
        "read_timeout": config.read_timeout_s,
        "max_pool_connections": CONNECTIONS_MAX,
        "retries": {"mode": "standard", "total_max_attempts": 1},  # The caller decides retries.
        "request_checksum_calculation": "when_required",  # Bodies carry Content-MD5, see s3.py.
        "response_checksum_validation": "when_required",
    }
    if config.anonymous:
        options["signature_version"] = botocore.UNSIGNED
    path_style = config.path_style if config.path_style is not None else bool(config.endpoint_url) or None
    if path_style is not None:
        options["s3"] = {"addressing_style": "path" if path_style else "virtual"}
    return session.client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region or session.region_name or _REGION_FALLBACK,
        verify=str(config.ca_bundle) if config.ca_bundle else None,
        config=Config(**options).merge(besides) if besides is not None else Config(**options),
    )


def _settled(client: Any, config: LakeConfig, bucket: str) -> LakeConfig:
    """Return *config* with the region and the style of address that this bucket needs."""
    if not _is_aws(client):
        chosen = config.path_style is not None or config.endpoint_url is not None
        return config if chosen else replace(config, path_style=True)
    region = _bucket_region(client, bucket)
    return config if region in (None, client.meta.region_name) else replace(config, region=region)


def _is_aws(client: Any) -> bool:
    host = urlsplit(client.meta.endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _bucket_region(client: Any, bucket: str) -> str | None:
    """Return the bucket's region: AWS tells it even to those who may not see the bucket."""
    try:
        reply = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        reply = error.response
    headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region: str | None = headers.get("x-amz-bucket-region")
    return region


def _is_special_bucket(bucket: str) -> bool:
    """Access points and directory buckets have addresses and sessions that only boto3 knows."""
    return bucket.startswith("arn:") or bucket.endswith("--x-s3")


def _read_ca_bundle(config: LakeConfig) -> bytes | None:
    """Return the PEM text that boto3 will trust, if any is configured. Raises LakeMisconfigured."""
    if config.ca_bundle is not None:
        option, path = "--ca-bundle", config.ca_bundle
    elif named := os.environ.get("AWS_CA_BUNDLE"):
        option, path = "AWS_CA_BUNDLE", Path(named)
    else:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise LakeMisconfigured(
            f"{option} {path}: {error.strerror}; name a file of PEM certificates"
        ) from error


def _obstore_address(client: Any, config: LakeConfig, bucket: str) -> dict[str, Any]:
    """Return where and how obstore asks. Everything explicit, so that no environment overrules it."""
    endpoint = client.meta.endpoint_url
    virtual = _is_aws(client) if config.path_style is None else not config.path_style
    virtual = virtual and "." not in bucket  # The wildcard certificate has no dots.
    if virtual:
        scheme, _, host = endpoint.partition("://")
        endpoint = f"{scheme}://{bucket}.{host}"
    return {
        "endpoint": endpoint,
        "aws_endpoint_url_s3": endpoint,
        "region": client.meta.region_name,
        "virtual_hosted_style_request": virtual,
        "aws_conditional_put": "etag",
    }


def _obstore_options(client: Any, config: LakeConfig, ca_certificates: bytes | None) -> dict[str, Any]:
    options: dict[str, Any] = {
        "allow_http": client.meta.endpoint_url.startswith("http://"),
        "connect_timeout": timedelta(seconds=config.connect_timeout_s),
        "read_timeout": timedelta(seconds=config.read_timeout_s),
        "timeout": _WHOLE_REQUEST_TIMEOUT,
    }
    if ca_certificates is not None:
        options["root_certificate"] = ca_certificates
    return options


def _obstore_credentials(session: Any, config: LakeConfig, auth: Any) -> dict[str, Any]:
    if config.anonymous:
        return {"skip_signature": True}
    if session.get_credentials() is None:
        raise NoCredentialsError
    provider = auth.Boto3CredentialProvider(session, ttl=_CREDENTIALS_TTL)
    provider.config = {}  # Its idea of the region is the session's, ours the bucket's.
    return {"credential_provider": provider}
