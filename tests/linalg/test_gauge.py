import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sklora.linalg import apply_gauge, balance, frobenius_norm, leading_subspaces, spectrum


def gauged_tolerance(U, V, dtype):
    """What rounding these factors does to their update, with a margin of ten."""
    return 10 * torch.finfo(dtype).eps * (U.norm() * V.norm()).item()


def test_gauge_is_the_dense_formula_and_keeps_the_update(
    make_factors, make_gauge, dtype, condition
):
    U, V = make_factors(0, 9, 7, 4, batch=(5,), dtype=dtype)
    R = make_gauge(1, 4, condition, batch=(5,))
    moved_U, moved_V = apply_gauge(U, V, R)
    assert moved_U.dtype == moved_V.dtype == dtype
    eps = torch.finfo(dtype).eps
    inverse_transpose = np.linalg.inv(R.numpy()).swapaxes(-1, -2)
    np.testing.assert_allclose(
        moved_U, U.double().numpy() @ R.numpy(), rtol=0, atol=4 * eps * condition
    )
    # The reference's own inverse is good to condition * eps of its size, sqrt(condition).
    np.testing.assert_allclose(
        moved_V, V.double().numpy() @ inverse_transpose, rtol=0, atol=4 * eps * condition**1.5
    )
    np.testing.assert_allclose(
        moved_U.double() @ moved_V.double().mT,
        U.double() @ V.double().mT,
        rtol=0,
        atol=gauged_tolerance(moved_U, moved_V, dtype),
    )


def test_gauge_broadcasts_and_composes(make_factors, make_gauge):
    U, V = make_factors(2, 6, 5, 3, batch=(4, 2))
    R, S = make_gauge(3, 3, 10.0), make_gauge(4, 3, 10.0, batch=(2,))
    twice = apply_gauge(*apply_gauge(U, V, R), S)
    once = apply_gauge(U, V, R @ S)
    for actual, expected in zip(twice, once, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_gauge_rejects_wrong_shapes_and_singular_matrices(make_factors):
    U, V = make_factors(5, 6, 5, 3)
    with pytest.raises(ValueError, match=r"rank 3 has shape \(..., 3, 3\), got \(2, 2\)"):
        apply_gauge(U, V, torch.eye(2))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        apply_gauge(U, V, torch.ones(3))
    with pytest.raises(torch.linalg.LinAlgError):
        apply_gauge(U, V, torch.zeros(3, 3))


def test_balanced_factors_are_the_dense_singular_value_decomposition(make_factors, dtype):
    U, V = make_factors(6, 9, 7, 3, batch=(4,), dtype=dtype)
    left, right = balance(U, V)
    assert left.dtype == right.dtype == dtype
    A, s, Bh = np.linalg.svd((U.double() @ V.double().mT).numpy(), full_matrices=False)
    rows = np.abs(A[..., :3]).argmax(axis=-2, keepdims=True)
    signs = np.sign(np.take_along_axis(A[..., :3], rows, axis=-2))
    lengths = signs * np.sqrt(s[:, None, :3])
    atol = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    np.testing.assert_allclose(left, A[..., :3] * lengths, atol=atol)
    np.testing.assert_allclose(right, Bh[:, :3].swapaxes(-1, -2) * lengths, atol=atol)


def test_balance_is_invariant_to_badly_conditioned_gauges(
    make_factors, make_gauge, dtype, condition
):
    U, V = make_factors(7, 20, 16, 4, batch=(5,))
    gauged = apply_gauge(U, V, make_gauge(8, 4, condition, batch=(5,)))
    rounded = [factor.to(dtype) for factor in gauged]
    # Singular vectors move by the rounding over the smallest gap, here above 1.
    atol = 10 * gauged_tolerance(*rounded, dtype)
    for actual, expected in zip(balance(*rounded), balance(U, V), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_signs_of_columns_with_two_largest_entries_do_not_depend_on_the_gauge(
    make_gauge, dtype, condition
):
    U = torch.tensor([[1.0, 1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
    V = torch.tensor([[2.0, 0], [0, 1], [0, 0]], dtype=torch.float64)
    lengths = torch.tensor([1.0, 0.5**0.5])
    for seed in range(20):
        gauged = apply_gauge(U, V, make_gauge(seed, 2, condition))
        left, right = balance(*(A.to(dtype) for A in gauged))
        np.testing.assert_allclose(left, U * lengths, rtol=0, atol=1e-3)
        np.testing.assert_allclose(right, V / lengths, rtol=0, atol=1e-3)


def test_signs_are_those_of_the_largest_entries(dtype):
    U, V = torch.tensor([[0.999], [-1.0]], dtype=dtype), torch.ones((1, 1), dtype=dtype)
    assert balance(U, V)[0][1] > 0


@pytest.mark.parametrize(("n", "m", "r"), [(2, 7, 5), (7, 2, 5), (3, 3, 3), (1, 1, 2)])
def test_balance_with_rank_above_the_shape_ends_in_zero_columns(make_factors, dtype, n, m, r):
    U, V = make_factors(9, n, m, r, dtype=dtype)
    left, right = balance(U, V)
    assert left.shape == U.shape
    assert right.shape == V.shape
    assert (left[:, min(n, m) :] == 0).all()
    assert (right[:, min(n, m) :] == 0).all()
    np.testing.assert_allclose(left @ right.mT, U @ V.mT, atol=gauged_tolerance(U, V, dtype))


def test_balance_moves_padding_and_lost_rank_to_exact_zeros_at_the_end(
    make_factors, make_gauge, dtype, condition
):
    U, V = make_factors(10, 9, 7, 4)
    U[:, 3] = U[:, 0] - U[:, 1]
    V[:, 3] = 2 * V[:, 1]  # ranks of the update: columns 0, 1, 2 and a multiple
    V[:, 2] = 0
    padded = (torch.nn.functional.pad(factor, (1, 1)) for factor in (U, V))
    U, V = (A.to(dtype) for A in apply_gauge(*padded, make_gauge(11, 6, condition)))
    left, right = balance(U, V)
    true_rank = np.linalg.matrix_rank((U.double() @ V.double().mT).numpy(), tol=1e-3)
    assert true_rank == 2
    assert (left[:, true_rank:] == 0).all()
    assert (right[:, true_rank:] == 0).all()
    np.testing.assert_allclose(
        left.double() @ right.double().mT,
        U.double() @ V.double().mT,
        rtol=0,
        atol=gauged_tolerance(U, V, dtype),
    )


def test_balance_of_zero_updates_and_empty_input(make_factors):
    U, V = make_factors(12, 5, 4, 2, batch=(3,))
    for factor in balance(torch.zeros_like(U), V):
        assert (factor == 0).all()
    assert balance(U[:0], V[:0])[0].shape == (0, 5, 2)
    assert balance(U[..., :0], V[..., :0])[1].shape == (3, 4, 0)


@given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(1, 8), m=st.integers(1, 8), r=st.integers(1, 5)
)
def test_balanced_properties(make_factors, seed, n, m, r):
    """Equal diagonal Grams on both sides that hold the spectrum, and the update unchanged."""
    U, V = make_factors(seed, n, m, r)
    left, right = balance(U, V)
    expected = torch.diag(spectrum(U, V))
    atol = 1e-11 * (1 + expected.max().item())
    np.testing.assert_allclose(left.mT @ left, expected, atol=atol)
    np.testing.assert_allclose(right.mT @ right, expected, atol=atol)
    np.testing.assert_allclose(left @ right.mT, U @ V.mT, atol=atol)
    assert (left.amax(0) >= 0.9999 * left.abs().amax(0)).all()


@pytest.mark.parametrize("factor_type", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_two_dtypes_come_out_in_one(make_factors, factor_type):
    U, V = make_factors(13, 6, 5, 3, dtype=torch.float32)
    expected = torch.promote_types(torch.float32, factor_type)
    for moved in (balance(U, V.to(factor_type)), apply_gauge(U, V.to(factor_type), torch.eye(3))):
        assert {factor.dtype for factor in moved} == {expected}


def test_gauges_act_in_float64_on_factors_of_float32():
    step = 2.0**-30  # nothing beside 1 in float32
    R = torch.tensor([[1.0, 1.0], [1.0, 1.0 + step]], dtype=torch.float64)
    U, V = apply_gauge(torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, 1.0]]), R)
    assert U.tolist() == [[0.0, step]]
    assert V.tolist() == [[1.0, 0.0]]


def test_where_the_rounding_of_factors_begins(dtype):
    """At ``r eps sum_k ||u_k|| ||v_k||``, which is 2 times the precision here."""
    eps = torch.finfo(dtype).eps
    for value, kept in ((2 * eps, 0.0), (4 * eps, 4 * eps)):
        U, V = torch.diag(torch.tensor([1.0, value], dtype=dtype)), torch.eye(2, dtype=dtype)
        for factor in balance(U, V):
            expected = torch.diag(torch.tensor([1.0, kept], dtype=dtype))
            torch.testing.assert_close(factor.square(), expected, rtol=1e-5, atol=0)


def test_balancing_undoes_gauges_that_scale_columns(make_factors, dtype):
    true = torch.logspace(0, -5, 4, dtype=torch.float64)
    A, B = (torch.linalg.qr(factor).Q for factor in make_factors(0, 30, 20, 4))
    scale = torch.logspace(4, -4, 4, dtype=torch.float64)
    U, V = balance((A * true * scale).to(dtype), (B / scale).to(dtype))
    for factor in (U, V):
        np.testing.assert_allclose(factor.double().square().sum(0), true, rtol=1e-2)


@pytest.mark.parametrize("act", [balance, lambda U, V: apply_gauge(U, V, torch.eye(3))])
def test_gauge_rejects_factors_that_differ_in_rank(make_factors, act):
    U, V = make_factors(14, 6, 5, 3)
    with pytest.raises(ValueError, match="same r"):
        act(U, V[:, :2])


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-80, 80))
def test_nothing_depends_on_how_the_size_is_shared_out(make_factors, seed, power):
    """Powers of two round nothing, but their squares are beyond float32."""
    U, V = make_factors(seed, 7, 6, 2, batch=(4,), dtype=torch.float32)
    far = U * 2.0**power, V / 2.0**power
    for act in (
        lambda U, V: (spectrum(U, V), frobenius_norm(U, V)),
        balance,
        lambda U, V: leading_subspaces(U, V, 3),
    ):
        for found, expected in zip(act(*far), act(U, V), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
