"""The gauge group acting on factors, and a canonical choice of gauge."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sklora.linalg._factors import check_factors, column_signs, product_size, to_decompose


def apply_gauge(U: Tensor, V: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    r"""Act on the factors with an invertible ``R``: ``(U R, V R^-T)``, the same update.

    :math:`(U R)(V R^{-\top})^\top = U V^\top`. The inverse is a solve in float64.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)
    R : Tensor of shape (..., r, r)
        Invertible. Leading dimensions broadcast.

    Returns
    -------
    U, V : Tensor of shapes (..., n, r) and (..., m, r)

    Raises
    ------
    ValueError
        When ``R`` is not r x r, or the factors differ in rank.
    torch.linalg.LinAlgError
        When ``R`` is exactly singular.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import apply_gauge
    >>> U, V = torch.ones(3, 2), torch.ones(2, 2)
    >>> U2, V2 = apply_gauge(U, V, torch.tensor([[2.0, 1.0], [0.0, 4.0]]))
    >>> torch.allclose(U2 @ V2.mT, U @ V.mT)
    True
    """
    U, V = check_factors(U, V)
    rank = U.shape[-1]
    if R.shape[-2:] != (rank, rank):
        raise ValueError(
            f"a gauge of factors of rank {rank} has shape (..., {rank}, {rank}), "
            f"got {tuple(R.shape)}."
        )
    R = R.double()
    moved_V = torch.linalg.solve(R.mT, V.double(), left=False)
    return (U.double() @ R).to(U.dtype), moved_V.to(V.dtype)


def balance(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    r"""Canonical factors of ``U V^T``: orthogonal columns, equally long on both sides.

    With :math:`U = Q_U R_U`, :math:`V = Q_V R_V` and the singular value decomposition
    :math:`R_U R_V^\top = A S B^\top`, the factors are :math:`Q_U A S^{1/2}` and
    :math:`Q_V B S^{1/2}`. They depend on the update alone (for distinct singular values), so
    balancing is invariant to GL(r). The largest entry of every column of U is positive; of entries
    as large to 1e-4, the first is.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)

    Returns
    -------
    U, V : Tensor of shapes (..., n, r) and (..., m, r)
        Columns by falling singular value. Those whose singular value is no more than the rounding
        of the input, ``r eps sum_k ||u_k|| ||v_k||`` over its columns, are exactly zero and come
        last, so the balanced factors of rank-deficient or zero-padded input end in zero columns.

    Raises
    ------
    ValueError
        When the factors differ in rank or are not floating point.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import balance
    >>> U, V = balance(torch.tensor([[8.0], [0.0]]), torch.tensor([[0.5], [0.0]]))
    >>> U.T, V.T
    (tensor([[2., 0.]]), tensor([[2., 0.]]))
    """
    U, V = check_factors(U, V)
    rank = U.shape[-1]
    Q_U, R_U = torch.linalg.qr(U.double())
    Q_V, R_V = torch.linalg.qr(V.double())
    A, values, Bh = torch.linalg.svd(to_decompose(R_U @ R_V.mT), full_matrices=False)
    noise = rank * torch.finfo(U.dtype).eps * product_size(R_U, R_V)
    lengths = torch.where(values > noise[..., None], values, 0.0).sqrt()[..., None, :]
    left, right = Q_U @ A, Q_V @ Bh.mT
    signs = column_signs(left)
    padding = (0, rank - values.shape[-1])
    balanced_U = pad(left * (signs * lengths), padding)
    balanced_V = pad(right * (signs * lengths), padding)
    return balanced_U.to(U.dtype), balanced_V.to(V.dtype)
