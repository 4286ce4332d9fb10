"""`masklake model import`: weights of another project become a checkpoint of ours.

bytes -> tensors by name -> config + state dict -> a model that loads it -> checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Any

import torch
import yaml
from torch import Tensor

from jobs.export.categories import choose_categories
from jobs.export.files import (
    SIDECAR_SUFFIX,
    is_checkpoint,
    read_model_file,
    read_sidecar_bytes,
    refuse_existing,
    write_model_file,
)
from jobs.export.sidecar import Sidecar, parse_sidecar
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import Checkpoint, dump_checkpoint, parse_checkpoint
from maskrcnn_core.config import MaskRCNNConfig, r50_fpn
from maskrcnn_core.detectron2_format import fitting_recipes, from_detectron2, num_detectron2_categories
from maskrcnn_core.detectron2_recipes import zoo_recipe
from maskrcnn_core.foreign_weights import (
    ForeignWeights,
    check_fit,
    read_foreign_weights,
    wanted_tensors,
)
from maskrcnn_core.torchvision_format import from_torchvision, is_published, num_torchvision_categories
from schemas.errors import UsageError

STORED_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ImportRequest:
    """What the user typed; `settings` are "field=value" of the config."""

    source: str
    out: str
    format: str = "auto"
    recipe: str | None = None
    name: str | None = None
    categories: str | None = None
    settings: Sequence[str] = ()
    force: bool = False


@dataclass(frozen=True)
class Imported:
    """What became of it."""

    out: str
    name: str
    format: str
    recipe: str | None
    preset: str
    categories: int
    dtype: str
    fingerprint: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_import(request: ImportRequest, storage: Storage) -> Imported:
    """Convert a file.

    Raises:
        UsageError: it cannot be read, does not fit, lacks what only the user knows, or OUT exists. Nothing
            was written.
    """
    changes = _parse_settings(request.settings)
    out = storage.normalize(request.out)
    if not out.endswith(".safetensors"):
        raise UsageError(f"OUT is {out}; checkpoints of masklake end in .safetensors.")
    refuse_existing([out], storage, request.force)
    data, where = read_model_file(request.source, storage)
    if is_checkpoint(data):
        raise UsageError(f"{where} is a checkpoint of masklake already; use it as it is.")
    try:
        weights = read_foreign_weights(data, where)
        sidecar = _find_sidecar(request, weights, where, storage)
        if sidecar is not None:
            kind, recipe = "masklake", None
            config, state = _from_sidecar(sidecar, request, weights, where, storage)
        else:
            kind, recipe = _choose(request, weights, where)
            config, state = _convert(request, kind, recipe, weights, where, storage)
        config = config.replace(**changes)
        name = request.name or (sidecar.name if sidecar else _name_of(where))
        _refuse_nan(state, where)
        model = Checkpoint(name, config, state, "", {}).build()
        dtype = _stored_type(state)
        imported = {
            "file": PurePosixPath(where).name,
            "sha256": weights.sha256,
            "format": kind,
            "recipe": recipe,
            "settings": list(request.settings),
        }
        provenance = dict(sidecar.provenance if sidecar else {}) | {"imported": imported}
        checkpoint = dump_checkpoint(model, name, dtype=dtype, provenance=provenance)
    except ValueError as error:  # CheckpointError, or a config or a name that cannot be
        raise UsageError(str(error) if where in str(error) else f"{where}: {error}") from error
    write_model_file(out, checkpoint, storage, request.force)
    fingerprint = parse_checkpoint(checkpoint, out).fingerprint
    return Imported(
        out,
        name,
        kind,
        recipe,
        config.preset,
        len(config.categories),
        str(dtype).removeprefix("torch."),
        fingerprint,
    )


def _refuse_nan(state: Mapping[str, Tensor], where: str) -> None:
    """Frozen norms are buffers, which a checkpoint does not look at when it is built."""
    broken = [k for k, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise UsageError(f"{where} has NaN or infinity in {len(broken)} tensors, first {broken[0]}.")


def _find_sidecar(
    request: ImportRequest, weights: ForeignWeights, where: str, storage: Storage
) -> Sidecar | None:
    """Nothing is looked for where the user says what the file is."""
    if request.format != "auto" or request.recipe is not None:
        return None
    data = read_sidecar_bytes(where, storage)
    return None if data is None else parse_sidecar(data, weights.sha256, where + SIDECAR_SUFFIX)


def _from_sidecar(
    sidecar: Sidecar, request: ImportRequest, weights: ForeignWeights, where: str, storage: Storage
) -> tuple[MaskRCNNConfig, Mapping[str, Tensor]]:
    config = sidecar.config
    if request.categories is not None:
        categories = choose_categories(len(config.categories), request.categories, False, where, storage)
        config = config.replace(categories=categories)
    check_fit(weights.tensors, wanted_tensors(config), config)
    return config, weights.tensors


def _choose(request: ImportRequest, weights: ForeignWeights, where: str) -> tuple[str, str | None]:
    """The format and, for Detectron2, the recipe."""
    kind = weights.format if request.format == "auto" else request.format
    if kind is None:
        raise UsageError(
            f"{where} has neither torchvision's names (backbone.body…) nor Detectron2's "
            f"(backbone.bottom_up…); its first is {next(iter(weights.tensors), 'missing')!r}."
        )
    if kind == "torchvision":
        if request.recipe is not None:
            raise UsageError(f"recipe {request.recipe}: torchvision's weights need none; leave it out.")
        return kind, None
    recipe = request.recipe or zoo_recipe(weights.md5)
    if recipe is None:
        fitting = fitting_recipes(weights.tensors)
        raise UsageError(
            f"{where} is of Detectron2, whose files do not say how pixels come in and where strides are; add "
            + (
                f"--recipe, one of: {', '.join(fitting)}."
                if fitting
                else "--recipe (but none fits its layers)."
            )
        )
    return kind, recipe


def _convert(
    request: ImportRequest,
    kind: str,
    recipe: str | None,
    weights: ForeignWeights,
    where: str,
    storage: Storage,
) -> tuple[MaskRCNNConfig, Mapping[str, Tensor]]:
    if kind == "torchvision":
        num, published = num_torchvision_categories(weights.tensors), is_published(weights.sha256)
        categories = choose_categories(num, request.categories, published, where, storage)
        return from_torchvision(weights.tensors, categories, sha256=weights.sha256)
    num, published = num_detectron2_categories(weights.tensors), zoo_recipe(weights.md5) is not None
    categories = choose_categories(num, request.categories, published, where, storage)
    assert recipe is not None
    return from_detectron2(weights.tensors, recipe, categories, versions=weights.versions)


def _parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Fields of the config from "field=value", each of the type its field has.

    Raises:
        UsageError: there is no such field, or the value is of another type.
    """
    default = r50_fpn()
    known = {field.name for field in fields(default)} - {"categories", "preset"}
    changes: dict[str, Any] = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals or field not in known:
            raise UsageError(f"--set {setting}: wanted FIELD=VALUE with one of {', '.join(sorted(known))}.")
        changes[field] = _value_like(getattr(default, field), text, setting)
    return changes


def _value_like(present: Any, text: str, setting: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if isinstance(present, tuple) and isinstance(value, list) and value:
        return tuple(_value_like(present[0], str(item), setting) for item in value)
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(present):
        raise UsageError(f"--set {setting}: wanted a value like {present!r}.")
    return value


def _name_of(where: str) -> str:
    """The file's stem, in the characters a name may have."""
    stem = PurePosixPath(where).stem
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem)


def _stored_type(state: Mapping[str, Tensor]) -> torch.dtype:
    """The type of all weights, where they have one that we store; else float32."""
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    (only, *others) = types or {torch.float32}
    return only if not others and only in STORED_TYPES else torch.float32
