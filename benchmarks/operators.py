"""How many operators a batch takes, and how many of them would make the processor wait for a GPU.

Run:  python benchmarks/operators.py [--photos ../shared/data/coco_photos] [--out benchmarks/results]

A batch of photographs with 100 detections each goes through both networks on a CPU while every operator that
torch dispatches is counted: from pixels to pasted masks (torchvision), and to mask probabilities on the host,
from where no more torch is needed (ours). Launching an operator takes some microseconds however little it
computes; waiting empties the GPU's queue.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import photographs as photos
from benchmarks.common.network import same_weights
from benchmarks.common.report import arguments, write_report
from maskrcnn_core.predictor import Predictor
from maskrcnn_core.shapes import input_size, tight_shape

# What gives the host a value of the device, or a tensor whose size only the device knows.
WAITING = (
    "aten._local_scalar_dense",  # .item(), bool(), int()
    "aten.nonzero",
    "aten.masked_select",
    "aten.unique",
    "aten._unique2",
    "aten.equal",
    "aten.is_nonzero",
    "torchvision.nms",  # gives as many as it keeps
)
INDEXING = ("aten.index.Tensor", "aten.index_put_", "aten.index_put.", "aten._index_put_impl_")
WANTED_RATIO, WANTED_WAITS = 20, 2


class Trace(TorchDispatchMode):
    """Counts operators. Views and allocations are counted too: each passes the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        self.operators[name] += 1
        if name.startswith(WAITING):
            self.waits[name] += 1
        elif name.startswith(INDEXING) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.waits[f"{name} by a mask"] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = arguments(__doc__)
    photos.add_options(parser)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument(
        "--side", type=int, default=256, help="shorter side in px; counts do not depend on it"
    )
    args = parser.parse_args()

    # One shape, so that ours is one batch: torchvision pads to the largest anyway.
    images = [
        image
        for image in photos.load(args.photos, splits=("val2017", "train2017"))
        if image.shape == (480, 640, 3)
    ]
    images = images[: args.images]
    as_tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in images]
    reference, model = same_weights(
        "r50_fpn", as_tensors[0], min_size_px=args.side, max_size_px=2 * args.side, score_threshold=0.01
    )
    predictor = Predictor(model, batch_size=len(images), precision="bf16")
    theirs, ours = Trace(), Trace()
    with torch.inference_mode():
        reference(as_tensors)  # once before: what is done once a process does not count
    predictor.predict(images)
    with torch.inference_mode(), theirs, transfers_counted(theirs):
        their_detections = [len(found["boxes"]) for found in reference(as_tensors)]
    with torch.inference_mode(), ours, transfers_counted(ours):
        # What `predict` does with a micro-batch, here on the thread that is traced.
        sizes = [input_size(model.config, *image.shape[:2]) for image in images]
        found = predictor._detect(predictor._input(images, tight_shape(sizes[0])), sizes)
        our_detections = [len(of_image.scores) for of_image in found]
    if set(their_detections + our_detections) != {100}:
        sys.exit(f"not 100 detections each: {their_detections} and {our_detections}")
    totals = [sum(trace.operators.values()) for trace in (theirs, ours)]
    waits = [sum(trace.waits.values()) for trace in (theirs, ours)]
    table = [
        ["a batch of 8", "torchvision", "ours", "ratio", "must reach"],
        [
            "operators dispatched",
            f"{totals[0]}",
            f"{totals[1]}",
            f"{totals[0] / totals[1]:.0f}×",
            f"{WANTED_RATIO}×",
        ],
        ["of these would wait for a GPU", f"{waits[0]}", f"{waits[1]}", "", f"at most {WANTED_WAITS}"],
    ]
    facts = [
        f"{len(images)} photographs, 100 detections each",
        f"torchvision waits in: {most_common(theirs.waits)}",
        f"ours waits in: {most_common(ours.waits)}",
        f"ours dispatches most: {most_common(ours.operators)}",
    ]
    write_report("operators", "Operators of a batch", ["torch", "torchvision"], facts, table, args.out)
    if totals[0] < WANTED_RATIO * totals[1] or waits[1] > WANTED_WAITS:
        sys.exit("a figure is not what it must be")


@contextmanager
def transfers_counted(trace: Trace) -> Iterator[None]:
    """On a CPU `.cpu()` does nothing and is not dispatched; on a GPU it waits: count the calls."""
    real = torch.Tensor.cpu

    def cpu(tensor: Tensor) -> Tensor:
        trace.waits[".cpu()"] += 1
        return real(tensor)

    with patch.object(torch.Tensor, "cpu", cpu):
        yield


def most_common(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common(5)) or "nothing"


if __name__ == "__main__":
    main()
