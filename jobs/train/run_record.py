"""What a run is, written once when it begins: <out>/run.json. Taking it up again means reading it.

Enters: a spec. Leaves: the record that every start of the same run shares; refuses another run's folder.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jobs.lake.models import is_of_registry
from jobs.lake.storage import MissingObjectError, Storage
from jobs.lake.stores import normalize
from jobs.train.data_files import DataFile
from jobs.train.image_order import ImageOrder
from maskrcnn_core.config import PRESETS
from schemas.errors import UsageError
from schemas.train_spec import TrainSpec, split_version

# Settings that may change between two starts of one run: they do not change what is learnt.
_FREE = ("scaling", "checkpoint", "trackers", "storage", "register_as")
_FORMAT = "masklake-training-run-1"


@dataclass(frozen=True)
class RunRecord:
    """One training run.

    config: of the model, as MaskRCNNConfig.to_dict; name: of its checkpoint; origin: where its first weights
    came from; sets: what it learns from; evaluation: what its AP is measured on, or None.
    """

    run_id: str
    spec_hash: str
    name: str
    config: Mapping[str, Any]
    origin: Mapping[str, Any]
    sets: tuple[DataFile, ...]
    evaluation: DataFile | None

    def to_json(self) -> bytes:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode()

    def image_order(self, seed: int) -> ImageOrder:
        """In which order the images of its sets are learnt from."""
        return ImageOrder([file.num_images for file in self.sets], [file.weight for file in self.sets], seed)

    @classmethod
    def from_json(cls, data: bytes, where: str) -> RunRecord:
        """Raises UsageError: it is no record of ours."""
        try:
            values = json.loads(data)
            if values.pop("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            values["sets"] = tuple(DataFile(**file) for file in values["sets"])
            values["evaluation"] = values["evaluation"] and DataFile(**values["evaluation"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{where} is not a training run of this masklake: {error}") from error


def new_run_id() -> str:
    return f"train-{uuid.uuid4().hex[:12]}"


def spec_hash(spec: TrainSpec) -> str:
    """Of all settings that decide what is learnt, with one spelling of each place."""
    fixed = spec.model_dump(mode="json", exclude=set(_FREE))
    for data in (*fixed["data"].values(), fixed["evaluate"]["data"]):
        if data is not None:
            kind, _, place = data["uri"].partition(":")
            place, version = split_version(place) if kind == "lake" else (place, None)
            data["uri"] = [kind, normalize(place), version]
            data["images"] = data["images"] and normalize(data["images"])
    model = fixed["model"]
    if not (model["uri"] in (*PRESETS, "demo") or is_of_registry(model["uri"])):
        model["uri"] = normalize(model["uri"])
    model["backbone"] = model["backbone"] and normalize(model["backbone"])
    fixed["out"]["uri"] = normalize(fixed["out"]["uri"])
    return hashlib.blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_record(out_uri: str, spec: TrainSpec, storage: Storage) -> RunRecord | None:
    """The run that lives in the folder, None where there is none yet.

    Raises:
        UsageError: it is one of another spec.
    """
    try:
        info = storage.stat(_uri(out_uri))
    except MissingObjectError:
        return None
    record = RunRecord.from_json(storage.read_bytes(info), info.uri)
    if record.spec_hash != spec_hash(spec):
        raise UsageError(
            f"out.uri {out_uri} holds run {record.run_id} of another spec; choose another --out, or run the "
            f"same command as then (only {', '.join(_FREE)} may change)"
        )
    return record


def write_record(out_uri: str, record: RunRecord, storage: Storage) -> None:
    storage.write_bytes(_uri(out_uri), record.to_json())


def _uri(out_uri: str) -> str:
    return f"{out_uri}/run.json"
