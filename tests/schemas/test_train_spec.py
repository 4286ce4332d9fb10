"""The spec of a training run, schemas/train_spec.py."""

from typing import Any

import pytest

from schemas.errors import UsageError
from schemas.spec_loader import json_schema, load_spec, parse_spec
from schemas.train_spec import TrainSpec

LEAST: dict[str, Any] = {
    "data": {"train": {"uri": "coco:a.json", "images": "a/"}},
    "model": {"uri": "lite"},
    "out": {"uri": "run"},
}


def test_the_flags_of_the_command_line_are_enough() -> None:
    spec = load_spec(
        TrainSpec,
        None,
        ["scaling.num_workers=2..8", "recipe.scale_jitter=[0.1, 2]", "data.more.uri=lake:s3://b/lake@42"],
        **{
            "data.train.uri": "coco:a.json",
            "data.train.images": "a/",
            "model.uri": "r50_fpn",
            "out.uri": "run",
            "data.train.min_score": None,
        },
    )
    assert spec.worker_range == (2, 8)
    assert spec.recipe.scale_jitter == (0.1, 2.0)
    assert set(spec.data) == {"train", "more"}
    assert spec.data["train"].min_score == 0.5


def test_a_number_of_workers_is_the_fewest_and_the_most() -> None:
    assert parse_spec(TrainSpec, LEAST | {"scaling": {"num_workers": 3}}, "spec").worker_range == (3, 3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": {}}, "data is {}, wanted data sets, each with a name"),
        ({"data": [1]}, "data is [1], wanted data sets, each with a name"),
        ({"data": {"a": 3}}, "data.a is of type int, wanted a section with the keys uri, images"),
        ({"data": {"a": {"images": "x"}}}, "data.a.uri is not set, wanted coco:URI or lake:URI"),
        ({"data": {"a": {"uri": "a.json"}}}, "data.a.uri is no data set, wanted coco:URI"),
        ({"data": {"a": {"uri": "coco:a.json"}}}, "data.a: images is not set"),
        ({"data": {"a": {"uri": "coco:a.json", "imges": "x"}}}, "(did you mean data.a.images?)"),
        ({"data": {"a b": {"uri": "lake:x"}}}, "data.a b: is 'a b', wanted letters"),
        (
            {"data": {"a": {"uri": "lake:x", "min_score": 0.7, "ignore_below": 0.5}}},
            "data.a: ignore_below 0.5 is less than min_score 0.7",
        ),
        (
            {"data": {"a": {"uri": "coco:a.json", "images": "a", "min_score": 0.7}}},
            "data.a: min_score is for labels of a lake",
        ),
        (
            {"data": {"a": {"uri": "coco:a.json", "images": "a", "model_id": "x-1"}}},
            "data.a: model_id is for labels of a lake",
        ),
        ({"evaluate": {"data": {"uri": "coco:a.json"}}}, "evaluate.data: images is not set"),
        ({"evaluate": {"every_steps": 5}}, "evaluate: every_steps is set and data is not"),
        ({"evaluate": {"patience": 5}}, "evaluate: patience is set and data is not"),
        (
            {"evaluate": {"patience": 5, "data": {"uri": "lake:x"}}},
            "evaluate: patience is set and every_steps is not",
        ),
        ({"scaling": {"num_workers": "8..2"}}, "wanted a whole number, 1 or more, or a range such as 2..8"),
        ({"scaling": {"num_workers": 0}}, "scaling.num_workers is 0"),
        ({"recipe": {"name": "fintune"}}, "recipe.name is 'fintune'"),
        ({"recipe": {"scale_jitter": [0, 2]}}, "recipe.scale_jitter[0] is 0, wanted two numbers"),
        ({"trackers": ["wandbx"]}, "TensorBoard is always there"),
        ({"register_as": {"name": "a b"}}, "register_as.name is 'a b'"),
    ],
)
def test_what_is_wrong_is_said_by_name(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_spec(TrainSpec, LEAST | changes, "spec")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse_spec(TrainSpec, {}, "spec")
    assert [part in str(caught.value) for part in ("data is not set", "model.uri", "out.uri")] == [True] * 3
    assert "--out" in str(caught.value)


def test_its_json_schema_is_exported() -> None:
    assert set(json_schema("train")["properties"]) == set(TrainSpec.model_fields)


def test_a_spec_that_was_saved_whole_is_taken_again() -> None:
    spec = parse_spec(TrainSpec, LEAST, "spec")
    assert parse_spec(TrainSpec, spec.model_dump(mode="json"), "spec.yaml") == spec
