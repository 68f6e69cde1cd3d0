"""What a container of tensors is: a header that is known, and numbers that are read on demand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sklora._untrusted import Refusal, shown

# More tensors than this are no adapter: the largest of the key listings has some 10,000.
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
MAX_NAME = 1_000
# Adapters that are known take less than 10 GB.
MAX_BYTES = 2**40

FLOAT_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
DTYPES: Mapping[str, np.dtype] = {
    **FLOAT_DTYPES,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class TensorInfo(NamedTuple):
    """One tensor as the header describes it.

    Attributes
    ----------
    dtype : str
        A key of `DTYPES`: the names that safetensors gives.
    shape : tuple of int
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.size * DTYPES[self.dtype].itemsize


class TensorFile(ABC):
    """An open container: its header has been read and validated, its numbers have not been read.

    A subclass is made from an open binary file of known size, raises `Refusal` when anything is
    wrong with the header, and never takes more memory than the file is large.

    Parameters
    ----------
    file : binary file
        Open for reading, at any position; closed with the container.
    size : int
        How many bytes the file has.

    Attributes
    ----------
    container : str
        What kind it is.
    tensors : dict of str to TensorInfo
        In the order of the file.
    metadata : dict of str to str
    size : int
    header : bytes or None
        The part of the header that alone says which `tensors` there are; None where there is none
        or it is too long to be kept.
    """

    container: ClassVar[str]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header: bytes | None = None

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self.tensors = {}
        self.metadata = {}
        self._read_header()

    @abstractmethod
    def _read_header(self) -> None:
        """Fill `tensors` and `metadata`, or raise `Refusal`."""

    @abstractmethod
    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor, in the dtype and shape of its header.

        Raises
        ------
        Refusal
            When the bytes are not what the header says.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _take(self, n_bytes: int, what: str) -> bytes:
        """Read exactly so many bytes from here on; never more than the file has."""
        left = self.size - self._file.tell()
        if n_bytes > left:
            raise Refusal(
                f"{what} of {n_bytes} bytes runs past the end of the file, by {n_bytes - left} "
                "bytes; it is cut off or damaged: download it again."
            )
        taken = self._file.read(n_bytes)
        if len(taken) < n_bytes:
            raise Refusal(f"the file became shorter while {what} was read; read it again.")
        return taken


def check_tensor(name: object, shape: Iterable[object]) -> tuple[int, ...]:
    """Check the name and shape of a tensor from a header, and give the shape."""
    if not isinstance(name, str) or not name or len(name) > MAX_NAME or not name.isprintable():
        raise Refusal(
            f"tensor name {shown(name)} is no printable text of 1 to {MAX_NAME} characters; "
            "the file was not written by a trainer of adapters."
        )
    sizes = tuple(shape)
    if len(sizes) > MAX_DIMENSIONS or not all(
        type(size) is int and 0 <= size < MAX_BYTES for size in sizes
    ):
        raise Refusal(
            f"tensor {shown(name)} has the shape {shown(sizes)}; shapes are up to "
            f"{MAX_DIMENSIONS} sizes from 0 to {MAX_BYTES}."
        )
    checked: tuple[int, ...] = sizes  # type: ignore[assignment]
    if math.prod(size or 1 for size in checked) > MAX_BYTES:
        raise Refusal(f"tensor {shown(name)} of shape {checked} is larger than any adapter.")
    return checked


def check_count(n_tensors: int) -> None:
    """Check how many tensors a header announces."""
    if n_tensors > MAX_TENSORS:
        raise Refusal(f"it announces {n_tensors} tensors; an adapter has at most {MAX_TENSORS}.")
