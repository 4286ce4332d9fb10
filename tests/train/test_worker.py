"""One worker's run, and several workers', jobs/train/worker.py and step.py."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from jobs.train import worker
from jobs.train.batches import TrainingBatch
from jobs.train.checkpoints import Checkpoints
from jobs.train.memory import TrainingMemoryError
from jobs.train.metrics import EvalMetrics, StepMetrics
from jobs.train.preemption import Preemption
from jobs.train.state import TrainingStateError
from jobs.train.step import StepFigures, Stepper
from jobs.train.worker import DivergedError, WorkerJob, train
from jobs.train.workers import Workers
from maskrcnn_core.checkpoint import parse_checkpoint
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.predictor import NonFiniteError
from tests.train.conftest import MakeJob, MakeSpec
from tests.train.recording_watcher import RecordingWatcher

ALONE = Workers(0, 1, torch.device("cpu"))


@pytest.fixture
def held_out(scenes: Path) -> dict[str, str]:
    """Data to evaluate on; here the very same."""
    return {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}


def losses(watcher: RecordingWatcher) -> dict[int, dict[str, float]]:
    return {told.step: dict(told.losses) for told in watcher.told if isinstance(told, StepMetrics)}


def spoilt(terms: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: term * float("nan") for name, term in terms.items()}


@pytest.mark.parametrize("died_at", [5])
def test_a_run_taken_up_again_has_the_losses_of_an_unbroken_one(
    died_at: int, make_spec: MakeSpec, make_job: MakeJob, tmp_path: Path
) -> None:
    whole, broken, resumed = RecordingWatcher(), RecordingWatcher(died_at), RecordingWatcher()
    spec = make_spec(checkpoint={"every_steps": 2, "every_s": 1e6})
    train(make_job(make_spec(out={"uri": str(tmp_path / "whole")})), ALONE, whole)
    with pytest.raises(ConnectionError):
        train(make_job(spec), ALONE, broken)
    newest = tmp_path / "run/checkpoints/step-00000004.safetensors"
    deadline = time.monotonic() + 30
    while not newest.exists():  # it is written beside the training
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Of what was being written when the process died, only half arrived.
    newest.with_name("step-00000005.safetensors").write_bytes(newest.read_bytes()[:100_000])
    progress = train(make_job(spec), ALONE, resumed)
    assert progress.step == 6
    assert resumed.told[0] == (6, 4, "lite on scenes 12 images")
    assert list(losses(whole)) == [1, 2, 3, 4, 5, 6]
    for step, terms in {**losses(broken), **losses(resumed)}.items():
        assert terms == pytest.approx(losses(whole)[step], abs=1e-4), step
    assert_same_weights(tmp_path / "whole", tmp_path / "run", 1e-4)


def assert_same_weights(one: Path, other: Path, tolerance: float) -> None:
    found = [parse_checkpoint((run / "last.safetensors").read_bytes(), run.name) for run in (one, other)]
    for name, value in found[0].weights.items():
        assert torch.allclose(value, found[1].weights[name], atol=tolerance), name


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[-8:]) for path in (folder / "run/checkpoints").iterdir())


def test_a_node_that_will_go_is_worth_one_checkpoint(
    make_spec: MakeSpec, make_job: MakeJob, tmp_path: Path
) -> None:
    said = iter([None, *[Preemption(frozenset({"0123456789abcdef"}), time.time() + 1000)] * 2])
    watcher = RecordingWatcher()
    recipe = {"steps": 4, "total_batch": 1, "shorter_sides": [64], "calibration_batches": 0}
    spec = make_spec(recipe=recipe, checkpoint={"every_s": 1e6, "keep": 9})
    train(make_job(spec), ALONE, watcher, lambda: next(said))
    assert saved_steps(tmp_path) == [0, 2, 4]  # a run begins with one and ends with one
    (note,) = (told for told in watcher.told if isinstance(told, str))
    assert re.fullmatch(r"node goes in \d+ s: 0123456789ab; a checkpoint is written at step 2", note)


@pytest.mark.parametrize(("left_s", "saved"), [(1000, [0, 2, 3, 4]), (None, [0, 2, 3, 4]), (-1, [0, 2, 4])])
def test_until_a_node_goes_checkpoints_are_written_more_often(
    left_s: float | None,
    saved: list[int],
    make_spec: MakeSpec,
    make_job: MakeJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.train.worker._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(Checkpoints, "is_writing", False)
    deadline_s = None if left_s is None else time.time() + left_s
    said = iter([None, *[Preemption(frozenset({"0123456789abcdef"}), deadline_s)] * 2])
    recipe = {"steps": 4, "total_batch": 1, "shorter_sides": [64], "calibration_batches": 0}
    spec = make_spec(recipe=recipe, checkpoint={"every_s": 1e6, "keep": 9})
    train(make_job(spec), ALONE, RecordingWatcher(), lambda: next(said))
    assert saved_steps(tmp_path) == saved


def test_what_a_run_leaves_behind_can_be_used(
    make_spec: MakeSpec, make_job: MakeJob, held_out: dict[str, str], tmp_path: Path
) -> None:
    spec = make_spec(
        recipe={"steps": 4, "accumulate": 2, "learning_rate": 1e-9},
        evaluate={"data": held_out, "every_steps": 1, "max_images": 2, "patience": 2},
    )
    watcher = RecordingWatcher()
    progress = train(make_job(spec), ALONE, watcher)
    evaluations = [told for told in watcher.told if isinstance(told, EvalMetrics)]
    assert [metrics.num_images for metrics in evaluations] == [2] * len(evaluations)
    # Nothing is learnt, so the second evaluation without a better AP ends the run, but for the last one.
    assert progress.step < 4
    model = parse_checkpoint((tmp_path / "run/model.safetensors").read_bytes(), "model")
    assert model.build().config.preset == "lite"
    assert model.provenance["step"] == progress.best_step
    (described,) = model.provenance["data"]
    assert (described["name"], described["num_images"]) == ("scenes", 12)
    assert (described["weight"], described["coco"].endswith("annotations.json")) == (1.0, True)
    assert model.provenance["evaluated_on"]["num_images"] == 12
    assert {"optimizer": "adamw", "learning_rate": 1e-9, "seed": 0}.items() <= model.provenance[
        "recipe"
    ].items()
    last = parse_checkpoint((tmp_path / "run/last.safetensors").read_bytes(), "last")
    assert last.provenance["metrics"]["segm"] == evaluations[-1].segm


def test_what_is_evaluated_on_the_way_is_what_is_written(
    make_spec: MakeSpec,
    make_job: MakeJob,
    held_out: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the statistics of batch norm, measured anew on the very numbers that are stored."""
    evaluated: list[dict[str, torch.Tensor]] = []
    aps = iter([0.5, 0.25])

    def evaluate(model: MaskRCNN, *_: Any, step: int, **__: Any) -> EvalMetrics:
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return EvalMetrics(step, {}, {"AP": next(aps)})

    monkeypatch.setattr(worker, "evaluate_model", evaluate)
    spec = make_spec(
        recipe={"steps": 2, "calibration_batches": 1},
        out={"uri": str(tmp_path / "run"), "dtype": "fp16"},
        evaluate={"data": held_out, "every_steps": 1},
    )
    train(make_job(spec), ALONE, RecordingWatcher())
    for name, its in zip(("model", "last"), evaluated, strict=True):
        written = parse_checkpoint((tmp_path / f"run/{name}.safetensors").read_bytes(), name).build()
        for key, value in written.state_dict().items():
            tolerance = 1e-3 if "running" in key else 0  # they are measured last, and then stored
            assert torch.allclose(value, its[key], rtol=tolerance, atol=tolerance), key
        counts = {int(value) for key, value in its.items() if key.endswith("num_batches_tracked")}
        assert counts == {1}


def test_a_model_whose_ap_cannot_be_measured_is_written_and_patience_does_not_count(
    make_spec: MakeSpec, make_job: MakeJob, scenes: Path, tmp_path: Path
) -> None:
    """COCO's AP is -1 where no annotation is there to be found, as on the first image here."""
    known = json.loads((scenes / "annotations.json").read_text())
    first = min(known["images"], key=lambda image: str(image["file_name"]))["id"]
    known["annotations"] = [a for a in known["annotations"] if a["image_id"] != first]
    (tmp_path / "some.json").write_text(json.dumps(known))
    data = {"uri": f"coco:{tmp_path}/some.json", "images": f"{scenes}/images"}
    spec = make_spec(
        recipe={"steps": 2, "total_batch": 1, "calibration_batches": 0},
        evaluate={"data": data, "every_steps": 1, "max_images": 1, "patience": 1},
    )
    watcher = RecordingWatcher()
    assert train(make_job(spec), ALONE, watcher).step == 2
    evaluations = [told for told in watcher.told if isinstance(told, EvalMetrics)]
    assert [metrics.segm["AP"] for metrics in evaluations] == [-1.0, -1.0]
    assert (
        parse_checkpoint((tmp_path / "run/model.safetensors").read_bytes(), "model").provenance["step"] == 2
    )


@pytest.mark.slow
def test_a_compiled_backbone_has_the_loss_of_one_that_is_not(
    make_spec: MakeSpec, make_job: MakeJob, tmp_path: Path
) -> None:
    """To 2 %: of proposals that are nearly equal, the last bits decide which are sampled."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile wants a C++ compiler on a CPU")
    recipe = {"steps": 1, "total_batch": 1, "ema_decay": 0.0, "precision": "fp32"}
    plain, compiled = RecordingWatcher(), RecordingWatcher()
    train(make_job(make_spec(recipe=recipe)), ALONE, plain)
    out = {"uri": str(tmp_path / "compiled")}
    train(make_job(make_spec(recipe=recipe | {"compile": True}, out=out)), ALONE, compiled)
    for name, loss in losses(plain)[1].items():
        assert losses(compiled)[1][name] == pytest.approx(loss, rel=0.02), name
    content = (tmp_path / "compiled/model.safetensors").read_bytes()
    assert parse_checkpoint(content, "model").build().config.preset == "lite"


def test_a_loss_that_is_no_number_is_told_with_its_step_its_images_and_the_last_good_checkpoint(
    make_spec: MakeSpec, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for every 20 steps; the first step that had one is named."""
    seen: list[Sequence[str]] = []
    step = Stepper.step

    def take_step(
        stepper: Stepper, passes: Sequence[TrainingBatch], number: int, waited_s: float
    ) -> StepFigures:
        seen.append([name for batch in passes for name in batch.names])
        figures = step(stepper, passes, number, waited_s)
        if number == 2:
            figures = replace(figures, terms=spoilt(figures.terms))
        return figures

    monkeypatch.setattr(Stepper, "step", take_step)
    spec = make_spec(checkpoint={"every_steps": 2, "every_s": 1e6})
    with pytest.raises(DivergedError) as caught:
        train(make_job(spec), ALONE, RecordingWatcher())
    told = str(caught.value)
    assert told.startswith("the loss is nan at step 3; lower recipe.learning_rate")
    assert f"its images: {', '.join(seen[2])}. The last good checkpoint is file://" in told
    assert told.endswith("/run/checkpoints/step-00000002.safetensors")
    assert saved_steps(tmp_path) == [0, 2]  # that of step 4 would have been due


def test_a_checkpoint_may_fall_on_a_step_that_was_looked_at(
    make_spec: MakeSpec, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_CHECK_EVERY_STEPS", 2)
    spec = make_spec(
        recipe={"steps": 3, "calibration_batches": 0}, checkpoint={"every_steps": 2, "every_s": 1e6}
    )
    assert train(make_job(spec), ALONE, RecordingWatcher()).step == 3


def test_a_rate_that_is_far_too_high_ends_the_run_before_anything_is_evaluated_with_it(
    make_spec: MakeSpec, make_job: MakeJob, held_out: dict[str, str], tmp_path: Path
) -> None:
    """The last good checkpoint is the one that the run began at; the one after it is damaged."""
    spec = make_spec(
        recipe={"learning_rate": 1e20, "warmup_steps": 0, "clip_norm": 0},
        evaluate={"data": held_out, "every_steps": 3, "max_images": 1},
        checkpoint={"every_s": 1e6},
    )
    job = make_job(spec)
    Path(tmp_path, "run/checkpoints/step-00000009.safetensors").write_bytes(b"half")
    with pytest.raises(DivergedError, match=r"(the loss is (nan|inf)|not finite) at step [23]; ") as caught:
        train(job, ALONE, RecordingWatcher())
    assert str(caught.value).endswith("/run/checkpoints/step-00000000.safetensors")


def test_an_evaluation_of_broken_weights_whose_loss_was_finite_names_its_step_and_a_good_checkpoint(
    make_spec: MakeSpec, make_job: MakeJob, held_out: dict[str, str]
) -> None:
    spec = make_spec(
        recipe={"learning_rate": 1e20, "warmup_steps": 0, "clip_norm": 0},
        evaluate={"data": held_out, "every_steps": 1, "max_images": 1},
        checkpoint={"every_s": 1e6},
    )
    with pytest.raises(
        NonFiniteError, match=r"evaluation after step 1, .* lower recipe\.learning_rate"
    ) as caught:
        train(make_job(spec), ALONE, RecordingWatcher())
    assert str(caught.value).endswith("/run/checkpoints/step-00000000.safetensors")


def test_a_step_that_takes_more_memory_than_there_is_names_its_images_and_the_settings(
    make_spec: MakeSpec, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)  # no machine has it: torch's own error

    monkeypatch.setattr(Stepper, "step", allocate)
    with pytest.raises(TrainingMemoryError) as caught:
        train(make_job(make_spec(recipe={"total_batch": 2})), ALONE, RecordingWatcher())
    told = str(caught.value)
    assert re.match(r"step 1 takes more memory than there is: 2 images of \d+x\d+ px", told)
    assert len(re.findall(r"scene-\d+", told)) == 2
    for setting in ("recipe.accumulate", "recipe.total_batch", "recipe.shorter_sides"):
        assert setting in told


@pytest.mark.parametrize(
    ("allocating", "told"),
    [
        ("evaluate_model", "the evaluation after step 1 .* model.max_size_px"),
        ("recalibrate_batch_norm", "batch norm's statistics after step 1 .* recipe.calibration_batches=0"),
        ("snapshot", "the checkpoint of step 1 .* scaling.cpus_per_worker"),
    ],
)
def test_whatever_else_takes_more_memory_than_there_is_names_its_settings(
    allocating: str,
    told: str,
    make_spec: MakeSpec,
    make_job: MakeJob,
    held_out: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of torch's would start the workers anew, to meet it again."""

    def allocate(*_: Any, **__: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(worker, allocating, allocate)
    spec = make_spec(recipe={"steps": 1, "total_batch": 1}, evaluate={"data": held_out, "max_images": 1})
    with pytest.raises(TrainingMemoryError, match=told):
        train(make_job(spec), ALONE, RecordingWatcher())


def test_another_error_of_torch_stays_what_it_is(
    make_spec: MakeSpec, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(Stepper, "step", fail)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train(make_job(make_spec()), ALONE, RecordingWatcher())


def test_weights_are_stored_in_half_precision_where_that_is_asked_for(
    make_spec: MakeSpec, make_job: MakeJob, tmp_path: Path
) -> None:
    out = {"uri": str(tmp_path / "run"), "dtype": "fp16"}
    train(
        make_job(make_spec(recipe={"steps": 1, "calibration_batches": 0}, out=out)), ALONE, RecordingWatcher()
    )
    model = parse_checkpoint((tmp_path / "run/model.safetensors").read_bytes(), "model")
    assert {value.dtype for value in model.weights.values() if value.is_floating_point()} == {torch.float16}
    assert model.build().config.preset == "lite"


def test_a_run_without_a_whole_checkpoint_is_refused(
    make_spec: MakeSpec, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(make_spec())
    for file in (tmp_path / "run/checkpoints").iterdir():
        file.write_bytes(b"")
    with pytest.raises(TrainingStateError, match="there is no whole checkpoint in"):
        train(job, ALONE, RecordingWatcher())


def _work(rank: int, job: WorkerJob, size: int, folder: str) -> None:
    """One process of several; worker 0 writes its losses to a file."""
    met = f"file://{folder}/met-{size}"
    dist.init_process_group("gloo", init_method=met, rank=rank, world_size=size)
    watcher = RecordingWatcher()
    try:
        train(job, Workers.joined(torch.device("cpu")), watcher)
        if rank == 0:
            Path(folder, f"losses-{size}.json").write_text(json.dumps(losses(watcher)))
    finally:
        dist.destroy_process_group()


def _diverge(rank: int, job: WorkerJob, folder: str) -> None:
    """One process of two; the loss is no number from step 3 on."""
    met, limit = f"file://{folder}/met", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=met, rank=rank, world_size=2, timeout=limit)
    step = Stepper.step

    def take_step(
        stepper: Stepper, passes: Sequence[TrainingBatch], number: int, waited_s: float
    ) -> StepFigures:
        figures = step(stepper, passes, number, waited_s)
        return figures if number < 2 else replace(figures, terms=spoilt(figures.terms))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", take_step)
        with pytest.raises(DivergedError) as caught:
            train(job, Workers.joined(torch.device("cpu")), RecordingWatcher())
    Path(folder, f"told-{rank}").write_text(str(caught.value))
    dist.destroy_process_group()


def test_images_that_could_not_be_read_are_in_the_figures(
    make_spec: MakeSpec, make_job: MakeJob, scenes: Path, tmp_path: Path
) -> None:
    described = json.loads((scenes / "annotations.json").read_text())
    for image in described["images"][::2]:
        image["width"] += 1
    (tmp_path / "annotations.json").write_text(json.dumps(described))
    spec = make_spec(
        data={"scenes": {"uri": f"coco:{tmp_path}/annotations.json", "images": f"{scenes}/images"}}
    )
    watcher = RecordingWatcher()
    train(make_job(spec), ALONE, watcher)
    counts = [told.num_unreadable for told in watcher.told if isinstance(told, StepMetrics)]
    assert len(counts) == 6
    assert f"worker 0 could not read images: {sum(counts)} another_size" in watcher.told


@pytest.mark.slow
def test_a_checkpoint_that_is_due_after_the_loss_went_wrong_keeps_no_worker_waiting(
    make_spec: MakeSpec, make_job: MakeJob, tmp_path: Path
) -> None:
    """Only worker 0 knows when one is due, and the end is told of by all at once."""
    spec = make_spec(
        recipe={"calibration_batches": 0},
        model={"norm": "frozen_bn"},
        checkpoint={"every_steps": 4, "every_s": 1e6},
    )
    start_processes(_diverge, (make_job(spec), str(tmp_path)), nprocs=2)
    one, other = (Path(tmp_path, f"told-{rank}").read_text() for rank in range(2))
    assert one == other
    assert one.startswith("the loss is nan at step 3;")
    assert saved_steps(tmp_path) == [0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_several_workers_have_the_losses_of_one(
    size: int, make_spec: MakeSpec, make_job: MakeJob, tmp_path: Path
) -> None:
    """With frozen norms: batch norm's statistics are each worker's own."""
    settings: dict[str, Any] = {
        "recipe": {"total_batch": 4, "calibration_batches": 0},
        "model": {"norm": "frozen_bn"},
    }
    alone = RecordingWatcher()
    train(make_job(make_spec(**settings)), ALONE, alone)
    job = make_job(make_spec(**settings, out={"uri": str(tmp_path / "several")}))
    start_processes(_work, (job, size, str(tmp_path)), nprocs=size)
    found = json.loads((tmp_path / f"losses-{size}.json").read_text())
    assert len(found) == 6
    for step, terms in losses(alone).items():
        assert found[str(step)] == pytest.approx(terms, abs=1e-3), step
    assert_same_weights(tmp_path / "run", tmp_path / "several", 1e-3)
