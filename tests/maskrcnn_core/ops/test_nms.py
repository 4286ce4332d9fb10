import pytest
import torch
from torchvision.ops import batched_nms

from maskrcnn_core.ops import nms


def random_boxes(groups: int, candidates: int) -> torch.Tensor:
    torch.manual_seed(groups * 1000 + candidates)
    corners = torch.rand(groups, candidates, 2) * 200
    return torch.cat((corners, corners + torch.rand(groups, candidates, 2) * 80 + 1), dim=2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("groups", "candidates"), [(1, 1), (3, 50), (7, 400)])
def test_each_group_keeps_what_torchvision_keeps(groups: int, candidates: int, threads: int) -> None:
    torch.set_num_threads(threads)
    boxes = random_boxes(groups, candidates)
    labels = torch.randint(0, 4, (groups, candidates), dtype=torch.int32)
    scores = torch.linspace(1, 0.1, candidates)
    kept = nms(boxes, labels, torch.ones(groups, candidates, dtype=torch.bool), 0.5, candidates)
    for group in range(groups):
        expected = batched_nms(boxes[group], scores, labels[group], 0.5)
        assert kept[group].nonzero()[:, 0].tolist() == expected.tolist()


def test_an_invalid_candidate_is_not_kept_and_suppresses_nothing() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9]]])
    labels = torch.zeros(1, 3, dtype=torch.int32)
    assert nms(boxes, labels, torch.tensor([[False, True, True]]), 0.5, 3).tolist() == [[False, True, False]]


def test_candidates_of_other_labels_do_not_suppress() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10]] * 3])
    labels = torch.tensor([[1, 2, 1]], dtype=torch.int32)
    assert nms(boxes, labels, torch.ones(1, 3, dtype=torch.bool), 0.5, 3).tolist() == [[True, True, False]]


def test_no_more_than_max_keep_are_kept_and_they_are_the_first() -> None:
    boxes = random_boxes(2, 30) * torch.tensor([100.0, 1, 100, 1])  # far apart in x: hardly any overlap
    valid = torch.ones(2, 30, dtype=torch.bool)
    labels = torch.zeros(2, 30, dtype=torch.int32)
    everything = nms(boxes, labels, valid, 0.5, 30)
    few = nms(boxes, labels, valid, 0.5, 4)
    assert few.sum(1).tolist() == [4, 4]
    for group in range(2):
        assert few[group].nonzero()[:, 0].tolist() == everything[group].nonzero()[:4, 0].tolist()


def test_an_overlap_of_exactly_the_threshold_is_kept() -> None:
    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 2, 1]]])  # IoU 2 / 4
    labels, valid = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2, dtype=torch.bool)
    assert nms(boxes, labels, valid, 0.5, 2).all()
    assert not nms(boxes, labels, valid, 0.499, 2).all()


def test_boxes_without_area_are_no_error() -> None:
    boxes = torch.tensor([[[5.0, 5, 5, 5], [5, 5, 5, 5]]])
    labels, valid = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2, dtype=torch.bool)
    assert nms(boxes, labels, valid, 0.5, 2).all()  # 0 / 0 is no overlap


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_in_gives_nothing(shape: tuple[int, int]) -> None:
    kept = nms(
        torch.zeros(*shape, 4),
        torch.zeros(shape, dtype=torch.int32),
        torch.ones(shape, dtype=torch.bool),
        0.5,
        3,
    )
    assert kept.shape == shape
