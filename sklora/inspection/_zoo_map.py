"""A zoo as points in the plane."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted

from sklora.collection import LoRACollection
from sklora.inspection._plotting import (
    BLUE,
    COLORMAP,
    MARKERS,
    PALETTE,
    axes_of,
    check_matplotlib,
    shortened,
    styled,
)
from sklora.transform import pairwise_update_kernel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OTHERS = "others"


class ZooMapDisplay:
    """A map of a zoo: a point for every adapter, coloured by a label.

    It is recommended to make one with `from_loras` or `from_estimator`. All parameters are stored
    as attributes.

    Parameters
    ----------
    points : array-like of shape (n_adapters, 2)
    labels : array-like of shape (n_adapters,) or None, default=None
        Fractional numbers, or more than 8 different integers, are numbers, with a colour bar.
        Anything else is a category, with its own colour and marker; of more than 8 categories, only
        the 7 commonest have their own.
    label_name : str or None, default=None
        What the labels are.
    shares : ndarray of shape (2,) or None, default=None
        Shares of the variance along both axes.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    scatters_ : list of PathCollection
        One for every category, in the order of the legend; else one.
    legend_ : matplotlib Legend or None
        Of categories.
    colorbar_ : matplotlib Colorbar or None
        Of numbers.

    See Also
    --------
    sklora.pairwise_update_kernel : The kernel.

    Notes
    -----
    The map is made of updates, not of factors, so that the gauge does not show.

    Examples
    --------
    >>> from sklora.datasets import load_digits_loras
    >>> from sklora.inspection import ZooMapDisplay
    >>> zoo = load_digits_loras()
    >>> display = ZooMapDisplay.from_loras(zoo.data[:50], zoo.size[:50], label_name="images")
    >>> display.points.shape
    (50, 2)
    """

    legend_: Any
    colorbar_: Any

    def __init__(
        self,
        *,
        points: ArrayLike,
        labels: ArrayLike | None = None,
        label_name: str | None = None,
        shares: NDArray[np.float64] | None = None,
    ) -> None:
        self.points: NDArray[np.floating[Any]] = np.asarray(points)
        self.labels = labels
        self.label_name = label_name
        self.shares = shares

    def plot(self, ax: Axes | None = None, *, scatter_kw: dict[str, Any] | None = None) -> Self:
        """Plot the points.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        scatter_kw : dict or None, default=None
            Further keyword arguments of ``Axes.scatter``.

        Returns
        -------
        self : object

        Raises
        ------
        ValueError
            When points are not in the plane, or labels are not one for each.
        """
        if self.points.ndim != 2 or self.points.shape[1] != 2:
            raise ValueError(f"points of shape {self.points.shape} are not of (n_adapters, 2).")
        check_consistent_length(self.points, self.labels)
        labels = None if self.labels is None else _one_each(self.labels)
        self.ax_ = axes_of(self, ax, (6.5, 5.0))
        self.figure_ = self.ax_.figure
        self.legend_, self.colorbar_ = None, None
        from matplotlib.collections import Collection
        from matplotlib.markers import MarkerStyle

        style: dict[str, Any] = {"s": 20, "linewidth": 0.4, "alpha": 0.85}
        if MarkerStyle((scatter_kw or {}).get("marker", "o")).is_filled():
            style["edgecolor"] = "0.2"
        style = styled(style, scatter_kw, Collection)
        if labels is not None and _is_numeric(labels):
            self._plot_numbers(labels, style)
        else:
            if "c" in style:
                style["color"] = style.pop("c")
            if labels is None:
                self.scatters_ = [self.ax_.scatter(*self.points.T, **{"color": BLUE, **style})]
            else:
                self._plot_categories(labels, style)
        for axis, number in ((self.ax_.xaxis, 0), (self.ax_.yaxis, 1)):
            share = "" if self.shares is None else f" ({self.shares[number]:.0%} of variance)"
            axis.set_label_text(f"component {number + 1}{share}")
        # Distances mean something on the map, coordinates do not.
        self.ax_.set_aspect("equal", adjustable="datalim")
        self.ax_.set(xticks=[], yticks=[])
        return self

    @classmethod
    def from_loras(
        cls,
        X: LoRACollection | ArrayLike,
        labels: ArrayLike | None = None,
        *,
        label_name: str | None = None,
        device: str | torch.device = "auto",
        ax: Axes | None = None,
        scatter_kw: dict[str, Any] | None = None,
    ) -> Self:
        """Map adapters by the two principal components of the cosine between their updates.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, width)
            Each row of a plain array is one update.
        labels : array-like of shape (n_adapters,) or None, default=None
            What colours the points.
        label_name : str or None, default=None
            What the labels are.
        device : str or torch.device, default="auto"
            Where to compute. ``"auto"`` uses CUDA if there is one.
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        scatter_kw : dict or None, default=None
            As for `plot`.

        Returns
        -------
        display : ZooMapDisplay

        Raises
        ------
        ValueError
            When X is not valid, has fewer than three adapters, or there are not as many labels.
        """
        check_matplotlib(f"{cls.__name__}.from_loras")
        check_consistent_length(X, labels)
        kernel = pairwise_update_kernel(X, kernel="cosine", device=device).astype(np.float64)
        if len(kernel) < 3:
            raise ValueError(f"{len(kernel)} adapters make no map; pass at least 3.")
        points, shares = _principal_components(kernel)
        display = cls(points=points, labels=labels, label_name=label_name, shares=shares)
        return display.plot(ax, scatter_kw=scatter_kw)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: LoRACollection | ArrayLike,
        labels: ArrayLike | None = None,
        *,
        label_name: str | None = None,
        ax: Axes | None = None,
        scatter_kw: dict[str, Any] | None = None,
    ) -> Self:
        """Map adapters by the first two features of a fitted transformer.

        This places further adapters on the map of a zoo.

        Parameters
        ----------
        estimator : transformer
            Fitted, such as a Pipeline of UpdateKernel and KernelPCA.
        X : LoRACollection or array-like of shape (n_adapters, width)
            What it transforms.
        labels : array-like of shape (n_adapters,) or None, default=None
            What colours the points.
        label_name : str or None, default=None
            What the labels are.
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        scatter_kw : dict or None, default=None
            As for `plot`.

        Returns
        -------
        display : ZooMapDisplay

        Raises
        ------
        sklearn.exceptions.NotFittedError
            When the transformer is not fitted.
        ValueError
            When it gives fewer than two features, or there are not as many labels.
        """
        check_matplotlib(f"{cls.__name__}.from_estimator")
        check_is_fitted(estimator)
        features = np.asarray(estimator.transform(X))
        if features.ndim != 2 or features.shape[1] < 2:
            raise ValueError(
                f"{type(estimator).__name__} gives features of shape {features.shape}; a map needs "
                "two for every adapter."
            )
        display = cls(points=features[:, :2].copy(), labels=labels, label_name=label_name)
        return display.plot(ax, scatter_kw=scatter_kw)

    def _plot_numbers(self, labels: NDArray[Any], style: dict[str, Any]) -> None:
        known = np.isfinite(labels)
        missing = {**style, "color": "white", "edgecolor": "0.6"}
        self.scatters_ = [
            self.ax_.scatter(
                *self.points[known].T, **{"c": labels[known], "cmap": COLORMAP, **style}
            )
        ]
        if not known.all():
            self.scatters_.append(self.ax_.scatter(*self.points[~known].T, **missing, zorder=0))
        self.colorbar_ = self.figure_.colorbar(self.scatters_[0], ax=self.ax_)
        self.colorbar_.ax.set_ylabel(self.label_name or "", parse_math=False)

    def _plot_categories(self, labels: NDArray[Any], style: dict[str, Any]) -> None:
        texts = _categories(labels)
        order: Any = int if labels.dtype.kind in "iu" else str
        names = sorted(set(texts) - {_OTHERS}, key=order) + [_OTHERS] * (_OTHERS in texts)
        self.scatters_ = []
        for name, color, marker in zip(names, PALETTE, MARKERS, strict=False):
            chosen = texts == name
            kw = {"color": color, "marker": marker, **style}
            self.scatters_.append(self.ax_.scatter(*self.points[chosen].T, **kw))
        shown = [f"{shortened(name)} ({(texts == name).sum()})" for name in names]
        # Beside the points, which leave no corner free.
        self.legend_ = self.ax_.legend(
            self.scatters_, shown, title=self.label_name, loc="upper left", bbox_to_anchor=(1, 1)
        )
        for text in (*self.legend_.get_texts(), self.legend_.get_title()):
            text.set_parse_math(False)


def _one_each(labels: ArrayLike) -> NDArray[Any]:
    """Labels as an array; numbers are numbers even if some are None."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels of shape {labels.shape} are not one for each adapter.")
    if labels.dtype == object:
        known = [label for label in labels if label is not None]
        are_numbers = all(isinstance(label, Real) for label in known)
        if known and are_numbers and _is_numeric(np.array(known)):
            return labels.astype(float)
    return labels


def _is_numeric(labels: NDArray[Any]) -> bool:
    if labels.dtype.kind == "f":
        return True
    return labels.dtype.kind in "iu" and len(np.unique(labels)) > len(PALETTE)


def _categories(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels as texts; the rarer of too many are one."""
    texts = labels.astype(str)
    names, counts = np.unique(texts, return_counts=True)
    if len(names) > len(PALETTE):
        common = names[np.argsort(-counts, kind="stable")[: len(PALETTE) - 1]]
        texts = np.where(np.isin(texts, common), texts, _OTHERS)
    return texts


def _principal_components(
    kernel: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give the first two kernel principal components, and their shares of the variance."""
    from sklearn.decomposition import KernelPCA

    pca = KernelPCA(2, kernel="precomputed", random_state=0).set_output(transform="default")
    points = pca.fit_transform(kernel)
    total = np.trace(kernel) - kernel.sum() / len(kernel)
    return points, pca.eigenvalues_ / total if total > 0 else np.zeros(2)
