"""What `masklake relabel` is asked to do: the sections of InferSpec, and those of a night's work."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from schemas.gate_spec import GateSpec, Share
from schemas.spec_fields import Count, Duration, Flag, Name, Section
from schemas.spec_problems import Wanted
from schemas.specs import (
    CommitSpec,
    FailuresSpec,
    InferSpec,
    LakeSpec,
    ModelSpec,
    PoolSpec,
    SourceSpec,
    StorageSpec,
    UnitSpec,
)

Globs = Annotated[tuple[Name, ...], Wanted("a list of globs on image ids")]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False), Wanted("a number, 0 or more")]


class BudgetSpec(Section):
    """How much one run may do; it ends after a commit, and the next run goes on."""

    time_s: Duration | None = Field(default=None, description="such as 4h; null: until all is done")
    max_images: Count | None = Field(default=None, description="images labelled; null: all")
    max_removed: Share = Field(
        default=0.5,
        description="share of 100 labelled images or more that may be gone from the source",
    )


class OrderSpec(Section):
    """What is labelled first: new images, changed ones, failures, then stale ones, the newest first."""

    first: Globs = Field(
        default=(), description="globs on image_id (tar and Parquet: on the shard), before all"
    )
    uncertain_first: Flag = Field(
        default=False, description="among stale labels those whose best score is nearest to 0.5"
    )


class PriceSpec(Section):
    """What `masklake plan` reckons with."""

    per_hour: Price = Field(default=0.0, description="of one actor: a GPU, or the cores of a CPU actor")
    currency: Name = "USD"


class RelabelSpec(Section):
    """`masklake relabel`: keep a lake's labels up to its source and its model, and publish what passes."""

    source: SourceSpec
    model: ModelSpec
    lake: LakeSpec
    unit: UnitSpec = UnitSpec()
    pool: PoolSpec = PoolSpec()
    commit: CommitSpec = CommitSpec()
    failures: FailuresSpec = FailuresSpec()
    storage: StorageSpec = StorageSpec()
    budget: BudgetSpec = BudgetSpec()
    order: OrderSpec = OrderSpec()
    keep_current: Flag = Field(
        default=True, description="until the new model is promoted, label new images with the current one too"
    )
    gate: GateSpec = GateSpec()
    promote: Literal["auto", "never"] = Field(
        default="auto", description="auto: once every image is labelled and the gate is passed"
    )
    price: PriceSpec = PriceSpec()

    @model_validator(mode="before")
    @classmethod
    def _says_order(cls, values: Any) -> Any:
        if isinstance(values, dict) and "priority" in values:
            raise ValueError(
                "priority is not a known key; what is labelled first stands in order: "
                "{first: [GLOB, …], uncertain_first: true}"
            )
        return values

    @model_validator(mode="after")
    def _is_about_every_image(self) -> "RelabelSpec":
        if self.failures.retry_only:
            raise ValueError(
                "failures.retry_only leaves images out, which a relabel does not: unset it, or use "
                "`masklake infer`"
            )
        return self

    def infer_spec(self, model: ModelSpec | None = None) -> InferSpec:
        """The part that labels, with this model or another."""
        return InferSpec(
            source=self.source,
            model=model or self.model,
            lake=self.lake,
            unit=self.unit,
            pool=self.pool,
            commit=self.commit,
            failures=self.failures,
            storage=self.storage,
        )
