"""Orthogonal alignment of factors to a template."""

from __future__ import annotations

import torch
from torch import Tensor

from sklora.linalg._factors import check_factors, to_decompose
from sklora.linalg._tall import cross_product


def procrustes(U: Tensor, V: Tensor, U0: Tensor, V0: Tensor) -> Tensor:
    r"""Orthogonal ``Q`` that brings ``(U Q, V Q)`` nearest to the template ``(U0, V0)``.

    The minimiser of :math:`\|U Q - U_0\|_F^2 + \|V Q - V_0\|_F^2` is :math:`Q = A B^\top` where
    :math:`A S B^\top = U^\top U_0 + V^\top V_0` [1]_. It ranges over the whole of O(r), reflections
    included. It is unique if and only if that matrix has full rank; zero-padded columns make it
    singular, so pass factors at their true rank.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)
    U0 : Tensor of shape (..., n, r0)
    V0 : Tensor of shape (..., m, r0)
        The template; ``r <= r0``. Leading dimensions broadcast.

    Returns
    -------
    Q : Tensor of shape (..., r, r0)
        Its rows are orthonormal, so ``(U Q) (V Q)^T = U V^T`` for ``r <= r0``.

    Raises
    ------
    ValueError
        When the factors do not belong together, or ``r > r0``.

    References
    ----------
    .. [1] P. H. Schonemann, "A generalized solution of the orthogonal Procrustes problem",
       Psychometrika 31, 1966.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import procrustes
    >>> U0, V0 = torch.randn(5, 2), torch.randn(4, 2)
    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> Q = procrustes(U0 @ swap, V0 @ swap, U0, V0)
    >>> torch.allclose(Q, swap, atol=1e-5)
    True
    """
    U, V = check_factors(U, V)
    U0, V0 = check_factors(U0, V0)
    if U.shape[-2] != U0.shape[-2] or V.shape[-2] != V0.shape[-2]:
        raise ValueError(
            f"an update of shape ({U.shape[-2]}, {V.shape[-2]}) cannot be aligned to a template of "
            f"shape ({U0.shape[-2]}, {V0.shape[-2]})."
        )
    if U.shape[-1] > U0.shape[-1]:
        raise ValueError(
            f"rank {U.shape[-1]} exceeds the template's rank {U0.shape[-1]}; "
            "choose a template of at least that rank."
        )
    cross = cross_product(U, U0) + cross_product(V, V0)
    A, _, Bh = torch.linalg.svd(to_decompose(cross), full_matrices=False)
    Q: Tensor = A @ Bh
    return Q.to(U.dtype)
