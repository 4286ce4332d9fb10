"""A label table names its own files only: a log that points elsewhere is refused, by readers too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.errors import MasklakeError
from schemas.specs import StorageSpec


@pytest.mark.parametrize("path", ["../../secret.parquet", "model_id=m/%2E%2E/%2E%2E/secret.parquet"])
def test_a_file_outside_of_the_table_is_refused(path: str, tmp_path: Path) -> None:
    storage = Storage(StorageSpec())
    LabelsTable.open_or_create(f"{tmp_path}/lake", storage)
    add = {
        "path": path,
        "partitionValues": {"model_id": "m"},
        "size": 1,
        "modificationTime": 0,
        "dataChange": True,
    }
    log = tmp_path / "lake" / "labels" / "_delta_log"
    (log / f"{1:020}.json").write_text(json.dumps({"add": add}) + "\n")
    table = LabelsTable.open(f"{tmp_path}/lake", storage)
    for ask in (table.files, table.paths, table.dataset, table.file_uris):
        with pytest.raises(MasklakeError, match="outside of the table"):
            ask()
