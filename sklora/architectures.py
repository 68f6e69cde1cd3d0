"""The paper's five architectures as scikit-learn Pipelines, and a grid over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline

from sklora._base import check_option
from sklora.estimators import GLNetClassifier, GLNetRegressor, MLPNetClassifier, MLPNetRegressor
from sklora.transform import DenseProduct, OAlign, SVDSpectrum, UpdateKernel

__all__ = ["ARCHITECTURES", "architecture_grid", "make_architecture"]

ARCHITECTURES = ("mlp", "o-align", "svd", "dense", "gl-net")
Task = Literal["classification", "regression"]

# Of kernels whose diagonal is 1.
_RIDGE_ALPHAS = (0.01, 0.1, 1.0)
_MODELS: dict[str, dict[str, type[BaseEstimator]]] = {
    "classification": {"mlp": MLPNetClassifier, "gl-net": GLNetClassifier},
    "regression": {"mlp": MLPNetRegressor, "gl-net": GLNetRegressor},
}


def make_architecture(
    architecture: str,
    task: Task = "classification",
    *,
    device: str | torch.device = "auto",
    random_state: int | None = None,
    memory: Any = None,
    verbose: int = 0,
) -> Pipeline:
    """Build one of the five architectures of the paper (section 3).

    Parameters
    ----------
    architecture : {"mlp", "o-align", "svd", "dense", "gl-net"}
        ``mlp``, a multilayer perceptron on the flat factors; ``o-align``, on factors aligned to a
        template; ``svd``, on the singular values of every update; ``dense``, on the entries of
        every update; ``gl-net``, equivariant layers on the factors and an invariant head.
    task : {"classification", "regression"}, default="classification"
        What the model predicts. Classes may be binary, many, or label indicators.
    device : str or torch.device, default="auto"
        Where both steps compute; ``"auto"`` takes CUDA where there is one.
    random_state : int or None, default=None
        Seed of the template, the initial weights, the batches and the validation rows.
    memory : str, joblib.Memory or None, default=None
        Where the Pipeline caches its fitted features.
    verbose : int, default=0
        Of both steps: with 1 or more there are progress bars, where standard error is a terminal.

    Returns
    -------
    sklearn.pipeline.Pipeline
        With the steps ``features`` and ``model``.

    Raises
    ------
    ValueError
        When `architecture` or `task` is none of these.

    Examples
    --------
    >>> from sklora import make_architecture
    >>> make_architecture("svd").named_steps["features"]
    SVDSpectrum()
    """
    check_option("task", task, _MODELS)
    steps = _steps(architecture, task, device, random_state)
    model = Pipeline(list(steps.items()), memory=memory)
    set_all(model, verbose=verbose)
    return model


def estimators_of(model: Pipeline) -> Iterator[BaseEstimator]:
    """Give the estimators of a pipeline, and of the pipelines in it, in their order."""
    for step in model.named_steps.values():
        if isinstance(step, Pipeline):
            yield from estimators_of(step)
        elif step != "passthrough":
            yield step


def set_all(model: Pipeline, **parameters: Any) -> None:
    """Set parameters of those estimators of a pipeline that have them."""
    for step in estimators_of(model):
        step.set_params(**{name: parameters[name] for name in parameters if hasattr(step, name)})


def architecture_grid(
    task: Task = "classification",
    *,
    device: str | torch.device = "auto",
    random_state: int | None = None,
) -> list[dict[str, list[Any]]]:
    """Build a grid over the five architectures, for one search to choose from.

    Parameters
    ----------
    task : {"classification", "regression"}, default="classification"
        What the models predict.
    device : str or torch.device, default="auto"
        As for :func:`make_architecture`.
    random_state : int or None, default=None
        As for :func:`make_architecture`.

    Returns
    -------
    list of dict
        A `param_grid` for a Pipeline of :func:`make_architecture`: one entry for each architecture,
        in the order of `ARCHITECTURES`, and a last one for the other route of ``dense``. Add lists
        such as ``model__lr`` to an entry to search its hyperparameters too.

    Raises
    ------
    ValueError
        When `task` is neither.

    Notes
    -----
    What a perceptron learns from the entries of all updates, a kernel learns from their inner
    products, in seconds and however large the modules are. The last entry is ridge regression with
    the cosine of :class:`UpdateKernel` and an intercept, for some `alpha`: kernel principal
    components, all of them, are what makes the kernel an input for scikit-learn's ridge models,
    which take every kind of target. They have no `predict_proba`: a score that needs probabilities
    leaves this entry out. It does not read side features.

    Of several labels, give the search a `scoring` that counts single ones. By default all labels of
    an adapter have to be right, which of few adapters none are; of equal scores the first wins.

    Examples
    --------
    >>> from sklora import ARCHITECTURES, architecture_grid
    >>> grid = architecture_grid("regression")
    >>> [type(entry["features"][0]).__name__ for entry in grid]
    ['str', 'OAlign', 'SVDSpectrum', 'DenseProduct', 'str', 'Pipeline']
    >>> grid[-1]["features"][0]
    Pipeline(steps=[('kernel', UpdateKernel(kernel='cosine')),
                    ('span', KernelPCA(kernel='precomputed'))])
    """
    check_option("task", task, _MODELS)
    grid = [
        {name: [step] for name, step in _steps(architecture, task, device, random_state).items()}
        for architecture in ARCHITECTURES
    ]
    return [*grid, _kernel_entry(task, device)]


def _kernel_entry(task: Task, device: str | torch.device) -> dict[str, list[Any]]:
    # Nothing else needs these two, which would lengthen the import of sklora.
    from sklearn.decomposition import KernelPCA
    from sklearn.linear_model import Ridge, RidgeClassifier

    ridge = RidgeClassifier() if task == "classification" else Ridge()
    kernel = UpdateKernel("cosine", device=device)
    features = Pipeline([("kernel", kernel), ("span", KernelPCA(kernel="precomputed"))])
    return {
        "features": [features],
        "model": [ridge],
        "model__alpha": list(_RIDGE_ALPHAS),
    }


def _steps(
    architecture: str, task: Task, device: str | torch.device, random_state: int | None
) -> dict[str, Any]:
    check_option("architecture", architecture, ARCHITECTURES)
    features: Any = {
        "o-align": OAlign(random_state=random_state, device=device),
        "svd": SVDSpectrum(device=device),
        "dense": DenseProduct(random_state=random_state, device=device),
    }.get(architecture, "passthrough")
    model = _MODELS[task]["gl-net" if architecture == "gl-net" else "mlp"]
    return {"features": features, "model": model(device=device, random_state=random_state)}
