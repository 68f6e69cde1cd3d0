"""The skorch net that trains a network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Callback, LRScheduler
from skorch.helper import predefined_split
from torch import Tensor, nn

from sklora._base import empty
from sklora._progress import Advance, write
from sklora.estimators._data import OPTIMIZERS, LoRADataset, LossKind, TrainingSettings


class _MultilabelNet(ClassifierMixin, NeuralNet):
    # By their type, scorers tell that there is one probability for each label.
    classes_ = np.eye(2, dtype=np.int64)

    def predict(self, X: Any) -> NDArray[Any]:
        return (self.predict_proba(X) > 0.5).astype(np.int64)  # type: ignore[no-any-return]


# Where a user's scoring callback finds the predictions it expects.
_SKORCH_NETS: dict[LossKind, type[NeuralNet]] = {
    "cross_entropy": NeuralNetClassifier,
    "binary_cross_entropy": _MultilabelNet,
    "squared_error": NeuralNetRegressor,
}
_NONLINEARITIES: dict[LossKind, Callable[[Tensor], Tensor] | None] = {
    "cross_entropy": partial(torch.softmax, dim=1),
    "binary_cross_entropy": torch.sigmoid,
    "squared_error": None,
}


# A validation loss that falls by less than this share is no progress.
_LEAST_PROGRESS = 1e-4


class Kept(NamedTuple):
    """The weights after an epoch."""

    epoch: int
    weights: dict[str, Tensor]


class KeepBest(Callback):
    """Keeps the weights of the best epoch so far, and ends training without progress.

    Unlike skorch's `EarlyStopping`, it has weights to go back to after an interrupt without
    validation rows too, and says why training ended.

    Parameters
    ----------
    patience : int
        Epochs without progress that end the training.
    validates : bool
        Whether there are validation rows. Without them the last epoch is the best.
    advance : callable
        Moves the progress bar.
    """

    def __init__(self, patience: int, validates: bool, advance: Advance) -> None:
        self.patience = patience
        self.validates = validates
        self.advance = advance
        self.best: Kept | None = None
        self.stopped = False
        self._bound = math.inf

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights are kept; 0 if there is none."""
        return 0 if self.best is None else self.best.epoch

    def is_complete(self, epoch: dict[str, Any]) -> bool:
        """Whether an epoch of the history came to its end."""
        return ("valid_loss" if self.validates else "train_loss") in epoch

    def on_epoch_end(self, net: NeuralNet, **_: Any) -> None:
        """Keep the weights if they are the best, or count one more epoch without progress."""
        epoch = net.history[-1]
        losses = {name: epoch[name] for name in ("train_loss", "valid_loss") if name in epoch}
        self.advance(1, **losses)
        if not self.validates or losses["valid_loss"] < self._bound:
            weights = {
                name: empty(value.shape, value.dtype, value.device).copy_(value)
                for name, value in net.module_.state_dict().items()
            }
            # In one step, for an interrupt may come between any two.
            self.best = Kept(epoch["epoch"], weights)
            self._bound = (1 - _LEAST_PROGRESS) * losses.get("valid_loss", 0)
        elif epoch["epoch"] - self.best_epoch == self.patience:
            self.stopped = True
            raise KeyboardInterrupt

    def on_train_end(self, net: NeuralNet, **_: Any) -> None:
        """Go back to the best weights, if the last are others."""
        if self.best is None:
            return  # after an interrupt, there may be no epoch at all
        last = net.history[-1]
        # A user's callback that ends training after an epoch does so before this one sees it.
        is_best = self.is_complete(last) and last.get("valid_loss", -math.inf) < self._bound
        if not is_best:
            net.module_.load_state_dict(self.best.weights)


class WeightedForward(nn.Module):
    """Hands the loss weights through, so that they reach the loss beside the outputs.

    Parameters
    ----------
    net : torch.nn.Module
        The network that is trained.
    forward : callable
        From flat rows ``(B, width)``, and further columns, to outputs ``(B, K)``, by way of `net`.
    """

    def __init__(self, net: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net = net
        self.forward_rows = forward

    def forward(self, rows: Tensor, weight: Tensor, **columns: Tensor) -> tuple[Tensor, Tensor]:
        """Give outputs and weights."""
        return self.forward_rows(rows, **columns), weight


class WeightedLoss(nn.Module):
    r"""Mean of weighted losses, :math:`\frac{1}{BK} \sum_{bk} w_{bk} \ell(f_{bk}, y_{bk})`.

    The divisor is the size of the batch, not the sum of its weights, so that the gradient is an
    unbiased estimate of that of the whole training set.

    Parameters
    ----------
    kind : {"cross_entropy", "binary_cross_entropy", "squared_error"}
        The loss of one output; outputs are logits for the first two.
    """

    def __init__(self, kind: LossKind) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, prediction: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """Give the loss of one batch, a scalar."""
        outputs, weight = prediction
        if self.kind == "cross_entropy":
            losses = nn.functional.cross_entropy(outputs, target, reduction="none")[:, None]
        elif self.kind == "binary_cross_entropy":
            losses = nn.functional.binary_cross_entropy_with_logits(
                outputs, target, reduction="none"
            )
        else:
            losses = (outputs - target).square()
        return (weight * losses).mean()


def compose(
    net: nn.Module,
    forward: Callable[[Tensor], Tensor],
    loss: LossKind,
    settings: TrainingSettings,
    validation: LoRADataset | None,
    device: torch.device,
    keeper: KeepBest,
) -> NeuralNet:
    """Give a skorch net that trains `net`; see `sklora.estimators._training.train`."""
    optimizer, optimizer_options = OPTIMIZERS[settings.optimizer]
    options: dict[str, Any] = {
        "optimizer__weight_decay": settings.weight_decay,
        # Torch's fused SGD fails where a parameter that was frozen so far has no momentum yet.
        "optimizer__fused": device.type in ("cpu", "cuda") and settings.optimizer != "sgd",
        **{f"optimizer__{name}": value for name, value in optimizer_options.items()},
    }
    table = settings.verbose >= 2
    if table:
        options["callbacks__print_log__sink"] = write
    else:
        # Without a reader, these would format a table row and score every epoch for nobody.
        options["callbacks__print_log"] = None
        if loss == "cross_entropy" and not settings.callbacks:
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
        train_split=None if validation is None else predefined_split(validation),
        # The keeper comes last: it may end the epoch.
        callbacks=[*_callbacks(settings, keeper.validates), ("keep_best", keeper)],
        predict_nonlinearity=_NONLINEARITIES[loss],
        device=device,
        verbose=table,
        **options,
    )


def _callbacks(settings: TrainingSettings, validates: bool) -> list[Any]:
    callbacks = copy.deepcopy(list(settings.callbacks))
    decay = settings.decay
    for place, given in enumerate(callbacks):
        is_pair = isinstance(given, (tuple, list)) and len(given) == 2
        callback = given[1] if is_pair else given
        if callback is not None and not hasattr(callback, "on_train_begin"):
            raise ValueError(
                f"callbacks[{place}] is {given!r}; give a callback of skorch, or a pair of a name "
                "and one."
            )
        monitored = None if validates else getattr(callback, "monitor", None)
        if str(monitored).removesuffix("_best") in ("valid_loss", "valid_acc"):
            raise ValueError(
                f"callback {type(callback).__name__} monitors {monitored!r}, but no adapters are "
                "held out; pass early_stopping=True, or let it monitor 'train_loss'."
            )
        decay = decay and not isinstance(callback, LRScheduler)
    if decay:
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        callbacks.append(("lr_schedule", LRScheduler(cosine, T_max=settings.max_epochs)))
    return callbacks


def _as_it_is(batch: Any) -> Any:
    return batch
