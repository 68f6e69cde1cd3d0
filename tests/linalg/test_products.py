import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import sklora.linalg.products as products
from sklora.linalg import (
    apply_gauge,
    column_sums,
    dense_product,
    frobenius_norm,
    inner_product,
    pairwise_inner_products,
    row_sums,
    squared_norm,
)
from sklora.linalg.products import add_inner_products

RTOL = {torch.float32: 1e-5, torch.float64: 1e-12}


def dense(U, V):
    return U.double().numpy() @ V.double().numpy().swapaxes(-1, -2)


@pytest.mark.parametrize(("n", "m"), [(9, 7), (7, 9)])
@pytest.mark.parametrize(("r", "r2"), [(3, 5), (8, 20), (20, 5)])
def test_every_product_equals_its_dense_form(make_factors, dtype, n, m, r, r2):
    U, V = make_factors(0, n, m, r, batch=(4, 2), dtype=dtype)
    U2, V2 = make_factors(1, n, m, r2, batch=(4, 2), dtype=dtype)
    update, other = dense(U, V), dense(U2, V2)
    cases = [
        (dense_product(U, V), update),
        (row_sums(U, V), update.sum(-1)),
        (column_sums(U, V), update.sum(-2)),
        (squared_norm(U, V), (update**2).sum((-2, -1))),
        (frobenius_norm(U, V), np.linalg.norm(update, axis=(-2, -1))),
        (inner_product(U, V, U2, V2), (update * other).sum((-2, -1))),
        (pairwise_inner_products(U, V, U2, V2), np.einsum("agij,bgij->ab", update, other)),
    ]
    for actual, expected in cases:
        assert actual.dtype == dtype
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=RTOL[dtype] * np.abs(expected).max()
        )


def test_norms_and_inner_products_survive_bad_gauges(make_factors, make_gauge, dtype, condition):
    U, V = make_factors(2, 12, 9, 4, batch=(6,))
    gauged = [A.to(dtype) for A in apply_gauge(U, V, make_gauge(3, 4, condition, batch=(6,)))]
    update = dense(*gauged)
    # In float64 the Gram matrices square the condition: 1e-16 * 1e8.
    rtol = {torch.float32: 1e-6, torch.float64: 1e-7}[dtype]
    np.testing.assert_allclose(
        frobenius_norm(*gauged), np.linalg.norm(update, axis=(-2, -1)), rtol=rtol
    )
    plain = [U.to(dtype), V.to(dtype)]
    expected = (update * dense(*plain)).sum((-2, -1))
    np.testing.assert_allclose(inner_product(*gauged, *plain), expected, rtol=rtol)


def test_row_sums_survive_bad_gauges(make_factors, make_gauge, dtype, condition):
    U, V = (
        A.to(dtype) for A in apply_gauge(*make_factors(4, 12, 9, 4), make_gauge(5, 4, condition))
    )
    atol = 10 * torch.finfo(dtype).eps * (U.norm() * V.norm()).item()
    np.testing.assert_allclose(row_sums(U, V), dense(U, V).sum(-1), rtol=0, atol=atol)
    np.testing.assert_allclose(column_sums(U, V), dense(U, V).sum(-2), rtol=0, atol=atol)


def test_zero_update_from_nonzero_factors_has_no_negative_norm(make_factors, make_gauge, dtype):
    U, V = make_factors(6, 9, 7, 4)
    U[:, 2:], V[:, 2:] = U[:, :2], -V[:, :2]
    gauged = [A.to(dtype) for A in apply_gauge(U, V, make_gauge(7, 4, 10.0))]
    norm = frobenius_norm(*gauged)
    assert norm >= 0
    assert norm <= 1e-4 * gauged[0].norm() * gauged[1].norm()
    assert frobenius_norm(torch.zeros_like(U), V) == 0


@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.parametrize(("n", "m"), [(30, 20), (3, 30), (3, 2)])
def test_a_norm_of_rounding_alone_is_zero(make_factors, make_gauge, condition, scale, n, m):
    U, V = (scale * A for A in make_factors(6, n, m, 4, batch=(50,)))
    U[:25, :, 2:], V[:25, :, 2:] = U[:25, :, :2], -V[:25, :, :2]
    U, V = apply_gauge(U, V, make_gauge(7, 4, condition, batch=(50,)))
    for function in (squared_norm, frobenius_norm):
        norms = function(U, V)
        assert (norms[:25] == 0).all()
        assert (norms[25:] > 0).all()


def test_a_norm_above_rounding_is_kept():
    U, V = torch.ones(1, 2, dtype=torch.float64), torch.tensor([[1.0, 1e-6 - 1.0]]).double()
    norm = float(V.sum()) ** 2
    assert squared_norm(U, V).item() == pytest.approx(norm, rel=1e-2)


def test_gauges_that_scale_columns_take_nothing_away(make_factors, dtype):
    U, V = make_factors(6, 30, 20, 4, batch=(5,), dtype=dtype)
    scale = torch.logspace(5, -5, 4, dtype=dtype)
    for function in (squared_norm, frobenius_norm):
        torch.testing.assert_close(function(U * scale, V / scale), function(U, V))


def test_a_norm_that_overflows_is_infinite():
    large = torch.full((2, 1), 1e200, dtype=torch.float64)
    assert squared_norm(large, large) == frobenius_norm(large, large) == torch.inf


def test_zero_padding_the_rank_changes_nothing(make_factors, dtype):
    U, V = make_factors(8, 9, 7, 3, batch=(4,), dtype=dtype)
    padded = [torch.nn.functional.pad(factor, (0, 2)) for factor in (U, V)]
    for function in (dense_product, row_sums, column_sums, squared_norm, frobenius_norm):
        np.testing.assert_allclose(function(*padded), function(U, V), rtol=RTOL[dtype], atol=1e-6)


def test_pairs_in_small_blocks_equal_one_block(make_factors, monkeypatch):
    U, V = make_factors(9, 6, 5, 2, batch=(7, 3))
    U2, V2 = make_factors(10, 6, 5, 4, batch=(5, 3))
    expected = pairwise_inner_products(U, V, U2, V2), pairwise_inner_products(U, V, U, V)
    monkeypatch.setattr(products, "_PAIR_ENTRIES", 100)
    np.testing.assert_allclose(pairwise_inner_products(U, V, U2, V2), expected[0], rtol=1e-12)
    np.testing.assert_allclose(pairwise_inner_products(U, V, U, V), expected[1], rtol=1e-12)


@pytest.mark.parametrize("n_adapters", [1, 7, 8, 20])
def test_pairs_of_one_stack_are_symmetric_and_those_of_its_copy(make_factors, n_adapters, dtype):
    U, V = make_factors(14, 9, 7, 3, batch=(n_adapters, 2), dtype=dtype)
    found = pairwise_inner_products(U, V, U, V)
    expected = np.einsum("agij,bgij->ab", dense(U, V), dense(U, V))
    np.testing.assert_allclose(found, expected, rtol=0, atol=RTOL[dtype] * expected.max())
    atol = 4 * torch.finfo(dtype).eps * expected.max()
    copy = pairwise_inner_products(U, V, U.clone(), V.clone())
    for other in (copy, found.T):
        np.testing.assert_allclose(other, found, rtol=0, atol=atol)


def test_pairs_survive_bad_gauges(make_factors, make_gauge, dtype, condition):
    U, V = make_factors(15, 12, 9, 4, batch=(6,))
    gauged = [A.to(dtype) for A in apply_gauge(U, V, make_gauge(16, 4, condition, batch=(6,)))]
    update = dense(*gauged)
    expected = np.einsum("aij,bij->ab", update, update)
    # As above: the condition is squared, in float64.
    rtol = {torch.float32: 1e-6, torch.float64: 1e-7}[dtype]
    found = pairwise_inner_products(*gauged, *gauged)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * expected.max())


@pytest.mark.parametrize("n", [9, 900])
def test_ranks_above_the_width_cost_no_more_than_the_update(make_factors, n):
    """Products as large as the rank would take 2 (n + m) r^2 operations, 80 times as many."""
    U, V = make_factors(18, n, 7, 800, batch=(3,))
    for function, arguments in ((squared_norm, (U, V)), (pairwise_inner_products, (U, V, U, V))):
        with FlopCounterMode(display=False) as counter:
            function(*arguments)
        assert counter.get_total_flops() < 2 * 3 * n * 7 * 800 + 1_000_000


def test_products_of_modules_add_up_in_float64(make_factors):
    U, V = make_factors(17, 9, 7, 3, batch=(5,), dtype=torch.float32)
    total = torch.full((5, 2), 1e9, dtype=torch.float64)
    add_inner_products(total, U, V, U[:2], V[:2])
    expected = np.einsum("aij,bij->ab", dense(U, V), dense(U, V)[:2])
    np.testing.assert_allclose(total - 1e9, expected, atol=1e-6)


def test_pairs_without_middle_dimensions_and_with_empty_stacks(make_factors):
    U, V = make_factors(11, 6, 5, 2, batch=(4,))
    grams = pairwise_inner_products(U, V, U, V)
    np.testing.assert_allclose(grams.diagonal(), squared_norm(U, V), rtol=1e-12)
    assert pairwise_inner_products(U[:0], V[:0], U, V).shape == (0, 4)
    assert (pairwise_inner_products(U[..., :0], V[..., :0], U, V) == 0).all()


def test_half_precision_comes_out_as_float32(make_factors):
    U, V = make_factors(12, 6, 5, 2, dtype=torch.bfloat16)
    assert dense_product(U, V).dtype == torch.float32
    assert inner_product(U, V, U.double(), V.double()).dtype == torch.float64


def test_rejects_updates_that_do_not_match(make_factors):
    U, V = make_factors(13, 6, 5, 2, batch=(4,))
    with pytest.raises(ValueError, match=r"\(6, 5\) and \(3, 5\) have no inner product"):
        inner_product(U, V, U[:, :3], V)
    with pytest.raises(ValueError, match=r"\(6, 5\) and \(6, 4\) have no inner product"):
        pairwise_inner_products(U, V, U, V[:, :4])
    with pytest.raises(ValueError, match="same middle dimensions"):
        pairwise_inner_products(U, V, U[0], V[0])
    for others in ((U[:2], V[:2]), (U, V)):
        with pytest.raises(ValueError, match=r"same leading dimensions, got \(3,\) and \(4,\)"):
            pairwise_inner_products(U[:3], V, *others)
    with pytest.raises(ValueError, match="same r"):
        dense_product(U, V[..., :1])


@given(seed=st.integers(0, 2**32 - 1), r1=st.integers(1, 4), r2=st.integers(1, 4))
def test_inner_product_properties(make_factors, seed, r1, r2):
    """Symmetric, bilinear in the update, within Cauchy-Schwarz."""
    U1, V1 = make_factors(seed, 5, 4, r1)
    U2, V2 = make_factors(seed + 1, 5, 4, r2)
    product = inner_product(U1, V1, U2, V2)
    bound = frobenius_norm(U1, V1) * frobenius_norm(U2, V2)
    assert abs(product) <= bound * (1 + 1e-12)
    atol = 1e-12 * bound.item()
    np.testing.assert_allclose(inner_product(U2, V2, U1, V1), product, rtol=0, atol=atol)
    np.testing.assert_allclose(inner_product(-3 * U1, V1, U2, V2), -3 * product, atol=3 * atol)
    joined = torch.cat([U1, U2], dim=-1), torch.cat([V1, V2], dim=-1)  # the sum of the updates
    expected = squared_norm(U1, V1) + 2 * product + squared_norm(U2, V2)
    np.testing.assert_allclose(squared_norm(*joined), expected, atol=10 * atol)


def test_stacks_that_share_one_side_are_not_one_stack(make_factors):
    U, V = make_factors(18, 9, 7, 3, batch=(8, 2))
    U2, V2 = make_factors(19, 9, 7, 3, batch=(8, 2))
    for others in ((U, V2), (U2, V)):
        found = pairwise_inner_products(U, V, *others)
        expected = np.einsum("agij,bgij->ab", dense(U, V), dense(*others))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * expected.max())


def test_pairs_of_more_entries_than_are_held_at_once_and_of_two_dtypes(make_factors, monkeypatch):
    U, V = make_factors(20, 6, 5, 2, batch=(7,))
    expected = pairwise_inner_products(U, V, U[:5], V[:5])
    monkeypatch.setattr(products, "_PAIR_ENTRIES", 3)  # fewer than those of one row
    np.testing.assert_allclose(pairwise_inner_products(U, V, U[:5], V[:5]), expected, rtol=1e-12)
    found = pairwise_inner_products(U, V, U[:5].half(), V[:5])
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * expected.max())
    with pytest.raises(ValueError, match="same r"):
        pairwise_inner_products(U, V, U, V[..., :1])


def test_a_norm_whose_square_is_beyond_its_dtype():
    large = torch.full((2, 1), 1e15)
    assert frobenius_norm(large, large).item() == pytest.approx(2e30)
    assert squared_norm(large, large) == torch.inf


@pytest.mark.parametrize(
    "function", [dense_product, row_sums, column_sums, squared_norm, frobenius_norm]
)
def test_every_function_of_one_update_checks_its_factors(make_factors, function):
    U, V = make_factors(21, 6, 5, 2, dtype=torch.float32)
    for half in (torch.float16, torch.bfloat16):
        assert function(U.half(), V.to(half)).dtype == torch.float32
    assert function(U, V.double()).dtype == function(U.double(), V).dtype == torch.float64
    with pytest.raises(ValueError, match="same r"):
        function(U, V[..., :1])
    with pytest.raises(ValueError, match="floating point"):
        function(U.int(), V.int())


def test_the_second_update_of_an_inner_product_is_checked(make_factors):
    U, V = make_factors(22, 6, 5, 2)
    expected = inner_product(U, V, U, V.float())
    assert inner_product(U, V, U, V.float().double()) == expected
    for second in ((U, V[..., :1]), (U[..., :1], V)):
        with pytest.raises(ValueError, match="same r"):
            inner_product(U, V, *second)


@pytest.mark.parametrize("scale", [1.0, 2.0**20, 2.0**-20])
def test_where_rounding_begins(scale):
    """At four times the precision of the product of the sizes, which gauges move about."""
    U = torch.full((1, 2), scale, dtype=torch.float64)
    for gap, norm in ((2.0**-23, 2.0**-46), (0.9 * 2.0**-24, 0.0)):
        V = torch.tensor([[1.0, gap - 1.0]], dtype=torch.float64) / scale
        assert squared_norm(U, V) == norm
        assert frobenius_norm(U, V) == norm**0.5


def test_pairs_are_in_the_larger_dtype_of_the_two_stacks(make_factors):
    U, V = make_factors(23, 6, 5, 2, batch=(4,))
    single = U.float(), V.float()
    assert pairwise_inner_products(*single, U, V).dtype == torch.float64
    assert pairwise_inner_products(U, V, *single).dtype == torch.float64
    assert pairwise_inner_products(*single, *single).dtype == torch.float32


@pytest.mark.parametrize("middle", [(3,), (3, 2), (6,), ()])
def test_as_many_modules_in_another_order_are_not_the_same(make_factors, middle):
    first, second = (make_factors(24, 6, 5, 2, batch=(4, *some)) for some in ((2, 3), middle))
    with pytest.raises(ValueError, match="same middle dimensions"):
        pairwise_inner_products(*first, *second)


def test_entries_that_are_computed_and_held_at_once(make_factors, monkeypatch):
    """Strips of a stack with itself begin at the diagonal: five eighths of all pairs."""
    sizes, bmm = [], torch.bmm

    def watched(A, B):
        sizes.append(A.shape[0] * A.shape[1] * B.shape[2])
        return bmm(A, B)

    monkeypatch.setattr(torch, "bmm", watched)
    U, V = make_factors(25, 6, 5, 2, batch=(8,))
    all_entries = 2 * (2 * 8) ** 2  # of the products of left and of right factors
    pairwise_inner_products(U, V, U, V)
    assert sum(sizes) == all_entries * 5 / 8
    sizes.clear()
    monkeypatch.setattr(products, "_PAIR_ENTRIES", 100)
    pairwise_inner_products(U, V, U.clone(), V)
    assert sum(sizes) == all_entries
    assert max(sizes) <= 100
