"""Training states and their folder, jobs/train/state.py and checkpoints.py."""

import threading
from pathlib import Path

import pytest
import torch

from jobs.lake.storage import Storage
from jobs.train.checkpoints import Checkpoints
from jobs.train.optimizer import AveragedWeights, make_optimizer, trained_names
from jobs.train.recipe import Recipe
from jobs.train.state import Progress, TrainingStateError, dump_state, parse_state, restore, snapshot
from maskrcnn_core.config import lite
from maskrcnn_core.model import MaskRCNN, build_model
from schemas.errors import StorageError
from schemas.specs import StorageSpec

CATEGORIES = ((1, "disc"), (2, "square"))
TENSORS = {"model/a": torch.arange(6.0).reshape(2, 3), "optimizer/a/step": torch.tensor(3.0)}


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    torch.set_num_threads(1)  # two spin for each other on a busy machine
    return build_model(lite(CATEGORIES), 0).train()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(Storage(StorageSpec()), f"file://{tmp_path}", keep=2)


def step_once(model: MaskRCNN, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad]).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_run_put_back_takes_the_same_next_step(kind: str, model: MaskRCNN) -> None:
    recipe = Recipe("r", steps=100, warmup_steps=1, optimizer=kind, ema_decay=0.9)
    first = build_model(lite(CATEGORIES), 1).train().to(memory_format=torch.channels_last)
    average, optimizer = AveragedWeights(first, 0.9), make_optimizer(first, recipe)
    for step in range(1, 4):
        step_once(first, optimizer)
        average.update(first, step)
    data = dump_state(snapshot(first, average, optimizer), Progress(3, 0.25, 2, 1))

    second = build_model(lite(CATEGORIES), 2).train().to(memory_format=torch.channels_last)
    other_average, other = AveragedWeights(second, 0.9), make_optimizer(second, recipe)
    tensors, progress = parse_state(data, "here")
    restore(tensors, second, other_average, other)
    assert progress == Progress(3, 0.25, 2, 1)
    for a, o, m in ((average, optimizer, first), (other_average, other, second)):
        step_once(m, o)
        a.update(m, 4)
    for mine, its in ((first, second), (average.model, other_average.model)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, its.state_dict()[name]), name


def test_a_snapshot_is_not_changed_by_later_steps(model: MaskRCNN) -> None:
    trained = build_model(lite(CATEGORIES), 3).train()
    optimizer = make_optimizer(trained, Recipe("r", steps=100, warmup_steps=1))
    tensors = snapshot(trained, None, optimizer)
    before = {name: value.clone() for name, value in tensors.items()}
    step_once(trained, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())


def test_norms_and_biases_are_not_decayed(model: MaskRCNN) -> None:
    optimizer = make_optimizer(model, Recipe("r", steps=100, warmup_steps=1))
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] > 0 == rest["weight_decay"]
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in rest["params"])
    named = dict(model.named_parameters())
    assert [named[name] for name in trained_names(model)] == [*decayed["params"], *rest["params"]]


def test_the_average_begins_as_a_plain_mean() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = AveragedWeights(model, 0.9)  # type: ignore[arg-type]  # any module will do
    seen = []
    for step, value in enumerate((2.0, 4.0, 9.0), start=1):
        torch.nn.init.constant_(model.weight, value)
        average.update(model, step)  # type: ignore[arg-type]  # as above
        seen.append(float(average.model.weight))  # type: ignore[arg-type]  # as above
    assert seen == pytest.approx([2.0, 3.0, 5.0])


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "other"])
def test_a_damaged_state_is_told_from_a_whole_one(damage: str) -> None:
    data = bytearray(dump_state(TENSORS, Progress(7)))
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "empty":
        data.clear()
    elif damage == "bit":
        data[-1] ^= 1
    else:
        data = bytearray(b"PK\3\4" + bytes(100))
    with pytest.raises(TrainingStateError, match="here is not a whole training state"):
        parse_state(bytes(data), "here")


def test_a_state_of_another_model_is_refused(model: MaskRCNN) -> None:
    optimizer = make_optimizer(model, Recipe("r", steps=100, warmup_steps=1))
    other = build_model(lite(((1, "disc"),)), 0).train()
    tensors = snapshot(other, None, make_optimizer(other, Recipe("r", steps=100, warmup_steps=1)))
    with pytest.raises(TrainingStateError, match="of another model"):
        restore(tensors, model, None, optimizer)


def test_the_newest_whole_checkpoint_counts(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints.newest() is None
    for step in (1, 20, 300):
        checkpoints.save(TENSORS, Progress(step))
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [file.name for file in files] == ["step-00000020.safetensors", "step-00000300.safetensors"]
    files[-1].write_bytes(files[-1].read_bytes()[:-10])  # half written
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 20
    assert torch.equal(found[0]["model/a"], TENSORS["model/a"])
    assert checkpoints.newest(300) is None
    checkpoints.save(TENSORS, Progress(40))
    left = sorted((tmp_path / "checkpoints").iterdir())
    assert [file.name for file in left] == ["step-00000020.safetensors", "step-00000040.safetensors"]


def test_what_is_written_beside_the_training_is_waited_for_and_its_failure_told(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def refuse(uri: str, data: bytes) -> None:
        goes_on.wait(10)
        raise StorageError("full")

    monkeypatch.setattr(checkpoints._storage, "write_bytes", refuse)
    checkpoints.save_behind(TENSORS, Progress(1))
    assert checkpoints.is_writing
    goes_on.set()
    with pytest.raises(StorageError, match="full"):
        checkpoints.save_behind(TENSORS, Progress(2))
    checkpoints.wait()
