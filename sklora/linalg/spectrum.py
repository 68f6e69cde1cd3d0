"""Singular values of updates that are never formed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sklora.linalg._factors import check_factors


def spectrum(U: Tensor, V: Tensor) -> Tensor:
    r"""Singular values of ``U V^T``, largest first.

    With the QR decompositions :math:`U = Q_U R_U` and :math:`V = Q_V R_V`, the update
    :math:`U V^\top = Q_U (R_U R_V^\top) Q_V^\top` has the singular values of the small matrix
    :math:`R_U R_V^\top`. Both run in float64: Gram matrices would square the condition of the gauge
    and lose the small singular values.

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
    R_U = torch.linalg.qr(U.double(), mode="r").R
    R_V = torch.linalg.qr(V.double(), mode="r").R
    values = torch.linalg.svdvals(R_U @ R_V.mT)
    return pad(values, (0, U.shape[-1] - values.shape[-1])).to(U.dtype)
