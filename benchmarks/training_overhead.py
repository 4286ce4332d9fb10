"""What Ray Train costs: the same training run by its workers and by torchrun's, round about.

Run:  python benchmarks/training_overhead.py [--steps 60] [--rounds 3] [--out benchmarks/results]

Rendered scenes, preset lite. A step's time is the median over a run's steps but the first twenty; starting
the workers is not in it. Once with a core to spare for what Ray does beside it, as a machine that trains on a
GPU has, and then with every core at work on the step.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from benchmarks.common.report import arguments, write_report
from jobs.demo.lake import write_scene_lake
from jobs.lake.storage import Storage
from jobs.train.beginning import begin
from jobs.train.metrics import EvalMetrics, StepMetrics
from jobs.train.recipe import make_recipe
from jobs.train.run import run_train
from jobs.train.run_record import read_record
from jobs.train.worker import WorkerJob, train
from jobs.train.workers import Workers
from schemas.spec_loader import load_spec
from schemas.train_spec import TrainSpec

WARM_UP_STEPS = 20
ALLOWED = 1.03
# Workers, and threads of each, of the two cores that a machine of ours has.
SIZES = ((1, 1), (1, 2), (2, 1))


class Steps:
    """A watcher that keeps the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        """Nothing to measure yet."""

    def step(self, metrics: StepMetrics) -> None:
        self.seconds.append(1 / metrics.images_per_s)

    def evaluated(self, metrics: EvalMetrics) -> None:
        """There is no evaluation."""

    def note(self, text: str) -> None:
        """Not for a table."""

    def ended(self, status: str) -> None:
        """The caller knows."""

    @property
    def median_s(self) -> float:
        """Of an image."""
        return statistics.median(self.seconds[WARM_UP_STEPS:])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torchrun", type=Path, help="used by the script itself: spec of a worker's run")
    args = parser.parse_args()
    if args.torchrun:
        work(args.torchrun)
        return
    head = ["workers", "threads each", "images/s, torchrun", "images/s, Ray Train", "time, Ray : torchrun"]
    table = [[*head, "at most"]]
    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder) / "scenes"
        write_scene_lake(scenes, range(10_000_000, 10_000_128), 2)
        for num_workers, threads in SIZES:
            taken: dict[str, list[float]] = {"torchrun": [], "ray": []}
            for number in range(args.rounds):
                for side, seconds in taken.items():
                    out = Path(folder) / f"{side}-{num_workers}-{threads}-{number}"
                    spec = make_spec(scenes, out, num_workers, threads, args.steps)
                    under = under_ray if side == "ray" else under_torchrun
                    seconds.append(under(spec, num_workers))
            ratio = statistics.median(
                ray / other for ray, other in zip(taken["ray"], taken["torchrun"], strict=True)
            )
            rates = [f"{1 / statistics.median(taken[side]):.2f}" for side in ("torchrun", "ray")]
            table.append([str(num_workers), str(threads), *rates, f"{ratio:.3f}×", f"{ALLOWED}×"])
            print(table[-1], flush=True)
    facts = [f"lite, 8 scenes of 256 px a step, bf16, {args.steps} steps, {args.rounds} rounds, in turn"]
    write_report(
        "training_overhead",
        "Ray Train against torchrun",
        ["torch", "torchvision", "ray"],
        facts,
        table,
        args.out,
    )


def make_spec(scenes: Path, out: Path, num_workers: int, threads: int, steps: int) -> Path:
    """A spec file; the run itself has no checkpoint, no evaluation and no calibration."""
    spec = {
        "data": {"scenes": {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}},
        "model": {"uri": "lite", "norm": "frozen_bn"},
        "out": {"uri": str(out)},
        "recipe": {"name": "scenes", "steps": steps, "calibration_batches": 0},
        "scaling": {"num_workers": num_workers, "cpus_per_worker": threads},
        "checkpoint": {"every_s": 1e6},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(spec))
    return path


def under_ray(spec_file: Path, num_workers: int) -> float:
    watcher = Steps()
    run_train(load_spec(TrainSpec, str(spec_file)), watcher, log_every_s=0.0)
    return watcher.median_s


def under_torchrun(spec_file: Path, num_workers: int) -> float:
    spec = load_spec(TrainSpec, str(spec_file))
    storage = Storage(spec.storage)
    begin(spec, make_recipe(spec.recipe), storage.normalize(spec.out.uri), storage, lambda text: None)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_workers}"]
    worker = ["-m", "benchmarks.training_overhead", "--torchrun", str(spec_file)]
    subprocess.run([*launcher, *worker], check=True)
    return float(json.loads(Path(spec.out.uri, "seconds.json").read_text()))


def work(spec_file: Path) -> None:
    """One of torchrun's workers; worker 0 writes the figure down."""
    dist.init_process_group("gloo")
    spec = load_spec(TrainSpec, str(spec_file))
    storage = Storage(spec.storage)
    out_uri = storage.normalize(spec.out.uri)
    record = read_record(out_uri, spec, storage)
    assert record is not None
    folder = Path(spec.out.uri)
    threads = int(spec.scaling.cpus_per_worker)
    job = WorkerJob(
        record, make_recipe(spec.recipe), spec, out_uri, storage, folder / "sets", threads, 1, log_every_s=0.0
    )
    watcher = Steps()
    train(job, Workers.joined(torch.device("cpu")), watcher)
    if dist.get_rank() == 0:
        (folder / "seconds.json").write_text(json.dumps(watcher.median_s))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
