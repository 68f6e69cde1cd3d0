"""A store of adapters that stay in their files until they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklora._factors import place_factors
from sklora._layout import Factors, LoRALayout
from sklora._modules import side_slices
from sklora._pages import Rows
from sklora._untrusted import Refusal
from sklora.io._adapter import OpenAdapter, Stamp, opened
from sklora.io._find import Found
from sklora.io._plan import ReadOptions


class AdapterFile(NamedTuple):
    """An adapter file that has been looked at."""

    found: Found
    stamp: Stamp


class AdapterStore:
    """Rows that are read from adapter files, one file for each.

    Its pickle holds paths, not weights. A file that changed since it was scanned is refused.

    Parameters
    ----------
    files : sequence of AdapterFile
        With absolute paths.
    options : ReadOptions
    layout : LoRALayout
    ranks : ndarray of shape (N, n_modules)
    ids : ndarray of shape (N,)
    dtype : numpy.dtype
        What rows are read as.
    """

    # Every number is checked as it is read, and fills no more than its rank.
    is_checked = True

    def __init__(
        self,
        files: Sequence[AdapterFile],
        options: ReadOptions,
        layout: LoRALayout,
        ranks: NDArray[np.intp],
        ids: NDArray[Any],
        dtype: np.dtype[Any],
    ) -> None:
        self.layout = layout
        self.ranks = ranks
        self.ids = ids
        self.dtype = dtype
        self._files = tuple(files)
        self._options = options
        self._positions = {name: position for position, name in enumerate(layout.names)}
        self._side = side_slices(layout.side)

    def read(self, rows: Rows, *, copy: bool = True) -> NDArray[Any]:
        """Read some adapters from their files."""
        positions = np.arange(len(self._files))[rows]
        flat = np.zeros((len(positions), self.layout.width), self.dtype)
        for place, position in enumerate(positions):
            self._read_row(self._files[position], self.ranks[position], flat[place : place + 1])
        return flat

    def _read_row(self, file: AdapterFile, ranks: NDArray[np.intp], row: NDArray[Any]) -> None:
        with opened(file.found, self._options, file.stamp) as adapter:
            for position, U, V in self._factors(adapter, ranks):
                place_factors(row, self.layout, position, (U, V))
            self._read_side(adapter, row[0, self.layout.side_slice])

    def _factors(
        self, adapter: OpenAdapter, ranks: NDArray[np.intp]
    ) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
        for name, U, V in adapter.factors(self._positions, self.dtype):
            position = self._positions[name]
            _, n, m, _ = self.layout.modules[position]
            if (U.shape, V.shape) != ((n, ranks[position]), (m, ranks[position])):
                raise Refusal("it changed while it was read; read the adapters again.")
            yield position, U, V

    def _read_side(self, adapter: OpenAdapter, side: NDArray[Any]) -> None:
        for name, vector in adapter.side(self._side, self.dtype):
            side[self._side[name]] = vector

    def iter_factors(self, row: int) -> Iterator[Factors]:
        """Read one adapter module by module; see `StreamingStore`."""
        file, position = self._files[row], 0
        with opened(file.found, self._options, file.stamp) as adapter:
            for found, U, V in self._factors(adapter, self.ranks[row]):
                yield from self._zero_updates(position, found)
                yield U, V
                position = found + 1
        yield from self._zero_updates(position, self.layout.n_modules)

    def _zero_updates(self, start: int, stop: int) -> Iterator[Factors]:
        for _, n, m, _ in self.layout.modules[start:stop]:
            yield np.zeros((n, 0), self.dtype), np.zeros((m, 0), self.dtype)

    def read_side(self, row: int) -> NDArray[Any]:
        """Read the side features of one adapter."""
        side = np.zeros(self.layout.n_side, self.dtype)
        if len(side):
            file = self._files[row]
            with opened(file.found, self._options, file.stamp) as adapter:
                self._read_side(adapter, side)
        return side

    def subset(self, rows: NDArray[np.intp]) -> AdapterStore:
        """Give a store of some files."""
        files = [self._files[row] for row in rows]
        return AdapterStore(
            files, self._options, self.layout, self.ranks[rows], self.ids[rows], self.dtype
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A rank seldom needs more than a byte, and there is one for every file and module; an array
        # of strings has room for the longest in every place.
        ranks = self.ranks.astype(np.min_scalar_type(self.ranks.max(initial=0)))
        return _opened_again, (
            self._files,
            self._options,
            self.layout,
            ranks,
            self.ids.tolist(),
            self.dtype,
        )


def _opened_again(
    files: Sequence[AdapterFile],
    options: ReadOptions,
    layout: LoRALayout,
    ranks: NDArray[Any],
    ids: list[str],
    dtype: np.dtype[Any],
) -> AdapterStore:
    """Unpickle."""
    return AdapterStore(
        files, options, layout, ranks.astype(np.intp), np.array(ids, np.str_), dtype
    )


def located(found: Found) -> AdapterFile:
    """Note where a file lies, whatever the current folder will be, and what it is now."""
    # Not abspath, which takes ".." back from a link, and not from where the link leads to.
    path, root = (str(Path(each).absolute()) for each in (found.path, found.root))
    # Many files have one root, which is then one string, in memory and in a pickle.
    return AdapterFile(Found(path, sys.intern(root), found.in_folder), Stamp.of(path))
