"""Importance of modules, drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklora.collection import LoRACollection
from sklora.inspection._permutation import By, module_importance
from sklora.inspection._plotting import (
    SKY,
    axes_of,
    check_matplotlib,
    plain_labels,
    room_for_labels,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FONT = 9.0


class ModuleImportanceDisplay:
    """Permutation importance of modules, or of all modules of one depth at once.

    It is recommended to make one with `from_estimator`. All parameters are stored as attributes.

    Parameters
    ----------
    importances : ndarray of shape (n_groups, n_repeats)
        What the score lost in each repeat.
    names : sequence of str, of length n_groups
        Modules or blocks, in the order of the layout.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    bars_ : BarContainer
        Means and standard deviations over the repeats.

    See Also
    --------
    module_importance : The computation.

    Examples
    --------
    >>> from sklearn.linear_model import RidgeCV
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklora import SVDSpectrum
    >>> from sklora.datasets import load_digits_loras
    >>> from sklora.inspection import ModuleImportanceDisplay
    >>> zoo = load_digits_loras()
    >>> X, y = zoo.data[:100], zoo.size[:100]
    >>> model = make_pipeline(SVDSpectrum(), RidgeCV()).fit(X, y)
    >>> display = ModuleImportanceDisplay.from_estimator(
    ...     model, X, y, by="depth", n_repeats=2, random_state=0
    ... )
    >>> display.names
    ('blocks.0', 'blocks.1', 'blocks.2')
    """

    def __init__(self, *, importances: NDArray[np.float64], names: Sequence[str]) -> None:
        self.importances = importances
        self.names = names

    def plot(self, ax: Axes | None = None, *, bar_kw: dict[str, Any] | None = None) -> Self:
        """Plot a bar for every module, in the order of the layout.

        A bar is the mean over the repeats, with the standard deviation. Where there is no room for
        all names, the most important modules have theirs.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        bar_kw : dict or None, default=None
            Further keyword arguments of ``Axes.barh``.

        Returns
        -------
        self : object

        Raises
        ------
        ValueError
            When importances have no repeats, or not as many groups as there are names.
        """
        importances = np.asarray(self.importances)
        if importances.ndim != 2 or not importances.size:
            raise ValueError(
                f"importances of shape {importances.shape} are not of (n_groups, n_repeats)."
            )
        if len(importances) != len(self.names):
            raise ValueError(
                f"importances of shape {importances.shape} need {len(importances)} "
                f"names, got {len(self.names)}."
            )
        n_groups = len(self.names)
        self.ax_ = axes_of(self, ax, (6.5, min(8.0, max(2.0, 1.2 + 0.25 * n_groups))))
        self.figure_ = self.ax_.figure
        means, spreads = importances.mean(axis=1), importances.std(axis=1)
        style = {"color": SKY, "ecolor": "0.3", "error_kw": {"elinewidth": 0.8}}
        self.bars_ = self.ax_.barh(
            np.arange(n_groups), means, xerr=spreads, **{**style, **(bar_kw or {})}
        )
        self.ax_.axvline(0, color="0.3", linewidth=0.8)
        prefix, labels = short_names(self.names)
        room = room_for_labels(self.ax_, _FONT)
        shown = _spread_out(means, room)
        plain_labels(self.ax_.yaxis, shown, [labels[n] for n in shown])
        self.ax_.tick_params(axis="y", labelsize=_FONT)
        self.ax_.set_ylim(n_groups - 0.4, -0.6)
        self.ax_.set_xlabel("decrease of the score")
        self.ax_.set_ylabel(f"{prefix}*" if prefix else "", parse_math=False)
        self.ax_.spines[["top", "right"]].set_visible(False)
        return self

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: LoRACollection,
        y: ArrayLike | None,
        *,
        by: By = "module",
        scoring: str | Callable[[Any, Any, Any], float] | None = None,
        n_repeats: int = 5,
        n_jobs: int | None = None,
        random_state: int | np.random.RandomState | None = None,
        ax: Axes | None = None,
        bar_kw: dict[str, Any] | None = None,
    ) -> Self:
        """Compute the importance of modules, and plot it.

        Parameters
        ----------
        estimator : estimator
            Fitted, of any kind that takes a collection.
        X : LoRACollection of shape (n_adapters, width)
            Adapters to score: held-out ones tell what generalises.
        y : array-like of shape (n_adapters,) or (n_adapters, n_targets), or None
            Their targets.
        by : {"module", "depth"}, default="module"
            What is permuted at once: a module, or all modules of a block.
        scoring : str, callable or None, default=None
            One score; None is that of the estimator.
        n_repeats : int, default=5
            How often to permute.
        n_jobs : int or None, default=None
            Modules to permute at the same time.
        random_state : int, RandomState instance or None, default=None
            Draws the permutations.
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        bar_kw : dict or None, default=None
            As for `plot`.

        Returns
        -------
        display : ModuleImportanceDisplay

        Raises
        ------
        TypeError, ValueError, sklearn.exceptions.NotFittedError
            As from :func:`module_importance`.
        """
        check_matplotlib(f"{cls.__name__}.from_estimator")
        result = module_importance(
            estimator,
            X,
            y,
            by=by,
            scoring=scoring,
            n_repeats=n_repeats,
            n_jobs=n_jobs,
            random_state=random_state,
        )
        return cls(importances=result.importances, names=result.names).plot(ax, bar_kw=bar_kw)


def _spread_out(values: NDArray[np.float64], room: int) -> list[int]:
    """Places of the largest values, no two of them too close for their labels."""
    apart = len(values) / room
    chosen: list[int] = []
    for place in np.argsort(-values, kind="stable").tolist():
        if all(abs(place - other) >= apart for other in chosen):
            chosen.append(place)
    return sorted(chosen)
