"""Google Cloud Storage, through gcsfs. Credentials are Google's application default credentials.

gcsfs tries again by itself; ours come on top. STORAGE_EMULATOR_HOST points it at another server.
"""

import re
from base64 import b64decode
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from aiohttp import ClientError as AiohttpError
from gcsfs.core import GCSFileSystem  # the package's own export asks each bucket for its kind over gRPC first
from gcsfs.retry import HttpError
from google.auth.exceptions import GoogleAuthError, TransportError
from requests.exceptions import RequestException

from jobs.lake.store import (
    PAGE_KEYS,
    AccessDeniedError,
    Attempt,
    MissingObjectError,
    ObjectInfo,
    TransientStorageError,
)
from schemas.errors import StorageError

_WRITER_KEY = "masklake-writer"
_TRANSIENT_ERRORS = (AiohttpError, ConnectionError, RequestException, TimeoutError, TransportError)


class GcsStore:
    """Buckets of Google Cloud Storage."""

    def __init__(self, anonymous: bool) -> None:
        self._anonymous = anonymous

    @cached_property
    def filesystem(self) -> Any:
        """Made when first used: making it already looks for credentials, and fails where there are none."""
        return GCSFileSystem(
            token="anon" if self._anonymous else "google_default",
            use_listings_cache=False,
            skip_instance_cache=True,  # its key leaves out the environment, where the credentials are
        )

    def stat(self, path: str) -> ObjectInfo:
        bucket, _, key = path.partition("/")
        if not key:
            raise FileNotFoundError(path)  # a bucket is no object
        return _info(bucket, self._call("GET", "b/{}/o/{}", bucket, key))

    def pages(self, path: str, attempt: Attempt) -> Iterator[list[ObjectInfo]]:
        bucket, _, key = path.partition("/")
        request: dict[str, Any] = {"maxResults": PAGE_KEYS, "prefix": f"{key}/" if key else ""}
        while True:
            page = attempt(partial(self._call, "GET", "b/{}/o", bucket, **request))
            yield [_info(bucket, item) for item in page.get("items", ())]
            if "nextPageToken" not in page:
                return
            request["pageToken"] = page["nextPageToken"]

    def read(self, path: str, start: int, end: int, version: str) -> bytes:
        data: bytes = self.filesystem.cat_file(path, start=start, end=end)
        return data

    def write(self, path: str, data: bytes) -> None:
        self.filesystem.pipe_file(path, data)

    def write_file(self, path: str, file: Path, attempt: Attempt) -> None:
        attempt(partial(self.filesystem.put_file, str(file), path))  # in chunks of 50 MiB

    def create(self, path: str, data: bytes, writer: str) -> bool:
        try:
            self.filesystem.pipe_file(path, data, mode="create", metadata={_WRITER_KEY: writer})
        except FileExistsError:
            bucket, _, key = path.partition("/")
            found = self._call("GET", "b/{}/o/{}", bucket, key)
            return bool(found.get("metadata", {}).get(_WRITER_KEY) == writer)
        return True

    def delete(self, path: str) -> None:
        bucket, _, key = path.partition("/")
        try:
            self.filesystem.call("DELETE", "b/{}/o/{}", bucket, key)
        except FileNotFoundError:
            return

    def etag_is_md5(self, path: str) -> bool:
        return True

    def check_reachable(self, path: str) -> None:
        bucket, _, key = path.partition("/")
        self._call("GET", "b/{}/o", bucket, prefix=f"{key}/" if key else "", maxResults=1)

    def classify(self, error: Exception, uri: str) -> StorageError:
        code = str(error.code) if isinstance(error, HttpError) else ""
        if isinstance(error, FileNotFoundError):
            return MissingObjectError(f"{uri}: no such object or bucket in Google Cloud Storage")
        if isinstance(error, TransportError | RequestException | AiohttpError) or re.fullmatch(
            r"50[0234]|429|408", code
        ):
            return TransientStorageError(
                f"{uri}: no answer from Google Cloud Storage ({code or type(error).__name__}); try later"
            )
        if isinstance(error, GoogleAuthError) or code == "401":
            return AccessDeniedError(
                f"{uri}: no usable Google credentials ({code or type(error).__name__}); set "
                f"GOOGLE_APPLICATION_CREDENTIALS or a role, or storage.anonymous for a public bucket"
            )
        if isinstance(error, OSError) and str(error).startswith("Forbidden"):
            return AccessDeniedError(
                f"{uri}: Google Cloud Storage denies access; check the bucket's permissions"
            )
        if isinstance(error, ConnectionError | TimeoutError):
            return TransientStorageError(f"{uri}: no answer from Google Cloud Storage; check the network")
        # Not the client's own text, which may quote what it was configured with.
        return StorageError(
            f"{uri}: Google Cloud Storage refuses the request ({code or type(error).__name__})"
        )

    def _call(self, method: str, path: str, *names: str, **parameters: Any) -> Any:
        return self.filesystem.call(method, path, *names, json_out=True, **parameters)


def _info(bucket: str, item: dict[str, Any]) -> ObjectInfo:
    # Composite objects have no MD5.
    etag = b64decode(item["md5Hash"]).hex() if "md5Hash" in item else None
    return ObjectInfo(f"gs://{bucket}/{item['name']}", int(item["size"]), etag, str(item["generation"]))
