from __future__ import annotations

import pytest
import torch

from sklora.nets import MLPNet


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = MLPNet(12, 3, hidden_dim=8, n_layers=2, nonlinearity="tanh").double()
    net.standardize.set_moments(torch.randn(12).double(), torch.rand(12).double() + 0.5)
    net.row_norm.norm.set_moments(torch.tensor([3.0]).double(), torch.tensor([2.0]).double())
    # Whatever the width beyond which rows are weighed down, these are.
    net.row_norm.weight.fill_(0.75)
    return net


def test_is_the_plain_formula(net):
    x = torch.randn(5, 12, dtype=torch.float64)
    z = (x - net.standardize.mean) / net.standardize.scale
    hidden = torch.cat([0.75 * z, (z.square().sum(1, keepdim=True).sqrt() - 3.0) / 2.0], dim=1)
    for layer in (net.mlp[0], net.mlp[2]):
        hidden = torch.tanh(hidden @ layer.weight.T + layer.bias)
    torch.testing.assert_close(net(x), hidden @ net.mlp[4].weight.T + net.mlp[4].bias)


def test_no_hidden_layer_is_a_linear_model():
    # A weight for every column and the norm, and a bias.
    assert sum(p.numel() for p in MLPNet(12, 3, n_layers=0).parameters()) == 14 * 3


def test_default_layers():
    layers = MLPNet(12, 3).mlp
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert [layer.out_features for layer in layers[::2]] == [128, 128, 3]


def test_wide_rows_are_weighed_down():
    narrow, wide = (MLPNet(width, 1, hidden_dim=1) for width in (1, 1_000_000))
    assert narrow.row_norm.weight == 1 > 100 * wide.row_norm.weight > 0


def test_gradients(net):
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(net, (x,))


def test_dropout_is_off_at_evaluation():
    net = MLPNet(4, 2, dropout=0.5)
    x = torch.randn(3, 4)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_theorem_1_does_not_hold_on_raw_factors(net, random_factors, random_gauges, turn):
    U, V = random_factors([(1, 2, 4)], batch=5, rank=2)[0]

    def outputs(U, V):
        return net(torch.cat([f[0].transpose(0, 1).flatten(1) for f in (U, V)], dim=1))

    change = outputs(*turn(U, V, random_gauges(U, 10.0))) - outputs(U, V)
    assert change.abs().max() > 0.1


def test_exports_with_any_batch_size(net):
    program = torch.export.export(
        net, (torch.ones(4, 12).double(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    x = torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), net(x))
