"""What a job may reach: URIs by scheme and prefix, endpoints by their address.

Enters: the environment, which is the operator's: MASKLAKE_ALLOWED_URIS, MASKLAKE_ALLOWED_ENDPOINTS, both with
blanks between, and Ray's mark of a submitted job. Leaves: a UriPolicy, which passes a URI or an endpoint, or
raises a UsageError. A spec cannot widen it. Who asks is stores.py, for each URI that Storage is given.

Addresses that answer every process on a machine with the machine's own credentials (169.254.169.254 and its
like) are no endpoint, under whatever name, unless the operator names them.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from schemas.errors import UsageError

URIS_VARIABLE = "MASKLAKE_ALLOWED_URIS"
ENDPOINTS_VARIABLE = "MASKLAKE_ALLOWED_ENDPOINTS"
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # the first that is set counts
# Ray's job supervisor sets it for a job's driver: ray/_private/runtime_env/constants.py.
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
SCHEMES = ("file", "s3", "gs", "memory")

_OBJECT_STORAGE = ("s3://", "gs://")
_PORTS = {"http": 80, "https": 443}
_MAX_DECODINGS = 8  # of what was percent-encoded over and over
# Link-local is where AWS, ECS, GCP, Azure and OpenStack keep their metadata services; the others are AWS's
# and GCP's on IPv6, Alibaba's, Oracle's and Azure's.
_METADATA_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::/32",
        "fd20:ce::254/128",
        "100.100.100.200/32",
        "192.0.0.192/32",
        "168.63.129.16/32",
    )
)
_METADATA_NAMES = ("metadata.google.internal", "metadata.goog", "metadata", "instance-data")
# An IPv4 address in the last 32 bits: the compatible form, NAT64's (RFC 6052; RFC 8215, local), SIIT's.
_HOLD_IPV4 = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96")))


@dataclass(frozen=True)
class UriPolicy:
    """Picklable: a Storage that travels to a worker takes it along.

    prefixes: URIs that are allowed, with all below them; "s3://": every bucket; None: everything.
    endpoints: S3 endpoints that a spec may name; None: any that is not link-local.
    endpoints_named: those of them that the operator listed, link-local or not.
    in_job: in a job that was submitted to Ray; for the message.
    """

    prefixes: tuple[str, ...] | None
    endpoints: tuple[str, ...] | None
    endpoints_named: tuple[str, ...] = ()
    in_job: bool = False

    @classmethod
    def from_environment(cls) -> UriPolicy:
        """Raises UsageError: a variable is set and says nothing, or no URI."""
        in_job = RAY_JOB_VARIABLE in os.environ
        prefixes = _listed(URIS_VARIABLE)
        named = _listed(ENDPOINTS_VARIABLE) or ()
        for prefix in prefixes or ():
            _check_prefix(prefix)
        for endpoint in named:
            _split_endpoint(endpoint, ENDPOINTS_VARIABLE)
        # A bucket's name says what it is only together with the endpoint; and credentials are shown to that.
        is_open = prefixes is None and not named and not in_job
        own = tuple(os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name))
        is_restricted_job = in_job and prefixes is None
        return cls(
            prefixes=_OBJECT_STORAGE if is_restricted_job else prefixes,
            endpoints=None if is_open else (*own, *named),
            endpoints_named=named,
            in_job=is_restricted_job,
        )

    def check(self, uri: str) -> None:
        """Pass a URI in its one spelling.

        Raises:
            UsageError: it is not below an allowed prefix, or it would not be if it were read in another way:
                with percent-escapes resolved, "..", or links on a disk followed.
        """
        if self.prefixes is None or any(_is_below(uri, prefix) for prefix in self.prefixes):
            return
        if self.in_job:
            raise UsageError(
                f"{uri}: a submitted job reaches object storage only (s3://, gs://); use that, or let "
                f"whoever runs the cluster set {URIS_VARIABLE} in its environment"
            )
        raise UsageError(
            f"{uri} is not allowed here, wanted one below {' '.join(self.prefixes)}: {URIS_VARIABLE} of this "
            f"machine's environment says so; use one of those, or ask whoever runs it"
        )

    def check_endpoint(self, url: str, of_spec: bool) -> None:
        """Pass an S3 endpoint.

        Args:
            of_spec: named by a spec or a flag, not by the environment.

        Raises:
            UsageError: it is not the environment's and not listed, or it is a metadata service, or no URL.
        """
        parts = _split_endpoint(url, "storage.endpoint_url" if of_spec else "AWS_ENDPOINT_URL")
        if any(_is_same_endpoint(parts, named) for named in self.endpoints_named):
            return
        trusted = self.endpoints if of_spec else None
        if trusted is not None and not any(_is_same_endpoint(parts, endpoint) for endpoint in trusted):
            raise UsageError(
                f"storage.endpoint_url {url} is not allowed here: requests to it are signed with this "
                f"machine's credentials; leave it out, or let whoever runs the machine set AWS_ENDPOINT_URL "
                f"or {ENDPOINTS_VARIABLE}"
            )
        host = (parts.hostname or "").rstrip(".").lower()
        if host in _METADATA_NAMES or any(map(is_metadata_address, _addresses(host))):
            raise UsageError(
                f"endpoint {url} leads to a link-local or metadata address, which is no object storage; mend "
                f"storage.endpoint_url or AWS_ENDPOINT_URL, or list it in {ENDPOINTS_VARIABLE}"
            )


def is_metadata_address(address: str) -> bool:
    """Whether an IP address is link-local or a cloud's metadata service; also an IPv4 one inside IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if any(ip in network for network in _HOLD_IPV4):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return any(ip in network for network in _METADATA_NETWORKS)


def _listed(variable: str) -> tuple[str, ...] | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.split():
        raise UsageError(
            f"{variable} is set and empty: unset it, or name what is allowed, with blanks between"
        )
    return tuple(text.split())


def _check_prefix(prefix: str) -> None:
    scheme, separator, path = prefix.partition("://")
    if not separator or scheme not in SCHEMES or (scheme == "file" and not path.startswith("/")):
        raise UsageError(
            f"{URIS_VARIABLE} names {scheme if separator else prefix!r}, wanted prefixes such as "
            f"s3://bucket/folder/, gs://bucket/ or file:///folder/, with blanks between"
        )


def _is_below(uri: str, prefix: str) -> bool:
    """By whole parts of the path: s3://lake allows s3://lake/x and not s3://lake-2."""
    scheme, _, path = uri.partition("://")
    prefix_scheme, _, prefix_path = prefix.partition("://")
    if scheme != prefix_scheme:
        return False
    if any(".." in reading.split("/") for reading in _readings(path)):
        return False
    if scheme == "file":
        path, prefix_path = os.path.realpath(path), os.path.realpath(prefix_path)
    wanted = prefix_path.strip("/")
    return not wanted or f"{path.strip('/')}/".startswith(f"{wanted}/")


def _readings(path: str) -> Iterator[str]:
    """The path as it stands, and percent-decoded until nothing changes: clients differ in that."""
    yield path
    for _ in range(_MAX_DECODINGS):
        decoded = unquote(path)
        if decoded == path:
            return
        path = decoded
        yield path
    yield ".."  # nobody means that


def _split_endpoint(url: str, where: str) -> SplitResult:
    """Raises UsageError, which does not repeat the URL: it may hold credentials."""
    try:
        parts = urlsplit(url)
        is_endpoint = parts.scheme in _PORTS and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        is_endpoint = False
    if not is_endpoint:
        raise UsageError(f"{where} is no endpoint, wanted http://HOST:PORT or https://HOST")
    if "?" in url or "#" in url:
        raise UsageError(f"{where} has more behind the host than an endpoint has, wanted http://HOST:PORT")
    if "@" in parts.netloc:
        raise UsageError(f"{where} holds credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return parts


def _is_same_endpoint(parts: SplitResult, other: str) -> bool:
    return _identity(parts) == _identity(urlsplit(other))


def _identity(parts: SplitResult) -> tuple[str, str, int, str]:
    host = (parts.hostname or "").rstrip(".").lower()
    return parts.scheme, host, parts.port or _PORTS.get(parts.scheme, 0), parts.path.rstrip("/")


def _addresses(host: str) -> set[str]:
    """All that the system takes the name for, which reads 0xa9fea9fe and 2852039166 as addresses too."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):  # the client will say so, with what it was asked for
        return set()
