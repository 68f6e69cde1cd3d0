"""What networks refuse, and that they stay as they were."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback

from sklora.collection import LoRACollection, LoRALayout


class TestBadInput:
    @pytest.fixture
    def fitted(self, case, zoo, quick):
        return quick(case[0]).fit(zoo, case[1])

    def assert_unchanged_by(self, model, zoo, message, method, *arguments, **parameters):
        before, predictions = copy.deepcopy(vars(model)), model._outputs(zoo)
        with pytest.raises(ValueError, match=message):
            getattr(model, method)(*arguments, **parameters)
        assert vars(model).keys() == before.keys()
        for name, weight in model.weights_.items():
            np.testing.assert_array_equal(weight, before["weights_"][name])
        np.testing.assert_array_equal(model._outputs(zoo), predictions)

    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_nan_and_infinity(self, fitted, case, zoo, method, value):
        flat = np.asarray(zoo).copy()
        flat[7, zoo.layout.factor_slices[1][0].start] = value
        bad = LoRACollection.from_array(flat, zoo.layout)
        message = "adapter 7 has NaN or infinity in module 'k'"
        self.assert_unchanged_by(fitted, zoo, message, method, bad, case[1])
        with pytest.raises(ValueError, match=message):
            fitted.predict(bad)

    def test_numbers_so_large_that_outputs_are_not_finite(self, fitted, zoo):
        """No class, rather than the first one."""
        flat = np.asarray(zoo).copy()
        flat[7] *= 1e200
        bad = LoRACollection.from_array(flat, zoo.layout, ids=[f"a{i}" for i in range(60)])
        with pytest.raises(ValueError, match=r"for adapter 'a7' are NaN or infinite"):
            fitted.predict(bad)

    def test_one_output_that_is_not_finite(self, fitted, zoo, monkeypatch):
        def forward(rows):
            outputs = torch.zeros(len(rows), fitted.n_outputs_)
            outputs[-1, 0] = torch.nan
            return outputs

        monkeypatch.setattr(fitted, "_forward", lambda *_: forward)
        with pytest.raises(ValueError, match="for adapter 59 are NaN or infinite"):
            fitted.predict(zoo)

    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    def test_lengths_differ(self, fitted, case, zoo, method):
        message = "inconsistent numbers of samples"
        self.assert_unchanged_by(fitted, zoo, message, method, zoo[:-1], case[1])

    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    def test_no_target(self, fitted, zoo, method):
        message = "requires y to be passed, but the target y is None"
        self.assert_unchanged_by(fitted, zoo, message, method, zoo, None)

    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    def test_divergence(self, fitted, case, zoo, method):
        fitted.set_params(lr=1e30, optimizer="sgd", early_stopping=False)
        self.assert_unchanged_by(fitted, zoo, "diverged.*lr", method, zoo, case[1])

    def test_another_layout(self, fitted, zoo):
        other = LoRALayout([("q", 6, 4, 2), ("k", 5, 4, 2), ("v", 6, 4, 2)])
        X = LoRACollection.from_array(np.ones((3, other.width)), other)
        with pytest.raises(ValueError, match=r"module 'k'.*\(5, 4\).*\(5, 5\)"):
            fitted.predict(X)

    def test_another_width(self, fitted, zoo):
        with pytest.raises(ValueError, match="features"):
            fitted.predict(np.ones((3, zoo.layout.width + 1)))

    def test_empty_collection(self, fitted, case, zoo):
        self.assert_unchanged_by(fitted, zoo, "0 adapters", "fit", zoo[:0], case[1][:0])

    @pytest.mark.parametrize(
        ("parameter", "value"),
        [
            ("hidden_dim", 0),
            ("n_layers", -1),
            ("nonlinearity", "step"),
            ("dropout", 1.0),
            ("lr", 0.0),
            ("weight_decay", -1.0),
            ("optimizer", "newton"),
            ("max_epochs", 0),
            ("batch_size", 2.5),
            ("early_stopping", "yes"),
            ("validation_fraction", 1.0),
            ("patience", 0),
            ("callbacks", "print"),
            ("warm_start", None),
            ("device", 3),
            ("random_state", "seed"),
            ("verbose", -1),
            ("layout", 5),
        ],
    )
    def test_parameters_are_checked(self, fitted, case, zoo, parameter, value):
        fitted.set_params(**{parameter: value})
        before = fitted.weights_
        with pytest.raises(ValueError, match=f"'{parameter}' parameter"):
            fitted.fit(zoo, case[1])
        assert fitted.weights_ is before

    def test_least_values_are_taken(self, case, zoo, quick):
        least = dict.fromkeys(("hidden_dim", "n_layers", "max_epochs", "patience"), 1)
        least |= {"batch_size": 1, "dropout": 0, "weight_decay": 0}
        assert quick(case[0], **least).fit(zoo[:12], case[1][:12]).n_iter_ == 1

    def test_a_device_of_torch_and_a_tuple_of_callbacks_are_taken(self, case, zoo, quick):
        parameters = {"device": torch.device("cpu"), "callbacks": (Callback(),)}
        assert quick(case[0], **parameters).fit(zoo, case[1]).n_iter_ == 3

    def test_unknown_device(self, case, zoo, quick):
        with pytest.raises(ValueError, match="device='abacus'"):
            quick(case[0], device="abacus").fit(zoo, case[1])
