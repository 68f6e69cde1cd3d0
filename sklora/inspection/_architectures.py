"""Scores of architectures, with their spread and the time that training takes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import is_classifier, is_regressor
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from sklora.estimators import MLPNetClassifier, MLPNetRegressor
from sklora.estimators._base import BaseNetEstimator
from sklora.inspection._plotting import (
    BLACK,
    BLUE,
    axes_of,
    check_matplotlib,
    plain_labels,
    styled,
)
from sklora.transform import DenseProduct, OAlign, SVDSpectrum, UpdateKernel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEATURES: dict[Any, str] = {OAlign: "o-align", SVDSpectrum: "svd", DenseProduct: "dense"}


class ArchitectureComparisonDisplay:
    """Scores of architectures, with their spread and the time that training takes, per task.

    It is recommended to make one with `from_cv_results`, `from_estimator` or `from_predictions`.
    All parameters are stored as attributes.

    Parameters
    ----------
    scores : dict of {task: {architecture: ndarray of shape (n_folds,)}}
        Higher is better.
    fit_times : dict of {task: {architecture: float}} or None, default=None
        Seconds that one fit takes.
    score_name : str or dict of {task: str}, default="score"
        What the scores are called.
    baseline : dict of {task: float} or None, default=None
        What the best constant answer scores.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the first task.
    axes_ : ndarray of matplotlib Axes, of shape (n_tasks,)
        Axes of every task.
    figure_ : matplotlib Figure
    errorbars_ : list of ErrorbarContainer
        Means and standard deviations, for every task.
    folds_ : list of Line2D
        Scores of the single folds, for every task.

    See Also
    --------
    sklora.architecture_grid : A search over the architectures.

    Examples
    --------
    >>> from sklearn.model_selection import cross_validate
    >>> from sklora import make_architecture
    >>> from sklora.datasets import load_digits_loras
    >>> from sklora.inspection import ArchitectureComparisonDisplay
    >>> zoo = load_digits_loras()
    >>> X, y = zoo.data[:60], zoo.loss[:60]
    >>> results = {}
    >>> for name in ("svd", "mlp"):
    ...     model = make_architecture(name, "regression", random_state=0)
    ...     results[name] = cross_validate(model.set_params(model__max_epochs=2), X, y, cv=2)
    >>> display = ArchitectureComparisonDisplay.from_cv_results({"loss": results}, score_name="R2")
    >>> [text.get_text() for text in display.ax_.get_yticklabels()]
    ['svd', 'mlp']
    """

    def __init__(
        self,
        *,
        scores: Mapping[str, Mapping[str, NDArray[np.float64]]],
        fit_times: Mapping[str, Mapping[str, float]] | None = None,
        score_name: str | Mapping[str, str] = "score",
        baseline: Mapping[str, float] | None = None,
    ) -> None:
        self.scores = scores
        self.fit_times = fit_times
        self.score_name = score_name
        self.baseline = baseline

    def plot(
        self,
        ax: Axes | ArrayLike | None = None,
        *,
        errorbar_kw: dict[str, Any] | None = None,
        fold_kw: dict[str, Any] | None = None,
    ) -> Self:
        """Plot a panel for every task and a row for every architecture.

        A diamond is the mean over the folds, its bar the standard deviation, a ring one fold. At
        the right are mean, standard deviation and time as numbers.

        Parameters
        ----------
        ax : matplotlib Axes, array-like of Axes or None, default=None
            One for every task. None makes a new figure.
        errorbar_kw : dict or None, default=None
            Further keyword arguments of ``Axes.errorbar``.
        fold_kw : dict or None, default=None
            Further keyword arguments of ``Axes.plot`` for the folds.

        Returns
        -------
        self : object

        Raises
        ------
        ValueError
            When there are not as many axes as tasks.
        """
        self.axes_ = self._axes(ax)
        self.ax_ = self.axes_[0]
        self.figure_ = self.ax_.figure
        self.errorbars_: list[Any] = []
        self.folds_: list[Any] = []
        for axes, task in zip(self.axes_, self.scores, strict=True):
            self._plot_task(axes, task, errorbar_kw or {}, fold_kw or {})
        return self

    @classmethod
    def from_cv_results(
        cls,
        cv_results: Mapping[str, Mapping[str, Mapping[str, Any]]],
        *,
        score_name: str | Mapping[str, str] = "score",
        baseline: Mapping[str, float] | None = None,
        ax: Axes | ArrayLike | None = None,
        errorbar_kw: dict[str, Any] | None = None,
        fold_kw: dict[str, Any] | None = None,
    ) -> Self:
        """Plot what `sklearn.model_selection.cross_validate` gave.

        Parameters
        ----------
        cv_results : dict of {task: {architecture: dict}}
            For every task and architecture the result of `cross_validate` with one score.
        score_name : str or dict of {task: str}, default="score"
            What the scores are called.
        baseline : dict of {task: float} or None, default=None
            What the best constant answer scores.
        ax : matplotlib Axes, array-like of Axes or None, default=None
            One for every task. None makes a new figure.
        errorbar_kw, fold_kw : dict or None, default=None
            As for `plot`.

        Returns
        -------
        display : ArchitectureComparisonDisplay

        Raises
        ------
        ValueError
            When a result has no ``"test_score"``, or there are none.
        """
        check_matplotlib(f"{cls.__name__}.from_cv_results")
        given: Any = cv_results  # by users, who may mean another result
        for task, results in given.items() if isinstance(given, Mapping) else [("", given)]:
            named = results.items() if isinstance(results, Mapping) else [("", results)]
            for name, result in named:
                if not isinstance(result, Mapping) or "test_score" not in result:
                    raise ValueError(
                        f"the result of {name!r} for {task!r} has no 'test_score'; pass what "
                        "cross_validate gives with one scoring, as "
                        "{task: {architecture: result}}, or a fitted search to from_estimator."
                    )
        display = cls(
            scores=_each(cv_results, lambda result: np.asarray(result["test_score"], float)),
            fit_times=_each(cv_results, lambda result: float(np.mean(result["fit_time"]))),
            score_name=score_name,
            baseline=baseline,
        )
        return display.plot(ax, errorbar_kw=errorbar_kw, fold_kw=fold_kw)

    @classmethod
    def from_estimator(
        cls,
        search: Any,
        *,
        score_name: str | None = None,
        ax: Axes | None = None,
        errorbar_kw: dict[str, Any] | None = None,
        fold_kw: dict[str, Any] | None = None,
    ) -> Self:
        """Plot the best candidate of every architecture in a fitted search, or what `refit` chose.

        Parameters
        ----------
        search : GridSearchCV or another search
            Fitted, over :func:`sklora.architecture_grid` or any other pipelines. Those that are
            none of the five architectures go by the names of their steps. Of a halving search, the
            last iteration that an architecture reached counts.
        score_name : str or None, default=None
            What the scores are called. None takes the search's `scoring`.
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        errorbar_kw, fold_kw : dict or None, default=None
            As for `plot`.

        Returns
        -------
        display : ArchitectureComparisonDisplay
            Of one task, ``"classification"`` or ``"regression"``.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            When the search is not fitted.
        TypeError
            When it is no search.
        ValueError
            When it has many scores and `refit` names none, or no candidate could be trained.
        """
        check_matplotlib(f"{cls.__name__}.from_estimator")
        if not hasattr(search, "refit"):
            raise TypeError(
                f"search is of type {type(search).__name__}, which is no search; pass a fitted "
                "GridSearchCV or another, or give what cross_validate gives to from_cv_results."
            )
        check_is_fitted(search, "cv_results_")
        metric = _refit_metric(search)
        task = "regression" if is_regressor(search) else "classification"
        best = _best_candidates(search, metric)
        results = search.cv_results_
        times = {name: float(results["mean_fit_time"][n]) for name, n in best.items()}
        scores = {
            name: np.array(
                [results[f"split{fold}_test_{metric}"][n] for fold in range(search.n_splits_)]
            )
            for name, n in best.items()
        }
        display = cls(
            scores={task: scores},
            fit_times={task: times},
            score_name=_score_name(search) if score_name is None else score_name,
        )
        return display.plot(ax, errorbar_kw=errorbar_kw, fold_kw=fold_kw)

    @classmethod
    def from_predictions(
        cls,
        y_true: ArrayLike,
        y_preds: Mapping[str, ArrayLike],
        *,
        metric: Callable[[Any, Any], float],
        score_name: str | None = None,
        ax: Axes | None = None,
        errorbar_kw: dict[str, Any] | None = None,
        fold_kw: dict[str, Any] | None = None,
    ) -> Self:
        """Plot how well predictions agree with the truth, without spread and time.

        Parameters
        ----------
        y_true : array-like of shape (n_adapters,) or (n_adapters, n_targets)
        y_preds : dict of {architecture: array-like like y_true}
        metric : callable
            From `y_true` and predictions to a score, such as `sklearn.metrics.r2_score`.
        score_name : str or None, default=None
            What the scores are called. None takes the name of `metric`.
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        errorbar_kw, fold_kw : dict or None, default=None
            As for `plot`.

        Returns
        -------
        display : ArchitectureComparisonDisplay
            Of one task, ``"predictions"``.
        """
        check_matplotlib(f"{cls.__name__}.from_predictions")
        if score_name is None:
            score_name = getattr(metric, "__name__", "score").replace("_", " ")
        scores = {name: np.array([metric(y_true, y_pred)]) for name, y_pred in y_preds.items()}
        display = cls(scores={"predictions": scores}, score_name=score_name)
        return display.plot(ax, errorbar_kw=errorbar_kw, fold_kw=fold_kw)

    def _axes(self, ax: Any) -> NDArray[np.object_]:
        check_matplotlib(f"{type(self).__name__}.plot")
        n_tasks = len(self.scores)
        if not n_tasks or not all(self.scores.values()):
            raise ValueError("there are no scores to plot; pass at least one architecture's.")
        if n_tasks == 1 or ax is not None:
            is_one = ax is None or hasattr(ax, "plot")
            found = [axes_of(self, ax, (6.5, self._height()))] if is_one else list(np.ravel(ax))
            if len(found) != n_tasks:
                raise ValueError(
                    f"there are {n_tasks} tasks, {', '.join(map(repr, self.scores))}, but "
                    f"{len(found)} axes; pass one for every task, or ax=None."
                )
            return np.array(found, dtype=object)
        import matplotlib.pyplot as plt

        size = (6 * n_tasks, self._height())
        _, axes = plt.subplots(1, n_tasks, figsize=size, layout="constrained")
        return np.asarray(axes, dtype=object)

    def _height(self) -> float:
        return 1.2 + 0.4 * max(map(len, self.scores.values()))

    def _plot_task(
        self, axes: Axes, task: str, errorbar_kw: dict[str, Any], fold_kw: dict[str, Any]
    ) -> None:
        from matplotlib.lines import Line2D

        scores = self.scores[task]
        rows = np.arange(len(scores))
        means = np.array([np.mean(one) for one in scores.values()])
        spreads = np.array([_spread(one) for one in scores.values()])
        folds = np.concatenate(list(scores.values()))
        rows_of_folds = np.repeat(rows, [len(one) for one in scores.values()])
        ring = {"marker": "o", "linestyle": "", "markersize": 5, "color": BLUE}
        ring |= {"markerfacecolor": "none", "alpha": 0.8}
        style: dict[str, Any] = {"fmt": "D", "color": BLACK, "markersize": 5, "capsize": 4}
        self.folds_ += axes.plot(folds, rows_of_folds, **styled(ring, fold_kw, Line2D))
        style = styled({**style, "zorder": 3}, errorbar_kw, Line2D)
        self.errorbars_.append(axes.errorbar(means, rows, xerr=spreads, **style))
        plain_labels(axes.yaxis, rows, map(_in_two_lines, scores))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=4)  # numbers may be long
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(task, parse_math=False)
        name = self.score_name if isinstance(self.score_name, str) else self.score_name[task]
        axes.set_xlabel(name, parse_math=False)
        self._write_numbers(axes, task, means, spreads)
        if self.baseline is not None and task in self.baseline:
            axes.axvline(self.baseline[task], color="0.3", linewidth=1, linestyle="--", zorder=1)
            axes.annotate(
                "constant", (self.baseline[task], -0.6), (3, -1), textcoords="offset points",
                va="top", size="small",
            )  # fmt: skip

    def _write_numbers(
        self, axes: Axes, task: str, means: NDArray[np.float64], spreads: NDArray[np.float64]
    ) -> None:
        times = None if self.fit_times is None else self.fit_times[task]
        names = self.scores[task]
        largest = np.nan_to_num(np.abs([means, spreads])).max()
        style = ".3f" if largest == 0 or 0.01 <= largest < 1e4 else ".2e"
        columns = [[f"{mean:{style}}" for mean in means]]
        columns.append([f"± {spread:{style}}" if np.isfinite(spread) else "" for spread in spreads])
        columns.append(["" if times is None else _seconds(times[name]) for name in names])
        padded = [[text.rjust(max(map(len, column))) for text in column] for column in columns]
        lines = [f"{mean} {spread}  {time}" for mean, spread, time in zip(*padded, strict=True)]
        lines = [line.replace("-", "−").rstrip() for line in lines]
        numbers = axes.secondary_yaxis("right")
        plain_labels(numbers.yaxis, np.arange(len(lines)), lines)
        for label in numbers.get_yticklabels():
            label.set(family="monospace", size="small")
        numbers.tick_params(length=0)
        numbers.spines["right"].set_visible(False)


def _in_two_lines(name: str) -> str:
    return textwrap.fill(name, 30, max_lines=2, placeholder=" …")


def _seconds(time: float) -> str:
    return f"{time:.{2 if time < 1 else 1 if time < 10 else 0}f} s"


def _spread(scores: NDArray[np.float64]) -> float:
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else float("nan")


def _each(
    results: Mapping[str, Mapping[str, Any]], function: Callable[[Any], Any]
) -> dict[str, dict[str, Any]]:
    return {
        task: {name: function(result) for name, result in of_task.items()}
        for task, of_task in results.items()
    }


def _refit_metric(search: Any) -> str:
    if not search.multimetric_:
        return "score"
    if not isinstance(search.refit, str):
        raise ValueError(
            f"the search has many scores and refit={search.refit!r}, which does not say which of "
            "them tells the best candidate; set refit to the name of one."
        )
    return search.refit


def _score_name(search: Any) -> str:
    if search.multimetric_:
        name = search.refit
    elif isinstance(search.scoring, str):
        name = search.scoring
    elif search.scoring is None:
        name = "r2" if is_regressor(search) else "accuracy" if is_classifier(search) else "score"
    else:
        name = "score"
    return "R2" if name == "r2" else str(name).replace("_", " ")


def _best_candidates(search: Any, metric: str) -> dict[str, int]:
    """Give the place of the best candidate of every architecture, in the order of the grid."""
    means = search.cv_results_[f"mean_test_{metric}"]
    # In a halving search the later iterations are of more adapters; scores compare within one.
    iterations = search.cv_results_.get("iter", np.zeros(len(means)))
    standing = list(zip(iterations, means, strict=True))
    best: dict[str, int] = {}
    for candidate, params in enumerate(search.cv_results_["params"]):
        name = architecture_name(search.estimator, params)
        if np.isfinite(means[candidate]) and (
            name not in best or standing[candidate] > standing[best[name]]
        ):
            best[name] = candidate
    if not best:
        raise ValueError("no candidate of the search has a score: all of them failed.")
    # With a callable refit it need not be the best.
    chosen = getattr(search, "best_index_", None)
    if chosen is not None and np.isfinite(means[chosen]):
        params = search.cv_results_["params"][chosen]
        best[architecture_name(search.estimator, params)] = int(chosen)
    return best


def architecture_name(estimator: Any, params: Mapping[str, Any]) -> str:
    """Name the architecture of one candidate of a search.

    Parameters
    ----------
    estimator : estimator
        What is searched over.
    params : dict
        What the candidate sets.

    Returns
    -------
    str
        One of `sklora.ARCHITECTURES`, ``"dense (kernel)"``, or the names of its steps.

    Examples
    --------
    >>> from sklora import architecture_grid, make_architecture
    >>> from sklora.inspection._architectures import architecture_name
    >>> [entry] = architecture_grid("regression")[2:3]
    >>> architecture_name(
    ...     make_architecture("mlp", "regression"), {k: v for k, [v] in entry.items()}
    ... )
    'svd'
    """
    if not isinstance(estimator, Pipeline):
        return type(estimator).__name__
    steps = [params.get(name, step) for name, step in estimator.steps]
    *before, model = [step for step in steps if step not in ("passthrough", None)]
    flat = [part for step in before for part in _parts(step)]
    if isinstance(model, (MLPNetClassifier, MLPNetRegressor)):
        if not flat:
            return "mlp"
        if len(flat) == 1 and type(flat[0]) in _FEATURES:
            return _FEATURES[type(flat[0])]
    elif isinstance(model, BaseNetEstimator) and not flat:
        return "gl-net"
    elif any(isinstance(part, UpdateKernel) for part in flat):
        return "dense (kernel)"
    return " + ".join(type(step).__name__ for step in [*flat, model])


def _parts(step: Any) -> list[Any]:
    return [part for _, part in step.steps] if isinstance(step, Pipeline) else [step]
