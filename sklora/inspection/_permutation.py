"""Importance of modules: what a score loses when their factors are those of other adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import check_scoring
from sklearn.utils import Bunch, check_consistent_length, check_random_state, check_scalar
from sklearn.utils.parallel import Parallel, delayed

from sklora._base import check_option
from sklora._modules import side_slices
from sklora._pages import Rows
from sklora.collection import LoRACollection, LoRALayout

By = Literal["module", "depth"]


def module_importance(
    estimator: Any,
    X: LoRACollection,
    y: ArrayLike | None,
    *,
    by: By = "module",
    scoring: str | Callable[[Any, Any, Any], float] | None = None,
    n_repeats: int = 5,
    n_jobs: int | None = None,
    random_state: int | np.random.RandomState | None = None,
) -> Bunch:
    """Permutation importance of modules, or of all modules of one depth at once.

    A module's importance is what the score loses when its update comes from another adapter: `U`,
    `V`, rank and side features are permuted together, so that factors stay consistent.

    Parameters
    ----------
    estimator : estimator
        Fitted, of any kind that takes a collection and that `scoring` can score.
    X : LoRACollection of shape (n_adapters, width)
        Adapters to score: held-out ones tell what generalises.
    y : array-like of shape (n_adapters,) or (n_adapters, n_targets), or None
        Their targets.
    by : {"module", "depth"}, default="module"
        What is permuted at once: one module, or all modules of a block, which is told by the name
        of the module up to its first number. A module without a number is on its own. Modules that
        hold the same information each look unimportant, even if their block does not.
    scoring : str, callable or None, default=None
        One score, as for `sklearn.inspection.permutation_importance`. None is that of the
        estimator.
    n_repeats : int, default=5
        How often to permute.
    n_jobs : int or None, default=None
        Modules to permute at the same time, by joblib.
    random_state : int, RandomState instance or None, default=None
        Draws the permutations, which are the same for all modules.

    Returns
    -------
    result : :class:`~sklearn.utils.Bunch`
        With the attributes

        importances : ndarray of shape (n_groups, n_repeats)
            What the score lost.
        importances_mean, importances_std : ndarray of shape (n_groups,)
            Over the repeats.
        names : tuple of str, of length n_groups
            The modules, or blocks, in the order of the layout.

    Raises
    ------
    TypeError
        When X is no collection.
    ValueError
        When there are fewer than two adapters, y is of another length, or a parameter is not valid.
    sklearn.exceptions.NotFittedError
        When the estimator is not fitted.

    See Also
    --------
    ModuleImportanceDisplay : Plots the result.
    sklearn.inspection.permutation_importance : Permutes single columns.

    Notes
    -----
    There are ``1 + n_groups * n_repeats`` passes through X, each in blocks: no copy of it is made.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import RidgeCV
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklora import LoRACollection, SVDSpectrum
    >>> from sklora.inspection import module_importance
    >>> rng = np.random.default_rng(0)
    >>> y = rng.uniform(1, 2, size=40)
    >>> X = LoRACollection.from_factors(
    ...     {
    ...         "layers.0.q": (rng.normal(size=(6, 2)), rng.normal(size=(5, 2))),
    ...         "layers.1.q": (size * np.eye(6, 2), np.eye(5, 2)),
    ...     }
    ...     for size in y
    ... )
    >>> model = make_pipeline(SVDSpectrum(), RidgeCV()).fit(X, y)
    >>> result = module_importance(model, X, y, random_state=0)
    >>> result.names[result.importances_mean.argmax()]
    'layers.1.q'
    """
    check_option("by", by, ("module", "depth"))
    check_scalar(n_repeats, "n_repeats", Integral, min_val=1)
    if not (scoring is None or isinstance(scoring, str) or callable(scoring)):
        raise ValueError(f"scoring is {scoring!r}; pass the name of one score, a scorer or None.")
    if not isinstance(X, LoRACollection):
        raise TypeError(
            f"X is of type {type(X).__name__}, whose columns belong to no module; make it a "
            "collection with LoRACollection.from_array(X, layout)."
        )
    if len(X) < 2:
        raise ValueError(f"{len(X)} adapters cannot be permuted; pass at least 2.")
    check_consistent_length(X, y)
    scorer = check_scoring(estimator, scoring=scoring)
    baseline = scorer(estimator, X, y)
    if np.shape(baseline) or np.asarray(baseline).dtype.kind not in "biuf":
        raise ValueError(f"scoring gives {baseline!r}; pass a scorer that gives one number.")
    rng = check_random_state(random_state)
    orders = [rng.permutation(len(X)) for _ in range(n_repeats)]
    groups = module_groups(X.layout, by)
    scores = Parallel(n_jobs=n_jobs)(
        delayed(_permuted_scores)(estimator, X, y, scorer, positions, orders)
        for positions in groups.values()
    )
    importances = baseline - np.array(scores, dtype=np.float64)
    return Bunch(
        importances=importances,
        importances_mean=importances.mean(axis=1),
        importances_std=importances.std(axis=1),
        names=tuple(groups),
    )


def module_groups(layout: LoRALayout, by: By) -> dict[str, list[int]]:
    """Give the modules that are permuted together, as positions in the layout.

    Parameters
    ----------
    layout : LoRALayout
    by : {"module", "depth"}

    Returns
    -------
    dict of {str: list of int}
        In the order in which they first appear.

    Examples
    --------
    >>> from sklora import LoRALayout
    >>> from sklora.inspection._permutation import module_groups
    >>> layout = LoRALayout([(name, 2, 2, 1) for name in ("h.0.q", "h.0.v", "h.1.q", "head")])
    >>> module_groups(layout, "depth")
    {'h.0': [0, 1], 'h.1': [2], 'head': [3]}
    """
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(layout.names):
        groups.setdefault(name if by == "module" else _block(name), []).append(position)
    return groups


def _block(name: str) -> str:
    """The name up to its first component that is a number, or all of it."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: place + 1])
    return name


def permuted(
    X: LoRACollection, positions: Sequence[int], order: NDArray[np.intp]
) -> LoRACollection:
    """Give adapters whose modules at some positions are those of other adapters; a view.

    Parameters
    ----------
    X : LoRACollection
    positions : sequence of int
        Places of the modules in the layout.
    order : ndarray of shape (n_adapters,), of intp
        Whose modules each adapter gets.

    Returns
    -------
    LoRACollection
    """
    return LoRACollection(_PermutedStore(X, positions, np.arange(len(X)), order))


def _permuted_scores(
    estimator: Any,
    X: LoRACollection,
    y: Any,
    scorer: Callable[[Any, Any, Any], float],
    positions: Sequence[int],
    orders: Sequence[NDArray[np.intp]],
) -> list[float]:
    return [scorer(estimator, permuted(X, positions, order), y) for order in orders]


class _PermutedStore:
    """Rows of a collection with some modules of other rows, put together when they are read.

    Parameters
    ----------
    loras : LoRACollection
    positions : sequence of int
        The modules that come from elsewhere.
    own, donors : ndarray of shape (N,), of intp
        Which rows of the collection these are, and which bring those modules.
    """

    # They were, as they stand in the collection, when the score without permutation was computed.
    is_checked = True

    def __init__(
        self,
        loras: LoRACollection,
        positions: Sequence[int],
        own: NDArray[np.intp],
        donors: NDArray[np.intp],
    ) -> None:
        self.layout = loras.layout
        self.dtype = loras.dtype
        self.ids = loras.ids[own]
        self.ranks = loras.ranks[own]
        self.ranks[:, positions] = loras.ranks[donors][:, positions]
        self._loras = loras
        self._positions = positions
        self._own = own
        self._donors = donors

    def read(self, rows: Rows, *, copy: bool = True) -> NDArray[Any]:
        """Read rows, and those whose modules they get."""
        flat = self._loras.read(self._own[rows])
        other = self._loras.read(self._donors[rows], copy=False)
        for columns in _columns(self.layout, self._positions):
            flat[:, columns] = other[:, columns]
        return flat

    def subset(self, rows: NDArray[np.intp]) -> _PermutedStore:
        """Give some rows, with none of the collection but what they need."""
        used, places = np.unique([self._own[rows], self._donors[rows]], return_inverse=True)
        own, donors = places.reshape(2, -1)
        return _PermutedStore(self._loras[used], self._positions, own, donors)


def _columns(layout: LoRALayout, positions: Sequence[int]) -> list[slice]:
    """Columns of modules: U and V, which lie side by side, and side features named after them."""
    columns = []
    for position in positions:
        U, V = layout.factor_slices[position]
        columns.append(slice(U.start, V.stop))
    owners = {layout.names[position] for position in positions}
    sides = side_slices(layout.side, layout.side_slice.start)
    return columns + [
        place
        for name, place in sides.items()
        if name in owners or name.rpartition(":")[0] in owners
    ]
