"""What a night consists of, jobs/relabel/night.py: which models label, and what is refused before they do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.relabel import night as night_module
from jobs.relabel.night import Night
from schemas.errors import UsageError
from tests.chaos.harness import make_source
from tests.evaluate.truth import write_truth
from tests.relabel.nights import Nights


def labels_of(night: Night) -> list[str]:
    return [part.job.model_id for part in night.passes]


def test_without_a_table_the_model_labels_all(nights: Nights) -> None:
    nights.put(a="1")
    m1 = nights.choose(nights.register("m1"))
    night = nights.plan()
    assert labels_of(night) == [nights.model_id(m1)]
    assert (night.current, night.is_promoted, night.rolled_back, night.notes) == (None, False, None, [])


def test_until_a_new_model_is_promoted_the_current_one_labels_first(nights: Nights) -> None:
    nights.put(a="1")
    m1, m2 = nights.register("m1"), nights.choose(nights.register("m2"))
    nights.given(m1)
    nights.promote(m1)
    night = nights.plan()
    assert labels_of(night) == [nights.model_id(m1), nights.model_id(m2)]
    assert [part.current_id for part in night.passes] == [None, nights.model_id(m1)]
    assert (night.current, night.is_promoted, night.unlabelled) == (nights.model_id(m1), True, None)
    nights.choose(m1)
    assert labels_of(nights.plan()) == [nights.model_id(m1)]


def test_a_current_model_that_nobody_promoted_is_found_by_its_weights(nights: Nights) -> None:
    nights.put(a="1")
    m1, m2 = nights.register("m1"), nights.choose(nights.register("m2"))
    nights.given(m1)
    night = nights.plan()
    assert labels_of(night) == [nights.model_id(m1), nights.model_id(m2)]
    assert (night.current, night.is_promoted, night.notes) == (nights.model_id(m1), False, [])
    assert str(night.passes[0].job.model) == "m1@1"


def test_who_does_not_want_the_current_model_kept_has_one_pass(nights: Nights) -> None:
    nights.put(a="1")
    m1, m2 = nights.register("m1"), nights.choose(nights.register("m2"))
    nights.given(m1)
    night = nights.plan("keep_current=false")
    assert labels_of(night) == [nights.model_id(m2)]
    assert (night.unlabelled, night.notes) == (nights.model_id(m1), [])


@pytest.mark.parametrize(
    ("lost", "is_promoted"), [("version", True), ("version", False), ("weights", True), ("damaged", True)]
)
def test_a_current_model_that_is_not_to_be_had_labels_nothing(
    lost: str, is_promoted: bool, nights: Nights
) -> None:
    nights.put(a="1")
    m1, m2 = nights.register("m1"), nights.choose(nights.register("m2"))
    nights.given(m1)
    if is_promoted:
        nights.promote(m1)
    weights = Path(nights.registry.weights_uri(m1).removeprefix("file://"))
    if lost == "damaged":
        weights.write_bytes(b"?" * weights.stat().st_size)
    else:
        (weights if lost == "weights" else weights.parents[1] / "m1" / "1.json").unlink()
    night = nights.plan()
    assert (labels_of(night), night.unlabelled) == ([nights.model_id(m2)], nights.model_id(m1))
    (note,) = night.notes
    assert note.startswith(f"until {nights.model_id(m2)} is promoted, new images get no labels of")
    why = {
        "version": "not in the lake's registry",
        "weights": "m1@1 are gone",
        "damaged": "not what m1@1 was",
    }
    assert why[lost] in note


def test_a_model_that_was_rolled_back_is_known_until_somebody_promotes_it_again(nights: Nights) -> None:
    nights.put(a="1")
    m1, m2 = nights.register("m1"), nights.choose(nights.register("m2"))
    nights.given(m1)
    nights.given(m2)
    nights.promote(m1)
    nights.promote(m2)
    assert nights.plan().rolled_back is None
    nights.rollback()
    night = nights.plan()
    assert night.rolled_back is not None
    assert night.rolled_back.startswith("ana, 20")
    assert [part.job.model_id for part in night.passes] == [nights.model_id(m1)]
    assert "m2@1 was rolled back (ana, 20" in night.notes[-1]
    assert nights.plan("keep_current=false").passes == []
    nights.choose(m1)
    assert nights.plan().rolled_back is None
    nights.choose(m2)
    nights.promote(m2)
    assert nights.plan().rolled_back is None


def test_a_model_stays_rolled_back_when_the_one_before_it_is_rolled_back_too(nights: Nights) -> None:
    nights.put(a="1")
    m1, m2, m3 = (nights.register(name) for name in ("m1", "m2", "m3"))
    for model in (m1, m2, m3):
        nights.given(model)
        nights.promote(model)
    nights.rollback()
    nights.rollback()
    for model in (m2, m3):
        nights.choose(model)
        assert nights.plan().rolled_back is not None
    nights.promote(m2)
    assert nights.plan().rolled_back is not None  # m3's
    nights.choose(m2)
    assert nights.plan().rolled_back is None


def test_a_clock_behind_the_table_is_refused_and_a_moment_is_waited_for(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.put(a="1")
    m1 = nights.choose(nights.register("m1"))
    slept: list[float] = []
    monkeypatch.setattr(night_module, "time", SimpleNamespace(sleep=slept.append))
    nights.given(m1, at=datetime.now(UTC) + timedelta(seconds=3))
    nights.plan()
    assert 0 < slept[0] <= 3
    nights.given(m1, at=datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(UsageError, match=r"clock is 3,\d+ s behind the table.*set the clock right"):
        nights.plan()


def test_categories_that_contradict_the_current_labels_are_refused(nights: Nights) -> None:
    nights.put(a="1")
    nights.given(nights.register("m1", categories=[(1, "door"), (2, "window")]))
    nights.choose(nights.register("m2", categories=[(1, "window")]))
    with pytest.raises(UsageError, match="category 1 was 'door' and is 'window'"):
        nights.plan()
    nights.choose(nights.register("m3", categories=[(1, "door"), (3, "roof")]))
    assert len(nights.plan().passes) == 2


def test_of_shards_the_images_that_the_current_model_knows_are_held_against_annotations(
    nights: Nights, tmp_path: Path
) -> None:
    """Two of one name would fail at the gate; those of a shard that is gone by now do not count."""
    for name, content in make_source("tar", {"x/a.jpg": b"1", "y/a.jpg": b"2"}).items():
        (nights.source / name).write_bytes(content)
    nights.choose(nights.register("m1"))
    nights.night()
    nights.choose(nights.register("m2"))
    setting = f"gate.annotations=coco:{write_truth(tmp_path / 'truth.json', {'a.jpg': (2, 2, 6, 6)})}"
    with pytest.raises(UsageError, match=r"two images are called 'a': shard-0\.tar/x/a and shard-1\.tar/y/a"):
        nights.night(setting)
    (nights.source / "shard-1.tar").unlink()
    assert nights.night(setting).status == "promoted"


def test_rules_that_could_not_be_evaluated_are_refused_before_anything_is_labelled(nights: Nights) -> None:
    nights.put(a="1")
    m1 = nights.register("m1", categories=[(1, "door"), (2, "window")])
    nights.given(m1)
    nights.choose(nights.register("m2"))
    with pytest.raises(UsageError, match=r"has a category 'roof'; they have: door, window\."):
        nights.plan("gate.categories={roof: {max_lost: 5%}}")
    assert len(nights.plan("gate.categories={window: {max_lost: 5%}, '1': {max_lost: 5%}}").passes) == 2
    nights.choose(m1)  # nothing is compared
    nights.plan("gate.categories={roof: {max_lost: 5%}}")
