"""Singular values of the updates, module by module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from sklora._base import check_option
from sklora._untrusted import counted
from sklora.collection import LoRAAdapter, LoRACollection
from sklora.inspection._plotting import (
    BLACK,
    COLORMAP,
    axes_of,
    check_matplotlib,
    plain_labels,
    room_for_labels,
    short_names,
    whole_numbers,
)
from sklora.transform import SVDSpectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Kind = Literal["heatmap", "decay"]

# Values further below the largest have the colour, or the end of the axis, of the smallest.
_RANGE = 1e-4
_FONT = 8.0


class SpectrumDisplay:
    """Singular values of every module's update, for one adapter or a zoo.

    It is recommended to make one with `from_loras` or `from_estimator`. All parameters are stored
    as attributes.

    Parameters
    ----------
    values : array-like of shape (n_adapters, n_modules, n_values)
        Singular values, largest first. NaN where a module has fewer; zero beyond an adapter's rank.
    module_names : sequence of str, of length n_modules

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    image_ : QuadMesh or None
        The heat map.
    lines_ : list of Line2D or None
        The decay of every module, and last that of all.
    band_ : FillBetweenPolyCollection or None
        Quantiles around the decay of all.
    colorbar_ : matplotlib Colorbar

    See Also
    --------
    sklora.SVDSpectrum : Computes the values.

    Notes
    -----
    Singular values belong to the update, not to its factors, so that the gauge does not show.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora import LoRACollection
    >>> from sklora.inspection import SpectrumDisplay
    >>> U = np.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> X = LoRACollection.from_factors([{"q": (U, np.eye(2)), "v": (2 * U, np.eye(2))}])
    >>> display = SpectrumDisplay.from_loras(X, kind="decay")
    >>> display.values
    array([[[3., 1.],
            [6., 2.]]])
    """

    image_: Any
    lines_: Any
    band_: Any

    def __init__(self, *, values: ArrayLike, module_names: Any) -> None:
        self.values: NDArray[np.floating[Any]] = np.asarray(values)
        self.module_names = module_names

    def plot(
        self,
        ax: Axes | None = None,
        *,
        kind: Kind = "heatmap",
        quantiles: tuple[float, float] = (0.1, 0.9),
    ) -> Self:
        """Plot the median over the adapters that have the module, at that rank.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        kind : {"heatmap", "decay"}, default="heatmap"
            A heat map has a row for every module and a column for every singular value. Decay has a
            thin line for every module, lighter the deeper it is, a thick one for the median over
            all modules and adapters, and a band between two quantiles of them.
        quantiles : (float, float), default=(0.1, 0.9)
            Ends of that band.

        Returns
        -------
        self : object

        Raises
        ------
        ValueError
            When there is no such kind, quantiles are not two numbers from 0 to 1, values are of
            another shape or of other modules than are named, or none is more than zero.
        """
        check_option("kind", kind, ("heatmap", "decay"))
        _check_quantiles(quantiles)
        names = list(self.module_names)
        if self.values.ndim != 3:
            raise ValueError(
                f"values of shape {self.values.shape} are not of (n_adapters, n_modules, n_values)."
            )
        if self.values.shape[1] != len(names):
            raise ValueError(
                f"values of shape {self.values.shape} are of "
                f"{counted(self.values.shape[1], 'module')}, with {counted(len(names), 'name')}."
            )
        # Neither zeros nor what a module has no room for are anything on a logarithmic scale.
        positive = np.where(self.values > 0, self.values, np.nan)
        if not np.isfinite(positive).any():
            raise ValueError("no singular value is more than zero: every update is zero.")
        self.image_ = self.lines_ = self.band_ = None
        height = min(8.0, 1.5 + 0.19 * len(names)) if kind == "heatmap" else 4.5
        self.ax_ = axes_of(self, ax, (6.5, max(3.0, height)))
        self.figure_ = self.ax_.figure
        if kind == "heatmap":
            self._plot_heatmap(_quantiles(positive, 0.5), names)
        else:
            self._plot_decay(positive, quantiles)
        return self

    @classmethod
    def from_loras(
        cls,
        X: LoRACollection | LoRAAdapter,
        *,
        n_values: int | None = None,
        device: str | torch.device = "auto",
        kind: Kind = "heatmap",
        quantiles: tuple[float, float] = (0.1, 0.9),
        ax: Axes | None = None,
    ) -> Self:
        """Compute the singular values of one adapter or of all, and plot them.

        Parameters
        ----------
        X : LoRACollection or LoRAAdapter
            Adapters, or one of them: ``X`` or ``X[0]``.
        n_values : int or None, default=None
            How many singular values of every module; None for all.
        device : str or torch.device, default="auto"
            Where to compute. ``"auto"`` uses CUDA if there is one.
        kind : {"heatmap", "decay"}, default="heatmap"
            As for `plot`.
        quantiles : (float, float), default=(0.1, 0.9)
            As for `plot`.
        ax : matplotlib Axes or None, default=None
            None makes a new figure.

        Returns
        -------
        display : SpectrumDisplay

        Raises
        ------
        TypeError
            When X is neither.
        ValueError
            When X is empty or its numbers are not valid.
        """
        check_matplotlib(f"{cls.__name__}.from_loras")
        if isinstance(X, LoRAAdapter):
            X = LoRACollection.from_factors([X])
        if not isinstance(X, LoRACollection):
            raise TypeError(
                f"X is of type {type(X).__name__}, but modules are known of a LoRACollection or a "
                "LoRAAdapter alone; make one with LoRACollection.from_array(X, layout)."
            )
        spectra = SVDSpectrum(n_values, device=device).fit(X)
        return cls.from_estimator(spectra, X, kind=kind, quantiles=quantiles, ax=ax)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: LoRACollection | ArrayLike,
        *,
        kind: Kind = "heatmap",
        quantiles: tuple[float, float] = (0.1, 0.9),
        ax: Axes | None = None,
    ) -> Self:
        """Plot the singular values that a fitted estimator sees.

        Parameters
        ----------
        estimator : SVDSpectrum or Pipeline
            Fitted. Of a pipeline, the steps up to its first SVDSpectrum.
        X : LoRACollection or array-like of shape (n_adapters, width)
            What the estimator takes.
        kind : {"heatmap", "decay"}, default="heatmap"
            As for `plot`.
        quantiles : (float, float), default=(0.1, 0.9)
            As for `plot`.
        ax : matplotlib Axes or None, default=None
            None makes a new figure.

        Returns
        -------
        display : SpectrumDisplay

        Raises
        ------
        sklearn.exceptions.NotFittedError
            When the estimator is not fitted.
        ValueError
            When the estimator has no SVDSpectrum, or X is not valid.
        """
        check_matplotlib(f"{cls.__name__}.from_estimator")
        before, spectra = _split(estimator)
        check_is_fitted(spectra)
        columns = np.asarray(spectra.transform(X if before is None else before.transform(X)))
        return cls(
            values=_by_module(columns, spectra.n_values_), module_names=spectra.layout_.names
        ).plot(ax, kind=kind, quantiles=quantiles)

    def _plot_heatmap(self, values: NDArray[Any], names: list[str]) -> None:
        from matplotlib import colormaps

        axes = self.ax_
        # No shade of grey can be taken for a value.
        axes.patch.set(facecolor="white", edgecolor="0.6", hatch="////")
        cmap = colormaps[COLORMAP]
        norm, extend = _norm(values)
        self.image_ = axes.pcolormesh(np.ma.masked_invalid(values), cmap=cmap, norm=norm)
        axes.invert_yaxis()
        self.colorbar_ = self.figure_.colorbar(self.image_, ax=axes, extend=extend)
        _plain_numbers(self.colorbar_.ax.yaxis)
        self.colorbar_.set_label("singular value" + self._of_zoo())
        prefix, labels = short_names(names)
        step = -(-len(labels) // room_for_labels(axes, _FONT))
        plain_labels(axes.yaxis, np.arange(len(labels))[::step] + 0.5, labels[::step])
        axes.tick_params(axis="y", labelsize=_FONT)
        n_values = values.shape[1]
        step = -(-n_values // 16)
        axes.set_xticks(
            np.arange(n_values)[::step] + 0.5, [f"{n + 1}" for n in range(0, n_values, step)]
        )
        axes.set_xlabel("number of the singular value")
        axes.set_ylabel(f"module  {prefix}*" if prefix else "module")
        axes.yaxis.get_label().set_parse_math(False)

    def _plot_decay(self, positive: NDArray[Any], quantiles: tuple[float, float]) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        axes, n_modules, n_values = self.ax_, *positive.shape[1:]
        places = np.arange(1, n_values + 1)
        # The lightest colours of the map are faint as thin lines.
        colors = ListedColormap(colormaps[COLORMAP](np.linspace(0, 0.85, 256)))
        depth = ScalarMappable(Normalize(0, max(1, n_modules - 1)), colors)
        self.lines_ = []
        medians = _quantiles(positive, 0.5)
        for module, values in enumerate(medians):
            style: Any = {"color": depth.to_rgba(np.array(module)), "linewidth": 1, "alpha": 0.7}
            if np.isfinite(values).sum() == 1:
                style["marker"] = "_"  # one value makes no line
            self.lines_ += axes.plot(places, values, **style)
        everything = positive.reshape(-1, n_values)
        low, high = _quantiles(everything, list(quantiles))
        self.band_ = axes.fill_between(places, low, high, color="0.5", alpha=0.25, linewidth=0)
        self.band_.set_label(f"quantiles {quantiles[0]:g} to {quantiles[1]:g} of all")
        style = {"color": BLACK, "linewidth": 2.5, "label": "median of all"}
        self.lines_ += axes.plot(places, _quantiles(everything, 0.5), "o-", **style)
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        floor = _RANGE * np.nanmax(everything)
        if min(np.nanmin(medians), np.nanmin(low)) < floor:
            axes.set_ylim(bottom=floor)
        whole_numbers(axes.xaxis)
        axes.set_xlabel("number of the singular value")
        axes.set_ylabel("singular value" + self._of_zoo())
        axes.legend()
        self.colorbar_ = self.figure_.colorbar(depth, ax=axes, ticks=[0, max(1, n_modules - 1)])
        self.colorbar_.ax.set_yticklabels(["first", "last"])
        self.colorbar_.set_label("module, in order")

    def _of_zoo(self) -> str:
        n_adapters = len(self.values)
        return "" if n_adapters == 1 else f", median of {n_adapters:,} adapters"


def _check_quantiles(quantiles: object) -> None:
    try:
        low, high = map(float, quantiles)  # type: ignore[call-overload]
        valid = 0 <= low <= 1 and 0 <= high <= 1
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"quantiles is {quantiles!r}; pass two numbers from 0 to 1.")


def _split(estimator: Any) -> tuple[Any, SVDSpectrum]:
    """Give what comes before the spectra, or None, and the spectra."""
    if isinstance(estimator, SVDSpectrum):
        return None, estimator
    if isinstance(estimator, Pipeline):
        for place, (_, step) in enumerate(estimator.steps):
            if isinstance(step, SVDSpectrum):
                return (estimator[:place] if place else None), step
    raise ValueError(
        f"{type(estimator).__name__} computes no spectra; pass a fitted SVDSpectrum, a Pipeline "
        "with one, or the adapters themselves to SpectrumDisplay.from_loras."
    )


def _by_module(columns: NDArray[Any], counts: tuple[int, ...]) -> NDArray[Any]:
    """Cut columns into modules; side features, which come last, are left out."""
    values = np.full((len(columns), len(counts), max(counts)), np.nan, columns.dtype)
    start = 0
    for module, count in enumerate(counts):
        values[:, module, :count] = columns[:, start : start + count]
        start += count
    return values


def _norm(values: NDArray[Any]) -> tuple[Any, str]:
    from matplotlib.colors import LogNorm

    smallest, largest = float(np.nanmin(values)), float(np.nanmax(values))
    floor = _RANGE * largest
    if smallest < floor:
        return LogNorm(floor, largest), "min"
    # A scale has two ends, even if all values are one.
    return LogNorm(smallest if smallest < largest else largest / 2, largest), "neither"


def _plain_numbers(axis: Axis) -> None:
    """Write 0.02, not 2 x 10^-2, on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _quantiles(values: NDArray[Any], quantile: Any) -> NDArray[Any]:
    """Quantiles over the first axis; NaN, without a warning, where there is nothing."""
    filled = np.isfinite(values).any(axis=0)
    result = np.full((*np.shape(quantile), *values.shape[1:]), np.nan)
    result[..., filled] = np.nanquantile(values[:, filled], quantile, axis=0)
    return result
