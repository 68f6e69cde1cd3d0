"""Model files, which the command line reads, from pipelines that were fitted in Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sklearn.base import is_regressor
from sklearn.pipeline import Pipeline

from sklora._files import check_place
from sklora._pipelines import check_pipeline, layout_of, n_outputs_of, rebuilt
from sklora._saved import (
    ModelCard,
    check_skops,
    columns_of,
    optional_parts,
    read_model,
    write_model,
)
from sklora._untrusted import Refusal, counted, shown
from sklora.architectures import ARCHITECTURES
from sklora.collection import LoRACollection
from sklora.estimators import GLNetClassifier, GLNetRegressor
from sklora.inspection._architectures import architecture_name
from sklora.io._plan import ReadOptions


def save_model(
    model: Pipeline,
    path: str | os.PathLike[str],
    X: LoRACollection,
    *,
    targets: str | Sequence[str],
) -> None:
    """Write a fitted pipeline as a file for ``sklora predict`` and :func:`load_model`.

    The file appears under its name when it is complete, and was read once to see that it can be.

    Parameters
    ----------
    model : sklearn.pipeline.Pipeline
        From :func:`~sklora.make_architecture`, fitted on adapters, or `best_estimator_` of a search
        over such: the step ``features`` is a featurizer of sklora or ``"passthrough"``, and the
        step ``model`` a network of sklora; or both are those of the last entry of
        :func:`~sklora.architecture_grid`, whose kernel brings all training adapters into the file.
        Its `memory` is not stored.
    path : str or path-like
        Where to write.
    X : LoRACollection
        The adapters that it was fitted on. The file says how many they are, and which modules some
        of them lack: ``sklora predict`` refuses adapters that lack any other.
    targets : str or sequence of str
        What is predicted: one name for each label of multilabel classification and each number of
        multi-output regression, otherwise one. ``sklora predict`` names its columns so.

    Raises
    ------
    ModuleNotFoundError
        When skops is missing.
    sklearn.exceptions.NotFittedError
        When `model` is not fitted.
    ValueError
        When `model` is no such pipeline, holds objects that are not sklora's, or has classes that
        are neither integers nor text; when `X` is of other modules; when `targets` are too many,
        too few or not different; or when `path` is a folder.
    OSError
        When the file cannot be written.

    See Also
    --------
    load_model : Read the file.
    model_card : A page about the model, for people.

    Examples
    --------
    >>> import tempfile
    >>> from sklora import make_architecture
    >>> from sklora.datasets import load_digits_loras
    >>> from sklora.deployment import load_model, save_model
    >>> zoo = load_digits_loras()
    >>> X, y = zoo.data[:40], zoo.loss[:40]
    >>> model = make_architecture("svd", "regression", random_state=0)
    >>> _ = model.set_params(model__max_epochs=1).fit(X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(model, f"{folder}/loss.skops", X, targets="loss")
    ...     loaded = load_model(f"{folder}/loss.skops")
    >>> bool((loaded.predict(X) == model.predict(X)).all())
    True
    """
    check_skops()
    place = os.fspath(path)
    check_place(place, f"path={place!r}")
    card = _card(model, X, (targets,) if isinstance(targets, str) else tuple(targets))
    try:
        write_model(place, rebuilt(model), card, check=True)
    except Refusal as error:
        raise ValueError(
            f"model has no place in a model file: {error} Leave out what is not sklora's, such as "
            "callbacks, a RandomState or a torch.device, by set_params, or store the pipeline with "
            "skops.io.dump."
        ) from None


def load_model(path: str | os.PathLike[str]) -> Pipeline:
    """Read a file of :func:`save_model` or ``sklora fit``, which nobody needs to vouch for.

    No code of the file is run. Before anything is built, sizes are checked, and that nothing in it
    is compressed or built twice; afterwards, that the pipeline is what the file says, and answers.
    Whether its answers are right cannot be checked.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    sklearn.pipeline.Pipeline
        With the steps ``features`` and ``model``. The layout of the adapters that it takes is
        `layout_` of the first step that is not ``"passthrough"``; with a kernel, that of
        ``["features"]["kernel"]``.

    Raises
    ------
    ModuleNotFoundError
        When skops is missing.
    ValueError
        When the file is no such model, is damaged, or holds other types than a model needs.
    OSError
        When it cannot be opened.

    Warns
    -----
    VersionWarning
        When another minor version of sklora wrote it.

    See Also
    --------
    save_model : Write the file.

    Examples
    --------
    >>> import tempfile
    >>> from sklora import make_architecture
    >>> from sklora.datasets import load_digits_loras
    >>> from sklora.deployment import load_model, save_model
    >>> from sklora.io import read_adapters, write_adapter
    >>> zoo = load_digits_loras()
    >>> X, y = zoo.data[:40], zoo.loss[:40]
    >>> model = make_architecture("svd", "regression", random_state=0)
    >>> _ = model.set_params(model__max_epochs=1).fit(X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(model, f"{folder}/loss.skops", X, targets="loss")
    ...     write_adapter(f"{folder}/upload", X[0])
    ...     loaded = load_model(f"{folder}/loss.skops")
    ...     upload = read_adapters(f"{folder}/upload", layout=loaded["features"].layout_)
    ...     loaded.predict(upload).shape
    (1,)
    """
    return read_model(path)[0]


def _card(model: Any, X: Any, targets: tuple[str, ...]) -> ModelCard:
    check_pipeline(model)
    if not isinstance(X, LoRACollection):
        raise ValueError(
            f"X is of type {type(X).__name__}; pass the LoRACollection that model was fitted on."
        )
    layout, estimator = layout_of(model), model["model"]
    if layout.has_plain_rows:
        raise ValueError(
            "model was fitted on plain rows, which no adapter file has; fit it on a LoRACollection."
        )
    layout.check_same_modules(X.layout)
    n_outputs = n_outputs_of(estimator)
    classes, n_targets = (None, n_outputs) if n_outputs else (_classes(estimator), 1)
    if len(targets) != n_targets or not all(isinstance(name, str) for name in targets):
        raise ValueError(
            f"targets is {list(targets)!r}; model predicts {counted(n_targets, 'value')} of each "
            "adapter, so give as many names."
        )
    probabilities = hasattr(model, "predict_proba")
    columns_of(targets, classes, probabilities)
    return ModelCard(
        task="regression" if is_regressor(estimator) else "classification",
        targets=targets,
        classes=classes,
        architecture=_architecture(model),
        layout=layout,
        probabilities=probabilities,
        optional=optional_parts(X),
        reading=ReadOptions(),
        n_adapters=len(X),
    )


def _classes(estimator: Any) -> tuple[str | int, ...]:
    """Give the classes as JSON has them."""
    classes = estimator.classes_.tolist()
    # Those of a pandas Series may be of NumPy's own type of text.
    if {str if isinstance(one, str) else type(one) for one in classes} not in ({str}, {int}):
        raise ValueError(
            f"model has the classes {shown(classes)}, but a model file holds integers or text; fit "
            "it on such."
        )
    return tuple(classes)


def _architecture(model: Pipeline) -> str:
    name = architecture_name(model, {}).removesuffix(" (kernel)")
    if name in ARCHITECTURES:
        return name
    # Other features before a network, such as projected factors.
    return "gl-net" if isinstance(model["model"], (GLNetClassifier, GLNetRegressor)) else "mlp"
