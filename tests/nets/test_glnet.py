from __future__ import annotations

import pytest
import torch

from sklora.nets import GLNet
from sklora.nets.feedforward import ROUNDINGS

GROUPS = [(3, 8, 6), (1, 5, 5), (2, 6, 8)]
KINDS = ["sign_relu", "sigmoid", "silu"]


def make_net(dtype=torch.float64, **parameters):
    torch.manual_seed(0)
    net = GLNet(GROUPS, **{"n_outputs": 3, "hidden_dim": 4, "mlp_hidden": (8,)} | parameters)
    with torch.no_grad():
        net.module_scale.copy_(torch.rand_like(net.module_scale) + 0.5)
        net.standardize.mean.normal_()
        net.standardize.scale.uniform_(0.5, 2.0)
        net.row_norm.norm.set_moments(torch.tensor([3.0]), torch.tensor([2.0]))
        # Whatever the width beyond which rows are weighed down, these are.
        net.row_norm.weight.fill_(0.75)
        for path in paths(net).values():
            path.standardize.mean.normal_()
            path.standardize.scale.uniform_(0.5, 2.0)
            path.row_norm.norm.set_moments(torch.tensor([1.0]), torch.tensor([0.5]))
    return net.to(dtype)


def paths(net):
    return {name: path for name, path in net.named_children() if name.endswith("_path")}


def flat_weight(net):
    """The weights of the first layer, a column for every entry of the standardised row."""
    blocks = [part.transpose(0, 1).flatten(1) for part in net.invariant_map.blocks]
    return torch.cat([*blocks, net.mlp[0].weight], dim=1)


def reference(net, factors, gate, side=None, spectra=None):
    """The formulas, one module of one adapter at a time, updates formed."""
    rows = []
    for adapter in range(factors[0][0].shape[2]):
        features = []
        for group, (U, V) in enumerate(factors):
            for member in range(U.shape[0]):
                module = sum(members for members, _, _ in GROUPS[:group]) + member
                u, v = U[member, :, adapter], V[member, :, adapter]
                scale = net.module_scale[module]
                u = scale * net.embed[group].phi[member] @ u
                v = scale * net.embed[group].psi[member] @ v
                for layer in net.layers:
                    update = u @ v.T
                    row = gate(update.sum(1) / len(v) ** 0.5)
                    column = gate(update.sum(0) / len(u) ** 0.5)
                    u = layer.phi[module] @ (row[:, None] * u)
                    v = layer.psi[module] @ (column[:, None] * v)
                features.append((u @ v.T).flatten())
        rows.append(torch.cat(features))
    standardized = (torch.stack(rows) - net.standardize.mean) / net.standardize.scale
    norm = (standardized.square().sum(1, keepdim=True).sqrt() - 3.0) / 2.0
    columns = torch.cat([0.75 * standardized, norm], dim=1)
    hidden = columns @ flat_weight(net).T + net.mlp[0].bias
    for name, values in (("side_path", side), ("spectrum_path", spectra)):
        if values is not None:
            path = paths(net)[name]
            z = (values - path.standardize.mean) / path.standardize.scale
            norm = (z.square().sum(1, keepdim=True).sqrt() - 1.0) / 0.5
            hidden = hidden + path.mlp(torch.cat([z, norm], dim=1))
    return net.mlp[1:](hidden)


@pytest.mark.parametrize("mlp_hidden", [(), (8,)], ids=str)
@pytest.mark.parametrize(("n_side", "spectrum"), [(0, 0), (2, 0), (0, 3), (2, 3)])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_batched_by_shape_is_a_loop_over_modules(
    n_layers, n_side, spectrum, mlp_hidden, random_factors
):
    net = make_net(n_layers=n_layers, n_side=n_side, spectrum=spectrum, mlp_hidden=mlp_hidden)
    factors = random_factors(GROUPS, batch=4, rank=3)
    more = [torch.randn(4, n, dtype=torch.float64) if n else None for n in (n_side, spectrum)]
    found, expected = net(factors, *more), reference(net, factors, torch.sigmoid, *more)
    torch.testing.assert_close(found, expected)
    parameters = list(net.parameters())
    gradients = [torch.autograd.grad(f.square().sum(), parameters) for f in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("entries", [1, 300, 10**6])
def test_blocks_make_no_difference(entries, random_factors, block_entries):
    block_entries(entries)
    net = make_net()
    assert net.invariant_map.members == {1: 6 * [1], 300: [2, 2, 2], 10**6: [6]}[entries]
    factors = random_factors(GROUPS, batch=4, rank=3)
    torch.testing.assert_close(net(factors), reference(net, factors, torch.sigmoid))


def test_weights_start_as_those_of_one_linear_layer():
    torch.manual_seed(0)
    net = GLNet([(3, 8, 6)], 3, hidden_dim=4, n_layers=1)
    torch.manual_seed(0)
    net.embed[0].__init__(3, 8, 6, 4, 4)
    expected = torch.nn.Linear(3 * 16 + 1, 128)
    assert torch.equal(flat_weight(net), expected.weight)
    assert torch.equal(net.mlp[0].bias, expected.bias)


@pytest.mark.parametrize("head", ["flatten", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "condition", "tolerance"),
    [(torch.float64, 1e4, 1e-8), (torch.float32, 1e2, 1e-3)],
    ids=["float64", "float32"],
)
def test_theorem_1_is_invariant(
    kind, head, dtype, condition, tolerance, random_factors, random_gauges, turn
):
    net = make_net(dtype, nonlinearity=kind, head=head, n_layers=3)
    factors = random_factors(GROUPS, batch=6, rank=3, dtype=dtype)
    turned = [
        tuple(factor.to(dtype) for factor in turn(U, V, random_gauges(U, condition)))
        for U, V in factors
    ]
    moved = max((one[0] - other[0]).abs().max() for one, other in zip(turned, factors, strict=True))
    assert moved > 1.0
    torch.testing.assert_close(net(turned), net(factors), rtol=tolerance, atol=tolerance)


def test_theorem_1_a_bias_would_break_it(random_factors, random_gauges, turn):
    net = make_net()
    for layer in net.embed:
        layer.register_forward_hook(lambda _layer, _inputs, pair: (pair[0] + 1, pair[1] + 1))
    factors = random_factors(GROUPS, batch=6, rank=3)
    turned = [turn(U, V, random_gauges(U, 10.0)) for U, V in factors]
    assert (net(turned) - net(factors)).abs().max() > 0.01


@pytest.mark.parametrize("head", ["flatten", "mean"])
def test_zero_columns_change_nothing(head, random_factors):
    net = make_net(head=head)
    factors = random_factors(GROUPS, batch=4, rank=2)
    padded = [
        (torch.nn.functional.pad(U, (0, extra)), torch.nn.functional.pad(V, (0, extra)))
        for extra, (U, V) in enumerate(factors)
    ]
    torch.testing.assert_close(net(padded), net(factors))


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_takes_any_rank(rank, random_factors):
    assert make_net()(random_factors(GROUPS, batch=4, rank=rank)).shape == (4, 3)


@pytest.mark.parametrize("ranks", [(1, 4, 2), (4, 1, 2), (2, 1, 4)], ids=str)
def test_ranks_differ_from_group_to_group(ranks, random_factors):
    net = make_net(n_layers=2)
    factors = [
        random_factors([group], batch=4, rank=rank)[0]
        for group, rank in zip(GROUPS, ranks, strict=True)
    ]
    torch.testing.assert_close(net(factors), reference(net, factors, torch.sigmoid))


def test_as_many_factors_as_groups(random_factors):
    factors = random_factors(GROUPS, batch=4, rank=2)
    for given in (factors[:-1], [*factors, factors[-1]]):
        with pytest.raises(ValueError, match="zip"):
            make_net()(given)


def test_state_is_all_that_it_learns(random_factors):
    net, other = (make_net(n_side=2, spectrum=3) for _ in range(2))
    given = (
        random_factors(GROUPS, batch=4, rank=2),
        *(torch.randn(4, n, dtype=torch.float64) for n in (2, 3)),
    )
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(0.5)
    assert not torch.equal(net(*given), other(*given))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(*given), other(*given))


def test_the_first_layer_keeps_the_weight_of_the_norm_alone():
    net = GLNet(GROUPS, 3, n_side=2, spectrum=3)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in net.parameters())
    assert net.mlp[0].in_features == net.mlp[0].weight.shape[1] == 1


def test_a_missing_module_is_the_zero_update(random_factors):
    net = make_net()
    factors = random_factors(GROUPS, batch=4, rank=2)
    zero = [(factors[0][0], torch.zeros_like(factors[0][1])), *factors[1:]]
    other = [(torch.zeros_like(factors[0][0]), factors[0][1]), *factors[1:]]
    torch.testing.assert_close(net(zero), net(other))


def test_every_adapter_stands_alone(random_factors):
    net = make_net()
    factors = random_factors(GROUPS, batch=4, rank=2)
    one = [(U[:, :, 2:3], V[:, :, 2:3]) for U, V in factors]
    torch.testing.assert_close(net(one), net(factors)[2:3])


@pytest.mark.parametrize(
    ("size", "argument"), [("n_side", "side"), ("spectrum", "spectra")], ids=["side", "spectrum"]
)
class TestPaths:
    """Side features and singular values, beside any number of invariants."""

    def test_every_column_is_read(self, size, argument, random_factors):
        net, factors = make_net(**{size: 2}), random_factors(GROUPS, batch=4, rank=2)
        columns = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
        net(factors, **{argument: columns}).square().sum().backward()
        assert torch.count_nonzero(columns.grad) == columns.numel()

    def test_weigh_as_much_beside_many_invariants(self, size, argument, random_factors):
        factors = random_factors(GROUPS, batch=4, rank=2)
        changes = []
        for hidden_dim in (2, 60):
            torch.manual_seed(0)
            # One layer, so that outputs are sums of what each path gives.
            net = GLNet(GROUPS, 200, hidden_dim, 1, mlp_hidden=(), **{size: 2}).double()
            outputs = [
                net(factors, **{argument: torch.full((4, 2), value).double()}) for value in (0, 1)
            ]
            changes.append((outputs[1] - outputs[0]).square().mean().sqrt())
        assert 0.8 < changes[0] / changes[1] < 1.25

    def test_are_neither_forgotten_nor_given_to_a_net_without(self, size, argument, random_factors):
        factors = random_factors(GROUPS, batch=4, rank=2)
        with pytest.raises(ValueError, match=f"{argument} is missing, .* reads 2 such columns"):
            make_net(**{size: 2})(factors)
        columns = torch.zeros(4, 2, dtype=torch.float64)
        with pytest.raises(ValueError, match=rf"{argument} is of shape \(4, 2\), .* reads 0 such"):
            make_net()(factors, **{argument: columns})

    def test_other_weights_start_as_without(self, size, argument):
        nets = []
        for options in ({}, {size: 2}):
            torch.manual_seed(0)
            nets.append(GLNet(GROUPS, 3, **options).state_dict())
        del nets[0]["row_norm.weight"], nets[1]["row_norm.weight"]
        assert all(torch.equal(nets[1][name], value) for name, value in nets[0].items())
        assert {name.split(".")[0] for name in nets[1].keys() - nets[0].keys()} == {
            f"{argument if argument == 'side' else 'spectrum'}_path"
        }


@pytest.mark.parametrize("head", ["flatten", "mean"])
@pytest.mark.parametrize("kind", ["sigmoid", "silu"])
def test_gradients(kind, head, random_factors):
    torch.manual_seed(0)
    net = GLNet([(2, 3, 4), (1, 2, 2)], 2, 2, 2, kind, head, mlp_hidden=()).double()
    names, parameters = zip(*net.named_parameters(), strict=True)
    factors = random_factors([(2, 3, 4), (1, 2, 2)], batch=2, rank=2)

    def outputs(U1, V1, U2, V2, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(net, state, ([(U1, V1), (U2, V2)],))

    inputs = [*factors[0], *factors[1], *parameters]
    torch.autograd.gradcheck(outputs, [t.detach().clone().requires_grad_() for t in inputs])


def test_every_parameter_gets_a_gradient(random_factors):
    net = make_net(n_layers=3, n_side=2, spectrum=3)
    more = [torch.randn(4, n, dtype=torch.float64) for n in (2, 3)]
    net(random_factors(GROUPS, batch=4, rank=2), *more).pow(2).sum().backward()
    assert all(torch.count_nonzero(p.grad) for p in net.parameters())


def test_weights_do_not_depend_on_the_rank():
    assert sum(p.numel() for p in make_net(n_layers=1).embed.parameters()) == sum(
        members * 4 * (n + m) for members, n, m in GROUPS
    )


def test_wide_rows_are_weighed_down():
    narrow, wide = (GLNet([(1, 4, 4)], 1, hidden_dim=h, mlp_hidden=(1,)) for h in (1, 1000))
    assert narrow.row_norm.weight == 1 > 1000 * wide.row_norm.weight > 0


def test_default_sizes():
    net = GLNet(GROUPS, 3)
    assert net.n_invariant == 6 * 32**2
    assert len(net.layers) == 1


def test_features_are_not_yet_standardised_and_their_rounding_has_no_gradient(random_factors):
    net, factors = make_net(), random_factors(GROUPS, batch=4, rank=3)
    features = net.features(factors)
    net.standardize.mean.add_(1.0)
    torch.testing.assert_close(net.features(factors), features, rtol=0, atol=0)
    rounding = net.rounding(factors)
    assert not rounding.requires_grad
    scale = torch.logspace(4, -4, 3, dtype=factors[0][0].dtype)
    scaled = [(U * scale, V / scale) for U, V in factors]
    torch.testing.assert_close(net.rounding(scaled), rounding)


@pytest.mark.parametrize(("head", "share"), [("flatten", 1 / 4), ("mean", 1 / 16)])
def test_rounding_is_of_the_size_of_a_module_spread_over_its_features(random_factors, head, share):
    factors = random_factors(GROUPS, batch=5, rank=1)  # whose one column is all of the update
    flat, net = make_net(), make_net(head=head)
    net.module_scale.data = flat.module_scale.data
    sizes = flat.features(factors).reshape(5, 6, 16).norm(dim=2, keepdim=True)
    found = net.rounding(factors).reshape(5, 6, -1)
    expected = ROUNDINGS * torch.finfo(sizes.dtype).eps * share * sizes
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-9, atol=0)


def test_products_are_weighed_down_further_beside_a_spectrum():
    alone, beside = (GLNet([(1, 4, 4)], 1, 100, spectrum=spectrum) for spectrum in (0, 2))
    assert 0 < beside.row_norm.weight < alone.row_norm.weight


def test_learns_under_autocast(random_factors):
    net, factors = make_net(torch.float32), random_factors(GROUPS, 4, 3, torch.float32)
    expected = net(factors)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(factors)
    torch.testing.assert_close(outputs.float(), expected, rtol=0.1, atol=0.1)
    outputs.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="kind is 'relu'"):
        make_net(nonlinearity="relu")
    with pytest.raises(ValueError, match="kind is 'max'"):
        make_net(head="max")


def test_exports_with_any_batch_size_and_rank(random_factors):
    net = make_net()
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"factors": [({2: dynamic, 3: dynamic},) * 2 for _ in GROUPS]}
    program = torch.export.export(
        net, (random_factors(GROUPS, batch=4, rank=3),), dynamic_shapes=shapes
    )
    factors = random_factors(GROUPS, batch=7, rank=2)
    torch.testing.assert_close(program.module()(factors), net(factors))


@pytest.mark.gpu
def test_same_outputs_on_cuda(random_factors, cuda):
    net = make_net()
    factors = random_factors(GROUPS, batch=4, rank=2)
    expected = net(factors)
    outputs = net.to(cuda)([(U.to(cuda), V.to(cuda)) for U, V in factors])
    torch.testing.assert_close(outputs.cpu(), expected)


def test_dropout_is_after_every_hidden_layer_and_in_the_path_of_the_spectrum():
    net = GLNet([(2, 5, 4)], 2, hidden_dim=3, mlp_hidden=(6, 4), dropout=0.25, n_side=2, spectrum=3)
    rates = {
        path: [layer.p for layer in part.modules() if isinstance(layer, torch.nn.Dropout)]
        for path, part in net.named_children()
    }
    found = {path: rate for path, rate in rates.items() if rate}
    assert found == {"mlp": [0.25, 0.25], "spectrum_path": [0.25]}


def test_side_features_are_read_linearly_and_singular_values_by_a_hidden_layer():
    net = GLNet(GROUPS, 3, mlp_hidden=(6,), n_side=2, spectrum=3)
    shapes = {
        name: [
            tuple(layer.weight.shape) for layer in path.mlp if isinstance(layer, torch.nn.Linear)
        ]
        for name, path in paths(net).items()
    }
    # Beside the columns, their norm.
    assert shapes["side_path"] == [(6, 3)]
    assert [shape[::-1] for shape in shapes["spectrum_path"]] == [(4, 128), (128, 6)]
