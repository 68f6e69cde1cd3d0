"""What a model file may hold; the files are in test_saved.py."""

import numpy as np
import pytest
from sklearn.preprocessing import FunctionTransformer

from sklora._pipelines import fits, rebuilt
from sklora.architectures import set_all
from tests.stored import assert_same_answers, card_of, fitted


@pytest.fixture
def loras(rng, random_loras):
    return random_loras(rng, 12)


def is_refused(model, card) -> bool:
    try:
        return not fits(model, card)
    except Exception:
        return True


class TestNets:
    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            ("multiclass", {"n_outputs_": 7}),
            ("multiclass", {"multilabel_": True}),
            ("multilabel", {"multilabel_": False}),
            ("one number", {"target_mean_": np.zeros(2), "target_scale_": np.ones(2)}),
            ("one number", {"target_mean_": None}),
            ("one number", {"target_mean_": np.array("zero")}),
            ("one number", {"target_mean_": np.array(1j)}),
            ("two numbers", {"target_scale_": np.ones((2, 1))}),
            # Outputs are checked before they are scaled.
            ("two numbers", {"target_scale_": np.array([1.0, np.nan])}),
            ("two numbers", {"target_scale_": np.array([1.0, np.inf])}),
        ],
        ids=str,
    )
    def test_what_outputs_mean(self, loras, kind, changes):
        model = fitted(loras, "gl-net", kind)
        card = card_of(model, kind, architecture="gl-net")
        assert fits(model, card)
        vars(model["model"]).update(changes)
        assert is_refused(model, card)

    @pytest.mark.parametrize("classes", ["ab", "abcd"])
    def test_classes_that_no_output_is_for(self, loras, classes):
        model = fitted(loras, "gl-net")
        model["model"].classes_ = np.array(list(classes))
        assert is_refused(model, card_of(model, architecture="gl-net"))

    def test_classifier_of_numbers_is_no_regressor(self, loras):
        model = fitted(loras)
        model["model"].classes_ = np.arange(3.0)
        assert is_refused(model, card_of(model, task="regression", classes=None))

    @pytest.mark.parametrize(
        ("architecture", "changes"),
        [
            ("svd", {"n_layers": 10**12}),
            ("gl-net", {"n_layers": 10**12}),
            # At this width, every module is a block of its own.
            ("gl-net", {"groups": ((10**12, 8, 6),), "hidden_dim": 2**11}),
        ],
        ids=str,
    )
    def test_sizes_that_no_weights_are_for(self, loras, architecture, changes):
        """They are refused before anything is built of them."""
        model = fitted(loras, architecture)
        model["model"].architecture_ |= changes
        assert not fits(model, card_of(model, architecture=architecture))


class TestKernelRoute:
    @pytest.fixture(params=["multiclass", "multilabel", "two numbers"])
    def kind(self, request):
        return request.param

    @pytest.fixture
    def model(self, loras, kind):
        return fitted(loras, "kernel", kind)

    @pytest.fixture
    def card(self, model, kind):
        return card_of(model, kind, architecture="dense")

    def test_fits(self, model, card):
        assert not card.probabilities
        assert fits(model, card)

    def test_threads_are_not_taken(self, model, card):
        model.set_params(features__kernel__n_jobs=10**12, features__span__n_jobs=10**12)
        assert fits(model, card)
        assert model["features"]["kernel"].n_jobs is model["features"]["span"].n_jobs is None

    def test_no_cache_is_taken(self, model, loras):
        model.set_params(features__memory="/tmp")
        one = rebuilt(model)
        assert one["features"].memory is None
        assert_same_answers(one, model, loras)

    def test_device(self, model, card):
        """One of another machine does not keep a model from being read."""
        set_all(model, device="cuda:99")
        assert model["features"]["kernel"].device == "cuda:99"
        assert fits(model, card)
        assert model["features"]["kernel"].device == "cuda:99"

    @pytest.mark.parametrize("targets", [("a",), ("a", "b", "c")])
    @pytest.mark.parametrize("kind", ["multilabel", "two numbers"], indirect=True)
    def test_other_numbers_of_targets(self, model, kind, targets):
        assert is_refused(model, card_of(model, kind, targets=targets))

    @pytest.mark.parametrize(
        ("where", "name", "value"),
        [
            ("model", "coef_", np.zeros((3, 5))),
            ("model", "coef_", None),
            ("features__span", "eigenvectors_", np.zeros((12, 3))),
            ("features__span", "kernel", "poly"),
            ("features__span", "kernel", ["precomputed"]),
            ("features__span", "X_fit_", np.zeros((3, 3))),
            ("features__span", "_centerer", None),
        ],
    )
    def test_forged_attributes(self, model, card, where, name, value):
        setattr(model.get_params()[where], name, value)
        assert is_refused(model, card)

    @pytest.mark.parametrize("kind", ["multilabel"], indirect=True)
    @pytest.mark.parametrize(
        ("where", "name"), [("features__span", "_centerer"), ("model", "_label_binarizer")]
    )
    def test_parts_that_call_another_function(self, model, card, where, name):
        part = FunctionTransformer(pytest.fail, pytest.fail)
        part.y_type_ = "multilabel-indicator"
        setattr(model.get_params()[where], name, part)
        assert not fits(model, card)

    @pytest.mark.parametrize("kind", ["multiclass"], indirect=True)
    def test_classes(self, model, card):
        holders = [model["model"]._label_binarizer]
        if "classes_" in vars(model["model"]):  # before scikit-learn 1.9, those of the binarizer
            holders.append(model["model"])
        for classes in (np.array(["a", "b"]), np.array(["a", "b", "d"])):
            for holder in holders:
                holder.classes_ = classes
            assert is_refused(model, card)

    @pytest.mark.parametrize("kind", ["two numbers"], indirect=True)
    def test_numbers_that_are_not_finite(self, model, card):
        model["model"].intercept_ = np.array([0.0, np.nan])
        assert is_refused(model, card)
