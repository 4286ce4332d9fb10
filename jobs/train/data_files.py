"""The data of a run: sets made once, kept beside the run, and fetched by every worker's machine.

Enters: data sections of a spec. Leaves: an Arrow file each below <out>, the categories, and what each set
holds. The version of a label table is pinned when its set is made, so a run that is taken up again sees the
same rows. A set is never in memory as a whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.lake.labels_table import LabelsTable
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.storage import Storage
from jobs.train.coco_json import CocoJson, read_categories
from jobs.train.image_locations import ImageReader
from jobs.train.label_rows import LabelRows
from jobs.train.readable_images import check_images, told_of_row_groups
from jobs.train.records import Records
from jobs.train.training_set import TrainingSet, build
from maskrcnn_core.checkpoint import CheckpointError, parse_checkpoint
from maskrcnn_core.config import PRESETS
from schemas.errors import UsageError
from schemas.specs import SourceSpec
from schemas.train_spec import DataSpec, TrainModelSpec, split_version

Categories = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class DataFile:
    """One set, as it lies in storage.

    fingerprint: of names, sizes and annotations; digest: BLAKE2b of the file; problems: what was left out of
    it, by kind; description: what it was made of, with the label table's version.
    """

    name: str
    uri: str
    fingerprint: str
    digest: str
    num_images: int
    weight: float = 1.0
    problems: Mapping[str, int] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)


def find_categories(
    data: Mapping[str, DataSpec], model: TrainModelSpec, storage: Storage, lake_uri: str | None = None
) -> Categories:
    """(category_id, name) that the model is to know: those of all instances JSONs, or the model's own.

    A label table has ids only; trained on that alone, a checkpoint keeps its categories.

    Raises:
        UsageError: two data sets give one id two names, or only a label table is there and the model is a
            preset, which has no categories.
    """
    found: dict[int, tuple[str, str]] = {}
    for name, spec in data.items():
        if not spec.uri.startswith("coco:"):
            continue
        for category_id, category in read_categories(spec.uri.removeprefix("coco:"), storage):
            known = found.setdefault(category_id, (category, name))
            if known[0] != category:
                raise UsageError(
                    f"category {category_id} is {known[0]!r} in data.{known[1]} and {category!r} in "
                    f"data.{name}; renumber one of them"
                )
    if found:
        return tuple((category_id, found[category_id][0]) for category_id in sorted(found))
    if model.uri in PRESETS:
        raise UsageError(
            f"model.uri {model.uri} is a preset, and a label table does not say what its categories are "
            "called; give the checkpoint that made the labels, or a coco: data set beside it"
        )
    content, where = read_checkpoint_bytes(model.uri, storage, lake_uri)
    try:
        return parse_checkpoint(content, where).config.categories
    except CheckpointError as error:
        raise UsageError(f"model.uri: {error}") from error


def make_data_file(
    name: str,
    spec: DataSpec,
    categories: Categories,
    storage: Storage,
    uri: str,
    *,
    strict: bool,
    note: Callable[[str], None],
) -> DataFile:
    """Build a set, try a few of its images, and put it at `uri`.

    Args:
        note: told what people should know of the set.

    Raises:
        UsageError: there is nothing to learn from, or, if strict, something is wrong with it.
        StorageError: annotations or images cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="masklake-data-") as folder:
        path = Path(folder) / f"{name}.arrow"
        records = _records(spec, storage)
        note(f"preparing the data set {name} …")
        made = build(path, records, categories, storage, strict=strict, drop_empty=spec.drop_empty)
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in made.problems.items())
        note(f"{name}: {len(made):,} images{f'; left out: {left_out}' if left_out else ''}")
        check_images(name, made, ImageReader(storage), strict=strict)
        for told in told_of_row_groups(name, made):
            note(told)
        storage.write_file(uri, path)
        return DataFile(
            name,
            uri,
            made.fingerprint,
            _digest(path),
            len(made),
            spec.weight,
            made.problems,
            dict(made.description),
        )


def fetch_data_file(file: DataFile, folder: Path | None, storage: Storage) -> TrainingSet:
    """The set, from this machine's folder, where the first of its workers put it.

    Args:
        folder: None for the user's own below this machine's TMPDIR.

    Raises:
        UsageError: it is not the file that the run was started with, or the folder is another user's.
        StorageError: it cannot be fetched.
    """
    folder = _own_folder() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    # Two sets with one fingerprint may have their images in other places.
    place = hashlib.blake2b(file.uri.encode(), digest_size=8).hexdigest()
    path = folder / f"{place}-{file.fingerprint}.arrow"
    if not path.exists():
        # Several workers may fetch at once; each gives the name to a whole file.
        with (
            tempfile.NamedTemporaryFile(dir=folder) as local,
            storage.open_verified(storage.stat(file.uri)) as stream,
        ):
            shutil.copyfileobj(stream, local)
            local.flush()
            found = _digest(Path(local.name))
            if found != file.digest:
                raise UsageError(
                    f"{file.uri} is another file than this run was started with, or damaged (its digest is "
                    f"{found}, wanted {file.digest}); choose another --out"
                )
            with suppress(FileExistsError):
                os.link(local.name, path)
    return TrainingSet(path)


def _own_folder() -> Path:
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"masklake-training-sets-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != user:  # whose sets could be anything, by the names of ours
        raise UsageError(f"{folder} belongs to another user; remove it, or set TMPDIR to another folder")
    return folder


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _records(spec: DataSpec, storage: Storage) -> Records:
    kind, _, uri = spec.uri.partition(":")
    images = None if spec.images is None else SourceSpec(uri=spec.images)
    if kind == "coco":
        assert images is not None  # DataSpec sees to it
        return CocoJson(uri, images, storage)
    lake, version = split_version(uri)
    return LabelRows(
        lake,
        storage,
        version=version,
        model_id=spec.model_id or LabelsTable.open(lake, storage, version).choose_model(None),
        min_score=spec.min_score,
        ignore_below=spec.min_score if spec.ignore_below is None else spec.ignore_below,
        images=() if images is None else (images,),
    )
