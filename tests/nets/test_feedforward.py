from __future__ import annotations

import pytest
import torch
from torch import nn

from sklora.nets import RowNorm, Standardize, feedforward
from sklora.nets.feedforward import ModuleLinear

DTYPES = [torch.float32, torch.float64]


def test_standardize_starts_as_the_identity():
    x = torch.randn(4, 3)
    torch.testing.assert_close(Standardize(3)(x), x)


def test_standardize_is_fixed_moments():
    layer = Standardize(2).double()
    layer.set_moments(torch.tensor([1.0, -2.0]).double(), torch.tensor([2.0, 4.0]).double())
    x = torch.tensor([[3.0, 2.0], [1.0, -2.0]]).double()
    torch.testing.assert_close(layer(x), torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double())


@pytest.mark.parametrize("sign", [1, -1])
def test_standardize_leaves_a_constant_column_at_zero(sign):
    layer = Standardize(2)
    mean = torch.tensor([sign * 1e6, 0.0], dtype=torch.float64)
    layer.set_moments(mean, torch.tensor([1e-8, 0.0], dtype=torch.float64))
    torch.testing.assert_close(layer.scale, torch.ones(2))
    assert torch.count_nonzero(layer(mean[None])) == 0


def test_standardize_keeps_a_small_spread():
    layer, scale = Standardize(2), torch.tensor([1e-4, 0.1])
    layer.set_moments(torch.tensor([1.0, -1e3]), scale)
    torch.testing.assert_close(layer.scale, scale)


def test_standardize_subtracts_before_it_narrows():
    layer = Standardize(1)
    layer.set_moments(torch.tensor([2.0**24]).double(), torch.tensor([8.0]).double())
    x = torch.tensor([[2.0**24 + 1], [2.0**24 + 3]], dtype=torch.float64)
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), torch.tensor([[1 / 8], [3 / 8]]))


def test_moments_are_buffers():
    assert not list(Standardize(3).parameters())
    assert set(Standardize(3).state_dict()) == {"mean", "scale"}


class TestRowNorm:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n_features", [1, 7, 10, 11, 40])
    def test_is_the_plain_formula(self, n_features, dtype):
        torch.manual_seed(0)
        layer = RowNorm(n_features, wide=10).to(dtype)
        layer.norm.set_moments(torch.tensor([2.0]).to(dtype), torch.tensor([0.5]).to(dtype))
        z = torch.randn(5, n_features, dtype=dtype)
        weighed, norm = layer(z).split([n_features, 1], dim=1)
        assert weighed.dtype == norm.dtype == dtype
        torch.testing.assert_close(weighed, z * min(1.0, 10 / n_features))
        torch.testing.assert_close(norm[:, 0], (z.square().sum(1).sqrt() - 2.0) / 0.5)

    @pytest.mark.parametrize(
        ("n_features", "weight"),
        [(1, 1.0), (999, 1.0), (1000, 1.0), (1001, 1000 / 1001), (4000, 0.25)],
    )
    def test_only_wide_rows_are_weighed_down(self, n_features, weight):
        torch.testing.assert_close(RowNorm(n_features, wide=1000).weight, torch.tensor([weight]))

    def test_the_norm_is_that_of_the_row_before_it_is_weighed_down(self):
        z = torch.full((1, 16), 3.0)
        torch.testing.assert_close(RowNorm(16, wide=2)(z)[0, -1], torch.tensor(12.0))

    def test_weight_and_moments_are_buffers(self):
        layer = RowNorm(3, wide=2)
        assert not list(layer.parameters())
        assert set(layer.state_dict()) == {"weight", "norm.mean", "norm.scale"}

    def test_a_fitted_layer_keeps_its_weight(self):
        layer = RowNorm(4, wide=4)
        layer.load_state_dict(RowNorm(4, wide=2).state_dict())
        assert layer.weight == 0.5

    def test_gradients(self):
        layer = RowNorm(4, wide=2).double()
        layer.norm.set_moments(torch.tensor([1.0]).double(), torch.tensor([3.0]).double())
        z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(layer, (z,))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_zero_row_has_a_finite_gradient(self, dtype):
        layer = RowNorm(4, wide=2).to(dtype)
        z = torch.tensor([[0.0] * 4, [3.0, 0.0, 4.0, 0.0]], dtype=dtype, requires_grad=True)
        layer(z)[:, -1].sum().backward()
        expected = torch.tensor([[0.0] * 4, [0.6, 0.0, 0.8, 0.0]], dtype=dtype)
        torch.testing.assert_close(z.grad, expected)
        z.grad = None
        layer(z).sum().backward()
        torch.testing.assert_close(z.grad, expected + 0.5)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
    )
    def test_norm_of_raw_factors_is_invariant_to_orthogonal_gauges_alone(
        self, dtype, tolerance, random_factors, random_gauges, turn
    ):
        U, V = random_factors([(1, 6, 4)], batch=5, rank=3, dtype=dtype)[0]
        layer = RowNorm(30, wide=10).to(dtype)

        def columns(U, V):
            flat = torch.cat([f[0].transpose(0, 1).flatten(1) for f in (U, V)], dim=1)
            return layer(flat.to(dtype)).split([30, 1], dim=1)

        rows, norm = columns(U, V)
        turned, same = columns(*turn(U, V, random_gauges(U, 1.0)))
        torch.testing.assert_close(same, norm, rtol=tolerance, atol=0.0)
        assert (turned - rows).abs().max() > 0.1
        _, other = columns(*turn(U, V, random_gauges(U, 10.0)))
        assert (other - norm).abs().max() > 0.1


class TestModuleLinear:
    @pytest.fixture(params=[1, 40, 10**6], ids=["modules", "pairs", "all at once"])
    def layer(self, request, block_entries):
        block_entries(request.param)
        torch.manual_seed(0)
        return ModuleLinear(torch.randn(4, 5 * 6), n_modules=5)

    def inputs(self, dtype):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, 7, 6, generator=generator, dtype=torch.float64)
        mean = torch.randn(30, generator=generator, dtype=torch.float64)
        scale = torch.rand(30, generator=generator, dtype=torch.float64) + 0.1
        return [t.to(dtype) for t in (x, mean, scale)]

    def test_blocks_hold_the_weights(self, layer):
        torch.manual_seed(0)
        weight = torch.cat([part.transpose(0, 1).flatten(1) for part in layer.blocks], dim=1)
        assert torch.equal(weight, torch.randn(4, 30))
        assert sum(layer.members) == 5
        assert all(part.is_contiguous() for part in layer.blocks)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str
    )
    def test_is_the_plain_formula_and_so_is_its_gradient(self, layer, dtype, tolerance):
        x, mean, scale = self.inputs(torch.float64)
        weight = torch.cat([part.transpose(0, 1).flatten(1) for part in layer.blocks], dim=1)
        weight = weight.detach().double().requires_grad_()
        x.requires_grad_()
        z = (x.transpose(0, 1).flatten(1) - mean) / scale
        expected = z @ weight.T, z.square().sum(1).sqrt()
        (expected[0].square().sum() + expected[1].pow(3).sum()).backward()

        layer, (x_, mean, scale) = layer.to(dtype), self.inputs(dtype)
        x_.requires_grad_()
        found = layer(x_.split(layer.members), mean, scale)
        (found[0].square().sum() + found[1].pow(3).sum()).backward()
        grads = [part.grad.transpose(0, 1).flatten(1) for part in layer.blocks]
        for one, other in [
            *zip(found, expected, strict=True),
            (x_.grad, x.grad),
            (torch.cat(grads, dim=1), weight.grad),
        ]:
            assert one.dtype == dtype
            error = torch.linalg.norm(one.double() - other) / torch.linalg.norm(other)
            assert error < tolerance

    def test_gradients(self, layer):
        layer, (x, mean, scale) = layer.double(), self.inputs(torch.float64)
        torch.autograd.gradcheck(
            lambda x: layer(x.split(layer.members), mean, scale), (x.requires_grad_(),)
        )

    def test_gradients_of_rows_of_small_norm(self, layer):
        layer, (x, mean, scale) = layer.double(), self.inputs(torch.float64)
        x = mean.reshape(5, 1, 6) + 1e-2 * x * scale.reshape(5, 1, 6)
        _, norm = layer(x.split(layer.members), mean, scale)
        assert norm.max() < 1
        torch.autograd.gradcheck(
            lambda x: layer(x.split(layer.members), mean, scale), (x.requires_grad_(),)
        )

    def test_features_are_as_many_as_blocks(self, layer):
        x, mean, scale = self.inputs(torch.float32)
        with pytest.raises(ValueError, match="zip"):
            layer(x.split(layer.members)[:-1], mean, scale)

    def test_second_derivatives_are_refused(self, layer):
        x, mean, scale = self.inputs(torch.float32)
        outputs, _ = layer(x.requires_grad_().split(layer.members), mean, scale)
        (gradient,) = torch.autograd.grad(outputs.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    def test_frozen_weights_get_no_gradient(self, layer):
        x, mean, scale = self.inputs(torch.float32)
        layer.requires_grad_(False)
        layer(x.requires_grad_().split(layer.members), mean, scale)[0].sum().backward()
        assert torch.count_nonzero(x.grad)
        assert all(part.grad is None for part in layer.blocks)

    def test_a_row_of_norm_zero_has_a_finite_gradient(self, layer):
        x, mean, scale = self.inputs(torch.float32)
        x[:, 2] = mean.reshape(5, 6)
        _, norm = layer(x.requires_grad_().split(layer.members), mean, scale)
        norm.sum().backward()
        assert norm[2] == 0
        assert torch.count_nonzero(x.grad[:, 2]) == 0
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("hidden", "dropout", "kinds"),
    [
        ((), 0.0, [nn.Linear]),
        ((8,), 0.0, [nn.Linear, nn.ReLU, nn.Linear]),
        ((8, 4), 0.5, [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]),
    ],
)
def test_feedforward_layers(hidden, dropout, kinds):
    net = feedforward(5, 2, hidden, dropout=dropout)
    assert [type(layer) for layer in net] == kinds
    assert net(torch.ones(3, 5)).shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("relu", nn.ReLU), ("silu", nn.SiLU), ("gelu", nn.GELU), ("tanh", nn.Tanh)],
)
def test_feedforward_nonlinearity(name, kind):
    assert isinstance(feedforward(5, 2, (4,), nonlinearity=name)[1], kind)


def test_feedforward_drops_nothing_by_default():
    assert [type(layer) for layer in feedforward(5, 2, (8,))] == [nn.Linear, nn.ReLU, nn.Linear]


def test_feedforward_unknown_nonlinearity():
    with pytest.raises(ValueError, match="nonlinearity is 'selu'; choose one of 'relu'"):
        feedforward(5, 2, (4,), nonlinearity="selu")
