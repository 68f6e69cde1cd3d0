"""Copies from a memory map that do not leave its pages behind in this process."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Rows = slice | NDArray[np.intp]

# What is mapped at one time counts as resident memory until it is released.
_MAPPED_BYTES = 2**25
# The system maps more than what is touched: up to a huge page around every row.
_HUGE_PAGE = 2**21


class MappedRows:
    """Rows of an array that may lie in a memory map.

    Pages that have been read from a file stay mapped, so that the resident memory of a process
    grows to the size of the file. Here they are copied piece by piece and released, to stay in
    the system's cache alone. That is done for read-only maps of files, where the system allows it:
    what is released of any other map might be lost.

    Parameters
    ----------
    array : ndarray of shape (N, width)
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self._map: mmap.mmap | None = None
        owner = owner_of_map(array)
        if owner is not None and owner.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
            self._map = owner.base  # type: ignore[assignment]

    def copy(self, rows: Rows, dtype: DTypeLike) -> NDArray[Any]:
        """Copy rows into a new array.

        Parameters
        ----------
        rows : slice or ndarray of int
        dtype : dtype
            Of the copy.

        Returns
        -------
        ndarray of shape (n_rows, width)

        Raises
        ------
        IndexError
            When there are no such rows.
        """
        width = self._array.shape[1]
        if isinstance(rows, slice):
            # A view, of which nothing is read yet.
            selected, n_rows, apart = self._array[rows], len(self._array[rows]), 0
        else:
            selected, n_rows, apart = self._array, len(rows), _HUGE_PAGE
        step = max(1, _MAPPED_BYTES // (width * self._array.itemsize + apart))
        copied = np.empty((n_rows, width), dtype)
        for start in range(0, n_rows, step):
            part = slice(start, start + step)
            copied[part] = selected[part if isinstance(rows, slice) else rows[part]]
            if self._map is not None:
                self._map.madvise(mmap.MADV_DONTNEED)
        return copied


def owner_of_map(array: NDArray[Any]) -> np.memmap[Any, Any] | None:
    """Find the memory map that an array is a view of; None if there is none."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and not isinstance(owner.base, mmap.mmap):
        owner = owner.base
    return owner if isinstance(owner, np.memmap) else None
