import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from maskrcnn_core.config import PRESETS
from maskrcnn_core.inference import fold_batch_norm, prepare_for_inference
from maskrcnn_core.model import MaskRCNN, build_model

CPU = torch.device("cpu")
NORMS = nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d
THREE = ((1, "one"), (2, "two"), (3, "three"))


def shaken(model: MaskRCNN) -> MaskRCNN:
    """With batch norms that do something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, NORMS):
            mean, variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
            mean.uniform_(-0.1, 0.1)
            variance.uniform_(0.8, 1.2)
            with torch.no_grad():
                module.weight.uniform_(0.5, 0.7)
                module.bias.uniform_(-0.1, 0.1)
    return model.eval()


@pytest.mark.parametrize("preset", PRESETS)
def test_folding_batch_norm_changes_nothing_but_roundings(preset: str) -> None:
    model = shaken(build_model(PRESETS[preset](THREE), seed=0))
    folded = shaken(build_model(PRESETS[preset](THREE), seed=0))
    folded.load_state_dict(model.state_dict())
    fold_batch_norm(folded)
    assert not any(isinstance(module, NORMS) for module in folded.modules())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(model._features(image), folded._features(image), strict=True):
            assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))
        pooled = torch.randn(2, model.config.fpn_channels, 7, 7)
        a, b = model.roi_heads.box_head(pooled), folded.roi_heads.box_head(pooled)
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))


def test_a_norm_without_a_convolution_before_it_is_refused() -> None:
    with pytest.raises(TypeError, match="follows ReLU"):
        fold_batch_norm(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


def test_float32_is_left_as_it_was_trained_and_the_original_is_not_touched(tiny_model: MaskRCNN) -> None:
    before = {key: tensor.clone() for key, tensor in tiny_model.state_dict().items()}
    exact = prepare_for_inference(tiny_model, CPU, torch.float32)
    assert exact.state_dict().keys() == before.keys()
    fast = prepare_for_inference(tiny_model, CPU, torch.bfloat16)
    assert fast.get_parameter("rpn.head.cls_logits.weight").dtype == torch.bfloat16
    assert fast.get_parameter("roi_heads.box_predictor.cls_score.weight").dtype == torch.float32
    assert not any(p.requires_grad for p in fast.parameters())
    for key, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, before[key])
