"""Model cards of fitted searches."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from sklearn.base import is_regressor
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.utils.validation import check_is_fitted

import sklora
from sklora._untrusted import counted, printable
from sklora.collection import LoRALayout

if TYPE_CHECKING:
    from skops.card import Card

_NO_SKOPS = "model cards are made with skops, which is missing: pip install 'sklora[plot,secure]'."

_NO_MODEL = "%(name)s has no best_estimator_: pass a search that was fitted, with refit=True."

# Names may be those of files that nobody vouches for.
_MARKUP = str.maketrans({mark: f"&#{ord(mark)};" for mark in "&<>|`*[]"})

_LIMITS = """\
The scores are those of adapters like the ones of training: of this base model, from the same
kinds of data and recipes. They say nothing of adapters that were trained otherwise, and nothing of
those that were made to mislead the model. If runs on the same data lay on both sides of a fold,
the scores are too good. The best of many candidates was chosen by its score, which makes that score
a little too good as well."""

_START = """\
Store the model with `skops.io.dump(search.best_estimator_, "model.skops")`. To load and use it:

```python
import skops.io
import sklora
from sklora.io import read_adapters

model = skops.io.load("model.skops", trusted=sklora.TRUSTED_TYPES)
model.predict(read_adapters("adapters/", layout={layout}))
```

It reads the modules below, and refuses adapters that have none of them, and updates of other
shapes. Other modules of an adapter are not read, and one that it lacks counts as no update;
`read_adapters(..., strict=True)` refuses such adapters."""


def model_card(
    search: Any, chart: str | os.PathLike[str], *, targets: Sequence[str] | None = None
) -> Card:
    """Describe the best model of a fitted search, for those who are to use it.

    Parameters
    ----------
    search : GridSearchCV or another search
        Fitted, with `refit`, over :func:`~sklora.architecture_grid` or one pipeline.
    chart : str or path-like
        Where to draw the comparison of the architectures; its ending says the format. The card
        refers to it by its name alone: save the card in the same folder.
    targets : sequence of str or None, default=None
        What is predicted.

    Returns
    -------
    skops.card.Card
        With task, classes, layout, scores with spread and time, the chart, limits, how to load the
        model, and versions. ``card.save("README.md")`` writes it. Authors, contact and citation are
        yours to fill in, with ``card.add``.

    Raises
    ------
    ImportError
        When skops or matplotlib is missing.
    sklearn.exceptions.NotFittedError
        When the search is not fitted.
    ValueError
        When no part of the best model was fitted on adapters, or `targets` is a string.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklora import make_architecture
    >>> from sklora.datasets import load_digits_loras
    >>> from sklora.deployment import model_card
    >>> zoo = load_digits_loras()
    >>> model = make_architecture("svd", "regression", random_state=0)
    >>> search = GridSearchCV(model, {"model__max_epochs": [1, 2]}, cv=2)
    >>> _ = search.fit(zoo.data[:40], zoo.loss[:40])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     card = model_card(search, f"{folder}/scores.png", targets=["loss"])
    ...     card.save(f"{folder}/README.md")
    >>> print(card.select("Model description").content)
    A regression model for LoRA adapters, which predicts 'loss'...
    """
    try:
        from skops.card import Card
    except ModuleNotFoundError:
        raise ModuleNotFoundError(_NO_SKOPS) from None
    from sklora.inspection import ArchitectureComparisonDisplay
    from sklora.inspection._architectures import architecture_name
    from sklora.inspection._plotting import save_figure, windowless_axes

    check_is_fitted(search, "best_estimator_", msg=_NO_MODEL)
    if isinstance(targets, str):
        raise ValueError(f"targets is {targets!r}; give a list, {[targets]!r}.")
    model = search.best_estimator_
    layout, where = _layout_of(model)
    axes = windowless_axes("model_card")
    display = ArchitectureComparisonDisplay.from_estimator(search, ax=axes)
    display.figure_.set_size_inches(6.5, display._height())
    save_figure(display.figure_, chart)

    cv = f"`cv={search.cv!r}`"
    folds = f"{search.n_splits_} folds, {cv if len(cv) < 100 else 'of given splits'}."
    card = Card(model, model_diagram=False)
    card.delete("Model description/Training Procedure/Model Plot")
    parameters = card.select("Model description/Training Procedure/Hyperparameters")
    parameters.table = {
        column: [str(entry).translate(_MARKUP) for entry in entries]
        for column, entries in parameters.table.items()
    }
    description = {
        "Model description": _description(search, layout, targets),
        "Model description/Intended uses & limitations": _LIMITS,
        "Model description/Training Procedure": folds,
        "How to Get Started with the Model": _START.format(layout=where),
    }
    card.add(**description)
    results = "Model description/Evaluation Results"
    chosen = architecture_name(search.estimator, search.best_params_)
    score = f"Cross-validated {display.score_name}, higher is better. This model is {chosen!r}."
    card.add(**{results: score})
    card.add_table(**{f"{results}/Scores": _scores(display)})
    card.select(f"{results}/Scores").title = "Scores"  # skops takes the whole path for it
    card.add_plot(**{f"{results}/Comparison": quote(os.path.basename(chart))})
    card.add_table(folded=True, description=_about(layout), Modules=_modules(layout))
    card.add_table(Versions=_versions())
    return card


def _layout_of(model: Any) -> tuple[LoRALayout, str]:
    """Find what a model, or the first part of it that knows, was fitted on, and where."""
    pending = [(model, "model")]
    while pending:
        part, where = pending.pop(0)
        # Behind other steps, there are rows of features.
        if hasattr(part, "layout_") and not part.layout_.has_plain_rows:
            return part.layout_, f"{where}.layout_"
        if isinstance(part, (Pipeline, FeatureUnion)):
            steps = part.steps if isinstance(part, Pipeline) else part.transformer_list
            pending = [(step, f'{where}["{name}"]') for name, step in steps] + pending
        elif hasattr(part, "regressor_"):  # of TransformedTargetRegressor
            pending.insert(0, (part.regressor_, f"{where}.regressor_"))
    raise ValueError(
        f"no part of {type(model).__name__} was fitted on adapters; search over pipelines in which "
        "an estimator of sklora reads a LoRACollection."
    )


def _description(search: Any, layout: LoRALayout, targets: Sequence[str] | None) -> str:
    task = "regression" if is_regressor(search) else "classification"
    model = search.best_estimator_
    model = model[-1] if isinstance(model, Pipeline) else model
    # Of labels, `classes_` holds the places.
    is_multilabel = getattr(model, "multilabel_", targets is not None and len(targets) > 1)
    if is_multilabel and task == "classification":
        task = "multilabel classification"
    text = f"A {task} model for LoRA adapters"
    if targets is not None and len(targets):
        text += f", which predicts {', '.join(map(_quoted, targets))}"
    if layout.base_model is not None:
        text += f". The adapters are of the base model {_quoted(layout.base_model)}"
    classes = getattr(search, "classes_", None)
    if isinstance(classes, np.ndarray) and not is_multilabel:
        text += f". Classes: {', '.join(map(_quoted, classes.tolist()))}"
    return text + "."


def _quoted(name: object) -> str:
    return repr(str(name) if isinstance(name, str) else name).translate(_MARKUP)


def _scores(display: Any) -> dict[str, list[Any]]:
    [scores], [times] = display.scores.values(), display.fit_times.values()
    best_first = sorted(scores, key=lambda name: -np.mean(scores[name]))
    return {
        "architecture": best_first,
        "mean": [f"{np.mean(scores[name]):.3f}" for name in best_first],
        "standard deviation over folds": [
            f"{np.std(scores[name], ddof=1):.3f}" if len(scores[name]) > 1 else "one fold"
            for name in best_first
        ],
        "seconds for one fit": [f"{times[name]:.2f}" for name in best_first],
    }


def _about(layout: LoRALayout) -> str:
    side = f", and {counted(layout.n_side, 'column')} of side features" if layout.n_side else ""
    base_model = "not named" if layout.base_model is None else _quoted(layout.base_model)
    return (
        f"Base model: {base_model}. {counted(layout.n_modules, 'module')}{side}. Every "
        "update is `U V^T`, `U (n, rank)` and `V (m, rank)`; ranks are the largest of training."
    )


def _modules(layout: LoRALayout) -> dict[str, list[Any]]:
    names, *numbers = map(list, zip(*layout.modules, strict=True))
    columns = [[printable(name).translate(_MARKUP) for name in names], *numbers]
    return dict(zip(("module", "n", "m", "rank"), columns, strict=True))


def _versions() -> dict[str, list[str]]:
    packages = ("scikit-learn", "torch", "numpy", "skops")
    versions = {"sklora": sklora.__version__, "Python": platform.python_version()}
    versions |= {name: version(name) for name in packages}
    return {"package": list(versions), "version": list(versions.values())}
