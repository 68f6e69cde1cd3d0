"""Assertions about gauges, for the tests of estimators: sklora's own and yours.

The update ``U V^T`` of a module is unchanged when its factors become ``(U R, V R^-T)``, for any
invertible ``R``. What an estimator says of an adapter should be unchanged, too.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from sklora.collection import LoRACollection

__all__ = [
    "apply_gauge",
    "assert_gauge_equivariant",
    "assert_gauge_invariant",
    "random_gauge",
]

Group = Literal["GL", "O"]
RandomState = int | np.random.RandomState | None

_METHODS = ("predict_proba", "decision_function", "predict", "transform")
_LEAST_SHARE = 0.1  # of the largest column's scale, that of any other
_RTOL = {np.dtype(np.float32): 1e-3, np.dtype(np.float64): 1e-6}


def random_gauge(
    rank: int,
    *,
    group: Group = "GL",
    condition: float = 100.0,
    size: int | tuple[int, ...] | None = None,
    dtype: DTypeLike = np.float64,
    random_state: RandomState = None,
) -> NDArray[Any]:
    r"""Draw invertible matrices that act on the factors of an update.

    Parameters
    ----------
    rank : int
    group : {"GL", "O"}, default="GL"
        ``"O"`` draws orthogonal matrices, uniformly (by Haar measure, of either determinant).
        ``"GL"`` draws :math:`A S B^\top` with such ``A`` and ``B``.
    condition : float, default=100
        For ``"GL"``: the ratio of the largest to the smallest singular value in ``S``, which are
        evenly spaced on a logarithmic scale. Their geometric mean is drawn between
        ``condition**-0.5`` and ``condition**0.5``, so that the determinant is not always of size 1.
    size : int, tuple of int or None, default=None
        How many to draw.
    dtype : dtype, default=float64
        Of the result; the drawing is in float64.
    random_state : int, RandomState or None, default=None

    Returns
    -------
    ndarray of shape (..., rank, rank)
        As many as `size` says.

    Raises
    ------
    ValueError
        When the group is unknown, or `rank` or `condition` is less than one or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.testing import random_gauge
    >>> R = random_gauge(4, condition=1e4, size=3, random_state=0)
    >>> R.shape
    (3, 4, 4)
    >>> np.linalg.cond(R)
    array([10000., 10000., 10000.])
    """
    shape = () if size is None else tuple(np.atleast_1d(size).tolist())
    R, _ = _gauge_pair(rank, shape, group, condition, check_random_state(random_state))
    return R.astype(dtype)


def apply_gauge(
    X: LoRACollection,
    group: Group = "GL",
    condition: float = 100.0,
    random_state: RandomState = None,
) -> LoRACollection:
    """Act on every module of every adapter with a random gauge of its own: the same updates.

    Parameters
    ----------
    X : LoRACollection
    group : {"GL", "O"}, default="GL"
    condition : float, default=100
        As for `random_gauge`.
    random_state : int, RandomState or None, default=None

    Returns
    -------
    LoRACollection
        In memory, of the layout, ranks, ids, side features and dtype of `X`. The gauges act on the
        true rank of each factor, so that padding stays zero, and are applied in float64.

    Raises
    ------
    TypeError
        When `X` is no collection.
    ValueError
        When `X` has plain rows, whose ``V = 1`` leaves no gauge; otherwise as `random_gauge`.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora import LoRACollection
    >>> from sklora.testing import apply_gauge
    >>> X = LoRACollection.from_factors([{"q": (np.eye(3, 2), np.eye(2, 2))}])
    >>> U, V = apply_gauge(X, random_state=0)[0]["q"]
    >>> np.allclose(U, np.eye(3, 2)), np.allclose(U @ V.T, np.eye(3, 2))
    (False, True)
    """
    if not isinstance(X, LoRACollection):
        raise TypeError(
            f"X is of type {type(X).__name__}, but gauges act on a LoRACollection; make one with "
            "LoRACollection.from_array(X, layout)."
        )
    layout, ranks = X.layout, X.ranks
    if layout.has_plain_rows:
        raise ValueError(
            "plain rows are updates with V = 1, which have no gauge; make the collection with a "
            "layout of modules."
        )
    rng = check_random_state(random_state)
    flat = X.read()
    for position in range(layout.n_modules):
        U, V = layout._factors_at(flat, position)
        for rank in np.unique(ranks[:, position]):
            if rank == 0:
                continue
            rows = np.flatnonzero(ranks[:, position] == rank)
            R, inverse_transpose = _gauge_pair(rank, (len(rows),), group, condition, rng)
            U[rows, :, :rank] = U[rows, :, :rank] @ R
            V[rows, :, :rank] = V[rows, :, :rank] @ inverse_transpose
    return LoRACollection.from_array(flat, layout, ranks=ranks, ids=X.ids)


def assert_gauge_invariant(
    estimator: Any,
    X: LoRACollection,
    y: Any = None,
    *,
    group: Group = "GL",
    condition: float = 100.0,
    rtol: float | None = None,
    atol: float = 0.0,
    method: str | None = None,
    random_state: RandomState = None,
) -> None:
    """Assert that the output of an estimator does not depend on the gauge of its input.

    Parameters
    ----------
    estimator : estimator
        One that is not fitted is cloned and fitted on `X` and `y`.
    X : LoRACollection
        Compared with `apply_gauge` of itself.
    y : array-like or None, default=None
        Targets, for an estimator that is not fitted.
    group : {"GL", "O"}, default="GL"
    condition : float, default=100
        As for `random_gauge`. Rounding grows with it: what is exact for ``U V^T`` is off by about
        `condition` times the rounding of the input.
    rtol, atol : float, default=None and 0
        Every number may change by ``atol + rtol * s``, with ``s`` the largest magnitude in its
        column, or a tenth of the largest in the output if that is more. Columns that stay the same
        to the bit, as side features do, do not count. By default `rtol` is 1e-6 for `X` in float64
        and 1e-3 in float32. Outputs that are not floating point, such as class labels, may not
        change.
    method : str or None, default=None
        Whose output is compared. By default the first of `predict_proba`, `decision_function`,
        `predict` and `transform` that the estimator has. A transformed collection is compared as
        its flat array, factors and all.
    random_state : int, RandomState or None, default=None
        For the gauges.

    Raises
    ------
    AssertionError
        When the output changes; with the largest change, what was tolerated, and the adapter.
    TypeError
        When `X` is no collection, or the estimator has no such method.
    ValueError
        As from `apply_gauge`.

    See Also
    --------
    assert_gauge_equivariant : For transformers whose output turns along with the input.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.preprocessing import FunctionTransformer
    >>> from sklora import LoRACollection
    >>> from sklora.testing import assert_gauge_invariant
    >>> rng = np.random.default_rng(0)
    >>> X = LoRACollection.from_factors(
    ...     {"q": (rng.normal(size=(4, 2)), rng.normal(size=(3, 2)))} for _ in range(5)
    ... )
    >>> lengths = FunctionTransformer(lambda X: [[np.linalg.norm(a["q"][0])] for a in X])
    >>> assert_gauge_invariant(lengths, X, group="O", random_state=0)
    >>> assert_gauge_invariant(lengths, X, group="GL", random_state=0)
    Traceback (most recent call last):
    AssertionError: FunctionTransformer.transform is not invariant to GL(r): ...
    """
    moved = apply_gauge(X, group, condition, random_state)
    estimator, method, expected = _fitted(estimator, X, y, method)
    found = getattr(estimator, method)(moved)
    subject = f"{type(estimator).__name__}.{method} is not invariant to {group}(r)"
    _assert_close(subject, _numbers(expected), _numbers(found), X, rtol, atol)


def assert_gauge_equivariant(
    transformer: Any,
    X: LoRACollection,
    y: Any = None,
    *,
    group: Group = "GL",
    condition: float = 100.0,
    rtol: float | None = None,
    atol: float = 0.0,
    random_state: RandomState = None,
) -> None:
    """Assert that a transformer from collections to collections commutes with gauges.

    For the gauges ``R`` of `apply_gauge`: if it takes ``(U, V)`` to ``(U', V')``, it takes
    ``(U R, V R^-T)`` to ``(U' R, V' R^-T)``. So it keeps every rank.

    Parameters
    ----------
    transformer : transformer
        One that is not fitted is cloned and fitted on `X` and `y`.
    X : LoRACollection
    y : array-like or None, default=None
    group : {"GL", "O"}, default="GL"
    condition : float, default=100
    rtol, atol : float, default=None and 0
    random_state : int, RandomState or None, default=None
        All as for `assert_gauge_invariant`.

    Raises
    ------
    AssertionError
        When the output is no collection, has other ranks than `X`, or other numbers than tolerated.
    TypeError
        When `X` is no collection.
    ValueError
        As from `apply_gauge`.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.preprocessing import FunctionTransformer
    >>> from sklora import LoRACollection
    >>> from sklora.testing import assert_gauge_equivariant
    >>> rng = np.random.default_rng(0)
    >>> X = LoRACollection.from_factors(
    ...     {"q": (rng.normal(size=(4, 2)), rng.normal(size=(3, 2)))} for _ in range(5)
    ... )
    >>> flip = FunctionTransformer(
    ...     lambda X: LoRACollection.from_factors({"q": (a["q"][0][::-1], a["q"][1])} for a in X)
    ... )
    >>> assert_gauge_equivariant(flip, X, random_state=0)
    """
    seed = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    moved = apply_gauge(X, group, condition, seed)
    transformer, _, expected = _fitted(transformer, X, y, "transform")
    found = transformer.transform(moved)
    subject = f"{type(transformer).__name__}.transform is not equivariant to {group}(r)"
    if not isinstance(expected, LoRACollection):
        raise AssertionError(f"{subject}: its output is of type {type(expected).__name__}.")
    if not np.array_equal(expected.ranks, X.ranks):
        raise AssertionError(f"{subject}: the ranks of its output are not those of its input.")
    # The same seed and ranks draw the same gauges, whatever the shapes of the factors.
    expected = apply_gauge(expected, group, condition, seed)
    _assert_close(subject, _numbers(expected), _numbers(found), X, rtol, atol)


def _gauge_pair(
    rank: int,
    shape: tuple[int, ...],
    group: Group,
    condition: float,
    rng: np.random.RandomState,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw ``R`` and ``R^-T``, the latter as accurate as the former."""
    if group not in ("GL", "O"):
        raise ValueError(f"group={group!r} is unknown; pass 'GL' or 'O'.")
    if rank < 1 or not 1 <= condition < math.inf:
        raise ValueError(
            "gauges have a rank of at least 1 and a condition of at least 1, which is finite, got "
            f"{rank=} and {condition=}."
        )
    A = _haar(rank, shape, rng)
    if group == "O":
        return A, A
    B = _haar(rank, shape, rng)
    spacing = np.linspace(0.5, -0.5, rank) if rank > 1 else 0.0
    exponents = spacing + rng.uniform(-0.5, 0.5, size=(*shape, 1))
    values = np.power(float(condition), exponents)[..., None, :]
    return (A * values) @ B.mT, (A / values) @ B.mT


def _haar(rank: int, shape: tuple[int, ...], rng: np.random.RandomState) -> NDArray[np.float64]:
    Q, R = np.linalg.qr(rng.standard_normal((*shape, rank, rank)))
    # The signs that QR picks depend on the matrix; without them Q is uniform (Mezzadri 2007).
    signs = np.where(np.diagonal(R, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return Q * signs[..., None, :]


def _fitted(estimator: Any, X: LoRACollection, y: Any, method: str | None) -> tuple[Any, str, Any]:
    """Give an estimator that is fitted, the name of its method, and what that makes of X."""
    try:
        check_is_fitted(estimator)
        name = _chosen_method(estimator, method)
        # A pipeline asks its last step alone whether it is fitted, which may need no fit.
        return estimator, name, getattr(estimator, name)(X)
    except NotFittedError:
        estimator = clone(estimator).fit(X, y)
    name = _chosen_method(estimator, method)
    return estimator, name, getattr(estimator, name)(X)


def _chosen_method(estimator: Any, method: str | None) -> str:
    for name in _METHODS if method is None else (method,):
        if hasattr(estimator, name):
            return name
    wanted = "none of " + ", ".join(_METHODS) if method is None else f"no {method}"
    raise TypeError(f"{type(estimator).__name__} has {wanted}.")


def _numbers(output: Any) -> NDArray[Any]:
    """Turn an output into an array with one row for every adapter."""
    if isinstance(output, list) and output and getattr(output[0], "ndim", 0) == 2:
        # Probabilities of several targets.
        output = np.hstack(output)
    array = output.toarray() if hasattr(output, "toarray") else np.asarray(output)
    return array.reshape(len(array), math.prod(array.shape[1:]))


def _assert_close(
    subject: str,
    expected: NDArray[Any],
    found: NDArray[Any],
    X: LoRACollection,
    rtol: float | None,
    atol: float,
) -> None:
    if expected.shape != found.shape:
        raise AssertionError(f"{subject}: its output has shape {expected.shape} or {found.shape}.")
    if not expected.size:
        raise AssertionError(f"{subject}: there is no output to compare.")
    if expected.dtype.kind == "f":
        rtol = _RTOL[X.dtype] if rtol is None else rtol
        with np.errstate(invalid="ignore"):  # infinity less itself
            change = np.abs(found.astype(np.float64) - expected)
        change[found == expected] = 0.0
        scale = np.abs(expected).max(axis=0, initial=0.0, where=np.isfinite(expected))
        scale *= (change != 0).any(axis=0)
        # A large column that moves by rounding is not to hide small ones; what is zero but for
        # rounding is judged by the others.
        tolerated = atol + rtol * np.maximum(scale, _LEAST_SHARE * scale.max()).astype(np.float64)
        column = int((change - tolerated).max(axis=0).argmax())
        deviation, allowed = change[:, column], float(tolerated[column])
    else:
        allowed = 0.0
        deviation = (found != expected).mean(axis=1)
    worst = int(deviation.argmax())
    # Written so that NaN fails.
    if not deviation[worst] <= allowed:
        id = X.ids.item(worst)
        raise AssertionError(
            f"{subject}: the output for adapter {id!r} is off by {deviation[worst]:.3g}, where at "
            f"most {allowed:.3g} is tolerated ({rtol=}, {atol=})."
        )
