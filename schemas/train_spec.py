"""What `masklake train` is asked to do: frozen models, one per section of the spec file."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict, model_validator

from schemas.spec_fields import (
    Count,
    CountOrAuto,
    CpusOrAuto,
    Duration,
    Flag,
    Fraction,
    Name,
    Seconds,
    Section,
    Uri,
)
from schemas.spec_problems import Wanted
from schemas.specs import StorageSpec

_MODEL_NAME = re.compile(r"[A-Za-z0-9._-]+")


def _check_data_uri(uri: str) -> str:
    kind, separator, rest = uri.partition(":")
    if not separator or kind not in ("coco", "lake") or not rest:
        raise ValueError("is no data set, wanted coco:URI (of an instances JSON) or lake:URI[@VERSION]")
    return uri


def split_version(uri: str) -> tuple[str, int | None]:
    """`s3://bucket/lake@42` -> the lake and 42; without a number the newest, None."""
    match = re.fullmatch(r"(.+)@(\d{1,18})", uri)
    return (match[1], int(match[2])) if match else (uri, None)


def _check_workers(workers: int | str) -> int | str:
    if isinstance(workers, int):
        return workers
    match = re.fullmatch(r"(\d{1,6})\.\.(\d{1,6})", workers)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"is {workers!r}, wanted a whole number, 1 or more, or a range such as 2..8")
    return workers


def _check_name(name: str) -> str:
    if not _MODEL_NAME.fullmatch(name):
        raise ValueError(f"is {name!r}, wanted letters, digits, '.', '_' and '-' only")
    return name


DataUri = Annotated[
    Uri, AfterValidator(_check_data_uri), Wanted("coco:URI or lake:URI[@VERSION]", secret=True)
]
Workers = Annotated[
    Annotated[int, Strict(), Field(ge=1, le=10**6)] | str,
    AfterValidator(_check_workers),
    Wanted("a whole number, 1 or more, or a range such as 2..8"),
]
ModelName = Annotated[str, AfterValidator(_check_name), Wanted("a name")]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False), Wanted("a number, more than 0")]
NotNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False), Wanted("a number, 0 or more")]
CountOrZero = Annotated[int, Strict(), Field(ge=0), Wanted("a whole number, 0 or more")]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63), Wanted("a whole number, 0 or more")]
Stages = Annotated[int, Strict(), Field(ge=0, le=5), Wanted("a whole number from 0 to 5")]
Sides = Annotated[tuple[Count, ...], Field(min_length=1), Wanted("a list of whole numbers, 1 or more")]
Range = Annotated[tuple[Positive, Positive], Wanted("two numbers, more than 0, such as [0.1, 2.0]")]
Milestones = Annotated[tuple[Fraction, ...], Wanted("a list of numbers from 0 to 1, rising")]
Trackers = Annotated[
    tuple[Literal["mlflow", "wandb"], ...], Wanted("a list of mlflow and wandb; TensorBoard is always there")
]


class DataSpec(Section):
    """One set of labelled images: COCO files, or the labels in a lake at one version."""

    uri: DataUri = Field(description="coco:URI of an instances JSON, or lake:URI[@VERSION] of a lake")
    images: Uri | None = Field(
        default=None, description="folder, bucket prefix or shards; lake, null: where its labels say"
    )
    weight: Positive = Field(default=1.0, description="how often its images are drawn, beside other sets")
    drop_empty: Flag = Field(
        default=False, description="leave out images without annotations, which else are all background"
    )
    model_id: Name | None = Field(default=None, description="lake: whose labels; null: the only model's")
    min_score: Fraction = Field(default=0.5, description="lake: detections below it count as background")
    ignore_below: Fraction | None = Field(
        default=None, description="lake: those from min_score to it are neither object nor background"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> "DataSpec":
        if self.uri.startswith("coco:") and self.images is None:
            raise ValueError("images is not set: a COCO JSON does not say where its images are")
        if self.ignore_below is not None and self.ignore_below < self.min_score:
            raise ValueError(f"ignore_below {self.ignore_below} is less than min_score {self.min_score}")
        # Values and not what was written down: a spec that was saved has them all.
        of_lakes = ("model_id", "min_score", "ignore_below")
        changed = [name for name in of_lakes if getattr(self, name) != type(self).model_fields[name].default]
        if self.uri.startswith("coco:") and changed:
            raise ValueError(f"{changed[0]} is for labels of a lake, and this is a COCO JSON: leave it out")
        return self


class TrainModelSpec(Section):
    """What is trained. A setting that is null is what the recipe, the preset or the checkpoint says."""

    uri: Uri = Field(
        description="a preset (r50_fpn, r101_fpn, r50_fpn_v2, lite), or a checkpoint, or alias:NAME"
    )
    backbone: Uri | None = Field(
        default=None,
        description="a preset's backbone weights, a state dict of torchvision (.pth, .safetensors); null: "
        "random ones",
    )
    name: ModelName | None = Field(default=None, description="of the checkpoint; null: the model's own")
    norm: Literal["frozen_bn", "bn", "sync_bn", "gn"] | None = Field(
        default=None,
        description="normalisation of a preset's backbone; null: the preset's, bn for random weights",
    )
    trainable_stages: Stages | None = Field(
        default=None,
        description="stages of the backbone that are trained; null: the preset's, all 5 of random weights",
    )
    min_size_px: Count | None = Field(default=None, description="shorter side when it labels")
    max_size_px: Count | None = Field(default=None, description="longer side when it labels, at most")


class OutSpec(Section):
    """Where the run keeps what it makes: data, checkpoints, model, report."""

    uri: Uri = Field(description="folder or bucket prefix of its own")
    dtype: Literal["fp32", "fp16"] = Field(
        default="fp32", description="of the weights in model.safetensors and last.safetensors"
    )


class RecipeSpec(Section):
    """How it is trained. A setting that is null is what the named recipe says (docs/training.md)."""

    name: Literal["finetune", "paper_1x", "lsj_100ep", "scenes"] = Field(
        default="finetune", description="the recipe that the settings below change"
    )
    steps: Count | None = Field(default=None, description="length of the run")
    total_batch: Count | None = Field(default=None, description="images a step, over all workers")
    accumulate: Count | None = Field(default=None, description="passes a step, for lack of memory")
    optimizer: Literal["sgd", "adamw"] | None = None
    learning_rate: Positive | None = Field(
        default=None, description="at the recipe's own batch; scaled by total_batch"
    )
    weight_decay: NotNegative | None = None
    schedule: Literal["multi_step", "cosine"] | None = None
    milestones: Milestones | None = Field(default=None, description="multi_step: where it falls to a tenth")
    warmup_steps: CountOrZero | None = None
    clip_norm: NotNegative | None = Field(default=None, description="of all gradients; 0: no clipping")
    ema_decay: Fraction | None = Field(default=None, description="of the averaged weights; 0: no average")
    calibration_batches: CountOrZero | None = Field(
        default=None,
        description="the backbone's batch norm is measured anew over so many, for each evaluation; 0: not",
    )
    precision: Literal["fp32", "bf16"] | None = None
    shorter_sides: Sides | None = Field(default=None, description="multi-scale: one of them is drawn")
    max_size_px: Count | None = Field(default=None, description="multi-scale: the longer side, at most")
    scale_jitter: Range | None = Field(default=None, description="large-scale jitter, as shares of canvas_px")
    canvas_px: Count | None = Field(default=None, description="large-scale jitter: side of the square input")
    flip: Fraction | None = Field(default=None, description="probability of a left-right flip")
    copy_paste: Fraction | None = Field(
        default=None, description="probability that another image's objects are pasted"
    )
    compile: Flag | None = Field(default=None, description="torch.compile of the backbone")
    seed: Seed = Field(default=0, description="of fresh weights, the order of images and all sampling")


class ScalingSpec(Section):
    """The workers, each with a replica of the model."""

    num_workers: Workers = Field(default=1, description="a number, or a range such as 2..8 for what there is")
    use_gpu: Flag | Literal["auto"] = Field(default="auto", description="auto: where the cluster has any")
    cpus_per_worker: CpusOrAuto = Field(default="auto", description="auto: sized to the cluster")
    wait_for_nodes_s: Duration | None = Field(
        default=None,
        description="such as 30m: where there is no room for the workers yet, ask for nodes and wait so "
        "long; null: refuse",
    )
    loader_threads: CountOrAuto = Field(default="auto", description="decode and augment ahead, a worker")
    max_failures: CountOrZero = Field(default=8, description="lost workers or nodes after which the run ends")


class CheckpointSpec(Section):
    """How much a killed run may lose."""

    every_s: Seconds = Field(default=300, description="seconds between checkpoints")
    every_steps: Count | None = Field(default=None, description="null: by time alone")
    keep: Count = Field(default=2, description="the last so many")


class EvaluateSpec(Section):
    """When and on what AP is measured."""

    data: DataSpec | None = Field(default=None, description="null: AP is not measured")
    every_steps: Count | None = Field(default=None, description="null: at the end only")
    max_images: Count | None = Field(default=None, description="the first so many; null: all")
    per_category: Flag = False
    patience: Count | None = Field(
        default=None, description="end when so many evaluations in a row bring no better mask AP"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> "EvaluateSpec":
        for name in ("every_steps", "max_images", "patience"):
            if self.data is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is set and data is not: give the set to measure AP on")
        if self.patience is not None and self.every_steps is None:
            raise ValueError("patience is set and every_steps is not: AP would be measured at the end only")
        return self


class RegisterSpec(Section):
    """Where the finished model is registered."""

    name: ModelName | None = Field(default=None, description="null: nowhere")
    lake: Uri | None = Field(default=None, description="null: the lake of the training data")


class TrainSpec(Section):
    """`masklake train`: train a model on COCO files, on the labels of a lake, or on both."""

    data: Annotated[dict[ModelName, DataSpec], Field(min_length=1), Wanted("data sets, each with a name")]
    model: TrainModelSpec
    out: OutSpec
    recipe: RecipeSpec = RecipeSpec()
    scaling: ScalingSpec = ScalingSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    register_as: RegisterSpec = RegisterSpec()
    strict: Flag = Field(default=False, description="wrong annotations end the run before it begins")
    trackers: Trackers = ()
    storage: StorageSpec = StorageSpec()

    @property
    def lake_uri(self) -> str | None:
        """The lake that the run belongs to: where it registers, or that of its data; None: not one."""
        if self.register_as.lake is not None:
            return self.register_as.lake
        lakes = {
            split_version(data.uri.removeprefix("lake:"))[0]
            for data in self.data.values()
            if data.uri.startswith("lake:")
        }
        return lakes.pop() if len(lakes) == 1 else None

    @model_validator(mode="after")
    def _has_a_registry(self) -> "TrainSpec":
        if self.register_as.name is not None and self.lake_uri is None:
            raise ValueError("register_as.lake is not set, and the data are not of one lake: name the lake")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        workers = self.scaling.num_workers
        if isinstance(workers, int):
            return workers, workers
        low, _, high = workers.partition("..")
        return int(low), int(high)
