"""A lake on a disk, and labels in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.specs import StorageSpec
from tests.lake.conftest import add_labels

__all__ = ["add_labels"]


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageSpec())


@pytest.fixture
def table(tmp_path: Path, storage: Storage) -> LabelsTable:
    return LabelsTable.open_or_create(storage.normalize(str(tmp_path / "lake")), storage)
