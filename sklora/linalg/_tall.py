"""Products of tall, thin factors, arranged so that each number is read from memory about once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# Bytes of a piece that is worked on. On a CPU it stays in the cache between two steps; on a GPU,
# where every step takes microseconds to start, there are few.
_PIECE_BYTES = 2**21
_PIECE_BYTES_ON_GPU = 2**28
# A piece is cut so that it holds parts of so many factors, which the cores share out.
_PARTS = 8
# Rows whose products are summed in the factors' own dtype.
_SUMMED_ROWS = 4096
# Below this width a matrix product spends more time on its start than on its numbers.
_NARROW = 16
# From so many bytes on, a product goes straight to where it belongs, and one of narrow factors is
# faster as a part of a wider one.
_LARGE_BYTES = 2**17

# Squared norm of the inverse triangle up to which Cholesky is right to 1e-6: the rounding of a Gram
# matrix of many rows, some 1e-15, times this, with room to spare.
_LARGEST_CONDITION = 1e8


def _piece_bytes(A: Tensor) -> int:
    return _PIECE_BYTES if A.device.type == "cpu" else _PIECE_BYTES_ON_GPU


def gram(A: Tensor) -> Tensor:
    """Give ``A^T A`` in float64, piece by piece: no float64 copy of the whole is made.

    Parameters
    ----------
    A : Tensor of shape (..., n, r)

    Returns
    -------
    float64 Tensor of shape (..., r, r)
    """
    *batch, n, r = A.shape
    flat = A.reshape(math.prod(batch), n, r)
    if 0 < len(flat) < _PARTS <= n:
        # Few factors are cut into parts, which the cores share out.
        whole = n - n % _PARTS
        rest = flat[:, whole:].double()
        parts = flat[:, :whole].reshape(len(flat), _PARTS, whole // _PARTS, r)
        return (gram(parts).sum(1) + rest.mT @ rest).reshape(*batch, r, r)
    products = torch.zeros((len(flat), r, r), dtype=torch.float64, device=A.device)
    if not flat.numel():
        return products.reshape(*batch, r, r)
    piece_bytes = _piece_bytes(A)
    rows = -(-n // -(-8 * n * r * _PARTS // piece_bytes))
    step = min(len(flat), max(1, piece_bytes // (8 * rows * r)))
    # Copied as they lie in memory: the factor of a file may be its tensor transposed.
    by_columns = flat.stride(1) == 1
    shape = (step, r, rows) if by_columns else (step, rows, r)
    copies = torch.empty(shape, dtype=torch.float64, device=A.device)
    copies = copies.mT if by_columns else copies
    for top in range(0, n, rows):
        for first in range(0, len(flat), step):
            piece = flat[first : first + step, top : top + rows]
            copy = copies[: len(piece), : piece.shape[1]].copy_(piece)
            products[first : first + step].baddbmm_(copy.mT, copy)
    return products.reshape(*batch, r, r)


def cross_product(A: Tensor, B: Tensor) -> Tensor:
    """Give ``A^T B`` as a float64 sum of products of some rows, formed in the factors' dtype.

    Those that are too large or too small for that dtype are formed in float64.

    Parameters
    ----------
    A : Tensor of shape (..., n, r)
    B : Tensor of shape (..., n, s)
        Leading dimensions broadcast.

    Returns
    -------
    float64 Tensor of shape (..., r, s)
        Right to the rounding of the factors themselves.
    """
    dtype = torch.promote_types(A.dtype, B.dtype)
    batch = np.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    # Expanded, matmul makes one batch of the two; a matrix alone it would lay out anew.
    A, B = A.expand(*batch, -1, -1), B.expand(*batch, -1, -1)
    products = _sum_of_products(A, B, dtype)
    if dtype == torch.float64:
        return products
    size, limits = products.abs().sum(dim=(-2, -1)), torch.finfo(dtype)
    beyond = ~((size > limits.tiny / limits.eps) & (size < torch.inf))
    if beyond.any():
        products[beyond] = _sum_of_products(A[beyond], B[beyond], torch.float64)
    return products


def _sum_of_products(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    products = A.new_zeros((*A.shape[:-2], A.shape[-1], B.shape[-1]), dtype=torch.float64)
    for top in range(0, A.shape[-2], _SUMMED_ROWS):
        piece = slice(top, top + _SUMMED_ROWS)
        products += _product(A[..., piece, :].to(dtype), B[..., piece, :].to(dtype))
    return products


def _product(A: Tensor, B: Tensor) -> Tensor:
    """Give ``A^T B``, of narrow factors as the sum of the diagonal blocks of a wider product.

    That is more operations, but at several times the rate, and their sums are shorter. Of small
    factors the plain product is over before.
    """
    (n, r), s = A.shape[-2:], B.shape[-1]
    rows_adjoin = A.stride()[-2:] == B.stride()[-2:] == (r, 1)
    pays = A.nbytes >= _LARGE_BYTES and A.dtype != torch.float64
    # Rows of other widths do not fill the registers of a processor.
    if not pays or not 0 < r == s < _NARROW or _NARROW % r or not rows_adjoin:
        product: Tensor = A.mT @ B
        return product
    together = _NARROW // r
    whole = n - n % together
    wide = [
        factor[..., :whole, :].reshape(*factor.shape[:-2], whole // together, _NARROW)
        for factor in (A, B)
    ]
    blocks = wide[0].mT @ wide[1]
    blocks = blocks.reshape(*blocks.shape[:-2], together, r, together, r)
    product = blocks.diagonal(dim1=-4, dim2=-2).sum(-1)
    if whole < n:
        product += A[..., whole:, :].mT @ B[..., whole:, :]
    return product


def times_small(A: Tensor, Q: Tensor, *, out: Tensor) -> None:
    """Write ``A Q`` into `out`, for many tall ``A`` with a small ``Q`` each.

    Some rows of a narrow factor are multiplied as one, by a block-diagonal matrix: more
    operations, but at several times the rate.

    Parameters
    ----------
    A : Tensor of shape (B, n, r)
        Each factor lies in one piece of memory, row after row.
    Q : Tensor of shape (B, r, s)
    out : Tensor of shape (B, n, s)
        As `A` in memory.
    """
    (n_factors, n, r), s = A.shape, Q.shape[2]
    together = max(1, _NARROW // max(r, s))
    n_blocks = n // together
    whole = n_blocks * together
    blocks = torch.einsum("ij,brs->birjs", torch.eye(together, dtype=Q.dtype, device=Q.device), Q)
    blocks = blocks.reshape(n_factors, together * r, together * s)
    rows = A[:, :whole].reshape(n_factors, n_blocks, together * r)
    n_bytes = A.element_size() * whole * s
    if n_bytes >= _LARGE_BYTES and not A.is_cuda:
        torch.bmm(rows, blocks, out=out[:, :whole].view(n_factors, n_blocks, together * s))
    else:
        # Small products are fast only as one batch, into one piece of memory; from the cache they
        # are moved.
        step = max(1, _piece_bytes(A) // max(1, n_bytes))
        products = A.new_empty((min(step, n_factors), n_blocks, together * s))
        for first in range(0, n_factors, step):
            some = slice(first, first + step)
            product = torch.bmm(rows[some], blocks[some], out=products[: len(rows[some])])
            out[some, :whole] = product.view(len(product), whole, s)
    if whole < n:
        torch.bmm(A[:, whole:], Q, out=out[:, whole:])


def project(P: Tensor, A: Tensor) -> Tensor:
    """Give ``P A`` for many tall ``A``.

    The thin factor stands on the left of the product, and the columns of ``P`` are to be
    contiguous: other orders take two to ten times the time at small ranks.

    Parameters
    ----------
    P : Tensor of shape (k, n)
    A : Tensor of shape (B, n, r)

    Returns
    -------
    Tensor of shape (B, k, r)
        A view of its transpose.
    """
    return torch.bmm(A.mT, P.mT.expand(len(A), -1, -1)).mT


def triangles(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Give ``R`` in float64 with ``R^T R = A^T A`` for both factors ``A``.

    Factors of float32 are decomposed by Cholesky, from their Gram matrices, wherever their
    condition leaves that right to 1e-6; others by QR.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)
        Of the dtype of `U`.

    Returns
    -------
    R_U, R_V : float64 Tensor of shape (..., min(n, r), r) and (..., min(m, r), r)
    """
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
