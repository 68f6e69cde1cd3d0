"""Where the weights of a collection are: in an array, or in a file that is mapped into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes  # noqa: F401  (tells NumPy that bfloat16 casts safely to float32)
import numpy as np
import sklearn
from numpy.typing import ArrayLike, DTypeLike, NDArray
from sklearn.utils.validation import _get_feature_names

from sklora._layout import Factors, LoRALayout
from sklora._pages import MappedRows, Rows, owner_of_map

_COMPARED_BYTES = 2**20


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
    is_checked : bool
        Whether `read` itself refuses NaN, infinity and numbers beyond the ranks, so that nobody
        has to read everything once more to look for them.

    Examples
    --------
    A source of your own: rank-1 updates that are made when they are asked for.

    >>> import numpy as np
    >>> from sklora import LoRACollection, LoRALayout, SVDSpectrum
    >>> class Ones:
    ...     layout = LoRALayout([("q_proj", 8, 2, 1)])
    ...     dtype, is_checked = np.dtype(np.float64), True
    ...
    ...     def __init__(self, ids):
    ...         self.ids = np.asarray(ids)
    ...         self.ranks = np.ones((len(ids), 1), np.intp)
    ...
    ...     def read(self, rows, *, copy=True):
    ...         return np.ones((len(self.ids), 10))[rows]
    ...
    ...     def subset(self, rows):
    ...         return Ones(self.ids[rows])
    >>> SVDSpectrum().fit_transform(LoRACollection(Ones(["cat", "dog"])))
    array([[4.],
           [4.]])
    """

    @property
    def layout(self) -> LoRALayout: ...
    @property
    def ranks(self) -> NDArray[np.intp]: ...
    @property
    def ids(self) -> NDArray[Any]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def is_checked(self) -> bool: ...

    def read(self, rows: Rows, *, copy: bool = True) -> NDArray[Any]:
        """Read flat rows.

        Parameters
        ----------
        rows : slice or ndarray of shape (n_rows,), of intp
            Positions are counted from 0, in any order, and may occur more than once.
        copy : bool, default=True
            False allows a view of weights that lie in memory, which nobody writes to.

        Returns
        -------
        ndarray of shape (n_rows, width)
            Of `dtype`, in the order of `rows`, zero-padded; unless `copy` is False, a new array.
        """

    def subset(self, rows: NDArray[np.intp]) -> Store:
        """Give a store of some rows alone, as small as can be when pickled.

        Parameters
        ----------
        rows : ndarray of shape (n_rows,), of intp
            Positions, counted from 0.

        Returns
        -------
        Store
            Its row ``i`` is ``rows[i]`` of this one.
        """


@runtime_checkable
class StreamingStore(Store, Protocol):
    """A store that can give one adapter module by module, so that it is never whole in memory."""

    def iter_factors(self, row: int) -> Iterator[Factors]:
        """Read ``U (n, r)`` and ``V (m, r)`` of every module of the layout, at true ranks."""

    def read_side(self, row: int) -> NDArray[Any]:
        """Read side features ``(n_side,)``."""


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

    is_checked = False

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

    def read(self, rows: Rows, *, copy: bool = True) -> NDArray[Any]:
        """Give rows in the dtype they are computed with."""
        block = self.array[rows]
        copy = copy and np.may_share_memory(block, self.array)
        return block.astype(self.dtype, order="C", copy=copy)

    def subset(self, rows: NDArray[np.intp]) -> ArrayStore:
        """Copy rows, in the dtype they are stored in."""
        return ArrayStore(self.array[rows], self.layout, self.ranks[rows], self.ids[rows])


def subset_again(store: Store, rows: NDArray[np.intp], earlier: Store | None) -> Store:
    """Give a store of some rows alone: the earlier one, unless they were written to since then.

    Parameters
    ----------
    store : Store
        Of an array in memory, which others may write to, or of what stays as it is.
    rows : ndarray of intp
    earlier : Store or None
        What the last call gave.

    Returns
    -------
    Store
    """
    if earlier is None or (isinstance(store, ArrayStore) and not _holds(earlier, store, rows)):
        return store.subset(rows)
    return earlier


def _holds(earlier: Store, store: ArrayStore, rows: NDArray[np.intp]) -> bool:
    assert isinstance(earlier, ArrayStore)
    # Bit by bit, for NaN is what it was, and in pieces that stay in the cache.
    array, kept = (of.array.view(f"u{of.array.itemsize}") for of in (store, earlier))
    step = max(1, _COMPARED_BYTES // (array.itemsize * array.shape[1]))
    parts = (slice(top, top + step) for top in range(0, len(rows), step))
    return all(np.array_equal(array[as_slice(rows[part])], kept[part]) for part in parts)


class FileSpan(NamedTuple):
    """Where an array lies in a file."""

    path: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, array: NDArray[Any]) -> FileSpan | None:
        """Find the file behind an array; None if none holds what reading the array gives."""
        owner = owner_of_map(array)
        if owner is None or owner.filename is None or owner.mode == "c":
            return None
        # The offset of a view of a map is that of the map, so it is found from the addresses.
        shift = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        path = os.fspath(owner.filename)
        return cls(path, owner.offset + shift, array.dtype, array.shape, array.strides)

    def open(self) -> NDArray[Any]:
        """Map the file, read only; nothing is read yet."""
        try:
            file = np.memmap(self.path, dtype=np.uint8, mode="r")
            return np.ndarray(self.shape, self.dtype, file, self.offset, self.strides)
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.path} has {os.path.getsize(self.path)} bytes, and has no room for the "
                f"array of shape {self.shape} that was in it when the collection was pickled; make "
                "it again from the file that is there now."
            ) from None


class MemmapStore:
    """Rows of a file that is mapped into memory, read when asked for.

    Reading copies rows, and leaves none of the file in the memory of the process. The pickle holds
    where the rows are, not what they are: unpickling maps the file again.

    Parameters
    ----------
    array : ndarray of shape (N_file, width)
        A view of a memory map.
    span : FileSpan
        Where that array lies.
    layout : LoRALayout
    ranks : ndarray of shape (N, n_modules)
    ids : ndarray of shape (N,)
    rows : ndarray of shape (N,) or None, default=None
        Which rows of the array these are; None for all.
    """

    is_checked = False

    def __init__(
        self,
        array: NDArray[Any],
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
        self._array = array
        self._rows = rows
        self._mapped = MappedRows(array)
        self._inode = _inode(span.path)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What rows are read as."""
        return compute_dtype(self.span.dtype)

    def read(self, rows: Rows, *, copy: bool = True) -> NDArray[Any]:
        """Read rows from the file."""
        return self._mapped.copy(rows if self._rows is None else self._rows[rows], self.dtype)

    def subset(self, rows: NDArray[np.intp]) -> MemmapStore:
        """Give some rows of the same file."""
        inner = rows if self._rows is None else self._rows[rows]
        ranks, ids = self.ranks[rows], self.ids[rows]
        subset = MemmapStore(self._array, self.span, self.layout, ranks, ids, inner)
        subset._inode = self._inode
        return subset

    def __reduce__(self) -> tuple[Any, ...]:
        inode = _inode(self.span.path)
        if inode is None or inode != self._inode:
            what = "another file than the one that this collection was made from"
            raise ValueError(
                f"{self.span.path} is {'gone' if inode is None else what}, so the collection "
                "cannot be pickled, copied or sent to other processes; make it again from a file "
                "that is there now."
            )
        full = bool((self.ranks == self.layout.ranks).all())
        ranks = len(self.ranks) if full else self.ranks
        # joblib.Memory tells inputs apart by their pickles, so they show when the file changed.
        changed = os.stat(self.span.path).st_mtime_ns
        return _map_again, (self.span, self.layout, ranks, self.ids, self._rows, changed)


def _inode(path: str) -> int | None:
    """Tell a file from one that later takes its name; None when it has gone already."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _map_again(
    span: FileSpan,
    layout: LoRALayout,
    ranks: NDArray[np.intp] | int,
    ids: NDArray[Any],
    rows: NDArray[np.intp] | None,
    changed: int,
) -> MemmapStore:
    """Unpickle; `changed` is there for whoever hashes the pickle."""
    if isinstance(ranks, int):
        ranks = np.tile(np.array(layout.ranks, np.intp), (ranks, 1))
    return MemmapStore(span.open(), span, layout, ranks, ids, rows)


def as_slice(rows: NDArray[np.intp]) -> Rows:
    """Give rows that follow each other as a slice, which is read faster and may be a view."""
    if len(rows) and rows[0] >= 0 and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def by_rank(ranks: NDArray[np.intp]) -> list[Rows]:
    """Put rows together whose ranks ``(B,)`` have as many binary digits."""
    digits = np.frexp(ranks)[1]
    return [as_slice(np.flatnonzero(digits == number)) for number in np.unique(digits)]


def blocks(n_rows: int, bytes_per_row: float) -> Iterator[slice]:
    """Cut rows into blocks of at least one that fit in scikit-learn's `working_memory`."""
    available = sklearn.get_config()["working_memory"] * 2**20
    size = max(1, int(available // bytes_per_row))
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def check_order(X: Any, layout: LoRALayout) -> None:
    """Raise if the names of a data frame are those of the layout, but stand elsewhere."""
    # Without the wait for scikit-learn to find out that an array is no data frame.
    names = None if isinstance(X, np.ndarray) else _get_feature_names(X)
    if names is None or layout.has_plain_rows:
        return
    expected = layout.feature_names()
    if names.tolist() != expected and set(names) == set(expected):
        raise ValueError(
            "X has the columns of the layout in another order; pass X[layout.feature_names()]."
        )


def store_of_array(
    X: NDArray[Any], layout: LoRALayout, ranks: ArrayLike | None, ids: ArrayLike | None
) -> Store:
    """Check an array and what is said of it, as for `LoRACollection.from_array`.

    Parameters
    ----------
    X : ndarray of shape (N, width)
        In memory, or a view of a memory map.
    layout : LoRALayout
    ranks : array-like of shape (N, n_modules) or None
        None to infer them, which reads the array once, in blocks.
    ids : array-like of shape (N,) or None

    Returns
    -------
    Store
    """
    check_order(X, layout)
    array = np.asanyarray(X)
    compute_dtype(array.dtype)
    layout._check_width(array)
    ids = checked_ids(ids, len(array))
    span = FileSpan.of(array)
    array = np.asarray(array)
    if ranks is None:
        known = _inferred_ranks(array, layout, is_map=span is not None)
    else:
        known = _checked_ranks(ranks, len(array), layout)
    if span is None:
        return ArrayStore(array, layout, known, ids)
    return MemmapStore(array, span, layout, known, ids)


def checked_ids(ids: ArrayLike | None, n_adapters: int) -> NDArray[Any]:
    """Check ids; by default they are 0, 1, 2, ..."""
    checked = np.arange(n_adapters) if ids is None else np.array(ids)
    if checked.shape != (n_adapters,):
        raise ValueError(
            f"ids of shape {checked.shape} do not name {n_adapters} adapters one by one; "
            f"pass {n_adapters} ids, or ids=None to count them."
        )
    checked.flags.writeable = False
    return checked


def _inferred_ranks(array: NDArray[Any], layout: LoRALayout, *, is_map: bool) -> NDArray[np.intp]:
    known = np.empty((len(array), layout.n_modules), np.intp)
    # The ranks of plain rows are known without reading them.
    mapped = MappedRows(array) if is_map and not layout.has_plain_rows else None
    # A copy of the rows, and for every number whether it is zero.
    for rows in blocks(len(array), layout.width * (array.itemsize + 2)):
        known[rows] = layout.infer_ranks(
            array[rows] if mapped is None else mapped.copy(rows, array.dtype)
        )
    known.flags.writeable = False
    return known


def _checked_ranks(ranks: ArrayLike, n_adapters: int, layout: LoRALayout) -> NDArray[np.intp]:
    given = np.array(ranks)
    if given.shape != (n_adapters, layout.n_modules) or given.dtype.kind not in "iu":
        raise ValueError(
            f"ranks must be integers of shape ({n_adapters}, {layout.n_modules}), one for every "
            f"adapter and module, got shape {given.shape} and dtype {given.dtype}."
        )
    wrong = (given < 0) | (given > np.array(layout.ranks))
    if wrong.any():
        row, position = np.argwhere(wrong)[0]
        name, n, m, rank = layout.modules[position]
        raise ValueError(
            f"adapter {row} is said to have rank {given[row, position]} in module {name!r}, for "
            f"which the layout has U ({n}, {rank}) and V ({m}, {rank}); ranks are from 0, for a "
            f"module that the adapter lacks, to {rank}."
        )
    checked = given.astype(np.intp)
    checked.flags.writeable = False
    return checked


# So much is always to be had, and looking how much there is takes a tenth of a millisecond.
_CERTAIN_BYTES = 2**24
_READ_IN_BLOCKS = (
    "Give the collection itself to a step of sklora, such as SVDSpectrum, which reads it in "
    "blocks, or take fewer adapters."
)


def check_memory(
    n_rows: int,
    width: int,
    dtype: np.dtype[Any],
    *,
    what: str = "the flat array",
    remedy: str = _READ_IN_BLOCKS,
) -> None:
    """Check that an array with a row for each of some adapters fits into memory."""
    needed = n_rows * width * dtype.itemsize
    if needed <= _CERTAIN_BYTES:
        return
    available = available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} of {n_rows} adapters x {width} columns takes {needed / 2**30:.1f} GiB as "
            f"{dtype}, but {available / 2**30:.1f} GiB are free. {remedy}"
        )


def available_memory() -> int | None:
    """Give the bytes of memory that can be had without swapping; None where that is unknown.

    It is no more than what the control group of this process, such as a container, is allowed.
    """
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(available, int(file.read()))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return available
