from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from sklora.collection import LoRACollection
from sklora.estimators import MLPNetClassifier, MLPNetRegressor
from sklora.testing import assert_gauge_invariant


@pytest.mark.parametrize("group", ["GL", "O"])
def test_theorem_1_does_not_hold_on_raw_factors(group, zoo, targets, quick):
    model = quick(MLPNetClassifier).fit(zoo, targets["binary"])
    with pytest.raises(AssertionError, match="not invariant"):
        assert_gauge_invariant(model, zoo, group=group, condition=10.0, random_state=0)


def test_standardises_by_weighted_moments(zoo, traces, quick):
    weights, flat = np.linspace(0, 1, 60), np.asarray(zoo)
    model = quick(MLPNetRegressor).fit(zoo, traces, sample_weight=weights)
    mean = np.average(flat, axis=0, weights=weights)
    scale = np.sqrt(np.average((flat - mean) ** 2, axis=0, weights=weights))
    np.testing.assert_allclose(model.weights_["standardize.mean"], mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(model.weights_["standardize.scale"], scale, rtol=1e-5)
    norms = np.linalg.norm((flat - mean) / scale, axis=1)
    mean = np.average(norms, weights=weights)
    spread = np.sqrt(np.average((norms - mean) ** 2, weights=weights))
    np.testing.assert_allclose(model.weights_["row_norm.norm.mean"], [mean], rtol=1e-5)
    np.testing.assert_allclose(model.weights_["row_norm.norm.scale"], [spread], rtol=1e-4)


def test_rows_left_out_of_training_set_no_moments(zoo, traces, quick):
    flat, weights = np.asarray(zoo).copy(), np.repeat([1.0, 0.0], 30)
    expected = quick(MLPNetRegressor).fit(flat, traces, sample_weight=weights).weights_
    flat[30:] *= 100
    found = quick(MLPNetRegressor).fit(flat, traces, sample_weight=weights).weights_
    for name in ("standardize.mean", "standardize.scale", "row_norm.norm.mean"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_unit_and_origin_of_features_do_not_matter(quick, rng):
    X, units = rng.normal(size=(60, 5)), np.array([1e-6, 1.0, 1e3, 1.0, 1.0])
    one, other = (
        quick(MLPNetRegressor).fit(flat, X[:, 0]).predict(flat) for flat in (X, X * units + 1e5)
    )
    np.testing.assert_allclose(one[1:], other[1:], atol=1e-2)


def test_a_constant_feature_is_ignored(quick, rng):
    X = np.column_stack([rng.normal(size=60), np.full(60, 7.7)])
    model = quick(MLPNetRegressor).fit(X, X[:, 0])
    assert np.isfinite(model.predict(X)).all()
    np.testing.assert_array_equal(model.predict(X * [1, 1e3]), model.predict(X))


@pytest.mark.parametrize("warm_start", [True, False])
def test_a_feature_that_is_constant_at_first_counts_where_training_goes_on(warm_start, quick, rng):
    X = np.column_stack([rng.normal(size=60), np.zeros(60)])
    model = quick(MLPNetRegressor, warm_start=warm_start)
    go_on = model.fit if warm_start else model.partial_fit
    go_on(X, X[:, 0])
    X[:, 1] = 1
    before = model.predict(X)
    go_on(X, X[:, 0])
    assert not np.array_equal(model.predict(X), model.predict(X * [1, 0]))
    assert not np.array_equal(before, model.predict(X))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_one_length_up_to_rounding_leave_the_norm_out(dtype, quick, rng):
    # What principal components, all of them, give of fewer rows than columns.
    flat = rng.normal(size=(70, 100))
    centred = flat[:60] - flat[:60].mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:59]
    X, new = (centred @ axes.T).astype(dtype), (flat[60:] @ axes.T).astype(dtype)
    model = quick(MLPNetRegressor).fit(X, flat[:60, 0])
    assert model.weights_["row_norm.norm.scale"] > 1e38
    assert np.abs(model.predict(new)).max() < 10


def test_takes_no_rank_above_the_fitted_one(zoo, traces, quick):
    model = quick(MLPNetRegressor).fit(zoo, traces)
    U, V = np.ones((5, 3)), np.ones((5, 3))
    X = LoRACollection.from_factors([{"k": (U, V)}], layout=zoo.layout.with_ranks([2, 3, 2]))
    message = r"module 'k'.*rank 3.*rank 2.*svd, dense, gl-net"
    with pytest.raises(ValueError, match=message):
        model.predict(X)
    with pytest.raises(ValueError, match=message):
        model.partial_fit(X, [1.0])


def test_lower_ranks_are_padded(zoo, traces, quick):
    model = quick(MLPNetRegressor).fit(zoo, traces)
    factors = [{name: (U[:, :1], V[:, :1]) for name, (U, V) in adapter.items()} for adapter in zoo]
    small = LoRACollection.from_factors(factors)
    assert small.layout.ranks == (1, 1, 1)
    np.testing.assert_array_equal(
        model.predict(small), model.predict(small.with_layout(zoo.layout))
    )


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_n_layers(n_layers, zoo, traces, quick):
    model = quick(MLPNetRegressor, n_layers=n_layers).fit(zoo, traces)
    assert sum(weight.ndim == 2 for weight in model.weights_.values()) == n_layers + 1


def test_docstring_shows_the_defaults():
    assert f"hidden_dim : int, default={MLPNetClassifier().hidden_dim}" in MLPNetClassifier.__doc__
    assert "$" not in MLPNetClassifier.__doc__ + MLPNetRegressor.__doc__


def test_the_network_is_the_one_asked_for(zoo, traces, quick):
    asked = {"hidden_dim": 5, "nonlinearity": "gelu", "dropout": 0.25}
    net = quick(MLPNetRegressor, **asked).fit(zoo, traces).net_
    kinds = [type(layer) for layer in net.mlp]
    assert kinds == [*[nn.Linear, nn.GELU, nn.Dropout] * 2, nn.Linear]
    assert net.mlp[0].weight.shape == (5, zoo.layout.width + 1)
    assert {layer.p for layer in net.mlp if isinstance(layer, nn.Dropout)} == {0.25}
