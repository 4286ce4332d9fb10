"""The beginning of a run, jobs/train/beginning.py."""

from __future__ import annotations

import pytest

from jobs.lake.storage import Storage
from jobs.train.beginning import begin
from jobs.train.recipe import make_recipe
from jobs.train.run_record import RunRecord
from schemas.train_spec import TrainSpec
from tests.train.conftest import MakeSpec


def begun(spec: TrainSpec) -> tuple[RunRecord, list[str]]:
    """The record and the notes."""
    storage = Storage(spec.storage)
    notes: list[str] = []
    out_uri = storage.normalize(spec.out.uri)
    return begin(spec, make_recipe(spec.recipe), out_uri, storage, notes.append), notes


def test_a_set_may_be_called_evaluation_beside_the_one_that_ap_is_measured_on(make_spec: MakeSpec) -> None:
    data = make_spec().data["scenes"].model_dump()
    spec = make_spec(data={"evaluation": data}, evaluate={"data": data | {"drop_empty": True}})
    record, _ = begun(spec)
    assert record.evaluation is not None
    assert record.sets[0].uri == f"{Storage(spec.storage).normalize(spec.out.uri)}/data/evaluation.arrow"
    assert record.evaluation.uri != record.sets[0].uri


@pytest.mark.parametrize(
    ("sides", "is_told"), [([128], True), ([128, 256], False), ([256, 320], False), ([320], True)]
)
def test_a_model_that_labels_at_another_scale_than_it_learns_at_is_told_of(
    make_spec: MakeSpec, sides: list[int], is_told: bool
) -> None:
    """`lite` labels at 256."""
    _, notes = begun(make_spec(recipe={"shorter_sides": sides}))
    told = [note for note in notes if "model.min_size_px" in note]
    assert len(told) == is_told
    assert any(note.startswith("lite starts from random weights") for note in notes)
