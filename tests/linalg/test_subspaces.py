import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sklora.linalg import apply_gauge, compress_updates, leading_directions, leading_subspaces


def dense_subspaces(U, V, k):
    """The two bases from the stacks of formed updates, signs as the kernel fixes them."""
    updates = U.double().numpy() @ V.double().numpy().swapaxes(-1, -2)
    bases = []
    for stack in (np.concatenate(updates, axis=1), np.concatenate(updates.swapaxes(1, 2), axis=1)):
        basis = np.linalg.svd(stack, full_matrices=False)[0][:, :k]
        rows = np.abs(basis).argmax(axis=0)
        bases.append(basis * np.sign(basis[rows, np.arange(basis.shape[1])]))
    return bases


@pytest.fixture(scope="module")
def make_stack(make_factors):
    """Updates whose common spectrum falls fast, so that the leading subspaces are well apart."""

    def make(seed, N, n, m, r, *, batch=(), dtype=torch.float64):
        U, V = make_factors(seed, n, m, r, batch=(*batch, N))
        U = U * 0.7 ** torch.arange(n, dtype=torch.float64)[:, None]
        V = V * 0.8 ** torch.arange(m, dtype=torch.float64)[:, None]
        return U.to(dtype), V.to(dtype)

    return make


@pytest.mark.parametrize(("N", "n", "m"), [(30, 9, 7), (3, 40, 30), (5, 30, 4)])
def test_equals_the_dense_subspaces(make_stack, dtype, N, n, m):
    """More columns than rows, fewer, and one of each."""
    U, V = make_stack(0, N, n, m, 3, dtype=dtype)
    P, Q = leading_subspaces(U, V, 4)
    assert P.dtype == Q.dtype == dtype
    atol = {torch.float32: 1e-6, torch.float64: 1e-10}[dtype]
    for actual, expected in zip((P, Q), dense_subspaces(U, V, 4), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_is_invariant_to_badly_conditioned_gauges(make_stack, make_gauge, dtype, condition):
    U, V = make_stack(1, 30, 12, 10, 4)
    R = make_gauge(2, 4, condition, batch=(30,))
    gauged = [factor.to(dtype) for factor in apply_gauge(U, V, R)]
    # Rounding moves a subspace by condition * eps over the relative gap of its singular values.
    atol = 1e2 * condition * torch.finfo(dtype).eps
    for actual, expected in zip(
        leading_subspaces(*gauged, 4), leading_subspaces(U, V, 4), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_a_basis_of_the_raw_factors_is_not_invariant(make_stack, make_gauge):
    """The contrast: principal directions of the columns of U change with the gauge."""
    U, V = make_stack(3, 30, 12, 10, 4)
    moved, _ = apply_gauge(U, V, make_gauge(4, 4, 1e2, batch=(30,)))

    def raw_basis(U):
        return torch.linalg.svd(U.transpose(0, 1).flatten(1), full_matrices=False).U[:, :4]

    def projector(basis):
        return basis @ basis.mT

    def distance(first, second):
        return torch.linalg.matrix_norm(projector(first) - projector(second))

    assert distance(raw_basis(U), raw_basis(moved)) > 0.1


def test_modules_are_batched(make_stack):
    U, V = make_stack(5, 20, 8, 6, 2, batch=(3,))
    P, Q = leading_subspaces(U, V, 3)
    assert P.shape == (3, 8, 3)
    assert Q.shape == (3, 6, 3)
    for module in range(3):
        one_P, one_Q = leading_subspaces(U[module], V[module], 3)
        np.testing.assert_allclose(P[module], one_P, atol=1e-12)
        np.testing.assert_allclose(Q[module], one_Q, atol=1e-12)


def test_blocks_combine_to_the_whole_stack(make_stack):
    U, V = make_stack(6, 25, 8, 6, 2)
    compressed = None
    for rows in (slice(0, 2), slice(2, 20), slice(20, 25)):
        compressed = compress_updates(U[rows], V[rows], previous=compressed)
    left, right, noise = compressed
    assert left.shape == (8, 8)
    assert right.shape == (6, 6)
    P, Q = leading_subspaces(U, V, 4)
    np.testing.assert_allclose(leading_directions(left, 4, noise=noise), P, atol=1e-12)
    np.testing.assert_allclose(leading_directions(right, 4, noise=noise), Q, atol=1e-12)
    np.testing.assert_allclose(noise, compress_updates(U, V).noise, rtol=1e-12)


def test_blocks_of_many_modules_combine(make_stack):
    U, V = make_stack(13, 12, 8, 6, 2, batch=(3,))
    first = compress_updates(U[:, :2], V[:, :2])
    found = compress_updates(U[:, 2:], V[:, 2:], previous=first)
    updates = U @ V.mT
    squares = ((updates @ updates.mT).sum(1), (updates.mT @ updates).sum(1))
    for matrix, expected in zip(found[:2], squares, strict=True):
        torch.testing.assert_close(matrix.mT @ matrix, expected)
    assert [matrix.shape for matrix in found[:2]] == [(3, 8, 8), (3, 6, 6)]
    for module in range(3):
        alone = compress_updates(U[module], V[module]).noise
        torch.testing.assert_close(found.noise[module], alone)


def test_float64_keeps_directions_whose_squares_it_would_lose(make_factors, make_gauge):
    left, right = (torch.linalg.qr(A).Q for A in make_factors(0, 6, 5, 2))
    U, V = (A.expand(8, -1, -1) for A in (left * torch.tensor([1.0, 1e-10]), right))
    for factors in ((U, V), apply_gauge(U, V, make_gauge(1, 2, 1e2))):
        P, Q = leading_subspaces(*factors, 2)
        for basis, expected in ((P, left), (Q, right)):
            products = (basis.mT @ expected).abs()
            torch.testing.assert_close(products, torch.eye(2).double(), rtol=0, atol=1e-3)


def test_what_cancels_in_an_update_of_float32_is_right():
    step = 2.0**-20  # float32 has no more than a few digits of it beside 1
    U, V = torch.ones(1, 2, 2), torch.tensor([[[1.0, -1.0], [1.0, step - 1.0]]])
    left, right, _ = compress_updates(U, V)
    update = torch.tensor([[0.0, step], [0.0, step]], dtype=torch.float64)
    for matrix, expected in ((left, update @ update.mT), (right, update.mT @ update)):
        torch.testing.assert_close(matrix.mT @ matrix, expected, rtol=1e-6, atol=1e-6 * step**2)


def test_a_side_with_fewer_rows_than_k_gives_all_it_has(make_stack):
    U, V = make_stack(7, 20, 8, 3, 2)
    P, Q = leading_subspaces(U, V, 5)
    assert P.shape == (8, 5)
    assert Q.shape == (3, 3)
    np.testing.assert_allclose(Q.mT @ Q, np.eye(3), atol=1e-12)
    for found, expected in zip(leading_subspaces(V, U, 5), (Q, P), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_directions_without_signal_are_zero_whatever_the_gauge(
    make_stack, make_gauge, condition, dtype
):
    U, V = make_stack(8, 20, 8, 6, 3)
    U[:, 2:] = 0  # every update lives in two rows
    R = make_gauge(9, 3, condition, batch=(20,))
    for factors in ((U, V), apply_gauge(U, V, R)):
        P, Q = leading_subspaces(*(factor.to(dtype) for factor in factors), 4)
        np.testing.assert_allclose(P[:, :2].norm(dim=0), 1, rtol=1e-5)
        np.testing.assert_allclose(P[2:, :2], 0, atol=1e-5)
        assert (P[:, 2:] == 0).all()
        assert (Q.norm(dim=0) > 0.99).all()
    zeros = leading_subspaces(torch.zeros_like(U), V, 2)
    assert all((basis == 0).all() for basis in zeros)


def test_rounding_on_either_side_is_no_direction(make_factors, dtype):
    """Updates that live in two directions of each side, none of them along an axis."""
    U, V = make_factors(14, 2, 2, 2, batch=(20,))
    left, right = (torch.linalg.qr(A).Q for A in make_factors(15, 8, 6, 2))
    bases = leading_subspaces((left @ U).to(dtype), (right @ V).to(dtype), 4)
    for basis, expected in zip(bases, (left, right), strict=True):
        assert (basis[:, 2:] == 0).all()
        projector = (basis @ basis.mT).double()
        torch.testing.assert_close(projector, expected @ expected.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("noise", [1e-13, 1e-10, 1e-8, 1e-6, 1e-4])
def test_the_noise_parts_directions_from_zeros(make_factors, noise, scale):
    """Of two modules at once, whether by their squares or not."""
    left, right = (torch.linalg.qr(A).Q for A in make_factors(16, 4, 4, 4, batch=(2,)))
    values = torch.tensor([1.0, 3 * noise, noise / 3, 0.0], dtype=torch.float64)
    rows = scale * (left * values) @ right.mT
    basis = leading_directions(rows, 3, noise=torch.full((2,), scale * noise))
    assert (basis[..., 2] == 0).all()
    products = (right[..., :2].mT @ basis[..., :2]).abs()
    torch.testing.assert_close(products, torch.eye(2).double().expand(2, 2, 2), rtol=0, atol=1e-2)


def test_the_least_noise_of_a_batch_decides_how_all_are_decomposed(make_factors):
    left, right = (torch.linalg.qr(A).Q for A in make_factors(17, 4, 4, 4, batch=(2,)))
    rows = (left * torch.tensor([1.0, 1e-10, 0.0, 0.0])) @ right.mT
    basis = leading_directions(rows, 3, noise=torch.tensor([1e-13, 1e-4]))
    np.testing.assert_array_equal(
        (basis != 0).any(dim=-2), [[True, True, False], [True, False, False]]
    )
    assert abs(right[0, :, 1] @ basis[0, :, 1]) > 0.99


def test_zero_padding_and_rank_above_the_shape(make_stack):
    U, V = make_stack(10, 20, 8, 6, 2)
    padded = [torch.nn.functional.pad(factor, (0, 3)) for factor in (U, V)]
    for actual, expected in zip(
        leading_subspaces(*padded, 3), leading_subspaces(U, V, 3), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-12)
    wide_U, wide_V = make_stack(11, 20, 2, 6, 5)
    for actual, expected in zip(
        leading_subspaces(wide_U, wide_V, 2), dense_subspaces(wide_U, wide_V, 2), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_rejects_too_few_updates_and_missing_dimension(make_stack):
    U, V = make_stack(12, 2, 8, 6, 2)
    with pytest.raises(ValueError, match="k=5 directions asked of updates that have 4"):
        leading_subspaces(U, V, 5)
    with pytest.raises(ValueError, match="k=0"):
        leading_subspaces(U, V, 0)
    with pytest.raises(ValueError, match=r"expected stacks \(..., N, n, r\)"):
        leading_subspaces(U[0], V[0], 2)
    with pytest.raises(ValueError, match=r"expected stacks \(..., N, n, r\)"):
        leading_subspaces(U, V[0], 2)


@given(
    seed=st.integers(0, 2**32 - 1),
    N=st.integers(3, 12),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    r=st.integers(1, 3),
)
def test_bases_are_orthonormal_and_capture_most(make_factors, seed, N, n, m, r):
    """No other projection of the same size keeps more of the updates than the leading one."""
    U, V = make_factors(seed, n, m, r, batch=(N,))
    k = min(3, n, m)
    P, Q = leading_subspaces(U, V, k)
    np.testing.assert_allclose(P.mT @ P, np.eye(k), atol=1e-10)
    np.testing.assert_allclose(Q.mT @ Q, np.eye(k), atol=1e-10)
    other = torch.linalg.qr(make_factors(seed + 1, n, m, k)[0]).Q
    updates = U @ V.mT
    assert (P.mT @ updates).norm() >= (other.mT @ updates).norm() - 1e-9
