"""MLPNet: a multilayer perceptron on standardised features and their norm."""

from __future__ import annotations

from torch import Tensor, nn

from sklora.nets.feedforward import RowNorm, Standardize, feedforward

# Found by cross-validation, see docs/results.md.
WIDE = 500


class MLPNet(nn.Module):
    """Multilayer perceptron on standardised features and their norm.

    On raw factors it is not invariant to the gauge: ``(U R, V R^-T)`` are other features of the
    same update.

    Parameters
    ----------
    n_features, n_outputs : int
        Columns in and out.
    hidden_dim : int, default=128
        Width of every hidden layer.
    n_layers : int, default=2
        Number of hidden layers; 0 gives a linear model.
    nonlinearity : {"relu", "silu", "gelu", "tanh"}, default="relu"
        What follows every hidden layer.
    dropout : float, default=0.0
        Probability of dropping a hidden unit in training.

    Attributes
    ----------
    standardize : Standardize
        The training moments, buffers `mean` and `scale`.
    row_norm : RowNorm
        Appends the norm of the standardised row.
    mlp : torch.nn.Sequential

    Raises
    ------
    ValueError
        When `nonlinearity` is none of these.

    Examples
    --------
    >>> import torch
    >>> from sklora.nets import MLPNet
    >>> MLPNet(n_features=6, n_outputs=2)(torch.ones(5, 6)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        hidden_dim: int = 128,
        n_layers: int = 2,
        nonlinearity: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.standardize = Standardize(n_features)
        self.row_norm = RowNorm(n_features, wide=WIDE)
        self.mlp = feedforward(
            n_features + 1, n_outputs, (hidden_dim,) * n_layers, nonlinearity, dropout
        )

    def forward(self, x: Tensor) -> Tensor:
        """Give the outputs.

        Parameters
        ----------
        x : Tensor of shape (B, n_features)

        Returns
        -------
        Tensor of shape (B, n_outputs)
        """
        outputs: Tensor = self.mlp(self.row_norm(self.standardize(x)))
        return outputs
