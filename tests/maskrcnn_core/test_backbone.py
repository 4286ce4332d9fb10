"""Batch norm with frozen statistics."""

import torch
from torchvision.ops import FrozenBatchNorm2d

from maskrcnn_core.backbone import FrozenBatchNorm


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
