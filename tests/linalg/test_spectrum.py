import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sklora.linalg import _tall, apply_gauge, spectrum

# A float32 result carries one rounding; a float64 one carries the gauge's condition times 1e-16.
RTOL = {torch.float32: 1e-6, torch.float64: 1e-10}


def dense_spectrum(U, V, n_values):
    values = np.linalg.svd(
        U.double().numpy() @ V.double().numpy().swapaxes(-1, -2), compute_uv=False
    )
    padded = np.zeros((*values.shape[:-1], max(n_values, values.shape[-1])))
    padded[..., : values.shape[-1]] = values
    return padded[..., :n_values]


def test_equals_the_dense_singular_values(make_factors, dtype):
    U, V = make_factors(0, 12, 9, 4, batch=(5, 3), dtype=dtype)
    values = spectrum(U, V)
    assert values.shape == (5, 3, 4)
    assert values.dtype == dtype
    np.testing.assert_allclose(values, dense_spectrum(U, V, 4), rtol=RTOL[dtype])


def test_is_invariant_to_badly_conditioned_gauges(make_factors, make_gauge, dtype, condition):
    U, V = make_factors(1, 20, 16, 4, batch=(6,))
    gauged = apply_gauge(U, V, make_gauge(2, 4, condition, batch=(6,)))
    expected = spectrum(U, V)
    # Rounding the gauged factors is itself an error of condition * eps of the largest value.
    atol = 10 * condition * torch.finfo(dtype).eps * expected.max().item()
    actual = spectrum(*(factor.to(dtype) for factor in gauged))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_float32_input_keeps_small_singular_values_under_a_gauge(make_factors, make_gauge):
    """Right to 1e-5 relative down to 1e-6 of the largest, gauge of condition 1e2."""
    true = torch.logspace(0, -6, 7, dtype=torch.float64)
    for seed in range(20):
        A, B = (torch.linalg.qr(factor).Q for factor in make_factors(seed, 64, 48, 7))
        U, V = apply_gauge(A * true, B, make_gauge(seed, 7, 1e2))
        U, V = U.float(), V.float()
        # The reference is the dense answer in float64 for the float32 factors as given: rounding
        # them has already moved the update.
        np.testing.assert_allclose(spectrum(U, V), dense_spectrum(U, V, 7), rtol=1e-5)


def test_exactly_representable_gauge_keeps_the_true_spectrum(make_factors):
    """A power-of-two gauge rounds nothing, so float32 input has the original singular values."""
    true = 2.0 ** -torch.arange(0, 21, 4, dtype=torch.float64)
    A = torch.eye(30, 6, dtype=torch.float64) * true
    B = torch.linalg.qr(make_factors(0, 25, 6, 6)[0]).Q.float()
    R = torch.diag(2.0 ** torch.tensor([3.0, -3.0, 0.0, 2.0, -2.0, 1.0]))
    U, V = apply_gauge(A.float(), B, R)
    np.testing.assert_allclose(spectrum(U, V), true, rtol=1e-5)


@pytest.mark.parametrize(("n", "m", "r"), [(2, 7, 5), (7, 2, 5), (1, 6, 3), (3, 3, 3), (2, 2, 4)])
def test_rank_above_the_shape_gives_trailing_zeros(make_factors, dtype, n, m, r):
    U, V = make_factors(3, n, m, r, batch=(4,), dtype=dtype)
    values = spectrum(U, V)
    assert values.shape == (4, r)
    assert (values[:, min(n, m) :] == 0).all()
    np.testing.assert_allclose(values, dense_spectrum(U, V, r), rtol=RTOL[dtype], atol=1e-12)


def test_memory_does_not_grow_with_the_square_of_the_rank():
    ones = torch.ones(2, 10**6)  # a matrix of rank x rank would take terabytes
    assert spectrum(ones, ones)[0] == 2e6


def test_zero_padded_rank_adds_zeros_only(make_factors, dtype):
    U, V = make_factors(4, 8, 6, 3, batch=(5,), dtype=dtype)
    padded = spectrum(*(torch.nn.functional.pad(factor, (0, 2)) for factor in (U, V)))
    np.testing.assert_allclose(padded[:, :3], spectrum(U, V), rtol=RTOL[dtype])
    np.testing.assert_allclose(padded[:, 3:], 0, atol=1e-15)


def test_rank_deficient_and_zero_updates(make_factors, dtype):
    U, V = make_factors(5, 8, 6, 3, dtype=dtype)
    U[:, 2] = U[:, 0] + U[:, 1]
    V[:, 2] = 0
    np.testing.assert_allclose(spectrum(U, V)[2], 0, atol=1e-14)
    assert (spectrum(torch.zeros_like(U), V) == 0).all()


@pytest.mark.parametrize(("n", "m", "r"), [(16, 12, 6), (40, 40, 40), (300, 5, 8)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_what_the_update_has_no_direction_for_is_exactly_zero(make_factors, dtype, n, m, r, scale):
    """Columns of zeros among others, on one side, and columns that depend on others."""
    U, V = make_factors(0, n, m, r, batch=(4,), dtype=dtype)
    U = scale * U
    U[0, :, 1::2] = V[0, :, 1::2] = 0
    V[1, :, 1::2] = 0
    U[2, :, 1::2] = U[2, :, ::2]
    U[3, :, 1::2], V[3, :, 1::2] = U[3, :, ::2], V[3, :, ::2]
    values, rank = spectrum(U, V), min(n, m, r // 2)
    assert (values[:, rank:] == 0).all()
    np.testing.assert_allclose(
        values[:, :rank], dense_spectrum(U, V, r)[:, :rank], rtol=100 * RTOL[dtype]
    )


def test_where_rounding_begins():
    """At ``4 eps sum_k ||u_k|| ||v_k||``, which is 8.9e-16 here."""
    for value, kept in ((8e-16, 0.0), (1e-15, 1e-15)):
        values = spectrum(torch.diag(torch.tensor([1.0, value]).double()), torch.eye(2).double())
        torch.testing.assert_close(values, torch.tensor([1.0, kept]).double(), rtol=1e-6, atol=0)


def test_values_of_columns_whose_squares_overflow_are_kept(make_factors):
    U, V = make_factors(0, 6, 5, 2)
    np.testing.assert_allclose(spectrum(1e200 * U, V), 1e200 * spectrum(U, V), rtol=1e-10)


def test_gauges_that_scale_columns_take_no_value_away(make_factors):
    A, B = (torch.linalg.qr(factor).Q for factor in make_factors(0, 30, 20, 5))
    true = torch.logspace(0, -12, 5, dtype=torch.float64)
    scale = torch.logspace(100, -100, 5, dtype=torch.float64)
    np.testing.assert_allclose(spectrum(A * true * scale, B / scale), true, rtol=1e-2)


def test_empty_batch_and_rank_zero(make_factors):
    assert spectrum(*make_factors(0, 5, 4, 2, batch=(0, 3))).shape == (0, 3, 2)
    assert spectrum(*make_factors(0, 5, 4, 0, batch=(2,))).shape == (2, 0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_comes_out_as_float32(make_factors, half):
    U, V = make_factors(6, 8, 6, 3, dtype=half)
    values = spectrum(U, V)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, dense_spectrum(U, V, 3), rtol=1e-6)


@pytest.mark.parametrize(
    ("U", "V", "match"),
    [
        (torch.ones(4, 2), torch.ones(3, 3), r"\(4, 2\) and V of shape \(3, 3\)"),
        (torch.ones(2), torch.ones(3, 2), "same r"),
        (torch.ones(3, 2), torch.ones(2), "same r"),
        (torch.ones(4, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64), "floating"),
    ],
)
def test_rejects_what_is_no_pair_of_factors(U, V, match):
    with pytest.raises(ValueError, match=match):
        spectrum(U, V)


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    r=st.integers(1, 6),
    scale=st.floats(1e-3, 1e3),
)
def test_properties(make_factors, seed, n, m, r, scale):
    """Descending, homogeneous, symmetric in the two sides; their squares sum to the norm's."""
    U, V = make_factors(seed, n, m, r)
    values = spectrum(U, V)
    atol = 1e-12 * values[0].item()
    assert (values >= 0).all()
    assert (values.diff() <= 0).all()
    np.testing.assert_allclose(spectrum(V, U), values, rtol=0, atol=atol)
    np.testing.assert_allclose(spectrum(-scale * U, V), scale * values, rtol=0, atol=scale * atol)
    np.testing.assert_allclose(values.norm(), torch.linalg.matrix_norm(U @ V.mT), rtol=1e-10)


@pytest.mark.gpu
def test_agrees_across_devices(make_factors, cuda):
    U, V = make_factors(7, 40, 30, 5, batch=(8,), dtype=torch.float32)
    values = spectrum(U.to(cuda), V.to(cuda))
    assert values.device.type == "cuda"
    np.testing.assert_allclose(values.cpu(), spectrum(U, V), rtol=1e-6)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7])
def test_float32_input_is_right_for_factors_of_any_condition(make_factors, make_gauge, condition):
    """Gram matrices alone would be wrong from 1e5 on: there the triangles come from QR."""
    for seed in range(10):
        U, V = make_factors(seed, 80, 60, 6)
        U, V = (A.float() for A in apply_gauge(U, V, make_gauge(seed, 6, condition)))
        expected = dense_spectrum(U, V, 6)
        floor = 1e-6 * expected[0]
        np.testing.assert_allclose(spectrum(U, V), expected, rtol=1e-5, atol=1e-5 * floor)


def test_gram_matrices_are_not_used_beyond_their_digits(make_factors, make_gauge, monkeypatch):
    """The negative of the test above: without QR it would not hold."""
    monkeypatch.setattr(_tall, "_LARGEST_CONDITION", torch.inf)
    U, V = make_factors(0, 80, 60, 6, batch=(20,))
    gauged = apply_gauge(U, V, make_gauge(0, 6, 1e7, batch=(20,)))
    U, V = (A.float() for A in gauged)
    expected = dense_spectrum(U, V, 6)
    assert (abs(spectrum(U, V).numpy() - expected) > 1e-4 * expected).any()


def test_one_bad_factor_of_a_batch_does_not_change_the_others(make_factors):
    U, V = make_factors(0, 20, 16, 4, batch=(5,), dtype=torch.float32)
    U[2, :, 1] = U[2, :, 0]
    V[3] = 0
    values = spectrum(U, V)
    np.testing.assert_allclose(
        values, dense_spectrum(U, V, 4), rtol=1e-5, atol=1e-6 * values.max().item()
    )
    np.testing.assert_array_equal(values[[0, 1, 4]], spectrum(U[[0, 1, 4]], V[[0, 1, 4]]))
