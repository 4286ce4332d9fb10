import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn

from jobs.lake.storage import Storage
from jobs.train.coco_json import CocoJson
from jobs.train.evaluation import (
    Share,
    evaluate_model,
    ground_truth,
    predict_images,
    predict_share,
    score,
)
from jobs.train.metrics import EvalMetrics, from_json_line
from jobs.train.training_set import build
from jobs.train.workers import Workers
from maskrcnn_core.augment import Annotations
from maskrcnn_core.coco_eval import evaluate_coco
from maskrcnn_core.config import COCO_CATEGORIES, lite
from maskrcnn_core.masks import encode_masks
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.predictor import Detections, Predictor
from schemas.specs import SourceSpec, StorageSpec
from tests.train.rendered_images import (
    RenderedImages,
    demo_model,
    evaluate_as_worker,
    evaluate_rendered,
    png,
)

NUM_IMAGES = 5
ALONE = Workers(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def images() -> RenderedImages:
    return RenderedImages(NUM_IMAGES)


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    return demo_model()


@pytest.fixture(scope="module")
def metrics(images: RenderedImages) -> EvalMetrics:
    return evaluate_rendered(images, ALONE)


def untimed(metrics: EvalMetrics) -> EvalMetrics:
    return replace(metrics, seconds=0.0)


def as_detections(known: Annotations, config_ids: tuple[int, ...]) -> Detections:
    """The annotations as if a network had found them all."""
    return Detections(
        known.height,
        known.width,
        known.boxes,
        np.ones(len(known.boxes), np.float32),
        np.array([config_ids[i - 1] for i in known.class_indices], np.int32),
        known.rles,
        np.zeros(len(known.boxes), np.int32),
    )


def test_the_bundled_checkpoint_finds_most_of_the_shapes_it_knows(metrics: EvalMetrics) -> None:
    assert 0.5 < metrics.segm["AP"] < 1.0
    assert 0.5 < metrics.bbox["AP"] < 1.0
    assert (metrics.step, metrics.num_images, dict(metrics.unreadable)) == (7, NUM_IMAGES, {})
    assert metrics.seconds > 0


def test_ap_is_the_mean_over_the_categories_that_are_there(metrics: EvalMetrics) -> None:
    assert list(metrics.per_category) == ["ellipse", "box", "triangle", "star", "ring"]
    for kind, figures in (("bbox", metrics.bbox), ("segm", metrics.segm)):
        measured = [v[f"{kind}_AP"] for v in metrics.per_category.values() if v[f"{kind}_AP"] >= 0]
        assert figures["AP"] == pytest.approx(np.mean(measured))


def test_the_shares_of_three_workers_score_as_one(
    images: RenderedImages, model: MaskRCNN, metrics: EvalMetrics
) -> None:
    predictor = Predictor(model)
    shares = [
        predict_share(predictor, images, images.read, range(rank, NUM_IMAGES, 3), batch_size=1, num_threads=2)
        for rank in range(3)
    ]
    assert [list(share.detections) for share in shares] == [[0, 3], [1, 4], [2]]
    together = score(shares[::-1], images, model.config, step=7, per_category=True)
    assert together == untimed(metrics)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path: Path, metrics: EvalMetrics) -> None:
    spawn(evaluate_as_worker, (2, NUM_IMAGES, str(tmp_path)), nprocs=2)
    both = [from_json_line((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0] == both[1]
    assert isinstance(both[0], EvalMetrics)
    assert untimed(both[0]) == untimed(metrics)


def test_an_image_that_cannot_be_read_is_counted_and_has_no_detections(model: MaskRCNN) -> None:
    other_size = png(np.zeros((8, 8, 3), np.uint8))
    broken = RenderedImages(5, broken={0: b"", 1: None, 2: b"<html>", 3: other_size})
    share = predict_share(Predictor(model), broken, broken.read, range(5), batch_size=2, num_threads=1)
    assert share.unreadable == {"empty": 1, "missing": 1, "unsupported": 1, "another_size": 1}
    assert [len(share.detections[index].rles) for index in range(4)] == [0, 0, 0, 0]
    assert len(share.detections[4].rles) > 0
    scored = score([share, Share({}, {"empty": 2})], broken, model.config, step=0)
    assert scored.unreadable == {"another_size": 1, "empty": 3, "missing": 1, "unsupported": 1}
    assert scored.num_images == 5
    assert 0 < scored.segm["AP"] < 0.5


def test_no_more_images_are_read_ahead_than_two_windows(model: MaskRCNN) -> None:
    images = RenderedImages(5)
    predicted = predict_images(Predictor(model), images, images.read, range(5), window=1, num_threads=1)
    first = next(predicted)
    assert first.index == 0
    assert first.pixels is not None
    assert images.num_reads <= 2
    assert [image.index for image in predicted] == [1, 2, 3, 4]
    assert images.num_reads == 5


@pytest.mark.parametrize(("max_images", "expected"), [(2, 2), (99, 3), (0, 0)])
def test_at_most_so_many_images_are_evaluated_and_none_gives_figures_of_minus_one(
    max_images: int, expected: int, model: MaskRCNN
) -> None:
    images = RenderedImages(3)
    metrics = evaluate_model(
        model, images, images.read, ALONE, step=1, precision="fp32", max_images=max_images
    )
    assert metrics.num_images == images.num_reads == expected
    assert (metrics.segm["AP"] == -1.0) == (expected == 0)
    assert metrics.per_category == {}


def test_everything_found_has_ap_one_and_what_is_ignored_is_neither_missed_nor_false(
    images: RenderedImages,
) -> None:
    config = lite(((7, "a"), (3, "b"), (9, "c"), (4, "d"), (5, "e")))
    found = {i: as_detections(images.annotations(i), config.category_ids) for i in range(NUM_IMAGES)}
    assert score([Share(found, {})], images, config, step=0).segm["AP"] == pytest.approx(1.0)

    known = images.annotations(0)
    ignored = replace(known, ignored=np.arange(len(known.rles)) == 0)
    partly = RenderedImages(1, known={0: ignored})
    all_found = {0: as_detections(known, config.category_ids)}
    but_first = replace(
        all_found[0],
        boxes=known.boxes[1:],
        scores=all_found[0].scores[1:],
        category_ids=all_found[0].category_ids[1:],
        rles=known.rles[1:],
        areas=all_found[0].areas[1:],
    )
    for detections in (all_found, {0: but_first}):
        assert score([Share(detections, {})], partly, config, step=0).segm["AP"] == pytest.approx(1.0)
    assert score([Share({0: but_first}, {})], images, config, step=0).segm["AP"] < 1.0


def test_ground_truth_has_the_categories_ids_boxes_as_sizes_and_areas_of_masks() -> None:
    mask = np.zeros((4, 6), np.bool_)
    mask[1:3, 2:5] = True
    known = Annotations(
        4,
        6,
        np.array([[2, 1, 5, 3]], np.float32),
        np.array([2], np.int64),
        np.array([True]),
        encode_masks(mask[None]),
    )
    images = RenderedImages(1, known={0: known})
    truth = ground_truth(images, [0], lite(((10, "a"), (20, "b"))))
    assert truth["images"] == [{"id": 0, "height": 4, "width": 6}]
    assert truth["categories"] == [{"id": 10, "name": "a"}, {"id": 20, "name": "b"}]
    (annotation,) = truth["annotations"]
    assert annotation == {
        "id": 1,
        "image_id": 0,
        "category_id": 20,
        "bbox": [2.0, 1.0, 3.0, 2.0],
        "area": 6,
        "iscrowd": 1,
        "segmentation": {"size": [4, 6], "counts": known.rles[0]},
    }


def test_categories_of_one_name_are_told_apart_by_their_ids(images: RenderedImages) -> None:
    config = lite(((1, "sign"), (2, "sign"), (3, "car"), (4, "d"), (5, "e")))
    found = {0: as_detections(images.annotations(0), config.category_ids)}
    scored = score([Share(found, {})], images, config, step=0, per_category=True)
    assert list(scored.per_category)[:3] == ["sign (1)", "sign (2)", "car"]


@pytest.mark.slow
def test_ap_over_a_training_set_is_ap_over_coco_s_own_file(shared_data: Path, tmp_path: Path) -> None:
    storage = Storage(StorageSpec())
    file = shared_data / "coco_photos" / "annotations" / "instances_val2017.json"
    photographs = SourceSpec(uri=str(shared_data / "coco_photos" / "val2017"))
    images = build(
        tmp_path / "set.arrow", CocoJson(str(file), photographs, storage), COCO_CATEGORIES, storage
    )
    config = lite(COCO_CATEGORIES)
    rng = np.random.default_rng(0)
    found: dict[int, Detections] = {}
    for index in range(len(images)):  # some are missed, some are shifted, some are called what they are not
        known = images.annotations(index)
        kept = np.flatnonzero(rng.random(len(known.rles)) < 0.8)
        wrong = rng.random(len(kept)) < 0.15
        called = (known.class_indices[kept] - 1 + wrong) % len(config.categories)
        found[index] = Detections(
            known.height,
            known.width,
            known.boxes[kept] + rng.normal(0, 2, (len(kept), 4)).astype(np.float32),
            np.sort(rng.random(len(kept)).astype(np.float32))[::-1],
            np.array(config.category_ids, np.int32)[called],
            [known.rles[k] for k in kept],
            np.zeros(len(kept), np.int32),
        )
    scored = score([Share(found, {})], images, config, step=0)
    truth = json.loads(file.read_bytes())
    coco_ids = {image["file_name"]: image["id"] for image in truth["images"]}
    by_coco_id = {coco_ids[images.name(index)]: detections for index, detections in found.items()}
    for kind, figures in (("bbox", scored.bbox), ("segm", scored.segm)):
        expected = evaluate_coco(truth, by_coco_id, kind)  # type: ignore[arg-type]
        assert 0.3 < expected["AP"] < 0.7
        assert figures == pytest.approx(expected, abs=1e-3)  # areas are of masks here, of polygons there
