from __future__ import annotations

import pytest
import torch
from torch import nn

from sklora.nets import EquivariantLinear, GLNonlinearity, InvariantHead

KINDS = ["sign_relu", "sigmoid", "silu"]


@pytest.fixture
def pair(random_factors):
    return random_factors([(3, 8, 6)], batch=5, rank=4)[0]


@pytest.fixture
def linear():
    torch.manual_seed(1)
    return EquivariantLinear(3, 8, 6, 5, 7).double()


def assert_same_factors(actual, expected, **tolerance):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


class TestEquivariantLinear:
    def test_is_a_product_module_by_module(self, linear, pair):
        U, V = linear(*pair)
        for module in range(3):
            for adapter in range(5):
                torch.testing.assert_close(
                    U[module, :, adapter], linear.phi[module] @ pair[0][module, :, adapter]
                )
                torch.testing.assert_close(
                    V[module, :, adapter], linear.psi[module] @ pair[1][module, :, adapter]
                )

    @pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
    def test_proposition_1_commutes_with_the_gauge(
        self, linear, pair, random_gauges, turn, condition
    ):
        R = random_gauges(pair[0], condition)
        # R^-T carries entries up to the condition number, and rounding with them.
        tolerance = {"rtol": 1e-9, "atol": 1e-12 * condition}
        assert_same_factors(linear(*turn(*pair, R)), turn(*linear(*pair), R), **tolerance)

    def test_proposition_1_a_bias_would_break_it(self, linear, pair, random_gauges, turn):
        R = random_gauges(pair[0], 10.0)

        def biased(U, V):
            U, V = linear(U, V)
            return U + 1.0, V + 1.0

        turned, expected = biased(*turn(*pair, R)), turn(*biased(*pair), R)
        assert (turned[0] - expected[0]).abs().max() > 0.1

    def test_proposition_1_mixing_columns_would_break_it(self, pair, random_gauges, turn):
        R = random_gauges(pair[0], 10.0)
        mix = torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64))
        turned, expected = turn(*pair, R)[0] @ mix, turn(pair[0] @ mix, pair[1], R)[0]
        assert (turned - expected).abs().max() > 0.1

    def test_has_no_bias(self, linear):
        assert {name for name, _ in linear.named_parameters()} == {"phi", "psi"}

    def test_gradients(self, random_factors):
        U, V = random_factors([(2, 3, 4)], batch=2, rank=2)[0]
        layer = EquivariantLinear(2, 3, 4, 2, 2).double()
        torch.autograd.gradcheck(
            lambda U, V, phi, psi: torch.func.functional_call(
                layer, {"phi": phi, "psi": psi}, (U, V)
            ),
            tuple(t.detach().clone().requires_grad_() for t in (U, V, layer.phi, layer.psi)),
        )

    def test_keeps_the_size_of_the_update(self):
        torch.manual_seed(0)
        U, V = EquivariantLinear(4, 64, 12, 32, 32)(
            torch.randn(4, 64, 100, 1), torch.randn(4, 12, 100, 1)
        )
        entries = torch.einsum("aibr,ajbr->abij", U, V)
        assert entries.pow(2).mean().sqrt().item() == pytest.approx(1.0, rel=0.2)


class TestGLNonlinearity:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
    def test_lemma_2_commutes_with_the_gauge(self, kind, condition, pair, random_gauges, turn):
        gate = GLNonlinearity(kind)
        R = random_gauges(pair[0], condition)
        tolerance = {"rtol": 1e-8, "atol": 1e-12 * condition}
        assert_same_factors(gate(*turn(*pair, R)), turn(*gate(*pair), R), **tolerance)

    @pytest.mark.parametrize(
        ("kind", "function"),
        [
            ("sign_relu", lambda s: (s > 0).double()),
            ("sigmoid", torch.sigmoid),
            ("silu", nn.functional.silu),
        ],
    )
    def test_gates_are_row_and_column_sums_of_the_update(self, kind, function, pair):
        U, V = GLNonlinearity(kind)(*pair)
        for module in range(3):
            for adapter in range(5):
                u, v = pair[0][module, :, adapter], pair[1][module, :, adapter]
                update = u @ v.T
                row, column = function(update.sum(1) / 6**0.5), function(update.sum(0) / 8**0.5)
                torch.testing.assert_close(U[module, :, adapter], row[:, None] * u)
                torch.testing.assert_close(V[module, :, adapter], column[:, None] * v)

    def test_elementwise_relu_would_not_commute(self, pair, random_gauges, turn):
        R = random_gauges(pair[0], 10.0)
        turned, expected = torch.relu(turn(*pair, R)[0]), turn(torch.relu(pair[0]), pair[1], R)[0]
        assert (turned - expected).abs().max() > 0.1

    def test_sign_relu_passes_no_gradient_through_its_gate(self, pair):
        U, V = (factor.clone().requires_grad_() for factor in pair)
        gated, _ = GLNonlinearity("sign_relu")(U, V)
        gated.sum().backward()
        # V only reaches this output through the gate.
        assert torch.count_nonzero(V.grad) == 0
        # A row either passes whole or not at all.
        assert set(U.grad.unique().tolist()) == {0.0, 1.0}

    def test_sign_relu_loses_a_row_whose_sum_is_zero(self):
        U = torch.ones(1, 2, 1, 1)
        V = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)
        assert torch.count_nonzero(GLNonlinearity("sign_relu")(U, V)[0]) == 0
        assert torch.count_nonzero(GLNonlinearity("sigmoid")(U, V)[0]) == 2

    @pytest.mark.parametrize("kind", ["sigmoid", "silu"])
    def test_gradients(self, kind, random_factors):
        U, V = random_factors([(2, 3, 4)], batch=2, rank=2)[0]
        torch.autograd.gradcheck(GLNonlinearity(kind), (U.requires_grad_(), V.requires_grad_()))

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="kind is 'relu'; choose one of 'sign_relu'"):
            GLNonlinearity("relu")


class TestInvariantHead:
    def test_flatten_gives_every_entry(self, pair):
        features = InvariantHead("flatten")(*pair)
        expected = torch.stack(
            [
                torch.cat([(pair[0][a, :, b] @ pair[1][a, :, b].T).flatten() for a in range(3)])
                for b in range(5)
            ]
        )
        torch.testing.assert_close(features, expected)

    def test_mean_gives_the_mean_entry(self, pair):
        expected = InvariantHead("flatten")(*pair).reshape(5, 3, -1).mean(-1)
        torch.testing.assert_close(InvariantHead("mean")(*pair), expected)

    @pytest.mark.parametrize("kind", ["flatten", "mean"])
    def test_is_invariant(self, kind, pair, random_gauges, turn):
        head = InvariantHead(kind)
        turned = turn(*pair, random_gauges(pair[0], 1e4))
        torch.testing.assert_close(head(*turned), head(*pair), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("kind", "expected"), [("flatten", 48), ("mean", 1)])
    def test_by_module(self, kind, expected, pair):
        head = InvariantHead(kind)
        features = head.by_module(*pair)
        assert head.n_features(8, 6) == expected
        assert features.shape[::2] == (len(pair[0]), expected)
        torch.testing.assert_close(features.transpose(0, 1).flatten(1), head(*pair))

    @pytest.mark.parametrize("kind", ["flatten", "mean"])
    def test_gradients(self, kind, random_factors):
        U, V = random_factors([(2, 3, 4)], batch=2, rank=2)[0]
        torch.autograd.gradcheck(InvariantHead(kind), (U.requires_grad_(), V.requires_grad_()))

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="kind is 'max'; choose one of 'flatten', 'mean'"):
            InvariantHead("max")


def test_repr_shows_the_kinds():
    assert repr(GLNonlinearity("silu")) == "GLNonlinearity('silu')"
    assert repr(InvariantHead("mean")) == "InvariantHead('mean')"
    assert repr(GLNonlinearity()) == "GLNonlinearity('sign_relu')"
    assert repr(InvariantHead()) == "InvariantHead('flatten')"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_of_flat_rows_are_mapped_as_they_lie(dtype):
    """Factors of which each adapter's lie in one piece take another way to the same product."""
    rows = torch.randn(5, 3 * (7 + 4) * 2, dtype=dtype, requires_grad=True)
    by_module = rows.view(5, 3, (7 + 4) * 2).permute(1, 0, 2)
    U = by_module[..., : 7 * 2].unflatten(-1, (7, 2)).permute(0, 2, 1, 3)
    V = by_module[..., 7 * 2 :].unflatten(-1, (4, 2)).permute(0, 2, 1, 3)
    layer = EquivariantLinear(3, n=7, m=4, out_n=3, out_m=2).to(dtype)
    found = layer(U, V)
    expected = layer(U.contiguous(), V.contiguous())
    parameters = [rows, layer.phi, layer.psi]
    gradients = [
        torch.autograd.grad(sum((A**2).sum() for A in pair), parameters)
        for pair in (found, expected)
    ]
    atol = 100 * torch.finfo(dtype).eps
    for pair in (zip(found, expected, strict=True), zip(*gradients, strict=True)):
        for A, B in pair:
            torch.testing.assert_close(A, B, rtol=0, atol=atol)
