"""A lake on a disk, labels in it, and nights over it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.specs import StorageSpec
from tests.lake.conftest import add_labels

if TYPE_CHECKING:
    from tests.relabel.nights import Nights

__all__ = ["add_labels"]


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageSpec())


@pytest.fixture
def table(tmp_path: Path, storage: Storage) -> LabelsTable:
    return LabelsTable.open_or_create(storage.normalize(str(tmp_path / "lake")), storage)


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    from tests.relabel.nights import Nights  # brings Ray along

    return Nights(tmp_path, monkeypatch)
