"""`masklake model export`: a checkpoint of ours for another project, by the suffix of OUT.

A new format is a function from a Checkpoint, its model and the URI of OUT to the files to write, and a line
in _WRITERS.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import torch

from jobs.export.files import SIDECAR_SUFFIX, check_lake, refuse_existing, write_model_file
from jobs.export.sidecar import Sidecar
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import Checkpoint, parse_checkpoint
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.onnx_export import OnnxNotInstalledError, export_onnx
from maskrcnn_core.torchvision_format import TorchvisionTarget, torchvision_target
from schemas.errors import UsageError


@dataclass(frozen=True)
class Exported:
    """files: URIs written; torchvision: what a .pth loads into there, None for other formats."""

    files: list[str]
    fingerprint: str
    torchvision: TorchvisionTarget | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_export(
    source: str, out: str, storage: Storage, force: bool = False, lake_uri: str | None = None
) -> Exported:
    """Convert a checkpoint.

    Args:
        lake_uri: whose registry has the model, where `source` is alias:NAME or registry:NAME@N.

    Raises:
        UsageError: it cannot be read, OUT has no known suffix, or OUT exists. Nothing was written.
    """
    check_lake(source, lake_uri)
    uri = storage.normalize(out)
    write = _WRITERS.get(PurePosixPath(uri).suffix)
    if write is None:
        raise UsageError(f"OUT is {uri}; its suffix chooses the format, one of: {', '.join(_WRITERS)}.")
    with_sidecar = write is _torchvision_files
    refuse_existing([uri, uri + SIDECAR_SUFFIX] if with_sidecar else [uri], storage, force)
    data, where = read_checkpoint_bytes(source, storage, lake_uri)
    try:
        checkpoint = parse_checkpoint(data, where)
        model = checkpoint.build()  # refuses weights that do not fit, or are not finite
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        files = write(checkpoint, model, uri)
    except OnnxNotInstalledError as error:
        raise UsageError(str(error)) from error
    for name, content in files.items():
        write_model_file(name, content, storage, force)
    target = torchvision_target(checkpoint.config) if with_sidecar else None
    return Exported(list(files), checkpoint.fingerprint, target)


def _torchvision_files(checkpoint: Checkpoint, _: MaskRCNN, uri: str) -> dict[str, bytes]:
    """A plain dict of tensors, as they are stored, and beside it what they are."""
    buffer = io.BytesIO()
    torch.save(dict(checkpoint.weights), buffer)
    weights = buffer.getvalue()
    sidecar = Sidecar(
        hashlib.sha256(weights).hexdigest(), checkpoint.name, checkpoint.config, checkpoint.provenance
    )
    return {uri: weights, uri + SIDECAR_SUFFIX: sidecar.to_json()}


def _onnx_files(checkpoint: Checkpoint, model: MaskRCNN, uri: str) -> dict[str, bytes]:
    """One file: its metadata holds config, categories and fingerprint."""
    return {uri: export_onnx(model, fingerprint=checkpoint.fingerprint)}


_WRITERS: dict[str, Callable[[Checkpoint, MaskRCNN, str], dict[str, bytes]]] = {
    ".pth": _torchvision_files,
    ".pt": _torchvision_files,
    ".onnx": _onnx_files,
}
