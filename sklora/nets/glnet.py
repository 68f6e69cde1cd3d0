"""GLNet: equivariant layers, an invariant head, and a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sklora.nets.equivariant import (
    EquivariantLinear,
    GateKind,
    GLNonlinearity,
    HeadKind,
    InvariantHead,
)
from sklora.nets.feedforward import ModuleLinear, RowNorm, Standardize, feedforward

# Below that of MLPNet, since the features themselves are fitted too; see docs/results.md.
WIDE = 100


class GLNet(nn.Module):
    r"""GL-net: a function of LoRA factors that no gauge changes (section 4 of the paper).

    .. math::
        f(U, V) = \mathrm{MLP}\bigl(\mathrm{cat}_l\, \hat U_l \hat V_l^\top\bigr), \qquad
        (\hat U, \hat V) = E_L \circ \sigma \circ \ldots \circ \sigma \circ E_1 (U, V)

    with equivariant linear layers :math:`E` and gates :math:`\sigma` between them.
    Theorem 1: ``f(U R, V R^-T) = f(U, V)`` for all invertible ``R``, one of its own for every
    module. The rank is no part of the network: any rank may be given, and zero columns change
    nothing.

    Parameters
    ----------
    groups : sequence of (n_modules, n, m)
        The modules, those of equal shape together.
    n_outputs : int
        Number of outputs.
    hidden_dim : int, default=32
        Rows ``h`` of ``U`` and ``V`` after every equivariant layer.
    n_layers : int, default=2
        Number ``L`` of equivariant layers; with one, there is no gate.
    nonlinearity : {"sign_relu", "sigmoid", "silu"}, default="sigmoid"
        The gate, see :class:`GLNonlinearity`.
    head : {"flatten", "mean"}, default="flatten"
        The invariant features, see :class:`InvariantHead`.
    mlp_hidden : sequence of int, default=(128,)
        Widths of the hidden layers of the multilayer perceptron.
    dropout : float, default=0.0
        Probability of dropping one of its hidden units in training.
    n_side : int, default=0
        Number of side features, which join the invariant ones.

    Attributes
    ----------
    module_scale : Tensor of shape (M,)
        Buffer. What ``U`` and ``V`` of each module are multiplied by, in the order of the groups.
    standardize : Standardize
        Moments of the invariant and the side features, on the training data at the initial weights.
    row_norm : RowNorm
        Appends the norm of the standardised features.

    Raises
    ------
    ValueError
        When `nonlinearity` or `head` is none of these.

    Examples
    --------
    >>> import torch
    >>> from sklora.nets import GLNet
    >>> net = GLNet([(2, 8, 6), (1, 4, 4)], n_outputs=3)
    >>> factors = [
    ...     (torch.ones(2, 8, 5, 2), torch.ones(2, 6, 5, 2)),
    ...     (torch.ones(1, 4, 5, 2), torch.ones(1, 4, 5, 2)),
    ... ]
    >>> net(factors).shape
    torch.Size([5, 3])
    """

    module_scale: Tensor

    def __init__(
        self,
        groups: Sequence[tuple[int, int, int]],
        n_outputs: int,
        hidden_dim: int = 32,
        n_layers: int = 2,
        nonlinearity: GateKind = "sigmoid",
        head: HeadKind = "flatten",
        mlp_hidden: Sequence[int] = (128,),
        dropout: float = 0.0,
        n_side: int = 0,
    ) -> None:
        super().__init__()
        n_modules = sum(members for members, _, _ in groups)
        self.embed = nn.ModuleList(
            EquivariantLinear(members, n, m, hidden_dim, hidden_dim) for members, n, m in groups
        )
        # From here on all modules share one shape, so one product serves them all.
        self.layers = nn.ModuleList(
            EquivariantLinear(n_modules, hidden_dim, hidden_dim, hidden_dim, hidden_dim)
            for _ in range(n_layers - 1)
        )
        self.gate = GLNonlinearity(nonlinearity)
        self.head = InvariantHead(head)
        self.register_buffer("module_scale", torch.ones(n_modules))
        per_module = self.head.n_features(hidden_dim, hidden_dim)
        self.n_invariant = n_modules * per_module
        n_features = self.n_invariant + n_side
        self.standardize = Standardize(n_features)
        self.row_norm = RowNorm(n_features, wide=WIDE)
        self.mlp = feedforward(n_features + 1, n_outputs, mlp_hidden, dropout=dropout)
        # The first layer is in two parts: that on the invariants works by blocks of modules.
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        by_invariant, by_rest = first.weight.tensor_split([self.n_invariant], dim=1)
        self.invariant_map = ModuleLinear(by_invariant, n_modules)
        first.weight, first.in_features = nn.Parameter(by_rest.detach().clone()), n_side + 1

    def forward(
        self, factors: Sequence[tuple[Tensor, Tensor]], side: Tensor | None = None
    ) -> Tensor:
        """Give the outputs.

        Parameters
        ----------
        factors : sequence of (U, V)
            One pair for every group, ``U (M, n, B, r)`` and ``V (M, m, B, r)``; the rank may differ
            from group to group.
        side : Tensor of shape (B, n_side), optional
            The side features.

        Returns
        -------
        Tensor of shape (B, n_outputs)
        """
        U, V = self._map(factors)
        members = self.invariant_map.members
        products = map(self.head.by_module, torch.split(U, members), torch.split(V, members))
        mean, side_mean = self.standardize.mean.tensor_split([self.n_invariant])
        scale, side_scale = self.standardize.scale.tensor_split([self.n_invariant])
        hidden, norm = self.invariant_map(products, mean, scale)
        norm, columns = norm[:, None], []
        if side is not None:
            z = ((side - side_mean) / side_scale).to(norm.dtype)
            norm = torch.linalg.vector_norm(torch.cat([norm, z], dim=1), dim=1, keepdim=True)
            columns = [self.row_norm.weight * z]
        rest = torch.cat([*columns, self.row_norm.norm(norm)], dim=1)
        # A common weight of all columns is as well put on their sum.
        outputs: Tensor = self.mlp[1:](self.row_norm.weight * hidden + self.mlp[0](rest))
        return outputs

    def features(
        self, factors: Sequence[tuple[Tensor, Tensor]], side: Tensor | None = None
    ) -> Tensor:
        """Give what the multilayer perceptron reads, not yet standardised.

        Parameters
        ----------
        factors : sequence of (U, V)
            As for :meth:`forward`.
        side : Tensor of shape (B, n_side), optional
            The side features.

        Returns
        -------
        Tensor of shape (B, n_invariant + n_side)
            The invariant features, then the side features.
        """
        features = self.head(*self._map(factors))
        return features if side is None else torch.cat([features, side], dim=1)

    def _map(self, factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Give the factors after all equivariant layers, ``(M, h, B, r)``."""
        pairs = [layer(U, V) for layer, (U, V) in zip(self.embed, factors, strict=True)]
        rank = max(U.shape[-1] for U, _ in pairs)
        scale = self.module_scale[:, None, None, None]
        U = torch.cat([_pad_rank(U, rank) for U, _ in pairs])
        V = torch.cat([_pad_rank(V, rank) for _, V in pairs])
        U, V = U * scale, V * scale
        for layer in self.layers:
            U, V = layer(*self.gate(U, V))
        return U, V


def _pad_rank(factor: Tensor, rank: int) -> Tensor:
    missing = rank - factor.shape[-1]
    return nn.functional.pad(factor, (0, missing)) if missing else factor
