"""Input shapes: to what size an image is resized, and to what size it is then padded.

Letters: all sizes are (height, width) in pixels.
"""

from __future__ import annotations

from functools import cache

from maskrcnn_core.backbone import SIZE_DIVISOR
from maskrcnn_core.config import MaskRCNNConfig

Size = tuple[int, int]

# Long side over short side of what cameras make: square, 4:3, 3:2. Wider ones get the widest shape.
COMMON_ASPECTS = (1.0, 4 / 3, 3 / 2)


def input_size(config: MaskRCNNConfig, height: int, width: int) -> Size:
    """After resizing: the shorter side has min_size_px, unless the longer would pass max_size_px.

    Source: Faster R-CNN, section 3.3. Rounded down, as torchvision does, so that sizes agree to the pixel;
    but a side is at least 1.
    """
    scale = min(config.min_size_px / min(height, width), config.max_size_px / max(height, width))
    return max(1, int(height * scale)), max(1, int(width * scale))


def tight_shape(size: Size) -> Size:
    """The least padding that the network allows: to its deepest stride, as torchvision pads one image."""
    return _up(size[0]), _up(size[1])


def common_shape(config: MaskRCNNConfig, size: Size) -> Size:
    """The smallest of `common_shapes` that the resized image fits into."""
    fitting = [s for s in common_shapes(config) if s[0] >= size[0] and s[1] >= size[1]]
    return min(fitting, key=lambda shape: shape[0] * shape[1])


@cache
def common_shapes(config: MaskRCNNConfig) -> tuple[Size, ...]:
    """At most seven shapes into which every resized image fits, so that a compiler sees no more than these.

    Where a shape is not an image's tightest, its detections differ a little from those of one image alone:
    the padding reaches the border's receptive fields (docs/exactness.md has the figures).
    """
    widest = config.max_size_px / config.min_size_px
    aspects = [a for a in COMMON_ASPECTS if a < widest] + [widest]
    longer = [_up(int(config.min_size_px * aspect)) for aspect in aspects]
    shorter = _up(config.min_size_px)
    landscape = [(shorter, side) for side in longer]
    return tuple(dict.fromkeys(landscape + [(w, h) for h, w in landscape]))


def _up(side: int) -> int:
    return -(-side // SIZE_DIVISOR) * SIZE_DIVISOR
