"""Batch norm with frozen statistics, and that of frozen stages."""

import copy

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from maskrcnn_core.backbone import FrozenBatchNorm, build_backbone
from maskrcnn_core.config import lite


def settled(norm: FrozenBatchNorm2d) -> FrozenBatchNorm2d:
    torch.manual_seed(0)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    return norm


def test_frozen_norm_is_torchvisions_to_the_bit_in_float32() -> None:
    x = torch.randn(2, 5, 4, 3)
    ours, theirs = settled(FrozenBatchNorm(5, eps=1e-5)), settled(FrozenBatchNorm2d(5, eps=1e-5))
    assert torch.equal(ours(x), theirs(x))


def test_frozen_norm_of_bfloat16_is_the_float32_one_rounded_and_so_is_its_gradient() -> None:
    x = torch.randn(2, 5, 4, 3).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = x.detach().float().requires_grad_()
    ours, theirs = settled(FrozenBatchNorm(5, eps=1e-5)), settled(FrozenBatchNorm2d(5, eps=1e-5))
    found, expected = ours(x), theirs(exact)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=2**-8)
    found.float().sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad.float(), exact.grad, rtol=2**-8, atol=0)


def test_batch_norm_of_frozen_stages_keeps_to_its_statistics_in_training() -> None:
    backbone = build_backbone(lite(((1, "disc"),)).replace(trainable_stages=2)).eval()
    trained = {
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.weight.requires_grad
    }
    assert trained
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    # Nothing is trained in an average of the weights; its frozen stages are the model's.
    for follower in (copy.deepcopy(backbone).requires_grad_(False), backbone):
        follower.train()
        follower(torch.rand(2, 3, 64, 64))
        moved = {name for name, buffer in follower.named_buffers() if not torch.equal(buffer, before[name])}
        assert {name.rpartition(".")[0] for name in moved} == trained


def test_all_batch_norms_of_a_backbone_that_is_trained_as_a_whole_are_in_training_mode() -> None:
    backbone = build_backbone(lite(((1, "disc"),)))
    assert all(module.training for module in backbone.modules())
