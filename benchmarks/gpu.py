"""The network on a GPU: torchvision's eager float32 and ours in bfloat16, side by side, same weights.

Run:  python -m benchmarks.gpu [--out benchmarks/results] [--sections checks throughput] [--photos FOLDER]
      python -m benchmarks.gpu --device cpu --tiny       a rehearsal of this script without a GPU

Needs torch and torchvision alone. Both sides get the same 640×480 images, already on the GPU. torchvision
gets floats, resizes them itself, and gives masks pasted into the image. Ours gets bytes and gives 28×28
probabilities in the CPU's memory, as Predictor has them before it encodes masks. The weights are untrained
ones that behave like trained ones (common/network.py), the images smooth noise unless --photos names a
folder. Rounds alternate between the sides. A section that fails is reported and the others go on; the exit
status is then 1.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import platform
import shlex
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import batched_nms, box_iou
from torchvision.ops import nms as nms_one_group
from torchvision.ops import roi_align as align_one_level

from benchmarks.common.network import same_weights
from maskrcnn_core.inference import prepare_for_inference
from maskrcnn_core.instance_masks import MaskCrops
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.ops import nms, resize_normalize, roi_align
from maskrcnn_core.roi_heads import DetectedBoxes, Instances, pyramid_level, rois_of
from maskrcnn_core.shapes import input_size, tight_shape

PRESETS = ("r50_fpn", "r50_fpn_v2")
BF16_FLOPS = 790e12  # an H200's, measured: 8192³ matrix product on random data
FIGURE_GFLOP = 461.6  # an image of r50_fpn at 800×1088 with 100 detections, counted by hand beforehand
THRESHOLDS = (0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0)
STRIDES = [4, 8, 16, 32]
NMS_THRESHOLD = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that the script runs")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--photos", type=Path, help="folder of photographs to take instead of noise")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side; the median counts")
    parser.add_argument("--profile", action="store_true", help="with the section profile")
    parser.add_argument("--out", type=Path, help="folder for a dated copy of the report")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    if (on_gpu and not torch.cuda.is_available()) or not (on_gpu or args.tiny):
        print("No GPU: nothing was measured. (--device cpu --tiny rehearses the script.)")
        return

    bench = Bench(torch.device(args.device), args.tiny, args.rounds, args.photos)
    chosen = args.sections or [name for name in SECTIONS if name != "profile"]
    names = [name for name in SECTIONS if name in chosen or (name == "profile" and args.profile)]
    report = header(bench)
    print("\n".join(report), flush=True)
    for name in names:
        start = time.perf_counter()
        bench.section, lines = name, [f"## {name}", ""]
        with bench.survive(name):
            lines += SECTIONS[name](bench)
        errors = [f"- **failed**: {error}" for section, error in bench.failures if section == name]
        lines += [*errors, "", f"({time.perf_counter() - start:.0f} s)", ""]
        print("\n".join(lines), flush=True)
        report += lines
        if args.out:  # after each section: whatever ends the next one, this is kept
            args.out.mkdir(parents=True, exist_ok=True)
            kind = "gpu-rehearsal" if bench.tiny else "gpu"
            path = args.out / f"{datetime.date.today().isoformat()}-{kind}.md"
            path.write_text("\n".join(report))
    if bench.failures:
        sys.exit(f"failed: {', '.join(dict.fromkeys(section for section, _ in bench.failures))}")


@dataclass
class Bench:
    """Sizes, inputs and networks, each made when first asked for."""

    device: torch.device
    tiny: bool
    rounds: int
    photos: Path | None
    section: str = ""
    failures: list[tuple[str, str]] = field(default_factory=list)  # section, what
    pairs: dict[str, tuple[Any, MaskRCNN]] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def batches(self) -> tuple[int, ...]:
        return (2,) if self.tiny else (16, 32)

    @property
    def photo_size(self) -> tuple[int, int]:
        return (96, 128) if self.tiny else (480, 640)

    @cached_property
    def photographs(self) -> list[Tensor]:
        """(h, w, 3) uint8 on the CPU, as many as the largest batch."""
        number = max(self.batches)
        if self.photos:
            return load_photographs(self.photos, number, *self.photo_size)
        return [make_photograph(seed, *self.photo_size) for seed in range(number)]

    def pair(self, preset: str) -> tuple[Any, MaskRCNN]:
        """torchvision's network on the device, and ours in float32 on the CPU, with the same weights."""
        if preset not in self.pairs:
            small = {"min_size_px": 96, "max_size_px": 160, "rpn_post_nms": 50, "max_detections": 10}
            photograph = self.photographs[0].permute(2, 0, 1) / 255
            reference, ours = same_weights(preset, photograph, **(small if self.tiny else {}))
            self.pairs[preset] = (reference.to(self.device), ours)
        return self.pairs[preset]

    def seconds(self, **works: Callable[[], object]) -> dict[str, float]:
        """Median time of each, rounds alternating; a round repeats it for a third of a second or so."""
        repeats = {}
        for name, work in works.items():
            self.timed(work)  # compiles, chooses algorithms, allocates
            enough = 0.0 if self.tiny else 0.3
            repeats[name] = max(1, min(100, int(enough / max(self.timed(work), 1e-6))))
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.rounds):
            for name, work in works.items():
                times[name].append(self.timed(work, repeats[name]) / repeats[name])
        return {name: statistics.median(of_name) for name, of_name in times.items()}

    def timed(self, work: Callable[[], object], repeats: int = 1) -> float:
        if not self.on_gpu:
            start_s = time.perf_counter()
            for _ in range(repeats):
                work()
            return time.perf_counter() - start_s
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def mfu(self, flop: float, seconds: float) -> str:
        return f"{flop / seconds / BF16_FLOPS:.1%}" if self.on_gpu else "not measured"

    @contextmanager
    def survive(self, what: str) -> Iterator[None]:
        """Write an error down and go on."""
        try:
            yield
        except Exception as error:  # whatever it is: time on a GPU is short, and the rest may still work
            traceback.print_exc()
            self.failures.append((self.section, f"{what}: {type(error).__name__}: {str(error)[:300]}"))


# --- inputs ------------------------------------------------------------------------------------------------


def make_photograph(seed: int, height: int, width: int) -> Tensor:
    """(h, w, 3) uint8: noise whose strength falls with its frequency, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for cells in (2, 4, 8, 16, 32, 64):
        coarse = torch.randn(1, 3, cells, cells * width // height, generator=generator)
        image += interpolate(coarse, size=(height, width), mode="bicubic") / cells**0.75
    return (128 + 60 * image[0].permute(1, 2, 0)).clamp(0, 255).to(torch.uint8).contiguous()


def load_photographs(folder: Path, number: int, height: int, width: int) -> list[Tensor]:
    """The first landscape ones, all resized to one size; repeated where there are few."""
    from torchvision.io import ImageReadMode, decode_image

    found: list[Tensor] = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
        pixels = decode_image(str(path), ImageReadMode.RGB)
        if pixels.shape[2] > pixels.shape[1]:
            resized = interpolate(pixels[None].float(), size=(height, width), mode="bilinear", antialias=True)
            found.append(resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).contiguous())
        if len(found) == number:
            break
    if not found:
        raise FileNotFoundError(f"no landscape photographs (.jpg, .png) below {folder}")
    return [found[i % len(found)] for i in range(number)]


class Ours:
    """Predictor's way of a batch whose pixels are on the device; steps as in Predictor._forward."""

    def __init__(self, bench: Bench, model: MaskRCNN, batch: int, dtype: torch.dtype) -> None:
        photographs = bench.photographs[:batch]
        self.config, self.device, self.dtype = model.config, bench.device, dtype
        self.model = prepare_for_inference(model, bench.device, dtype)
        height, width = bench.photo_size
        size = input_size(model.config, height, width)
        self.shape = tight_shape(size)
        self.pixels = torch.cat([p.flatten() for p in photographs]).to(bench.device)
        self.geometry = torch.tensor([(i * height * width * 3, height, width, *size) for i in range(batch)])
        self.sizes = torch.tensor([size] * batch, dtype=torch.float32).to(bench.device)

    def images(self) -> Tensor:
        mean, std = list(self.config.image_mean), list(self.config.image_std)
        images: Tensor = resize_normalize(self.pixels, self.geometry, *self.shape, mean, std, self.dtype)
        return images.contiguous() if self.dtype == torch.float32 else images

    @torch.inference_mode()
    def forward(self) -> tuple[DetectedBoxes, Tensor]:
        """Every row of the result, empty ones too, and nothing waits."""
        found, mask_probs = self.model(self.images(), self.sizes)
        return found, mask_probs

    @torch.inference_mode()
    def predict(self) -> tuple[Tensor, Tensor]:
        """(T, 7) image index, box, score, class index, and (T, M, M) mask probabilities, on the CPU."""
        found, features = self.model.detect(self.images(), self.sizes)
        flags = torch.stack((found.complete, found.finite), dim=1).float()
        rows = torch.cat((found.boxes, found.scores[..., None], found.class_indices[..., None]), dim=2)
        packed = torch.cat((rows.flatten(1), flags), dim=1).cpu()  # the first wait
        if not packed[:, -2:].all():
            raise RuntimeError("detections are not finite, or candidates were left out")
        table = packed[:, :-2].reshape(len(packed), -1, 6)
        image_index, row = torch.nonzero(table[..., 5], as_tuple=True)
        detections = torch.cat((image_index[:, None].float(), table[image_index, row]), dim=1)
        rois, classes = detections[:, :5].contiguous(), detections[:, 6].to(torch.int64)
        mask_probs = self.model.mask_probs(features, self._upload(rois), self._upload(classes))
        return detections, mask_probs.cpu()  # the second wait

    def set_threshold(self, score: float) -> None:
        self.model.roi_heads.config = self.config.replace(score_threshold=score)

    def _upload(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


class Theirs:
    """torchvision's network as it comes, on floats that are on the device."""

    def __init__(self, bench: Bench, reference: Any, batch: int) -> None:
        self.model = reference
        self.images = [(p.permute(2, 0, 1) / 255).to(bench.device) for p in bench.photographs[:batch]]

    @torch.inference_mode()
    def predict(self) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = self.model(self.images)
        return found

    @torch.inference_mode()
    def predict_unpasted(self) -> list[dict[str, Tensor]]:
        """Boxes in input pixels and (N, 1, M, M) masks, as the network gives them."""
        postprocess = self.model.transform.postprocess
        self.model.transform.postprocess = lambda found, *_: found
        try:
            return self.predict()
        finally:
            self.model.transform.postprocess = postprocess


# --- sections ----------------------------------------------------------------------------------------------


def checks(bench: Bench) -> list[str]:
    """Are the results right? Before anything is timed."""
    lines = [
        "A detection is matched where the other side has one of its class that overlaps it by IoU > 0.5.",
        "TF32 is off here. Boxes in input pixels, masks as probabilities on 28×28.",
        "",
        "| network | compared | detections | matched | score | box, px | mask |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    batch = bench.batches[0]
    for preset in PRESETS:
        with bench.survive(preset), tf32(False):
            reference, model = bench.pair(preset)
            theirs = Theirs(bench, reference, batch).predict_unpasted()
            expected = [(f["boxes"], f["scores"], f["labels"], f["masks"][:, 0]) for f in theirs]
            fp32 = by_image(*Ours(bench, model, batch, torch.float32).predict(), batch)
            bf16 = by_image(*Ours(bench, model, batch, torch.bfloat16).predict(), batch)
            share, row = compare([tuple(x.cpu() for x in image) for image in expected], fp32)
            lines.append(f"| {preset} | our fp32 to torchvision's | {row} |")
            if share < 0.99:
                bench.failures.append((bench.section, f"{preset}: only {share:.1%} of torchvision's matched"))
            _, row = compare(fp32, bf16)
            lines.append(f"| {preset} | our bf16 to our fp32 | {row} |")
            sure = [tuple(x[image[1] > 0.5] for x in image) for image in fp32]
            lines.append(f"| {preset} | the same, scores above 0.5 | {compare(sure, bf16)[1]} |")
    return [*lines, "", "Differences: median, and the greatest, of what is matched."]


def throughput(bench: Bench) -> list[str]:
    """The table that the others explain."""
    lines = [
        "Images a second. 'as found': a score threshold of 0.05; 'full': the highest threshold at which",
        "every image has max_detections (100). MFU: counted operations over time over 790 TFLOP/s.",
        "",
        "| network | batch | detections | torchvision fp32 | without pasting | ours bf16 | ratio | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for preset in PRESETS:
        for batch in bench.batches:
            with bench.survive(f"{preset}, batch {batch}"):
                reference, model = bench.pair(preset)
                detect_flop, mask_flop = count_flop(model.config, bench.photo_size)
                gflop = (detect_flop + 100 * mask_flop) / 1e9
                known = f" ({FIGURE_GFLOP} by hand)" if preset == "r50_fpn" and not bench.tiny else ""
                notes.append(f"- {preset}: {gflop:.1f} GFLOP an image with 100 detections{known}")
                ours, theirs = Ours(bench, model, batch, torch.bfloat16), Theirs(bench, reference, batch)
                full = threshold_for_all(ours, batch)
                for load, score in (("as found", THRESHOLDS[0]), (f"full (> {full:g})", full)):
                    ours.set_threshold(score)
                    reference.roi_heads.score_thresh = score
                    found = len(ours.predict()[0])
                    expected = sum(len(image["boxes"]) for image in theirs.predict())
                    s = bench.seconds(a=theirs.predict, b=theirs.predict_unpasted, c=ours.predict)
                    flop = batch * detect_flop + found * mask_flop
                    lines.append(
                        f"| {preset} | {batch} | {load}: {expected / batch:.1f}, ours {found / batch:.1f} "
                        f"| {batch / s['a']:.1f} | {batch / s['b']:.1f} | {batch / s['c']:.1f} "
                        f"| {s['a'] / s['c']:.2f}× | {bench.mfu(flop, s['c'])} |"
                    )
                reference.roi_heads.score_thresh = THRESHOLDS[0]
    return [*lines, "", *dict.fromkeys(notes), "- torchvision: cuDNN's TF32 on, as torch has it by default"]


def variants(bench: Bench) -> list[str]:
    """r50_fpn in bfloat16, every row of the result computed, from bytes on the GPU."""
    batch = bench.batches[0]
    _, model = bench.pair("r50_fpn")
    detect_flop, mask_flop = count_flop(model.config, bench.photo_size)
    ours = Ours(bench, model, batch, torch.bfloat16)
    flop = batch * (detect_flop + model.config.max_detections * mask_flop)
    expected = ours.forward()
    lines = [
        f"Batch {batch}. `forward` computes the masks of all {model.config.max_detections} rows of an image,",
        "with results left on the device.",
        "",
        "| variant | ms a batch | images/s | MFU | made in | boxes like the first row's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def add(name: str, make: Callable[[], Callable[[], tuple[DetectedBoxes, Tensor]]]) -> None:
        with bench.survive(name):
            start = time.perf_counter()
            work = make()
            result = work()
            if bench.on_gpu:
                torch.cuda.synchronize()
            made_s = time.perf_counter() - start
            same = (result[0].boxes - expected[0].boxes).abs().amax(2) < 1  # of the same rank, to a pixel
            s = bench.seconds(work=work)["work"]
            lines.append(
                f"| {name} | {1e3 * s:.2f} | {batch / s:.1f} | {bench.mfu(flop, s)} | {made_s:.1f} s "
                f"| {same.float().mean():.1%} |"
            )

    def compiled() -> Ours:
        other = copy.copy(ours)
        other.model = copy.deepcopy(ours.model)
        other.model.backbone.compile()
        other.model.rpn.head.compile()
        return other

    add("eager", lambda: ours.forward)
    with cudnn_benchmark():
        add("eager, cudnn.benchmark", lambda: ours.forward)
        if bench.on_gpu:
            add("CUDA graph, cudnn.benchmark", lambda: as_graph(ours))
    if bench.on_gpu:
        add("backbone, FPN and RPN head through torch.compile", lambda: compiled().forward)
        add("the same as a CUDA graph", lambda: as_graph(compiled()))
    else:
        lines.append("| CUDA graph, torch.compile | not measured | | | | |")
    return lines


def operators(bench: Bench) -> list[str]:
    """The three operators alone, against torchvision's way of doing the same."""
    lines = ["| operator | torchvision, ms | ours, ms | ratio | |", "| --- | --- | --- | --- | --- |"]

    def add(name: str, theirs: Callable[[], object], ours: Callable[[], object], num_bytes: int = 0) -> None:
        s = bench.seconds(theirs=theirs, ours=ours)
        rate = f"{num_bytes / s['ours'] / 1e12:.2f} TB/s, each byte counted once" if num_bytes else ""
        times = f"{1e3 * s['theirs']:.3f} | {1e3 * s['ours']:.3f} | {s['theirs'] / s['ours']:.1f}×"
        lines.append(f"| {name} | {times} | {rate} |")

    batch = bench.batches[0]
    with bench.survive("nms"):
        for groups, number, num_labels in ((5 * batch, 1000, 1), (batch, 4096, 90)):
            number = number // 10 if bench.tiny else number
            boxes = make_boxes(bench, groups, number)
            labels = torch.randint(0, num_labels, (groups, number), dtype=torch.int32).to(bench.device)
            for num_valid in sorted({number, min(number, 300)}, reverse=True):
                valid = (torch.arange(number) < num_valid).expand(groups, -1).contiguous().to(bench.device)
                check_nms(boxes, labels, valid)
                add(
                    f"nms, {groups} groups of {number}, {num_valid} valid",
                    partial(nms_by_torchvision, boxes[:, :num_valid], labels[:, :num_valid], batch),
                    partial(nms, boxes, labels, valid, NMS_THRESHOLD, number),
                )
    with bench.survive("roi_align"):
        shape = (128, 192) if bench.tiny else (800, 1088)
        planar = make_features(bench, shape)
        for number, side in ((1000, 7), (100, 14)):
            number = number // 10 if bench.tiny else number
            rois = rois_of(make_boxes(bench, batch, number, shape))
            levels = pyramid_level(rois[:, 1:])
            expected = align_by_torchvision(planar, rois, levels, side)
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                maps = [f.to(dtype, memory_format=torch.channels_last) for f in planar]
                pooled = roi_align(maps, rois, levels, STRIDES, side, 2, False)
                tolerance = 1e-4 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(pooled.float(), expected, rtol=tolerance, atol=tolerance)
                add(
                    f"roi_align, {len(rois)} RoIs of {side}×{side}×256, {name} (torchvision: fp32)",
                    partial(align_by_torchvision, planar, rois, levels, side),
                    partial(roi_align, maps, rois, levels, STRIDES, side, 2, False),
                    pooled.nbytes + sum(f.nbytes for f in maps),
                )
    with bench.survive("resize_normalize"):
        reference, model = bench.pair("r50_fpn")
        ours, theirs = Ours(bench, model, batch, torch.bfloat16), Theirs(bench, reference, batch)
        num_bytes = ours.images().nbytes + ours.pixels.nbytes
        add(
            f"resize_normalize, {batch} images (torchvision: fp32)",
            lambda: reference.transform(theirs.images),
            ours.images,
            num_bytes,
        )
    if bench.on_gpu:
        with bench.survive("other constants"):
            lines += other_constants(bench)
    return lines


def other_constants(bench: Bench) -> list[str]:
    """Our kernels with the constants that were chosen without a GPU, and their neighbours."""
    from maskrcnn_core.ops.cuda import nms as cuda_nms
    from maskrcnn_core.ops.cuda import resize as cuda_resize
    from maskrcnn_core.ops.cuda import roi_align as cuda_roi_align

    batch = bench.batches[0]
    shape = (128, 192) if bench.tiny else (800, 1088)
    maps = [f.to(torch.bfloat16, memory_format=torch.channels_last) for f in make_features(bench, shape)]

    def align(number: int, side: int) -> Callable[[], object]:
        rois = rois_of(make_boxes(bench, batch, number, shape))
        levels = pyramid_level(rois[:, 1:])
        return partial(roi_align, maps, rois, levels, STRIDES, side, 2, False)

    boxes = make_boxes(bench, 5 * batch, 1000)
    labels = torch.zeros(boxes.shape[:2], dtype=torch.int32, device=bench.device)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=bench.device)
    ours = Ours(bench, bench.pair("r50_fpn")[1], batch, torch.bfloat16)
    trials: list[tuple[str, Any, dict[str, tuple[int, ...]], Callable[[], object]]] = [
        ("roi_align 7×7", cuda_roi_align, {"FEW_ROIS": (0, 10**9), "MAX_WARPS": (4, 8)}, align(1000, 7)),
        ("roi_align 14×14", cuda_roi_align, {"FEW_ROIS": (0, 10**9), "MAX_WARPS": (4, 8)}, align(100, 14)),
        ("nms", cuda_nms, {"ROWS": (64, 128, 256)}, partial(nms, boxes, labels, valid, NMS_THRESHOLD, 1000)),
        ("resize_normalize", cuda_resize, {"BLOCK": (512, 1024, 2048)}, ours.images),
    ]
    lines = ["", "| kernel | constant | ms |", "| --- | --- | --- |"]
    for kernel, module, constants, work in trials:
        for name, values in constants.items():
            chosen = getattr(module, name)
            for value in values:
                setattr(module, name, value)
                try:
                    with bench.survive(f"{kernel}, {name} = {value}"):
                        lines.append(
                            f"| {kernel} | {name} = {value} | {1e3 * bench.seconds(w=work)['w']:.3f} |"
                        )
                finally:
                    setattr(module, name, chosen)
    return lines


def waits(bench: Bench) -> list[str]:
    """How often a batch makes the CPU wait for the GPU, as torch itself counts."""
    if not bench.on_gpu:
        return ["not measured: needs a GPU"]
    ours = Ours(bench, bench.pair("r50_fpn")[1], bench.batches[0], torch.bfloat16)
    lines = []
    for name, work, most in (("predict", ours.predict, 2), ("forward", ours.forward, 0)):
        work()  # what happens once a shape: anchors, compilation
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = [
            f"{Path(w.filename).name}:{w.lineno}"
            for w in caught
            if "called a synchronizing" in str(w.message)
        ]
        lines.append(f"- {name}: {len(places)} waits (at most {most} wanted): {', '.join(places) or 'none'}")
        if len(places) > most:
            bench.failures.append((bench.section, f"{name} waits {len(places)} times"))
    return lines


def training(bench: Bench) -> list[str]:
    """A step of r50_fpn: forward, backward, AdamW. Both sides: bfloat16 autocast, the same layers frozen."""
    batch, instances = (2, 3) if bench.tiny else (8, 8)
    reference, model = bench.pair("r50_fpn")
    ours = Ours(bench, model, batch, torch.float32)
    images = ours.images().contiguous(memory_format=torch.channels_last)
    height, width = bench.photo_size
    size = input_size(model.config, height, width)
    own, their_targets = [], []
    for seed in range(batch):
        boxes = make_boxes(bench, 1, instances, (height, width), seed)[0]
        classes = torch.arange(1, instances + 1, device=bench.device)
        scale = boxes.new_tensor([size[1] / width, size[0] / height] * 2)
        crops = MaskCrops.from_dense(ellipses(boxes * scale, *images.shape[2:]))
        own.append(Instances(boxes * scale, classes, crops, boxes.new_zeros(0, 4)))
        their_targets.append({"boxes": boxes, "labels": classes, "masks": ellipses(boxes, height, width)})
    their_images = Theirs(bench, reference, batch).images

    def step_of(network: Any, losses: Callable[[], dict[str, Tensor]]) -> Callable[[], object]:
        network.train()
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, 1e-6)

        def step() -> None:
            with torch.autocast(bench.device.type, torch.bfloat16):
                total = torch.stack(list(losses().values())).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

        return step

    lines = ["| side | ms a step | images/s | peak memory, GiB |", "| --- | --- | --- | --- |"]
    trained = copy.deepcopy(model).to(bench.device).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(reference)
    for name, parameter in trained.named_parameters():
        theirs.get_parameter(name).requires_grad_(parameter.requires_grad)
    sides: list[tuple[str, Any, Callable[[], dict[str, Tensor]]]] = [
        ("torchvision", theirs, lambda: theirs(their_images, their_targets)),
        ("ours", trained, lambda: trained.losses(images, [size] * batch, own)),
    ]
    for name, network, losses in sides:
        with bench.survive(name):
            step = step_of(network, losses)
            if bench.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            s = bench.seconds(step=step)["step"]
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if bench.on_gpu else "not measured"
            lines.append(f"| {name} | {1e3 * s:.1f} | {batch / s:.1f} | {peak} |")
    return [f"Batch {batch}, {instances} instances an image.", "", *lines]


def profile(bench: Bench) -> list[str]:
    """Where a batch of `predict` spends its time on the GPU."""
    if not bench.on_gpu:
        return ["not measured: needs a GPU"]
    ours = Ours(bench, bench.pair("r50_fpn")[1], bench.batches[0], torch.bfloat16)
    ours.set_threshold(threshold_for_all(ours, bench.batches[0]))
    for _ in range(3):
        ours.predict()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            ours.predict()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.key_averages() if str(e.device_type).endswith("CUDA")]
    total = sum(e.self_device_time_total for e in kernels)
    lines = [f"{total / 3e3:.2f} ms of kernels a batch.", "", "| ms | share | calls | kernel |"]
    lines.append("| --- | --- | --- | --- |")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:30]:
        share = e.self_device_time_total / total
        lines.append(
            f"| {e.self_device_time_total / 3e3:.3f} | {share:.1%} | {e.count / 3:.0f} | `{e.key[:90]}` |"
        )
    return lines


# --- what the sections share --------------------------------------------------------------------------------

Found = tuple[Tensor, ...]  # of one image: boxes (N, 4), scores (N,), classes (N,), masks (N, M, M)


def by_image(detections: Tensor, mask_probs: Tensor, batch: int) -> list[Found]:
    """What Ours.predict gives, image by image."""
    own = [detections[:, 0] == image for image in range(batch)]
    return [(detections[o, 1:5], detections[o, 5], detections[o, 6], mask_probs[o]) for o in own]


def compare(expected: list[Found], actual: list[Found]) -> tuple[float, str]:
    """The share of `expected` that is matched, and the cells of a table's row."""
    differences: list[tuple[Tensor, ...]] = []
    number = sum(len(image[1]) for image in expected)
    for (boxes, scores, classes, masks), (boxes_b, scores_b, classes_b, masks_b) in zip(
        expected, actual, strict=True
    ):
        if len(boxes) == 0 or len(boxes_b) == 0:
            continue
        overlap = torch.where(classes[:, None] == classes_b[None], box_iou(boxes, boxes_b), 0.0)
        best = overlap.max(dim=1)
        a, b = best.values > 0.5, best.indices[best.values > 0.5]
        differences.append(
            (
                (scores[a] - scores_b[b]).abs(),
                (boxes[a] - boxes_b[b]).abs().amax(dim=1),
                (masks[a] - masks_b[b]).abs().mean(dim=(1, 2)),
            )
        )
    columns = [torch.cat(column) for column in zip(*differences, strict=True)]
    num_matched = len(columns[0]) if columns else 0
    cells = [f"{float(c.median()):.2g}, {float(c.max()):.2g}" for c in columns] if num_matched else ["–"] * 3
    share = num_matched / max(1, number)
    num_actual = sum(len(image[1]) for image in actual)
    return share, f"{number}, {num_actual} | {share:.2%} | " + " | ".join(cells)


def threshold_for_all(ours: Ours, batch: int) -> float:
    """The highest of THRESHOLDS at which every image has max_detections detections."""
    for score in THRESHOLDS:
        ours.set_threshold(score)
        image_index = ours.predict()[0][:, 0].to(torch.int64)
        if int(image_index.bincount(minlength=batch).min()) == ours.config.max_detections:
            return score
    raise RuntimeError("some image has fewer than max_detections detections even without a threshold")


@cache
def count_flop(config: Any, photo_size: tuple[int, int]) -> tuple[float, float]:
    """Of an image without masks, and of one mask: multiplications and additions in convolutions and matrix
    products, two a pair."""
    size = input_size(config, *photo_size)
    network = MaskRCNN(config).eval().to("meta")
    sizes = torch.tensor([size], dtype=torch.float32, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as whole:
        _, features = network.detect(torch.empty(1, 3, *tight_shape(size), device="meta"), sizes)
    with torch.inference_mode(), FlopCounterMode(display=False) as mask:
        network.mask_probs(
            features, torch.empty(1, 5, device="meta"), torch.ones(1, dtype=torch.int64, device="meta")
        )
    return float(whole.get_total_flops()), float(mask.get_total_flops())


def as_graph(ours: Ours) -> Callable[[], tuple[DetectedBoxes, Tensor]]:
    """The network captured once; the images are resized outside of it."""
    with torch.inference_mode():
        images = ours.images()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                ours.model(images, ours.sizes)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = ours.model(images, ours.sizes)

    @torch.inference_mode()
    def replay() -> tuple[DetectedBoxes, Tensor]:
        images.copy_(ours.images())
        graph.replay()
        found, mask_probs = result
        return found, mask_probs

    return replay


def make_boxes(
    bench: Bench, groups: int, number: int, shape: tuple[int, int] = (800, 1088), seed: int = 0
) -> Tensor:
    """(G, N, 4) on the device, within the shape: N / 10 objects of COCO's sizes, found ten times or so."""
    generator = torch.Generator().manual_seed(seed)
    objects = -(-number // 10)
    extent = torch.tensor([shape[1], shape[0]], dtype=torch.float32)
    sides = torch.exp(
        torch.tensor([-2.5, -2.1]) + 1.15 * torch.randn(groups, objects, 2, generator=generator)
    )
    centers = torch.rand(groups, objects, 2, generator=generator)
    which = torch.randint(0, objects, (groups, number, 1), generator=generator).expand(-1, -1, 2)
    side = sides.gather(1, which) * torch.exp(0.15 * torch.randn(groups, number, 2, generator=generator))
    center = centers.gather(1, which) + 0.1 * side * torch.randn(groups, number, 2, generator=generator)
    side = side.clamp(0.01, 1)
    boxes = torch.cat((center - side / 2, center + side / 2), dim=2).clamp(0, 1) * extent.repeat(2)
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    return boxes.to(bench.device)


def make_features(bench: Bench, shape: tuple[int, int]) -> list[Tensor]:
    """P2 ... P5 of a batch, float32, channels first."""
    batch = bench.batches[0]
    return [torch.randn(batch, 256, shape[0] // s, shape[1] // s, device=bench.device) for s in STRIDES]


def nms_by_torchvision(boxes: Tensor, labels: Tensor, batch: int) -> list[Tensor]:
    """Image by image, as torchvision's RPN and heads do it; the groups of an image are labels there."""
    groups, number = labels.shape
    group = torch.arange(groups, device=boxes.device)[:, None] * 1000
    by_image = (labels + group).reshape(batch, -1)
    scores = torch.arange(number, 0, -1.0, device=boxes.device).repeat(groups // batch)
    pairs = zip(boxes.reshape(batch, -1, 4), by_image, strict=True)
    return [batched_nms(own, scores, of_image, NMS_THRESHOLD) for own, of_image in pairs]


def check_nms(boxes: Tensor, labels: Tensor, valid: Tensor) -> None:
    """Raises RuntimeError where ours keeps other boxes than torchvision, label by label."""
    kept = nms(boxes, labels, valid, NMS_THRESHOLD, boxes.shape[1])[0]
    expected = torch.zeros_like(kept)
    for label in labels[0].unique():
        own = torch.where((labels[0] == label) & valid[0])[0]
        scores = torch.arange(len(own), 0, -1.0, device=boxes.device)
        expected[own[nms_one_group(boxes[0, own], scores, NMS_THRESHOLD)]] = True
    wrong = int((kept != expected).sum())
    if wrong > len(kept) // 1000:  # an IoU within a rounding of the threshold may fall on either side
        raise RuntimeError(f"{wrong} of {len(kept)} candidates are not kept as torchvision keeps them")


def align_by_torchvision(features: list[Tensor], rois: Tensor, levels: Tensor, side: int) -> Tensor:
    """As MultiScaleRoIAlign does it, level by level."""
    pooled = features[0].new_empty((len(rois), features[0].shape[1], side, side))
    for level, (of_level, stride) in enumerate(zip(features, STRIDES, strict=True)):
        own = torch.where(levels == level)[0]
        pooled[own] = align_one_level(of_level, rois[own], side, 1 / stride, 2, False)
    return pooled


def ellipses(boxes: Tensor, height: int, width: int) -> Tensor:
    """(G, H, W) uint8, one inscribed into each box."""
    y = torch.arange(height, device=boxes.device)[None, :, None]
    x = torch.arange(width, device=boxes.device)[None, None, :]
    x0, y0, x1, y1 = (c[:, None, None] for c in boxes.unbind(1))
    inside = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 < 1
    return inside.to(torch.uint8)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 convolutions may round their inputs to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """cuDNN tries its algorithms for each new shape and keeps the fastest."""
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


def header(bench: Bench) -> list[str]:
    packages = ("torch", "torchvision", "triton")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        hardware = f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        hardware += f"{properties.total_memory / 2**30:.0f} GiB"
        versions += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    else:
        hardware = f"CPU ({platform.machine()}): a rehearsal, its figures mean nothing"
    height, width = bench.photo_size
    images = f"photographs of {bench.photos.name}" if bench.photos else "smooth noise"
    return [
        "# Mask R-CNN on a GPU: torchvision's float32 and ours in bfloat16",
        "",
        f"- date: {datetime.date.today().isoformat()}",
        f"- hardware: {hardware}",
        f"- versions: Python {platform.python_version()}, {versions}",
        f"- command: `python -m benchmarks.gpu {shlex.join(sys.argv[1:])}`",
        f"- images: {images}, {width}×{height}; median of {bench.rounds} rounds",
        "",
    ]


SECTIONS: dict[str, Callable[[Bench], list[str]]] = {
    "checks": checks,
    "waits": waits,
    "throughput": throughput,
    "operators": operators,
    "variants": variants,
    "training": training,
    "profile": profile,
}

if __name__ == "__main__":
    main()
