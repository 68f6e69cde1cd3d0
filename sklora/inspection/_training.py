"""Losses over the epochs of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from sklora.inspection._plotting import (
    BLACK,
    BLUE,
    VERMILLION,
    axes_of,
    check_matplotlib,
    styled,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TrainingCurveDisplay:
    """Training and validation loss of every epoch, with the best one marked.

    It is recommended to make one with `from_estimator`. All parameters are stored as attributes.

    Parameters
    ----------
    train_losses : array-like of shape (n_epochs,)
    valid_losses : array-like of shape (n_epochs,) or None, default=None
        None where nothing was held out for validation.

    Attributes
    ----------
    best_epoch_ : int or None
        The first epoch, counted from 1, of the least validation loss. None without validation. A
        network with early stopping keeps its weights, or those of an earlier epoch whose loss
        was hardly more.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    lines_ : list of Line2D
        Training loss, and validation loss if there is one.
    best_ : Line2D or None
        The mark of the best epoch.

    See Also
    --------
    sklearn.model_selection.LearningCurveDisplay : Scores over the number of adapters.

    Examples
    --------
    >>> from sklora import GLNetRegressor
    >>> from sklora.datasets import load_digits_loras
    >>> from sklora.inspection import TrainingCurveDisplay
    >>> zoo = load_digits_loras()
    >>> net = GLNetRegressor(max_epochs=3, random_state=0).fit(zoo.data[:200], zoo.loss[:200])
    >>> display = TrainingCurveDisplay.from_estimator(net)
    >>> len(display.train_losses), display.best_epoch_ in (1, 2, 3)
    (3, True)
    """

    best_epoch_: int | None
    best_: Any

    def __init__(self, *, train_losses: ArrayLike, valid_losses: ArrayLike | None = None) -> None:
        self.train_losses = train_losses
        self.valid_losses = valid_losses

    def plot(self, ax: Axes | None = None, *, line_kw: dict[str, Any] | None = None) -> Self:
        """Plot the losses over the epochs.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        line_kw : dict or None, default=None
            Further keyword arguments of ``Axes.plot`` for both curves.

        Returns
        -------
        self : object

        Raises
        ------
        ValueError
            When there is no epoch, or not one validation loss for each.
        """
        train = np.asarray(self.train_losses, dtype=float)
        valid = np.asarray([] if self.valid_losses is None else self.valid_losses, dtype=float)
        if train.ndim != 1 or not train.size:
            raise ValueError(f"train_losses of shape {train.shape} are not one for each epoch.")
        if self.valid_losses is not None and valid.shape != train.shape:
            raise ValueError(
                f"valid_losses of shape {valid.shape} are not one for each of the {len(train)} "
                "epochs of train_losses; pass NaN for an epoch without."
            )
        self.ax_ = axes_of(self, ax, (6.0, 4.0))
        from matplotlib.lines import Line2D

        self.figure_ = self.ax_.figure
        epochs = np.arange(1, len(train) + 1)
        self.best_epoch_, self.best_ = None, None
        style = {"color": BLUE, "linestyle": "--", "label": "training"}
        style["marker"] = "o" if len(train) == 1 else ""  # one point makes no line
        self.lines_ = self.ax_.plot(epochs, train, **styled(style, line_kw, Line2D))
        if not np.isnan(valid).all():
            style = {"color": VERMILLION, "linestyle": "-", "label": "validation"}
            self.lines_ += self.ax_.plot(epochs, valid, **styled(style, line_kw, Line2D))
            self._mark_best(valid)
        whole_numbers(self.ax_.xaxis)
        self.ax_.set_xlabel("epoch")
        self.ax_.set_ylabel("loss")
        self.ax_.legend()
        self.ax_.spines[["top", "right"]].set_visible(False)
        return self

    @classmethod
    def from_estimator(
        cls, estimator: Any, *, ax: Axes | None = None, line_kw: dict[str, Any] | None = None
    ) -> Self:
        """Plot what a fitted network remembers of its training.

        Parameters
        ----------
        estimator : estimator
            A fitted network of sklora, a Pipeline that ends in one, or a search that found one.
        ax : matplotlib Axes or None, default=None
            None makes a new figure.
        line_kw : dict or None, default=None
            As for `plot`.

        Returns
        -------
        display : TrainingCurveDisplay

        Raises
        ------
        sklearn.exceptions.NotFittedError
            When the estimator is not fitted.
        ValueError
            When it is no network.
        """
        check_matplotlib(f"{cls.__name__}.from_estimator")
        check_is_fitted(estimator)
        model = getattr(estimator, "best_estimator_", estimator)
        model = model[-1] if isinstance(model, Pipeline) else model
        history = getattr(model, "history_", None)
        if not history:
            raise ValueError(
                f"{type(model).__name__} has no history of training; pass a fitted GLNet or MLPNet "
                "estimator, or a Pipeline that ends in one."
            )
        # An epoch of partial_fit holds nothing out.
        valid = [row.get("valid_loss", np.nan) for row in history]
        return cls(
            train_losses=np.array([row["train_loss"] for row in history]),
            valid_losses=None if np.isnan(valid).all() else np.array(valid),
        ).plot(ax, line_kw=line_kw)

    def _mark_best(self, valid: Any) -> None:
        best = int(np.nanargmin(valid))
        self.best_epoch_ = best + 1
        [self.best_] = self.ax_.plot(
            [best + 1],
            [valid[best]],
            marker="*",
            markersize=13,
            linestyle="",
            color=VERMILLION,
            markeredgecolor=BLACK,
            label=f"best: epoch {best + 1}, loss {valid[best]:.3g}",
            zorder=3,
        )
