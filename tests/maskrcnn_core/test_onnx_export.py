"""The exported file, run by ONNX Runtime on the CPU, against the network and the operators it was made of."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import interpolate

from jobs.demo.scenes import render_scene
from jobs.export.export_weights import run_export
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import Checkpoint, parse_checkpoint
from maskrcnn_core.config import lite
from maskrcnn_core.model import MaskRCNN, build_model
from maskrcnn_core.onnx_export import (
    INPUTS,
    NO_CATEGORY,
    OPSET,
    OUTPUTS,
    OnnxNotInstalledError,
    _translations,
    export_onnx,
)
from maskrcnn_core.ops import nms, roi_align
from schemas.specs import StorageSpec

DEMO = Path(__file__).parents[2] / "jobs/demo/lite-scenes.safetensors"
pytestmark = pytest.mark.slow  # PyTorch takes half a minute to trace the network with its sizes left open

FLOATS = NDArray[np.float32]


class Runtime:
    """A file in ONNX Runtime."""

    def __init__(self, file: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        names = [node.name for node in self._session.get_inputs()]
        return list(self._session.run(None, dict(zip(names, inputs, strict=True))))

    def detect(self, images: FLOATS, sizes: list[tuple[int, int]]) -> dict[str, NDArray[Any]]:
        return dict(zip(OUTPUTS, self(images, np.array(sizes, dtype=np.int64)), strict=True))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The bundled one: a lite model that knows rendered scenes."""
    return parse_checkpoint(DEMO.read_bytes(), str(DEMO))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> MaskRCNN:
    return checkpoint.build()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `masklake model export demo OUT.onnx` writes: the checkpoint with all its sizes left open."""
    out = tmp_path_factory.mktemp("onnx") / "demo.onnx"
    run_export("demo", str(out), Storage(StorageSpec()))
    return out.read_bytes()


@pytest.fixture(scope="module")
def runtime(file: bytes) -> Runtime:
    return Runtime(file)


def scenes(*sizes: tuple[int, int], first_seed: int = 0, padding: float = 0.0) -> FLOATS:
    """(B, 3, H, W): the top left of a scene each, H and W the largest."""
    shape = (len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    images = np.full(shape, padding, dtype=np.float32)
    for image, (seed, (height, width)) in zip(images, enumerate(sizes, start=first_seed), strict=True):
        pixels = render_scene(seed, max(height, width)).image[:height, :width]
        image[:, :height, :width] = pixels.transpose(2, 0, 1)
    return images


def smooth_images(num: int, height: int, width: int) -> FLOATS:
    """(B, 3, H, W): noise in which near pixels are alike, as in photographs."""
    coarse = torch.rand(num, 3, 6, 8, generator=torch.Generator().manual_seed(3))
    images: FLOATS = (255 * interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)).numpy()
    return images


def assert_same_detections(
    found: dict[str, NDArray[Any]], model: MaskRCNN, images: FLOATS, sizes: list[tuple[int, int]]
) -> int:
    """What MaskRCNN.forward finds, row by row in the same order. Gives how many detections that were."""
    config = model.config
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.image_mean, config.image_std))
    height, width = (-(-side // 32) * 32 for side in images.shape[2:])
    batch = torch.zeros(len(images), 3, height, width)
    for target, pixels, (h, w) in zip(batch, images, sizes, strict=True):
        target[:, :h, :w] = (torch.from_numpy(pixels[:, :h, :w]) / 255 - mean) / std
    with torch.no_grad():
        expected, mask_probs = model(batch, torch.tensor(sizes, dtype=torch.float32))
    category_ids = np.array((NO_CATEGORY, *config.category_ids))
    for image in range(len(images)):
        num = int((expected.class_indices[image] > 0).sum())
        assert found["num_detections"][image] == num
        rows = {name: found[name][image] for name in ("boxes", "scores", "category_ids", "mask_probs")}
        assert {len(values) for values in rows.values()} == {config.max_detections}
        wanted_ids = category_ids[expected.class_indices[image, :num]]
        np.testing.assert_array_equal(rows["category_ids"][:num], wanted_ids)
        np.testing.assert_allclose(rows["boxes"][:num], expected.boxes[image, :num], rtol=0, atol=1e-2)
        np.testing.assert_allclose(rows["scores"][:num], expected.scores[image, :num], rtol=0, atol=1e-4)
        np.testing.assert_allclose(rows["mask_probs"][:num], mask_probs[image, :num], rtol=0, atol=1e-3)
        assert (rows["category_ids"][num:] == NO_CATEGORY).all()
        assert not any(rows[name][num:].any() for name in ("boxes", "scores", "mask_probs"))
    np.testing.assert_array_equal(found["complete"], expected.complete)
    assert found["finite"].all()
    return int(found["num_detections"].sum())


def test_an_image_shows_what_the_network_shows(runtime: Runtime, model: MaskRCNN) -> None:
    images = scenes((256, 256))
    assert assert_same_detections(runtime.detect(images, [(256, 256)]), model, images, [(256, 256)]) >= 2


def test_a_batch_of_other_sizes_that_32_does_not_divide(runtime: Runtime, model: MaskRCNN) -> None:
    sizes = [(200, 310), (170, 281), (199, 150)]
    images = scenes(*sizes)
    assert assert_same_detections(runtime.detect(images, sizes), model, images, sizes) >= 6


def test_what_lies_in_the_padding_does_not_matter(runtime: Runtime) -> None:
    sizes = [(100, 256), (256, 120)]
    clean = runtime.detect(scenes(*sizes), sizes)
    dirty = runtime.detect(scenes(*sizes, padding=np.nan), sizes)
    assert clean["num_detections"].sum() >= 2
    for name in OUTPUTS:
        np.testing.assert_array_equal(dirty[name], clean[name])


def test_an_image_without_a_detection_has_no_row(runtime: Runtime, model: MaskRCNN) -> None:
    sizes = [(256, 256), (256, 256)]
    images = np.concatenate((np.full((1, 3, 256, 256), 127, dtype=np.float32), scenes((256, 256))))
    found = runtime.detect(images, sizes)
    assert_same_detections(found, model, images, sizes)
    assert found["num_detections"][0] == 0 < found["num_detections"][1]
    alone = runtime.detect(images[:1], sizes[:1])
    assert alone["num_detections"].tolist() == [0]


def test_an_image_of_one_pixel_runs(runtime: Runtime, model: MaskRCNN) -> None:
    images = np.zeros((1, 3, 1, 1), dtype=np.float32)
    assert_same_detections(runtime.detect(images, [(1, 1)]), model, images, [(1, 1)])


def test_pixels_that_are_not_finite_are_told(runtime: Runtime) -> None:
    images = scenes((64, 64), (64, 64))
    images[1, :, 20, 20] = np.nan
    assert runtime.detect(images, [(64, 64)] * 2)["finite"].tolist() == [True, False]


def test_fixed_sizes_and_the_variants_of_detectron2() -> None:
    config = lite(((3, "a"), (0, "b"), (9, "c"))).replace(
        box_class_agnostic=True,
        mask_class_agnostic=True,
        roi_aligned=True,
        roi_sampling_ratio=0,
        anchor_strides="nominal",
        anchor_rounding=False,
        score_threshold=0.2,
        rpn_post_nms=20,
        max_detections=80,  # more than the 60 candidates that there are
    )
    model = build_model(config, seed=0).eval()
    file = export_onnx(model, height=96, width=150, batch_size=2)
    shapes = [
        [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.load_from_string(file).graph.input
    ]
    assert shapes == [[2, 3, 96, 150], [2, 2]]
    images, sizes = smooth_images(2, 96, 150), [(96, 150), (80, 100)]
    assert assert_same_detections(Runtime(file).detect(images, sizes), model, images, sizes) >= 20


def test_the_file_says_what_it_is(file: bytes, checkpoint: Checkpoint) -> None:
    loaded = onnx.load_from_string(file)
    onnx.checker.check_model(loaded, full_check=True)
    properties = {entry.key: entry.value for entry in loaded.metadata_props}
    assert properties["masklake.fingerprint"] == checkpoint.fingerprint
    assert checkpoint.config.from_dict(json.loads(properties["masklake.config"])) == checkpoint.config
    categories = [(number, name) for number, name in json.loads(properties["masklake.categories"])]
    assert categories == list(checkpoint.config.categories)
    for values, documented in ((loaded.graph.input, INPUTS), (loaded.graph.output, OUTPUTS)):
        assert {value.name: value.doc_string for value in values} == documented
    sides = [dim.dim_param for dim in loaded.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ["batch", "", "height", "width"]


def test_the_file_has_standard_operators_only_and_no_path_of_this_machine(file: bytes) -> None:
    loaded = onnx.load_from_string(file)
    assert [(entry.domain, entry.version) for entry in loaded.opset_import] == [("", OPSET)]
    assert {node.domain for node in loaded.graph.node} == {""}
    assert not loaded.functions
    assert str(Path(torch.__file__).parents[1]).encode() not in file
    assert b"maskrcnn_core/" not in file


def test_without_the_extra_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tiny_model: MaskRCNN
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(OnnxNotInstalledError, match=r"'onnxscript'.*pip install masklake\[onnx\]"):
        export_onnx(tiny_model)


@pytest.mark.parametrize("name", ["height", "width", "batch_size"])
def test_a_size_below_one_is_refused(name: str, tiny_model: MaskRCNN) -> None:
    with pytest.raises(ValueError, match=rf"{name} is 0; wanted >= 1"):
        export_onnx(tiny_model, **{name: 0})  # type: ignore[arg-type]


class _Nms(nn.Module):
    def forward(self, boxes: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = nms(boxes, labels, valid, 0.5, 12)
        return kept


class _RoIAlign(nn.Module):
    def __init__(self, sampling_ratio: int, aligned: bool) -> None:
        super().__init__()
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(
        self, fine: torch.Tensor, coarse: torch.Tensor, rois: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        pooled: torch.Tensor = roi_align(
            [fine, coarse], rois, levels, [4, 8], 3, self.sampling_ratio, self.aligned
        )
        return pooled


def translate(module: nn.Module, *inputs: torch.Tensor, rows: int | None = None) -> Runtime:
    """A module in ONNX Runtime; the inputs from number `rows` on have an open first axis."""
    open_axes = tuple(
        {0: torch.export.Dim.DYNAMIC} if rows is not None and i >= rows else {} for i in range(len(inputs))
    )
    program = torch.onnx.export(
        module.eval(),
        inputs,
        dynamic_shapes=open_axes,
        opset_version=OPSET,
        custom_translation_table=_translations(),
        verbose=False,
    )
    assert program is not None
    return Runtime(program.model_proto.SerializeToString())


def test_nms_keeps_what_the_operator_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = 40 * torch.rand(3, 60, 2, generator=generator)
    boxes = torch.cat((corners, corners + 5 + 25 * torch.rand(3, 60, 2, generator=generator)), 2)
    labels = torch.randint(0, 4, (3, 60), generator=generator, dtype=torch.int32)
    valid = torch.rand(3, 60, generator=generator) < 0.7
    valid[1, 15:] = False
    valid[2] = False
    runtime = translate(_Nms(), boxes, labels, valid)
    kept = runtime(boxes.numpy(), labels.numpy(), valid.numpy())[0]
    expected = nms(boxes, labels, valid, 0.5, 12)
    assert expected[0].sum() == 12  # max_keep, of all labels together
    assert 0 < expected[1].sum() < min(12, valid[1].sum())  # the others were suppressed
    np.testing.assert_array_equal(kept, expected.numpy())
    assert not runtime(boxes.numpy(), labels.numpy(), np.zeros_like(valid))[0].any()


@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(2, False), (0, True), (0, False)])
def test_roi_align_samples_what_the_operator_samples(sampling_ratio: int, aligned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    fine, coarse = (torch.randn(2, 5, side, 2 * side, generator=generator) for side in (16, 8))
    corners = torch.rand(9, 2, generator=generator) * torch.tensor([100.0, 50.0]) - 5  # some reach outside
    sides = torch.rand(9, 2, generator=generator) * 60
    sides[0] = 0
    images = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0])
    rois = torch.cat((images[:, None].float(), corners, corners + sides), 1)
    levels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0])
    runtime = translate(_RoIAlign(sampling_ratio, aligned), fine, coarse, rois, levels, rows=2)
    for chosen in (slice(None), levels == 1, slice(0, 0)):  # both levels, one of them, no RoI
        some, of_level = rois[chosen], levels[chosen]
        pooled = runtime(*(x.numpy() for x in (fine, coarse, some, of_level)))[0]
        expected = roi_align([fine, coarse], some, of_level, [4, 8], 3, sampling_ratio, aligned)
        assert pooled.shape == expected.shape
        np.testing.assert_allclose(pooled, expected.numpy(), rtol=0, atol=1e-5)
