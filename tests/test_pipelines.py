"""The kernel route in a model file; that of networks is in test_saved.py."""

import numpy as np
import pytest
from sklearn.preprocessing import FunctionTransformer

from sklora._pipelines import fits, rebuilt, set_device
from tests.stored import assert_same_answers, card_of, fitted


@pytest.fixture
def loras(rng, random_loras):
    return random_loras(rng, 12)


@pytest.fixture(params=["multiclass", "multilabel", "two numbers"])
def kind(request):
    return request.param


@pytest.fixture
def model(loras, kind):
    return fitted(loras, "kernel", kind)


@pytest.fixture
def card(model, kind):
    return card_of(model, kind, architecture="dense")


def is_refused(model, card) -> bool:
    try:
        return not fits(model, card)
    except Exception:
        return True


def test_fits(model, card):
    assert not card.probabilities
    assert fits(model, card)


def test_threads_are_not_taken(model, card):
    model.set_params(features__kernel__n_jobs=10**12, features__span__n_jobs=10**12)
    assert fits(model, card)
    assert model["features"]["kernel"].n_jobs is model["features"]["span"].n_jobs is None


def test_no_cache_is_taken(model, loras):
    model.set_params(features__memory="/tmp")
    one = rebuilt(model)
    assert one["features"].memory is None
    assert_same_answers(one, model, loras)


def test_device(model, card):
    """One of another machine does not keep a model from being read."""
    set_device(model, "cuda:99")
    assert model["features"]["kernel"].device == "cuda:99"
    assert fits(model, card)
    assert model["features"]["kernel"].device == "cuda:99"


@pytest.mark.parametrize("targets", [("a",), ("a", "b", "c")])
@pytest.mark.parametrize("kind", ["multilabel", "two numbers"], indirect=True)
def test_other_numbers_of_targets(model, kind, targets):
    assert is_refused(model, card_of(model, kind, targets=targets))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("model", "coef_", np.zeros((3, 5))),
        ("model", "coef_", None),
        ("model", "coef_", np.empty((2**36, 0))),
        ("features__span", "eigenvectors_", np.zeros((12, 3))),
        ("features__span", "kernel", "poly"),
        ("features__span", "kernel", ["precomputed"]),
        ("features__span", "X_fit_", np.zeros((3, 3))),
        ("features__span", "_centerer", None),
        ("features__kernel", "gamma_", np.empty(2**36, "V0")),
    ],
)
def test_forged_attributes(model, card, where, name, value):
    setattr(model.get_params()[where], name, value)
    assert is_refused(model, card)


@pytest.mark.parametrize("kind", ["multilabel"], indirect=True)
@pytest.mark.parametrize(
    ("where", "name"), [("features__span", "_centerer"), ("model", "_label_binarizer")]
)
def test_parts_that_call_another_function(model, card, where, name):
    part = FunctionTransformer(pytest.fail, pytest.fail)
    part.y_type_ = "multilabel-indicator"
    setattr(model.get_params()[where], name, part)
    assert not fits(model, card)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["multiclass"], indirect=True)
def test_classes(model, card):
    holders = [model["model"]._label_binarizer]
    if "classes_" in vars(model["model"]):  # before scikit-learn 1.9, those of the binarizer
        holders.append(model["model"])
    for classes in (np.array(["a", "b"]), np.array(["a", "b", "d"]), np.empty(2**36, "V0")):
        for holder in holders:
            holder.classes_ = classes
        assert is_refused(model, card)


@pytest.mark.parametrize("kind", ["two numbers"], indirect=True)
def test_numbers_that_are_not_finite(model, card):
    model["model"].intercept_ = np.array([0.0, np.nan])
    assert is_refused(model, card)
