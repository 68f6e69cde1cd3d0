"""Singular values of updates that are never formed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sklora.linalg._factors import check_factors, product_size, to_decompose
from sklora.linalg._tall import triangles


def spectrum(U: Tensor, V: Tensor) -> Tensor:
    r"""Singular values of ``U V^T``, largest first.

    With :math:`R_U^\top R_U = U^\top U` and :math:`R_V^\top R_V = V^\top V`, the update has the
    singular values of the small matrix :math:`R_U R_V^\top`. The triangles come from QR
    decompositions in float64; for factors of float32, from Cholesky decompositions of the Gram
    matrices in float64, which have twice the digits of the factors, wherever the condition of the
    factor, its columns scaled to one length, leaves them right to 1e-6.

    Values that are no more than the rounding of all that, :math:`4 \epsilon \sum_k \|u_k\|
    \|v_k\|` over the columns of the factors, with the :math:`\epsilon` of float64, are zero. So
    directions that updates do not have give no numbers, where columns of zeros stand among others
    as after pruning (AdaLoRA), or depend on others.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
        Output side.
    V : Tensor of shape (..., m, r)
        Input side.

    Returns
    -------
    values : Tensor of shape (..., r)
        In descending order. Beyond ``min(n, m)``, and beyond the rank of the update, they are
        exactly zero.

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
    R_U, R_V = triangles(U, V)
    values = torch.linalg.svdvals(to_decompose(R_U @ R_V.mT))
    rounding = 4 * torch.finfo(values.dtype).eps * product_size(R_U, R_V)[..., None]
    values = torch.where((values <= rounding) & rounding.isfinite(), 0.0, values)
    return pad(values, (0, U.shape[-1] - values.shape[-1])).to(U.dtype)
