"""What a job is asked to do: frozen models, one per section of the spec file, and how a spec is loaded.

Enters: a YAML file, `a.b=c` overrides, the flags' URIs. Leaves: a validated spec, or a UsageError that names
every problem at once.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from schemas.errors import UsageError
from schemas.labels import ErrorKind
from schemas.spec_file import override, put, read_spec_file
from schemas.spec_problems import Wanted, nearest, problems, sections, show

_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _parse_bytes(value: object) -> object:
    """Take "64MB" as 64000000; whatever is not understood goes on to the integer type, which refuses it."""
    if isinstance(value, str) and (
        match := re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([a-zA-Z]*)", value.strip())
    ):
        unit = _BYTE_UNITS.get(match[2].lower())
        return value if unit is None else int(Decimal(match[1]) * unit)
    return value


def _parse_fraction(value: object) -> object:
    """Take "1%" as 0.01; whatever is not understood goes on to the number type, which refuses it."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?%", value.strip())):
        return float(Decimal(match[1]) / 100)
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
    return uri


def _check_endpoint(url: str) -> str:
    parts = urlsplit(_check_uri(url))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError("is no endpoint, wanted http://HOST:PORT or https://HOST")
    return url


_LARGEST = 2**53  # the largest whole number that JSON carries everywhere
Count = Annotated[int, Strict(), Field(ge=1, le=_LARGEST), Wanted("a whole number, 1 or more")]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1), Wanted("a number from 0 to 1")]
Seconds = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False), Wanted("seconds, more than 0")]
Age = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False), Wanted("seconds, 0 or more")]
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
    BeforeValidator(_parse_fraction, json_schema_input_type=int | float | str),
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
SourceFormat = Annotated[
    Literal["auto", "tar", "parquet", "files", "list"], Wanted("one of auto, tar, parquet, files, list")
]
Precision = Annotated[Literal["auto", "fp32", "bf16", "fp16"], Wanted("one of auto, fp32, bf16, fp16")]
ErrorKinds = Annotated[tuple[ErrorKind, ...], Wanted(f"a list of {', '.join(ErrorKind)}")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceSpec(_Section):
    """Where the images are."""

    uri: Uri = Field(description="folder, bucket prefix, or a Parquet/CSV file that lists URIs")
    format: SourceFormat = Field(default="auto", description="auto: by the names found")
    image_column: Name = Field(default="image", description="parquet: the column with the encoded bytes")
    id_column: Name | None = Field(default=None, description="parquet: becomes image_id; null: <shard>/<row>")
    include: Name = Field(default="*", description="glob on the key relative to uri")
    listing_max_age_s: Age = Field(
        default=0, description="take the lake's listing of many objects if it is no older; 0: list each time"
    )


class ModelSpec(_Section):
    """Which checkpoint labels them. A setting that is null is what the checkpoint's config says.

    The presets' own settings are: score_threshold 0.05, nms_threshold 0.5, mask_threshold 0.5,
    max_detections 100, min_size_px 800, max_size_px 1333.
    """

    uri: Uri = Field(description="checkpoint's path or URI, `demo` (the bundled one), or `alias:NAME`")
    score_threshold: Fraction | None = Field(default=None, description="detections below it are dropped")
    nms_threshold: Fraction | None = Field(
        default=None, description="IoU above which the lower score is dropped"
    )
    mask_threshold: Fraction | None = Field(default=None, description="pixels above it belong to the mask")
    max_detections: Count | None = Field(default=None, description="detections kept per image")
    min_size_px: Count | None = Field(default=None, description="images are resized to this shorter side")
    max_size_px: Count | None = Field(default=None, description="unless their longer side would pass this")

    @model_validator(mode="after")
    def _sizes_are_in_order(self) -> "ModelSpec":
        smaller, larger = self.min_size_px, self.max_size_px
        if smaller is not None and larger is not None and smaller > larger:
            raise ValueError(f"min_size_px {smaller} is more than max_size_px {larger}")
        return self


class LakeSpec(_Section):
    """Where the tables are: <uri>/labels, <uri>/models, <uri>/runs/<run_id>."""

    uri: Uri = Field(description="folder or bucket prefix")


class UnitSpec(_Section):
    """How much one call of an actor gets: a slice of one shard, bounded by both."""

    max_bytes: Bytes = Field(default=64_000_000, description="encoded bytes, such as 64MB")
    max_images: CountOrAuto = Field(default="auto", description="auto: about 10 s of an actor's work")


class PoolSpec(_Section):
    """The actors, each with a replica of the model."""

    min_actors: Count = Field(default=1, description="actors kept, whatever there is to do")
    max_actors: Count | None = Field(default=None, description="null: as many as the cluster has room for")
    gpus_per_actor: GpusOrAuto = Field(
        default="auto", description="auto: 1 where the cluster has GPUs, else 0"
    )
    cpus_per_actor: CpusOrAuto = Field(default="auto", description="auto: sized to the cluster")
    batch_size: Count = Field(default=16, description="images in a forward pass on a GPU; on a CPU it is one")
    precision: Precision = Field(default="auto", description="auto: bf16 on a GPU that has it, else fp32")

    @model_validator(mode="after")
    def _actors_are_in_order(self) -> "PoolSpec":
        if self.max_actors is not None and self.min_actors > self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} is more than max_actors {self.max_actors}")
        return self


class CommitSpec(_Section):
    """How often finished fragments become visible: whichever comes first."""

    every_s: Seconds = Field(default=60, description="seconds between commits")
    every_images: Count = Field(default=100_000, description="images between commits")
    compact: Flag = Field(default=True, description="merge small files into large ones when the job is done")


class FailuresSpec(_Section):
    """How many images may fail, and which failures of earlier runs are tried again."""

    budget: Budget = Field(
        default=0.01,
        description="failed images above which the run ends: a share of them, such as 1%, or their number",
    )
    retry: ErrorKinds = Field(default=(), description="kinds of failure to label anew")
    retry_only: Flag = Field(default=False, description="label nothing but those")

    @model_validator(mode="after")
    def _has_something_to_retry(self) -> "FailuresSpec":
        if self.retry_only and not self.retry:
            raise ValueError("retry_only is true and retry is empty: name the kinds of failure")
        return self


class StorageSpec(_Section):
    """How object storage is reached. Credentials come from the environment or a role, never from here."""

    endpoint_url: Endpoint | None = Field(
        default=None, description="null: the environment's AWS_ENDPOINT_URL"
    )
    region: Name | None = Field(default=None, description="null: the environment's AWS_REGION")
    anonymous: Flag = Field(default=False, description="read public buckets without credentials")


class InferSpec(_Section):
    """`masklake infer`: label every image of a source that the lake's table does not have yet."""

    source: SourceSpec
    model: ModelSpec
    lake: LakeSpec
    unit: UnitSpec = UnitSpec()
    pool: PoolSpec = PoolSpec()
    commit: CommitSpec = CommitSpec()
    failures: FailuresSpec = FailuresSpec()
    storage: StorageSpec = StorageSpec()


SPECS: dict[str, type[BaseModel]] = {"infer": InferSpec}

SpecT = TypeVar("SpecT", bound=BaseModel)


def load_spec(cls: type[SpecT], path: str | None, overrides: Sequence[str] = (), **uris: str | None) -> SpecT:
    """Read a spec file, lay the overrides over it, and the URIs over both.

    Args:
        cls: the spec's model, such as InferSpec.
        path: a local YAML file of at most 1 MiB; None: start from the defaults.
        overrides: `pool.batch_size=16`, values in YAML.
        **uris: the flags' values by dotted path, `**{"source.uri": "photos/"}`; None: the flag was not given.

    Raises:
        UsageError: every problem, in one line.
    """
    data = {} if path is None else read_spec_file(path)
    for assignment in overrides:
        override(data, assignment)
    for dotted, uri in uris.items():
        if uri is not None:
            put(data, dotted, uri)
    return parse_spec(cls, data, path if path is not None else "spec")


def parse_spec(cls: type[SpecT], data: Mapping[str, Any], where: str) -> SpecT:
    """Validate plain data, of a spec file or of a run's stored spec.

    Args:
        where: the data's origin, for the message.

    Raises:
        UsageError: every problem, joined by "; ".
    """
    # An absent section, or a bare `pool:`, is an empty one: messages then name source.uri and not source.
    empty: dict[str, Any] = {name: {} for name in sections(cls) if data.get(name) is None}
    try:
        return cls.model_validate({**data, **empty})
    except ValidationError as error:
        raise UsageError(f"{where}: {'; '.join(problems(cls, error))}") from None


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema of the spec file of a job, by the job's name.

    Raises:
        UsageError: there is no such job.
    """
    if name not in SPECS:
        raise UsageError(
            f"there is no spec {show(name)}{nearest(name, SPECS)}; the specs are: {', '.join(SPECS)}"
        )
    return SPECS[name].model_json_schema()
