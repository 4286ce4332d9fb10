"""What new labels must come up to before they count: the rules of a gate, in a section of a spec file."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, model_validator

from schemas.spec_fields import Flag, Fraction, Name, Section, Uri, parse_fraction
from schemas.spec_problems import Wanted


def _check_annotations(uri: str) -> str:
    if not re.match(r"coco:.", uri):
        raise ValueError("is no ground truth, wanted coco:URI of an instances JSON")
    return uri


def _name_ids(categories: Any) -> Any:
    """YAML reads a category_id as a number; a key is a string."""
    if isinstance(categories, dict):
        return {str(key) if type(key) is int else key: value for key, value in categories.items()}
    return categories


Share = Annotated[
    float,
    Strict(),
    Field(ge=0, le=1),
    BeforeValidator(parse_fraction, json_schema_input_type=float | str),
    Wanted("a share such as 5% or 0.05"),
]
Change = Annotated[
    float,
    Strict(),
    Field(ge=0, allow_inf_nan=False),
    BeforeValidator(parse_fraction, json_schema_input_type=float | str),
    Wanted("a share such as 20% or 0.2, 0 or more"),
]
MatchIou = Annotated[float, Strict(), Field(gt=0, le=1), Wanted("a number above 0, at most 1")]
Annotations = Annotated[
    Uri, AfterValidator(_check_annotations), Wanted("coco:URI of an instances JSON", secret=True)
]


class CategoryRules(Section):
    """Limits for the objects of a diff, of all categories or of one. A rule that is null is not asked."""

    max_lost: Share | None = Field(
        default=None, description="share of the old objects that the new model has not"
    )
    max_added: Share | None = Field(
        default=None, description="share of the new objects that the old model had not"
    )
    max_relabelled: Share | None = Field(
        default=None, description="share of the old objects that have another category now"
    )
    max_score_drop: Fraction | None = Field(
        default=None, description="by how much the mean score of objects that both have may fall"
    )
    max_count_drift: Change | None = Field(
        default=None, description="change of the number of objects, up or down, as a share of the old number"
    )
    min_mean_iou: Fraction | None = Field(
        default=None, description="mean IoU of the masks of objects that both have"
    )


class GateSpec(CategoryRules):
    """Rules that decide whether a new model's labels are promoted; all that are set must hold."""

    categories: Annotated[
        dict[Name, CategoryRules], BeforeValidator(_name_ids), Wanted("categories, each with its rules")
    ] = Field(default={}, description="rules for single categories, by name or category_id")
    max_failed: Share | None = Field(
        default=0.01,
        description="share of images that fail under the new model, of those that the old one had; of all, "
        "where no model's labels are current yet",
    )
    annotations: Annotations | None = Field(
        default=None, description="coco:URI of ground truth, for min_ap and max_ap_drop"
    )
    min_ap: Fraction | None = Field(default=None, description="mask AP of the new labels")
    max_ap_drop: Fraction | None = Field(
        default=None, description="by how much mask AP may fall below that of the old labels"
    )
    min_score: Fraction = Field(default=0.5, description="detections below it are no objects")
    match_iou: MatchIou = Field(default=0.5, description="IoU of the boxes of one and the same object")
    compare_masks: Flag = Field(
        default=True, description="false: IoUs of boxes, which are fewer bytes to read"
    )

    @model_validator(mode="after")
    def _has_ground_truth(self) -> "GateSpec":
        rules = [name for name in ("min_ap", "max_ap_drop") if getattr(self, name) is not None]
        if rules and self.annotations is None:
            raise ValueError(
                f"{' and '.join(rules)} cannot be evaluated without annotations: set annotations"
            )
        return self

    @model_validator(mode="after")
    def _has_rules_for_each_category(self) -> "GateSpec":
        empty = [name for name, rules in self.categories.items() if rules == CategoryRules()]
        if empty:
            raise ValueError(f"categories {', '.join(empty)} have no rule: set one, such as max_lost")
        return self
