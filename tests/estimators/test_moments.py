"""The moments of training features: part of `sklora.estimators._training`."""

import numpy as np
import pytest
import torch

from sklora import GLNetRegressor, LoRACollection, LoRALayout
from sklora.estimators._training import calibrate_input, weighted_moments
from sklora.nets import GLNet, MLPNet


class TestWeightedMoments:
    def test_blocks_make_no_difference(self):
        rng = np.random.default_rng(0)
        values, weights = rng.normal(size=(50, 3)) * [1, 1e-3, 10] + [1e6, 0, -3], rng.random(50)
        mean = np.average(values, axis=0, weights=weights)
        scale = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))
        for size in (1, 7, 50):
            parts = [slice(start, start + size) for start in range(0, 50, size)]
            moments = weighted_moments(
                (torch.from_numpy(values[rows]), weights[rows]) for rows in parts
            )
            np.testing.assert_allclose(moments[0], mean, rtol=1e-12)
            np.testing.assert_allclose(moments[1], scale, rtol=1e-8)

    def test_rows_of_weight_zero_do_not_matter(self):
        values, weights = torch.randn(10, 2).double(), np.repeat([0.0, 1.0], 5)
        part, whole = ([(values[5:], weights[5:])], [(values[:5], weights[:5])])
        for one, other in zip(weighted_moments(part), weighted_moments(whole + part), strict=True):
            torch.testing.assert_close(one, other)


class TestCalibrateInput:
    @pytest.fixture
    def rows(self, rng):
        values = rng.normal(size=(50, 18)) * np.geomspace(1e-3, 1e3, 18) + np.arange(18)
        return values.astype(np.float32), rng.random(50)

    @pytest.fixture(params=[MLPNet, GLNet])
    def net(self, request):
        if request.param is MLPNet:
            return MLPNet(18, 2)
        return GLNet([(2, 5, 4)], 2, hidden_dim=3)

    def calibrate(self, net, values, weights, size=50):
        passes = []

        def features():
            passes.append(size)
            for start in range(0, len(values), size):
                rows = slice(start, start + size)
                yield torch.from_numpy(values[rows]), weights[rows]

        calibrate_input(net, features)
        assert len(passes) == 2
        return net

    @pytest.mark.parametrize("size", [1, 7, 50])
    def test_sets_the_weighted_moments_of_columns_then_of_norms(self, size, net, rows):
        values, weights = rows
        self.calibrate(net, values, weights, size)
        mean = np.average(values, axis=0, weights=weights)
        scale = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))
        np.testing.assert_allclose(net.standardize.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(net.standardize.scale, scale, rtol=1e-5)
        norms = np.linalg.norm((values - mean) / scale, axis=1)
        mean = np.average(norms, weights=weights)
        scale = np.sqrt(np.average((norms - mean) ** 2, weights=weights))
        np.testing.assert_allclose(net.row_norm.norm.mean, [mean], rtol=1e-5)
        np.testing.assert_allclose(net.row_norm.norm.scale, [scale], rtol=1e-4)

    def test_perceptron_reads_columns_of_mean_zero_and_spread_one(self, net, rows):
        values, weights = rows
        self.calibrate(net, values, weights)
        net.row_norm.weight.fill_(1.0)
        columns = net.row_norm(net.standardize(torch.from_numpy(values))).numpy()
        mean = np.average(columns, axis=0, weights=weights)
        np.testing.assert_allclose(mean, 0.0, atol=1e-4)
        np.testing.assert_allclose(np.average(columns**2, axis=0, weights=weights), 1.0, rtol=1e-3)

    def test_rows_of_weight_zero_do_not_matter(self, net, rows):
        values, weights = rows
        expected = self.calibrate(net, values[:20], weights[:20]).state_dict()
        expected = {name: value.clone() for name, value in expected.items()}
        weights[20:] = 0
        found = self.calibrate(net, values, weights, size=10).state_dict()
        torch.testing.assert_close(found, expected)

    def test_columns_that_are_constant_up_to_rounding_keep_the_scale_1(self, net, rng):
        constants = np.geomspace(1e-3, 1e6, 18) / 3
        values = np.repeat(constants[None], 5000, axis=0)
        moments = weighted_moments([(torch.from_numpy(values), rng.random(5000))])
        assert (moments[1] > np.finfo(float).eps * moments[0]).any()  # means are rounded
        self.calibrate(net, values, rng.random(5000), 5000)
        np.testing.assert_array_equal(net.standardize.scale, np.ones(18))

    def test_columns_that_differ_by_the_rounding_of_their_dtype_keep_the_scale_1(self, net, rng):
        spread = 1e-7 * rng.choice([-1, 0, 1], size=(50, 18))
        values = (np.geomspace(1e-3, 1e6, 18) * (1 + spread)).astype(np.float32)
        self.calibrate(net, values, rng.random(50))
        np.testing.assert_array_equal(net.standardize.scale, np.ones(18))
        assert net.row_norm.norm.scale == 1  # which is the norm of rounding alone
        self.calibrate(net, values.astype(np.float64), rng.random(50))
        assert (net.standardize.scale < 1).all()

    def test_rows_of_one_norm_keep_the_scale_1(self, net):
        values = np.repeat([[1.0], [-1.0]], 18, axis=1).astype(np.float32)
        self.calibrate(net, values, np.ones(2))
        assert net.row_norm.norm.scale == 1
        torch.testing.assert_close(net.row_norm.norm.mean, torch.tensor([18.0**0.5]))

    def test_leaves_all_else_alone(self, net, rows):
        before = {name: value.clone() for name, value in net.state_dict().items()}
        after = self.calibrate(net, *rows).state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.rpartition(".")[0] for name in changed} == {"standardize", "row_norm.norm"}
        assert not any(value.requires_grad for value in net.buffers())


def test_side_features_that_training_did_not_have_change_nothing(zoo, traces, quick):
    """Such as magnitudes, where all adapters of DoRA are in another fold."""
    layout = LoRALayout(zoo.layout.modules, side=[("magnitude", 2)])
    without, with_them = (
        LoRACollection.from_array(np.hstack([np.asarray(zoo), np.full((60, 2), value)]), layout)
        for value in (0.0, 5.0)
    )
    model = quick(GLNetRegressor).fit(without, traces)
    np.testing.assert_array_equal(model.predict(with_them), model.predict(without))


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_module_that_is_the_same_in_training_changes_nothing(value, zoo, traces, quick):
    """Such as one that only adapters in another fold have, however large its updates are there."""
    U, V = zoo.layout.factor_slices[0]
    module = slice(U.start, V.stop)
    training, others = np.array(zoo), np.array(zoo)
    training[:, module] = value
    others[:, module] *= 1e3
    training, others = (LoRACollection.from_array(X, zoo.layout) for X in (training, others))
    model = quick(GLNetRegressor).fit(training, traces)
    np.testing.assert_array_equal(model.predict(others), model.predict(training))
