"""What the tests of stored estimators and of model files share."""

import io

import joblib
import numpy as np
import skops.io
from sklearn.pipeline import Pipeline

from sklora import TRUSTED_TYPES, architecture_grid, make_architecture
from sklora._pipelines import layout_of
from sklora._saved import ModelCard
from sklora.io._plan import ReadOptions

TARGETS = {
    "binary": ("classification", lambda n: np.arange(n) % 2),
    "multiclass": ("classification", lambda n: np.array(["a", "b", "c"])[np.arange(n) % 3]),
    "multilabel": ("classification", lambda n: np.stack([np.arange(n) % 2, np.arange(n) // 6], 1)),
    "one number": ("regression", lambda n: np.linspace(0, 1, n)),
    "two numbers": ("regression", lambda n: np.linspace(0, 1, 2 * n).reshape(n, 2)),
}


def fitted(loras, architecture="svd", kind="multiclass"):
    """Fit for an epoch, or the kernel route of the grid."""
    task, targets = TARGETS[kind]
    if architecture == "kernel":
        steps = architecture_grid(task, device="cpu")[-1]
        model = Pipeline([(name, steps[name][0]) for name in ("features", "model")])
    else:
        model = make_architecture(architecture, task, random_state=0, device="cpu")
        model.set_params(model__max_epochs=1)
    return model.fit(loras, targets(len(loras)))


def card_of(model, kind="multiclass", **changes) -> ModelCard:
    """What a file says of it."""
    classes = model["model"].classes_ if TARGETS[kind][0] == "classification" else ()
    options = {
        "task": TARGETS[kind][0],
        "targets": ("first", "second") if kind in ("multilabel", "two numbers") else ("first",),
        "classes": tuple(classes.tolist()) if kind in ("binary", "multiclass") else None,
        "architecture": "svd",
        "layout": layout_of(model),
        "probabilities": hasattr(model, "predict_proba"),
        "optional": (),
        "reading": ReadOptions(keys=("a_{module}", "b_{module}"), scale=2.0),
        "n_adapters": 12,
        "scores": {"metric": "accuracy", "scores": {"svd": [0.5, 0.75]}},
    }
    return ModelCard(**{**options, **changes})


def by_skops(model):
    return skops.io.loads(skops.io.dumps(model), trusted=TRUSTED_TYPES)


def by_joblib(model):
    buffer = io.BytesIO()
    joblib.dump(model, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


def answers_of(model, X):
    methods = ("transform", "predict", "predict_proba", "decision_function")
    return {name: getattr(model, name)(X) for name in methods if hasattr(model, name)}


def assert_same_answers(one, other, X):
    """To the bit."""
    answers, expected = answers_of(one, X), answers_of(other, X)
    assert answers.keys() == expected.keys()
    assert answers
    for name, answer in answers.items():
        np.testing.assert_array_equal(answer, expected[name])
