"""Loss terms as sums and counts."""

import numpy as np
import pytest
import torch

from maskrcnn_core.losses import LossSums, box_head_loss, mask_head_loss, rpn_loss

BETA = 1 / 9


def test_the_mask_loss_is_the_mean_over_pixels_and_rois() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, 30.0]], [[30.0, 30.0], [30.0, 30.0]]])
    loss = mask_head_loss(logits, torch.ones(2, 2, 2)).mean()["loss_mask"]
    assert loss == pytest.approx(3 * np.log(2) / 4 / 2)


def test_background_has_no_box_loss() -> None:
    logits, deltas = torch.zeros(2, 3), torch.full((2, 12), 5.0)
    background = box_head_loss(logits, deltas, torch.tensor([0, 0]), torch.zeros(2, 4), BETA).mean()
    foreground = box_head_loss(logits, deltas, torch.tensor([0, 1]), torch.zeros(2, 4), BETA).mean()
    assert background["loss_box_reg"] == 0
    assert foreground["loss_box_reg"] == pytest.approx(4 * (5 - 0.5 / 9) / 2)


def test_each_term_is_divided_by_its_samples() -> None:
    """Two anchors of which one holds an object; two RoIs and one mask."""
    zeros, one = torch.zeros(2), torch.tensor([1.0, 0.0])
    sums = rpn_loss(zeros, one, torch.zeros(1, 4), torch.ones(1, 4), 0.0)
    sums |= box_head_loss(torch.zeros(2, 2), torch.zeros(2, 8), one.long(), torch.ones(2, 4), 0.0)
    sums |= mask_head_loss(torch.zeros(1, 3, 3), torch.ones(1, 3, 3))
    log2 = np.log(2)
    expected = {
        "loss_objectness": (2 * log2, 2),
        "loss_rpn_box_reg": (4, 2),
        "loss_classifier": (2 * log2, 2),
        "loss_box_reg": (4, 2),
        "loss_mask": (log2, 1),
    }
    assert sums.sums.keys() == sums.counts.keys() == expected.keys()
    for name, (total, count) in expected.items():
        assert float(sums.sums[name]) == pytest.approx(total), name
        assert float(sums.counts[name]) == count, name
    assert all(count.dtype == torch.float32 for count in sums.counts.values())
    assert sums.mean()["loss_rpn_box_reg"] == 2


def test_shares_of_a_batch_add_up_to_the_batch() -> None:
    torch.manual_seed(0)
    logits, deltas, targets = torch.randn(9, 4), torch.randn(9, 16), torch.randn(9, 4)
    classes = torch.tensor([1, 0, 3, 0, 0, 2, 0, 0, 1])
    whole = box_head_loss(logits, deltas, classes, targets, BETA).mean()
    shares = [
        box_head_loss(logits[part], deltas[part], classes[part], targets[part], BETA)
        for part in (slice(0, 2), slice(2, 9))
    ]
    counts = {name: shares[0].counts[name] + shares[1].counts[name] for name in whole}
    for name, expected in whole.items():
        total = shares[0].mean(counts)[name] + shares[1].mean(counts)[name]
        assert total == pytest.approx(float(expected), rel=1e-5)
    assert whole["loss_classifier"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, classes))
    )


def test_no_samples_give_zeros_that_are_still_in_the_graph() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    sums = mask_head_loss(torch.zeros(0, 4, 4, requires_grad=True), torch.zeros(0, 4, 4))
    flat = torch.zeros(0, 3, requires_grad=True)
    sums |= box_head_loss(flat, torch.zeros(0, 12, requires_grad=True), none, torch.zeros(0, 4), BETA)
    sums |= rpn_loss(flat[:, 0], torch.zeros(0), flat.repeat(1, 2)[:, :4], torch.zeros(0, 4), BETA)
    assert all(total.requires_grad and total == 0 for total in sums.mean().values())


def test_counts_of_others_take_the_place_of_ones_own() -> None:
    sums = LossSums({"loss_mask": torch.tensor(6.0)}, {"loss_mask": torch.tensor(2.0)})
    assert sums.mean() == {"loss_mask": 3}
    assert sums.mean({"loss_mask": torch.tensor(12.0)}) == {"loss_mask": 0.5}
