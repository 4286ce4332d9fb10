"""What Ray Train costs: the same training run by its workers and by torchrun's.

Run:  python benchmarks/training_overhead.py [--windows 8] [--window-s 6] [--out benchmarks/results]

Rendered scenes, preset lite. Both runs are alive at once, and all processes of one are stopped while the
other goes, in turn, so that what else happens on the machine falls on both. Each window of Ray Train is
compared with those of torchrun before and after it. In every second one Ray's processes stand still but for
the workers, which tells what is lost inside the workers from what is lost to those beside them.

Once with a core to spare for what Ray does beside the workers, as a machine that trains on a GPU has, and
then with every core at work on the step.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
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

IMAGES_PER_STEP = 8
WARM_UP_STEPS = 20
START_TIMEOUT_S = 300.0
DELIVERY_S = 5.0  # a step's time reaches Ray's driver half a second after it, or a little later
ALLOWED = 1.03
# Workers, and threads of each, of the two cores that a machine of ours has.
SIZES = ((1, 1), (1, 2), (2, 1))
SIDES = ("torchrun", "ray")


class StepTimes:
    """A watcher that writes the seconds of each step into a file, a line each."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        """Nothing to measure yet."""

    def step(self, metrics: StepMetrics) -> None:
        with self._file.open("a") as file:
            file.write(f"{IMAGES_PER_STEP / metrics.images_per_s}\n")

    def evaluated(self, metrics: EvalMetrics) -> None:
        """There is no evaluation."""

    def note(self, text: str) -> None:
        """Not for a table."""

    def ended(self, status: str) -> None:
        """It does not: it is ended."""


class Side:
    """One of the two runs, with all its processes."""

    def __init__(self, name: str, spec_file: Path) -> None:
        self._times = spec_file.with_suffix(f".{name}")
        self._log = spec_file.with_suffix(".log")
        script = [sys.executable, "-m", "benchmarks.training_overhead"]
        command = [*script, f"--side={name}", f"--spec={spec_file}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def seconds(self) -> list[float]:
        return [float(line) for line in self._times.read_text().split()] if self._times.exists() else []

    def wait_until_warm(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(self.seconds()) < WARM_UP_STEPS:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"a run did not come up:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.5)

    def stop(self) -> None:
        _send(signal.SIGSTOP, self._processes())

    def go(self, *, workers_only: bool = False) -> None:
        processes = self._processes()
        _send(signal.SIGCONT, [pid for pid in processes if not workers_only or _is_ray_worker(pid)])

    def end(self) -> None:
        self.go()
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            _send(signal.SIGKILL, self._processes())
            self._process.wait()

    def _processes(self) -> list[int]:
        """The one that was started, and all that it started."""
        found = [self._process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):  # proc(5): those of each thread
                found += map(int, children.read_text().split())
        return found


def _is_ray_worker(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::RayTrainWorker")


def _send(number: signal.Signals, processes: Iterable[int]) -> None:
    for pid in processes:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--windows", type=int, default=8, help="of Ray Train, each way, for a size")
    parser.add_argument("--window-s", type=float, default=6.0)
    parser.add_argument("--side", choices=SIDES, help="used by the script itself: the run to be")
    parser.add_argument("--spec", type=Path, help="used by the script itself: spec of that run")
    args = parser.parse_args()
    if args.side:
        {"ray": under_ray, "torchrun": under_torchrun}[args.side](args.spec)
        return
    head = ["workers", "threads each", "images/s, torchrun", "time, Ray Train : torchrun", "at most"]
    table = [[*head, "with Ray's other processes stopped"]]
    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder) / "scenes"
        write_scene_lake(scenes, range(10_000_000, 10_000_128), 2)
        for size in SIZES:
            table.append(measure(Path(folder), scenes, *size, args.windows, args.window_s))
            print(table[-1], flush=True)
    facts = [
        f"lite, {IMAGES_PER_STEP} scenes of 256 px a step, bf16",
        f"{args.windows} windows of {args.window_s:g} s each way for a size; ± is the standard error",
    ]
    packages = ["torch", "torchvision", "ray"]
    write_report("training_overhead", "Ray Train against torchrun", packages, facts, table, args.out)


def measure(
    folder: Path, scenes: Path, num_workers: int, threads: int, num_windows: int, window_s: float
) -> list[str]:
    """A row of the table."""
    sides = []
    try:
        for name in SIDES:
            spec_file = make_spec(scenes, folder / f"{name}-{num_workers}-{threads}", num_workers, threads)
            sides.append(Side(name, spec_file))
            sides[-1].wait_until_warm()
            sides[-1].stop()
        torchrun, ray = sides
        time.sleep(window_s)
        for number in range(2 * num_windows):
            take_turn(torchrun, window_s)
            take_turn(ray, window_s, workers_only=number % 2 == 1)
        take_turn(torchrun, window_s)
        ray.go()
        time.sleep(DELIVERY_S)
    finally:
        for side in sides:
            side.end()
    theirs = windows(torchrun.seconds(), window_s)[1:]
    ours = windows(ray.seconds(), window_s)[1:-1]
    if (len(theirs), len(ours)) != (2 * num_windows + 1, 2 * num_windows):
        raise SystemExit("the machine stood still for a while; run it again, or give it a longer --window-s")
    ratios = [
        seconds / statistics.mean(beside) for seconds, beside in zip(ours, pairwise(theirs), strict=True)
    ]
    rate = f"{IMAGES_PER_STEP / statistics.mean(theirs):.2f}"
    return [str(num_workers), str(threads), rate, told(ratios[::2]), f"{ALLOWED}×", told(ratios[1::2])]


def take_turn(side: Side, window_s: float, *, workers_only: bool = False) -> None:
    side.go(workers_only=workers_only)
    time.sleep(window_s)
    side.stop()


def windows(seconds: Sequence[float], window_s: float) -> list[float]:
    """Mean seconds of the steps before the first stop, then of each window, then of what was still to come.

    A step that a stop fell into took longer than others, so it is where two of them part.
    """
    parts: list[list[float]] = [[]]
    for step_s in seconds[WARM_UP_STEPS:]:
        if step_s > window_s * 0.75:
            parts.append([])
        else:
            parts[-1].append(step_s)
    return [statistics.mean(part) if part else math.nan for part in parts]


def told(ratios: Sequence[float]) -> str:
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return f"{statistics.mean(ratios):.3f}× ± {error:.3f}"


def make_spec(scenes: Path, out: Path, num_workers: int, threads: int) -> Path:
    """A spec file; the run itself has no checkpoint, no evaluation, no calibration, and no end in sight."""
    recipe = {"name": "scenes", "steps": 100_000, "total_batch": IMAGES_PER_STEP, "calibration_batches": 0}
    spec = {
        "data": {"scenes": {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}},
        "model": {"uri": "lite", "norm": "frozen_bn"},
        "out": {"uri": str(out)},
        "recipe": recipe,
        "scaling": {"num_workers": num_workers, "cpus_per_worker": threads},
        "checkpoint": {"every_s": 1e6},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(spec))
    return path


def under_ray(spec_file: Path) -> None:
    watcher = StepTimes(spec_file.with_suffix(".ray"))
    run_train(load_spec(TrainSpec, str(spec_file)), watcher, log_every_s=0.0)


def under_torchrun(spec_file: Path) -> None:
    """The launcher, and, started by it, each of its workers; worker 0 writes the times down."""
    spec = load_spec(TrainSpec, str(spec_file))
    storage = Storage(spec.storage)
    out_uri = storage.normalize(spec.out.uri)
    recipe = make_recipe(spec.recipe)
    if not dist.is_torchelastic_launched():
        begin(spec, recipe, out_uri, storage, lambda text: None)
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={spec.worker_range[1]}"]
        worker = ["-m", "benchmarks.training_overhead", *sys.argv[1:]]
        os.execv(sys.executable, [*launcher, *worker])
    dist.init_process_group("gloo")
    record = read_record(out_uri, spec, storage)
    assert record is not None
    sets = Path(spec.out.uri, "sets")
    threads = int(spec.scaling.cpus_per_worker)
    job = WorkerJob(record, recipe, spec, out_uri, storage, sets, threads, 1, log_every_s=0.0)
    train(job, Workers.joined(torch.device("cpu")), StepTimes(spec_file.with_suffix(".torchrun")))


if __name__ == "__main__":
    main()
