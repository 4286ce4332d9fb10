"""Where a URI leads: the one spelling of it, the client for its kind of storage, deltalake's options for it.

Enters: URIs as users write them, a StorageSpec, the environment's endpoint and region. Leaves: a Store and
the path within it, where the operator's policy allows the URI. Clients are made when first asked for, one of
each kind in a process.
"""

import os
import re
import threading

from jobs.lake.local_store import LocalStore
from jobs.lake.memory_store import MemoryStore
from jobs.lake.store import Store
from jobs.lake.uri_policy import ENDPOINT_VARIABLES, SCHEMES, UriPolicy
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
# It becomes part of a host's name (s3.<region>.amazonaws.com), and so must not be able to end it.
_REGION = re.compile(r"[A-Za-z0-9-]{1,63}")


def normalize(uri: str) -> str:
    """The one spelling of a URI: with its scheme, absolute, without a trailing slash.

    Raises:
        UsageError: another scheme than file, s3, gs, memory; no bucket; or credentials in it.
    """
    scheme, separator, path = uri.partition("://")
    if not separator:
        return f"file://{os.path.abspath(uri)}"
    if scheme not in SCHEMES:  # the rest is not repeated: it may be a signed URL
        raise UsageError(
            f"'{scheme}://…': scheme '{scheme}' is not supported; use a path, file://, s3://, gs://"
        )
    # A secret key may hold a slash, so that what stands before it looks like a bucket with a port.
    if re.search(r"[@:]", path.partition("/")[0]):
        raise UsageError(
            f"a URI, {scheme}://…, holds credentials or a port; name the bucket alone, and leave credentials "
            f"to the environment or a role"
        )
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
        self._policies: tuple[UriPolicy, ...] = (UriPolicy.from_environment(),)
        self._forget_clients()

    def __getstate__(self) -> tuple[StorageSpec, tuple[UriPolicy, ...]]:
        return self._spec, self._policies

    def __setstate__(self, state: tuple[StorageSpec, tuple[UriPolicy, ...]]) -> None:
        """What is allowed is what was so where it came from, and is so here too."""
        self._spec, carried = state
        self._policies = tuple(dict.fromkeys((*carried, UriPolicy.from_environment())))
        self._forget_clients()

    def locate(self, uri: str) -> tuple[Store, str]:
        """The store of a URI and its path there: "bucket/key", or the file's.

        Raises:
            UsageError: it is no URI of ours, or the operator's policy does not allow it.
        """
        scheme, path = self._allowed(uri)
        key = (os.getpid(), scheme)  # clients do not survive a fork
        with self._lock:
            if key not in self._stores:
                self._stores[key] = self._make_store(scheme)
            return self._stores[key], path

    def delta_options(self, uri: str) -> dict[str, str]:
        """The `storage_options` that bring deltalake to the same place; credentials it finds by itself."""
        scheme, _ = self._allowed(uri)
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

    def _allowed(self, uri: str) -> tuple[str, str]:
        """Scheme and path of a URI that every policy passes."""
        whole = normalize(uri)
        for policy in self._policies:
            policy.check(whole)
        scheme, _, path = whole.partition("://")
        return scheme, path

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
        self._passed_endpoints: set[str] = set()

    def _endpoint_url(self) -> str | None:
        """The spec's, or the environment's; None for AWS. Raises UsageError: it is not allowed."""
        variables = (os.environ.get(name) for name in ENDPOINT_VARIABLES)
        url = self._spec.endpoint_url or next(filter(None, variables), None)
        if url and url not in self._passed_endpoints:  # asked once: names are looked up
            for policy in self._policies:
                policy.check_endpoint(url, of_spec=self._spec.endpoint_url is not None)
            self._passed_endpoints.add(url)
        return url

    def _region(self) -> str | None:
        variables = (os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION"))
        default = "us-east-1" if self._endpoint_url() else None  # other servers ignore it, but it is signed
        region = self._spec.region or next(filter(None, variables), default)
        if region and not _REGION.fullmatch(region):
            raise UsageError(
                f"storage.region or AWS_REGION is {region!r}, wanted a region's name such as eu-central-1"
            )
        return region
