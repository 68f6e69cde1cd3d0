from __future__ import annotations

import pytest
import torch
from torch import nn

from sklora.nets import Standardize, feedforward


def test_standardize_starts_as_the_identity():
    x = torch.randn(4, 3)
    torch.testing.assert_close(Standardize(3)(x), x)


def test_standardize_is_fixed_moments():
    layer = Standardize(2).double()
    layer.set_moments(torch.tensor([1.0, -2.0]).double(), torch.tensor([2.0, 4.0]).double())
    x = torch.tensor([[3.0, 2.0], [1.0, -2.0]]).double()
    torch.testing.assert_close(layer(x), torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double())


def test_standardize_leaves_a_constant_column_at_zero():
    layer = Standardize(2)
    mean = torch.tensor([1e6, 0.0], dtype=torch.float64)
    layer.set_moments(mean, torch.tensor([1e-12, 0.0], dtype=torch.float64))
    torch.testing.assert_close(layer.scale, torch.ones(2))
    assert torch.count_nonzero(layer(mean[None])) == 0


def test_standardize_subtracts_before_it_narrows():
    layer = Standardize(1)
    layer.set_moments(torch.tensor([2.0**24]).double(), torch.tensor([8.0]).double())
    x = torch.tensor([[2.0**24 + 1], [2.0**24 + 3]], dtype=torch.float64)
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), torch.tensor([[1 / 8], [3 / 8]]))


def test_moments_are_buffers():
    assert not list(Standardize(3).parameters())
    assert set(Standardize(3).state_dict()) == {"mean", "scale"}


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


def test_feedforward_unknown_nonlinearity():
    with pytest.raises(ValueError, match="nonlinearity is 'selu'; choose one of 'relu'"):
        feedforward(5, 2, (4,), nonlinearity="selu")
