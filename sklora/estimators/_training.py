"""How every network is trained, by a skorch net, and what becomes of its weights."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sklora._progress import progress
from sklora.estimators._data import LossKind, TrainingData, TrainingSettings, make_datasets
from sklora.nets import GLNet, MLPNet
from sklora.nets.feedforward import ROUNDINGS

_logger = logging.getLogger("sklora.estimators")

History = list[dict[str, Any]]
OptimizerState = dict[str, NDArray[Any]]
WeightedBlock = tuple[Tensor, NDArray[np.floating[Any]]]


class TrainingInterruptedWarning(UserWarning):
    """Training was interrupted, and `fit` keeps the best weights so far.

    It is no `ConvergenceWarning`, which many ignore. Make it an error where a short training must
    not pass for a whole one; the estimator is then as it was before `fit`.

    Examples
    --------
    >>> import warnings
    >>> import numpy as np
    >>> from skorch.callbacks import Callback
    >>> from sklora import MLPNetClassifier
    >>> from sklora.estimators import TrainingInterruptedWarning
    >>> class CtrlC(Callback):
    ...     def on_batch_end(self, net, **kwargs):
    ...         if len(net.history) == 3:
    ...             raise KeyboardInterrupt
    >>> X, y = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 2
    >>> model = MLPNetClassifier(max_epochs=5, callbacks=[CtrlC()])
    >>> with warnings.catch_warnings(record=True, action="always") as seen:
    ...     model.fit(X, y).n_iter_
    2
    >>> seen[0].category.__name__
    'TrainingInterruptedWarning'
    """


def train(
    net: nn.Module,
    forward: Callable[[Tensor], Tensor],
    loss: LossKind,
    training: TrainingData,
    validation: TrainingData | None,
    settings: TrainingSettings,
    *,
    device: torch.device,
    optimizer_state: OptimizerState | None = None,
) -> tuple[History, torch.optim.Optimizer]:
    """Train a network in place.

    Parameters
    ----------
    net : torch.nn.Module
        The network, with its weights.
    forward : callable
        From flat rows ``(B, width)`` to outputs ``(B, K)``, by way of `net`.
    loss : {"cross_entropy", "binary_cross_entropy", "squared_error"}
        What is minimised.
    training : TrainingData
    validation : TrainingData or None
        Where given, training stops after `patience` epochs without progress on it, and the weights
        of the best epoch are restored.
    settings : TrainingSettings
    device : torch.device
    optimizer_state : dict of ndarray, optional
        What :func:`moments_of` gave of an earlier optimizer, to go on from.

    Returns
    -------
    history : list of dict
        One for every complete epoch, without its batches.
    optimizer : torch.optim.Optimizer
        With its moments.

    Raises
    ------
    ValueError
        When the weights end up infinite or NaN.
    KeyboardInterrupt
        When training is interrupted before there are weights to keep.

    Warns
    -----
    TrainingInterruptedWarning
        When it is interrupted later. The weights are those of the best epoch where there are
        validation rows, else those of the last complete one.
    """
    if train.__doc__ is None:
        raise RuntimeError(
            "skorch, which trains networks, needs the docstrings that python -OO and "
            "PYTHONOPTIMIZE=2 leave out; train with python -O or without. Prediction works."
        )
    # Prediction needs no skorch, and importing it takes a tenth of sklora's time.
    from sklora.estimators._skorch import KeepBest, compose

    with progress(settings.max_epochs, "training", "epoch", settings.verbose) as advance:
        keeper = KeepBest(settings.patience, validation is not None, advance)
        examples, held_out = make_datasets(training, validation, device)
        skorch_net = compose(net, forward, loss, settings, held_out, device, keeper)
        skorch_net.initialize()
        if optimizer_state is not None:
            _restore_optimizer(skorch_net.optimizer_, optimizer_state)
        skorch_net.partial_fit(examples)
    epochs = [row for row in skorch_net.history if keeper.is_complete(row)]
    cut_short = len(epochs) < len(skorch_net.history)
    if not epochs:
        raise KeyboardInterrupt  # which skorch takes for the end of training
    _check_finite(net, settings)
    n_epochs = len(epochs)
    if keeper.stopped:
        _logger.info("stopped early after epoch %d, best epoch %d", n_epochs, keeper.best_epoch)
    elif cut_short or (n_epochs < settings.max_epochs and not settings.callbacks):
        # Users' callbacks end training by an interrupt, too, but after an epoch.
        message = (
            f"Training was interrupted after {n_epochs} of {settings.max_epochs} epochs; the "
            "estimator has the best weights so far."
        )
        warnings.warn(message, TrainingInterruptedWarning, stacklevel=5)
    _logger.info("trained %d epochs on %s, %d adapters", n_epochs, device, len(training.loras))
    history = [{k: v for k, v in row.items() if k != "batches"} for row in epochs]
    return history, skorch_net.optimizer_


def moments_of(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Give the moments of an optimizer, to go on from, named ``"{parameter}/{moment}"``."""
    return {
        f"{parameter}/{moment}": value.cpu().numpy()
        for parameter, moments in optimizer.state_dict()["state"].items()
        for moment, value in moments.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    is_sgd = isinstance(optimizer, torch.optim.SGD)
    for name, value in state.items():
        parameter, moment = name.split("/")
        if (moment == "momentum_buffer") != is_sgd:
            return  # the state of another optimizer
        moments.setdefault(int(parameter), {})[moment] = torch.tensor(value)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def _check_finite(net: nn.Module, settings: TrainingSettings) -> None:
    # By extremes: `isfinite` of all weights takes thirty times as long, and more than their memory.
    extremes = [end for weights in net.parameters() for end in weights.detach().aminmax()]
    if not torch.stack(extremes).isfinite().all():
        raise ValueError(
            f"Training diverged: the weights became infinite or NaN with lr={settings.lr} and "
            f"weight_decay={settings.weight_decay}. Use smaller ones, or rescale X and y."
        )


_generators = threading.RLock()  # a callback may train another estimator


def _free_generators() -> None:
    # The thread that held the lock is not in a forked child.
    global _generators
    _generators = threading.RLock()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_free_generators)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block, and leave its generators outside as they were.

    Torch's generators are those of the process, so that other threads wait before such a block.

    Parameters
    ----------
    seed : int
    device : torch.device
        Its generator is seeded besides the CPU's.
    """
    with _generators, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def weighted_moments(
    blocks: Iterable[WeightedBlock],
) -> tuple[Tensor, Tensor]:
    """Find mean and standard deviation of every column, in float64, one block at a time.

    Parameters
    ----------
    blocks : iterator of (values, weights)
        A Tensor of shape ``(B, F)`` and an ndarray of shape ``(B,)``.

    Returns
    -------
    mean, scale : Tensor of shape (F,)
    """
    total, mean, squares = 0.0, torch.zeros(()), torch.zeros(())
    for values, weights in blocks:
        x = values.double()
        w = torch.from_numpy(weights).to(x)[:, None]
        weight = float(w.sum())
        if weight == 0:
            continue
        block_mean = (w * x).sum(0) / weight
        shift = block_mean - mean
        total += weight
        mean = mean + shift * (weight / total)
        squares = squares + (w * (x - block_mean).square()).sum(0)
        squares = squares + shift.square() * (weight * (total - weight) / total)
    return mean, (squares / total).sqrt()


@torch.no_grad()
def calibrate_input(
    net: GLNet | MLPNet,
    features: Callable[[], Iterable[WeightedBlock]],
    rounding: Tensor | float = 0.0,
) -> None:
    """Set the moments by which a network standardises its features and their norm.

    Columns that differ by the rounding of their dtype alone are constant.

    Parameters
    ----------
    net : GLNet or MLPNet
        Its `standardize` and `row_norm` are set, in place.
    features : callable
        Starts a pass over the training features, in blocks ``(B, F)`` with weights ``(B,)``.
    rounding : Tensor of shape (F,) or float, default=0.0
        What rounding alone may make of their standard deviations, where that is more.
    """
    eps = 0.0

    def blocks() -> Iterator[WeightedBlock]:
        nonlocal eps
        for values, weights in features():
            eps = torch.finfo(values.dtype).eps
            yield values, weights

    mean, scale = weighted_moments(blocks())
    rounding = (ROUNDINGS * eps * mean.abs()).clamp(min=rounding)
    net.standardize.set_moments(mean, scale, rounding)
    norms = (
        (torch.linalg.vector_norm(net.standardize(block), dim=1, keepdim=True), weights)
        for block, weights in features()
    )
    # In the precision of the norms, whose rounding is no spread, nor is that of constant columns.
    noise = torch.where(scale > rounding, 0.0, rounding) / net.standardize.scale
    mean, scale = (moment.float() for moment in weighted_moments(norms))
    net.row_norm.norm.set_moments(mean, scale, torch.linalg.vector_norm(noise).float())
