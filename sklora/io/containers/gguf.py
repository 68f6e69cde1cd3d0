"""GGUF: values by key, then a list of tensors, then their numbers.

The reader of the gguf package believes what a file says of its lengths, so the header is parsed
here. The package is needed to unpack quantised tensors alone, and is an extra.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklora._untrusted import Refusal, shown
from sklora.io._tensors import (
    DTYPES,
    MAX_DIMENSIONS,
    MAX_NAME,
    TensorFile,
    TensorInfo,
    check_count,
    check_tensor,
)
from sklora.io.containers._arrays import as_array

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_VALUES = 100_000
MAX_TEXT = 2**20
# Vocabularies of language models take up to 10 MB.
MAX_HEADER = 32 * 2**20
MAX_ALIGNMENT = 2**16

# The formats of values by their number, then of two that are none: texts and lists.
_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_TEXT = 8
_LIST = 9
_PLAIN: Mapping[int, str] = {
    0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
}  # fmt: skip
# What a list entry, a value and a tensor take at least: of length, name, type, sizes and offset.
_TEXT_BYTES = 8
_VALUE_BYTES = 8 + 4 + 1
_TENSOR_BYTES = 8 + 4 + 4 + 8
_DAMAGED = "it is cut off or damaged: download it again"


class _Place(NamedTuple):
    """Where a tensor lies, and the number of its type."""

    kind: int
    begin: int
    n_bytes: int


class GGUFFile(TensorFile):
    """An open GGUF file; see `TensorFile`.

    Shapes are in the order of NumPy, which is the reverse of that of the file. A quantised tensor
    is read as F32. Lists among the values, such as vocabularies, are left out of `metadata`.
    """

    container = "gguf"

    def _read_header(self) -> None:
        self._blocks: dict[int, tuple[int, int]] = {}
        self._file.seek(0)
        if self._take(len(MAGIC), "the magic number") != MAGIC:
            raise Refusal("it does not start with GGUF, so it is no GGUF file.")
        version = self._number("I")
        if version not in VERSIONS:
            raise Refusal(
                f"its version of GGUF is {version}; little-endian files of versions 2 and 3 are "
                "read: convert it with a newer llama.cpp."
            )
        n_tensors, n_values = self._number("Q"), self._number("Q")
        check_count(n_tensors)
        if n_values > MAX_VALUES:
            raise Refusal(f"it announces {n_values} values, of at most {MAX_VALUES}.")
        self._check_room(n_values, _VALUE_BYTES, "values")
        alignment = 32
        keys: set[str] = set()
        for _ in range(n_values):
            key, value = self._read_value()
            if key in keys:
                raise Refusal(f"it holds the key {shown(key)} twice; {_DAMAGED}.")
            keys.add(key)
            if key == "general.alignment":
                alignment = _checked_alignment(value)
            if value is not None:
                self.metadata[key] = str(value)
        self._check_room(n_tensors, _TENSOR_BYTES, "tensors")
        self._read_places(n_tensors, alignment)

    def _read_places(self, n_tensors: int, alignment: int) -> None:
        relative: dict[str, _Place] = {}
        for _ in range(n_tensors):
            name, info, place = self._read_tensor(alignment)
            if name in self.tensors:
                raise Refusal(f"it holds the tensor {shown(name)} twice; {_DAMAGED}.")
            self.tensors[name], relative[name] = info, place
        begin = -(-self._file.tell() // alignment) * alignment
        self._places: dict[str, _Place] = {}
        last_end = begin
        for name, place in sorted(relative.items(), key=lambda item: item[1].begin):
            place = place._replace(begin=begin + place.begin)
            end = place.begin + place.n_bytes
            if place.begin < last_end or end > self.size:
                raise Refusal(
                    f"tensor {shown(name)} at bytes {place.begin} to {end} overlaps the one before "
                    f"it, which ends at {last_end}, or the end of the file at {self.size}; "
                    f"{_DAMAGED}."
                )
            self._places[name], last_end = place, end

    def _read_value(self) -> tuple[str, Any]:
        """Read a key and its value, which is None for a list."""
        key = self._text(MAX_NAME, "a key")
        kind = self._number("I")
        if kind in _SCALARS:
            return key, self._number(_SCALARS[kind])
        if kind == _TEXT:
            return key, self._text(MAX_TEXT, f"the text of {shown(key)}")
        if kind != _LIST:
            raise Refusal(f"key {shown(key)} has a value of type {kind}, which GGUF lacks.")
        kind, length = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[kind]), key)
        elif kind == _TEXT:
            self._check_room(length, _TEXT_BYTES, f"texts of {shown(key)}")
            for _ in range(length):
                self._skip(self._number("Q"), key)
        else:
            raise Refusal(
                f"key {shown(key)} has a list of values of type {kind}; lists of numbers and "
                "texts are read."
            )
        return key, None

    def _read_tensor(self, alignment: int) -> tuple[str, TensorInfo, _Place]:
        """Read what is said of a tensor, and its place counted from where the numbers begin."""
        name = self._text(4 * MAX_NAME, "the name of a tensor")
        n_sizes = self._number("I")
        if n_sizes > MAX_DIMENSIONS:
            raise Refusal(f"tensor {shown(name)} has {n_sizes} sizes, of at most {MAX_DIMENSIONS}.")
        shape = check_tensor(name, reversed([self._number("Q") for _ in range(n_sizes)]))
        kind, offset = self._number("I"), self._number("Q")
        if offset % alignment or offset > self.size:
            raise Refusal(
                f"tensor {shown(name)} has the offset {offset}, which is no multiple of "
                f"{alignment} within the file of {self.size} bytes; {_DAMAGED}."
            )
        if kind in _PLAIN:
            info = TensorInfo(_PLAIN[kind], shape)
            return name, info, _Place(kind, offset, info.nbytes)
        if kind not in self._blocks:
            self._blocks[kind] = _quantised_block(name, kind)
        block, block_bytes = self._blocks[kind]
        if not shape or shape[-1] % block:
            raise Refusal(
                f"tensor {shown(name)} of shape {shape} is quantised in blocks of {block}, which "
                f"do not fill its rows; {_DAMAGED}."
            )
        n_bytes = math.prod(shape) // block * block_bytes
        return name, TensorInfo("F32", shape), _Place(kind, offset, n_bytes)

    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor; see `TensorFile.read`."""
        info, place = self.tensors[name], self._places[name]
        self._file.seek(place.begin)
        raw = self._take(place.n_bytes, f"tensor {shown(name)}")
        if place.kind in _PLAIN or not info.size:
            return as_array(raw, info)
        rows = np.frombuffer(raw, np.uint8).reshape(*info.shape[:-1], -1)
        return _dequantise(rows, place.kind).reshape(info.shape)

    def _number(self, form: str) -> Any:
        """Read a little-endian number."""
        raw = self._take(struct.calcsize(form), "a number of the header")
        return struct.unpack(f"<{form}", raw)[0]

    def _text(self, at_most: int, what: str) -> str:
        length = self._number("Q")
        if length > at_most:
            raise Refusal(f"{what} is said to take {length} bytes, of at most {at_most}.")
        self._check_room(length, 1, f"bytes of {what}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise Refusal(f"{what} is no text: {shown(str(error))}.") from error

    def _skip(self, n_bytes: int, key: str) -> None:
        self._check_room(n_bytes, 1, f"bytes of {shown(key)}")
        self._file.seek(n_bytes, 1)

    def _check_room(self, count: int, n_bytes: int, what: str) -> None:
        left = min(self.size, MAX_HEADER) - self._file.tell()
        if count * n_bytes > left:
            raise Refusal(
                f"it announces {count} {what}, which take at least {count * n_bytes} bytes, but "
                f"{left} are left, in the file or in the {MAX_HEADER} that a header may take; "
                f"{_DAMAGED}."
            )


def _checked_alignment(value: object) -> int:
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise Refusal(
            f"general.alignment is {shown(value)}; it must be a power of two up to {MAX_ALIGNMENT}."
        )
    return value


def _quantised_block(name: str, kind: int) -> tuple[int, int]:
    """Give how many numbers a block of a quantised type holds, and in how many bytes."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise Refusal(
            f"tensor {shown(name)} is quantised (type {kind}), which needs the gguf package: pip "
            "install 'sklora[gguf]'."
        ) from error
    try:
        block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        _dequantise(np.zeros((1, n_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise Refusal(
            f"tensor {shown(name)} has type {kind}, which the gguf package does not unpack; "
            "convert the file to F16."
        ) from error
    return block, n_bytes


def _dequantise(rows: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
    """Unpack rows of blocks, uint8 of shape (..., row_bytes), to (..., row)."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    # Scales that are infinite or no numbers are for the reader of the file to judge.
    with np.errstate(all="ignore"):
        return np.asarray(dequantize(rows, GGMLQuantizationType(kind)), DTYPES["F32"])
