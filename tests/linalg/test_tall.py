import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sklora.linalg import _tall
from sklora.linalg._tall import cross_product, gram, project, times_small, triangles


@pytest.fixture(params=[2**21, 50], ids=["one-piece", "pieces"])
def pieces(request, monkeypatch):
    """Cut the same products into few pieces and into many."""
    monkeypatch.setattr(_tall, "_PIECE_BYTES", 8 * request.param)
    monkeypatch.setattr(_tall, "_SUMMED_ROWS", request.param)


@pytest.mark.parametrize(
    "shape", [(7, 3), (1, 40, 4), (5, 2, 61, 4), (3, 1, 1), (2, 0, 3), (0, 4, 2), (2, 3, 4, 0)]
)
def test_gram_is_exact_to_float64(make_factors, pieces, shape):
    *batch, n, r = shape
    A = make_factors(0, n, 2, r, batch=batch, dtype=torch.float32)[0]
    found = gram(A)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, A.double().mT @ A.double(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("batch", [(), (1,), (2,), (9,)])
def test_gram_of_transposed_factors(make_factors, pieces, batch):
    A = make_factors(2, 4, 2, 61, batch=batch, dtype=torch.float32)[0].mT
    torch.testing.assert_close(gram(A), A.double().mT @ A.double(), rtol=1e-13, atol=1e-13)


def test_gram_of_views_of_flat_rows(make_factors, pieces):
    flat = make_factors(1, 6, 2, 100, dtype=torch.float32)[0]
    A = flat[:, 10:70].view(6, 20, 3)
    torch.testing.assert_close(gram(A), A.double().mT @ A.double(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("r", "s"), [(0, 0), (0, 4), (1, 1), (2, 2), (3, 3), (4, 4), (4, 5), (8, 8), (16, 16), (20, 20)]
)
@pytest.mark.parametrize("n", [3, 499, 512])
@pytest.mark.parametrize("padding", [0, 2])
def test_cross_product_is_right_to_the_rounding_of_the_factors(
    make_factors, pieces, dtype, r, s, n, padding, monkeypatch
):
    monkeypatch.setattr(_tall, "_LARGE_BYTES", 0)
    A = make_factors(0, n, 2, r + padding, batch=(3, 1), dtype=dtype)[0][..., :r]
    B = make_factors(1, n, 2, s, batch=(2,), dtype=dtype)[0]
    found = cross_product(A, B)
    assert found.shape == (3, 2, r, s)
    assert found.dtype == torch.float64
    sizes = A.double().norm(dim=-2)[..., None] * B.double().norm(dim=-2)[..., None, :]
    error = (found - A.double().mT @ B.double()).abs() / sizes
    assert (error < 4 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize(("n", "times"), [(64, 1), (4096, 4)])
def test_cross_products_are_made_of_wider_ones_where_that_is_faster(make_factors, n, times):
    A, B = make_factors(0, n, n, 4, batch=(4,), dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        cross_product(A, B)
    assert counter.get_total_flops() == times * 4 * 2 * n * 4 * 4


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.float64)], ids=str)
def test_cross_product_beside_others_that_overflow(make_factors, pieces, batch, dtypes):
    """The square of a size is too small for float32, right, or too large, or all three."""
    scales = torch.tensor([1e-30, 1.0, 1e30], dtype=torch.float64)
    for scale in (scales[:, None, None],) if batch else scales:
        A, B = (
            (scale * make_factors(seed, 500, 2, r, batch=batch)[0]).to(dtype)
            for seed, (r, dtype) in enumerate(zip((4, 5), dtypes, strict=True))
        )
        expected = A.double().mT @ B.double()
        sizes = A.double().norm(dim=-2)[..., None] * B.double().norm(dim=-2)[..., None, :]
        assert ((cross_product(A, B) - expected).abs() / sizes).max() < 1e-6


@pytest.mark.parametrize(
    ("n", "r", "s"), [(37, 4, 4), (16, 1, 3), (5, 20, 18), (3, 0, 2), (1, 2, 2)]
)
@pytest.mark.parametrize("large_bytes", [1, 2**17])
def test_times_small_is_the_product(make_factors, pieces, monkeypatch, dtype, n, r, s, large_bytes):
    monkeypatch.setattr(_tall, "_LARGE_BYTES", large_bytes)
    A = make_factors(0, n, 2, r, batch=(6,), dtype=dtype)[0]
    Q = make_factors(1, r, 2, s, batch=(6,), dtype=dtype)[0]
    flat = torch.full((6, 2 * n * s), torch.nan, dtype=dtype)
    times_small(A, Q, out=flat[:, : n * s].view(6, n, s))
    found = flat[:, : n * s].view(6, n, s)
    np.testing.assert_allclose(found, A @ Q, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert flat[:, n * s :].isnan().all()


@pytest.mark.parametrize("r", [0, 1, 4])
@pytest.mark.parametrize("columns", [True, False], ids=["by-columns", "by-rows"])
def test_project_is_the_product(make_factors, dtype, r, columns):
    A = make_factors(0, 40, 2, r, batch=(6,), dtype=dtype)[0]
    P = make_factors(1, 7, 2, 40, dtype=dtype)[0]
    found = project(P.mT.contiguous().mT if columns else P, A)
    torch.testing.assert_close(found, P @ A, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_triangles_of_factors_that_broadcast(make_factors):
    """A well-conditioned factor goes with several, one of which wants a QR decomposition."""
    U = make_factors(0, 9, 2, 3, batch=(2, 1), dtype=torch.float32)[0]
    V = make_factors(1, 7, 2, 3, batch=(3,), dtype=torch.float32)[0]
    V[1, :, 1] = V[1, :, 0] * (1 + 1e-6)
    for factors in ((U, V), (V, U)):
        for R, A in zip(triangles(*factors), factors, strict=True):
            assert R.shape == (2, 3, 3, 3)
            torch.testing.assert_close(R.mT @ R, (A.double().mT @ A.double()).expand(2, 3, 3, 3))


@pytest.mark.parametrize(("gap", "n_by_qr"), [(1.0, 0), (2e-4, 0), (1e-4, 1), (0.0, 1)])
def test_condition_alone_decides_what_is_decomposed_by_qr(monkeypatch, gap, n_by_qr):
    """From ``2 / gap^2 = 1e8`` on, and not for padding."""
    U = torch.tensor([[1.0, 1.0, 0.0], [0.0, gap, 0.0], [0.0, 0.0, 0.0]])
    sizes, by_qr = [], _tall._qr_triangle
    monkeypatch.setattr(_tall, "_qr_triangle", lambda A: sizes.append(len(A)) or by_qr(A))
    R, _ = triangles(U, torch.eye(3))
    assert sum(sizes) == n_by_qr
    torch.testing.assert_close(R.abs(), U.double(), rtol=1e-6, atol=1e-15)  # U is a triangle


@pytest.mark.parametrize("size", [1e-18, 1e-20, 5e-21, 1e-22])
def test_cross_product_that_is_about_the_least_that_a_dtype_can_hold(make_factors, size):
    """Its entries have lost digits well before all of them together are as small."""
    A, B = (size * make_factors(seed, 4, 2, 40)[0] for seed in (3, 4))
    A, B = A.float(), B.float()
    sizes = A.double().norm(dim=-2)[..., None] * B.double().norm(dim=-2)[..., None, :]
    error = (cross_product(A, B) - A.double().mT @ B.double()).abs() / sizes
    assert error.max() < 4 * torch.finfo(A.dtype).eps


@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
def test_cross_product_that_overflows_without_a_nan(pieces, signs):
    """Sums of one sign are infinite; of both, they are NaN."""
    A, B = (sign * torch.full((2, 500, 3), 1e30) for sign in signs)
    A[1] = signs[0]
    expected = A.double().mT @ B.double()
    torch.testing.assert_close(cross_product(A, B), expected, rtol=1e-5, atol=0)
