"""The pickles of PyTorch's state dicts, interpreted without running what they name.

A pickle is a program. Those of state dicts use some 30 of its instructions and a dozen names; these
are carried out here on plain values and on records, and anything else is refused. No object of the
pickle's choice is made or called, and no value is hashed but texts, or compared or printed but
numbers and texts, so that tuples in tuples in tuples cost no more than their bytes.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sklora._untrusted import Refusal, shown
from sklora.io._tensors import MAX_BYTES, MAX_DIMENSIONS

# Some 35 make a tensor, so these do for 57,000 tensors; each may make an object of 64 bytes.
MAX_INSTRUCTIONS = 2_000_000
_MAX_INTEGER_BYTES = 8
# What PyTorch calls a storage. It would cut other names at NUL, and compare bytes, not letters.
_KEY = re.compile("[0-9]+")

_STORAGES: Mapping[str, str] = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_GLOBALS = frozenset({*_STORAGES, _ORDERED_DICT, _TENSOR, _PARAMETER})


# These compare by identity, unlike named tuples, and are no tuples.
@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Numbers in a file of the archive.

    Attributes
    ----------
    key : str
        What the file is called.
    dtype : str
    numel : int
        How many numbers it holds.
    """

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A view of a storage, as the pickle describes it: nothing but the types is checked.

    Attributes
    ----------
    storage : Storage
    offset : int
    shape, strides : tuple of int
        Of at most 8 integers.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Global:
    """A name of Python that the pickle mentions."""

    name: str


def interpret(raw: bytes) -> object:
    """Interpret a pickle.

    Parameters
    ----------
    raw : bytes
        The pickle.

    Returns
    -------
    object
        Its value: of dicts, lists, tuples, texts, numbers, None, `Storage` and `Tensor`.

    Raises
    ------
    Refusal
        When it needs anything else, or is damaged.
    """
    machine = _Machine()
    try:
        for instruction, argument in _instructions(raw):
            if instruction == "STOP":
                return machine.pop()
            machine.step(instruction, argument)
    except Refusal:
        raise
    except (ValueError, IndexError, KeyError) as error:
        raise Refusal(f"its pickle is damaged, {shown(str(error))}: download it again.") from error
    raise Refusal("its pickle has no end; it is damaged: download it again.")


def _instructions(raw: bytes) -> Iterator[tuple[str, Any]]:
    """Decode instructions, as `pickletools.genops`, but none that is not allowed."""
    stream = io.BytesIO(raw)
    for _ in range(MAX_INSTRUCTIONS):
        code = stream.read(1)
        if not code:
            return
        instruction = _CODES.get(code)
        if instruction is None:
            raise ValueError(f"byte {code!r} is no instruction")
        if instruction.name not in _ALLOWED:
            raise Refusal(
                f"its pickle has the instruction {instruction.name}, which tensors do not need, so "
                "it is not read; ask for a safetensors file."
            )
        if instruction.name == "GLOBAL":
            # The reader of `pickletools` would interpret, and warn of, backslashes.
            yield "GLOBAL", b" ".join(stream.readline()[:-1] for _ in range(2)).decode("ascii")
        else:
            argument = instruction.arg
            yield instruction.name, None if argument is None else argument.reader(stream)
    raise Refusal(f"its pickle has more than {MAX_INSTRUCTIONS} instructions.")


class _Machine:
    """The stack and memo of one run. IndexError and KeyError mean that the pickle is damaged."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._dtypes: dict[str, str] = {}

    def step(self, instruction: str, argument: Any) -> None:
        if instruction in _CONSTANTS:
            self._stack.append(_CONSTANTS[instruction]())
        elif instruction in _ARGUMENTS:
            self._stack.append(argument)
        elif instruction in _ACTIONS:
            _ACTIONS[instruction](self, argument)

    def pop(self) -> Any:
        """Take the last value, which cannot lie before the last mark."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise IndexError("nothing is on the stack")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        begin = self._marks.pop()
        taken = self._stack[begin:]
        del self._stack[begin:]
        return taken

    def _top(self, kind: type) -> Any:
        value = self.pop()
        if type(value) is not kind:
            raise ValueError(f"a {kind.__name__} is expected, not a {type(value).__name__}")
        self._stack.append(value)
        return value

    def mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def put(self, index: int) -> None:
        value = self.pop()
        self._stack.append(value)
        self._memo[index] = value

    def memoize(self, _: object) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def integer(self, value: int) -> None:
        if value.bit_length() > 8 * _MAX_INTEGER_BYTES:
            raise Refusal(f"its pickle holds an integer of {value.bit_length()} bits.")
        self._stack.append(value)

    def tuple(self, _: object) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def tuple_of(self, length: int) -> None:
        values = [self.pop() for _ in range(length)]
        self._stack.append(tuple(reversed(values)))

    def append(self, _: object) -> None:
        value = self.pop()
        self._top(list).append(value)

    def appends(self, _: object) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def set_item(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def set_items(self, _: object) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise ValueError("a key lacks its value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple hashes all that is in it, again for every time that it is in there.
            if type(key) is not str:
                raise Refusal(
                    f"its pickle holds a dictionary with a key of type {type(key).__name__}; "
                    "save a state dict, whose keys are texts."
                )
            if key in target:
                raise Refusal(f"its pickle holds the key {shown(key)} twice.")
            target[key] = value

    def name(self, argument: str) -> None:
        if argument not in _GLOBALS:
            raise Refusal(
                f"its pickle names {shown(argument)}, which tensors do not need and which may run "
                "code where it is loaded, so it is not read; ask for a safetensors file."
            )
        self._stack.append(_Global(argument))

    def name_from_stack(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name is expected")
        self.name(f"{module} {name}")

    def storage(self, _: object) -> None:
        record = self.pop()
        match record:
            case ("storage", _Global(name), str(key), str(), int(numel)) if (
                type(record) is tuple
                and name in _STORAGES
                and _KEY.fullmatch(key)
                and 0 <= numel < MAX_BYTES
            ):
                dtype = _STORAGES[name]
                # PyTorch takes its numbers for what the first tensor in it says they are.
                if self._dtypes.setdefault(key, dtype) != dtype:
                    raise Refusal(
                        f"its pickle says of the storage {key[:20]} that it holds "
                        f"{self._dtypes[key]} and {dtype}; save clones of its tensors."
                    )
                self._stack.append(Storage(key, dtype, numel))
            case _:
                raise Refusal(
                    "its pickle describes a storage as PyTorch does not, or one larger than any "
                    "adapter; ask for a safetensors file."
                )

    def call(self, _: object) -> None:
        arguments, called = self.pop(), self.pop()
        if type(arguments) is not tuple or type(called) is not _Global:
            raise ValueError("only names are called, with tuples")
        match called.name, arguments:
            case "collections OrderedDict", ():
                self._stack.append({})
            case (
                "torch._utils _rebuild_tensor_v2",
                (Storage() as storage, int(offset), tuple(shape), tuple(strides), *more),
            ) if _are_sizes(shape) and _are_sizes(strides):
                if any(more[2:]):  # behind requires_grad and hooks, which hold no numbers
                    raise Refusal(
                        "its pickle has a tensor whose numbers PyTorch negates as it loads them; "
                        "save a clone of it."
                    )
                self._stack.append(Tensor(storage, offset, shape, strides))
            case "torch._utils _rebuild_parameter", (Tensor() as data, *_):
                self._stack.append(data)
            case _:
                raise Refusal(
                    f"its pickle calls {called.name} as PyTorch does not; ask for a safetensors "
                    "file."
                )

    def build(self, _: object) -> None:
        """Drop the state of an OrderedDict: PyTorch keeps the versions of modules there."""
        self.pop()
        self._top(dict)


def _are_sizes(values: tuple[object, ...]) -> bool:
    return len(values) <= MAX_DIMENSIONS and all(type(value) is int for value in values)


_CODES: Mapping[bytes, pickletools.OpcodeInfo] = {
    opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes
}
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_ARGUMENTS = frozenset(
    {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
)
_ACTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "LONG1": _Machine.integer,
    "TUPLE": _Machine.tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
_ALLOWED = frozenset({"PROTO", "FRAME", "STOP", *_CONSTANTS, *_ARGUMENTS, *_ACTIONS})
