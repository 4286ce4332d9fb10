from __future__ import annotations

import builtins
import collections
import os
import pickle
import pickletools
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn_core.restricted_pickle import (
    PickledArray,
    PickledDict,
    RefusedPickleError,
    load_plain_pickle,
)


def plain(value: Any) -> Any:
    """With real arrays in the place of PickledArray."""
    if isinstance(value, PickledArray):
        return value.array
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.arange(4, dtype=">f4"),
        np.array([True, False]),
        np.array(7, dtype=np.int64),
        np.zeros((0, 3), dtype=np.float16),
        np.arange(12, dtype=np.uint8)[::2],
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_arrays_come_back_as_they_were(array: np.ndarray[Any, Any], protocol: int) -> None:
    loaded = load_plain_pickle(pickle.dumps({"weight": array}, protocol))["weight"]
    assert loaded.array.dtype == array.dtype
    assert loaded.array.shape == array.shape
    assert np.array_equal(loaded.array, array)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_and_numbers_come_back_as_they_were(protocol: int) -> None:
    value = {
        "model": {"a": [1, -2.5, None, True], 3: (1, (2, 3), (1, 2, 3, 4), ())},
        "author": "Zoë",
        "bytes": b"\x00\xff",
        "no bytes": b"",
        "large": 2**70,
        "scalar": np.float32(0.5),
    }
    assert load_plain_pickle(pickle.dumps(value, protocol)) == value


def test_a_state_dict_keeps_its_metadata() -> None:
    state = collections.OrderedDict(weight=np.ones(2))
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    loaded = load_plain_pickle(pickle.dumps(state))
    assert isinstance(loaded, PickledDict)
    assert list(loaded) == ["weight"]
    assert loaded.attributes == {"_metadata": {"": {"version": 1}}}


def test_one_array_under_two_names_is_one_array() -> None:
    array = np.ones(3)
    loaded = load_plain_pickle(pickle.dumps([array, array]))
    assert loaded[0] is loaded[1]


def test_the_names_of_numpy_before_and_since_2_mean_the_same() -> None:
    data = pickle.dumps(np.arange(3.0), 2)
    other = data.replace(b"numpy._core.", b"numpy.core.")
    assert other != data
    assert np.array_equal(load_plain_pickle(other).array, np.arange(3.0))


def test_a_pickle_of_python_2_is_read() -> None:
    # numpy.array([1.5, -2.0], '<f4') by Python 2, protocol 2: its byte strings are SHORT_BINSTRING.
    raw = struct.pack("<2f", 1.5, -2.0)
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + raw + b"tb."
    )
    assert load_plain_pickle(data).array.tolist() == [1.5, -2.0]


class Call:
    """Pickled as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


class State:
    """Pickled as an object with attributes."""

    def __init__(self) -> None:
        self.anything = 1


def gadgets(victim: Path) -> dict[str, bytes]:
    """Pickles that make `victim`, or reach for what could, when Python's own machine runs them."""
    shell, code = f"touch {victim}", f"open({str(victim)!r}, 'w')"
    protocol_0 = f"cposix\nsystem\n(S{shell!r}\ntR.".encode()
    return {
        "os.system": pickle.dumps(Call(os.system, shell)),
        "os.system as text": protocol_0,
        "subprocess": pickle.dumps(Call(subprocess.check_call, ["touch", str(victim)])),
        "eval": pickle.dumps(Call(eval, code)),
        "exec": pickle.dumps(Call(exec, code)),
        "python 2's eval": pickle.dumps(Call(eval, code), 2),
        "open": pickle.dumps(Call(open, str(victim), "w")),
        "import": pickle.dumps(Call(builtins.__import__, "os")),
        "getattr of a module": pickle.dumps(Call(getattr, Call(builtins.__import__, "os"), "system")),
        "partial": pickle.dumps(Call(partial, os.system, shell)),
        "in an array's place": pickle.dumps({"model": {"weight": Call(os.system, shell)}}),
        "as a dict's value after arrays": pickle.dumps([np.ones(3), Call(os.system, shell)]),
        "dotted name in numpy": b"\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93\x8c\x04true\x85R.",
        "numpy's way to a module": b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x02os\x93.",
        "dotted name under it": b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x14_reconstruct.__init__\x93.",
        "numpy.load": pickle.dumps(Call(np.load, str(victim))),
        "numpy.fromfile": pickle.dumps(Call(np.fromfile, str(victim))),
        "numpy.save": pickle.dumps(Call(np.save, str(victim), 1)),
        "memmap": pickle.dumps(Call(np.memmap, str(victim), "u1", "w+", 0, (1,))),
        "pickle in a pickle": pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.system, shell)))),
        "objects in an array": pickle.dumps(np.array([Call(os.system, shell)], dtype=object)),
        "an object's attributes": pickle.dumps(State()),
        "a class made": b"\x80\x02cbuiltins\ntype\n)\x81.",
        "INST": f"(S{shell!r}\niposix\nsystem\n.".encode(),
        "OBJ": f"(cposix\nsystem\nS{shell!r}\no.".encode(),
        "persistent id": b"\x80\x02Pevil\n.",
        "extension registry": b"\x80\x02\x82\x01.",
        "attributes on a name": b"\x80\x02cnumpy\nndarray\n}b.",
        "a call of a name that is no function": b"\x80\x02cnumpy\nndarray\n)R.",
        "a call of a list": b"\x80\x02])R.",
        "a structured dtype": pickle.dumps(np.zeros(1, dtype=[("a", "f4")])),
        "a dtype of objects": pickle.dumps(np.dtype(object)),
        "text": pickle.dumps(np.array(["abc"])),
    }


@pytest.mark.parametrize("gadget", gadgets(Path("x")))
def test_a_hostile_pickle_is_refused_and_does_not_run(gadget: str, tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    with pytest.raises(RefusedPickleError):
        load_plain_pickle(gadgets(victim)[gadget])
    assert not victim.exists()


def test_the_gadgets_are_real(tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    pickle.loads(gadgets(victim)["in an array's place"])
    assert victim.exists()


def test_the_refusal_names_what_was_asked_for() -> None:
    with pytest.raises(RefusedPickleError, match=r"asks for posix\.system"):
        load_plain_pickle(pickle.dumps(Call(os.system, "true")))


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (b"\x80\x02r\xff\xff\xff\xff.", "pop from empty|list index"),  # a memo of 4 billion places
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "expected"),  # 1 TB of bytes, one there
        (b"\x80\x02" + b"N0" * 600_000 + b"N.", "opcodes"),
        (b"\x80\x02I" + b"1" * 100_000 + b"\n.", "damaged"),
    ],
    ids=["memo", "bytes", "opcodes", "number"],
)
def test_a_pickle_cannot_ask_for_more_than_it_brings(attack: bytes, words: str) -> None:
    with pytest.raises(RefusedPickleError, match=words):
        load_plain_pickle(attack)


def test_nested_tuples_are_never_hashed_or_printed() -> None:
    # Sixty tuples, each twice the one before: 2**60 steps to hash or to print the last.
    bomb = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    as_key = b"\x80\x02}" + bomb[2:] + b"Ns."
    as_shape = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01"
        + bomb[2:]
        + b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89C\x00tb."
    )
    as_name = b"\x80\x04" + bomb[2:] + b"\x8c\x01x\x93."
    for attack in (as_key, as_shape, as_name):
        with pytest.raises(RefusedPickleError):
            load_plain_pickle(attack)


def test_an_array_larger_than_its_bytes_is_refused() -> None:
    data = pickle.dumps(np.zeros(3, np.float32), 2)
    assert data.count(b"K\x03\x85") == 1  # the shape (3,)
    with pytest.raises(RefusedPickleError, match="12 bytes"):
        load_plain_pickle(data.replace(b"K\x03\x85", b"J\x00\x00\x00\x7f\x85"))


def test_one_text_does_not_become_many_arrays() -> None:
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000
    once = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0"
    attack = b"\x80\x02" + text + b"q\x000" + once * 1000 + b"N."
    with pytest.raises(RefusedPickleError, match="larger than the pickle"):
        load_plain_pickle(attack)


@settings(max_examples=300)
@given(st.data())
def test_no_damage_brings_anything_but_data_or_a_refusal(data: st.DataObject) -> None:
    original = bytearray(pickle.dumps({"model": {"w": np.ones(4, np.float32)}, "n": (1, "a")}, 2))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(original)))
    for damaged in (bytes(original), bytes(original[:cut])):
        message = ""
        try:
            load_plain_pickle(damaged)
        except RefusedPickleError as error:
            message = str(error)
        assert len(message) < 400


def test_an_escape_that_is_none_is_damage() -> None:
    with pytest.raises(RefusedPickleError, match="invalid escape"):
        load_plain_pickle(b"S'\\y'\n.")


def test_every_opcode_of_python_is_known_here_or_refused() -> None:
    for opcode in pickletools.opcodes:
        with pytest.raises(RefusedPickleError):
            load_plain_pickle(opcode.code.encode("latin-1"))
