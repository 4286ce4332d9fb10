"""`masklake model inspect`: what a model file holds, ours or not, without running or changing anything.

Enters: a path or URI, or a model of a lake's registry. Leaves: a report of plain values, for JSON and for a
table.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from jobs.export.files import SIDECAR_SUFFIX, check_lake, is_checkpoint, read_model_file, read_sidecar_bytes
from jobs.export.sidecar import Sidecar, parse_sidecar
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import parse_checkpoint
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.detectron2_format import fitting_recipes, from_detectron2, num_detectron2_categories
from maskrcnn_core.detectron2_recipes import zoo_recipe
from maskrcnn_core.foreign_weights import ForeignWeights, read_foreign_weights
from maskrcnn_core.torchvision_format import from_torchvision, is_published, num_torchvision_categories
from schemas.errors import UsageError

# Fields of a config that names and shapes of weights show.
_SHOWN = (
    "backbone",
    "norm",
    "norm_eps",
    "fpn_channels",
    "fpn_norm",
    "rpn_convs",
    "box_head",
    "box_head_channels",
    "box_class_agnostic",
    "mask_head_convs",
    "mask_head_norm",
    "mask_class_agnostic",
)


def run_inspect(source: str, storage: Storage, lake_uri: str | None = None) -> dict[str, Any]:
    """Plain values, in the order to show them.

    Args:
        lake_uri: whose registry has the model, where `source` is alias:NAME or registry:NAME@N.

    Raises:
        UsageError: there is no such file, alias or version, or nothing in it can be a model.
    """
    check_lake(source, lake_uri)
    data, where = read_model_file(source, storage, lake_uri)
    report: dict[str, Any] = {
        "file": where,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        if is_checkpoint(data):
            return report | _report_checkpoint(data, where)
        return report | _report_foreign(read_foreign_weights(data, where), where, storage)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _report_checkpoint(data: bytes, where: str) -> dict[str, Any]:
    checkpoint = parse_checkpoint(data, where)
    return {
        "format": "masklake",
        "name": checkpoint.name,
        "preset": checkpoint.config.preset,
        "num_parameters": count_parameters(checkpoint.weights),
        "dtype": _dtypes(checkpoint.weights),
        "fingerprint": checkpoint.fingerprint,
        "model_id": {precision: checkpoint.model_id(precision) for precision in ("fp32", "bf16", "fp16")},
        "categories": [list(category) for category in checkpoint.config.categories],
        "config": _without_categories(checkpoint.config),
        "provenance": dict(checkpoint.provenance),
    }


def _report_foreign(weights: ForeignWeights, where: str, storage: Storage) -> dict[str, Any]:
    tensors = weights.tensors
    report: dict[str, Any] = {
        "format": weights.format or "unknown",
        "container": weights.container,
        "num_parameters": count_parameters(tensors),
        "dtype": _dtypes(tensors),
        "num_tensors": len(tensors),
    }
    if weights.format is None:
        first = next(iter(tensors), "missing")
        return report | {"problem": f"names of nobody we know; the first is {first!r}"}
    try:
        sidecar = _find_sidecar(weights, where, storage)
        if sidecar is not None:
            return report | _report_sidecar(sidecar, where)
        if weights.format == "detectron2":
            return report | _report_detectron2(weights)
        return report | _report_torchvision(weights)
    except (ValueError, UsageError) as error:
        return report | {"problem": str(error)}


def _find_sidecar(weights: ForeignWeights, where: str, storage: Storage) -> Sidecar | None:
    data = read_sidecar_bytes(where, storage)
    return None if data is None else parse_sidecar(data, weights.sha256, where + SIDECAR_SUFFIX)


def _report_sidecar(sidecar: Sidecar, where: str) -> dict[str, Any]:
    return {
        "sidecar": where + SIDECAR_SUFFIX,
        "name": sidecar.name,
        "preset": sidecar.config.preset,
        "categories": [list(category) for category in sidecar.config.categories],
        "config": _without_categories(sidecar.config),
        "provenance": dict(sidecar.provenance),
    }


def _report_torchvision(weights: ForeignWeights) -> dict[str, Any]:
    num = num_torchvision_categories(weights.tensors)
    config, _ = from_torchvision(weights.tensors, _placeholders(num), sha256=weights.sha256)
    return {
        "published": is_published(weights.sha256),
        "num_categories": num,
        "preset": config.preset,
        "layers": _shown(config),
    }


def _report_detectron2(weights: ForeignWeights) -> dict[str, Any]:
    num = num_detectron2_categories(weights.tensors)
    published, recipes = zoo_recipe(weights.md5), fitting_recipes(weights.tensors)
    report: dict[str, Any] = {"published": published is not None, "num_categories": num, "recipes": recipes}
    if not recipes:
        return report | {"problem": "its layers are of no recipe"}
    config, _ = from_detectron2(weights.tensors, published or recipes[0], _placeholders(num))
    return report | {"preset": config.preset, "layers": _shown(config)}


def count_parameters(tensors: Mapping[str, Tensor]) -> int:
    """Numbers that training sets: everything but the running statistics of norms, and buffers of pixels."""
    left_out = ("running_mean", "running_var", "pixel_mean", "pixel_std")
    return sum(
        tensor.numel()
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and not key.endswith(left_out) and "cell_anchors" not in key
    )


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    counts = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point())
    return ", ".join(sorted(counts))


def _placeholders(num: int) -> tuple[tuple[int, str], ...]:
    return tuple((i, "") for i in range(1, num + 1))


def _shown(config: MaskRCNNConfig) -> dict[str, Any]:
    return {field: getattr(config, field) for field in _SHOWN}


def _without_categories(config: MaskRCNNConfig) -> dict[str, Any]:
    return {field: value for field, value in config.to_dict().items() if field != "categories"}
