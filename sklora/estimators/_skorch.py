"""The skorch net that trains a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import EarlyStopping, LRScheduler
from skorch.helper import predefined_split
from torch import Tensor, nn

from sklora.estimators._training import (
    OPTIMIZERS,
    LoRADataset,
    LossKind,
    TrainingData,
    TrainingSettings,
    WeightedForward,
    WeightedLoss,
)

# Where a user's scoring callback finds the predictions it expects.
_SKORCH_NETS: dict[LossKind, type[NeuralNet]] = {
    "cross_entropy": NeuralNetClassifier,
    "binary_cross_entropy": NeuralNet,
    "squared_error": NeuralNetRegressor,
}


def compose(
    net: nn.Module,
    forward: Callable[[Tensor], Tensor],
    loss: LossKind,
    settings: TrainingSettings,
    validation: TrainingData | None,
    device: torch.device,
) -> NeuralNet:
    """Give a skorch net that trains `net`; see `sklora.estimators._training.train`."""
    optimizer, optimizer_options = OPTIMIZERS[settings.optimizer]
    options: dict[str, Any] = {
        "optimizer__weight_decay": settings.weight_decay,
        "optimizer__fused": device.type in ("cpu", "cuda"),
        **{f"optimizer__{name}": value for name, value in optimizer_options.items()},
    }
    if not settings.verbose:
        # Without a reader, these would format a table row and score every epoch for nobody.
        options["callbacks__print_log"] = None
        if loss == "cross_entropy":
            options["callbacks__valid_acc"] = None
    return _SKORCH_NETS[loss](
        WeightedForward(net, forward),
        criterion=WeightedLoss(loss),
        optimizer=optimizer,
        lr=settings.lr,
        max_epochs=settings.max_epochs,
        batch_size=settings.batch_size,
        iterator_train__shuffle=True,
        iterator_train__collate_fn=_as_it_is,
        iterator_valid__collate_fn=_as_it_is,
        train_split=None if validation is None else predefined_split(LoRADataset(validation)),
        callbacks=_callbacks(settings, validation is not None),
        device=device,
        verbose=settings.verbose,
        **options,
    )


def _callbacks(settings: TrainingSettings, stops_early: bool) -> list[Any]:
    callbacks = copy.deepcopy(list(settings.callbacks))
    if settings.decay:
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        callbacks.append(("lr_schedule", LRScheduler(cosine, T_max=settings.max_epochs)))
    if stops_early:
        # Last, because it ends the epoch for whatever follows it.
        stopping = EarlyStopping(patience=settings.patience, load_best=True)
        callbacks.append(("early_stopping", stopping))
    return callbacks


def _as_it_is(batch: Any) -> Any:
    return batch
