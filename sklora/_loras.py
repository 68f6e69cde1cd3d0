"""LoRACollection: adapters as an array-like that scikit-learn can split."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sklora._factors import LoRAAdapter, flat_from_factors, relay
from sklora._layout import Factors, LoRALayout
from sklora._modules import check_room
from sklora._stores import (
    ArrayStore,
    Store,
    as_slice,
    blocks,
    check_memory,
    checked_ids,
    store_of_array,
    subset_again,
)
from sklora._zoofile import open_zoo, save_zoo


class LoRACollection:
    """Adapters as an array-like of shape (n_adapters, width) that knows what its columns mean.

    Indexing rows gives a view that shares the weights, so that scikit-learn's splitters, searches
    and ensembles work on collections larger than memory. ``numpy.asarray(X)`` is the flat,
    zero-padded array, so that any scikit-learn step accepts a collection.

    Make one with `from_factors` or `from_array`, or `open` one that was written with `save`.

    Parameters
    ----------
    store : Store
        Where the weights are.
    index : ndarray of shape (n_adapters,), of intp, or None, default=None
        The rows of the store that this is a view of; None for all.
    layout : LoRALayout or None, default=None
        How flat rows are laid out; None for the layout of the store.

    See Also
    --------
    LoRALayout : What the columns mean.

    Notes
    -----
    ``X[i]`` is a `LoRAAdapter`. ``X[rows]`` and ``X[rows, ...]`` are views, for a slice or for a
    1-D array or list of integers or booleans. ``X[rows, columns]`` is an ndarray of flat columns.

    The pickle of a collection holds the rows that it views and no others. If they are
    memory-mapped, it holds where they are in the file instead, which other processes map again.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora import LoRACollection
    >>> rng = np.random.default_rng(0)
    >>> X = LoRACollection.from_factors(
    ...     {"q": (rng.normal(size=(8, 2)), rng.normal(size=(6, 2)))} for _ in range(10)
    ... )
    >>> X
    LoRACollection(n_adapters=10, n_modules=1, width=28, dtype=float64)
    >>> X[[3, 1]].ids
    array([3, 1])
    >>> U, V = X[3]["q"]
    >>> U.shape, V.shape
    ((8, 2), (6, 2))
    """

    def __init__(
        self,
        store: Store,
        index: NDArray[np.intp] | None = None,
        layout: LoRALayout | None = None,
    ) -> None:
        self._store = store
        self._index = index
        self._layout = store.layout if layout is None else layout
        self._compact: Store | None = None

    @classmethod
    def from_factors(
        cls,
        factors: Iterable[Mapping[str, tuple[ArrayLike, ArrayLike]]],
        *,
        layout: LoRALayout | None = None,
        ids: ArrayLike | None = None,
        side: Iterable[Mapping[str, ArrayLike]] | None = None,
        base_model: str | None = None,
        dtype: DTypeLike | None = None,
    ) -> LoRACollection:
        """Make a collection of adapters given by their factors, which are copied.

        Parameters
        ----------
        factors : iterable of {module: (U, V)}
            For every adapter its modules, with ``U (n, r)`` and ``V (m, r)`` of the update
            ``U V^T``, scale included. Ranks may differ between adapters and modules. A module that
            an adapter lacks is the zero update, of rank 0.
        layout : LoRALayout or None, default=None
            The modules and the room for their ranks. By default all modules in the order of their
            first appearance, with room for the largest rank.
        ids : array-like of shape (n_adapters,) or None, default=None
            What the adapters are called; by default 0, 1, 2, ...
        side : iterable of {name: vector} or None, default=None
            Side features, the same ones for every adapter; None for those of each `LoRAAdapter`.
        base_model : str or None, default=None
            What the adapters were trained on.
        dtype : dtype or None, default=None
            How weights are stored; by default the common dtype of factors and side features, where
            Python's floats are float64. float16 and bfloat16 are read as float32.

        Returns
        -------
        LoRACollection

        Raises
        ------
        ValueError
            When factors are no matrices, have different inner ranks, rank 0, NaN or infinity; when
            a module has different shapes in different adapters or does not fit `layout`; when side
            features or ids are missing, or `dtype` is one of integers. The message says where.
        TypeError
            When an adapter, or its side features, are no mapping.

        Examples
        --------
        >>> import numpy as np
        >>> from sklora import LoRACollection
        >>> X = LoRACollection.from_factors(
        ...     [
        ...         {"q": (np.ones((3, 2)), np.ones((4, 2)))},
        ...         {"v": (np.ones((3, 1)), np.ones((4, 1)))},
        ...     ],
        ...     ids=["cat", "dog"],
        ... )
        >>> X.ranks
        array([[2, 0],
               [0, 1]])
        """
        flat, layout, ranks = flat_from_factors(
            factors, layout=layout, side=side, base_model=base_model, dtype=dtype
        )
        return cls(ArrayStore(flat, layout, ranks, checked_ids(ids, len(flat))))

    @classmethod
    def from_array(
        cls,
        X: NDArray[Any],
        layout: LoRALayout,
        *,
        ranks: ArrayLike | None = None,
        ids: ArrayLike | None = None,
    ) -> LoRACollection:
        """Make a collection of flat rows, which are not copied.

        Parameters
        ----------
        X : ndarray or memmap of shape (n_adapters, layout.width)
            Zero-padded rows; see `LoRALayout` for their order. Of a memory map only what is asked
            for is ever read; one that is opened copy-on-write counts as an array in memory.
        layout : LoRALayout
        ranks : array-like of int, of shape (n_adapters, n_modules), or None, default=None
            True ranks; what the rows hold beyond them has to be zero. By default they are found by
            reading X once, in blocks: see `LoRALayout.infer_ranks`.
        ids : array-like of shape (n_adapters,) or None, default=None
            What the adapters are called; by default 0, 1, 2, ...

        Returns
        -------
        LoRACollection

        Raises
        ------
        ValueError
            When X has another width or holds no real numbers, or ranks or ids do not fit.

        Examples
        --------
        >>> import numpy as np
        >>> from sklora import LoRACollection, LoRALayout
        >>> layout = LoRALayout([("q", 3, 2, 1)])
        >>> LoRACollection.from_array(np.ones((7, 5)), layout).shape
        (7, 5)
        """
        return cls(store_of_array(X, layout, ranks, ids))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> LoRACollection:
        """Map a file that `save` wrote; weights are read when they are asked for.

        Parameters
        ----------
        path : str or path-like

        Returns
        -------
        LoRACollection

        Raises
        ------
        ValueError
            When the file is no zoo, or damaged; the message names it and the remedy.
        """
        return cls(open_zoo(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the adapters into one safetensors file, block by block.

        The file appears under its name when it is complete; until then, and when anything goes
        wrong, what was there stays.

        Parameters
        ----------
        path : str or path-like
            Also the file that these adapters are mapped from.

        Raises
        ------
        ValueError
            When `path` is a folder, or ids are neither integers nor strings.

        Examples
        --------
        >>> import numpy as np, tempfile
        >>> from sklora import LoRACollection, LoRALayout
        >>> X = LoRACollection.from_array(np.ones((5, 4)), LoRALayout.rows(4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     X.save(f"{folder}/zoo.safetensors")
        ...     LoRACollection.open(f"{folder}/zoo.safetensors")
        LoRACollection(n_adapters=5, n_modules=1, width=4, dtype=float64)
        """
        save_zoo(self, path)

    @property
    def layout(self) -> LoRALayout:
        """What the columns mean."""
        return self._layout

    @property
    def ranks(self) -> NDArray[np.intp]:
        """True ranks, of shape (n_adapters, n_modules); 0 for a module that the adapter lacks."""
        ranks = self._store.ranks
        return ranks if self._index is None else ranks[self._index]

    @property
    def ids(self) -> NDArray[Any]:
        """What the adapters are called, of shape (n_adapters,)."""
        ids = self._store.ids
        return ids if self._index is None else ids[self._index]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of adapters and of flat columns."""
        return len(self), self._layout.width

    @property
    def ndim(self) -> int:
        """2, the number of dimensions."""
        return 2

    @property
    def dtype(self) -> np.dtype[Any]:
        """What weights are read as: float32 (also for float16 and bfloat16) or float64."""
        return self._store.dtype

    @property
    def nbytes(self) -> int:
        """How many bytes ``numpy.asarray(X)`` takes."""
        return len(self) * self._layout.width * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._store.ids if self._index is None else self._index)

    def __repr__(self) -> str:
        return (
            f"LoRACollection(n_adapters={len(self)}, n_modules={self._layout.n_modules}, "
            f"width={self._layout.width}, dtype={self.dtype})"
        )

    def __iter__(self) -> Iterator[LoRAAdapter]:
        return (self._adapter(position) for position in range(len(self)))

    @overload
    def __getitem__(self, key: int | np.integer[Any]) -> LoRAAdapter: ...
    @overload
    def __getitem__(
        self, key: slice | NDArray[Any] | Sequence[int] | Sequence[bool]
    ) -> LoRACollection: ...
    @overload
    def __getitem__(self, key: tuple[Any, ...]) -> Any: ...

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            return self._rows_and_columns(key)
        if key is Ellipsis or (
            isinstance(key, slice) and key.indices(len(self)) == (0, len(self), 1)
        ):
            return self
        if isinstance(key, Integral) and not isinstance(key, bool):
            return self._adapter(int(key))
        return LoRACollection(self._store, self._positions(key), self._layout)

    def read(self, rows: slice | ArrayLike | None = None, *, copy: bool = True) -> NDArray[Any]:
        """Read flat rows: the one way to the numbers.

        Parameters
        ----------
        rows : slice, array-like of int or bool, or None, default=None
            None for all.
        copy : bool, default=True
            False gives a view, not to be written to, if the weights lie in memory in this layout.

        Returns
        -------
        ndarray of shape (n_rows, width)
            Of `dtype`, zero-padded; by default a new array.

        Raises
        ------
        IndexError
            When there are no such rows.
        """
        rows = slice(None) if rows is None else rows
        if self._index is not None or not isinstance(rows, slice):
            rows = as_slice(self._positions(rows))
        flat = self._store.read(rows, copy=copy)
        if self._layout == self._store.layout:
            return flat
        return relay(flat, self._store.layout, self._layout)

    def factors(self, rows: slice | ArrayLike | None = None) -> list[Factors]:
        """Read factors, stacked by groups of modules of one shape.

        Parameters
        ----------
        rows : slice, array-like of int or bool, or None, default=None
            None for all.

        Returns
        -------
        list of (U, V)
            As from `LoRALayout.unpack`: ``U (n_rows, M, n, rank)``, ``V (n_rows, M, m, rank)``.

        Raises
        ------
        IndexError
            When there are no such rows.
        """
        return self._layout.unpack(self.read(rows))

    def iter_batches(self, bytes_per_adapter: float | None = None) -> Iterator[slice]:
        """Cut the collection into blocks that fit in scikit-learn's `working_memory`.

        Parameters
        ----------
        bytes_per_adapter : float or None, default=None
            What the work on one adapter takes; None for only its flat row.

        Yields
        ------
        slice
            Of at least one row each, in order.

        Examples
        --------
        >>> import numpy as np
        >>> from sklora import LoRACollection, LoRALayout
        >>> X = LoRACollection.from_array(np.ones((5, 4)), LoRALayout.rows(4))
        >>> list(X.iter_batches(bytes_per_adapter=2**29))  # working_memory is 1024 MiB
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
        """
        if bytes_per_adapter is None:
            bytes_per_adapter = self._layout.width * self.dtype.itemsize
        yield from blocks(len(self), bytes_per_adapter)

    def iter_blocks(
        self, bytes_per_adapter: float | None = None
    ) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Read the collection in blocks that fit in scikit-learn's `working_memory`.

        Parameters
        ----------
        bytes_per_adapter : float or None, default=None
            What one adapter takes, with the work on it; None for reading alone. A block stays in
            memory until the next one has been read.

        Yields
        ------
        rows : slice
            Of at least one row each, in order.
        flat : ndarray of shape (n_rows, width)
            As from `read`.

        Examples
        --------
        >>> import numpy as np
        >>> from sklora import LoRACollection, LoRALayout
        >>> X = LoRACollection.from_array(np.ones((5, 4)), LoRALayout.rows(4))
        >>> [len(flat) for rows, flat in X.iter_blocks(bytes_per_adapter=2**29)]
        [2, 2, 1]
        """
        if bytes_per_adapter is None:
            # The block before, the rows as the store has them, and as they are laid out here.
            width = 2 * self._layout.width + self._store.layout.width
            bytes_per_adapter = width * self.dtype.itemsize
        for rows in self.iter_batches(bytes_per_adapter):
            yield rows, self.read(rows)

    def with_layout(self, layout: LoRALayout) -> LoRACollection:
        """Give a view whose rows have room for other ranks.

        Parameters
        ----------
        layout : LoRALayout
            Of the same modules.

        Returns
        -------
        LoRACollection

        Raises
        ------
        ValueError
            When the modules differ, or an adapter has a rank that would be cut off.

        Examples
        --------
        >>> import numpy as np
        >>> from sklora import LoRACollection, LoRALayout
        >>> X = LoRACollection.from_array(np.ones((1, 4)), LoRALayout([("q", 2, 2, 1)]))
        >>> X.with_layout(X.layout.with_ranks([2])).read()
        array([[1., 0., 1., 0., 1., 0., 1., 0.]])
        """
        layout.check_same_modules(self._layout)
        check_room(self, layout.ranks, "Ask for more room with layout.with_ranks.")
        return LoRACollection(self._store, self._index, layout)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        target = self.dtype if dtype is None else np.dtype(dtype)
        store, as_stored = self._store, self._index is None and self._layout == self._store.layout
        if as_stored and isinstance(store, ArrayStore) and store.array.dtype == target and not copy:
            return store.array
        if copy is False:
            raise ValueError(
                "the flat array of these adapters has to be put together; it takes a copy."
            )
        check_memory(len(self), self._layout.width, target)
        return self.read().astype(target, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._index is None:
            return LoRACollection, (self._store, None, self._layout)
        # Kept, so that joblib recognises the array and hands it to all its tasks but once.
        self._compact = subset_again(self._store, self._index, self._compact)
        return LoRACollection, (self._compact, None, self._layout)

    def _positions(self, key: Any) -> NDArray[np.intp]:
        """Turn a key of rows into positions in the store."""
        if not isinstance(key, slice):
            key = np.asarray(key)
            if not key.size and key.dtype.kind == "f":
                key = key.astype(np.intp)
            if key.ndim != 1 or key.dtype.kind not in "iub":
                raise IndexError(
                    "adapters are picked by an integer, a slice, or a 1-D array of integers or "
                    f"booleans, as np.isin(X.ids, ids), not of shape {key.shape}, {key.dtype}."
                )
        index = np.arange(len(self)) if self._index is None else self._index
        return index[key]  # type: ignore[no-any-return]

    def _adapter(self, position: int) -> LoRAAdapter:
        if not -len(self) <= position < len(self):
            raise IndexError(f"adapter {position} of {len(self)}.")
        position %= len(self)
        if self._index is not None:
            position = int(self._index[position])
        one = LoRACollection(self._store, np.array([position]), self._layout)
        return LoRAAdapter(one.read()[0], self._layout, one.ranks[0], one.ids.item())

    def _rows_and_columns(self, key: tuple[Any, ...]) -> Any:
        if len(key) == 1 or (len(key) == 2 and key[1] is Ellipsis):
            return self[key[0]]
        if len(key) != 2:
            raise IndexError(f"a collection has 2 dimensions, but {len(key)} were indexed.")
        rows, columns = slice(None) if key[0] is Ellipsis else key[0], key[1]
        if isinstance(rows, Integral):
            return self.read([int(rows)])[0, columns]
        if not isinstance(rows, slice) and not isinstance(columns, (slice, Integral)):
            raise IndexError("pick adapters first and columns then: X[rows][:, columns].")
        picked = self[rows]
        # Copied: no view that holds on to its block.
        parts = [flat[:, columns].copy() for _, flat in picked.iter_blocks()]
        return np.concatenate(parts) if parts else picked.read()[:, columns]
