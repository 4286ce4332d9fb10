"""What bfloat16 costs in accuracy: AP of one network on the same annotated photographs in both precisions.

Run:  python benchmarks/precision.py [--weights CHECKPOINT] [--photos ../shared/data/facades] [--out ...]

No trained r50_fpn can be shipped or downloaded. One that `masklake train` made on these photographs is given
by --weights, and measured on the photographs that it was trained on and on some it never saw: for the
difference between two precisions it does not matter that it knows the first by heart. Many instances of few
categories make the difference readable: with 67 instances of 30 categories, AP moves by 0.0025 with any
change of a rounding. Without --weights there is the bundled checkpoint alone.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

from benchmarks.common import photographs as photos
from benchmarks.common.report import arguments, write_report
from jobs.demo.lake import write_scene_lake
from jobs.demo.scenes import render_scene
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import parse_checkpoint
from maskrcnn_core.coco_eval import evaluate_coco
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.predictor import Precision, Predictor
from schemas.specs import StorageSpec

ALLOWED = 0.001
KINDS: dict[Literal["bbox", "segm"], str] = {"bbox": "boxes", "segm": "masks"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--photos",
        type=Path,
        default=Path("../shared/data/facades"),
        help="folder with train/*.jpg, val/*.jpg, annotations/instances_train.json and instances_val.json",
    )
    parser.add_argument("--images", type=int, default=100, help="photographs of its training")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--weights", type=Path, help="checkpoint, trained on the photographs")
    args = parser.parse_args()

    table = [["network", "labels", "AP", "fp32", "bf16", "difference", "at most"]]
    facts = []
    if args.weights:
        model = parse_checkpoint(args.weights.read_bytes(), str(args.weights)).build()
        for part, number, labels in (
            ("train", args.images, "of its training"),
            ("val", None, "it never saw"),
        ):
            images, truth = photos.load_annotated(args.photos, number, part)
            facts.append(f"{len(images)} photographs {labels}: {len(truth['annotations'])} instances")
            known = dict(enumerate(images, 1))
            name = f"{model.config.preset}, trained here"
            table += compare(name, model, f"{len(images)} photographs {labels}", known, truth)
    scenes, scene_truth = demo_scenes(args.scenes)
    demo = parse_checkpoint(*read_checkpoint_bytes("demo", Storage(StorageSpec()))).build()
    table += compare("lite, bundled", demo, f"{len(scenes)} scenes it never saw", scenes, scene_truth)
    packages = ["torch", "torchvision", "pycocotools"]
    write_report(
        "precision", "bfloat16 against float32: AP on the same labels", packages, facts, table, args.out
    )


def compare(
    network: str,
    model: MaskRCNN,
    labels: str,
    images: dict[int, photos.Photograph],
    truth: dict[str, Any],
) -> list[list[str]]:
    """Two rows: AP of boxes and of masks, in both precisions."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    found = {}
    for precision in precisions:
        predictor = Predictor(model, precision=precision)
        found[precision] = {number: predictor.predict([image])[0] for number, image in images.items()}
    rows = []
    for kind, name in KINDS.items():
        exact, rough = (evaluate_coco(truth, found[precision], kind)["AP"] for precision in precisions)
        rows.append(
            [network, labels, name, f"{exact:.4f}", f"{rough:.4f}", f"{rough - exact:+.4f}", f"{ALLOWED}"]
        )
    return rows


def demo_scenes(num_scenes: int) -> tuple[dict[int, photos.Photograph], dict[str, Any]]:
    """Rendered scenes by image id, and their truth; the seeds are the demo's and more, none of training."""
    with tempfile.TemporaryDirectory() as folder:
        write_scene_lake(Path(folder), range(num_scenes), 1)
        truth = json.loads((Path(folder) / "annotations.json").read_text())
    return {seed: render_scene(seed).image for seed in range(num_scenes)}, truth


if __name__ == "__main__":
    main()
