"""The rules of a gate, schemas/gate_spec.py."""

from typing import Any

import pytest

from schemas.errors import UsageError
from schemas.gate_spec import CategoryRules, GateSpec
from schemas.spec_loader import parse_spec


def test_no_rule_but_one_of_failures_is_set_by_itself() -> None:
    spec = parse_spec(GateSpec, {}, "gate")
    assert (
        CategoryRules(**{name: getattr(spec, name) for name in CategoryRules.model_fields}) == CategoryRules()
    )
    assert (spec.categories, spec.min_ap, spec.max_ap_drop) == ({}, None, None)
    assert spec.max_failed == 0.01
    assert (spec.min_score, spec.match_iou, spec.compare_masks) == (0.5, 0.5, True)


def test_shares_are_percentages_or_numbers() -> None:
    spec = parse_spec(GateSpec, {"max_lost": "5%", "max_added": 0.1, "max_count_drift": "250 %"}, "gate")
    assert (spec.max_lost, spec.max_added, spec.max_count_drift) == (0.05, 0.1, 2.5)


def test_a_category_goes_by_its_name_or_number() -> None:
    spec = parse_spec(
        GateSpec, {"categories": {"person": {"max_lost": "2%"}, 17: {"min_mean_iou": 0.8}}}, "gate"
    )
    assert spec.categories == {
        "person": CategoryRules(max_lost=0.02),
        "17": CategoryRules(min_mean_iou=0.8),
    }


def test_ap_goes_with_its_ground_truth() -> None:
    spec = parse_spec(GateSpec, {"min_ap": 0.35, "annotations": "coco:s3://b/instances.json"}, "gate")
    assert (spec.min_ap, spec.annotations) == (0.35, "coco:s3://b/instances.json")


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ({"max_lost": "120%"}, "max_lost is 1.2, wanted a share such as 5% or 0.05"),
        ({"max_lost": -0.1}, "max_lost is -0.1, wanted a share such as 5% or 0.05"),
        ({"max_count_drift": "much"}, "wanted a share such as 20% or 0.2, 0 or more"),
        ({"max_loss": 0.1}, "max_loss is not a known key (did you mean max_lost?)"),
        ({"match_iou": 0}, "match_iou is 0, wanted a number above 0, at most 1"),
        ({"min_ap": 0.3}, "min_ap cannot be evaluated without annotations"),
        (
            {"max_ap_drop": 0.1, "min_ap": 0.3},
            "min_ap and max_ap_drop cannot be evaluated without annotations",
        ),
        ({"min_ap": 0.3, "annotations": "truth.json"}, "annotations is no ground truth, wanted coco:URI"),
        ({"annotations": "coco:s3://key:secret@b/x.json"}, "holds credentials"),
        ({"categories": {"person": {}}}, "categories person have no rule"),
        ({"categories": {"person": {"min_ap": 0.3}}}, "categories.person.min_ap is not a known key"),
        ({"categories": ["person"]}, "wanted categories, each with its rules"),
    ],
)
def test_a_wrong_rule_is_named(rules: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_spec(GateSpec, rules, "gate")
    assert problem in str(error.value)
    assert "secret" not in str(error.value)
