"""Collections of LoRA adapters that scikit-learn can split, and the one door into an estimator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, overload

import numpy as np
import sklearn
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.sparse import issparse
from sklearn.utils import gen_batches
from sklearn.utils.validation import validate_data

from sklora._layout import Factors, LoRALayout, LoRAModule, ModuleGroup, relay
from sklora._stores import ArrayStore, FileSpan, MemmapStore, Rows, Store, compute_dtype

__all__ = [
    "LoRAAdapter",
    "LoRACollection",
    "LoRALayout",
    "LoRAModule",
    "ModuleGroup",
    "Store",
    "check_loras",
]


class LoRAAdapter(Mapping[str, Factors]):
    """One adapter: a mapping from module name to ``(U (n, r), V (m, r))`` at its true rank.

    Modules that the adapter lacks are no keys. Adapters come from indexing a collection.

    Attributes
    ----------
    id : object
        What the adapter is called.
    side : dict of str to ndarray
        Its side features.
    """

    def __init__(
        self, row: NDArray[Any], layout: LoRALayout, ranks: NDArray[np.intp], id: Any
    ) -> None:
        self.id = id
        self._row = row[None]
        self._layout = layout
        self._positions = {
            name: (position, int(rank))
            for position, (name, rank) in enumerate(zip(layout.names, ranks, strict=True))
            if rank
        }
        sizes = [size for _, size in layout.side]
        parts = np.split(row[layout.side_slice], np.cumsum(sizes)[:-1]) if sizes else []
        self.side = {name: part for (name, _), part in zip(layout.side, parts, strict=True)}

    def __getitem__(self, module: str) -> Factors:
        position, rank = self._positions[module]
        U, V = self._layout._factors_at(self._row, position)
        return U[0, :, :rank], V[0, :, :rank]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        return f"LoRAAdapter(id={self.id!r}, n_modules={len(self)})"


class LoRACollection:
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
        from sklora._factors import flat_from_factors

        array, layout, ranks = flat_from_factors(
            factors, layout=layout, side=side, base_model=base_model, dtype=dtype
        )
        return cls(ArrayStore(array, layout, ranks, _check_ids(ids, len(array))))

    @classmethod
    def from_array(
        cls,
        X: NDArray[Any],
        layout: LoRALayout,
        *,
        ranks: ArrayLike | None = None,
        ids: ArrayLike | None = None,
    ) -> LoRACollection:
        array = np.asanyarray(X)
        dtype = compute_dtype(array.dtype)
        layout._check_width(array)
        checked_ids = _check_ids(ids, len(array))
        if ranks is None:
            blocks = gen_batches(max(len(array), 1), _rows_per_block(layout.width * dtype.itemsize))
            inferred = [layout.infer_ranks(np.asarray(array[rows])) for rows in blocks]
            checked_ranks = np.concatenate(inferred)
        else:
            checked_ranks = _check_ranks(ranks, len(array), layout)
        span = FileSpan.of(array)
        if span is None:
            return cls(ArrayStore(np.asarray(array), layout, checked_ranks, checked_ids))
        return cls(MemmapStore(span, layout, checked_ranks, checked_ids))

    @property
    def layout(self) -> LoRALayout:
        return self._layout

    @property
    def ranks(self) -> NDArray[np.intp]:
        ranks = self._store.ranks
        return ranks if self._index is None else ranks[self._index]

    @property
    def ids(self) -> NDArray[Any]:
        ids = self._store.ids
        return ids if self._index is None else ids[self._index]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._layout.width

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._store.dtype

    @property
    def nbytes(self) -> int:
        return len(self) * self._layout.width * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._store.ids if self._index is None else self._index)

    def __repr__(self) -> str:
        return (
            f"LoRACollection(n_adapters={len(self)}, n_modules={self._layout.n_modules}, "
            f"width={self._layout.width}, dtype={self.dtype})"
        )

    def __iter__(self) -> Iterator[LoRAAdapter]:
        return (self[position] for position in range(len(self)))

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
            return self._get_rows_and_columns(key)
        if key is Ellipsis:
            return self
        if isinstance(key, Integral) or (isinstance(key, np.ndarray) and key.ndim == 0):
            return self._adapter(int(key))
        return LoRACollection(self._store, self._positions(key), self._layout)

    def read(self, rows: slice | ArrayLike | None = None) -> NDArray[Any]:
        if rows is None:
            rows = slice(None)
        inner: Rows
        if self._index is None and isinstance(rows, slice):
            inner = rows
        else:
            inner = self._positions(rows)
        flat = self._store.read(inner)
        if self._layout == self._store.layout:
            return flat
        return relay(flat, self._store.layout, self._layout)

    def factors(self, rows: slice | ArrayLike | None = None) -> list[Factors]:
        return self._layout.unpack(self.read(rows))

    def iter_batches(self, bytes_per_adapter: float | None = None) -> Iterator[slice]:
        if bytes_per_adapter is None:
            bytes_per_adapter = self._layout.width * self.dtype.itemsize
        if not len(self):
            return iter(())
        return iter(gen_batches(len(self), _rows_per_block(bytes_per_adapter)))

    def with_layout(self, layout: LoRALayout) -> LoRACollection:
        if layout == self._layout:
            return self
        layout.check_same_modules(self._layout)
        _check_room(self, layout, "Give the layout more room with with_ranks.")
        return LoRACollection(self._store, self._index, layout)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        target = self.dtype if dtype is None else np.dtype(dtype)
        store = self._store
        if (
            isinstance(store, ArrayStore)
            and self._index is None
            and self._layout == store.layout
            and store.array.dtype == target
            and not copy
        ):
            return store.array
        if copy is False:
            raise ValueError("the flat array of these adapters cannot be had without a copy.")
        _check_memory(self, target)
        return self.read().astype(target, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._index is None:
            return LoRACollection, (self._store, None, self._layout)
        if self._compact is None:
            # Kept, so that the workers of many tasks are sent one array, which joblib recognises.
            self._compact = self._store.subset(self._index)
        return LoRACollection, (self._compact, None, self._layout)

    def _positions(self, key: Any) -> NDArray[np.intp]:
        """Turn a key of rows into positions in the store."""
        if not isinstance(key, slice):
            key = np.asarray(key)
            if key.size == 0 and key.dtype.kind == "f":
                key = key.astype(np.intp)
            if key.ndim != 1 or key.dtype.kind not in "iub":
                raise IndexError(
                    "adapters are picked by an integer, a slice, or a 1-D array of integers or "
                    f"booleans, got an array of shape {key.shape} and dtype {key.dtype}."
                )
        index = np.arange(len(self)) if self._index is None else self._index
        return index[key]

    def _adapter(self, position: int) -> LoRAAdapter:
        [inner] = self._positions(np.array([position]))
        one = LoRACollection(self._store, np.array([inner]), self._layout)
        [id] = one.ids.tolist()
        return LoRAAdapter(one.read()[0], self._layout, one.ranks[0], id)

    def _get_rows_and_columns(self, key: tuple[Any, ...]) -> Any:
        if len(key) == 1 or (len(key) == 2 and key[1] is Ellipsis):
            return self[key[0]]
        if len(key) != 2:
            raise IndexError(f"a collection has two dimensions, got {len(key)} indices.")
        rows, columns = slice(None) if key[0] is Ellipsis else key[0], key[1]
        if isinstance(rows, Integral):
            return self.read([rows])[0, columns]
        if not isinstance(rows, slice) and not isinstance(columns, (slice, Integral)):
            raise IndexError("pick adapters first, then columns: X[rows][:, columns].")
        picked = self[rows]
        blocks = [picked.read(batch)[:, columns] for batch in picked.iter_batches()]
        return np.concatenate(blocks) if blocks else picked.read()[:, columns]


def check_loras(
    estimator: Any, X: Any, *, reset: bool, rank: Literal["any", "fitted"] = "any"
) -> LoRACollection:
    if isinstance(X, LoRACollection):
        loras = X
        if not len(loras):
            raise ValueError(
                f"Found a LoRACollection with 0 adapters while a minimum of 1 is required by "
                f"{type(estimator).__name__}."
            )
    else:
        loras = _check_array(estimator, X, reset=reset)
    layout = estimator.layout if reset else estimator.layout_
    if layout is not None:
        layout.check_same_modules(loras.layout)
        if reset or rank == "fitted":
            _check_room(
                loras,
                layout,
                "Use the architecture svd, dense or gl-net, which take any rank, or fit again.",
            )
            loras = loras.with_layout(layout)
    if isinstance(X, LoRACollection):
        _check_finite(loras)
    if reset:
        estimator.layout_ = loras.layout
        estimator.n_features_in_ = loras.layout.width
        if isinstance(X, LoRACollection):
            vars(estimator).pop("feature_names_in_", None)
    return loras


def _check_array(estimator: Any, X: Any, *, reset: bool) -> LoRACollection:
    if isinstance(X, Mapping) or (isinstance(X, (list, tuple)) and X and isinstance(X[0], Mapping)):
        raise ValueError(
            "X holds mappings from module to factors; turn them into a collection with "
            "LoRACollection.from_factors."
        )
    if issparse(X):
        raise ValueError(
            "X is sparse, but the weights of LoRA adapters are dense; pass a LoRACollection, made "
            "by LoRACollection.from_factors or LoRACollection.from_array, or X.toarray()."
        )
    array = validate_data(estimator, X, dtype=[np.float64, np.float32], reset=reset)
    layout = estimator.layout if reset else estimator.layout_
    if layout is None:
        layout = LoRALayout.rows(array.shape[1])
    if array.shape[1] != layout.width:
        raise ValueError(
            f"X has {array.shape[1]} columns, but the layout's {layout.n_modules} modules take "
            f"{layout.width}; pass the layout that X was laid out with, or layout=None if each row "
            "is one plain update."
        )
    return LoRACollection.from_array(array, layout)


def _check_finite(loras: LoRACollection) -> None:
    for batch in loras.iter_batches():
        finite = np.isfinite(loras.read(batch))
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            [id] = loras.ids[[batch.start + row]].tolist()
            raise ValueError(
                f"adapter {id!r} has NaN or infinity in {loras.layout.column_name(int(column))}; "
                "leave the adapter out, or mend its file."
            )


def _check_room(loras: LoRACollection, layout: LoRALayout, remedy: str) -> None:
    too_high = loras.ranks > np.array(layout.ranks)
    if too_high.any():
        row, position = np.argwhere(too_high)[0]
        module = layout.modules[position]
        rank = int(loras.ranks[row, position])
        [id] = loras.ids[[row]].tolist()
        raise ValueError(
            f"module {module.name!r} of adapter {id!r} has rank {rank}: U ({module.n}, {rank}), "
            f"V ({module.m}, {rank}); at most rank {module.rank} is possible here. {remedy}"
        )


def _check_ids(ids: ArrayLike | None, n_adapters: int) -> NDArray[Any]:
    checked = np.arange(n_adapters) if ids is None else np.array(ids)
    if checked.shape != (n_adapters,):
        raise ValueError(
            f"ids of shape {checked.shape} do not name {n_adapters} adapters one by one."
        )
    checked.flags.writeable = False
    return checked


def _check_ranks(ranks: ArrayLike, n_adapters: int, layout: LoRALayout) -> NDArray[np.intp]:
    given = np.array(ranks)
    if given.shape != (n_adapters, layout.n_modules) or given.dtype.kind not in "iu":
        raise ValueError(
            f"ranks must be integers of shape ({n_adapters}, {layout.n_modules}), one for every "
            f"adapter and module, got shape {given.shape} and dtype {given.dtype}."
        )
    wrong = (given < 0) | (given > np.array(layout.ranks))
    if wrong.any():
        row, position = np.argwhere(wrong)[0]
        module = layout.modules[position]
        raise ValueError(
            f"adapter {row} has rank {given[row, position]} in module {module.name!r}, for which "
            f"the layout has rank {module.rank}; ranks lie between 0 and that."
        )
    checked = given.astype(np.intp)
    checked.flags.writeable = False
    return checked


def _rows_per_block(bytes_per_row: float) -> int:
    available = sklearn.get_config()["working_memory"] * 2**20
    return max(1, int(available // bytes_per_row))


def available_memory() -> int | None:
    """Give the bytes of memory that can be had without swapping; None where that is unknown."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None


def _check_memory(loras: LoRACollection, dtype: np.dtype[Any]) -> None:
    needed = len(loras) * loras.layout.width * dtype.itemsize
    available = available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"the flat array of {len(loras)} adapters x {loras.layout.width} columns takes "
            f"{needed / 2**30:.1f} GiB as {dtype}, and {available / 2**30:.1f} GiB are available; "
            "pass the collection itself to a sklora step (SVDSpectrum, GLEquivariantProjection), "
            "which reads it in blocks, or take fewer adapters."
        )
