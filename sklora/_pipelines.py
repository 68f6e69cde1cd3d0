"""Pipelines that a model file may hold: what they are made of, and what is checked of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import is_classifier, is_regressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import KernelCenterer, LabelBinarizer
from sklearn.utils.validation import check_is_fitted

from sklora._stores import check_memory
from sklora.architectures import estimators_of, set_all
from sklora.collection import LoRACollection, LoRALayout
from sklora.estimators import GLNetClassifier, GLNetRegressor, MLPNetClassifier, MLPNetRegressor
from sklora.transform import (
    DenseProduct,
    GLEquivariantProjection,
    OAlign,
    SVDSpectrum,
    UpdateKernel,
)

if TYPE_CHECKING:
    from sklora._saved import ModelCard

_FEATURIZERS = (DenseProduct, GLEquivariantProjection, OAlign, SVDSpectrum)
NETS = (GLNetClassifier, GLNetRegressor, MLPNetClassifier, MLPNetRegressor)

TRUSTED_TYPES: tuple[str, ...] = tuple(
    sorted(
        f"{type.__module__}.{type.__qualname__}"
        for type in (*_FEATURIZERS, *NETS, LoRALayout, UpdateKernel)
    )
)

_NOT_HELD = (
    "the step {!r} of model is of type {}, but a model file holds featurizers and networks of "
    "sklora, or the kernel route of architecture_grid; store this one with skops.io.dump."
)


def check_pipeline(model: Any) -> None:
    """Check that a model is one for a model file, and fitted.

    Raises
    ------
    ValueError
        When it is no pipeline of a featurizer and a network of sklora, and not the kernel route.
    sklearn.exceptions.NotFittedError
        When its last step is not fitted.
    """
    if not isinstance(model, Pipeline) or [*model.named_steps] != ["features", "model"]:
        raise ValueError(
            f"model is of type {type(model).__name__}, but a model file holds a Pipeline with the "
            "steps 'features' and 'model'; pass one of make_architecture, or best_estimator_ of a "
            "search over such."
        )
    features, estimator = model.named_steps.values()
    if _is_kernel_features(features):
        is_held = _is_ridge(estimator)
    elif features == "passthrough" or isinstance(features, _FEATURIZERS):
        is_held = isinstance(estimator, NETS)
    else:
        raise ValueError(_NOT_HELD.format("features", type(features).__name__))
    if not is_held:
        raise ValueError(_NOT_HELD.format("model", type(estimator).__name__))
    check_is_fitted(estimator)


# Only these need the two modules, which would lengthen the import of sklora.
def _is_kernel_features(features: Any) -> bool:
    from sklearn.decomposition import KernelPCA

    if not isinstance(features, Pipeline) or [*features.named_steps] != ["kernel", "span"]:
        return False
    kernel, span = features.named_steps.values()
    is_kernel = isinstance(kernel, UpdateKernel) and isinstance(span, KernelPCA)
    return is_kernel and isinstance(span.kernel, str) and span.kernel == "precomputed"


def _is_ridge(estimator: Any) -> bool:
    from sklearn.linear_model import Ridge, RidgeClassifier

    return isinstance(estimator, (Ridge, RidgeClassifier))


def rebuilt(model: Pipeline, change: Callable[[Any], Any] = lambda step: step) -> Pipeline:
    """Give a pipeline of the same steps, of which nothing else is taken: a cache could run code."""
    return Pipeline(
        [
            (name, rebuilt(step, change) if isinstance(step, Pipeline) else change(step))
            for name, step in model.steps
        ]
    )


def layout_of(model: Pipeline) -> LoRALayout:
    """Give the layout that a fitted pipeline takes."""
    layout: LoRALayout = next(estimators_of(model)).layout_
    return layout


def n_outputs_of(estimator: Any) -> int:
    """Count the labels or numbers that a fitted last step gives; 0 if it gives one class."""
    if is_classifier(estimator) and not _is_multilabel(estimator):
        return 0
    if isinstance(estimator, NETS):
        return int(estimator.n_outputs_)
    return len(np.atleast_2d(estimator.coef_))


def _is_multilabel(estimator: Any) -> bool:
    if isinstance(estimator, NETS):
        return bool(estimator.multilabel_)
    return bool(estimator._label_binarizer.y_type_.startswith("multilabel"))


def fits(model: Any, card: ModelCard) -> bool:
    """Tell whether a model is what its card says; it is left without `n_jobs`.

    Anything may be raised where it is no such pipeline, or an attribute is not what it has to be.
    """
    check_pipeline(model)
    estimator = model["model"]
    if model.memory is not None or layout_of(model) != card.layout:
        return False
    if is_regressor(estimator) != (card.task == "regression"):
        return False
    if hasattr(model, "predict_proba") != card.probabilities:
        return False
    if n_outputs_of(estimator) != (len(card.targets) if card.classes is None else 0):
        return False
    set_all(model, n_jobs=None)  # a forged one may start any number of threads, or never end
    if card.classes is not None and estimator.classes_.tolist() != list(card.classes):
        return False
    is_whole = _has_weights_for(estimator) if isinstance(estimator, NETS) else _has_own_parts(model)
    return is_whole and _answers(model, card)


def _has_weights_for(estimator: Any) -> bool:
    """Tell whether a forged number cannot ask for more layers than a file has weights."""
    architecture, weights = estimator.architecture_, estimator.weights_
    n_modules = sum(n_members for n_members, _, _ in architecture.get("groups", ()))
    if n_modules and n_modules != len(weights["module_scale"]):
        return False
    return bool(architecture["n_layers"] <= len(weights))


def _has_own_parts(model: Pipeline) -> bool:
    """Tell whether scikit-learn's steps call their own parts; forged ones may be any estimator."""
    is_own = type(model["features"]["span"]._centerer) is KernelCenterer
    if is_classifier(model["model"]):
        is_own = is_own and type(model["model"]._label_binarizer) is LabelBinarizer
    return is_own


def _answers(model: Pipeline, card: ModelCard) -> bool:
    """Tell whether a model predicts what its card says, of an adapter without any updates.

    Anything may be raised where an attribute is missing, or is not what it has to be.
    """
    # A copy of its steps, for a device that is named may be that of another machine.
    trial = rebuilt(model, copy.copy)
    set_all(trial, device="cpu")
    check_memory(1, card.layout.width, np.dtype(np.float64))
    X = LoRACollection.from_array(np.zeros((1, card.layout.width)), card.layout)
    n_values = 1 if card.classes is not None else len(card.targets)
    predicted = trial.predict(X)
    if card.task == "regression":
        is_right = predicted.size == n_values and predicted.dtype == np.float64
        return bool(is_right and np.isfinite(predicted).all())
    n_shares = len(card.classes or card.targets)
    shares = trial.predict_proba(X) if card.probabilities else np.empty(n_shares)
    return bool(predicted.size == n_values and shares.size == n_shares)
