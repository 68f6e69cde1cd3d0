"""Products, inner products, norms and sums of updates, from the factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sklora.linalg._factors import check_factors, narrowed

# Entries of the two (r1 N1) x (r2 N2) matrices that add_inner_products holds at once.
_PAIR_ENTRIES = 2**21
# Strips of rows, at least, that symmetric products are cut into: each begins at its diagonal.
_STRIPS = 4


def dense_product(U: Tensor, V: Tensor) -> Tensor:
    """The update ``U V^T`` itself.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)

    Returns
    -------
    update : Tensor of shape (..., n, m)

    Raises
    ------
    ValueError
        When the factors differ in rank or are not floating point.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import dense_product
    >>> dense_product(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [0.0]]))
    tensor([[3., 0.],
            [6., 0.]])
    """
    U, V = check_factors(U, V)
    return U @ V.mT


def inner_product(U1: Tensor, V1: Tensor, U2: Tensor, V2: Tensor) -> Tensor:
    r"""Frobenius inner product of two updates, without forming either.

    :math:`\langle U_1 V_1^\top, U_2 V_2^\top \rangle_F = \sum_{ab} (U_1^\top U_2)_{ab}
    (V_1^\top V_2)_{ab}`, summed in float64.

    Parameters
    ----------
    U1 : Tensor of shape (..., n, r1)
    V1 : Tensor of shape (..., m, r1)
    U2 : Tensor of shape (..., n, r2)
    V2 : Tensor of shape (..., m, r2)
        The ranks may differ. Leading dimensions broadcast.

    Returns
    -------
    products : Tensor of shape (...)

    Raises
    ------
    ValueError
        When the factors do not belong together, or the updates differ in shape.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import inner_product
    >>> U, V = torch.ones(3, 2), torch.ones(4, 2)
    >>> inner_product(U, V, U, V)
    tensor(48.)
    """
    U1, V1 = check_factors(U1, V1)
    U2, V2 = check_factors(U2, V2)
    _check_same_update_shape(U1, V1, U2, V2)
    dtype = torch.promote_types(U1.dtype, U2.dtype)
    (U1, V1), (U2, V2) = narrowed(U1, V1), narrowed(U2, V2)
    grams = (U1.double().mT @ U2.double()) * (V1.double().mT @ V2.double())
    return grams.sum(dim=(-2, -1)).to(dtype)


def pairwise_inner_products(U1: Tensor, V1: Tensor, U2: Tensor, V2: Tensor) -> Tensor:
    r"""Frobenius inner products of every adapter of one stack with every one of another.

    Entry ``(a, b)`` is :math:`\sum_g \langle U_{1,ag} V_{1,ag}^\top, U_{2,bg} V_{2,bg}^\top
    \rangle_F`, over the middle dimensions ``g``: with modules there, it is the inner product of
    whole adapters. Computed in float64, module by module, so that memory stays bounded.

    Parameters
    ----------
    U1 : Tensor of shape (N1, ..., n, r1)
    V1 : Tensor of shape (N1, ..., m, r1)
    U2 : Tensor of shape (N2, ..., n, r2)
    V2 : Tensor of shape (N2, ..., m, r2)

    Returns
    -------
    products : Tensor of shape (N1, N2)

    Raises
    ------
    ValueError
        When the factors do not belong together, there is no leading dimension, or the updates or
        their middle dimensions differ in shape.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import pairwise_inner_products
    >>> U, V = torch.ones(2, 3, 1), torch.ones(2, 4, 1)
    >>> pairwise_inner_products(U, V, U[:1], 2 * V[:1])
    tensor([[24.],
            [24.]])
    """
    U1, V1 = check_factors(U1, V1)
    U2, V2 = check_factors(U2, V2)
    _check_same_update_shape(U1, V1, U2, V2)
    for U, V in ((U1, V1), (U2, V2)):
        if U.shape[:-2] != V.shape[:-2]:
            raise ValueError(
                "the factors of a stack have the same leading dimensions, got "
                f"{tuple(U.shape[:-2])} and {tuple(V.shape[:-2])}."
            )
    if min(U1.ndim, U2.ndim) < 3 or U1.shape[1:-2] != U2.shape[1:-2]:
        raise ValueError(
            "expected two stacks (N, ..., n, r) with the same middle dimensions, got U1 of shape "
            f"{tuple(U1.shape)} and U2 of shape {tuple(U2.shape)}."
        )
    products = torch.zeros((len(U1), len(U2)), dtype=torch.float64, device=U1.device)
    symmetric = U1 is U2 and V1 is V2
    for factors in zip(*map(_by_module, (U1, V1, U2, V2)), strict=True):
        add_inner_products(products, *factors, symmetric=symmetric)
    return products.to(torch.promote_types(U1.dtype, U2.dtype))


def add_inner_products(
    products: Tensor, U1: Tensor, V1: Tensor, U2: Tensor, V2: Tensor, *, symmetric: bool = False
) -> None:
    r"""Add the inner products of the updates of one module, pair by pair, to those of others.

    Entry ``(a, b)`` grows by :math:`\langle U_{1,a} V_{1,a}^\top, U_{2,b} V_{2,b}^\top \rangle_F`.
    Beside copies of the factors in float64, little memory is taken. Each pair costs
    ``2 (n + m) r1 r2`` floating-point operations, with ranks of at most ``min(n, m)``.

    Parameters
    ----------
    products : Tensor of shape (N1, N2), of float64
        Changed in place.
    U1 : Tensor of shape (N1, n, r1)
    V1 : Tensor of shape (N1, m, r1)
    U2 : Tensor of shape (N2, n, r2)
    V2 : Tensor of shape (N2, m, r2)
    symmetric : bool, default=False
        Whether the second stack is the first, which halves the work.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg.products import add_inner_products
    >>> products = torch.zeros(2, 1, dtype=torch.float64)
    >>> U, V = torch.ones(2, 3, 1), torch.ones(2, 4, 1)
    >>> add_inner_products(products, U, V, U[:1], 2 * V[:1])
    >>> products
    tensor([[24.],
            [24.]], dtype=torch.float64)
    """
    left = _columns(U1, V1)
    right = left if symmetric else _columns(U2, V2)
    (N1, N2), r1, r2 = products.shape, left[0].shape[1], right[0].shape[1]
    step = _PAIR_ENTRIES // max(1, r1 * r2 * N2)
    if symmetric:
        step = min(step, math.ceil(N1 / _STRIPS))
    step = max(1, step)
    for start in range(0, N1, step):
        stop = min(start + step, N1)
        first = start if symmetric else 0
        # A product for every column of the second stack takes the factors as they lie.
        U_gram, V_gram = (
            torch.bmm(A[start:stop].flatten(0, 1).expand(r2, -1, -1), B[first:].permute(1, 2, 0))
            for A, B in zip(left, right, strict=True)
        )
        grams = U_gram.mul_(V_gram).view(r2, stop - start, r1, N2 - first)
        strip = grams.sum(dim=(0, 2))
        products[start:stop, first:] += strip
        if symmetric:
            products[stop:, start:stop] += strip[:, stop - start :].mT


def squared_norm(U: Tensor, V: Tensor) -> Tensor:
    r"""Squared Frobenius norm of ``U V^T``, from two r x r Gram matrices.

    :math:`\|U V^\top\|_F^2 = \sum_{ab} (U^\top U)_{ab} (V^\top V)_{ab}`, summed in float64. An
    update of rank above ``min(n, m)`` is formed: it takes less than its factors then. The relative
    error is about ``1e-16 c^2`` for a gauge of condition ``c``, its columns scaled to one length.
    What is no more than the rounding of the sum, ``4 eps s^2`` with ``s = sum_k ||u_k|| ||v_k||``
    over the columns, is zero.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)

    Returns
    -------
    norms : Tensor of shape (...)

    Raises
    ------
    ValueError
        When the factors differ in rank or are not floating point.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import squared_norm
    >>> squared_norm(torch.ones(3, 2), torch.ones(4, 2))
    tensor(48.)
    """
    U, V = check_factors(U, V)
    return _squared_norm(U, V).to(U.dtype)


def frobenius_norm(U: Tensor, V: Tensor) -> Tensor:
    """Frobenius norm of ``U V^T``: the square root of :func:`squared_norm`, taken in float64.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)

    Returns
    -------
    norms : Tensor of shape (...)

    Raises
    ------
    ValueError
        When the factors differ in rank or are not floating point.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import frobenius_norm
    >>> frobenius_norm(torch.full((2, 1), 3.0), torch.full((2, 1), 2.0))
    tensor(12.)
    """
    U, V = check_factors(U, V)
    return _squared_norm(U, V).sqrt().to(U.dtype)


def row_sums(U: Tensor, V: Tensor) -> Tensor:
    """Sums of the rows of the update: ``U (V^T 1)``.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)

    Returns
    -------
    sums : Tensor of shape (..., n)

    Raises
    ------
    ValueError
        When the factors differ in rank or are not floating point.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import row_sums
    >>> row_sums(torch.tensor([[1.0], [2.0]]), torch.ones(3, 1))
    tensor([3., 6.])
    """
    U, V = check_factors(U, V)
    return (U @ V.sum(dim=-2)[..., None])[..., 0]


def column_sums(U: Tensor, V: Tensor) -> Tensor:
    """Sums of the columns of the update: ``V (U^T 1)``.

    Parameters
    ----------
    U : Tensor of shape (..., n, r)
    V : Tensor of shape (..., m, r)

    Returns
    -------
    sums : Tensor of shape (..., m)

    Raises
    ------
    ValueError
        When the factors differ in rank or are not floating point.

    Examples
    --------
    >>> import torch
    >>> from sklora.linalg import column_sums
    >>> column_sums(torch.tensor([[1.0], [2.0]]), torch.ones(3, 1))
    tensor([3., 3., 3.])
    """
    return row_sums(V, U)


def _squared_norm(U: Tensor, V: Tensor) -> Tensor:
    U, V = U.double(), V.double()
    if U.shape[-1] > min(U.shape[-2], V.shape[-2]):
        norms = (U @ V.mT).square().sum(dim=(-2, -1))
        u, v = (torch.linalg.vector_norm(A, dim=-2) for A in (U, V))
    else:
        U_gram, V_gram = (A.mT @ A for A in (U, V))
        norms = (U_gram * V_gram).sum(dim=(-2, -1))
        u, v = (A.diagonal(dim1=-2, dim2=-1).sqrt() for A in (U_gram, V_gram))
    # Cancellation leaves rounding of either sign where the update is zero and its factors are not.
    rounding = 4 * torch.finfo(norms.dtype).eps * (u * v).sum(dim=-1).square()
    return torch.where((norms <= rounding) & norms.isfinite(), 0.0, norms)


def _check_same_update_shape(U1: Tensor, V1: Tensor, U2: Tensor, V2: Tensor) -> None:
    first, second = (U1.shape[-2], V1.shape[-2]), (U2.shape[-2], V2.shape[-2])
    if first != second:
        raise ValueError(f"updates of shapes {first} and {second} have no inner product.")


def _by_module(A: Tensor) -> Tensor:
    """``A (N, ..., n, r)`` as (modules, N, n, r)."""
    return A.reshape(len(A), math.prod(A.shape[1:-2]), *A.shape[-2:]).transpose(0, 1)


def _columns(U: Tensor, V: Tensor) -> tuple[Tensor, ...]:
    """The columns (N, r, n) and (N, r, m) of the factors of N updates, in float64."""
    return tuple(A.new_empty(A.mT.shape, dtype=torch.float64).copy_(A.mT) for A in narrowed(U, V))
