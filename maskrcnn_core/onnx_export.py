"""ONNX: a MaskRCNN -> a file that other runtimes run, without PyTorch and without masklake.

Enters: a model. Leaves: the file's bytes; INPUTS and OUTPUTS say what the graph takes and gives. It holds
standard operators only. Letters: B images, H×W pixels, D max_detections, M mask side, G groups, N candidates
of a group, L labels, R RoIs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskrcnn_core.backbone import SIZE_DIVISOR
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.inference import fold_batch_norm
from maskrcnn_core.model import MaskRCNN

FORMAT = "masklake-onnx-1"
OPSET = 18  # what PyTorch's exporter writes without converting; of December 2022
NO_CATEGORY = -1  # in rows without a detection; ids of categories are >= 0

INPUTS = {
    "images": "(B, 3, H, W) float32 RGB, 0 to 255, resized; what lies right of or below an image is ignored",
    "image_sizes": "(B, 2) int64, height and width of each image in pixels, at most H and W",
}
OUTPUTS = {
    "num_detections": "(B,) int64, how many of the rows below belong to the image: the first ones",
    "boxes": "(B, D, 4) float32 x0 y0 x1 y1 in pixels of the input, by falling score; zeros elsewhere",
    "scores": "(B, D) float32; zeros elsewhere",
    "category_ids": f"(B, D) int64, the ids in masklake.categories; {NO_CATEGORY} elsewhere",
    "mask_probs": "(B, D, M, M) float32, the object's probability on a grid over its box; zeros elsewhere",
    "complete": "(B,) bool, false where candidates were left out that could have changed the result",
    "finite": "(B,) bool, false where the network gave NaN or infinity: then the rest means nothing",
}

# Tracing needs sizes: more than 1, unlike each other, and such that no level of the pyramid is 1 wide.
_EXAMPLE_BATCH, _EXAMPLE_HEIGHT, _EXAMPLE_WIDTH = 2, 256, 320
_MAX_SIDE_PX = 16384  # tracing needs a bound

_Translation = Callable[..., Any]


class OnnxNotInstalledError(ImportError):
    """The packages that write ONNX are an extra; the message says how to install them."""


def export_onnx(
    model: MaskRCNN,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    fingerprint: str | None = None,
) -> bytes:
    """The model as an ONNX file, float32, batch norm folded.

    Args:
        model: stays as it is; thresholds and max_detections of its config become part of the graph.
        height, width, batch_size: H, W and B where the file is to fix them; None leaves them to each run. The
            graph itself pads to multiples of 32.
        fingerprint: of the checkpoint.

    Returns:
        the file. Its metadata_props are `masklake.format`, `masklake.config` (MaskRCNNConfig.to_dict as
        JSON), `masklake.categories` (JSON, [[id, name], …]) and, where given, `masklake.fingerprint`.

    Raises:
        OnnxNotInstalledError: the extra `onnx` is not installed.
        ValueError: a size is below 1.
    """
    for name, size in (("height", height), ("width", width), ("batch_size", batch_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; wanted >= 1, or None to leave it open.")
    try:
        import onnx
        import onnx.compose
        import onnxscript  # noqa: F401 - PyTorch's exporter needs it
    except ImportError as error:
        raise OnnxNotInstalledError(
            f"ONNX export needs the package {error.name!r}, which is not installed: "
            "pip install masklake[onnx]"
        ) from error

    # Two traces, joined: with the padding inside its trace the network's sizes would be expressions of
    # remainders, which take PyTorch minutes to simplify.
    open_axis = torch.export.Dim.DYNAMIC
    batch_axes = {} if batch_size else {0: open_axis}
    pixel_axes = batch_axes | ({} if height else {2: open_axis}) | ({} if width else {3: open_axis})
    padded_axes = (
        batch_axes | ({} if height else {2: _padded("rows")}) | ({} if width else {3: _padded("columns")})
    )
    sides = (height or _EXAMPLE_HEIGHT, width or _EXAMPLE_WIDTH)
    images = torch.zeros(batch_size or _EXAMPLE_BATCH, 3, *sides)
    sizes = torch.tensor([sides]).expand(len(images), 2).contiguous()
    normalize, network = _Normalize(model.config).eval(), _Network(model).eval()
    between = ("padded", "padded_sizes")
    with torch.no_grad():
        front = _trace(normalize, (images, sizes), tuple(INPUTS), between, (pixel_axes, batch_axes))
        back = _trace(network, normalize(images, sizes), between, tuple(OUTPUTS), (padded_axes, batch_axes))
    onnx.compose.add_prefix(front, "normalize/", rename_inputs=False, rename_outputs=False, inplace=True)
    onnx.compose.add_prefix(back, "network/", rename_inputs=False, rename_outputs=False, inplace=True)
    merged = onnx.compose.merge_models(front, back, io_map=[(name, name) for name in between])
    _describe(merged, model.config, height, width, batch_size, fingerprint)
    onnx.checker.check_model(merged, full_check=True)
    return bytes(merged.SerializeToString())


class _Normalize(nn.Module):
    """From pixels to what MaskRCNN.forward takes."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(config.image_mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(config.image_std)[:, None, None])

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2:]
        in_height = torch.arange(height) < image_sizes[:, :1]  # (B, H)
        in_width = torch.arange(width) < image_sizes[:, 1:]  # (B, W)
        inside = (in_height[:, :, None] & in_width[:, None])[:, None]
        # Chosen, not multiplied with: what the caller left in the padding may be NaN.
        normalized = torch.where(inside, (images - self.mean) / self.std, 0.0)
        return F.pad(normalized, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR)), image_sizes.float()


class _Network(nn.Module):
    """MaskRCNN.forward, with the data set's ids and always D rows."""

    category_ids: Tensor

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().double()
        fold_batch_norm(self.model)  # in float64, so that each weight is rounded once
        self.model.float()
        self.register_buffer("category_ids", torch.tensor((NO_CATEGORY, *model.config.category_ids)))

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        found, mask_probs = self.model(images, image_sizes)
        is_detection = found.class_indices > 0
        mask_probs = torch.where(is_detection[..., None, None], mask_probs, 0.0)
        missing = (
            self.model.config.max_detections - found.scores.shape[1]
        )  # a tiny image has fewer candidates
        return (
            is_detection.sum(1),
            F.pad(found.boxes, (0, 0, 0, missing)),
            F.pad(found.scores, (0, missing)),
            F.pad(self.category_ids[found.class_indices], (0, missing), value=NO_CATEGORY),
            F.pad(mask_probs, (0, 0, 0, 0, 0, missing)),
            found.complete,
            found.finite,
        )


def _padded(name: str) -> Any:
    """An open size that is a multiple of SIZE_DIVISOR."""
    return SIZE_DIVISOR * torch.export.Dim(name, min=1, max=_MAX_SIDE_PX // SIZE_DIVISOR)


def _trace(
    module: nn.Module,
    arguments: tuple[Tensor, Tensor],
    input_names: tuple[str, ...],
    output_names: tuple[str, ...],
    open_axes: tuple[dict[int, Any], ...],
) -> Any:
    """onnx.ModelProto of a module's forward."""
    program = torch.onnx.export(
        module,
        arguments,
        input_names=input_names,
        output_names=output_names,
        dynamic_shapes=open_axes,
        opset_version=OPSET,
        custom_translation_table=_translations(),
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _describe(
    merged: Any,
    config: MaskRCNNConfig,
    height: int | None,
    width: int | None,
    batch_size: int | None,
    fingerprint: str | None,
) -> None:
    """Name the open axes, document inputs and outputs, and leave out what tracing noted of this machine."""
    import onnx

    graph = merged.graph
    merged.producer_name, merged.producer_version, graph.name = "masklake", "", config.preset
    del merged.opset_import[1:]
    assert not merged.functions
    for entry in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del entry.metadata_props[:]  # paths of source files among them
    del graph.value_info[:]  # shapes of what is between, in symbols of the two traces
    for value in (*graph.input, *graph.output):
        value.doc_string = (INPUTS | OUTPUTS)[value.name]
        if batch_size is None:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    image_shape = graph.input[0].type.tensor_type.shape
    if height is None:
        image_shape.dim[2].dim_param = "height"
    if width is None:
        image_shape.dim[3].dim_param = "width"
    properties = {
        "masklake.format": FORMAT,
        "masklake.config": json.dumps(config.to_dict()),
        "masklake.categories": json.dumps(config.categories),
    }
    if fingerprint is not None:
        properties["masklake.fingerprint"] = fingerprint
    onnx.helper.set_model_props(merged, properties)


def _translations() -> dict[_Translation, _Translation]:
    """PyTorch operators that its exporter does not know, in terms of ONNX's."""
    from onnx import TensorProto
    from onnxscript import opset18

    op: Any = opset18  # its types want tensors where it takes Python's numbers and lists as well

    def nms(boxes: Any, labels: Any, valid: Any, iou_threshold: float, max_keep: int) -> Any:
        """NonMaxSuppression: a group is an image to it, a label a class.

        It wants a score where we have an order and a flag: N ... 1 for valid candidates of a label, else 0.
        """
        rank = op.Cast(op.Range(op.Gather(op.Shape(valid), 1), 0, -1), to=TensorProto.FLOAT)
        scores = op.Where(valid, rank, 0.0)  # (G, N)
        label = op.Cast(labels, to=TensorProto.INT64)
        num_labels = op.Add(op.ReduceMax(label, keepdims=0), op.Constant(value_int=1))
        has_label = op.Equal(op.Unsqueeze(label, [1]), op.Unsqueeze(op.Range(0, num_labels, 1), [1]))
        scores = op.Where(has_label, op.Unsqueeze(scores, [1]), 0.0)  # (G, L, N)
        found = op.NonMaxSuppression(
            boxes, scores, max_keep, iou_threshold, 0.0
        )  # rows of group, label, candidate
        place = op.Gather(found, [0, 2], axis=1)
        ones = op.Expand(1.0, op.Slice(op.Shape(place), [0], [1]))
        kept = op.ScatterND(op.ConstantOfShape(op.Shape(valid)), place, ones)  # (G, N), 0 or 1
        is_among_first = op.LessOrEqual(op.CumSum(kept, 1), float(max_keep))  # max_keep counted each label's
        return op.And(op.Cast(kept, to=TensorProto.BOOL), is_among_first)

    def roi_align(
        features: Any,
        rois: Any,
        levels: Any,
        strides: Sequence[int],
        side: int,
        sampling_ratio: int,
        aligned: bool,
    ) -> Any:
        """RoiAlign: the RoIs of one level after the other, then each back to its place."""
        image = op.Cast(op.Gather(rois, 0, axis=1), to=TensorProto.INT64)
        boxes = op.Slice(rois, [1], [5], [1])
        chosen = [op.Squeeze(op.NonZero(op.Equal(levels, level)), [0]) for level in range(len(strides))]
        pooled = [
            op.RoiAlign(
                feature,
                op.Gather(boxes, index),
                op.Gather(image, index),
                mode="avg",
                output_height=side,
                output_width=side,
                sampling_ratio=sampling_ratio,
                spatial_scale=1.0 / stride,
                coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            )
            for feature, stride, index in zip(features, strides, chosen, strict=True)
        ]
        order = op.Concat(*chosen, axis=0)  # (R,): which RoI each pooled one is
        rows = op.Range(0, op.Squeeze(op.Shape(order), [0]), 1)
        row_of_roi = op.ScatterElements(order, order, rows)
        return op.Gather(op.Concat(*pooled, axis=0), row_of_roi, axis=0)

    def stable_sort(values: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
        """TopK is stable: of equal values the first comes first."""
        size = op.Gather(op.Shape(values), [dim])
        return op.TopK(values, size, axis=dim, largest=int(descending))

    return {
        torch.ops.masklake.nms.default: nms,
        torch.ops.masklake.roi_align.default: roi_align,
        torch.ops.aten.sort.stable: stable_sort,
    }
