"""What both networks end in: fixed moments, the norm of the row, a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sklora._base import check_option

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


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

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))

    def set_moments(self, mean: Tensor, scale: Tensor) -> None:
        """Set the moments, in place; a column that is constant, up to rounding, keeps the scale 1.

        Parameters
        ----------
        mean, scale : Tensor of shape (n_features,)
        """
        rounding = 100 * torch.finfo(scale.dtype).eps * mean.abs()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(scale > rounding, scale, torch.ones_like(scale)))

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
    norm : Standardize
        The training moments of the norm.

    Examples
    --------
    >>> import torch
    >>> from sklora.nets import RowNorm
    >>> RowNorm(2, wide=500)(torch.tensor([[3.0, 4.0]]))
    tensor([[3., 4., 5.]])
    """

    def __init__(self, n_features: int, wide: int) -> None:
        super().__init__()
        self.weight = min(1.0, wide / n_features)
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
