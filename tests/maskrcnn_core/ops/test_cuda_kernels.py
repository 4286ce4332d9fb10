"""The GPU kernels against the CPU kernels: in Triton's interpreter, and on a GPU where there is one; and
whether they compile, which needs none.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.ops import crop_align, nms, resize_normalize, roi_align

triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux only")

from maskrcnn_core.ops.cuda import crop_align as cuda_crop_align  # noqa: E402
from maskrcnn_core.ops.cuda import nms as cuda_nms  # noqa: E402
from maskrcnn_core.ops.cuda import resize as cuda_resize  # noqa: E402
from maskrcnn_core.ops.cuda import roi_align as cuda_roi_align  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(INTERPRETED or not HAS_GPU, reason="torch sees no GPU here")
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or HAS_GPU),
    reason="torch sees no GPU here; the interpreter runs this, in a process of its own",
)
MANY = 1000 if HAS_GPU and not INTERPRETED else 70  # candidates or RoIs; the interpreter is slow


def on_gpu(operator: Callable[..., Any], kernel: Callable[..., Any], *arguments: Any) -> Any:
    """The operator's result on a GPU, or its GPU kernel's on CPU tensors in the interpreter; on the CPU."""
    if INTERPRETED:
        return kernel(*arguments)

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(v) for v in value]
        return value.cuda() if isinstance(value, Tensor) else value

    return operator(*map(move, arguments)).cpu()


# --- the comparisons ---------------------------------------------------------------------------------------


def candidates(groups: int, number: int, num_labels: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Crowded boxes, so that much is suppressed, also by boxes that are suppressed themselves."""
    generator = torch.Generator().manual_seed(number)
    centers = 100 * torch.rand(groups, number, 2, generator=generator)
    sides = 10 + 40 * torch.rand(groups, number, 2, generator=generator)
    labels = torch.randint(0, num_labels, (groups, number), generator=generator, dtype=torch.int32)
    valid = torch.rand(groups, number, generator=generator) < 0.8
    return torch.cat((centers - sides / 2, centers + sides / 2), dim=2), labels, valid


def both_nms(boxes: Tensor, labels: Tensor, valid: Tensor, max_keep: int = 10_000) -> tuple[Tensor, Tensor]:
    arguments = (boxes, labels, valid, 0.4, max_keep)
    return on_gpu(nms, cuda_nms.suppress, *arguments), nms(*arguments)


@runs_kernels
@pytest.mark.parametrize("number", [1, 31, 32, 33, MANY])
def test_kernels_keep_the_candidates_that_the_cpu_keeps(number: int) -> None:
    kept, expected = both_nms(*candidates(3, number))
    assert torch.equal(kept, expected)
    assert kept.any()


@runs_kernels
@pytest.mark.parametrize("max_keep", [0, 1, 7])
def test_kernels_keep_no_more_than_max_keep(max_keep: int) -> None:
    kept, expected = both_nms(*candidates(2, MANY), max_keep)
    assert torch.equal(kept, expected)
    assert kept.sum(1).tolist() == [max_keep, max_keep]


@runs_kernels
def test_kernels_walk_through_many_words_and_groups_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_nms, "MAX_WORDS", 1)
    monkeypatch.setattr(cuda_nms, "MAX_ANSWER_WORDS", 1)
    kept, expected = both_nms(*candidates(2, MANY))
    assert torch.equal(kept, expected)


@runs_kernels
def test_kernels_stop_at_the_last_valid_candidate() -> None:
    boxes, labels, valid = candidates(2, MANY)
    valid[:, 40:] = False
    valid[1] = False
    kept, expected = both_nms(boxes, labels, valid)
    assert torch.equal(kept, expected)
    assert not kept[1].any()


@runs_kernels
def test_kernels_let_boxes_that_are_nan_or_empty_suppress_nothing() -> None:
    boxes, labels, valid = candidates(1, 40, num_labels=1)
    boxes[0, :20] = torch.tensor([10.0, 10.0, 10.0, 10.0])
    boxes[0, 20:30, 2] = float("nan")
    kept, expected = both_nms(boxes, labels, torch.ones_like(valid))
    assert torch.equal(kept, expected)
    assert kept[0, :30].all()


@runs_kernels
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_kernels_take_no_groups_and_no_candidates(shape: tuple[int, int]) -> None:
    kept, expected = both_nms(*candidates(*shape))
    assert kept.shape == expected.shape == shape


STRIDES = [4, 8, 16, 32, 64]


def pyramid(dtype: torch.dtype, num_levels: int = 4, channels: int = 24) -> list[Tensor]:
    """Of two images of 96×160 input pixels."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, channels, -(-96 // stride), -(-160 // stride), generator=generator).to(dtype)
        for stride in STRIDES[:num_levels]
    ]


def some_rois(number: int, num_levels: int = 4) -> tuple[Tensor, Tensor]:
    """RoIs of all sizes, partly and wholly outside, upside down, and NaN; and the levels they are on."""
    generator = torch.Generator().manual_seed(number)
    corner = torch.rand(number, 2, generator=generator) * torch.tensor([190.0, 120.0]) - 20
    side = 70 * torch.rand(number, 2, generator=generator) - 4
    image = torch.randint(0, 2, (number, 1), generator=generator)
    rois = torch.cat((image, corner, corner + side), dim=1)
    for row, column in enumerate(range(1, 5)):
        rois[row, column] = float("nan")
    rois[4, 1:] = torch.tensor([1e9, 1e9, 1e9 + 64, 1e9 + 64])
    rois[5, 1:] = torch.tensor([-300.0, -200.0, -280.0, -190.0])
    rois[6, 1:] = torch.tensor([float("-inf"), 0.0, float("inf"), 50.0])
    # Across the corners of P2, whose samples count up to a pixel beyond its first and its last one.
    rois[7, 1:] = torch.tensor([-4.0, -4.0, 4.0, 4.0])
    rois[8, 1:] = torch.tensor([152.0, 88.0, 166.0, 102.0])
    levels = torch.randint(0, num_levels, (number,), generator=generator)
    levels[7:9] = 0
    return rois, levels


def check_roi_align(
    features: list[Tensor], rois: Tensor, levels: Tensor, side: int, ratio: int, aligned: bool
) -> None:
    arguments = (features, rois, levels, STRIDES[: len(features)], side, ratio, aligned)
    pooled, expected = on_gpu(roi_align, cuda_roi_align.align, *arguments), roi_align(*arguments)
    # bfloat16 has eight bits: where sums differ in float32's last bit, a rounding may go the other way
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(pooled, expected, rtol=tolerance, atol=1e-5)
    assert pooled.stride() == expected.stride()


@runs_kernels
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernels_align_as_the_cpu_does(dtype: torch.dtype, ratio: int, aligned: bool) -> None:
    number, side = (12, 2) if INTERPRETED else (MANY, 7)
    check_roi_align(pyramid(dtype), *some_rois(number), side, ratio, aligned)


@runs_kernels
def test_kernels_align_from_five_levels() -> None:
    check_roi_align(pyramid(torch.float32, 5), *some_rois(10, 5), 2, 1, False)


@runs_kernels
def test_kernels_align_channels_and_rows_in_pieces_or_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_roi_align, "MAX_CHANNELS", 16)
    monkeypatch.setattr(cuda_roi_align, "FEW_ROIS", 1)
    check_roi_align(pyramid(torch.float32), *some_rois(10), 2, 1, True)


@runs_kernels
def test_kernels_align_no_rois() -> None:
    pooled = on_gpu(
        roi_align,
        cuda_roi_align.align,
        pyramid(torch.float32),
        torch.zeros(0, 5),
        torch.zeros(0, dtype=torch.int64),
        STRIDES[:4],
        7,
        2,
        False,
    )
    assert pooled.shape == (0, 24, 7, 7)


def some_crops(number: int, side: int, aligned: bool) -> tuple[Any, ...]:
    """Arguments of crop_align: crops of an image of 60×90, one of them empty, and RoIs as above."""
    corners = torch.tensor([[0, 0], [20, 30], [7, 0], [31, 47]])
    sizes = torch.tensor([[25, 40], [40, 60], [0, 0], [9, 1]])
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 2, (int(sizes.prod(1).sum()),), generator=generator).to(torch.uint8)
    index = torch.randint(0, 4, (number,), generator=generator)
    boxes = torch.rand(number, 4, generator=generator) * torch.tensor([90.0, 60, 45, 30]) - 10
    boxes[:, 2:] += boxes[:, :2] + 10
    boxes[:3] = torch.tensor([[0.0, 0, 90, 60], [30, 20, 30.4, 20.2], [60, 40, 91, 61]])
    boxes[3, 0] = float("nan")
    index[:4] = 1
    return pixels, corners, sizes, index, boxes, 60, 90, side, aligned


@runs_kernels
@pytest.mark.parametrize("aligned", [False, True])
def test_kernels_align_crops_as_the_cpu_does(aligned: bool) -> None:
    arguments = some_crops(8, 5, aligned) if INTERPRETED else some_crops(MANY, 28, aligned)
    targets, expected = on_gpu(crop_align, cuda_crop_align.align, *arguments), crop_align(*arguments)
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-6)
    assert expected.any()


@runs_kernels
def test_kernels_align_no_crops() -> None:
    assert on_gpu(crop_align, cuda_crop_align.align, *some_crops(4, 0, True)).shape == (4, 0, 0)
    pixels, corners, sizes, index, boxes, *rest = some_crops(4, 3, True)
    empty = (pixels[:0], corners[:0], sizes[:0], index[:0], boxes[:0], *rest)
    assert on_gpu(crop_align, cuda_crop_align.align, *empty).shape == (0, 3, 3)


def photographs(*sizes: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Pixels and geometry of images of h, w, and of height and width after resizing."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (h * w * 3,), generator=generator) for h, w, _, _ in sizes]
    rows, offset = [], 0
    for image, size in zip(images, sizes, strict=True):
        rows.append((offset, *size))
        offset += len(image)
    pixels = torch.cat(images) if images else torch.zeros(0)
    return pixels.to(torch.uint8), torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)


def both_resized(sizes: list[tuple[int, int, int, int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The second is the CPU's in float32."""
    pixels, geometry = photographs(*sizes)
    rest = (20, 352, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    if INTERPRETED:
        resized = cuda_resize.resize(pixels, geometry, *rest, dtype)
    else:
        resized = resize_normalize(pixels.cuda(), geometry, *rest, dtype).cpu()
    return resized, resize_normalize(pixels, geometry, *rest, torch.float32)


@runs_kernels
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)],
    ids=["fp32", "bf16", "fp16"],
)
def test_kernels_resize_as_the_cpu_does(dtype: torch.dtype, tolerance: float) -> None:
    sizes = [(12, 31, 20, 49), (60, 700, 17, 352), (1, 1, 5, 9), (3, 40, 3, 40)]
    resized, expected = both_resized(sizes, dtype)
    torch.testing.assert_close(resized.float(), expected, rtol=tolerance, atol=1e-5)
    assert resized.dtype == dtype
    assert resized.stride() == expected.stride()
    assert not resized[2, :, 5:].any()
    assert not resized[2, :, :, 9:].any()


@runs_kernels
def test_kernels_resize_no_images() -> None:
    assert both_resized([], torch.float32)[0].shape == (0, 3, 20, 352)


@pytest.mark.slow
def test_the_kernels_agree_in_tritons_interpreter() -> None:
    """Runs the tests above on CPU tensors, in a process in which Triton was told to interpret."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_kernels"]
    command += ["-W", "ignore::RuntimeWarning", __file__]  # NumPy's, of the NaN that are tested
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


# --- compiling ---------------------------------------------------------------------------------------------


class _Compiler:
    """Stands in for a kernel: compiles it as a launch with these arguments would, and launches nothing."""

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self._kernel, self._compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*arguments: Any, **options: Any) -> None:
            self._compiled.append(self._kernel.warmup(*arguments, grid=grid, **options))

        return compile_only


class _Device:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self._capability, 32)


@pytest.fixture(params=[80, 90])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Fills with what a launch compiles, for an A100 and an H100 or H200."""
    kernels: list[Any] = []
    modules = (
        (cuda_nms, ("_compare", "_scan")),
        (cuda_roi_align, ("_align",)),
        (cuda_crop_align, ("_align",)),
        (cuda_resize, ("_resize",)),
    )
    for module, names in modules:
        for name in names:
            monkeypatch.setattr(module, name, _Compiler(getattr(module, name), kernels))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", _Device(request.param))
    return kernels


compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@compiles
def test_nms_compiles_without_spilling_registers(compiled: list[Any], tmp_path: Path) -> None:
    for number in (1000, 4096):
        cuda_nms.suppress(*candidates(2, number), 0.5, 100)
    check_machine_code(compiled, 4, tmp_path)


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_roi_align_compiles_to_wide_loads(compiled: list[Any], tmp_path: Path, dtype: torch.dtype) -> None:
    rois, levels = some_rois(10)
    strides = STRIDES[:4]
    for channels, side, ratio, aligned in ((256, 7, 2, False), (256, 14, 2, False), (96, 7, 0, True)):
        features = pyramid(dtype, channels=channels)
        cuda_roi_align.align(features, rois, levels, strides, side, ratio, aligned)
    check_machine_code(compiled, 3, tmp_path)
    for kernel in compiled:
        # Loads of 16 bytes: four corners of every sample, at least.
        assert len(re.findall(r"ld\.global\.v4\.b32", kernel.asm["ptx"])) >= 4


@compiles
def test_crop_align_compiles_without_spilling_registers(compiled: list[Any], tmp_path: Path) -> None:
    for aligned in (False, True):
        cuda_crop_align.align(*some_crops(5, 28, aligned))
    check_machine_code(compiled, 2, tmp_path)


@compiles
def test_resize_compiles_without_spilling_registers(compiled: list[Any], tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cuda_resize.resize(*photographs((9, 9, 20, 20)), 32, 32, [0.5] * 3, [0.2] * 3, dtype)
    check_machine_code(compiled, 3, tmp_path)


def check_machine_code(kernels: list[Any], number: int, folder: Path) -> None:
    """There is machine code for each, and no register is spilled: NVIDIA's own tool says so."""
    assert len(kernels) == number
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel in kernels:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(kernel.metadata.name, kernel.metadata.target, usage.splitlines()[-1])
        assert re.search(r"REG:\d+ STACK:0 .*LOCAL:0", usage), usage


# --- on a GPU alone ----------------------------------------------------------------------------------------


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """Two images on the GPU, smooth at the scale of objects, and their sizes."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 3, 12, 20, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(96, 160), mode="bicubic")
    return images.cuda(), torch.tensor([[96.0, 160.0], [90.0, 150.0]]).cuda()


@pytest.fixture
def gpu_model(tiny_config: MaskRCNNConfig, tiny_model: MaskRCNN) -> MaskRCNN:
    model = MaskRCNN(tiny_config).eval()
    model.load_state_dict(tiny_model.state_dict())
    return model.cuda()


@needs_gpu
@torch.inference_mode()
def test_the_network_finds_on_a_gpu_what_it_finds_on_a_cpu(
    gpu_model: MaskRCNN, tiny_model: MaskRCNN, inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found, mask_probs = gpu_model(*inputs)
    expected, expected_probs = tiny_model(*(x.cpu() for x in inputs))
    assert torch.equal(found.class_indices.cpu(), expected.class_indices)
    torch.testing.assert_close(found.boxes.cpu(), expected.boxes, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mask_probs.cpu(), expected_probs, rtol=1e-3, atol=1e-3)
    assert found.class_indices.any()


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@torch.inference_mode()
def test_the_network_waits_for_nothing(gpu_model: MaskRCNN, inputs: tuple[Tensor, Tensor]) -> None:
    gpu_model(*inputs)  # the anchors are made and sent once for each shape
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu_model(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@torch.inference_mode()
def test_the_network_replays_as_one_graph(gpu_model: MaskRCNN, inputs: tuple[Tensor, Tensor]) -> None:
    images, sizes = inputs
    expected = [gpu_model(images, sizes)[0].boxes, gpu_model(images.flip(3), sizes)[0].boxes]
    fixed = images.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = gpu_model(fixed, sizes)
    for images_now, boxes in zip((images, images.flip(3)), expected, strict=True):
        fixed.copy_(images_now)
        graph.replay()
        torch.testing.assert_close(found.boxes, boxes, rtol=1e-3, atol=1e-2)


@needs_gpu
def test_gradients_of_roi_align_are_the_cpus() -> None:
    rois, levels = some_rois(12)
    rois = rois[7:]  # without NaN, for which torchvision promises nothing
    gradients = []
    for device in ("cpu", "cuda"):
        features = [f.to(device).requires_grad_() for f in pyramid(torch.float32)]
        pooled = roi_align(features, rois.to(device), levels[7:].to(device), STRIDES[:4], 3, 2, False)
        pooled.square().sum().backward()
        gradients.append([f.grad for f in features])
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        assert ours is not None
        assert expected is not None
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)
