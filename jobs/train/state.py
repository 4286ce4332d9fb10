"""A training run at rest: everything that going on from a step needs, in one safetensors file.

Enters: model, average, optimiser, step. Leaves: a file's bytes, or the run as it was.

What is drawn at random is drawn from seeds made of the step, so the step is all that is kept of it. Nothing
in the file can run code; its digest tells a whole file from a damaged one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from jobs.train.optimizer import AveragedWeights, trained_names
from maskrcnn_core.checkpoint import read_metadata
from maskrcnn_core.model import MaskRCNN

FORMAT = "masklake-training-1"


class TrainingStateError(ValueError):
    """A file holds no state of this run: damaged, or of another model or optimiser."""


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    step: steps done. best_ap, best_step: of the best evaluation so far, -1 and 0 before the first.
    worse_in_a_row: evaluations since.
    """

    step: int = 0
    best_ap: float = -1.0
    best_step: int = 0
    worse_in_a_row: int = 0


def snapshot(
    model: MaskRCNN, average: AveragedWeights | None, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Copies of all tensors of a run, on the CPU, which later steps do not change."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average/{name}": value for name, value in average.model.state_dict().items()}
    names = trained_names(model)
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer/{names[number]}/{slot}": value
            for slot, value in slots.items()
            if isinstance(value, Tensor)
        }
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def dump_state(tensors: Mapping[str, Tensor], progress: Progress) -> bytes:
    """The file's bytes."""
    metadata = {
        "masklake.format": FORMAT,
        "masklake.progress": json.dumps(asdict(progress)),
        "masklake.digest": _digest(tensors),
    }
    return safetensors_save(dict(tensors), metadata)


def parse_state(data: bytes, where: str) -> tuple[dict[str, Tensor], Progress]:
    """Read a file's bytes.

    Raises:
        TrainingStateError: it is not one of ours, not whole, or its digest differs.
    """
    try:
        metadata = read_metadata(data, where)
        if metadata.get("masklake.format") != FORMAT:
            raise ValueError(f"no {FORMAT!r} header")
        tensors = safetensors_load(data)
        progress = Progress(**json.loads(metadata["masklake.progress"]))
        if metadata["masklake.digest"] != _digest(tensors):
            raise ValueError("its digest differs")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingStateError(f"{where} is not a whole training state: {error}") from error
    return tensors, progress


def restore(
    tensors: Mapping[str, Tensor],
    model: MaskRCNN,
    average: AveragedWeights | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put a snapshot back, in place.

    Raises:
        TrainingStateError: it is of another model, or of another optimiser.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    try:
        model.load_state_dict(parts["model"])
        if average is not None:
            average.model.load_state_dict(parts["average"])
    except RuntimeError as error:
        raise TrainingStateError(f"the training state is of another model: {error}") from error
    numbers = {name: number for number, name in enumerate(trained_names(model))}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    for name, value in parts["optimizer"].items():
        parameter, _, slot = name.rpartition("/")
        if parameter not in numbers:
            raise TrainingStateError(f"the training state has an optimiser's {name}, which is not trained")
        state.setdefault(numbers[parameter], {})[slot] = _laid_out_as(parameters[parameter], value)
    saved = optimizer.state_dict()
    if state and len(state) != len(numbers):
        raise TrainingStateError(f"the training state has {len(state)} parameters of {len(numbers)}")
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """The value in the parameter's memory format: fused optimisers look at memory and not at strides."""
    if value.shape != parameter.shape:
        return value  # a counter
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
