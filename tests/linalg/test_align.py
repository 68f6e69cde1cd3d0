import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes

from sklora.linalg import apply_gauge, procrustes

ATOL = {torch.float32: 1e-5, torch.float64: 1e-12}


def orthogonal(seed, r, batch=()):
    """Uniform over O(r), reflections included."""
    rng = np.random.default_rng(seed)
    Q, R = torch.linalg.qr(torch.from_numpy(rng.standard_normal((*batch, r, r))))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def test_equals_scipy(make_factors, dtype):
    U, V = make_factors(0, 9, 7, 3, batch=(4,), dtype=dtype)
    U0, V0 = make_factors(1, 9, 7, 3, dtype=dtype)
    Q = procrustes(U, V, U0, V0)
    assert Q.dtype == dtype
    target = torch.cat([U0, V0]).double().numpy()
    for i in range(4):
        expected, _ = orthogonal_procrustes(torch.cat([U[i], V[i]]).double().numpy(), target)
        np.testing.assert_allclose(Q[i], expected, atol=ATOL[dtype])


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("r", [2, 4])
def test_float32_equals_float64_for_cross_products_of_any_condition(make_factors, condition, r):
    values = torch.logspace(0, -np.log10(condition), r, dtype=torch.float64)
    for seed in range(10):
        U0, V0 = (torch.linalg.qr(A).Q for A in make_factors(seed, 30, 20, 4))
        U, V = ((A[:, :r] * values @ orthogonal(seed, r)).float() for A in (U0, V0))
        U0, V0 = U0.float(), V0.float()
        Q = procrustes(U, V, U0, V0).double()
        # Exact for the given factors, up to what rounding their product does to its smallest value.
        expected = procrustes(U.double(), V.double(), U0.double(), V0.double())
        np.testing.assert_allclose(Q @ Q.mT, np.eye(r), atol=1e-6)
        np.testing.assert_allclose(Q, expected, atol=1e-6 + 1e-6 * condition)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-22, 1e19, 1e30])
def test_float32_of_any_size(make_factors, scale):
    """The best rotation does not depend on the size of the factors, whose products overflow."""
    U, V = make_factors(0, 9, 7, 3, batch=(4,))
    U0, V0 = make_factors(1, 9, 7, 3)
    U[1], V[1] = 0, 0  # beside one that is zero anyway
    small = [(A * scale).float() for A in (U, V, U0, V0)]
    expected = procrustes(*(A.double() / scale for A in small))
    found = procrustes(*small)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(procrustes(small[0][2], small[1][2], *small[2:]), found[2])


def test_undoes_a_rotation_and_a_reflection_of_the_template(make_factors, dtype):
    U0, V0 = make_factors(2, 9, 7, 4, dtype=dtype)
    R = orthogonal(3, 4, (6,))
    assert {-1.0, 1.0} == set(torch.linalg.det(R).sign().tolist())
    Q = procrustes(U0 @ R.to(dtype), V0 @ R.to(dtype), U0, V0)
    np.testing.assert_allclose(Q, R.mT, atol=ATOL[dtype])


def test_aligned_factors_are_invariant_to_orthogonal_but_not_general_gauges(
    make_factors, make_gauge, dtype, condition
):
    U, V = make_factors(4, 12, 10, 4, batch=(5,))
    U0, V0 = make_factors(5, 12, 10, 4)

    def aligned(U, V):
        U, V = U.to(dtype), V.to(dtype)
        Q = procrustes(U, V, U0, V0)
        return torch.cat([U @ Q.to(dtype), V @ Q.to(dtype)], dim=-2)

    reference = aligned(U, V)
    R = orthogonal(6, 4, (5,))
    np.testing.assert_allclose(aligned(U @ R, V @ R), reference, atol=10 * ATOL[dtype])
    general = aligned(*apply_gauge(U, V, make_gauge(7, 4, condition, batch=(5,))))
    assert (general - reference).abs().max() > 0.1


def test_lower_rank_aligns_into_the_template_and_keeps_the_update(make_factors, dtype):
    U, V = make_factors(8, 9, 7, 2, batch=(5,), dtype=dtype)
    U0, V0 = make_factors(9, 9, 7, 4, dtype=dtype)
    Q = procrustes(U, V, U0, V0)
    assert Q.shape == (5, 2, 4)
    np.testing.assert_allclose(Q @ Q.mT, torch.eye(2).expand(5, 2, 2), atol=ATOL[dtype])
    np.testing.assert_allclose((U @ Q) @ (V @ Q).mT, U @ V.mT, atol=10 * ATOL[dtype])


def test_template_and_adapters_broadcast_over_modules(make_factors):
    U, V = make_factors(10, 6, 5, 2, batch=(4, 3))
    U0, V0 = make_factors(11, 6, 5, 2, batch=(3,))
    Q = procrustes(U, V, U0, V0)
    np.testing.assert_allclose(Q[2, 1], procrustes(U[2, 1], V[2, 1], U0[1], V0[1]), atol=1e-13)


def test_rank_zero_and_zero_update(make_factors):
    U0, V0 = make_factors(14, 6, 5, 3)
    assert procrustes(U0[:, :0], V0[:, :0], U0, V0).shape == (0, 3)
    Q = procrustes(torch.zeros_like(U0), torch.zeros_like(V0), U0, V0)
    np.testing.assert_allclose(Q @ Q.T, np.eye(3), atol=1e-14)


def test_rejects_a_rank_above_the_template_and_other_shapes(make_factors):
    U, V = make_factors(15, 6, 5, 3)
    with pytest.raises(ValueError, match="rank 3 exceeds the template's rank 2"):
        procrustes(U, V, U[:, :2], V[:, :2])
    with pytest.raises(ValueError, match=r"\(6, 5\) cannot be aligned to a template of shape \(4"):
        procrustes(U, V, U[:4], V)
    with pytest.raises(ValueError, match=r"cannot be aligned to a template of shape \(6, 4\)"):
        procrustes(U, V, U, V[:4])


@given(seed=st.integers(0, 2**32 - 1), r=st.integers(1, 5), extra=st.integers(0, 2))
def test_no_orthogonal_matrix_does_better(make_factors, seed, r, extra):
    U, V = make_factors(seed, 8, 6, r)
    U0, V0 = make_factors(seed + 1, 8, 6, r + extra)
    other = orthogonal(seed, r + extra)[:r]

    def distance(Q):
        return ((U @ Q - U0) ** 2).sum() + ((V @ Q - V0) ** 2).sum()

    assert distance(procrustes(U, V, U0, V0)) <= distance(other) + 1e-9


def test_batched_templates_are_checked_and_dtypes_may_differ(make_factors):
    U, V = make_factors(16, 6, 5, 3, batch=(4,))
    with pytest.raises(ValueError, match="rank 3 exceeds the template's rank 2"):
        procrustes(U, V, U[..., :2], V[..., :2])
    for given_factors in ((U, V[..., :2], U, V), (U, V, U, V[..., :2])):
        with pytest.raises(ValueError, match="same r"):
            procrustes(*given_factors)
    expected = procrustes(U, V, U[0], V[0])
    for half in ((U.half(), V, U[0], V[0]), (U, V, U[0].half(), V[0])):
        found = procrustes(*half)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found, expected, atol=1e-2)
    assert procrustes(U.half(), V.half(), U[0], V[0]).dtype == torch.float32
