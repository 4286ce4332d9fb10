"""What a model_id of the label table stands for: weights, categories and settings.

Enters: what a run labels with; later a reference: `NAME@N`, `alias:NAME`, a plain model_id. Leaves: a record
that stays what it is, and the model_id that a reference means.

    <lake>/models/ids/<model_id>.json      made once, by the first run that labelled with it

The registry knows weights, the table knows model_ids; this leads from one to the other, and from a label's
category_id to its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final
from urllib.parse import quote

from jobs.lake.aliases import PREFIX, open_version
from jobs.lake.fragments import check_model_id
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import MissingObjectError, Storage
from schemas.errors import StorageError, UsageError

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_FORMAT: Final = "masklake-model-id-1"


@dataclass(frozen=True)
class ModelIdRecord:
    """One model_id, as its file says.

    fingerprint: of weights and config, 64 hex digits, as the registry has it; name: the checkpoint's own;
    settings: the inference settings in force, JSON-able; categories: (category_id, name);
    first_run_id, at: the run that made the record, and when: UTC, ISO 8601.
    """

    model_id: str
    fingerprint: str
    name: str
    precision: str
    settings: Mapping[str, Any]
    categories: tuple[tuple[int, str], ...]
    first_run_id: str
    at: str


def record_model_id(storage: Storage, lake_uri: str, record: ModelIdRecord) -> ModelIdRecord:
    """Write down what a model_id stands for, where that was not done yet. Several may try at once.

    The store's conditional puts must have been probed.

    Returns:
        the record that is there now: this one, or an equal one of an earlier run.

    Raises:
        UsageError: the lake has other weights, categories or settings under this model_id.
        StorageError: the store refused, or the record that is there is damaged.
    """
    check_model_id(record.model_id)
    data = _to_json(record)
    if storage.create_exclusive(_uri(storage, lake_uri, record.model_id), data):
        return record
    there = read_model_id(storage, lake_uri, record.model_id)
    assert there is not None  # records are never deleted
    ours = _parse(data, record.model_id, "this record")  # what JSON makes of it
    different = [field for field in asdict(ours) if getattr(ours, field) != getattr(there, field)]
    different = [field for field in different if field not in ("first_run_id", "at")]
    if different:
        raise UsageError(
            f"model_id {record.model_id} stands for another {different[0]} in the lake {lake_uri} "
            f"({getattr(there, different[0])!r}, got {getattr(ours, different[0])!r}); give the checkpoint "
            f"another name. Nothing was written."
        )
    return there


def read_model_id(storage: Storage, lake_uri: str, model_id: str) -> ModelIdRecord | None:
    """What a model_id stands for; None where no run wrote it down, as those of older versions did not.

    Raises:
        StorageError: the record is damaged, or the store refused.
    """
    uri = _uri(storage, lake_uri, model_id)
    try:
        data = storage.read_bytes(storage.stat(uri))
    except MissingObjectError:
        return None
    return _parse(data, model_id, uri)


def resolve(reference: str, table: LabelsTable, storage: Storage, lake_uri: str) -> str:
    """The model_id that a person means: one that has labels in the table.

    Args:
        reference: a model_id of the table; or `NAME@N` or `alias:NAME` of the lake's registry, which mean the
            model_id with these weights.

    Raises:
        UsageError: there is no such model, it has no labels here, or it has labels by several settings; the
            message says what there is.
        StorageError: a record is damaged, or the store refused.
    """
    labelled = table.model_ids()
    if reference in labelled:
        return reference
    so_far = f"labelled so far: {', '.join(labelled) or 'nothing'}"
    if not reference.startswith(PREFIX) and "@" not in reference:
        raise UsageError(
            f"no model {reference!r} has labels in the table at {table.uri} ({so_far}): give one of them, "
            f"NAME@N or alias:NAME."
        )
    version = open_version(reference, storage, lake_uri)
    model = reference if reference == str(version) else f"{reference} ({version})"
    records = {model_id: read_model_id(storage, lake_uri, model_id) for model_id in labelled}
    found = [record for record in records.values() if record and record.fingerprint == version.fingerprint]
    if len(found) == 1:
        return found[0].model_id
    if found:
        raise UsageError(
            f"{model} labelled with several settings in the table at {table.uri}: {_differences(found)}; "
            f"name one of these model_ids."
        )
    unknown = [model_id for model_id, record in records.items() if record is None]
    hint = (
        f"; the weights of {', '.join(unknown)} were not written down: give the model_id" if unknown else ""
    )
    raise UsageError(f"{model} has no labels in the table at {table.uri} ({so_far}){hint}.")


def check_categories(old: ModelIdRecord, new: ModelIdRecord) -> None:
    """May labels of both models stand in one table? More categories, or fewer, are no contradiction.

    Raises:
        UsageError: a category_id has another name in `new`, or a name another category_id; each is named.
    """
    old_names, new_names = dict(old.categories), dict(new.categories)
    problems = [
        f"category {category_id} was {old_names[category_id]!r} and is {name!r}"
        for category_id, name in new_names.items()
        if old_names.get(category_id, name) != name
    ]
    old_ids, new_ids = _ids_by_name(old), _ids_by_name(new)
    problems += [
        f"{name!r} was category {_list(old_ids[name])} and is {_list(ids)}"
        for name, ids in new_ids.items()
        if name in old_ids and not ids & old_ids[name]
    ]
    if problems:
        raise UsageError(
            f"the categories of {new.model_id} contradict those of {old.model_id}, which this lake has: "
            f"{'; '.join(problems)}. Renumber the checkpoint's, or label into another lake."
        )


def _ids_by_name(record: ModelIdRecord) -> dict[str, set[int]]:
    """Of each name its ids: mostly one, but classes that were never trained may share a name."""
    ids: dict[str, set[int]] = {}
    for category_id, name in record.categories:
        ids.setdefault(name, set()).add(category_id)
    return ids


def _list(ids: set[int]) -> str:
    return ", ".join(map(str, sorted(ids)))


def _differences(records: list[ModelIdRecord]) -> str:
    """The model_ids, each with those of its settings that the others do not share."""
    settings = [{"precision": record.precision, **record.settings} for record in records]
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]
    shown = []
    for record, each in zip(records, settings, strict=True):
        values = ", ".join(f"{name} {each.get(name)}" for name in differing)
        shown.append(f"{record.model_id} ({values})" if values else record.model_id)
    return ", ".join(shown)


def _uri(storage: Storage, lake_uri: str, model_id: str) -> str:
    return f"{storage.normalize(lake_uri)}/models/ids/{quote(model_id, safe='')}.json"


def _to_json(record: ModelIdRecord) -> bytes:
    return json.dumps({"format": _FORMAT, **asdict(record)}, indent=1).encode()


def _parse(data: bytes, model_id: str, where: str) -> ModelIdRecord:
    damage = f"{where} is damaged or of a newer version"
    try:
        values = json.loads(data)
        if values.pop("format") != _FORMAT:
            raise ValueError("another format")
        record = ModelIdRecord(**values)
        categories = tuple((int(category_id), str(name)) for category_id, name in record.categories)
        record = replace(record, categories=categories, settings=dict(record.settings))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{damage}: {error}") from error
    if record.model_id != model_id or not _FINGERPRINT.fullmatch(str(record.fingerprint)):
        raise StorageError(f"{damage}: it says {record.model_id!r} of {record.fingerprint!r}")
    return record
