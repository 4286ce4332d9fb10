"""A lake on a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.specs import StorageSpec


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageSpec())


@pytest.fixture
def lake(tmp_path: Path) -> str:
    return f"file://{tmp_path}/lake"


@pytest.fixture
def table(lake: str, storage: Storage) -> LabelsTable:
    return LabelsTable.open_or_create(lake, storage)
