"""Checkpoints: weights, config, categories and provenance in one safetensors file.

Enters: a model, or a file's bytes. Leaves: a file's bytes, or a model. Nothing here can run code from a file:
safetensors holds a JSON header and raw tensors, and no other format is opened.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.model import MaskRCNN

FORMAT = "masklake-1"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself

# Fields that change labels but not what the weights mean; they may be overridden when labelling.
INFERENCE_FIELDS = (
    "score_threshold",
    "nms_threshold",
    "mask_threshold",
    "max_detections",
    "min_size_px",
    "max_size_px",
)


class CheckpointError(ValueError):
    """A file is not a checkpoint of ours, or its weights do not fit its config. One line, with the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A model at rest. `fingerprint` is 64 hex digits over every stored tensor and the config."""

    name: str
    config: MaskRCNNConfig
    weights: Mapping[str, Tensor]
    fingerprint: str
    provenance: Mapping[str, Any]

    def build(self, **overrides: Any) -> MaskRCNN:
        """The model in eval mode, float32, with some inference fields changed (None keeps a field).

        Raises:
            CheckpointError: weights and config do not fit each other; the message names the keys.
            ValueError: an override is out of range.
        """
        model = MaskRCNN(self.config.replace(**overrides))
        wanted = model.state_dict()
        problems = [f"missing {key}" for key in wanted if key not in self.weights]
        problems += [f"unexpected {key}" for key in self.weights if key not in wanted]
        problems += [
            f"{key} is {tuple(self.weights[key].shape)}, wanted {tuple(tensor.shape)}"
            for key, tensor in wanted.items()
            if key in self.weights and self.weights[key].shape != tensor.shape
        ]
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise CheckpointError(
                f"the weights do not fit preset {self.config.preset!r} with {self.config.num_classes} "
                f"classes: {shown}."
            )
        model.load_state_dict(dict(self.weights))  # copies into float32
        if any(not torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
            raise CheckpointError(
                "the weights hold NaN or infinity; labels made with them would mean nothing."
            )
        return model.eval()

    def model_id(self, precision: str, **overrides: Any) -> str:
        """`<name>-<12 hex>`: equal ids mean equal weights and equal label-changing settings."""
        effective = self.config.replace(**overrides)
        settings = {field: getattr(effective, field) for field in INFERENCE_FIELDS} | {"precision": precision}
        digest = hashlib.blake2b(digest_size=6)
        digest.update(self.fingerprint.encode())
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return f"{self.name}-{digest.hexdigest()}"


def dump_checkpoint(
    model: MaskRCNN,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    provenance: Mapping[str, Any] | None = None,
) -> bytes:
    """The file's bytes; floating tensors are stored as `dtype`, those with values beyond its range unchanged.

    Args:
        name: becomes part of model_id: letters, digits, `.`, `_`, `-`.
        provenance: JSON-able facts about how the weights came to be.

    Raises:
        ValueError: the name holds other characters.
    """
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name):
        raise ValueError(f"checkpoint name {name!r}: wanted letters, digits, '.', '_' and '-' only.")
    weights = {key: as_stored(tensor, dtype).contiguous().cpu() for key, tensor in model.state_dict().items()}
    metadata = {
        "masklake.format": FORMAT,
        "masklake.name": name,
        "masklake.config": json.dumps(model.config.to_dict()),
        "masklake.fingerprint": weight_fingerprint(weights, model.config.to_dict()),
        "masklake.provenance": json.dumps(dict(provenance or {})),
    }
    return safetensors_save(weights, metadata)


def as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What dump_checkpoint stores of a tensor."""
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    return stored if bool(torch.isfinite(stored).all()) else tensor


def parse_checkpoint(data: bytes, where: str) -> Checkpoint:
    """Read a file's bytes.

    Args:
        where: path or URI, for messages.

    Raises:
        CheckpointError: not safetensors, no masklake header, or the fingerprint does not match the weights.
    """
    metadata = read_metadata(data, where)
    if metadata.get("masklake.format") != FORMAT:
        raise CheckpointError(
            f"{where} is a safetensors file but not a masklake checkpoint (no '{FORMAT}' header); "
            "save it with maskrcnn_core.checkpoint.dump_checkpoint."
        )
    try:
        stored_config = json.loads(metadata["masklake.config"])
        config = MaskRCNNConfig.from_dict(stored_config)
        weights = safetensors_load(data)
        name, stored = metadata["masklake.name"], metadata["masklake.fingerprint"]
        provenance = json.loads(metadata["masklake.provenance"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{where} is damaged or of a newer version: {error}") from error
    if weight_fingerprint(weights, stored_config) != stored:
        raise CheckpointError(
            f"{where}: the weights do not match their fingerprint; the file was altered or damaged."
        )
    return Checkpoint(name, config, weights, stored, provenance)


def weight_fingerprint(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """BLAKE2b-256 over names, types, shapes and bytes of all tensors and over the config.

    Args:
        config: as it is written in the file: one from before a field existed keeps its fingerprint.
    """
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for key in sorted(weights):
        tensor = weights[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_metadata(data: bytes, where: str) -> dict[str, str]:
    """The `__metadata__` of a safetensors file: 8 bytes little-endian length, then a JSON header."""
    not_safetensors = CheckpointError(
        f"{where} is not a safetensors file; masklake opens no other format (a pickle could run code)."
    )
    if len(data) < 8:
        raise not_safetensors
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise not_safetensors
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (ValueError, AttributeError):
        raise not_safetensors from None
    return {str(key): str(value) for key, value in metadata.items()}
