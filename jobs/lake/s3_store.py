"""S3 and servers that speak it, through s3fs.

Credentials come from the environment, the profile or the role, as botocore finds them. Our own retries are
the only ones: the client's are off, so that a failure takes a known time and a repeated put is known to be
one. A redirect is an error: followed, it would bring a request, and a session's token with it, to a host that
nobody named.
"""

import base64
import hashlib
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import get_session
from aiohttp import ClientError as AiohttpError
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)
from botocore.exceptions import (
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
    SSOError,
)
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp
from fsspec.asyn import sync
from s3fs import S3FileSystem

from jobs.lake.parallel_listing import Listed, pages_in_parallel
from jobs.lake.store import (
    PAGE_KEYS,
    AccessDeniedError,
    Attempt,
    ChangedObjectError,
    MissingObjectError,
    ObjectInfo,
    TransientStorageError,
)
from schemas.errors import StorageError

_DIRECTORY_BUCKET = "--x-s3"  # S3 Express One Zone
_CONNECT_TIMEOUT_S = 10
_SILENCE_TIMEOUT_S = 30  # without a byte; a body that comes slowly may take as long as it likes
_WRITER_KEY = "masklake-writer"
PART_BYTES = 64 << 20  # of a large file; S3 wants 5 MiB or more
_MOST_PARTS = 10_000  # that S3 takes
# S3's error codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; a HEAD gives its
# status only.
_MISSING_CODES = frozenset({"NoSuchKey", "NotFound", "404"})
_PRECONDITION_CODES = frozenset({"PreconditionFailed", "412"})
_CREDENTIAL_CODES = frozenset(
    {
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_DENIED_CODES = frozenset({"AccessDenied", "AllAccessDisabled", "Forbidden", "401", "403"})
_TRANSIENT_CODES = frozenset(
    {
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT_ERRORS = (
    AiohttpError,
    BotoConnectionError,
    ConnectionError,
    HTTPClientError,
    ResponseParserError,
    ResponseStreamingError,
    TimeoutError,
)
_CREDENTIAL_ERRORS = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
)


class S3Store:
    """Buckets of one endpoint.

    Args:
        endpoint_url: None for AWS.
        region: None for what the environment says.
        anonymous: send unsigned requests.
    """

    def __init__(self, endpoint_url: str | None, region: str | None, anonymous: bool) -> None:
        self._endpoint_url = endpoint_url
        config: dict[str, Any] = {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _SILENCE_TIMEOUT_S,
            "http_session_cls": _WithoutRedirects,
        }
        if endpoint_url:
            # Servers other than AWS may refuse the checksum trailers that botocore sends by default.
            config |= {
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            }
        session = get_session()
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
        self.filesystem = S3FileSystem(
            session=session,
            anon=anonymous,
            endpoint_url=endpoint_url,
            client_kwargs={"region_name": region} if region else {},
            config_kwargs=config,
            max_concurrency=1,  # more would cost a HEAD before each read
            use_listings_cache=False,
            skip_instance_cache=True,  # its key leaves out the environment, where the credentials are
        )
        self.filesystem.retries = 1

    def stat(self, path: str) -> ObjectInfo:
        bucket, key = _split(path)
        if not key:
            raise FileNotFoundError(path)  # a bucket is no object
        head = self._call("head_object", Bucket=bucket, Key=key)
        return _info(bucket, key, head["ContentLength"], head["ETag"])

    def pages(self, path: str, attempt: Attempt) -> Iterator[list[ObjectInfo]]:
        bucket, key = _split(path)
        prefix = f"{key}/" if key else ""
        if bucket.endswith(_DIRECTORY_BUCKET):  # keys in no order, and no StartAfter
            yield from self._pages_in_turn(bucket, prefix, attempt)
            return

        def list_page(prefix: str, after: str, max_keys: int) -> tuple[list[Listed], bool]:
            request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": max_keys}
            if after:
                request["StartAfter"] = after
            page = attempt(partial(self._call, "list_objects_v2", **request))
            return [(item["Key"], _listed(bucket, item)) for item in page.get("Contents", ())], page[
                "IsTruncated"
            ]

        yield from pages_in_parallel(list_page, prefix, PAGE_KEYS)

    def _pages_in_turn(self, bucket: str, prefix: str, attempt: Attempt) -> Iterator[list[ObjectInfo]]:
        request: dict[str, Any] = {"Bucket": bucket, "MaxKeys": PAGE_KEYS, "Prefix": prefix}
        while True:
            page = attempt(partial(self._call, "list_objects_v2", **request))
            yield [_listed(bucket, item) for item in page.get("Contents", ())]
            if not page["IsTruncated"]:
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, path: str, start: int, end: int, version: str) -> bytes:
        bucket, key = _split(path)
        request = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{end - 1}"}
        if version:
            request["IfMatch"] = f'"{version}"'
        try:
            data: bytes = sync(self.filesystem.loop, self._get, request)
        except OSError as error:
            if _error_code(error) not in _PRECONDITION_CODES:
                raise
            raise ChangedObjectError(
                f"s3://{path} was replaced since it was listed; run again for the new one"
            ) from error
        return data

    async def _get(self, request: dict[str, Any]) -> bytes:
        reply = await self.filesystem._call_s3("get_object", **request)
        async with reply["Body"] as body:
            data: bytes = await body.read()
        return data

    def write(self, path: str, data: bytes) -> None:
        self._put(path, data)

    def write_file(self, path: str, file: Path, attempt: Attempt) -> None:
        """An upload that fails is given up with its parts, as far as the store can be reached."""
        size = file.stat().st_size
        if size <= PART_BYTES:
            attempt(partial(self._put, path, file.read_bytes()))
            return
        bucket, key = _split(path)
        where = {"Bucket": bucket, "Key": key}
        writer = uuid.uuid4().hex
        begin = partial(self._call, "create_multipart_upload", **where, Metadata={_WRITER_KEY: writer})
        upload = where | {"UploadId": attempt(begin)["UploadId"]}
        try:
            parts: list[dict[str, Any]] = []
            with file.open("rb") as content:
                while data := content.read(max(PART_BYTES, -(-size // _MOST_PARTS))):
                    part = {"PartNumber": len(parts) + 1, "Body": data} | self._checksum(data)
                    reply = attempt(partial(self._call, "upload_part", **upload, **part))
                    parts.append({"PartNumber": len(parts) + 1, "ETag": reply["ETag"]})
            attempt(partial(self._complete, upload, parts, writer))
        except BaseException:
            with suppress(StorageError):
                attempt(partial(self._call, "abort_multipart_upload", **upload))
            raise

    def _complete(self, upload: dict[str, str], parts: list[dict[str, Any]], writer: str) -> None:
        """Also where it was complete before, and the reply got lost."""
        try:
            self._call("complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
        except OSError as error:
            if _error_code(error) != "NoSuchUpload":
                raise
            head = self._call("head_object", Bucket=upload["Bucket"], Key=upload["Key"])
            if head["Metadata"].get(_WRITER_KEY) != writer:
                raise

    def create(self, path: str, data: bytes, writer: str) -> bool:
        bucket, key = _split(path)
        try:
            self._put(path, data, IfNoneMatch="*", Metadata={_WRITER_KEY: writer})
        except OSError as error:
            if _error_code(error) not in _PRECONDITION_CODES:
                raise
            head = self._call("head_object", Bucket=bucket, Key=key)
            return bool(head["Metadata"].get(_WRITER_KEY) == writer)
        return True

    def delete(self, path: str) -> None:
        bucket, key = _split(path)
        self._call("delete_object", Bucket=bucket, Key=key)

    def etag_is_md5(self, path: str) -> bool:
        """Not so under SSE-KMS and SSE-C.

        Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html, ETag.
        """
        bucket, key = _split(path)
        head = self._call("head_object", Bucket=bucket, Key=key)
        return head.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in head

    def check_reachable(self, path: str) -> None:
        bucket, key = _split(path)
        self._call("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)

    def classify(self, error: Exception, uri: str) -> StorageError:
        code = _error_code(error)
        where = self._endpoint_url or "AWS"
        if code == "NoSuchBucket":
            bucket, _ = _split(uri.removeprefix("s3://"))
            return MissingObjectError(
                f"{uri}: there is no bucket '{bucket}' at {where}; create it or mend the URI"
            )
        if code in _MISSING_CODES or isinstance(error, FileNotFoundError):
            return MissingObjectError(f"{uri} does not exist at {where}")
        if isinstance(error, _CREDENTIAL_ERRORS):
            return AccessDeniedError(
                f"{uri}: no usable credentials for {where} ({type(error).__name__}); set AWS_ACCESS_KEY_ID "
                f"and AWS_SECRET_ACCESS_KEY, a profile or a role, or storage.anonymous for a public bucket"
            )
        if code in _CREDENTIAL_CODES:
            return AccessDeniedError(
                f"{uri}: {where} refuses the credentials ({code}); check AWS_ACCESS_KEY_ID, "
                f"AWS_SECRET_ACCESS_KEY, the profile or the role, and this machine's clock"
            )
        if code in _DENIED_CODES or isinstance(error, PermissionError):
            return AccessDeniedError(
                f"{uri}: {where} denies access ({code or 'denied'}); check the credentials and the policy "
                f"of the bucket"
            )
        if code in _TRANSIENT_CODES or re.fullmatch(r"50[0234]|429|409|408", code):
            return TransientStorageError(f"{uri}: {where} is busy or failing ({code}); run again later")
        if isinstance(error, _TRANSIENT_ERRORS):
            return TransientStorageError(
                f"{uri}: no answer from {where} ({type(error).__name__}); check storage.endpoint_url, "
                f"AWS_ENDPOINT_URL and the network"
            )
        if isinstance(error, ParamValidationError):
            return StorageError(f"{uri}: S3 allows no such name for a bucket or key; mend the URI")
        # Not the client's own text, which may quote what it was configured with.
        return StorageError(f"{uri}: {where} refuses the request ({code or type(error).__name__})")

    def _put(self, path: str, data: bytes, **condition: Any) -> None:
        bucket, key = _split(path)
        self._call("put_object", Bucket=bucket, Key=key, Body=data, **condition, **self._checksum(data))

    def _checksum(self, data: bytes) -> dict[str, str]:
        """For a body that is sent; botocore sends AWS one by itself, which is off for other servers."""
        if not self._endpoint_url:
            return {}
        return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}

    def _call(self, method: str, **request: Any) -> Any:
        return self.filesystem.call_s3(method, **request)


class _WithoutRedirects(AIOHTTPSession):  # type: ignore[misc]  # which has no types
    """aiobotocore's HTTP client. aiohttp follows redirects unless each request says no."""

    async def send(self, request: Any) -> Any:
        """Raises StorageError: a redirect. AWS's own names a bucket's region, which botocore goes by."""
        response = await super().send(request)
        if response.status_code in _REDIRECTS and "x-amz-bucket-region" not in response.headers:
            host = urlsplit(request.url).netloc
            raise StorageError(
                f"{host} redirects to another place ({response.status_code}), where nothing is sent, as a "
                f"session's token would go along; check storage.endpoint_url and AWS_ENDPOINT_URL"
            )
        return response

    async def _get_session(self, proxy_url: str | None) -> Any:
        return _StraightRequests(await super()._get_session(proxy_url))


class _StraightRequests:
    def __init__(self, session: Any) -> None:
        self._session = session

    async def request(self, *args: Any, **options: Any) -> Any:
        return await self._session.request(*args, **options, allow_redirects=False)


def _timestamp(value: Any) -> datetime:
    """What botocore's own parser makes of it, at once where it is ISO 8601: in a page of a listing there are
    a thousand, and parsing them took two thirds of the time.
    """
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        parsed: datetime = parse_timestamp(value)
        return parsed


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key


def _listed(bucket: str, item: Any) -> ObjectInfo:
    return _info(bucket, item["Key"], item["Size"], item["ETag"])


def _info(bucket: str, key: str, size: int, quoted_etag: str) -> ObjectInfo:
    etag = quoted_etag.strip('"')
    # A multipart upload's ETag ends in "-<parts>"; a directory bucket's ("--x-s3") is random.
    is_md5 = re.fullmatch(r"[0-9a-f]{32}", etag) and not bucket.endswith(_DIRECTORY_BUCKET)
    return ObjectInfo(f"s3://{bucket}/{key}", size, etag if is_md5 else None, etag)


def _error_code(error: BaseException) -> str:
    """S3's code, or the HTTP status, of the reply behind an error; "" where there was no reply."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        cause = cause.__cause__
    return ""
