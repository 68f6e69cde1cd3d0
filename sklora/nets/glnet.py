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
from sklora.nets.feedforward import ROUNDINGS, ModuleLinear, RowNorm, Standardize, feedforward
from sklora.nets.mlpnet import MLPNet

# Below that of MLPNet, since the features themselves are fitted too; see docs/results.md.
WIDE = 100
# The products are to fit the training rows no faster than the singular values, which are few.
WIDE_BESIDE_SPECTRUM = 30


class GLNet(nn.Module):
    r"""GL-net: a function of LoRA factors that no gauge changes (section 3.3 of the paper).

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
        Number of side features.
    spectrum : int, default=0
        Number of singular values of the updates, of all modules together.

    Attributes
    ----------
    module_scale : Tensor of shape (M,)
        Buffer. What ``U`` and ``V`` of each module are multiplied by, in the order of the groups.
    standardize : Standardize
        Moments of the invariant features, on the training data at the initial weights.
    row_norm : RowNorm
        Appends the norm of the standardised invariant features.
    side_path, spectrum_path : MLPNet
        From the side features, linearly, and from the singular values, by one hidden layer, into
        the first layer of the perceptron. Each has moments, a weight and a norm of its own, and is
        there only where such columns are.

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
        spectrum: int = 0,
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
        self.standardize = Standardize(self.n_invariant)
        wide = WIDE_BESIDE_SPECTRUM if spectrum else WIDE
        self.row_norm = RowNorm(self.n_invariant, wide=wide)
        self.mlp = feedforward(self.n_invariant + 1, n_outputs, mlp_hidden, dropout=dropout)
        # The first layer is in two parts: that on the invariants works by blocks of modules.
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        by_invariant, by_norm = first.weight.tensor_split([self.n_invariant], dim=1)
        self.invariant_map = ModuleLinear(by_invariant, n_modules)
        first.weight, first.in_features = nn.Parameter(by_norm.detach().clone()), 1
        # Among ten thousand invariants, a weight and a start by their number would drown a few
        # columns more, so each kind has a path of its own.
        self.n_side, self.spectrum = n_side, spectrum
        if n_side:
            self.side_path = MLPNet(n_side, first.out_features, n_layers=0)
        if spectrum:
            self.spectrum_path = MLPNet(spectrum, first.out_features, n_layers=1, dropout=dropout)

    def forward(
        self,
        factors: Sequence[tuple[Tensor, Tensor]],
        side: Tensor | None = None,
        spectra: Tensor | None = None,
    ) -> Tensor:
        """Give the outputs.

        Parameters
        ----------
        factors : sequence of (U, V)
            One pair for every group, ``U (M, n, B, r)`` and ``V (M, m, B, r)``; the rank may differ
            from group to group.
        side : Tensor of shape (B, n_side), optional
            The side features.
        spectra : Tensor of shape (B, spectrum), optional
            The singular values.

        Returns
        -------
        Tensor of shape (B, n_outputs)

        Raises
        ------
        ValueError
            When side features or singular values are missing that the network was built with, or
            given to one without.
        """
        for name, columns, wanted in (
            ("side", side, self.n_side),
            ("spectra", spectra, self.spectrum),
        ):
            if (columns is None) != (wanted == 0):
                given = "missing" if columns is None else f"of shape {tuple(columns.shape)}"
                raise ValueError(f"{name} is {given}, but the network reads {wanted} such columns.")
        U, V = self._map(factors)
        members = self.invariant_map.members
        products = map(self.head.by_module, torch.split(U, members), torch.split(V, members))
        hidden, norm = self.invariant_map(products, self.standardize.mean, self.standardize.scale)
        # A common weight of all columns is as well put on their sum.
        hidden = self.row_norm.weight * hidden + self.mlp[0](self.row_norm.norm(norm[:, None]))
        if side is not None:
            hidden = hidden + self.side_path(side)
        if spectra is not None:
            hidden = hidden + self.spectrum_path(spectra)
        outputs: Tensor = self.mlp[1:](hidden)
        return outputs

    def features(self, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Give the invariant features that the multilayer perceptron reads, not yet standardised.

        Parameters
        ----------
        factors : sequence of (U, V)
            As for :meth:`forward`.

        Returns
        -------
        Tensor of shape (B, n_invariant)
        """
        features: Tensor = self.head(*self._map(factors))
        return features

    @torch.no_grad()
    def rounding(self, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Give about what rounding does to each of these features; bad gauges make it large.

        Parameters
        ----------
        factors : sequence of (U, V)
            As for :meth:`forward`.

        Returns
        -------
        Tensor of shape (B, n_invariant)
            One number for each module: ``eps sum_k ||u_k|| ||v_k||`` over the columns of its
            factors after all equivariant layers, over the root of what it is spread over.
        """
        U, V = self._map(factors)
        u, v = (torch.linalg.vector_norm(A, dim=1) for A in (U, V))
        lengths = (u * v).sum(dim=-1)
        per_module = self.n_invariant // len(U)
        # The features are entries of U V^T, or the mean of all.
        n_entries = U.shape[1] * V.shape[1]
        share = ROUNDINGS * torch.finfo(U.dtype).eps * per_module**0.5 / n_entries
        rounding: Tensor = (share * lengths).T.repeat_interleave(per_module, dim=1)
        return rounding

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
