import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from maskrcnn_core.coco_eval import evaluate_coco
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.model import MaskRCNN, build_model
from maskrcnn_core.predictor import Detections, NonFiniteError, Predictor, resolve_precision


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def predictor(tiny_model: MaskRCNN) -> Predictor:
    return Predictor(tiny_model, batch_size=4)


def test_detections_are_in_pixels_of_the_original(predictor: Predictor, tiny_config: MaskRCNNConfig) -> None:
    (found,) = predictor.predict([noise(120, 200)])
    assert (found.height, found.width) == (120, 200)
    assert len(found.rles) == len(found.scores) > 0
    assert (found.boxes[:, [0, 2]] <= 200).all()
    assert (found.boxes[:, [1, 3]] <= 120).all()
    assert (np.diff(found.scores) <= 0).all()
    assert set(found.category_ids) <= set(tiny_config.category_ids)
    for rle, area in zip(found.rles, found.areas, strict=True):
        mask = coco_mask.decode({"size": [120, 200], "counts": rle})
        assert mask.shape == (120, 200)
        assert mask.sum() == area


def test_an_image_gets_the_same_labels_whatever_it_is_batched_with(predictor: Predictor) -> None:
    images = [noise(120, 200, 1), noise(64, 64, 2), noise(120, 200, 3), noise(200, 90, 4)]
    together = predictor.predict(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = predictor.predict([image])
        assert np.allclose(alone.boxes, found.boxes, atol=1e-3)
        assert np.array_equal(alone.category_ids, found.category_ids)


def test_an_image_that_may_not_be_written_to_is_read(predictor: Predictor) -> None:
    image = noise(64, 64)
    (expected,) = predictor.predict([image])
    image.flags.writeable = False
    assert predictor.predict([image])[0].rles == expected.rles


def test_no_image_gives_no_result(predictor: Predictor) -> None:
    assert predictor.predict([]) == []


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes_are_labelled(predictor: Predictor, height: int, width: int) -> None:
    (found,) = predictor.predict([noise(height, width)])
    assert (found.height, found.width) == (height, width)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_rgb_image_is_refused(predictor: Predictor, image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        predictor.predict([image])


def test_bf16_finds_about_the_same(tiny_model: MaskRCNN, predictor: Predictor) -> None:
    image = noise(120, 200)
    (exact,) = predictor.predict([image])
    (rough,) = Predictor(tiny_model, precision="bf16").predict([image])
    assert len(rough.rles) > 0
    assert rough.scores[0] == pytest.approx(exact.scores[0], abs=0.1)


@pytest.mark.parametrize("name", ["rpn.head.bbox_pred.bias", "roi_heads.mask_predictor.conv5_mask.bias"])
def test_damaged_weights_are_an_error_and_no_label(tiny_config: MaskRCNNConfig, name: str) -> None:
    model = build_model(tiny_config, seed=0)
    model.get_parameter(name).data[:] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        Predictor(model).predict([noise(64, 64)])


def test_common_padding_makes_one_batch_of_many_sizes(tiny_model: MaskRCNN) -> None:
    images = [noise(30 + 12 * i, 160, i) for i in range(6)]
    tight, common = Predictor(tiny_model, batch_size=6), Predictor(tiny_model, batch_size=6, padding="common")
    assert len(tight._micro_batches(images)) > 1
    assert [indices for _, indices in common._micro_batches(images)] == [[0, 1, 2, 3, 4, 5]]
    for image, found in zip(images, common.predict(images), strict=True):
        assert (found.height, found.width) == image.shape[:2]
        assert (found.boxes[:, 3] <= found.height).all()  # nothing is found in the padding


def test_too_few_candidates_are_made_up_for(
    tiny_config: MaskRCNNConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardly any candidate survives the others: the predictor goes on until none is left out."""
    model = build_model(tiny_config.replace(nms_threshold=0.0, score_threshold=0.01), seed=0)
    expected = Predictor(model).predict([noise(120, 200)])[0]
    monkeypatch.setattr("maskrcnn_core.predictor.MAX_CANDIDATES", 2)
    found = Predictor(model).predict([noise(120, 200)])[0]
    assert len(found.scores) > 2
    assert np.array_equal(found.boxes, expected.boxes)
    assert found.rles == expected.rles


def test_fp16_on_a_cpu_is_refused(tiny_model: MaskRCNN) -> None:
    with pytest.raises(ValueError, match="fp16"):
        Predictor(tiny_model, precision="fp16")


def test_auto_precision_is_fp32_on_a_cpu_and_bf16_on_a_gpu() -> None:
    assert resolve_precision("auto", "cpu") == "fp32"
    assert resolve_precision("auto", "cuda") == "bf16"
    assert resolve_precision("fp16", "cuda") == "fp16"


def square(score: float, category_id: int = 1) -> Detections:
    mask = np.zeros((20, 20), dtype=np.uint8, order="F")
    mask[5:15, 5:15] = 1
    rle = coco_mask.encode(mask)["counts"]
    assert isinstance(rle, bytes)
    return Detections(
        20,
        20,
        np.array([[5, 5, 15, 15]], np.float32),
        np.array([score], np.float32),
        np.array([category_id], np.int32),
        [rle],
        np.array([100], np.int32),
    )


@pytest.fixture
def one_square() -> dict[str, list[dict[str, object]]]:
    return {
        "images": [{"id": 1, "height": 20, "width": 20}, {"id": 2, "height": 20, "width": 20}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [5, 5, 10, 10],
                "area": 100,
                "iscrowd": 0,
                "segmentation": {"size": [20, 20], "counts": square(1.0).rles[0].decode()},
            }
        ],
        "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "other"}],
    }


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_perfect_detection_has_ap_one(one_square: dict[str, list[dict[str, object]]], kind: str) -> None:
    assert evaluate_coco(one_square, {1: square(0.9)}, kind)["AP"] == pytest.approx(1.0)  # type: ignore[arg-type]


def test_the_wrong_category_has_ap_zero(one_square: dict[str, list[dict[str, object]]]) -> None:
    assert evaluate_coco(one_square, {1: square(0.9, category_id=2)}, "segm")["AP"] == 0.0


def test_no_detection_at_all_has_ap_zero(one_square: dict[str, list[dict[str, object]]]) -> None:
    none = Detections(
        20,
        20,
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.int32),
        [],
        np.zeros(0, np.int32),
    )
    assert evaluate_coco(one_square, {1: none}, "segm")["AP"] == 0.0


def test_a_truth_that_does_not_belong_to_the_images_is_refused(
    one_square: dict[str, list[dict[str, object]]],
) -> None:
    with pytest.raises(ValueError, match="no annotation"):
        evaluate_coco(one_square, {2: square(0.9)}, "segm")
