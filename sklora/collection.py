"""Collections of LoRA adapters that scikit-learn can split, and the one door into an estimator."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.utils.validation import validate_data

from sklora._factors import LoRAAdapter
from sklora._layout import LoRALayout
from sklora._loras import LoRACollection
from sklora._modules import LoRAModule, ModuleGroup, check_room
from sklora._stores import Store, check_order
from sklora._untrusted import counted

__all__ = [
    "LoRACollection",
    "LoRALayout",
    "LoRAAdapter",
    "LoRAModule",
    "ModuleGroup",
    "Store",
    "check_loras",
    "check_numbers",
]


def check_loras(
    estimator: Any,
    X: Any,
    *,
    reset: bool,
    rank: Literal["any", "fitted"] = "any",
    numbers: bool = True,
) -> LoRACollection:
    """Check the input of an estimator, and learn or compare its layout: the one door for X.

    Parameters
    ----------
    estimator : estimator
        With the parameter `layout`, a `LoRALayout` or None.
    X : LoRACollection or array-like of shape (n_adapters, n_features)
        The flat rows of an array are laid out as the estimator's `layout` says; where that is None,
        each row is one update of shape (n_features, 1).
    reset : bool
        True in `fit`: sets `layout_` and `n_features_in_` (and `feature_names_in_`, for data
        frames). False elsewhere: X has to have the modules of `layout_`.
    rank : {"any", "fitted"}, default="any"
        With ``"any"``, any rank will do, and the layout of the result may have other ranks than
        `layout_`. With ``"fitted"``, ranks have to be at most those of `layout_`, and the result is
        laid out by it.
    numbers : bool, default=True
        Whether to look for NaN and infinity in a collection now. With False, pass each block that
        you read from it to `check_numbers`.

    Returns
    -------
    LoRACollection
        Of at least one adapter, without NaN or infinity unless `numbers` is False.

    Raises
    ------
    ValueError
        When X is empty or sparse, a sequence of mappings or of paths, of the wrong width, or a data
        frame of the layout's columns in another order; when it holds NaN or infinity; when its
        modules, or ranks, are not those expected. The message names the adapter, module, shapes and
        remedy.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.base import BaseEstimator
    >>> from sklora.collection import check_loras
    >>> class Norms(BaseEstimator):
    ...     def __init__(self, layout=None):
    ...         self.layout = layout
    ...
    ...     def fit(self, X, y=None):
    ...         loras = check_loras(self, X, reset=True)
    ...         self.norms_ = np.linalg.norm(loras.read(), axis=1)
    ...         return self
    >>> Norms().fit([[3.0, 4.0]]).layout_
    LoRALayout(n_modules=1, width=2, has_plain_rows=True)
    """
    is_collection = isinstance(X, LoRACollection)
    loras = X if is_collection else _check_array(estimator, X, reset=reset)
    if not len(loras):
        raise ValueError(
            "Found a LoRACollection with 0 adapters while a minimum of 1 is required by "
            f"{type(estimator).__name__}; check what it was selected by."
        )
    layout = estimator.layout if reset else estimator.layout_
    if layout is not None:
        layout.check_same_modules(loras.layout)
    if is_collection and numbers and not loras._store.is_checked:
        # The rows as stored and as laid out, and whether each number is valid.
        for rows in loras.iter_batches(3 * loras.dtype.itemsize * loras.layout.width):
            check_numbers(loras, rows, loras.read(rows, copy=False))
    if layout is not None and (reset or rank == "fitted"):
        declared = "Declare more in the estimator's layout, with layout.with_ranks."
        fitted = (
            "Use an architecture that takes any rank (svd, dense, gl-net), or fit with the layout "
            "of a larger rank, layout=estimator.layout_.with_ranks(...)."
        )
        check_room(loras, layout.ranks, declared if reset else fitted)
        loras = loras.with_layout(layout)
    if reset:
        estimator.layout_ = loras.layout
        estimator.n_features_in_ = loras.layout.width
        if is_collection:
            vars(estimator).pop("feature_names_in_", None)
    return loras


def _check_array(estimator: Any, X: Any, *, reset: bool) -> LoRACollection:
    """Lay out a plain array as the estimator says."""
    if issparse(X):
        raise ValueError(
            "X is sparse, but the weights of LoRA adapters are dense; pass a LoRACollection, made "
            "by LoRACollection.from_factors or LoRACollection.from_array, or X.toarray()."
        )
    first = X if isinstance(X, (Mapping, str, PathLike)) else _first_object(X)
    if isinstance(first, Mapping):
        raise ValueError(
            "X is given as mappings from module to factors; make it a collection with "
            "LoRACollection.from_factors. One adapter of a collection is X[[0]], not X[0]."
        )
    if isinstance(first, (str, PathLike)):
        raise ValueError(
            f"X is given as text or paths, the first of which is {str(first)!r}; read adapters "
            "from their files with sklora.io.read_adapters."
        )
    array = validate_data(estimator, X, dtype=[np.float64, np.float32], reset=reset)
    layout = estimator.layout if reset else estimator.layout_
    if layout is None:
        layout = LoRALayout.rows(array.shape[1])
    if array.shape[1] != layout.width:
        raise ValueError(
            f"X has {array.shape[1]} columns, but the layout, of "
            f"{counted(layout.n_modules, 'module')}, the first of which is {layout.modules[0]}, "
            f"takes {layout.width}; pass the layout of X, or layout=None if each row is one plain "
            "update."
        )
    check_order(X, layout)
    return LoRACollection.from_array(array, layout)


def _first_object(X: Any) -> Any:
    """Give the first of a list, tuple, array or series of objects or texts, else None."""
    kind = getattr(getattr(X, "dtype", None), "kind", None)
    if not isinstance(X, (list, tuple)) and kind not in ("O", "U"):
        return None
    return next(iter(X), None) if getattr(X, "ndim", 1) == 1 else None


def check_numbers(loras: LoRACollection, rows: slice, flat: NDArray[Any]) -> None:
    """Check that weights are finite, and zero beyond the rank.

    Parameters
    ----------
    loras : LoRACollection
    rows : slice
    flat : ndarray of shape (n_rows, width)
        What ``loras.read(rows)`` gave.

    Raises
    ------
    ValueError
        When they are not. The message names the adapter, the module and the remedy.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora import LoRACollection, LoRALayout
    >>> from sklora.collection import check_numbers
    >>> X = LoRACollection.from_array(np.array([[1.0, np.nan]]), LoRALayout.rows(2), ids=["cat"])
    >>> check_numbers(X, slice(None), X.read())
    Traceback (most recent call last):
    ValueError: adapter 'cat' has NaN or infinity in module 'row'; leave the adapter out, ...
    """
    if loras._store.is_checked:
        return
    part = loras[rows]  # of a view, loras.ranks is a copy of all
    layout, ranks, ids = part.layout, part.ranks, part.ids
    finite = np.isfinite(flat)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        id = ids.item(row)
        raise ValueError(
            f"adapter {id!r} has NaN or infinity in {layout.column_name(int(column))}; leave "
            "the adapter out, or mend its weights."
        )
    if (ranks == layout.ranks).all():
        return
    beyond = layout.infer_ranks(flat) > ranks
    if beyond.any():
        row, position = np.argwhere(beyond)[0]
        id = ids.item(row)
        raise ValueError(
            f"adapter {id!r} is said to have rank {ranks[row, position]} in module "
            f"{layout.names[position]!r}, but has more columns that are not zero; leave out "
            "ranks= of LoRACollection.from_array to find them."
        )
