"""Singular values of updates that are never formed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from sklora.linalg._factors import check_factors
from sklora.linalg._tall import gram

# Squared norm of the inverse triangle up to which Cholesky is right to 1e-6: the rounding of a Gram
# matrix of many rows, some 1e-15, times this, with room to spare.
_LARGEST_CONDITION = 1e8


def spectrum(U: Tensor, V: Tensor) -> Tensor:
    r"""Singular values of ``U V^T``, largest first.

    With :math:`R_U^\top R_U = U^\top U` and :math:`R_V^\top R_V = V^\top V`, the update has the
    singular values of the small matrix :math:`R_U R_V^\top`. The triangles come from QR
    decompositions in float64; for factors of float32, from Cholesky decompositions of the Gram
    matrices in float64, which have twice the digits of the factors, wherever the condition of the
    factor, its columns scaled to one length, leaves them right to 1e-6.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
        Output side.
    V : Tensor of shape (..., m, r)
        Input side.

    Returns
    -------
    values : Tensor of shape (..., r)
        In descending order. Beyond ``min(n, m)`` they are exactly zero.

    Raises
    ------
    ValueError
        When the factors differ in rank or are not floating point.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import spectrum
    >>> U, V = torch.eye(4)[:, :2], torch.eye(3)[:, :2]
    >>> spectrum(U * torch.tensor([1.0, 2.0]), V)
    tensor([2., 1.])
    """
    U, V = check_factors(U, V)
    R_U, R_V = _triangles(U, V)
    values = torch.linalg.svdvals(R_U @ R_V.mT)
    return pad(values, (0, U.shape[-1] - values.shape[-1])).to(U.dtype)


def _triangles(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Give upper triangles ``R`` in float64 with ``R^T R = A^T A``, for both factors ``A``."""
    if U.dtype == torch.float64 or min(U.shape[-2], V.shape[-2]) < U.shape[-1]:
        return _qr_triangle(U), _qr_triangle(V)
    batch, r = np.broadcast_shapes(U.shape[:-2], V.shape[:-2]), U.shape[-1]
    grams = torch.stack([gram(A).expand(*batch, r, r) for A in (U, V)])
    lengths = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    # A column of zeros, as padding has, is a column of zeros in the triangle.
    scale = torch.where(lengths > 0, lengths, 1.0)
    grams = grams.div_(scale[..., None]).div_(scale[..., None, :])
    grams.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    L, failed = torch.linalg.cholesky_ex(grams)
    triangles = L.mT * lengths[..., None, :]
    eye = torch.eye(r, dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    poor = (failed > 0) | ~(inverse.square().sum(dim=(-2, -1)) <= _LARGEST_CONDITION)
    if poor.any():
        for A, R, chosen in zip((U, V), triangles, poor, strict=True):
            R[chosen] = _qr_triangle(A.expand(*batch, *A.shape[-2:])[chosen])
    return triangles[0], triangles[1]


def _qr_triangle(A: Tensor) -> Tensor:
    R: Tensor = torch.linalg.qr(A.double(), mode="r").R
    return R
