"""Numbers that no decomposition can take, which CUDA would not say by itself."""

import pytest
import torch

from sklora.linalg import balance, leading_subspaces, procrustes, spectrum

KERNELS = {
    "spectrum": spectrum,
    "procrustes": lambda U, V: procrustes(U, V, U, V),
    "balance": balance,
    "leading_subspaces": lambda U, V: leading_subspaces(U, V, 2),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("number", [1e300, torch.inf, torch.nan])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_is_an_error(kernel, number, device, make_factors, request):
    if device == "cuda":
        request.getfixturevalue("cuda")
    U, V = (A.to(device) for A in make_factors(0, 9, 8, 2, batch=(3,)))
    with pytest.raises(torch.linalg.LinAlgError):
        kernel(number * U, V * number)
