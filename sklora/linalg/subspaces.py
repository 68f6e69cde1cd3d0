"""Leading singular subspaces of a whole stack of updates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sklora.linalg._factors import check_factors, column_signs, product_size, to_decompose
from sklora.linalg._tall import triangles


class CompressedUpdates(NamedTuple):
    """Two small matrices with the singular vectors of a whole stack of updates.

    Attributes
    ----------
    left : float64 Tensor of shape (..., q, n)
        ``left^T left`` is the sum of ``dW_i dW_i^T``; q is at most n.
    right : float64 Tensor of shape (..., q, m)
        ``right^T right`` is the sum of ``dW_i^T dW_i``; q is at most m.
    noise : float64 Tensor of shape (...)
        Singular values no larger than this are the rounding of the factors, not signal.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import compress_updates
    >>> compressed = compress_updates(torch.randn(5, 8, 2), torch.randn(5, 6, 2))
    >>> compressed.left.shape, compressed.right.shape
    (torch.Size([8, 8]), torch.Size([6, 6]))
    """

    left: Tensor
    right: Tensor
    noise: Tensor


def compress_updates(
    U: Tensor, V: Tensor, *, previous: CompressedUpdates | None = None
) -> CompressedUpdates:
    r"""Two small matrices with the singular vectors of all N updates at once.

    With :math:`V_i = Q_i R_i`, the stack :math:`[U_1 V_1^\top, \ldots, U_N V_N^\top]` (n x N m) has
    the left singular vectors and singular values of :math:`[U_1 R_1^\top, \ldots, U_N R_N^\top]`
    (n x N r), of which a second QR keeps the triangle when it has more columns than rows. No
    update is formed, and everything runs in float64; see :func:`spectrum` for the triangles.

    Parameters
    ----------
    U : Tensor of shape (..., N, n, r)
    V : Tensor of shape (..., N, m, r)
    previous : CompressedUpdates, default=None
        What earlier blocks of the same stack gave; the result then covers them too.

    Returns
    -------
    compressed : CompressedUpdates

    Raises
    ------
    ValueError
        When the factors differ in rank or there is no dimension N.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import compress_updates
    >>> U, V = torch.randn(10, 4, 2), torch.randn(10, 3, 2)
    >>> first = compress_updates(U[:5], V[:5])
    >>> left, right, _ = compress_updates(U[5:], V[5:], previous=first)
    >>> updates = (U @ V.mT).double()
    >>> torch.allclose(left.T @ left, (updates @ updates.mT).sum(0), rtol=1e-4, atol=1e-4)
    True
    """
    U, V = check_factors(U, V)
    if min(U.ndim, V.ndim) < 3:
        raise ValueError(
            "expected stacks (..., N, n, r) and (..., N, m, r), got U of shape "
            f"{tuple(U.shape)} and V of shape {tuple(V.shape)}."
        )
    R_U, R_V = triangles(U, V)
    rounding = torch.finfo(U.dtype).eps * product_size(R_U, R_V)
    noise = torch.linalg.vector_norm(rounding, dim=-1)
    left, right = ((R @ A.double().mT).flatten(-3, -2) for R, A in ((R_V, U), (R_U, V)))
    if previous is not None:
        left = torch.cat([previous.left, left], dim=-2)
        right = torch.cat([previous.right, right], dim=-2)
        noise = torch.hypot(previous.noise, noise)
    return CompressedUpdates(_at_most_square(left), _at_most_square(right), noise)


def leading_directions(compressed: Tensor, k: int, *, noise: Tensor | float = 0.0) -> Tensor:
    """Orthonormal basis of the k leading right singular vectors of a compressed stack.

    Parameters
    ----------
    compressed : Tensor of shape (..., q, n)
        One of the two matrices of :func:`compress_updates`.
    k : int
        At most ``min(q, n)``.
    noise : Tensor of shape (...) or float, default=0.0
        Directions whose singular value is no more than this carry no signal; their columns are
        zero.

    Returns
    -------
    basis : Tensor of shape (..., n, k)
        The largest entry of every column is positive.

    Raises
    ------
    ValueError
        When the stack has fewer than ``k`` directions.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import leading_directions
    >>> leading_directions(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 1).T
    tensor([[0., 1., 0.]])
    """
    available = min(compressed.shape[-2:])
    if not 1 <= k <= available:
        raise ValueError(
            f"k={k} directions asked of updates that have {available} of them; "
            "use fewer directions or more updates."
        )
    noise = torch.as_tensor(noise, dtype=compressed.dtype, device=compressed.device)
    # What the square of the matrix loses of its small values is below the noise of float32 factors.
    if (
        noise < 4 * torch.finfo(noise.dtype).eps ** 0.5 * torch.linalg.matrix_norm(compressed)
    ).any():
        _, values, vectors = torch.linalg.svd(to_decompose(compressed), full_matrices=False)
        values, basis = values[..., :k], vectors[..., :k, :].mT
    else:
        values, basis = _leading_by_gram(compressed, k)
    basis = basis * column_signs(basis)
    is_signal = values > noise[..., None]
    return torch.where(is_signal[..., None, :], basis, torch.zeros_like(basis))


def leading_subspaces(U: Tensor, V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""Leading left and right singular subspaces of N updates: the factors of a truncated HOSVD.

    The left basis spans the k leading left singular vectors of
    :math:`[U_1 V_1^\top, \ldots, U_N V_N^\top]`, the right basis those of the stack of transposes
    [1]_. They depend on the updates alone, so they are invariant to GL(r) where a basis fitted on
    the raw factors is not.

    Parameters
    ----------
    U : Tensor of shape (..., N, n, r)
    V : Tensor of shape (..., N, m, r)
    k : int
        Directions wanted. A side with fewer rows than ``k`` gives all it has.

    Returns
    -------
    P : Tensor of shape (..., n, min(k, n))
    Q : Tensor of shape (..., m, min(k, m))
        Orthonormal columns by falling singular value, the largest entry of each positive. Columns
        whose singular value is no more than the rounding of the input are zero.

    Raises
    ------
    ValueError
        When ``N min(n, m, r)`` is less than ``min(k, n)`` or ``min(k, m)``, or the factors differ
        in rank.

    References
    ----------
    .. [1] L. De Lathauwer, B. De Moor and J. Vandewalle, "A multilinear singular value
       decomposition", SIAM J. Matrix Anal. Appl. 21, 2000.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import leading_subspaces
    >>> U, V = torch.randn(20, 6, 2), torch.randn(20, 5, 2)
    >>> P, Q = leading_subspaces(U, V, 3)
    >>> P.shape, Q.shape
    (torch.Size([6, 3]), torch.Size([5, 3]))
    """
    U, V = check_factors(U, V)
    left, right, noise = compress_updates(U, V)
    P = leading_directions(left, min(k, U.shape[-2]), noise=noise)
    Q = leading_directions(right, min(k, V.shape[-2]), noise=noise)
    return P.to(U.dtype), Q.to(V.dtype)


def _at_most_square(rows: Tensor) -> Tensor:
    return rows if rows.shape[-2] <= rows.shape[-1] else torch.linalg.qr(rows, mode="r").R


def _leading_by_gram(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the k largest singular values (..., k) and right vectors (..., n, k), by a Gram."""
    wide = rows.shape[-2] < rows.shape[-1]
    squares, vectors = torch.linalg.eigh(to_decompose(rows @ rows.mT if wide else rows.mT @ rows))
    values = squares[..., -k:].flip(-1).clamp(min=0.0).sqrt()
    leading = vectors[..., -k:].flip(-1)
    # The lengths are left to the QR decomposition, which makes them orthonormal too.
    return values, torch.linalg.qr(rows.mT @ leading).Q if wide else leading
