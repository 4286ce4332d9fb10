import pytest
import torch

from maskrcnn_core.config import MaskRCNNConfig, lite
from maskrcnn_core.model import MaskRCNN, build_model

THREE_CATEGORIES = ((1, "ellipse"), (7, "box"), (9, "star"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config() -> MaskRCNNConfig:
    """A lite model on small inputs whose untrained heads still detect something."""
    return lite(THREE_CATEGORIES).replace(
        score_threshold=0.2, max_detections=10, min_size_px=96, max_size_px=160, rpn_post_nms=50
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config: MaskRCNNConfig) -> MaskRCNN:
    return build_model(tiny_config, seed=0).eval()
