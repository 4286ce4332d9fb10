"""What an infer job is asked to do: frozen models, one per section of the spec file.

Sections that other jobs have too (storage, source, lake) are here as well; train_spec.py holds the rest.
"""

from pydantic import Field, model_validator

from schemas.spec_fields import (
    Age,
    Budget,
    Bytes,
    Count,
    CountOrAuto,
    CpusOrAuto,
    Duration,
    Endpoint,
    ErrorKinds,
    Flag,
    Fraction,
    GpusOrAuto,
    Name,
    Precision,
    Resources,
    Seconds,
    Section,
    SourceFormat,
    Uri,
)


class SourceSpec(Section):
    """Where the images are."""

    uri: Uri = Field(description="folder, bucket prefix, or a Parquet/CSV file that lists URIs")
    format: SourceFormat = Field(default="auto", description="auto: by the names found")
    image_column: Name = Field(default="image", description="parquet: the column with the encoded bytes")
    id_column: Name | None = Field(default=None, description="parquet: becomes image_id; null: <shard>/<row>")
    include: Name = Field(default="*", description="glob on the key relative to uri")
    listing_max_age_s: Age = Field(
        default=0, description="take the lake's listing of many objects if it is no older; 0: list each time"
    )


class ModelSpec(Section):
    """Which checkpoint labels them. A setting that is null is what the checkpoint's config says.

    The presets' own settings are: score_threshold 0.05, nms_threshold 0.5, mask_threshold 0.5,
    max_detections 100, min_size_px 800, max_size_px 1333.
    """

    uri: Uri = Field(
        description="path or URI, `demo` (the bundled one), or of the lake: `alias:NAME`, `registry:NAME@N`"
    )
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


class LakeSpec(Section):
    """Where the tables are: <uri>/labels, <uri>/models, <uri>/runs/<run_id>."""

    uri: Uri = Field(description="folder or bucket prefix")


class UnitSpec(Section):
    """How much one call of an actor gets: a slice of one shard, bounded by both."""

    max_bytes: Bytes = Field(default=64_000_000, description="encoded bytes, such as 64MB")
    max_images: CountOrAuto = Field(default="auto", description="auto: about 10 s of an actor's work")


class PoolSpec(Section):
    """The actors, each with a replica of the model."""

    min_actors: Count = Field(default=1, description="actors that must find room before a run begins")
    max_actors: Count | None = Field(
        default=None,
        description="those without room wait for nodes that join; null: as many as have room at the start",
    )
    gpus_per_actor: GpusOrAuto = Field(
        default="auto", description="auto: 1 where the cluster has GPUs, else 0"
    )
    cpus_per_actor: CpusOrAuto = Field(default="auto", description="auto: sized to the cluster")
    resources: Resources = Field(
        default={}, description="custom resources of Ray that an actor books, such as {a100: 1}"
    )
    wait_for_nodes_s: Duration | None = Field(
        default=None,
        description="such as 30m: where there is no room for min_actors yet, ask for nodes and wait so long; "
        "null: refuse",
    )
    batch_size: Count = Field(default=16, description="images in a forward pass on a GPU; on a CPU it is one")
    precision: Precision = Field(default="auto", description="auto: bf16 on a GPU that has it, else fp32")

    @model_validator(mode="after")
    def _actors_are_in_order(self) -> "PoolSpec":
        if self.max_actors is not None and self.min_actors > self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} is more than max_actors {self.max_actors}")
        return self


class CommitSpec(Section):
    """How often finished fragments become visible: whichever comes first."""

    every_s: Seconds = Field(default=60, description="seconds between commits")
    every_images: Count = Field(default=100_000, description="images between commits")
    compact: Flag = Field(default=True, description="merge small files into large ones when the job is done")


class FailuresSpec(Section):
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


class StorageSpec(Section):
    """How object storage is reached. Credentials come from the environment or a role, never from here."""

    endpoint_url: Endpoint | None = Field(
        default=None, description="null: the environment's AWS_ENDPOINT_URL"
    )
    region: Name | None = Field(default=None, description="null: the environment's AWS_REGION")
    anonymous: Flag = Field(default=False, description="read public buckets without credentials")


class InferSpec(Section):
    """`masklake infer`: label every image of a source that the lake's table does not have yet."""

    source: SourceSpec
    model: ModelSpec
    lake: LakeSpec
    unit: UnitSpec = UnitSpec()
    pool: PoolSpec = PoolSpec()
    commit: CommitSpec = CommitSpec()
    failures: FailuresSpec = FailuresSpec()
    storage: StorageSpec = StorageSpec()
