"""How classes and regression targets become what a loss reads, and outputs become predictions."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils import Tags, check_array, column_or_1d
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from sklora._base import atomic_fit
from sklora.estimators._base import BaseNetEstimator
from sklora.estimators._data import LossKind

ClassWeight = dict[Any, float] | list[dict[Any, float]] | str | None
CLASS_WEIGHT_CONSTRAINT = {"class_weight": [dict, list, StrOptions({"balanced"}), None]}


class NetClassifier(ClassifierMixin, BaseNetEstimator):
    """Binary, multiclass and multilabel targets: one logit for every class or label."""

    class_weight: ClassWeight
    classes_: NDArray[Any]
    multilabel_: bool

    @atomic_fit
    def partial_fit(
        self,
        X: Any,
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Train for one epoch on these adapters, from the current weights.

        All rows are trained on, at a constant learning rate; the optimizer's moments are kept from
        call to call. The first call sets how features are standardised.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, n_features)
            Adapters, or flat rows of `layout`.
        y : array-like of shape (n_adapters,) or (n_adapters, n_labels)
            Classes, or an indicator matrix of labels.
        classes : array-like of shape (n_classes,), optional
            All the classes that will come; needed in the first call, unless `y` is an indicator
            matrix.
        sample_weight : array-like of shape (n_adapters,), optional
            Weights of the adapters in the loss, on the same scale in all calls.

        Returns
        -------
        self : object
            The estimator.

        Raises
        ------
        ValueError
            As for `fit`; when `classes` is missing in the first call or changes later; and when
            `class_weight` is ``"balanced"``, which one part of the data cannot tell.
        """
        self._validate_params()
        if isinstance(self.class_weight, str):
            raise ValueError(
                f"class_weight={self.class_weight!r} cannot be found from part of the data. Give "
                "partial_fit the weights as a dict, or use sample_weight."
            )
        if classes is not None and (np.ndim(classes) == 0 or np.size(classes) == 0):
            raise ValueError(f"classes={classes!r} is no list of classes; pass a list or an array.")
        if hasattr(self, "weights_"):
            if classes is not None and not self._has_classes(classes):
                raise ValueError(
                    f"classes={classes!r} are not those of the first call, {self.classes_!r}."
                )
        elif classes is None and self._check_targets(y).ndim == 1:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        self._partial_fit(X, y, sample_weight, classes)
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict classes or labels.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, n_features)
            Adapters with the modules of `layout_`, or flat rows of it.

        Returns
        -------
        ndarray of shape (n_adapters,) or (n_adapters, n_labels)
            Classes, or an indicator matrix.

        Raises
        ------
        ValueError
            When `X` does not match what the estimator was fitted on.
        """
        return self._predictions(self._outputs(X))

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Predict probabilities.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, n_features)
            Adapters with the modules of `layout_`, or flat rows of it.

        Returns
        -------
        ndarray of shape (n_adapters, n_classes) or (n_adapters, n_labels)
            Probability of every class, or of every label to be present.

        Raises
        ------
        ValueError
            When `X` does not match what the estimator was fitted on.
        """
        return self._probabilities(self._outputs(X))

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """Predict logarithms of probabilities, also of those that round to zero.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, n_features)
            Adapters with the modules of `layout_`, or flat rows of it.

        Returns
        -------
        ndarray of shape (n_adapters, n_classes) or (n_adapters, n_labels)
            Logarithm of what `predict_proba` gives.

        Raises
        ------
        ValueError
            When `X` does not match what the estimator was fitted on.
        """
        logits = self._outputs(X)
        logarithms: NDArray[np.float64] = (
            log_expit(logits) if self.multilabel_ else log_softmax(logits, axis=1)
        )
        return logarithms

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Give the logits.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, n_features)
            Adapters with the modules of `layout_`, or flat rows of it.

        Returns
        -------
        ndarray of shape (n_adapters,), (n_adapters, n_classes) or (n_adapters, n_labels)
            For two classes, the log odds of the second.

        Raises
        ------
        ValueError
            When `X` does not match what the estimator was fitted on.
        """
        logits = self._outputs(X)
        if not self.multilabel_ and len(self.classes_) == 2:
            odds: NDArray[np.float64] = logits[:, 1] - logits[:, 0]
            return odds
        return logits

    def _predictions(self, logits: NDArray[np.float64]) -> NDArray[Any]:
        if self.multilabel_:
            return (logits > 0).astype(np.int64)
        predicted: NDArray[Any] = self.classes_[logits.argmax(axis=1)]
        return predicted

    def _probabilities(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        probabilities: NDArray[np.float64] = (
            expit(logits) if self.multilabel_ else softmax(logits, axis=1)
        )
        return probabilities

    @property
    def _loss(self) -> LossKind:
        return "binary_cross_entropy" if self.multilabel_ else "cross_entropy"

    @property
    def _n_outputs(self) -> int:
        return len(self.classes_)

    def _check_targets(self, y: Any) -> NDArray[Any]:
        y = check_array(y, ensure_2d=False, allow_nd=True, dtype=None, input_name="y")
        check_classification_targets(y)
        kind = type_of_target(y)
        if kind == "multiclass-multioutput":
            raise ValueError(
                "y is multiclass-multioutput, several classes for one adapter. Fit one classifier "
                "for each column, as sklearn.multioutput.MultiOutputClassifier does."
            )
        if kind == "multilabel-indicator" and not np.isin(y, (0, 1)).all():
            raise ValueError(
                f"y holds {np.unique(y).tolist()}, but an indicator matrix of labels holds 0 and 1."
            )
        targets: NDArray[Any] = y if kind == "multilabel-indicator" else column_or_1d(y, warn=True)
        return targets

    def _learn_targets(
        self, y: NDArray[Any], weights: NDArray[np.float64], classes: ArrayLike | None
    ) -> None:
        self.multilabel_ = y.ndim == 2
        if self.multilabel_:
            self.classes_ = np.arange(y.shape[1])
            if classes is not None and not self._has_classes(classes):
                raise ValueError(
                    f"classes={classes!r} are not the numbers of the {y.shape[1]} labels of y; "
                    "leave them out."
                )
            return
        self.classes_ = np.unique(y if classes is None else np.asarray(classes))
        seen = np.unique(y[weights > 0]) if classes is None else self.classes_
        if len(seen) < 2:
            raise ValueError(
                f"{type(self).__name__} needs adapters of at least two classes, but "
                f"{'y' if classes is None else 'classes'} holds one class only: "
                f"{seen.tolist()[0]!r}."
            )

    def _has_classes(self, classes: ArrayLike) -> bool:
        given = np.unique(classes)
        # `np.unique` of an indicator matrix gives its two values, and is what others expect.
        of_labels = self.multilabel_ and np.array_equal(given, [0, 1])
        return of_labels or np.array_equal(given, self.classes_)

    def _encode(
        self, y: NDArray[Any], weights: NDArray[np.float64]
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        expected = (len(y), len(self.classes_)) if self.multilabel_ else (len(y),)
        if y.shape != expected:
            wanted = f"{len(self.classes_)} labels" if self.multilabel_ else "one class per adapter"
            raise ValueError(
                f"y has shape {y.shape}, but the estimator was fitted on {wanted}. Give an array "
                f"of shape {expected}, or fit anew."
            )
        if self.multilabel_:
            return y.astype(np.float32), weights[:, None] * self._label_weights(y, weights)
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(
                f"y holds the classes {unknown.tolist()}, which are not among those fitted, "
                f"{self.classes_.tolist()}. Fit anew, or name all classes in the first partial_fit."
            )
        codes = np.searchsorted(self.classes_, y)
        if isinstance(self.class_weight, list):
            raise ValueError(
                "class_weight is a list, which is for multilabel y. Give a dict or 'balanced'."
            )
        per_class = _class_weights(self.class_weight, self.classes_, codes, weights)
        return codes, (weights * per_class[codes])[:, None]

    def _label_weights(self, y: NDArray[Any], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give the weights ``(N, n_labels)`` of presence and absence, label by label."""
        n_labels = y.shape[1]
        if self.class_weight is None or isinstance(self.class_weight, str):
            class_weights: list[Any] = [self.class_weight] * n_labels
        elif isinstance(self.class_weight, list) and len(self.class_weight) == n_labels:
            class_weights = self.class_weight
        else:
            raise ValueError(
                f"class_weight is {self.class_weight!r}; for {n_labels} labels give a list of as "
                "many dicts, or 'balanced'."
            )
        label_weights = np.ones(y.shape)
        for label, class_weight in enumerate(class_weights):
            codes = y[:, label].astype(np.intp)
            both = _class_weights(class_weight, np.array([0, 1]), codes, weights)
            label_weights[:, label] = both[codes]
        return label_weights

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


def _class_weights(
    class_weight: Any,
    classes: NDArray[Any],
    codes: NDArray[np.intp],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Give the weight of every class; when balanced, each counts by the weights of its adapters."""
    if class_weight != "balanced":
        given: NDArray[np.float64] = compute_class_weight(class_weight, classes=classes, y=classes)
        return given
    totals = np.bincount(codes, weights / weights.max(), len(classes))
    present = totals > 0
    per_class = np.ones(len(classes))
    per_class[present] = totals.sum() / (present.sum() * totals[present])
    return per_class


class NetRegressor(MultiOutputMixin, RegressorMixin, BaseNetEstimator):
    """One or many targets, standardised for the loss."""

    target_mean_: NDArray[np.float64]
    target_scale_: NDArray[np.float64]

    @atomic_fit
    def partial_fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Train for one epoch on these adapters, from the current weights.

        All rows are trained on, at a constant learning rate; the optimizer's moments are kept from
        call to call. The first call sets how features and targets are standardised.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, n_features)
            Adapters, or flat rows of `layout`.
        y : array-like of shape (n_adapters,) or (n_adapters, n_targets)
            Targets.
        sample_weight : array-like of shape (n_adapters,), optional
            Weights of the adapters in the loss, on the same scale in all calls.

        Returns
        -------
        self : object
            The estimator.

        Raises
        ------
        ValueError
            As for `fit`.
        """
        self._validate_params()
        self._partial_fit(X, y, sample_weight)
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Predict targets.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, n_features)
            Adapters with the modules of `layout_`, or flat rows of it.

        Returns
        -------
        ndarray of shape (n_adapters,) or (n_adapters, n_targets)
            As many dimensions as the `y` of `fit`.

        Raises
        ------
        ValueError
            When `X` does not match what the estimator was fitted on.
        """
        return self._predictions(self._outputs(X))

    def _predictions(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        outputs = outputs * self.target_scale_ + self.target_mean_
        return outputs if self.target_mean_.ndim else outputs[:, 0]

    @property
    def _loss(self) -> LossKind:
        return "squared_error"

    @property
    def _n_outputs(self) -> int:
        return self.target_mean_.size

    def _check_targets(self, y: Any) -> NDArray[Any]:
        targets: NDArray[Any] = check_array(
            y, ensure_2d=False, allow_nd=True, dtype=np.float64, input_name="y"
        )
        if targets.ndim > 2:
            raise ValueError(f"y has shape {targets.shape}; give (n_adapters,) or (n_adapters, k).")
        return targets

    def _learn_targets(
        self, y: NDArray[Any], weights: NDArray[np.float64], classes: ArrayLike | None
    ) -> None:
        # Zeros would change the order in which numpy adds.
        y, weights = y[weights > 0], weights[weights > 0]
        with np.errstate(over="ignore", invalid="ignore"):
            self.target_mean_ = np.asarray(np.average(y, axis=0, weights=weights))
            variance = np.asarray(np.average((y - self.target_mean_) ** 2, axis=0, weights=weights))
        if not np.isfinite(variance).all():
            raise ValueError(
                "the mean and spread of y, weighted by sample_weight, overflow: rescale them."
            )
        # A constant target, up to rounding, has no scale of its own.
        rounding = 100 * np.finfo(np.float64).eps * np.abs(self.target_mean_)
        scale = np.sqrt(variance)
        self.target_scale_ = np.where(scale > rounding, scale, 1.0)

    def _encode(
        self, y: NDArray[Any], weights: NDArray[np.float64]
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        if y.shape[1:] != self.target_mean_.shape:
            raise ValueError(
                f"y has shape {y.shape}, but the estimator was fitted on targets of shape "
                f"{('n_adapters', *self.target_mean_.shape)}. Give as many columns."
            )
        encoded = (y - self.target_mean_) / self.target_scale_
        return encoded.reshape(len(y), -1).astype(np.float32), weights[:, None]
