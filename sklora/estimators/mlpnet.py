"""MLPNetClassifier and MLPNetRegressor: a multilayer perceptron on flat rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from sklora.collection import LoRALayout
from sklora.estimators._base import BaseNetEstimator
from sklora.estimators._data import TrainingData, iter_blocks
from sklora.estimators._docs import document
from sklora.estimators._targets import (
    CLASS_WEIGHT_CONSTRAINT,
    ClassWeight,
    NetClassifier,
    NetRegressor,
)
from sklora.estimators._training import WeightedBlock, calibrate_input
from sklora.nets import MLPNet
from sklora.nets.feedforward import ACTIVATIONS


class _MLPNetEstimator(BaseNetEstimator):
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseNetEstimator._parameter_constraints,
        "n_layers": [Interval(Integral, 0, None, closed="left")],
        "nonlinearity": [StrOptions(set(ACTIVATIONS))],
    }
    _net_type = MLPNet
    _accepted_rank = "fitted"

    def _architecture(self, layout: LoRALayout, n_outputs: int) -> dict[str, Any]:
        return {
            "n_features": layout.width,
            "n_outputs": n_outputs,
            "hidden_dim": self.hidden_dim,
            "n_layers": self.n_layers,
            "nonlinearity": self.nonlinearity,
            "dropout": self.dropout,
        }

    def _forward(
        self, net: nn.Module, layout: LoRALayout, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor]:
        # Not the module itself, whose weights skorch's net would have twice, and keep twice.
        return net.__call__

    def _calibrate(self, net: nn.Module, data: TrainingData) -> None:
        assert isinstance(net, MLPNet)
        device = net.standardize.mean.device
        entries = self._entries_per_adapter(data.loras.layout)
        weights = data.adapter_weights

        def features() -> Iterator[WeightedBlock]:
            for rows, block in iter_blocks(data.loras, device, entries):
                yield block, weights[rows]

        calibrate_input(net, features)

    def _entries_per_adapter(self, layout: LoRALayout) -> int:
        # Moments take the most: the block, its float64 copy, and three arrays of that size.
        return 5 * layout.width + 2 * self.hidden_dim


@document
class MLPNetClassifier(NetClassifier, _MLPNetEstimator):
    """Classifier: a multilayer perceptron on standardised flat rows and their norm.

    On raw factors this is the paper's ``mlp`` baseline: it is not invariant to the gauge, and takes
    no rank above the fitted one. Behind a featurizer such as :class:`~sklora.SVDSpectrum`
    it is the head of the other architectures.

    Parameters
    ----------
    $mlp_architecture
    $training
    $class_weights
    $running

    Attributes
    ----------
    $classes
    $attributes

    See Also
    --------
    MLPNetRegressor : The same for numbers.
    GLNetClassifier : Invariant to the gauge.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.estimators import MLPNetClassifier
    >>> X = np.random.default_rng(0).normal(size=(40, 5))
    >>> y = np.where(X[:, 0] > 0, "up", "down")
    >>> model = MLPNetClassifier(random_state=0, device="cpu").fit(X, y)
    >>> model.predict([[3, 0, 0, 0, 0], [-3, 0, 0, 0, 0]])
    array(['up', 'down'], dtype='<U4')
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **_MLPNetEstimator._parameter_constraints,
        **CLASS_WEIGHT_CONSTRAINT,
    }

    def __init__(
        self,
        *,
        hidden_dim: int = 128,
        n_layers: int = 2,
        nonlinearity: str = "relu",
        dropout: float = 0.5,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        optimizer: str = "adamw",
        max_epochs: int = 40,
        batch_size: int = 64,
        early_stopping: bool | Literal["auto"] = "auto",
        validation_fraction: float = 0.15,
        patience: int = 8,
        callbacks: Sequence[Any] | None = None,
        class_weight: ClassWeight = None,
        warm_start: bool = False,
        device: str | torch.device = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
        layout: LoRALayout | None = None,
    ) -> None:
        super().__init__(
            hidden_dim=hidden_dim,
            n_layers=n_layers,
            nonlinearity=nonlinearity,
            dropout=dropout,
            lr=lr,
            weight_decay=weight_decay,
            optimizer=optimizer,
            max_epochs=max_epochs,
            batch_size=batch_size,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            patience=patience,
            callbacks=callbacks,
            warm_start=warm_start,
            device=device,
            random_state=random_state,
            verbose=verbose,
            layout=layout,
        )
        self.class_weight = class_weight


@document
class MLPNetRegressor(NetRegressor, _MLPNetEstimator):
    """Regressor: a multilayer perceptron on standardised flat rows and their norm.

    On raw factors this is the paper's ``mlp`` baseline: it is not invariant to the gauge, and takes
    no rank above the fitted one. Behind a featurizer such as :class:`~sklora.SVDSpectrum`
    it is the head of the other architectures.

    Parameters
    ----------
    $mlp_architecture
    $training
    $running

    Attributes
    ----------
    $targets
    $attributes

    See Also
    --------
    MLPNetClassifier : The same for classes and labels.
    GLNetRegressor : Invariant to the gauge.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.estimators import MLPNetRegressor
    >>> X = np.random.default_rng(0).normal(size=(40, 5))
    >>> model = MLPNetRegressor(random_state=0, device="cpu").fit(X, X[:, 0])
    >>> model.predict([[1, 0, 0, 0, 0]]).shape
    (1,)
    """

    # More of them fit a perceptron to the targets of few adapters too well.
    _least_steps = 4
