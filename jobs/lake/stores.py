"""Where a URI leads: the one spelling of it, the client for its kind of storage, deltalake's options for it.

Enters: URIs as users write them, a StorageSpec, the environment's endpoint and region. Leaves: a Store and
the path within it. Clients are made when first asked for, one of each kind in a process.
"""

import os
import threading

from jobs.lake.local_store import LocalStore
from jobs.lake.memory_store import MemoryStore
from jobs.lake.store import Store
from schemas.errors import UsageError
from schemas.specs import StorageSpec

# By itself deltalake's client gives up within two seconds; a store that fails over is away for a minute.
_DELTA_PATIENCE = {
    "max_retries": "40",
    "retry_timeout": "90s",
    "backoff_config.init_backoff": "200ms",
    "backoff_config.max_backoff": "20s",
    "backoff_config.base": "4",
}
SCHEMES = ("file", "s3", "gs", "memory")


def normalize(uri: str) -> str:
    """The one spelling of a URI: with its scheme, absolute, without a trailing slash.

    Raises:
        UsageError: another scheme than file, s3, gs, memory; or no bucket.
    """
    scheme, separator, path = uri.partition("://")
    if not separator:
        return f"file://{os.path.abspath(uri)}"
    if scheme not in SCHEMES:
        raise UsageError(f"'{uri}': scheme '{scheme}' is not supported; use a path, file://, s3://, gs://")
    if scheme == "file":
        if not path.startswith("/"):
            raise UsageError(f"'{uri}': a file URI has an absolute path, file:///folder/file")
        return f"file://{os.path.abspath(path)}"
    if not path.strip("/") or path.startswith("/"):
        raise UsageError(f"'{uri}' names no bucket; write {scheme}://BUCKET/KEY")
    return f"{scheme}://{path.rstrip('/')}"


class Stores:
    """Picklable: each process makes its own clients, with its own environment's credentials. Thread-safe."""

    def __init__(self, spec: StorageSpec) -> None:
        self._spec = spec
        self._forget_clients()

    def __getstate__(self) -> StorageSpec:
        return self._spec

    def __setstate__(self, spec: StorageSpec) -> None:
        self._spec = spec
        self._forget_clients()

    def locate(self, uri: str) -> tuple[Store, str]:
        """The store of a URI and its path there: "bucket/key", or the file's."""
        scheme, _, path = normalize(uri).partition("://")
        key = (os.getpid(), scheme)  # clients do not survive a fork
        with self._lock:
            if key not in self._stores:
                self._stores[key] = self._make_store(scheme)
            return self._stores[key], path

    def delta_options(self, uri: str) -> dict[str, str]:
        """The `storage_options` that bring deltalake to the same place; credentials it finds by itself."""
        scheme = normalize(uri).partition("://")[0]
        if scheme == "memory":
            raise UsageError(
                f"'{uri}': a table cannot live in one process's memory; use a path, s3:// or gs://"
            )
        if scheme == "gs":
            return _DELTA_PATIENCE | ({"google_skip_signature": "true"} if self._spec.anonymous else {})
        if scheme == "file":
            return {}
        options = {"aws_conditional_put": "etag", **_DELTA_PATIENCE}
        if endpoint_url := self._endpoint_url():
            options["aws_endpoint_url"] = endpoint_url
            options["aws_allow_http"] = str(endpoint_url.startswith("http://")).lower()
        if region := self._region():
            options["aws_region"] = region
        if self._spec.anonymous:
            options["aws_skip_signature"] = "true"
        return options

    def _make_store(self, scheme: str) -> Store:
        """Clients are imported when they are first needed: each takes a good part of a second."""
        if scheme == "s3":
            from jobs.lake.s3_store import S3Store

            return S3Store(self._endpoint_url(), self._region(), self._spec.anonymous)
        if scheme == "gs":
            from jobs.lake.gcs_store import GcsStore

            return GcsStore(self._spec.anonymous)
        return LocalStore() if scheme == "file" else MemoryStore()

    def _forget_clients(self) -> None:
        self._stores: dict[tuple[int, str], Store] = {}
        self._lock = threading.Lock()

    def _endpoint_url(self) -> str | None:
        variables = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
        url = self._spec.endpoint_url or next(filter(None, variables), None)
        if url and "@" in url:
            raise UsageError(
                "AWS_ENDPOINT_URL holds credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return url

    def _region(self) -> str | None:
        variables = (os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION"))
        default = "us-east-1" if self._endpoint_url() else None  # other servers ignore it, but it is signed
        return self._spec.region or next(filter(None, variables), default)
