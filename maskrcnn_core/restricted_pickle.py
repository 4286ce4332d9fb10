"""Read arrays out of a pickle without running it.

Enters: a pickle's bytes. Leaves: dicts, lists, tuples, text, numbers and PickledArray; nothing else.

A pickle is a program for a stack machine, and Python's machine lets that program import and call anything.
This is another machine for the same programs. It never imports: a name such as `numpy.dtype` stays a name,
and the few that stand for arrays have their meaning written down here. Every other name is refused where it
stands, as is every opcode that arrays do not need. What is built is not much larger than the pickle itself.

Opcodes are taken apart by the standard library's pickletools, which checks every length against the bytes
that are there. Messages name the kind of what was refused, never the thing: to print it may take for ever.
"""

from __future__ import annotations

import math
import pickletools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A ResNet-101 Mask R-CNN of 700 arrays takes about 20,000 opcodes.
MAX_OPCODES = 1_000_000
_MAX_DIMENSIONS = 8
# What pickletools, and a machine that trusts nothing, stumble over in bytes that are no pickle.
_DAMAGE = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    AttributeError,
    DeprecationWarning,  # an escape that no pickle has
)

# What NumPy calls its plain numbers in a pickle: kind and bytes. 'O', objects, is not among them.
_DTYPE = re.compile(r"b1|[iu][1248]|f[248]")


class RefusedPickleError(ValueError):
    """The pickle asks for something other than arrays and plain containers, or it is damaged. Nothing ran."""


class PickledArray:
    """An array of a pickle; `array` is read-only and keeps the byte order it was stored with."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: NDArray[Any] = np.zeros(0)


class PickledDict(dict[Any, Any]):
    """An OrderedDict; `attributes` are what was set on it, such as a state dict's `_metadata`."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        super().__init__()
        self.attributes: dict[Any, Any] = {}


def load_plain_pickle(data: bytes) -> Any:
    """The object that a pickle describes.

    Args:
        data: of protocol 0 to 5. Byte strings written by Python 2 (protocol 2) come as Latin-1 text.

    Raises:
        RefusedPickleError: it names what, and where in the bytes.
    """
    machine = _Machine(max_bytes=4 * len(data) + 4096)  # bytes as text, decoded and put into an array: 3
    position = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            for count, (opcode, argument, where) in enumerate(pickletools.genops(data)):
                position = where or 0
                if count >= MAX_OPCODES:
                    raise RefusedPickleError(
                        f"it has more than {MAX_OPCODES} opcodes; no set of weights has."
                    )
                if opcode.name == "STOP":
                    return machine.pop()
                machine.step(opcode.name, argument)
    except RefusedPickleError as error:
        raise RefusedPickleError(f"at byte {position}: {error}") from None
    except _DAMAGE as error:
        raise RefusedPickleError(
            f"at byte {position}: damaged or not a pickle ({str(error)[:100]})."
        ) from error
    raise RefusedPickleError("it ends in the middle; the file was cut short.")


@dataclass(frozen=True)
class _Name:
    """A module's name and a name in it. Text, no more."""

    path: str


class _DType:
    """numpy.dtype of plain numbers; the byte order comes after its making, by BUILD."""

    def __init__(self, code: str) -> None:
        if not _DTYPE.fullmatch(code):
            raise RefusedPickleError(f"an array of dtype {code[:20]!r}; wanted numbers.")
        self.code, self.order = code, "="

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Machine:
    """The stack, the stacks below it (one for each open MARK), and the memo."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes_left = max_bytes
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last MARK."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def step(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise RefusedPickleError(f"opcode {name}, which weights do not need.")

    def memoize(self, argument: Any) -> None:
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def get(self, argument: Any) -> None:
        self.stack.append(self.memo[argument])

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def discard_mark(self, _: Any) -> None:
        self.pop_mark()

    def small_tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.stack.append(tuple(reversed(items)))

    def marked_tuple(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def marked_list(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def marked_dict(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def append(self, _: Any) -> None:
        self._extend([self.pop()])

    def extend(self, _: Any) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise RefusedPickleError("items for something that is not a list.")
        self.stack[-1].extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def set_items(self, _: Any) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, PickledDict):
            raise RefusedPickleError("keys for something that is not a dict.")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # nested tuples can take for ever to hash
                raise RefusedPickleError(f"a dict's key is a {type(key).__name__}; wanted text or a number.")
            target[key] = value

    def name(self, argument: Any) -> None:
        self._push_name(*argument.split(" ", 1))

    def name_from_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self._push_name(module, name)

    def _push_name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise RefusedPickleError("a name that is not text.")
        path = f"{module}.{name}"
        if path not in _NAMES:
            raise RefusedPickleError(
                f"it asks for {path[:100]}, which has no place among weights; it was not run."
            )
        self.stack.append(_Name(path))

    def reduce(self, _: Any) -> None:
        """A call: of a name that we know, by our own code."""
        arguments, called = self.pop(), self.pop()
        if type(called) is not _Name or type(arguments) is not tuple:
            raise RefusedPickleError("a call of something that is not a name.")
        made = _NAMES[called.path](*arguments)
        self.stack.append(made)
        self._count(made)

    def build(self, _: Any) -> None:
        """Fill what a call made empty."""
        state, target = self.pop(), self.stack[-1]
        if type(target) is PickledArray:
            _fill_array(target, state)
            self._count(target)
        elif type(target) is _DType:
            if state[1] not in ("<", ">", "|", "="):
                raise RefusedPickleError("a byte order that does not exist.")
            target.order = state[1]
        elif type(target) is PickledDict and type(state) is dict:
            target.attributes.update(state)
        else:
            raise RefusedPickleError("attributes for something other than an array or a dict.")

    def _count(self, made: Any) -> None:
        """One text, kept in the memo, could otherwise be made into any number of arrays."""
        if type(made) is bytes:
            self.bytes_left -= len(made)
        elif type(made) is PickledArray:
            self.bytes_left -= made.array.nbytes
        if self.bytes_left < 0:
            raise RefusedPickleError("its arrays are larger than the pickle.")


def _fill_array(target: PickledArray, state: Any) -> None:
    """The state of numpy.ndarray: [version,] shape, dtype, whether columns come first, bytes."""
    shape, dtype, fortran, raw = state[-4:]
    target.array = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> NDArray[Any]:
    if type(dtype) is not _DType or type(raw) not in (bytes, bytearray, str):
        raise RefusedPickleError("an array of objects, or without bytes; wanted numbers.")
    if type(shape) is not tuple or len(shape) > _MAX_DIMENSIONS:
        raise RefusedPickleError(f"an array whose shape is not a tuple of at most {_MAX_DIMENSIONS} numbers.")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise RefusedPickleError("an array whose sides are not whole numbers.")
    content = raw.encode("latin-1") if isinstance(raw, str) else bytes(raw)
    kind = dtype.numpy()
    if len(content) != math.prod(shape) * kind.itemsize:
        raise RefusedPickleError(f"an array of shape {shape!r} and {kind} with {len(content)} bytes.")
    return np.frombuffer(content, kind).reshape(shape, order="F" if order == "F" else "C")


def _call_reconstruct(*_: Any) -> PickledArray:
    return PickledArray()  # its arguments are a placeholder's; BUILD brings the real ones


def _call_frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    made = PickledArray()
    made.array = _array(raw, dtype, shape, order)
    return made


def _call_scalar(dtype: Any, raw: Any) -> int | float | bool:
    value: int | float | bool = _array(raw, dtype, (), "C")[()].item()
    return value


def _call_dtype(code: Any, *_: Any) -> _DType:
    if type(code) is not str:
        raise RefusedPickleError("a dtype that is not named by a text.")
    return _DType(code)


def _call_ordered_dict(*items: Any) -> PickledDict:
    if items:
        raise RefusedPickleError("an OrderedDict of Python 2; wanted one filled by its keys.")
    return PickledDict()


def _call_encode(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise RefusedPickleError("bytes written as text in another encoding than latin1.")
    return text.encode("latin-1")


def _call_bytes(*content: Any) -> bytes:
    if content:
        raise RefusedPickleError("bytes made of something.")
    return b""


def _refuse_call(*_: Any) -> Any:
    raise RefusedPickleError("numpy.ndarray called by itself.")


_NAMES: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _refuse_call,  # only ever an argument
    "numpy.dtype": _call_dtype,
    "collections.OrderedDict": _call_ordered_dict,
    "_codecs.encode": _call_encode,
    "builtins.bytes": _call_bytes,
    "__builtin__.bytes": _call_bytes,
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _NAMES[f"{_core}.multiarray._reconstruct"] = _call_reconstruct
    _NAMES[f"{_core}.multiarray.scalar"] = _call_scalar
    _NAMES[f"{_core}.numeric._frombuffer"] = _call_frombuffer

_IGNORED = frozenset({"PROTO", "FRAME"})
_LITERALS = frozenset(
    {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
    | {"BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PUT": _Machine.memoize,
    "BINPUT": _Machine.memoize,
    "LONG_BINPUT": _Machine.memoize,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "MARK": _Machine.mark,
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": _Machine.discard_mark,
    "TUPLE": _Machine.marked_tuple,
    "TUPLE1": lambda machine, _: machine.small_tuple(1),
    "TUPLE2": lambda machine, _: machine.small_tuple(2),
    "TUPLE3": lambda machine, _: machine.small_tuple(3),
    "LIST": _Machine.marked_list,
    "DICT": _Machine.marked_dict,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
