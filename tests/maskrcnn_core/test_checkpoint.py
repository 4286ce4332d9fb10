import json
import pickle
import struct
from pathlib import Path

import pytest
import torch

from maskrcnn_core.checkpoint import CheckpointError, dump_checkpoint, parse_checkpoint
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.model import MaskRCNN, build_model


@pytest.fixture(scope="module")
def saved(tiny_model: MaskRCNN) -> bytes:
    return dump_checkpoint(tiny_model, "tiny", provenance={"data": "none"})


def test_weights_config_and_provenance_come_back(saved: bytes, tiny_model: MaskRCNN) -> None:
    checkpoint = parse_checkpoint(saved, "memory")
    assert checkpoint.config == tiny_model.config
    assert checkpoint.provenance == {"data": "none"}
    rebuilt = checkpoint.build().state_dict()
    assert all(torch.equal(value, rebuilt[key]) for key, value in tiny_model.state_dict().items())


def test_half_precision_halves_the_file_and_loads_as_float32(saved: bytes, tiny_model: MaskRCNN) -> None:
    half = dump_checkpoint(tiny_model, "tiny", dtype=torch.float16)
    assert len(half) < 0.52 * len(saved)
    assert all(p.dtype == torch.float32 for p in parse_checkpoint(half, "memory").build().parameters())


def test_the_model_id_changes_with_weights_and_settings_and_nothing_else(
    saved: bytes, tiny_config: MaskRCNNConfig
) -> None:
    checkpoint = parse_checkpoint(saved, "memory")
    model_id = checkpoint.model_id("fp32")
    assert model_id.startswith("tiny-")
    assert len(model_id) == len("tiny-") + 12
    assert checkpoint.model_id("fp32", score_threshold=None) == model_id
    assert checkpoint.model_id("bf16") != model_id
    assert checkpoint.model_id("fp32", score_threshold=0.3) != model_id
    other = parse_checkpoint(dump_checkpoint(build_model(tiny_config, seed=1), "tiny"), "memory")
    assert other.model_id("fp32") != model_id


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (victim,)  # type: ignore[return-value]

    with pytest.raises(CheckpointError, match="not a safetensors file"):
        parse_checkpoint(pickle.dumps(Attack()), "evil.pth")
    assert not victim.exists()


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 100, struct.pack("<Q", 5) + b"{}{}{"])
def test_what_is_not_safetensors_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        parse_checkpoint(data, "junk")


def test_safetensors_of_somebody_else_are_refused() -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    with pytest.raises(CheckpointError, match="not a masklake checkpoint"):
        parse_checkpoint(struct.pack("<Q", len(header)) + header, "other.safetensors")


def test_a_flipped_bit_in_the_weights_is_noticed(saved: bytes) -> None:
    damaged = bytearray(saved)
    damaged[-1000] ^= 1
    with pytest.raises(CheckpointError, match="fingerprint"):
        parse_checkpoint(bytes(damaged), "damaged")


def test_weights_of_another_architecture_are_refused_with_their_keys(
    tiny_model: MaskRCNN, tiny_config: MaskRCNNConfig
) -> None:
    other = build_model(tiny_config.replace(box_head_channels=64), seed=0)
    other.config = tiny_config  # a file that claims more than it holds
    with pytest.raises(CheckpointError, match=r"box_head.fc6.weight is \(64, 4704\), wanted \(256, 4704\)"):
        parse_checkpoint(dump_checkpoint(other, "liar"), "memory").build()


def test_nan_weights_are_refused(tiny_config: MaskRCNNConfig) -> None:
    model = build_model(tiny_config, seed=0)
    with torch.no_grad():
        model.rpn.head.cls_logits.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        parse_checkpoint(dump_checkpoint(model, "nan"), "memory").build()


def test_a_name_that_cannot_be_a_path_is_refused(tiny_model: MaskRCNN) -> None:
    with pytest.raises(ValueError, match="checkpoint name"):
        dump_checkpoint(tiny_model, "../x")
