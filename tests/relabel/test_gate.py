"""Rules against a diff, jobs/relabel/gate.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from jobs.relabel.diff import CategoryDiff, ImageCounts, LabelDiff, ScoreShift
from jobs.relabel.gate import judge, judge_first, measure_ap, raise_if_refused
from schemas.errors import GateRefused, UsageError
from schemas.gate_spec import GateSpec
from schemas.spec_loader import parse_spec
from tests.evaluate.truth import write_truth
from tests.relabel.two_models import NEW, OLD, SOURCE, add_rows, found, label_rows


def counts(**numbers: Any) -> CategoryDiff:
    zero = dict.fromkeys(("old", "new", "kept", "lost", "added", "relabelled", "arrived", "moved"), 0)
    empty: dict[str, Any] = {
        "relabelled_to": {},
        "unreadable": 0,
        "mean_iou": None,
        "iou_histogram": (0,) * 20,
        "score_shift": None,
        "old_sizes": (0, 0, 0),
        "new_sizes": (0, 0, 0),
    }
    return CategoryDiff(**{**zero, **empty, **numbers})


ALL = counts(
    old=100,
    new=110,
    kept=90,
    lost=6,
    added=18,
    relabelled=4,
    arrived=2,
    mean_iou=0.9,
    score_shift=ScoreShift(-0.03, -0.1, 0, 0.1),
)
DIFF = LabelDiff(
    source=SOURCE,
    old_model_id=OLD,
    new_model_id=NEW,
    version=7,
    min_score=0.5,
    match_iou=0.5,
    masks=True,
    images=ImageCounts(compared=10),
    total=ALL,
    categories={1: counts(old=50, new=50, kept=50, mean_iou=1.0), 5: counts(new=3, added=3)},
    names={1: "person", 2: "cat"},
    worst=(),
    seconds=0.0,
)


def spec(**rules: Any) -> GateSpec:
    return parse_spec(GateSpec, {"max_failed": None, **rules}, "gate")


@pytest.mark.parametrize(
    ("rule", "value", "fails_at"),
    [
        ("max_lost", 0.06, 0.05),
        ("max_added", 18 / 110, 0.16),
        ("max_relabelled", 0.04, 0.03),
        ("max_count_drift", 0.1, 0.09),
        ("max_score_drop", 0.03, 0.02),
        ("min_mean_iou", 0.9, 0.91),
    ],
)
def test_a_rule_holds_up_to_its_limit(rule: str, value: float, fails_at: float) -> None:
    (result,) = judge(DIFF, spec(**{rule: value}))
    assert (result.rule, result.limit, result.value, result.passed) == (rule, value, value, True)
    (result,) = judge(DIFF, spec(**{rule: fails_at}))
    assert (result.value, result.passed) == (value, False)


def test_a_refusal_names_each_rule_that_failed_with_value_and_limit() -> None:
    results = judge(DIFF, spec(max_lost="5%", max_added="50%", min_mean_iou=0.95))
    with pytest.raises(GateRefused) as refusal:
        raise_if_refused(results, SOURCE, OLD, NEW)
    text = str(refusal.value)
    assert refusal.value.exit_code == 4
    assert "max_lost is 6%, wanted at most 5% (6 of 100 old objects)" in text
    assert "min_mean_iou is 0.9, wanted at least 0.95" in text
    assert "2 of 3 rules failed" in text
    assert "max_added" not in text
    assert f"stays on {OLD}" in text


def test_without_rules_nothing_is_judged_and_nothing_refused() -> None:
    assert judge(DIFF, spec()) == []
    raise_if_refused([], SOURCE, OLD, NEW)


def test_a_category_has_its_own_numbers_by_name_or_id() -> None:
    rules = {"person": {"max_lost": 0, "min_mean_iou": 0.99}, "5": {"max_lost": 0, "max_added": "50%"}}
    results = {result.rule: result for result in judge(DIFF, spec(categories=rules))}
    assert {rule: (result.value, result.passed) for rule, result in results.items()} == {
        "categories.person.max_lost": (0.0, True),
        "categories.person.min_mean_iou": (1.0, True),
        "categories.5.max_lost": (0.0, True),  # there was none to lose
        "categories.5.max_added": (1.0, False),
    }


def test_a_category_that_neither_model_has_is_a_mistake_in_the_spec() -> None:
    with pytest.raises(UsageError, match=r"category 'dog'; they have: 5, cat, person"):
        judge(DIFF, spec(categories={"dog": {"max_lost": 0}}))
    with pytest.raises(UsageError, match="category '77'"):
        judge(DIFF, spec(categories={77: {"max_lost": 0}}))
    with pytest.raises(UsageError, match="'cat' is the name of 2, 3; give a number"):
        judge(replace(DIFF, names={2: "cat", 3: "cat"}), spec(categories={"cat": {"max_lost": 0}}))


@pytest.mark.parametrize(
    ("diff", "rules", "why"),
    [
        (DIFF, {"categories": {"cat": {"max_lost": 0.5}}}, "neither model found an object"),
        (replace(DIFF, images=ImageCounts(only_new=3)), {"max_lost": 0.5}, "no image has labels of both"),
        (DIFF, {"categories": {5: {"min_mean_iou": 0.5}}}, "the models have no object in common"),
        (DIFF, {"categories": {5: {"max_score_drop": 0.5}}}, "the models have no object in common"),
        (DIFF, {"categories": {5: {"max_count_drift": 9}}}, "the old model found no object"),
    ],
)
def test_a_rule_that_cannot_be_evaluated_does_not_pass(
    diff: LabelDiff, rules: dict[str, Any], why: str
) -> None:
    (result,) = judge(diff, spec(**rules))
    assert (result.value, result.passed) == (None, False)
    with pytest.raises(GateRefused, match=f"cannot be evaluated: {why}"):
        raise_if_refused([result], SOURCE, OLD, NEW)


def test_images_that_fail_under_the_new_model_are_a_share_of_those_that_the_old_one_had() -> None:
    diff = replace(DIFF, images=ImageCounts(compared=97, failed_new=3, failed_old=50, failed_both=50))
    (result,) = judge(diff, GateSpec())
    assert (result.rule, result.value, result.passed) == ("max_failed", 0.03, False)
    assert result.text == "max_failed is 3%, wanted at most 1% (3 of 100 images that the old model had)"
    (result,) = judge(diff, spec(max_failed="3%"))
    assert result.passed
    assert judge(replace(DIFF, images=ImageCounts()), GateSpec())[0].passed


def test_the_first_labels_of_a_source_are_held_against_what_needs_no_others() -> None:
    rules = spec(max_failed="10%", max_lost=0, max_ap_drop=0, min_ap=0.3, annotations=TRUTH)
    failed, low = judge_first(80, 20, rules, ap=0.25)
    assert failed.text == "max_failed is 20%, wanted at most 10% (20 of 100 images of the source)"
    assert (low.rule, low.passed) == ("min_ap", False)
    with pytest.raises(GateRefused, match=r"of new for s .*, 2 of 2 rules failed: .* Nothing is promoted\."):
        raise_if_refused([failed, low], "s", None, "new")
    assert judge_first(0, 0, spec()) == []


TRUTH = "coco:truth.json"


def test_ap_is_held_against_a_minimum_and_against_the_old_one() -> None:
    rules = spec(min_ap=0.35, max_ap_drop=0.02, annotations=TRUTH)
    assert [result.passed for result in judge(DIFF, rules, old_ap=0.375, new_ap=0.359375)] == [True, True]
    low, drop = judge(DIFF, rules, old_ap=0.375, new_ap=0.3)
    assert "min_ap is 0.3, wanted at least 0.35" in low.text
    assert "max_ap_drop is 0.075, wanted at most 0.02 (mask AP was 0.375 and is 0.300)" in drop.text
    assert not low.passed
    assert not drop.passed


def test_an_ap_is_of_one_source_in_the_version_that_was_compared(
    table: LabelsTable, storage: Storage, tmp_path: Path
) -> None:
    box = (4, 4, 40, 40)
    truth = f"coco:{write_truth(tmp_path / 'truth.json', {'a.png': box})}"
    other = label_rows({"a.png": []}, NEW, source="s3://photos/2027")
    add_rows(table, storage, label_rows({"a.png": [found(1, box)]}, NEW), other)
    later = LabelsTable(table.uri, storage)
    add_rows(later, storage, label_rows({"a.png": []}, NEW, at_s=1))
    assert measure_ap(truth, table, storage, SOURCE, NEW) == pytest.approx(1)
    assert measure_ap(truth, table, storage, "s3://photos/2027", NEW) == 0
    assert measure_ap(truth, later, storage, SOURCE, NEW) == 0


def test_an_ap_of_no_objects_does_not_pass() -> None:
    results = judge(DIFF, spec(min_ap=0, max_ap_drop=1, annotations=TRUTH), old_ap=0.3, new_ap=-1.0)
    assert [(result.value, result.passed) for result in results] == [(None, False)] * 2


@pytest.mark.parametrize("rules", [{"min_ap": 0.1}, {"max_ap_drop": 0.1}])
def test_an_ap_that_was_not_measured_is_asked_for(rules: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not measured"):
        judge(DIFF, spec(annotations=TRUTH, **rules))
