"""Weights files of other projects: their tensors by name, read without running anything.

Enters: the bytes of a .pth (torch.save, zip or legacy), a .pkl (Detectron2's model zoo) or a .safetensors;
the bytes say which, not the suffix. Leaves: ForeignWeights. What the names mean is torchvision_format's and
detectron2_format's to say; whether the result fits a config is checked here for both.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from torch import Tensor

from maskrcnn_core.checkpoint import CheckpointError
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.restricted_pickle import (
    PickledArray,
    PickledDict,
    RefusedPickleError,
    load_plain_pickle,
)

# A ResNet-101 Mask R-CNN with its optimizer's momentum has 0.5 GB.
MAX_FILE_BYTES = 4 << 30
# First bytes of torch.save before 1.6: a pickled number, then the weights in a second pickle.
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# Where training loops put the weights in a checkpoint that holds more.
_WRAPPERS = ("model", "state_dict", "model_state_dict")


@dataclass(frozen=True)
class ForeignWeights:
    """A file opened.

    tensors: on the CPU, in the type they were stored in.
    versions: module path -> version of its layout, where the file says (PyTorch's `_metadata`).
    container: "torch", "pickle" or "safetensors".
    sha256, md5: of the whole file, in hex. torchvision names its files by the one, Detectron2 by the other.
    """

    tensors: Mapping[str, Tensor]
    versions: Mapping[str, int]
    container: str
    sha256: str
    md5: str

    @property
    def format(self) -> str | None:
        """Whose names these are: "torchvision", "detectron2", or None."""
        if any(key.startswith("backbone.bottom_up.") for key in self.tensors):
            return "detectron2"
        return "torchvision" if any(key.startswith("backbone.body.") for key in self.tensors) else None


def read_foreign_weights(data: bytes, where: str) -> ForeignWeights:
    """Read a file's bytes.

    Args:
        where: path or URI, for messages.

    Raises:
        CheckpointError: no such file, damaged, or it holds anything but tensors and plain containers. Nothing
            in it was run.
    """
    if len(data) > MAX_FILE_BYTES:
        raise CheckpointError(f"{where} has {len(data)} bytes; wanted at most {MAX_FILE_BYTES}.")
    if data.startswith((b"PK\x03\x04", _LEGACY_TORCH)):
        container, loaded = "torch", _load_torch(data, where)
    elif _is_safetensors(data):
        container, loaded = "safetensors", _load_safetensors(data, where)
    elif data.startswith(b"\x80"):
        container, loaded = "pickle", _load_pickle(data, where)
    else:
        raise CheckpointError(
            f"{where} is none of: .pth of torch.save, .pkl of Detectron2, .safetensors; its first bytes are "
            f"{data[:8].hex(' ') or 'missing'}."
        )
    state = _find_state(loaded, where)
    tensors = _without_prefix({key: _to_tensor(key, value, where) for key, value in state.items()})
    if sum(t.numel() * t.element_size() for t in tensors.values()) > 4 * len(data) + 4096:
        raise CheckpointError(
            f"{where} describes tensors that are larger than the file; it was made to harm."
        )
    return ForeignWeights(
        tensors,
        _versions(state),
        container,
        hashlib.sha256(data).hexdigest(),
        hashlib.md5(data, usedforsecurity=False).hexdigest(),
    )


def wanted_tensors(config: MaskRCNNConfig) -> dict[str, Tensor]:
    """The state dict of MaskRCNN(config), shapes without memory."""
    with torch.device("meta"):
        return dict(MaskRCNN(config).state_dict())


def check_fit(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    config: MaskRCNNConfig,
    names: Mapping[str, str] | None = None,
) -> None:
    """Refuse a state dict that would not load strictly.

    Args:
        names: our key -> the file's, for messages; the same where it is absent.

    Raises:
        CheckpointError: keys are missing, unexpected, or of another shape; ten of a kind are listed.
    """
    names = names or {}
    missing = [names.get(key, key) for key in wanted if key not in state]
    unexpected = [names.get(key, key) for key in state if key not in wanted]
    misshapen = [
        f"{names.get(key, key)} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:10])}{', …' if len(keys) > 10 else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"the weights do not fit a {config.backbone} Mask R-CNN with {config.num_classes} classes "
            f"(background included); {'; '.join(problems)}."
        )


def _load_torch(data: bytes, where: str) -> Any:
    _refuse_compression(data, where)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged in any way, or hostile: PyTorch's own reader refuses in many voices
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {asked[1]}" if asked else str(error).split(". ")[0][:200]
        raise CheckpointError(
            f"{where} is refused by torch.load(weights_only=True): {why}. Nothing of it was run; if you "
            "trust it, save the weights alone with torch.save(model.state_dict(), …)."
        ) from error


def _refuse_compression(data: bytes, where: str) -> None:
    """torch.save never compresses; a member that unpacks to more than it is would fill the memory."""
    if not data.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{where} is a damaged .pth: {error}.") from error
    if unpacked > len(data):
        raise CheckpointError(f"{where} is a compressed archive; torch.save does not make such files.")


def _is_safetensors(data: bytes) -> bool:
    if len(data) < 9:
        return False
    (length,) = struct.unpack("<Q", data[:8])
    return bool(length <= len(data) - 8) and data[8:9] == b"{"


def _load_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors_load(data)
    except (SafetensorError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{where} is a damaged .safetensors: {error}.") from error


def _load_pickle(data: bytes, where: str) -> Any:
    try:
        return load_plain_pickle(data)
    except RefusedPickleError as error:
        raise CheckpointError(f"{where} is refused: {error}") from error


def _find_state(loaded: Any, where: str) -> Mapping[Any, Any]:
    """The mapping of names to tensors, in a checkpoint that may hold an optimizer and more."""
    if isinstance(loaded, dict):
        if "blobs" in loaded:
            raise CheckpointError(
                f"{where} is of Detectron (Caffe2), not Detectron2; load it with Detectron2 and save "
                "it there."
            )
        for wrapper in _WRAPPERS:
            if isinstance(loaded.get(wrapper), dict):
                return loaded[wrapper]  # type: ignore[no-any-return]
        if loaded:
            return loaded
    raise CheckpointError(f"{where} holds a {type(loaded).__name__} without weights; wanted a state dict.")


def _to_tensor(key: Any, value: Any, where: str) -> Tensor:
    if type(value) is PickledArray:
        array = value.array
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    if isinstance(value, Tensor):
        if value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized:
            return value.detach()
        raise CheckpointError(
            f"{where}: {str(key)[:100]} is a sparse, quantized or empty tensor; wanted plain."
        )
    raise CheckpointError(
        f"{where} is not a state dict: {str(key)[:100]!r} holds a {type(value).__name__}; wanted "
        "tensors only."
    )


def _without_prefix(tensors: dict[Any, Tensor]) -> dict[str, Tensor]:
    """DistributedDataParallel puts `module.` before every name."""
    names = {str(key): tensor for key, tensor in tensors.items()}
    if names and all(name.startswith("module.") for name in names):
        return {name.removeprefix("module."): tensor for name, tensor in names.items()}
    return names


def _versions(state: Mapping[Any, Any]) -> dict[str, int]:
    attributes = state.attributes if isinstance(state, PickledDict) else getattr(state, "__dict__", {})
    metadata = attributes.get("_metadata")
    if not isinstance(metadata, dict):
        return {}
    return {
        path.removeprefix("module."): about["version"]
        for path, about in metadata.items()
        if isinstance(path, str) and isinstance(about, dict) and isinstance(about.get("version"), int)
    }
