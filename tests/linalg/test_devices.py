"""Every kernel on CUDA: the numbers of the CPU, in a random gauge of either."""

import pytest
import torch

from sklora.linalg import (
    apply_gauge,
    balance,
    column_sums,
    compress_updates,
    dense_product,
    frobenius_norm,
    inner_product,
    leading_subspaces,
    pairwise_inner_products,
    procrustes,
    row_sums,
    spectrum,
    squared_norm,
)

pytestmark = pytest.mark.gpu

# Of factors U (12, 70, 4) and V (12, 50, 4); none depends on their gauge.
KERNELS = {
    "spectrum": spectrum,
    "dense_product": dense_product,
    "inner_product": lambda U, V: inner_product(U, V, U.flip(0), V.flip(0)),
    "pairwise_inner_products": lambda U, V: pairwise_inner_products(U, V, U[:5], V[:5]),
    "squared_norm": squared_norm,
    "frobenius_norm": frobenius_norm,
    "row_sums": row_sums,
    "column_sums": column_sums,
    "balance": lambda U, V: dense_product(*balance(U, V)),
    "compress_updates": lambda U, V: [A.mT @ A for A in compress_updates(U, V)[:2]],
    "leading_subspaces": lambda U, V: [P @ P.mT for P in leading_subspaces(U, V, 9)],
}
KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))


@pytest.fixture
def factors(make_factors, dtype):
    return make_factors(0, 70, 50, 4, batch=(12,), dtype=dtype)


@KERNEL
def test_the_same_in_another_gauge_on_cuda(kernel, factors, make_gauge, dtype, condition, cuda):
    gauge = make_gauge(1, 4, condition, batch=(12,))
    moved = apply_gauge(*(A.double().to(cuda) for A in factors), gauge.to(cuda))
    found, expected = kernel(*(A.to(dtype) for A in moved)), kernel(*factors)
    tolerance = 1e-8 if dtype == torch.float64 else 2e-3
    for one, other in zip(
        *([A] if torch.is_tensor(A) else A for A in (found, expected)), strict=True
    ):
        assert one.device.type == "cuda"
        size = other.abs().max().item()
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance * size)


def test_alignment_undoes_an_orthogonal_gauge_on_cuda(factors, dtype, cuda):
    U, V = (A.to(cuda) for A in factors)
    Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, device=cuda)).Q.to(dtype)
    found = procrustes(U @ Q, V @ Q, U, V)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, Q.mT.expand(12, -1, -1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e7])
def test_a_spectrum_in_a_bad_gauge_on_cuda(make_factors, make_gauge, condition, cuda):
    """From a condition of 1e5 on the triangles come from QR."""
    U, V = make_factors(0, 80, 60, 6, batch=(20,))
    expected = torch.linalg.svdvals(U @ V.mT)[:, :6]
    moved = apply_gauge(U, V, make_gauge(0, 6, condition, batch=(20,)))
    found = spectrum(*(A.float().to(cuda) for A in moved)).cpu().double()
    # What the rounding of the factors to float32 does by itself.
    rounded = spectrum(*(A.float().double() for A in moved))
    torch.testing.assert_close(found, rounded, rtol=1e-5, atol=1e-11 * expected.max().item())


@pytest.mark.parametrize("n", [5, 4099, 200_000])
def test_long_factors_are_summed_exactly_on_cuda(make_factors, n, cuda):
    U, V = make_factors(0, n, 40, 3, batch=(2,), dtype=torch.float32)
    found = squared_norm(U.to(cuda), V.to(cuda)).cpu()
    expected = squared_norm(U.double(), V.double()).float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    values = spectrum(U.to(cuda), V.to(cuda)).cpu()
    torch.testing.assert_close(values, spectrum(U, V), rtol=1e-5, atol=0)
