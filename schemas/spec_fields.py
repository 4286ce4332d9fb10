"""The types that settings of a spec are made of: what is taken, and how it is put to the user.

Enters: a value as YAML gave it. Leaves: a checked value, or pydantic's error with our words in it.
"""

import re
from decimal import Decimal
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from schemas.durations import parse_duration
from schemas.errors import UsageError
from schemas.labels import ErrorKind
from schemas.spec_problems import Wanted

# What signed URLs of S3, Google and Azure have: whoever reads one may read, or write, what it names.
SIGNATURE = re.compile(
    r"[?&](x-(amz|goog)-[a-z-]+|awsaccesskeyid|googleaccessid|signature|sig)=", re.IGNORECASE
)
_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _parse_bytes(value: object) -> object:
    """Take "64MB" as 64000000; whatever is not understood goes on to the integer type, which refuses it."""
    if isinstance(value, str) and (
        match := re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([a-zA-Z]*)", value.strip())
    ):
        unit = _BYTE_UNITS.get(match[2].lower())
        return value if unit is None else int(Decimal(match[1]) * unit)
    return value


def parse_fraction(value: object) -> object:
    """Take "1%" as 0.01; whatever is not understood goes on to the number type, which refuses it."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?%", value.strip())):
        return float(Decimal(match[1]) / 100)
    return value


def _parse_time(value: object) -> object:
    """Take "4h" as 14400.0; whatever is not understood goes on to the number type, which refuses it."""
    try:
        return parse_duration(value) if isinstance(value, str) else value
    except UsageError:
        return value


def _check_uri(uri: str) -> str:
    if not uri.strip() or not uri.isprintable():
        raise ValueError("is empty or holds control characters, wanted a path or a URI")
    scheme, separator, rest = uri.partition("://")
    # A secret key may hold a slash, which ends what a URL parser takes for the host: "name:" without a port
    # counts too.
    host = re.sub(r"^\[[0-9a-fA-F:.]*\]", "", rest.partition("/")[0])
    if separator and ("@" in host or not re.fullmatch(r"[^:]*(:\d*)?", host)):
        raise ValueError(
            f"({scheme}://…) holds credentials, which belong in the environment or a role: remove them"
        )
    if SIGNATURE.search(uri):
        raise ValueError("holds a signature, which would be stored with the spec: name bucket and key alone")
    return uri


def _check_endpoint(url: str) -> str:
    parts = urlsplit(_check_uri(url))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError("is no endpoint, wanted http://HOST:PORT or https://HOST")
    if "?" in url or "#" in url:
        raise ValueError(
            "has more behind the host than an endpoint has, wanted http://HOST:PORT or https://HOST"
        )
    return url


_LARGEST = 2**53  # the largest whole number that JSON carries everywhere
Count = Annotated[int, Strict(), Field(ge=1, le=_LARGEST), Wanted("a whole number, 1 or more")]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1), Wanted("a number from 0 to 1")]
Seconds = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False), Wanted("seconds, more than 0")]
Age = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False), Wanted("seconds, 0 or more")]
Duration = Annotated[
    float,
    BeforeValidator(_parse_time),
    Strict(),
    Field(gt=0, allow_inf_nan=False),
    Wanted("seconds, more than 0, or a time such as 30m, 4h, 7d"),
]
Flag = Annotated[bool, Strict(), Wanted("true or false")]
Name = Annotated[str, Field(min_length=1), Wanted("a string (quote a number)")]
Uri = Annotated[str, AfterValidator(_check_uri), Wanted("a path or a URI", secret=True)]
Endpoint = Annotated[
    str, AfterValidator(_check_endpoint), Wanted("http://HOST:PORT or https://HOST", secret=True)
]
Bytes = Annotated[
    int,
    Strict(),
    Field(ge=1, le=_LARGEST),
    BeforeValidator(_parse_bytes, json_schema_input_type=int | str),
    Wanted("a size such as 64MB, 64MiB or 67108864"),
]
Budget = Annotated[
    Annotated[int, Strict(), Field(ge=0, le=_LARGEST)]
    | Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)],
    BeforeValidator(parse_fraction, json_schema_input_type=int | float | str),
    Wanted("a share such as 1% or 0.01, or a number of images such as 500"),
]
Auto = Literal["auto"]
CountOrAuto = Annotated[Count | Auto, Wanted("a whole number, 1 or more, or auto")]
GpusOrAuto = Annotated[
    Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)] | Auto,
    Wanted("a number, 0 or more, or auto"),
]
CpusOrAuto = Annotated[
    Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] | Auto,
    Wanted("a number, more than 0, or auto"),
]
Resources = Annotated[
    dict[Name, Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]],
    Wanted("names with a number, more than 0, each"),
]
SourceFormat = Annotated[
    Literal["auto", "tar", "parquet", "files", "list"], Wanted("one of auto, tar, parquet, files, list")
]
Precision = Annotated[Literal["auto", "fp32", "bf16", "fp16"], Wanted("one of auto, fp32, bf16, fp16")]
ErrorKinds = Annotated[tuple[ErrorKind, ...], Wanted(f"a list of {', '.join(ErrorKind)}")]


class Section(BaseModel):
    """A section of a spec: frozen, and refusing keys that it does not know."""

    # Without the inputs: one may be a URI with a password in it.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
