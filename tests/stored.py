"""What the tests of stored estimators and of model files share."""

import io

import joblib
import numpy as np
import skops.io

from sklora import TRUSTED_TYPES, make_architecture

TARGETS = {
    "binary": ("classification", lambda n: np.arange(n) % 2),
    "multiclass": ("classification", lambda n: np.array(["a", "b", "c"])[np.arange(n) % 3]),
    "multilabel": ("classification", lambda n: np.stack([np.arange(n) % 2, np.arange(n) // 6], 1)),
    "one number": ("regression", lambda n: np.linspace(0, 1, n)),
    "two numbers": ("regression", lambda n: np.linspace(0, 1, 2 * n).reshape(n, 2)),
}


def fitted(loras, architecture="svd", kind="multiclass"):
    """Fit for an epoch."""
    task, targets = TARGETS[kind]
    model = make_architecture(architecture, task, random_state=0, device="cpu")
    return model.set_params(model__max_epochs=1).fit(loras, targets(len(loras)))


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
