import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from maskrcnn_core.boxes import (
    IGNORED,
    MAX_LOG_SCALE,
    NEGATIVE,
    clip_boxes,
    decode_deltas,
    encode_deltas,
    has_area,
    match,
    sample_balanced,
    shift_by_label,
)

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
NONE = torch.zeros(0, 4)


def random_boxes(num: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand((num, 2), generator=generator) * 100
    return torch.cat((corner, corner + 1 + torch.rand((num, 2), generator=generator) * 50), dim=1)


def test_deltas_of_a_box_against_itself_are_zero() -> None:
    boxes = random_boxes(5, 0)
    assert torch.allclose(encode_deltas(boxes, boxes, WEIGHTS), torch.zeros(5, 4), atol=1e-6)


def test_deltas_of_a_hand_worked_pair() -> None:
    anchor = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    box = torch.tensor([[5.0, 0.0, 25.0, 20.0]])  # centre (15, 10), twice as wide
    expected = torch.tensor([[1.0, 0.0, math.log(2.0), 0.0]])
    assert torch.allclose(encode_deltas(box, anchor, (1, 1, 1, 1)), expected)


def test_decode_undoes_encode() -> None:
    boxes, anchors = random_boxes(50, 1), random_boxes(50, 2)
    assert torch.allclose(
        decode_deltas(encode_deltas(boxes, anchors, WEIGHTS), anchors, WEIGHTS), boxes, atol=1e-3
    )


def test_deltas_agree_with_torchvision() -> None:
    boxes, anchors = random_boxes(50, 3), random_boxes(50, 4)
    coder = BoxCoder(WEIGHTS)
    deltas = coder.encode([boxes], [anchors])[0]
    assert torch.allclose(encode_deltas(boxes, anchors, WEIGHTS), deltas, atol=1e-5)
    wild = torch.randn(50, 4) * 20
    assert torch.allclose(
        decode_deltas(wild, anchors, WEIGHTS), coder.decode_single(wild, anchors), rtol=1e-5
    )


def test_a_huge_size_delta_is_cut_instead_of_overflowing() -> None:
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    box = decode_deltas(torch.tensor([[0.0, 0.0, 1000.0, 0.0]]), anchor, (1, 1, 1, 1))
    assert box[0, 2] - box[0, 0] == pytest.approx(16 * math.exp(MAX_LOG_SCALE))


def test_clipping_keeps_boxes_inside_the_image() -> None:
    boxes = torch.tensor([[-5.0, -5.0, 50.0, 50.0], [10.0, 10.0, 12.0, 12.0]])
    images, sizes = torch.stack((boxes, boxes)), torch.tensor([[20.0, 30.0], [11.0, 100.0]])
    assert clip_boxes(images, sizes).tolist() == [
        [[0, 0, 30, 20], [10, 10, 12, 12]],
        [[0, 0, 50, 11], [10, 10, 12, 11]],
    ]


def test_a_box_has_area_when_both_sides_are_long_enough() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0.5], [0, 0, -2, 1], [0, 0, float("nan"), 1]])
    assert has_area(boxes, 1.0).tolist() == [True, False, False, False]


def test_matching_separates_positive_negative_and_ignored() -> None:
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 20.0], [50.0, 50.0, 60.0, 60.0]])
    matched = match(truth, boxes, positive_iou=0.7, negative_iou=0.3, rescue=False, ignored_boxes=NONE)
    assert matched.tolist() == [0, IGNORED, NEGATIVE]


def test_the_best_box_of_a_truth_is_rescued_below_the_threshold() -> None:
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 40.0], [0.0, 0.0, 10.0, 100.0]])
    matched = match(truth, boxes, positive_iou=0.7, negative_iou=0.3, rescue=True, ignored_boxes=NONE)
    assert matched.tolist() == [0, NEGATIVE]


def test_without_truth_every_box_is_negative() -> None:
    matched = match(
        torch.zeros(0, 4),
        random_boxes(3, 5),
        positive_iou=0.7,
        negative_iou=0.3,
        rescue=True,
        ignored_boxes=NONE,
    )
    assert matched.tolist() == [NEGATIVE] * 3


CROWD = torch.tensor([[20.0, 0.0, 40.0, 20.0]])


def match_around(crowds: torch.Tensor, boxes: list[list[float]], truth: torch.Tensor = NONE) -> list[int]:
    matched = match(
        truth,
        torch.tensor(boxes),
        positive_iou=0.7,
        negative_iou=0.3,
        rescue=False,
        ignored_boxes=crowds,
    )
    found: list[int] = matched.tolist()
    return found


def test_a_box_with_half_its_area_in_a_crowd_is_no_negative() -> None:
    half, less, around = [10.0, 0.0, 30.0, 20.0], [9.9, 0.0, 29.9, 20.0], [0.0, 0.0, 60.0, 60.0]
    assert match_around(CROWD, [half, less, around]) == [IGNORED, NEGATIVE, NEGATIVE]


def test_half_of_a_box_counts_only_within_one_crowd() -> None:
    two = torch.tensor([[0.0, 0.0, 4.0, 10.0], [6.0, 0.0, 10.0, 10.0]])
    assert match_around(two, [[0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 5.0, 10.0]]) == [NEGATIVE, IGNORED]


def test_a_positive_box_in_a_crowd_stays_positive() -> None:
    truth = torch.tensor([[22.0, 2.0, 32.0, 12.0]])
    boxes = [[22.0, 2.0, 32.0, 12.0], [30.0, 10.0, 40.0, 20.0], [0.0, 0.0, 10.0, 10.0]]
    assert match_around(CROWD, boxes, truth) == [0, IGNORED, NEGATIVE]


def test_a_box_without_area_lies_in_no_crowd() -> None:
    assert match_around(CROWD, [[25.0, 5.0, 25.0, 9.0]]) == [NEGATIVE]


def test_sampling_keeps_the_share_of_positives_and_fills_with_negatives() -> None:
    matched = torch.tensor([0] * 10 + [NEGATIVE] * 50 + [IGNORED] * 5)
    positive, negative = sample_balanced(matched, 16, 0.25)
    assert len(positive) == 4
    assert len(negative) == 12
    assert (matched[positive] >= 0).all()
    assert (matched[negative] == NEGATIVE).all()


def test_sampling_from_nothing_gives_nothing() -> None:
    positive, negative = sample_balanced(torch.zeros(0, dtype=torch.int64), 16, 0.25)
    assert len(positive) == len(negative) == 0


def test_samples_follow_their_own_generator() -> None:
    matched = torch.tensor([0] * 40 + [NEGATIVE] * 200)

    def draw(seed: int) -> list[int]:
        positive, negative = sample_balanced(matched, 32, 0.5, torch.Generator().manual_seed(seed))
        torch.rand(1)  # whatever the global one does
        drawn: list[int] = torch.cat((positive, negative)).tolist()
        return drawn

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_labels_are_moved_apart_as_torchvision_moves_them() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 20], [5, 5, 9, 9], [900, 0, 901, 1]]])
    labels, valid = torch.tensor([[0, 2, 1]]), torch.tensor([[True, True, False]])
    assert shift_by_label(boxes, labels, valid)[0, :2].tolist() == [[0, 0, 10, 20], [47, 47, 51, 51]]


def test_labels_of_many_candidates_stay_where_they_are() -> None:
    boxes = torch.rand(1, 1001, 4)
    labels, valid = torch.ones(1, 1001, dtype=torch.int64), torch.ones(1, 1001, dtype=torch.bool)
    assert torch.equal(shift_by_label(boxes, labels, valid), boxes)
    assert not torch.equal(
        shift_by_label(boxes[:, :1000], labels[:, :1000], valid[:, :1000]), boxes[:, :1000]
    )
