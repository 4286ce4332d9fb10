"""The model that a training run starts from: fresh, on a pretrained backbone, or a checkpoint's.

Enters: the model section of a spec, and the categories of the data. Leaves: a model in training mode, and how
it came to be.

Random weights are trained whole, with batch norm, unless the spec says otherwise: a stage that is frozen
before it has learnt anything, or a norm without statistics, would cripple the network for good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import Checkpoint, CheckpointError, parse_checkpoint
from maskrcnn_core.config import PRESETS, MaskRCNNConfig
from maskrcnn_core.foreign_weights import read_foreign_weights
from maskrcnn_core.model import MaskRCNN, build_model
from schemas.errors import UsageError
from schemas.train_spec import TrainModelSpec

Categories = Sequence[tuple[int, str]]
# Rows of these belong to classes; the number is how many rows a class has.
_CLASS_ROWS = {
    "box_predictor.cls_score": 1,
    "box_predictor.bbox_pred": 4,
    "mask_predictor.mask_fcn_logits": 1,
}
# What state dicts of torchvision's classifiers hold beside the backbone.
_CLASSIFIER = ("fc.", "classifier.", "18.", "features.18.")
_ALL_STAGES = 5
_SHOWN_NAMES = 8


@dataclass(frozen=True)
class Start:
    """A model that has learnt nothing of this run.

    model: in training mode, on the CPU; name: of its checkpoint; origin: of the weights, JSON-able; notes:
    what its user should know of it, a line each.
    """

    model: MaskRCNN
    name: str
    origin: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def start_model(
    spec: TrainModelSpec, categories: Categories, seed: int, storage: Storage, lake_uri: str | None = None
) -> Start:
    """Build it.

    Categories of a checkpoint keep their weights where the data has one of the same name, whatever its case;
    the others' are fresh.

    Raises:
        UsageError: no such file, or it does not fit.
    """
    if spec.uri in PRESETS:
        return _from_preset(spec, categories, seed, storage)
    if spec.backbone is not None or spec.norm is not None:
        what = "backbone" if spec.backbone is not None else "norm"
        raise UsageError(f"model.{what} is for presets ({', '.join(PRESETS)}); {spec.uri} has one of its own")
    data, where = read_checkpoint_bytes(spec.uri, storage, lake_uri)
    try:
        checkpoint = parse_checkpoint(data, where)
        config = _with_changes(checkpoint.config, spec)
        kept = _kept_classes(checkpoint.config.categories, categories)
        model = _with_categories(checkpoint, config.replace(categories=tuple(categories)), kept, seed)
    except (CheckpointError, ValueError) as error:
        raise UsageError(f"model.uri: {error}") from error
    origin = {"checkpoint": checkpoint.name, "fingerprint": checkpoint.fingerprint}
    told = f"{len(kept)} of {len(categories)} categories keep their weights of {spec.uri}"
    if fresh := [name for index, (_, name) in enumerate(categories, 1) if index not in kept]:
        more = f" and {len(fresh) - _SHOWN_NAMES} more" if len(fresh) > _SHOWN_NAMES else ""
        told += f"; fresh ones: {', '.join(fresh[:_SHOWN_NAMES])}{more}"
    return Start(model.train(), spec.name or checkpoint.name, origin, (told,))


def _from_preset(spec: TrainModelSpec, categories: Categories, seed: int, storage: Storage) -> Start:
    config = PRESETS[spec.uri](tuple(categories))
    if spec.backbone is None:
        config = config.replace(
            norm="bn" if config.norm == "frozen_bn" else config.norm, trainable_stages=_ALL_STAGES
        )
    try:
        config = _with_changes(config, spec)
    except ValueError as error:
        raise UsageError(f"model: {error}") from error
    model = build_model(config, seed)
    origin: dict[str, Any] = {"preset": spec.uri, "seed": seed}
    notes: tuple[str, ...] = ()
    if spec.backbone is None:
        notes = (_of_random_weights(config),)
    else:
        data, where = _read(spec.backbone, storage)
        try:
            weights = read_foreign_weights(data, where)
        except ValueError as error:
            raise UsageError(f"model.backbone: {error}") from error
        _load_backbone(model, weights.tensors, where)
        origin["backbone_sha256"] = weights.sha256
    return Start(model.train(), spec.name or spec.uri, origin, notes)


def _of_random_weights(config: MaskRCNNConfig) -> str:
    """What their user should know of them."""
    harm = []
    if config.norm == "frozen_bn":
        harm.append("model.norm frozen_bn has no statistics to freeze, so nothing is normalised")
    if (trained := config.trainable_stages) < _ALL_STAGES:
        harm.append(f"model.trainable_stages {trained} of {_ALL_STAGES} leaves the others random for good")
    how = "; ".join(harm) or f"all stages are trained, with norm {config.norm}"
    return (
        f"{config.preset} starts from random weights: {how}; for a pretrained backbone give its weights, "
        "such as torchvision's, as model.backbone"
    )


def _with_changes(config: MaskRCNNConfig, spec: TrainModelSpec) -> MaskRCNNConfig:
    return config.replace(
        norm=spec.norm,
        trainable_stages=spec.trainable_stages,
        min_size_px=spec.min_size_px,
        max_size_px=spec.max_size_px,
    )


def _read(uri: str, storage: Storage) -> tuple[bytes, str]:
    location = storage.normalize(uri)
    storage.check_reachable(location, "model.backbone")
    return storage.read_bytes(storage.stat(location)), location


def _load_backbone(model: MaskRCNN, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy a classifier's weights into `backbone.body`.

    Raises:
        UsageError: names or shapes are not those of this backbone.
    """
    body = model.backbone.body
    wanted = body.state_dict()
    found = {
        name.removeprefix("features."): value
        for name, value in weights.items()
        if not name.startswith(_CLASSIFIER)
    }
    problems = [f"{name} is missing" for name in wanted if name not in found and not _is_counter(name)]
    problems += [
        f"{name} is not of this backbone" for name in found if name not in wanted and not _is_counter(name)
    ]
    problems += [
        f"{name} is {tuple(found[name].shape)}, wanted {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(
            f"model.backbone: {where} does not fit {model.config.backbone} with norm {model.config.norm}: "
            f"{'; '.join(problems[:3])}{more}"
        )
    body.load_state_dict({name: found.get(name, value) for name, value in wanted.items()})


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # frozen norms have none, and it decides nothing


def _kept_classes(old: Categories, new: Categories) -> dict[int, int]:
    """Class of the new categories -> class of the old one of the same name, for those that have one."""
    class_of = {name.strip().lower(): index for index, (_, name) in enumerate(old, 1)}
    named = ((index, name.strip().lower()) for index, (_, name) in enumerate(new, 1))
    return {index: class_of[name] for index, name in named if name in class_of}


def _with_categories(
    checkpoint: Checkpoint, config: MaskRCNNConfig, kept_classes: Mapping[int, int], seed: int
) -> MaskRCNN:
    """The checkpoint's weights in a model of other categories."""
    old = checkpoint.build()
    if config.categories == old.config.categories:
        model = MaskRCNN(config)
        model.load_state_dict(old.state_dict())
        return model
    model = build_model(config, seed)
    kept = old.state_dict()
    fresh = model.state_dict()
    pairs = [(0, 0), *kept_classes.items()]  # (new class, old class), the background with itself
    for key, rows in ((f"roi_heads.{name}", rows) for name, rows in _CLASS_ROWS.items()):
        if kept[f"{key}.bias"].shape[0] == rows:  # one for all classes
            continue
        for part in ("weight", "bias"):
            value = fresh[f"{key}.{part}"]
            for new, previous in pairs:
                source = kept[f"{key}.{part}"][previous * rows : (previous + 1) * rows]
                value[new * rows : (new + 1) * rows] = source
            kept[f"{key}.{part}"] = value
    model.load_state_dict(kept)
    return model
