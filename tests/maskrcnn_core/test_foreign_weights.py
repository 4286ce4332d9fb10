from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_save
from torch import Tensor

from maskrcnn_core.checkpoint import CheckpointError
from maskrcnn_core.foreign_weights import ForeignWeights, read_foreign_weights

STATE = {"backbone.body.a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}


def saved(value: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def assert_same(found: ForeignWeights, expected: dict[str, Tensor]) -> None:
    assert found.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found.tensors[key].dtype == tensor.dtype
        assert torch.equal(found.tensors[key], tensor)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pth_is_read(legacy: bool) -> None:
    data = saved(STATE, legacy=legacy)
    found = read_foreign_weights(data, "a.pth")
    assert_same(found, STATE)
    assert (found.container, found.format) == ("torch", "torchvision")
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.md5 == hashlib.md5(data).hexdigest()


def test_a_pickle_of_arrays_is_read() -> None:
    arrays = {key: tensor.numpy() for key, tensor in STATE.items()}
    found = read_foreign_weights(pickle.dumps({"model": arrays, "__author__": "x"}), "a.pkl")
    assert_same(found, STATE)
    assert found.container == "pickle"


def test_big_endian_arrays_become_native_ones() -> None:
    found = read_foreign_weights(pickle.dumps({"w": np.arange(3, dtype=">f4")}), "a.pkl")
    assert_same(found, {"w": torch.arange(3.0)})


def test_safetensors_are_read() -> None:
    found = read_foreign_weights(safetensors_save(STATE), "a.safetensors")
    assert_same(found, STATE)
    assert found.container == "safetensors"


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_the_weights_are_found_in_a_training_checkpoint(wrapper: str) -> None:
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    data = saved({wrapper: STATE, "optimizer": optimizer, "iteration": 7})
    assert_same(read_foreign_weights(data, "a.pth"), STATE)


def test_the_prefix_of_data_parallel_is_taken_off() -> None:
    data = saved({f"module.{key}": tensor for key, tensor in STATE.items()})
    assert_same(read_foreign_weights(data, "a.pth"), STATE)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_versions_of_layouts_come_along(container: str) -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    state: Any = module.state_dict()
    if container == "torch":
        data = saved({"model": state})
    else:
        arrays: Any = OrderedDict((key, tensor.numpy()) for key, tensor in state.items())
        arrays._metadata = state._metadata
        data = pickle.dumps({"model": arrays})
    found = read_foreign_weights(data, "a")
    assert found.container == container
    assert found.versions == {"": 1, "0": 2}


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("backbone.bottom_up.stem.conv1.weight", "detectron2"),
        ("backbone.body.conv1.weight", "torchvision"),
        ("stem.conv1.weight", None),
    ],
)
def test_names_say_whose_weights_these_are(key: str, kind: str | None) -> None:
    assert read_foreign_weights(saved({key: torch.zeros(1)}), "a").format == kind


class Attack:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "pickle 2", "tensor"])
def test_a_hostile_file_is_refused_and_does_not_run(kind: str, tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    attack = {"model": {**STATE, "w": Attack(victim)}}
    if kind == "pickle":
        data = pickle.dumps({"model": {"w": Attack(victim)}})
    elif kind == "pickle 2":
        data = pickle.dumps({"model": {"w": Attack(victim)}}, 2)
    elif kind == "tensor":
        data = saved(Attack(victim))
    else:
        data = saved(attack, legacy=kind == "legacy")
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        read_foreign_weights(data, "evil.pth")
    assert not victim.exists()


def test_the_attack_is_real(tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    torch.load(io.BytesIO(saved(Attack(victim))), weights_only=False)
    assert victim.exists()


def test_a_tensor_that_repeats_a_few_bytes_is_refused() -> None:
    data = saved({"w": torch.zeros(1).expand(10**12)})
    with pytest.raises(CheckpointError, match="larger than the file"):
        read_foreign_weights(data, "bomb.pth")


def test_a_compressed_archive_is_refused() -> None:
    plain, packed = io.BytesIO(saved({"w": torch.zeros(100_000)})), io.BytesIO()
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        read_foreign_weights(packed.getvalue(), "bomb.pth")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({}, "holds a dict without weights"),
        ({"w": torch.zeros(1), "epoch": 3}, "'epoch' holds a int"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "sparse"),
        ({"blobs": {"conv1_w": torch.zeros(1)}}, "Detectron"),
    ],
    ids=["list", "nothing", "number", "sparse", "caffe2"],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_what_is_not_a_state_dict_is_refused(value: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_foreign_weights(saved(value), "a.pth")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello there",
        b"PK\x03\x04 and no more",
        b"\x80\x02",
        saved(STATE)[:-40],
        saved(STATE, legacy=True)[:-10],
        safetensors_save(STATE)[:-4],
        pickle.dumps({"w": np.zeros(100)})[:-40],
    ],
    ids=["empty", "text", "zip", "pickle", "cut zip", "cut legacy", "cut safetensors", "cut pickle"],
)
def test_a_damaged_file_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(CheckpointError) as refused:
        read_foreign_weights(data, "a.pth")
    assert str(refused.value).startswith("a.pth ")
    assert len(str(refused.value)) < 500
