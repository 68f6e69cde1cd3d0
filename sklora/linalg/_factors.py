"""What every kernel asks of its factors, and the sign convention that they share."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def check_factors(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of an update in one dtype, float32 or float64.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)

    Returns
    -------
    U, V : Tensor
        The same numbers in their common dtype; half precision becomes float32.

    Raises
    ------
    ValueError
        When the two have different ranks, fewer than two dimensions, or are not floating point.
    """
    if U.ndim < 2 or V.ndim < 2 or U.shape[-1] != V.shape[-1]:
        raise ValueError(
            f"U of shape {tuple(U.shape)} and V of shape {tuple(V.shape)} are not the factors of "
            "one update: expected (..., n, r) and (..., m, r) with the same r."
        )
    dtype = torch.promote_types(U.dtype, V.dtype)
    if dtype in _HALF:
        dtype = torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"factors must be floating point, got U {U.dtype} and V {V.dtype}.")
    return U.to(dtype), V.to(dtype)


def to_decompose(A: Tensor) -> Tensor:
    """Give back a matrix that is finite, on its way to a decomposition.

    Raises
    ------
    torch.linalg.LinAlgError
        When it is not, on CUDA: some decompositions give numbers there, where those of a CPU raise
        this by themselves.
    """
    if A.is_cuda and not A.isfinite().all():
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "a matrix with NaN or infinity cannot be decomposed."
        )
    return A


def product_size(U: Tensor, V: Tensor) -> Tensor:
    """Size (...) of the terms of ``U V^T``, which rounding is relative to.

    It is ``sum_k ||u_k|| ||v_k||`` over the columns, of float64; those of triangles are as long as
    those of the factors. It grows with the condition of the gauge, as the rounding does, but not
    where a gauge scales columns, which rounds nothing away. Times the precision of the factors, it
    is what says nothing about the update.
    """
    size: Tensor = (_lengths(U) * _lengths(V)).sum(dim=-1)
    return size


def _lengths(A: Tensor) -> Tensor:
    """Lengths (..., r) of columns."""
    # Products are faster for tall factors, and torch.export, which has doubts about sums and which
    # side is longer, has none of them; of wide ones they would be large.
    if torch.compiler.is_exporting() or A.shape[-2] > A.shape[-1]:
        return (A.mT @ A).diagonal(dim1=-2, dim2=-1).sqrt()
    return A.square().sum(dim=-2).sqrt()


def narrowed(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Give factors of the same update whose rank is at most its smaller side.

    Those of a larger rank, as LoHa's are, would make products as large as the rank. They become the
    update itself and an identity, in float64; others stay as they are.
    """
    if U.shape[-1] <= min(U.shape[-2], V.shape[-2]):
        return U, V
    if U.shape[-2] > V.shape[-2]:
        return narrowed(V, U)[::-1]
    transposed = V.double() @ U.double().mT
    identity = torch.eye(U.shape[-2], dtype=torch.float64, device=U.device)
    return identity.expand(*transposed.shape[:-2], -1, -1), transposed


def column_signs(A: Tensor) -> Tensor:
    """Signs (..., 1, k) that make the largest entry of each column of ``A`` positive.

    Of entries that are as large to 1e-4 it is the first, so that rounding does not decide. The sign
    of a column of zeros is zero.
    """
    sizes = A.abs()
    is_largest = sizes >= (1 - 1e-4) * sizes.amax(dim=-2, keepdim=True)
    largest = is_largest.to(torch.uint8).argmax(dim=-2, keepdim=True)
    return torch.sign(A.gather(-2, largest))
