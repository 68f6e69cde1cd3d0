"""What both networks end in: fixed moments, the norm of the row, a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sklora._base import check_option

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}
# A block's weights in float32 take 4 MB: less than a processor's cache, and than the arrays that
# malloc gives back to the system at once, to be had again only page by page.
BLOCK_ENTRIES = 2**20
# How often a number that is standardised was rounded, about.
ROUNDINGS = 8


class Standardize(nn.Module):
    """Subtract a fixed mean and divide by a fixed scale, column by column.

    The moments are buffers, not parameters. They start at 0 and 1.

    Parameters
    ----------
    n_features : int
        Number of columns.

    Attributes
    ----------
    mean, scale : Tensor of shape (n_features,)

    Examples
    --------
    >>> import torch
    >>> from sklora.nets import Standardize
    >>> layer = Standardize(2)
    >>> layer.set_moments(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.0]))
    >>> layer(torch.tensor([[3.0, 5.0]]))
    tensor([[1., 0.]])
    """

    mean: Tensor
    scale: Tensor
    # Of a column that is constant. The largest number lets nothing of it through, whatever comes.
    constant_scale = 1.0

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))

    def set_moments(self, mean: Tensor, scale: Tensor, rounding: Tensor | float = 0.0) -> None:
        """Set the moments, in place; a column that is constant has `constant_scale`.

        Parameters
        ----------
        mean, scale : Tensor of shape (n_features,)
        rounding : Tensor of shape (n_features,) or float, default=0.0
            What rounding alone may make of the scale of a constant column, where that is more than
            it does to the mean.
        """
        rounding = (100 * torch.finfo(scale.dtype).eps * mean.abs()).clamp(min=rounding)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(scale > rounding, scale, self.constant_scale))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise.

        Parameters
        ----------
        x : Tensor of shape (B, n_features)
            Of the buffers' dtype, or wider: the mean is taken off before any narrowing.

        Returns
        -------
        Tensor of shape (B, n_features)
            Of the buffers' dtype.
        """
        return ((x - self.mean) / self.scale).to(self.mean.dtype)


class RowNorm(nn.Module):
    r"""Append the norm of each standardised row, and weigh wide rows down.

    .. math:: z \mapsto \bigl[\min(1, W / d)\, z, \; (\lVert z \rVert - \mu) / \sigma\bigr],
        \qquad z \in \mathbb{R}^d

    Adam moves every weight by about the learning rate, so one step changes what a unit reads by an
    amount that grows with ``d``: on thousands of columns a network fits its training rows before it
    has learnt anything. The weight takes that growth away. The norm, an invariant of the
    orthogonal gauges, says how far an adapter was trained; a network on thousands of columns cannot
    find it from a few hundred rows, so it gets a column of its own.

    Parameters
    ----------
    n_features : int
        Number of columns ``d``.
    wide : int
        The width ``W`` above which columns are weighed down.

    Attributes
    ----------
    weight : Tensor of shape (1,)
        Buffer, ``min(1, W / d)``; state, so that another `wide` changes no fitted network.
    norm : Standardize
        The training moments of the norm.

    Examples
    --------
    >>> import torch
    >>> from sklora.nets import RowNorm
    >>> RowNorm(2, wide=500)(torch.tensor([[3.0, 4.0]]))
    tensor([[3., 4., 5.]])
    """

    weight: Tensor

    def __init__(self, n_features: int, wide: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((1,), min(1.0, wide / n_features)))
        self.norm = Standardize(1)

    def forward(self, z: Tensor) -> Tensor:
        """Append the norm.

        Parameters
        ----------
        z : Tensor of shape (B, n_features)
            Standardised rows.

        Returns
        -------
        Tensor of shape (B, n_features + 1)
        """
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return torch.cat([self.weight * z, self.norm(norm)], dim=1)


class ModuleLinear(nn.Module):
    r"""Standardise the features of every module and map all of them linearly, block by block.

    .. math:: z_l = (x_l - \mu_l) / \sigma_l, \qquad y = \sum_l W_l z_l

    A block of modules stays in the processor's cache from its features to its share of ``y``, and
    no array of all features is ever formed, forward or backward.

    Parameters
    ----------
    weight : Tensor of shape (n_outputs, M * P)
        The same map of flat rows, the features of the first module first. It is copied.
    n_modules : int
        Number of modules ``M``.

    Attributes
    ----------
    blocks : ParameterList
        The weights, ``(members, n_outputs, P)`` for every block.

    Examples
    --------
    >>> import torch
    >>> from sklora.nets.feedforward import ModuleLinear
    >>> weight, x = torch.randn(4, 2 * 3), torch.randn(2, 5, 3)
    >>> y, norms = ModuleLinear(weight, n_modules=2)([x], torch.zeros(6), torch.ones(6))
    >>> torch.allclose(y, x.transpose(0, 1).flatten(1) @ weight.T, atol=1e-6)
    True
    >>> norms.shape
    torch.Size([5])
    """

    def __init__(self, weight: Tensor, n_modules: int) -> None:
        super().__init__()
        members = max(1, BLOCK_ENTRIES * n_modules // weight.numel())
        by_module = weight.detach().reshape(len(weight), n_modules, -1).transpose(0, 1)
        self.blocks = nn.ParameterList(
            part.clone(memory_format=torch.contiguous_format)
            for part in torch.split(by_module, members)
        )

    @property
    def members(self) -> list[int]:
        """Number of modules in every block."""
        return [len(block) for block in self.blocks]

    def forward(
        self, features: Iterable[Tensor], mean: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map the features.

        Parameters
        ----------
        features : iterable of Tensor of shape (members, B, P)
            One for every block; read one by one.
        mean, scale : Tensor of shape (M * P,)
            Moments of the features.

        Returns
        -------
        y : Tensor of shape (B, n_outputs)
        norms : Tensor of shape (B,)
            Norm of all standardised features of each row.
        """
        moments = (
            torch.split(m.reshape(sum(self.members), 1, -1), self.members) for m in (mean, scale)
        )
        parts = [
            _StandardizedProduct.apply(*inputs)  # type: ignore[no-untyped-call]
            for inputs in zip(features, *moments, self.blocks, strict=True)
        ]
        products, norms = zip(*parts, strict=True)
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return torch.stack(products).sum(0), norm


class _StandardizedProduct(torch.autograd.Function):
    """``(sum_l z_l W_l^T, ||z||)`` of one block, with a backward pass that works in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = (x - mean).div_(scale)
        # Rows first: over both dimensions at once, torch takes three times as long.
        norm = torch.linalg.vector_norm(torch.linalg.vector_norm(z, dim=2), dim=0)
        ctx.save_for_backward(z, norm, scale, weight)
        return torch.bmm(z, weight.mT).sum(0), norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_norm: Tensor) -> tuple[Tensor | None, ...]:
        z, norm, scale, weight = ctx.saved_tensors
        grad = grad.to(z.dtype).expand(len(z), *grad.shape)
        grad_weight = torch.bmm(grad.mT, z) if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, grad_weight
        # The norm's gradient at zero is taken as zero.
        direction = torch.where(norm > 0, grad_norm / norm, 0.0)[:, None]
        grad_x = torch.bmm(grad, weight).addcmul_(z, direction).div_(scale)
        return grad_x, None, None, grad_weight


def feedforward(
    n_features: int,
    n_outputs: int,
    hidden: Sequence[int],
    nonlinearity: str = "relu",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Build a multilayer perceptron, with dropout after every hidden layer.

    Parameters
    ----------
    n_features, n_outputs : int
        Columns in and out.
    hidden : sequence of int
        Widths of the hidden layers; none gives a linear map.
    nonlinearity : {"relu", "silu", "gelu", "tanh"}, default="relu"
        What follows every hidden layer.
    dropout : float, default=0.0
        Probability of dropping a hidden unit in training.

    Returns
    -------
    torch.nn.Sequential
        Maps ``(B, n_features)`` to ``(B, n_outputs)``.

    Raises
    ------
    ValueError
        When `nonlinearity` is none of these.

    Examples
    --------
    >>> from sklora.nets import feedforward
    >>> sum(p.numel() for p in feedforward(4, 2, (8,)).parameters())
    58
    """
    check_option("nonlinearity", nonlinearity, ACTIVATIONS)
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(n_features, width), ACTIVATIONS[nonlinearity]()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        n_features = width
    return nn.Sequential(*layers, nn.Linear(n_features, n_outputs))
