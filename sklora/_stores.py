"""Where the weights of a collection are: in an array, or in a file that is mapped into memory."""

from __future__ import annotations

import mmap
import os
from typing import Any, NamedTuple, Protocol

import ml_dtypes as _ml_dtypes  # noqa: F401  (tells NumPy of bfloat16 and its safe casts)
import numpy as np
from numpy.typing import DTypeLike, NDArray

from sklora._layout import LoRALayout

Rows = slice | NDArray[np.intp]


class Store(Protocol):
    """A source of flat rows of LoRA weights; what a collection is a view of.

    Attributes
    ----------
    layout : LoRALayout
        What the columns mean.
    ranks : ndarray of shape (N, n_modules), of intp
        True rank of every update, 0 for a module that the adapter lacks.
    ids : ndarray of shape (N,)
        What each adapter is called.
    dtype : numpy.dtype
        What rows are read as: float32 or float64.
    """

    @property
    def layout(self) -> LoRALayout: ...
    @property
    def ranks(self) -> NDArray[np.intp]: ...
    @property
    def ids(self) -> NDArray[Any]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...

    def read(self, rows: Rows) -> NDArray[Any]:
        """Read rows into a new array ``(len(rows), width)`` of `dtype`, zero-padded."""

    def subset(self, rows: NDArray[np.intp]) -> Store:
        """Give a store of some rows alone, as small as can be when pickled."""


def compute_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Give the dtype in which stored numbers are read.

    Parameters
    ----------
    dtype : dtype
        Of the stored numbers.

    Returns
    -------
    numpy.dtype
        float32 where that holds every number of `dtype` (float16, bfloat16, float32), else float64.

    Raises
    ------
    ValueError
        When the numbers are complex, no numbers, or wider than float64.
    """
    dtype = np.dtype(dtype)
    if np.can_cast(dtype, np.float32):
        return np.dtype(np.float32)
    if np.can_cast(dtype, np.float64):
        return np.dtype(np.float64)
    raise ValueError(f"LoRA weights are real numbers of at most 64 bits, got dtype {dtype}.")


class ArrayStore:
    """Rows of an array in memory, which is not copied.

    Parameters
    ----------
    array : ndarray of shape (N, width)
    layout : LoRALayout
    ranks : ndarray of shape (N, n_modules)
    ids : ndarray of shape (N,)
    """

    def __init__(
        self,
        array: NDArray[Any],
        layout: LoRALayout,
        ranks: NDArray[np.intp],
        ids: NDArray[Any],
    ) -> None:
        self.array = array
        self.layout = layout
        self.ranks = ranks
        self.ids = ids

    @property
    def dtype(self) -> np.dtype[Any]:
        """What rows are read as."""
        return compute_dtype(self.array.dtype)

    def read(self, rows: Rows) -> NDArray[Any]:
        """Copy rows."""
        block = self.array[rows]
        return block.astype(self.dtype, order="C", copy=np.may_share_memory(block, self.array))

    def subset(self, rows: NDArray[np.intp]) -> ArrayStore:
        """Copy rows, in the dtype they are stored in."""
        return ArrayStore(self.array[rows], self.layout, self.ranks[rows], self.ids[rows])


class FileSpan(NamedTuple):
    """Where an array lies in a file."""

    path: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, array: NDArray[Any]) -> FileSpan | None:
        """Find the file behind an array; None if there is none, or it does not hold what one reads."""
        owner: Any = array
        while isinstance(owner, np.ndarray) and not isinstance(owner.base, mmap.mmap):
            owner = owner.base
        if not isinstance(owner, np.memmap) or owner.filename is None or owner.mode == "c":
            return None
        # The offset of a view of a map is that of the map, so it is found from the addresses.
        shift = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        path = os.fspath(owner.filename)
        return cls(path, owner.offset + shift, array.dtype, array.shape, array.strides)

    def open(self) -> NDArray[Any]:
        """Map the file, read only; nothing is read yet."""
        file = np.memmap(self.path, dtype=np.uint8, mode="r")
        return np.ndarray(self.shape, self.dtype, file, self.offset, self.strides)


class MemmapStore:
    """Rows of a file that is mapped into memory, read when asked for.

    Its pickle holds where the rows are, not what they are; whoever unpickles it maps the file again.

    Parameters
    ----------
    span : FileSpan
        An array ``(N_file, width)``.
    layout : LoRALayout
    ranks : ndarray of shape (N, n_modules)
    ids : ndarray of shape (N,)
    rows : ndarray of shape (N,) or None, default=None
        Which rows of the array these are; None for all.

    Raises
    ------
    OSError
        When the file cannot be read.
    """

    def __init__(
        self,
        span: FileSpan,
        layout: LoRALayout,
        ranks: NDArray[np.intp],
        ids: NDArray[Any],
        rows: NDArray[np.intp] | None = None,
    ) -> None:
        self.span = span
        self.layout = layout
        self.ranks = ranks
        self.ids = ids
        self._rows = rows
        self._array = span.open()

    @property
    def dtype(self) -> np.dtype[Any]:
        """What rows are read as."""
        return compute_dtype(self.span.dtype)

    def read(self, rows: Rows) -> NDArray[Any]:
        """Read rows from the file."""
        block = self._array[rows if self._rows is None else self._rows[rows]]
        return block.astype(self.dtype, order="C", copy=np.may_share_memory(block, self._array))

    def subset(self, rows: NDArray[np.intp]) -> MemmapStore:
        """Give some rows of the same file."""
        inner = rows if self._rows is None else self._rows[rows]
        return MemmapStore(self.span, self.layout, self.ranks[rows], self.ids[rows], inner)

    def __reduce__(self) -> tuple[Any, ...]:
        # For joblib.Memory, which hashes the pickle: other contents are another collection.
        changed = os.stat(self.span.path).st_mtime_ns
        uniform = bool((self.ranks == self.layout.ranks).all())
        ranks = len(self.ranks) if uniform else self.ranks
        return _open_store, (self.span, self.layout, ranks, self.ids, self._rows, changed)


def _open_store(
    span: FileSpan,
    layout: LoRALayout,
    ranks: NDArray[np.intp] | int,
    ids: NDArray[Any],
    rows: NDArray[np.intp] | None,
    changed: int,
) -> MemmapStore:
    del changed
    if isinstance(ranks, int):
        ranks = np.tile(np.array(layout.ranks, np.intp), (ranks, 1))
    return MemmapStore(span, layout, ranks, ids, rows)
