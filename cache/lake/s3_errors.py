"""From the failures of boto3, urllib3 and obstore to `cache.errors`, in one line of text each.

Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from cache.config import LakeConfig
from cache.errors import (
    AccessDenied,
    BodyBroken,
    LakeError,
    LakeMisconfigured,
    LakeUnavailable,
    ObjectChanged,
    ObjectMissing,
    SlowDown,
    TruncatedBody,
)

_MISSING = {"NoSuchKey", "NoSuchUpload", "NoSuchVersion", "NotFound", "404"}
_SLOW_DOWN = {
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "429",
    "503",  # All that a HEAD tells; AWS answers it for nothing else that is common.
}
# 409 ConditionalRequestConflict: a conditional write met another under way; asked again, it is 412 or done.
_RETRYABLE = {
    "RequestTimeout",
    "ConditionalRequestConflict",
    "OperationAborted",
    "XMinioServerNotInitialized",
}
_BROKEN = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_CREDENTIALS_MEND = "check the key, secret and --aws-profile that are in use"
_REGION_MEND = "give the bucket's own region with --region"
_MISCONFIGURED = {
    "NoSuchBucket": "no such bucket; check the name, --endpoint-url and --region",
    "InvalidBucketName": "this is no valid bucket name",
    "InvalidAccessKeyId": f"the lake does not know this access key; {_CREDENTIALS_MEND}",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key; {_CREDENTIALS_MEND}",
    "AuthorizationHeaderMalformed": f"signed for the wrong region; {_REGION_MEND}",
    "IllegalLocationConstraintException": f"wrong region; {_REGION_MEND}",
    "PermanentRedirect": f"the bucket is in another region; {_REGION_MEND}",
    "301": f"the bucket is in another region; {_REGION_MEND}",
    "ExpiredToken": "the session token has expired; sign in again",
    "ExpiredTokenException": "the session token has expired; sign in again",
    "InvalidToken": f"the session token is not valid; {_CREDENTIALS_MEND}",
    "RequestTimeTooSkewed": "this machine's clock differs from the lake's; set the clock",
}
_TLS_MISCONFIGURED = re.compile(
    "certificate|wrong.version|hostname|unknownissuer|unknown ca|invalidcontenttype|plain ?http",
    re.IGNORECASE,
)
_OBSTORE_STATUS = re.compile(r"Server returned \S+ status code: (\d{3})")
_OBSTORE_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_CODE = re.compile(r"<Code>\s*(\w+)\s*</Code>")
_REASONS = (  # Of urllib3's texts, Python's ssl and obstore's dump: the part that a person wants.
    re.compile(r"\[Errno -?\d+\] ([^'\")]+)"),
    re.compile(r"Error\(\d+, '([^']+)'"),
    re.compile(r"\[SSL: \w+\] ([^('\"]+)"),
    re.compile(r'message: "([^"]+)"'),
)


@dataclass(frozen=True, slots=True)
class Place:
    """What the texts say about where it happened. *endpoint_url* is None for AWS itself."""

    url: str
    endpoint_url: str | None
    profile: str | None

    @staticmethod
    def of(config: LakeConfig) -> Place:
        return Place(config.url, config.endpoint_url, config.aws_profile)

    @property
    def server(self) -> str:
        return f"--endpoint-url {self.endpoint_url}" if self.endpoint_url else self.url

    def object(self, key: str | None) -> str:
        return self.url if not key else f"{self.url.rstrip('/')}/{printable(key)}"


def printable(text: str) -> str:
    """Return *text* on one line, with what can't be encoded or shown escaped."""
    escaped = text.encode("utf-8", "backslashreplace").decode()
    return escaped if escaped.isprintable() else escaped.encode("unicode_escape").decode()


def refused_header(status: int, code: str) -> bool:
    """Return whether this may be a server's answer to a header that it does not know.

    Among other things: some servers take it for a wrong signature.
    """
    return status in (400, 403, 501) and code not in _BROKEN


def from_reply(status: int, code: str, message: str, place: Place, key: str | None) -> LakeError:
    """Return the error for an S3 error reply. 404 without a key is a wrong bucket or server."""
    where = place.object(key)
    reason = f"{code}: {_one_line(message)}" if message else code
    detail = f"{where}: {reason}"
    if code in _MISCONFIGURED:
        return LakeMisconfigured(f"{place.url}: {_MISCONFIGURED[code]} ({_server_words(place)}{code})")
    if code in _SLOW_DOWN or status == 429:
        return SlowDown(f"{detail}: the lake asks for fewer requests")
    if code in _BROKEN:
        return BodyBroken(f"{detail}: it arrived changed")
    if code in _RETRYABLE or status >= 500:
        return LakeUnavailable(f"{detail} (status {status})")
    if code in _MISSING or status == 404:
        return ObjectMissing(f"{where}: no such object") if key else no_s3(place, f"status {status} {code}")
    if status == 412:
        return ObjectChanged(f"{where}: has changed in the lake")
    if status == 416:  # Only a server that ignores If-Match gets here.
        return ObjectChanged(f"{where}: has become shorter in the lake")
    if code == "InvalidObjectState":
        return AccessDenied(f"{where}: archived; restore it from its storage class first")
    if status in (401, 403):
        return AccessDenied(f"{where}: access denied; these credentials lack the permission ({reason})")
    return LakeError(f"{detail} (status {status})")


def from_exception(error: Exception, place: Place, key: str | None) -> LakeError:
    """Return the error for anything that boto3 or urllib3 raises for a request."""
    if isinstance(error, boto.ClientError):
        reply = error.response
        details = reply.get("Error", {})
        status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(details.get("Code", status))
        return from_reply(status, code, str(details.get("Message", "")), place, key)
    if isinstance(error, UnicodeEncodeError):
        return ObjectMissing(f"{place.object(key)}: no such object: S3 keys are UTF-8")
    return _from_settings(error, place) or _from_network(error, place, key)


def _from_settings(error: Exception, place: Place) -> LakeError | None:
    """Return the error when settings or credentials are at fault, else None."""
    text = _one_line(str(error))
    if isinstance(error, boto.ProfileNotFound):
        return LakeMisconfigured(
            f"--aws-profile {place.profile}: no such profile in ~/.aws/config or ~/.aws/credentials"
        )
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return LakeMisconfigured(
            f"{place.url}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
            " give --aws-profile, or --anonymous for a public bucket"
        )
    if isinstance(error, boto.CredentialRetrievalError | boto.MetadataRetrievalError):
        return LakeUnavailable(f"{place.url}: could not get credentials: {text}")  # May have worked before.
    if isinstance(error, boto.SSOError | boto.TokenRetrievalError):
        return LakeMisconfigured(f"{place.url}: could not get credentials: {text}; sign in again")
    if isinstance(error, boto.ParamValidationError) and "bucket name" in text.lower():
        return LakeMisconfigured(f"{place.url}: this is no valid bucket name")
    if isinstance(error, ResponseParserError):
        return no_s3(place, "its reply can't be read")
    if isinstance(error, boto.SSLError) and _TLS_MISCONFIGURED.search(text):
        return tls_error(place, _reason(text))
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError):
        return None
    if isinstance(error, boto.BotoCoreError | ValueError):
        return LakeMisconfigured(f"{place.server}: {text}; check --endpoint-url, --region and ~/.aws/config")
    return None


def _from_network(error: Exception, place: Place, key: str | None) -> LakeError:
    if isinstance(error, boto.IncompleteReadError) or "IncompleteRead" in str(error):
        return truncated(place, key)
    if isinstance(error, boto.ConnectTimeoutError):
        return unreachable(place, "no connection in time")
    if isinstance(error, boto.ReadTimeoutError):
        return _late(place, key)
    text = str(getattr(error, "kwargs", {}).get("error", "")) or str(error)
    if isinstance(error, boto.EndpointConnectionError):
        return unreachable(place, _reason(text))
    return _broken(place, key, _reason(text))


def obstore_refused_header(error: Exception) -> bool:
    """Return whether what obstore raised may be a server's answer to a header that it does not know."""
    text = str(error)
    status, code = _OBSTORE_STATUS.search(text), _CODE.search(text)
    return status is not None and refused_header(int(status[1]), code[1] if code else "")


def from_obstore(error: Exception, place: Place, key: str) -> LakeError | None:
    """Return the error for what obstore raised, or None when only boto3's answer can tell.

    obstore 0.12 gives classes to few statuses; the rest is in its text: the status, the reply's
    XML, and a dump of the cause with a `kind`.
    """
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return ObjectMissing(f"{place.object(key)}: no such object")
    if match := _OBSTORE_STATUS.search(text):
        status = int(match[1])
        code = _CODE.search(text, match.end())
        if status in (301, 307, 400):  # boto3 follows to another region; obstore does not.
            return None
        return from_reply(status, code[1] if code else str(status), "", place, key)
    if "IncompleteBody" in text or "response body error" in text:
        return truncated(place, key)
    kind = _OBSTORE_KIND.search(text)
    if kind is None or is_obstore_tls_failure(error):
        return None
    if kind[1] == "Connect":
        return unreachable(place, _reason(text))
    return _late(place, key) if kind[1] == "Timeout" else _broken(place, key, "no reply")


def is_obstore_tls_failure(error: Exception) -> bool:
    """Return whether obstore could not agree with the server on TLS.

    Its rules are stricter than OpenSSL's: it refuses a server's self-signed certificate that is
    marked as a CA's, which boto3 accepts.
    """
    text = str(error)
    kind = _OBSTORE_KIND.search(text)
    return kind is not None and kind[1] == "Connect" and bool(_TLS_MISCONFIGURED.search(text))


def answers_html(error: BaseException | None) -> bool:
    """Return whether this was a web page where XML was due. botocore makes a 500 of any 200 like that."""
    if not isinstance(error, boto.ClientError):
        return False
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return "html" in headers.get("content-type", "") and "x-amz-request-id" not in headers


def truncated(place: Place, key: str | None) -> TruncatedBody:
    return TruncatedBody(f"{place.object(key)}: the body ended early")


def _late(place: Place, key: str | None) -> LakeUnavailable:
    where = f" ({place.server})" if place.endpoint_url else ""
    return LakeUnavailable(f"{place.object(key)}: no answer from the lake in time{where}")


def _broken(place: Place, key: str | None, reason: str) -> LakeUnavailable:
    return LakeUnavailable(f"{place.object(key)}: the connection to the lake broke: {reason}")


def unreachable(place: Place, reason: str) -> LakeUnavailable:
    return LakeUnavailable(
        f"{place.server}: {reason}; check that the address is right and the server is running"
    )


def tls_error(place: Place, text: str) -> LakeMisconfigured:
    return LakeMisconfigured(
        f"{place.server}: TLS failed: {text}; give the server's CA with --ca-bundle, or check the URL"
    )


def no_s3(place: Place, reason: str) -> LakeMisconfigured:
    return LakeMisconfigured(f"{place.server}: this server does not answer as S3 does ({reason})")


def _server_words(place: Place) -> str:
    return f"{place.server}, " if place.endpoint_url else ""


def _reason(text: str) -> str:
    """Return the system's own words, such as "connection refused", when they are in there."""
    for pattern in _REASONS:
        if match := pattern.search(text):
            return match[1].strip().lower()
    return _one_line(text.split("\n\nDebug source", 1)[0])


def _one_line(text: str) -> str:
    return printable(" ".join(text.split())[:300])
