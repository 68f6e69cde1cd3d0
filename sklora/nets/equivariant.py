"""Layers that commute with the gauge ``(U R, V R^-T)``, and the head that is invariant to it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sklora._base import check_option
from sklora.linalg._tall import project

GateKind = Literal["sign_relu", "sigmoid", "silu"]
HeadKind = Literal["flatten", "mean"]


class EquivariantLinear(nn.Module):
    r"""Equivariant linear map of the factors of many modules of one shape (eq. 4).

    .. math:: (U_l, V_l) \mapsto (\Phi_l U_l, \Psi_l V_l), \qquad l = 1, \ldots, M

    Proposition 1: these are all the linear maps that commute with every gauge.
    There is no bias, because a constant added to ``U`` does not turn with ``R``.

    Parameters
    ----------
    n_modules : int
        Number of modules ``M``.
    n, m : int
        Rows of ``U`` and of ``V``.
    out_n, out_m : int
        Rows of the mapped ``U`` and ``V``.

    Attributes
    ----------
    phi : Parameter of shape (M, out_n, n)
    psi : Parameter of shape (M, out_m, m)

    Examples
    --------
    >>> import torch
    >>> from sklora.nets import EquivariantLinear
    >>> layer = EquivariantLinear(n_modules=3, n=8, m=6, out_n=4, out_m=4)
    >>> U, V = layer(torch.ones(3, 8, 5, 2), torch.ones(3, 6, 5, 2))
    >>> U.shape, V.shape
    (torch.Size([3, 4, 5, 2]), torch.Size([3, 4, 5, 2]))
    """

    def __init__(self, n_modules: int, n: int, m: int, out_n: int, out_m: int) -> None:
        super().__init__()
        # Variance 1/n and 1/m keeps the size of the entries of U V^T from layer to layer.
        self.phi = nn.Parameter(torch.randn(n_modules, out_n, n).div_(n**0.5))
        self.psi = nn.Parameter(torch.randn(n_modules, out_m, m).div_(m**0.5))

    def forward(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Map the factors.

        Parameters
        ----------
        U : Tensor of shape (M, n, B, r)
        V : Tensor of shape (M, m, B, r)

        Returns
        -------
        U : Tensor of shape (M, out_n, B, r)
        V : Tensor of shape (M, out_m, B, r)
        """
        return _multiply(self.phi, U), _multiply(self.psi, V)


class GLNonlinearity(nn.Module):
    r"""Equivariant nonlinearity: every row is gated by an invariant scalar (eq. 6).

    .. math::
        U_i \leftarrow g\bigl(\tfrac{1}{\sqrt{m}} \sum_j (U V^\top)_{ij}\bigr)\, U_i,
        \qquad
        V_j \leftarrow g\bigl(\tfrac{1}{\sqrt{n}} \sum_i (U V^\top)_{ij}\bigr)\, V_j

    Both gates read the same input pair, and the row sums are ``U (V^T 1)``: the product is never
    formed. Lemma 2: this commutes with every gauge, because ``U V^T`` does not change. The factors
    ``1/sqrt(m)`` and ``1/sqrt(n)`` keep the scalars near unit size; they change no sign.

    Parameters
    ----------
    kind : {"sign_relu", "sigmoid", "silu"}, default="sign_relu"
        The gate ``g``. ``"sign_relu"``, ``relu(sign(s))``, is the paper's. It passes no gradient
        through the gate, and a row whose scalar is zero is lost. ``"sigmoid"`` is its smooth form.
        ``"silu"``, ``s * sigmoid(s)``, changes the degree: scaling ``U V^T`` by a large ``c``
        scales its result by ``c^3``.

    Raises
    ------
    ValueError
        When `kind` is none of these.

    Examples
    --------
    >>> import torch
    >>> from sklora.nets import GLNonlinearity
    >>> U, V = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1), torch.ones(1, 3, 1, 1)
    >>> GLNonlinearity("sign_relu")(U, V)[0].flatten()
    tensor([1., -0.])
    """

    def __init__(self, kind: GateKind = "sign_relu") -> None:
        super().__init__()
        check_option("kind", kind, get_args(GateKind))
        self.kind = kind

    def forward(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Gate the rows.

        Parameters
        ----------
        U : Tensor of shape (M, n, B, r)
        V : Tensor of shape (M, m, B, r)

        Returns
        -------
        U, V : Tensor
            Of the shapes given.
        """
        row = (U * V.sum(1, keepdim=True)).sum(-1, keepdim=True) / V.shape[1] ** 0.5
        column = (V * U.sum(1, keepdim=True)).sum(-1, keepdim=True) / U.shape[1] ** 0.5
        return U * self._gate(row), V * self._gate(column)

    def _gate(self, scalar: Tensor) -> Tensor:
        if self.kind == "sign_relu":
            return torch.relu(torch.sign(scalar))
        if self.kind == "sigmoid":
            return torch.sigmoid(scalar)
        return nn.functional.silu(scalar)

    def extra_repr(self) -> str:
        """Show the kind in the network's repr."""
        return repr(self.kind)


class InvariantHead(nn.Module):
    r"""Invariant features ``U V^T`` of every module (section 3.3.3).

    Parameters
    ----------
    kind : {"flatten", "mean"}, default="flatten"
        ``"flatten"`` gives every entry of every ``U V^T``, ``"mean"`` the mean entry of each (as
        the paper does for CLIP scores), found as ``(1^T U)(V^T 1) / (n m)``.

    Raises
    ------
    ValueError
        When `kind` is neither.

    Examples
    --------
    >>> import torch
    >>> from sklora.nets import InvariantHead
    >>> U, V = torch.ones(3, 4, 5, 2), torch.ones(3, 4, 5, 2)
    >>> InvariantHead("flatten")(U, V).shape, InvariantHead("mean")(U, V).shape
    (torch.Size([5, 48]), torch.Size([5, 3]))
    """

    def __init__(self, kind: HeadKind = "flatten") -> None:
        super().__init__()
        check_option("kind", kind, get_args(HeadKind))
        self.kind = kind

    def forward(self, U: Tensor, V: Tensor) -> Tensor:
        """Give the features.

        Parameters
        ----------
        U : Tensor of shape (M, n, B, r)
        V : Tensor of shape (M, m, B, r)

        Returns
        -------
        Tensor of shape (B, M * n * m) or (B, M)
        """
        return self.by_module(U, V).transpose(0, 1).flatten(1)

    def by_module(self, U: Tensor, V: Tensor) -> Tensor:
        """Give the features module by module, as the product leaves them in memory.

        Parameters
        ----------
        U : Tensor of shape (M, n, B, r)
        V : Tensor of shape (M, m, B, r)

        Returns
        -------
        Tensor of shape (M, B, n * m) or (M, B, 1)
        """
        if self.kind == "mean":
            return (U.mean(1) * V.mean(1)).sum(-1, keepdim=True)
        return torch.einsum("aibr,ajbr->abij", U, V).flatten(2)

    def n_features(self, n: int, m: int) -> int:
        """Give the number of features of one module.

        Parameters
        ----------
        n, m : int
            Rows of its ``U`` and of its ``V``.

        Returns
        -------
        int
            ``n m``, or 1 of the kind ``"mean"``.
        """
        return 1 if self.kind == "mean" else n * m

    def extra_repr(self) -> str:
        """Show the kind in the network's repr."""
        return repr(self.kind)


def _multiply(weight: Tensor, factor: Tensor) -> Tensor:
    """Multiply ``(M, out, n)`` by ``(M, n, B, r)``.

    One batched product over the modules serves factors that lie module after module in memory.
    Where each adapter's lie in one piece, as in flat rows, and have more columns than the weights
    have rows, a product for every module spares their copy. It is fast where the columns of the
    weights are contiguous.
    """
    modules, rows, adapters, rank = factor.shape
    if factor.stride(2) > factor.stride(1) >= rank and adapters * rank > weight.shape[1]:
        parts = [
            project(matrix.mT.contiguous().mT, one.transpose(0, 1))
            for matrix, one in zip(weight, factor, strict=True)
        ]
        return torch.stack(parts).transpose(1, 2)
    product = torch.bmm(weight, factor.reshape(modules, rows, adapters * rank))
    return product.reshape(modules, weight.shape[1], adapters, rank)
