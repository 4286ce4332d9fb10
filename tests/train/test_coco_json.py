"""Instances JSONs: what is taken from them, and each thing that can be wrong with one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from jobs.train.coco_json import CocoJson, pack_polygons, read_categories, unpack_polygons
from jobs.train.records import Problems, Spool
from jobs.train.training_set import build
from maskrcnn_core.masks import decode_rle, encode_masks
from schemas.errors import UsageError
from schemas.specs import SourceSpec
from tests.train.coco_files import (
    CATEGORIES,
    HEIGHT,
    SQUARE,
    WIDTH,
    annotation,
    image,
    make_set,
    picture,
    storage,
    write_files,
    write_json,
)

MASK = np.zeros((HEIGHT, WIDTH), np.bool_)
MASK[3:13, 2:12] = True
RLE = encode_masks(MASK[None])[0].decode()
RUNS = [2 * HEIGHT + 3, *[10, 10] * 9, 10, HEIGHT * WIDTH - 11 * HEIGHT - 13]
SIZE = [HEIGHT, WIDTH]


@pytest.mark.parametrize(
    "segmentation",
    [SQUARE, {"size": SIZE, "counts": RLE}, {"size": SIZE, "counts": RUNS}],
    ids=["polygon", "compressed", "runs"],
)
def test_a_mask_is_the_same_however_it_is_written(tmp_path: Path, segmentation: Any) -> None:
    made = make_set(tmp_path, [image(1)], [annotation(1, segmentation=segmentation)])
    known = made.annotations(0)
    assert (known.height, known.width) == (HEIGHT, WIDTH)
    assert known.boxes.tolist() == [[2, 3, 12, 13]]
    assert known.class_indices.tolist() == [1]
    assert known.ignored.tolist() == [False]
    assert (decode_rle(known.rles[0], HEIGHT, WIDTH) == MASK).all()
    assert made.problems == {}


def test_polygons_are_rasterized_as_by_cocos_own_tools(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = [
        [rng.uniform(1, 19, 2 * n).round(2).tolist() for n in (3, 5, 9)[: k % 3 + 1]] for k in range(30)
    ]
    annotations = [annotation(1, bbox=[0, 0, WIDTH, HEIGHT], segmentation=shape) for shape in shapes]
    made = make_set(tmp_path, [image(1)], annotations)
    wanted = [coco_mask.merge(coco_mask.frPyObjects(shape, HEIGHT, WIDTH))["counts"] for shape in shapes]
    assert made.annotations(0).rles == wanted


def test_crowds_are_ignored_regions(tmp_path: Path) -> None:
    crowd = annotation(1, iscrowd=1, category_id=7, segmentation={"size": SIZE, "counts": RUNS})
    made = make_set(tmp_path, [image(1)], [annotation(1), crowd])
    assert made.annotations(0).ignored.tolist() == [False, True]
    assert made.annotations(0).class_indices.tolist() == [1, 2]


WRONG = {
    "box_without_area": annotation(1, bbox=[2, 3, 10, 0]),
    "box_without_area outside": annotation(1, bbox=[WIDTH, 3, 5, 5]),
    "bad_annotation no box": {"id": 1, "image_id": 1, "category_id": 3},
    "bad_annotation text": annotation(1, bbox="2 3 4 5"),
    "bad_annotation three numbers": annotation(1, bbox=[2, 3, 4]),
    "bad_annotation list": [1, 2],
    "bad_annotation crowd": annotation(1, iscrowd="yes"),
    "bad_annotation segmentation": annotation(1, segmentation="12,13"),
    "mask_of_another_size": annotation(1, segmentation={"size": [WIDTH, HEIGHT], "counts": RLE}),
    "missing_mask": annotation(1, segmentation=[]),
    "missing_mask none": annotation(1, segmentation=None),
    "empty_mask": annotation(1, segmentation={"size": SIZE, "counts": [HEIGHT * WIDTH]}),
    "mask_outside_box": annotation(1, bbox=[20, 3, 5, 5]),
    "bad_polygon": annotation(1, segmentation=[[1.0, 2.0, 3.0, 4.0]]),
    "bad_polygon odd": annotation(1, segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
    "bad_polygon text": annotation(1, segmentation=[["1", "2", "3", "4", "5", "6"]]),
    "bad_polygon far away": annotation(1, segmentation=[[1, 2, 30, 4, 1e6, 9]]),
    "bad_rle": annotation(1, segmentation={"size": SIZE, "counts": RLE[:-2]}),
    "bad_rle characters": annotation(1, segmentation={"size": SIZE, "counts": "no RLE!"}),
    "bad_rle sum": annotation(1, segmentation={"size": SIZE, "counts": [5, 5]}),
    "bad_rle negative": annotation(1, segmentation={"size": SIZE, "counts": [-5, 605]}),
    "bad_rle size": annotation(1, segmentation={"size": HEIGHT, "counts": RLE}),
    "unknown_category": annotation(1, category_id=4),
    "unknown_image": annotation(99),
}


def test_wrong_annotations_are_counted_by_kind_and_left_out(tmp_path: Path) -> None:
    """Each wrong one on an image of its own, beside a good one."""
    cases = [case for case in WRONG if case != "unknown_image"]
    images = [image(number) for number in range(len(cases))]
    wrong = [
        entry | {"image_id": n} if isinstance(entry := WRONG[case], dict) else entry
        for n, case in enumerate(cases)
    ]
    good = [annotation(number) for number in range(len(cases))]
    made = make_set(tmp_path, images, [*wrong, *good, WRONG["unknown_image"]])
    assert made.problems == Counter(case.split()[0] for case in WRONG)
    left = {made.name(k): len(made.annotations(k).rles) for k in range(len(made))}
    assert left == {entry["file_name"]: 1 for entry in images}


def test_of_a_mask_in_parts_only_the_bad_one_is_left_out(tmp_path: Path) -> None:
    made = make_set(tmp_path, [image(1)], [annotation(1, segmentation=[*SQUARE, [1.0, 2.0]])])
    assert made.problems == {"bad_polygon": 1}
    assert (decode_rle(made.annotations(0).rles[0], HEIGHT, WIDTH) == MASK).all()


def test_a_box_is_cut_at_the_borders_of_its_image(tmp_path: Path) -> None:
    made = make_set(tmp_path, [image(1)], [annotation(1, bbox=[-3, -2, 50, 15])])
    assert made.annotations(0).boxes.tolist() == [[0, 0, WIDTH, 13]]
    assert made.problems == {}


def test_wrong_images_are_counted_by_kind_and_left_out(tmp_path: Path) -> None:
    write_files(tmp_path / "images", {f"{n}.png": picture(n) for n in range(1, 9)})
    wrong: list[Any] = [
        {"id": 2},
        image(3, height="20"),
        image(4, width=0),
        image(1, "5.png"),  # an id that stands there before
        image(6, "1.png"),  # a file that stands there before
        image(7, "nowhere.png"),
    ]
    made = make_set(tmp_path, [image(1), *wrong, image(8)], [annotation(1)])
    assert made.problems == {"bad_image": 3, "duplicate_image": 2, "missing_image": 1}
    assert [made.name(k) for k in range(len(made))] == ["1.png", "8.png"]


def test_strict_names_the_first_of_each_kind_and_writes_nothing(tmp_path: Path) -> None:
    wrong = [annotation(1, id=61, bbox=[0, 0, 0, 4]), annotation(1, id=62, bbox=[0, 0, 0, 5])]
    with pytest.raises(UsageError) as caught:
        make_set(tmp_path, [image(1)], [annotation(1), *wrong, annotation(1, category_id=9)], strict=True)
    assert "box_without_area (2): annotation 61: bbox [0, 0, 0, 4]" in str(caught.value)
    assert "unknown_category (1): 1.png: category_id 9" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".arrow"] == []


def test_sections_may_come_in_any_order_and_hold_more(tmp_path: Path) -> None:
    write_files(tmp_path / "images", {"1.png": picture(1)})
    path = tmp_path / "instances.json"
    path.write_text(
        '{"annotations": [{"image_id": 1, "extra": {"a": [1]}, "category_id": 3, "bbox": [2, 3, 10, 10], '
        '"segmentation": [[2, 3, 12, 3, 12, 13, 2, 13]]}], "info": {"images": [{"id": 5}]}, "images": '
        '[{"id": 1, "file_name": "1.png", "height": 20, "width": 30}]}'
    )
    with Spool(tmp_path) as spool:
        problems = Problems()
        CocoJson(str(path), SourceSpec(uri=str(tmp_path)), storage()).read(spool, problems)
    assert problems.counts == {}


def test_categories_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    backwards = [{"id": i, "name": name} for i, name in reversed(CATEGORIES)]
    path = write_json(tmp_path, [image(1)], [], backwards)
    assert read_categories(str(path), storage()) == CATEGORIES


def test_categories_that_bear_other_names_than_the_models_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "images", {"1.png": picture(1)})
    path = write_json(tmp_path, [image(1)], [annotation(1)], [{"id": 3, "name": "chimney"}])
    records = CocoJson(str(path), SourceSpec(uri=str(tmp_path / "images")), storage())
    with pytest.raises(UsageError, match="category_id 3 is 'chimney' in the data and 'window' in the model"):
        build(tmp_path / "set.arrow", records, CATEGORIES, storage())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON"),
        ('{"images": [{"id": 1', "is not JSON"),
        ('{"images": [NaN]}', "is not JSON"),
        ("<html>", "is not JSON"),
        ("[1, 2]", "is not a COCO instances JSON"),
        ('{"images": []}', "is not a COCO instances JSON"),
    ],
)
def test_what_is_no_instances_json_is_refused_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(text)
    with Spool(tmp_path) as spool, pytest.raises(UsageError, match=problem):
        CocoJson(str(path), SourceSpec(uri=str(tmp_path)), storage()).read(spool, Problems())


def test_polygons_come_back_as_they_were_packed() -> None:
    parts = [[1.0, 2.0, 3.0, 4.5, 5.0, 6.0], [0.25] * 8]
    assert [part.tolist() for part in unpack_polygons(pack_polygons(parts))] == parts
