"""Between single adapters, as mappings of factors, and flat rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sklora._layout import Factors, LoRALayout
from sklora._modules import side_slices
from sklora._stores import compute_dtype

Adapter = dict[str, Factors]
Side = dict[str, NDArray[Any]]


class LoRAAdapter(Mapping[str, Factors]):
    """One adapter: a mapping from module name to ``(U (n, r), V (m, r))`` at its true rank.

    Modules that the adapter lacks are no keys. Indexing a `LoRACollection` gives adapters, and
    `LoRACollection.from_factors` takes them.

    Parameters
    ----------
    row : ndarray of shape (width,)
    layout : LoRALayout
    ranks : ndarray of shape (n_modules,)
    id : object

    Attributes
    ----------
    id : object
        What the adapter is called.
    side : dict of str to ndarray
        Its side features.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora import LoRACollection
    >>> X = LoRACollection.from_factors(
    ...     [{"q_proj": (np.ones((8, 2)), np.ones((6, 2)))}], ids=["cat"]
    ... )
    >>> adapter = X[0]
    >>> adapter.id, list(adapter)
    ('cat', ['q_proj'])
    >>> U, V = adapter["q_proj"]
    >>> U.shape, V.shape
    ((8, 2), (6, 2))
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
        places = side_slices(layout.side, layout.side_slice.start)
        self.side: dict[str, NDArray[Any]] = {name: row[place] for name, place in places.items()}

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


def flat_from_factors(
    factors: Iterable[Mapping[str, tuple[ArrayLike, ArrayLike]]],
    *,
    layout: LoRALayout | None,
    side: Iterable[Mapping[str, ArrayLike]] | None,
    base_model: str | None,
    dtype: DTypeLike | None,
) -> tuple[NDArray[Any], LoRALayout, NDArray[np.intp]]:
    """Check factors and lay them out as flat rows.

    Parameters
    ----------
    factors, layout, side, base_model, dtype
        As for `LoRACollection.from_factors`.

    Returns
    -------
    flat : ndarray of shape (N, width)
    layout : LoRALayout
    ranks : ndarray of shape (N, n_modules)
    """
    adapters: list[Adapter] = []
    own: list[Mapping[str, ArrayLike]] = []
    for row, mapping in enumerate(factors):
        adapters.append(_checked(row, mapping))
        own.append(mapping.side if isinstance(mapping, LoRAAdapter) else {})
    side = own if side is None else side
    sides = [_vectors(row, vectors) for row, vectors in enumerate(side)]
    if len(sides) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters have side features of {len(sides)}.")
    if layout is None:
        layout = _inferred_layout(adapters, sides, base_model)
    elif base_model is not None and layout.base_model not in (None, base_model):
        raise ValueError(
            f"base_model={base_model!r}, but the layout is of {layout.base_model!r}; "
            "pass one of the two."
        )
    elif base_model is not None and not layout.has_plain_rows:
        layout = LoRALayout(layout.modules, side=layout.side, base_model=base_model)
    target = _common_dtype(adapters, sides) if dtype is None else _checked_dtype(dtype)
    flat = np.zeros((len(adapters), layout.width), target)
    ranks = np.zeros((len(adapters), layout.n_modules), np.intp)
    for row, (adapter, vectors) in enumerate(zip(adapters, sides, strict=True)):
        _check_against(row, adapter, layout)
        for position, name in enumerate(layout.names):
            if name in adapter:
                ranks[row, position] = adapter[name][0].shape[1]
                place_factors(flat[row : row + 1], layout, position, adapter[name])
        flat[row, layout.side_slice] = _side_row(row, vectors, layout)
        _check_overflow(row, flat[row], layout)
    ranks.flags.writeable = False
    return flat, layout, ranks


def place_factors(row: NDArray[Any], layout: LoRALayout, position: int, factors: Factors) -> None:
    """Write the factors of one module into a flat row ``(1, width)``, whose padding is zero."""
    with np.errstate(over="ignore"):
        if layout.has_plain_rows:
            factors = factors[0].astype(row.dtype) * factors[1], factors[1]
        for place, factor in zip(layout._factors_at(row, position), factors, strict=True):
            place[0, :, : factor.shape[1]] = factor


def _checked(row: int, mapping: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Adapter:
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"adapter {row} is a {type(mapping).__name__}; pass a sequence of mappings "
            "{module: (U, V)}, or a flat array to LoRACollection.from_array."
        )
    return {name: _checked_factors(row, name, pair) for name, pair in mapping.items()}


def _checked_factors(row: int, name: str, pair: tuple[ArrayLike, ArrayLike]) -> Factors:
    where = f"module {name!r} of adapter {row}"
    try:
        U, V = pair
    except (TypeError, ValueError):
        raise ValueError(
            f"{where} is no pair of factors; pass (U, V) with U (n, r) and V (m, r)."
        ) from None
    U, V = (_as_array(f"a factor of {where}", factor) for factor in (U, V))
    shapes = f"U {U.shape} and V {V.shape}"
    if U.ndim != 2 or V.ndim != 2:
        raise ValueError(f"{where} has {shapes}; factors are matrices U (n, r) and V (m, r).")
    if U.shape[1] != V.shape[1]:
        raise ValueError(
            f"{where} has {shapes}, of inner ranks {U.shape[1]} and {V.shape[1]}; the update is "
            "U V^T, so both must have r columns: transpose the factor that holds r rows."
        )
    if not U.shape[1]:
        raise ValueError(
            f"{where} has {shapes}, of rank 0; leave a module out to say that its update is zero."
        )
    for factor in (U, V):
        compute_dtype(factor.dtype)
        if not np.isfinite(factor).all():
            raise ValueError(
                f"{where} with {shapes} has NaN or infinity; leave the adapter out, or mend it."
            )
    return U, V


def _as_array(what: str, numbers: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(numbers)
    # What torch raises for a tensor that NumPy has no numbers for: bfloat16, CUDA, gradients.
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{what} is given as a {type(numbers).__name__}, which is no array: "
            f"{str(error).rstrip('.')}. Pass NumPy arrays; of a tensor of torch, "
            "tensor.detach().cpu().float().numpy()."
        ) from error


def _vectors(row: int, mapping: Mapping[str, ArrayLike]) -> Side:
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"side features of adapter {row} are a {type(mapping).__name__}; pass a sequence of "
            "mappings {name: vector}, one for every adapter."
        )
    vectors = {}
    for name, values in mapping.items():
        what = f"side feature {name!r} of adapter {row}"
        vector = vectors[name] = _as_array(what, values).reshape(-1)
        compute_dtype(vector.dtype)
        if not np.isfinite(vector).all():
            raise ValueError(f"{what} has NaN or infinity; leave the adapter out, or mend it.")
    return vectors


def _inferred_layout(
    adapters: Sequence[Adapter], sides: Sequence[Side], base_model: str | None
) -> LoRALayout:
    if not adapters:
        raise ValueError("no adapters are given; an empty collection needs layout=.")
    first: dict[str, tuple[int, int, int]] = {}
    ranks: dict[str, int] = {}
    for row, adapter in enumerate(adapters):
        for name, (U, V) in adapter.items():
            n, m, earlier = first.setdefault(name, (len(U), len(V), row))
            if (n, m) != (len(U), len(V)):
                raise ValueError(
                    f"module {name!r} has updates of shape ({n}, {m}) in adapter {earlier} and of "
                    f"shape ({len(U)}, {len(V)}) in adapter {row}; adapters of different base "
                    "models make different collections."
                )
            ranks[name] = max(ranks.get(name, 0), U.shape[1])
    if not first:
        raise ValueError("no adapter has a module; pass layout= to say what is zero.")
    modules = [(name, n, m, ranks[name]) for name, (n, m, _) in first.items()]
    widths = {name: len(vector) for vectors in sides for name, vector in vectors.items()}
    return LoRALayout(modules, side=widths.items(), base_model=base_model)


def _checked_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    checked = np.dtype(dtype)
    compute_dtype(checked)
    if checked.kind in "iub":
        raise ValueError(f"dtype={checked} rounds weights; pass a floating-point one, or None.")
    return checked


def _common_dtype(adapters: Sequence[Adapter], sides: Sequence[Side]) -> np.dtype[Any]:
    dtypes = {factor.dtype for adapter in adapters for pair in adapter.values() for factor in pair}
    if not dtypes:
        return np.dtype(np.float32)
    dtypes |= {vector.dtype for side in sides for vector in side.values()}
    if len(dtypes) == 1 and (only := np.result_type(*dtypes)).kind not in "iub":
        return only
    # NumPy knows no common type of float16 and bfloat16.
    return np.result_type(*map(compute_dtype, dtypes))


def _check_against(row: int, adapter: Adapter, layout: LoRALayout) -> None:
    expected = {module.name: module for module in layout.modules}
    for name, (U, V) in adapter.items():
        if name not in expected:
            raise ValueError(
                f"module {name!r} of adapter {row}, with U {U.shape} and V {V.shape}, is not in "
                "the layout; leave it out, or leave layout out."
            )
        module = expected[name]
        if (module.n, module.m) != (len(U), len(V)) or U.shape[1] > module.rank:
            raise ValueError(
                f"module {name!r} of adapter {row} has U {U.shape} and V {V.shape}, but the layout "
                f"has room for U ({module.n}, {module.rank}) and V ({module.m}, {module.rank}); "
                "raise its ranks with layout.with_ranks, or leave layout out."
            )


def _side_row(row: int, vectors: Side, layout: LoRALayout) -> NDArray[Any]:
    sizes = {name: len(vector) for name, vector in vectors.items()}
    if sizes != dict(layout.side):
        raise ValueError(
            f"adapter {row} has side features {sizes}, but {dict(layout.side)} are expected; every "
            "adapter needs all of them, and no others."
        )
    parts = [vectors[name] for name, _ in layout.side]
    return np.concatenate(parts) if parts else np.empty(0)


def _check_overflow(row: int, flat: NDArray[Any], layout: LoRALayout) -> None:
    finite = np.isfinite(flat)
    if not finite.all():
        where = layout.column_name(int(finite.argmin()))
        raise ValueError(
            f"adapter {row} has numbers in {where} that {flat.dtype} cannot hold; "
            "pass another dtype."
        )


def relay(flat: NDArray[Any], source: LoRALayout, target: LoRALayout) -> NDArray[Any]:
    """Lay flat rows of one layout out in another that has the same modules with other ranks.

    Parameters
    ----------
    flat : ndarray of shape (N, source.width)
    source, target : LoRALayout
        Where the rank of the target is less, the columns beyond are dropped.

    Returns
    -------
    ndarray of shape (N, target.width)
    """
    result = np.zeros((len(flat), target.width), flat.dtype)
    for position in range(target.n_modules):
        given = source._factors_at(flat, position)
        for factor, place in zip(given, target._factors_at(result, position), strict=True):
            rank = min(factor.shape[-1], place.shape[-1])
            place[..., :rank] = factor[..., :rank]
    result[:, target.side_slice] = flat[:, source.side_slice]
    return result
