"""How every network is trained: batches, loss, validation rows, and a skorch net of them all."""

from __future__ import annotations

import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sklora._base import as_tensor, send
from sklora._progress import progress
from sklora.collection import LoRACollection
from sklora.nets import GLNet, MLPNet

_logger = logging.getLogger("sklora.estimators")

LossKind = Literal["cross_entropy", "binary_cross_entropy", "squared_error"]
History = list[dict[str, Any]]
OptimizerState = dict[str, NDArray[Any]]
WeightedBlock = tuple[Tensor, NDArray[np.floating[Any]]]

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}
# On fewer validation rows than this, early stopping would follow noise.
_MIN_VALIDATION_ROWS = 10


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


class TrainingData(NamedTuple):
    """Adapters, encoded targets ``(N,)`` or ``(N, K)``, loss weights ``(N, 1)`` or ``(N, K)``.

    `columns` are what a network reads of every adapter besides its row, by the names of the
    arguments of its `forward`.
    """

    loras: LoRACollection
    targets: NDArray[Any]
    weights: NDArray[np.floating[Any]]
    columns: Mapping[str, NDArray[Any]] = MappingProxyType({})

    @property
    def adapter_weights(self) -> NDArray[np.floating[Any]]:
        """Weight ``(N,)`` of each adapter, over its outputs."""
        weights: NDArray[np.floating[Any]] = self.weights.mean(axis=1)
        return weights

    def take(self, rows: NDArray[np.intp]) -> TrainingData:
        """Give some rows: a view of the adapters, a copy of the rest."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return TrainingData(self.loras[rows], self.targets[rows], self.weights[rows], columns)


class LoRADataset(torch.utils.data.Dataset[Any]):
    """Whole batches, each read from the collection at once.

    A batch is ``({"rows": (B, width), "weight": (B, K), **columns}, targets)``. The rows stay flat
    until they are on the device: one transfer moves them, and every kind of network starts from
    them.

    Parameters
    ----------
    data : TrainingData
    """

    def __init__(self, data: TrainingData) -> None:
        # By these names skorch finds the classes, and what a scoring callback scores on.
        self.X, self.y, self.weights, self.columns = data

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Read one batch."""
        picked = np.asarray(indices)
        rows, weight = as_tensor(self.X.read(picked)), torch.from_numpy(self.weights[picked])
        columns = {name: torch.from_numpy(c[picked]) for name, c in self.columns.items()}
        return {"rows": rows, "weight": weight, **columns}, torch.from_numpy(self.y[picked])


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


class TrainingSettings(NamedTuple):
    """What an estimator's constructor says about training, by the same names.

    `decay` is whether the learning rate falls along half a cosine over `max_epochs`.
    """

    lr: float
    weight_decay: float
    optimizer: str
    max_epochs: int
    batch_size: int
    patience: int
    callbacks: Sequence[Any]
    verbose: int
    decay: bool = True


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
) -> tuple[History, OptimizerState]:
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
        What an earlier call returned, to go on from.

    Returns
    -------
    history : list of dict
        One for every complete epoch, without its batches.
    optimizer_state : dict of ndarray
        The optimizer's moments, named ``"{parameter}/{moment}"``.

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
    # Prediction needs no skorch, and importing it takes a tenth of sklora's time.
    from sklora.estimators._skorch import KeepBest, compose

    with progress(settings.max_epochs, "training", "epoch", settings.verbose) as advance:
        keeper = KeepBest(settings.patience, validation is not None, advance)
        skorch_net = compose(net, forward, loss, settings, validation, device, keeper)
        skorch_net.initialize()
        if optimizer_state is not None:
            _restore_optimizer(skorch_net.optimizer_, optimizer_state)
        skorch_net.partial_fit(LoRADataset(training))
    epochs = [row for row in skorch_net.history if keeper.is_complete(row)]
    cut_short = len(epochs) < len(skorch_net.history)
    if cut_short and keeper.best is None:
        raise KeyboardInterrupt  # which skorch takes for the end of training
    _check_finite(net, settings.lr)
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
    return history, _optimizer_state(skorch_net.optimizer_)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    return {
        f"{parameter}/{moment}": value.cpu().numpy()
        for parameter, moments in optimizer.state_dict()["state"].items()
        for moment, value in moments.items()
        if isinstance(value, Tensor)
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


def _check_finite(net: nn.Module, lr: float) -> None:
    if not all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters()):
        raise ValueError(
            f"Training diverged: the weights became infinite or NaN with lr={lr}. Use a smaller "
            "lr, or rescale X and y."
        )


def split_validation(
    keys: NDArray[Any],
    fraction: float,
    random_state: np.random.RandomState,
    *,
    classes: bool,
) -> tuple[NDArray[np.intp], NDArray[np.intp] | None]:
    """Choose the rows to validate on, stratified by target.

    The rows are sorted by target and every ``1/fraction``-th is taken. So classes, label sets and
    quantiles of a regression target all keep their shares, whatever their number.

    Parameters
    ----------
    keys : ndarray of shape (N, K)
        Targets; the first column sorts first.
    fraction : float
        Share of the rows; at least 10 rows are taken.
    random_state : RandomState
    classes : bool
        Whether rows of one key are a class, which must not leave the training rows entirely.

    Returns
    -------
    training, validation : ndarray of int
        Sorted. `validation` is None when there are too few rows, of all or of each class, to spare
        any.
    """
    n_rows = len(keys)
    share = min(round(fraction * n_rows), n_rows - 1)
    n_validation = max(share, _MIN_VALIDATION_ROWS)
    if n_validation > max(share, n_rows / 3):
        return np.arange(n_rows), None
    shuffled = random_state.permutation(n_rows)
    ordered = shuffled[np.lexsort(keys[shuffled].T[::-1])]
    steps = np.arange(n_validation) + random_state.uniform()
    chosen = np.zeros(n_rows, dtype=bool)
    chosen[ordered[np.floor(steps * n_rows / n_validation).astype(np.intp)]] = True
    if classes:
        chosen &= np.isin(keys[:, 0], keys[~chosen, 0])
    if not chosen.any():
        return np.arange(n_rows), None
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def training_batch_size(n_rows: int, batch_size: int) -> int:
    """Give the batch size that leaves at least 4 steps in an epoch.

    Parameters
    ----------
    n_rows : int
        Number of training rows.
    batch_size : int
        The largest allowed.

    Returns
    -------
    int
    """
    return min(int(batch_size), math.ceil(n_rows / 4))


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


@contextmanager
def plain_torch() -> Iterator[None]:
    """Undo, inside the block, what surrounds it: inference mode, and a default device."""
    default = torch.get_default_device()
    # Only where it is needed, as it takes a little of each call of torch.
    device = nullcontext() if default.type == "cpu" else torch.device("cpu")
    with torch.inference_mode(False), device:
        yield


def iter_blocks(
    loras: LoRACollection, device: torch.device, entries_per_adapter: int
) -> Iterator[tuple[slice, Tensor]]:
    """Read flat rows ``(B, width)`` block by block, within scikit-learn's `working_memory`.

    Parameters
    ----------
    loras : LoRACollection
    device : torch.device
        Where the blocks go.
    entries_per_adapter : int
        How many float64 numbers one adapter occupies in what is done with it.

    Yields
    ------
    rows : slice
    block : Tensor of shape (B, width)
        Not to be written to: it may be the collection's own memory.
    """
    for rows in loras.iter_batches(8 * entries_per_adapter):
        yield rows, send(loras.read(rows, copy=False), device)


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
def calibrate_input(net: GLNet | MLPNet, features: Callable[[], Iterable[WeightedBlock]]) -> None:
    """Set the moments by which a network standardises its features and their norm.

    Parameters
    ----------
    net : GLNet or MLPNet
        Its `standardize` and `row_norm` are set, in place.
    features : callable
        Starts a pass over the training features, in blocks ``(B, F)`` with weights ``(B,)``.
    """
    net.standardize.set_moments(*weighted_moments(features()))
    norms = (
        (torch.linalg.vector_norm(net.standardize(block), dim=1, keepdim=True), weights)
        for block, weights in features()
    )
    net.row_norm.norm.set_moments(*weighted_moments(norms))
