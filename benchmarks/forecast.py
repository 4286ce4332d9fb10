"""What `masklake plan` foretells against what `masklake relabel` takes: a first night, and a new champion's.

Run:  python benchmarks/forecast.py [--scenes 300] [--new 60] [--out benchmarks/results]

Both commands run as a scheduler runs them, in processes of their own, over rendered scenes on this machine's
disk. Real is the wall-clock time of the whole command, from the start of Python to its end; foretold is what
`plan` said right before. It ends with status 1 if one of the ratios is outside what is allowed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common.report import arguments, write_report
from jobs.demo.scenes import render_scene
from jobs.lake.aliases import Aliases
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.registry import ModelRegistry
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import dump_checkpoint, parse_checkpoint
from schemas.specs import StorageSpec

LEAST, MOST = 0.75, 1.25  # of foretold by real


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--scenes", type=int, default=300, help="of the first night")
    parser.add_argument("--new", type=int, default=60, help="that come before the second night")
    args = parser.parse_args()
    table = [["night", "images to label", "foretold", "real", "foretold by real", "allowed"]]
    ratios: list[float] = []

    def add_night(name: str, spec: Sequence[str]) -> None:
        planned = run("plan", spec)
        started = time.perf_counter()
        done = run("relabel", spec)
        real_s = time.perf_counter() - started
        labelled = sum(part["images"] for part in done["passes"])
        assert (done["status"], labelled) == ("promoted", planned["images"]), (planned, done)
        ratios.append(planned["seconds"] / real_s)
        models = " + ".join(f"{part['images']:,}" for part in done["passes"])
        foretold = f"{planned['seconds']:.0f} s"
        allowed = f"{LEAST} to {MOST}"
        table.append([name, models, foretold, f"{real_s:.0f} s", f"{ratios[-1]:.2f}", allowed])
        print(table[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        images, lake = Path(folder) / "images", f"file://{folder}/lake"
        images.mkdir()
        spec = ["--source", str(images), "--model", "alias:champion", "--lake", lake]
        crown(lake, shift=0.0)
        render(images, range(args.scenes))
        add_night("the first one: all is new to one model", spec)
        crown(lake, shift=1e-3)
        render(images, range(args.scenes, args.scenes + args.new))
        add_night("new images by the current model, all by a new champion", spec)
    facts = ["rendered scenes, single PNGs on a disk; `plan` samples 32 images of each model"]
    write_report("forecast", "What plan foretells", ["torch", "ray"], facts, table, args.out)
    sys.exit(0 if all(LEAST <= ratio <= MOST for ratio in ratios) else 1)


def run(command: str, spec: Sequence[str]) -> Mapping[str, Any]:
    argv = [sys.executable, "-m", "jobs.cli", command, *spec, "--json"]
    ended = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    said: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return said


def render(folder: Path, seeds: Iterable[int]) -> None:
    for seed in seeds:
        Image.fromarray(render_scene(seed).image).save(folder / f"{seed:06d}.png", compress_level=1)


def crown(lake: str, shift: float) -> None:
    """Register the demo's model, a little shifted, and let the alias mean it."""
    storage = Storage(StorageSpec())
    model = parse_checkpoint(*read_checkpoint_bytes("demo", storage)).build()
    with torch.no_grad():
        model.state_dict()["roi_heads.box_predictor.cls_score.bias"] += shift
    data = dump_checkpoint(model, "scenes")
    version = ModelRegistry(lake, storage).register(
        "scenes", data, parse_checkpoint(data, "scenes").fingerprint
    )
    Aliases(lake, storage).move("champion", version, "the benchmark", "it is time")


if __name__ == "__main__":
    main()
