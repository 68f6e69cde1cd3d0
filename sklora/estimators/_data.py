"""What networks are trained on, and how: adapters with targets, split and in batches; settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklora._base import as_tensor, empty, send
from sklora.collection import LoRACollection

# On fewer validation rows than this, early stopping would follow noise.
_MIN_VALIDATION_ROWS = 10
# The rest is for the network, its optimizer, and other processes.
_SHARE_OF_GPU = 0.25

LossKind = Literal["cross_entropy", "binary_cross_entropy", "squared_error"]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


class TrainingSettings(NamedTuple):
    """What an estimator's constructor says about training, by the same names.

    `decay` is whether the learning rate falls along half a cosine over `max_epochs`, where no
    callback sets it.
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
    """Whole batches, each read from the collection at once, or taken from what a device keeps.

    A batch is ``({"rows": (B, width), "weight": (B, K), **columns}, targets)``. The rows stay flat
    until they are on the device: one transfer moves them, and every kind of network starts from
    them.

    Parameters
    ----------
    data : TrainingData
    device : torch.device
        Keeps all but the rows.
    keeps_rows : bool, default=False
        Whether it keeps the rows too: they are then read and sent once, not in every epoch.
    """

    def __init__(
        self, data: TrainingData, device: torch.device, *, keeps_rows: bool = False
    ) -> None:
        # By these names skorch finds the classes, and what a scoring callback scores on.
        self.X, self.y = data.loras, data.targets
        columns = {"weight": data.weights, **data.columns}
        self._columns = {name: as_tensor(column).to(device) for name, column in columns.items()}
        self._targets = as_tensor(data.targets).to(device)
        self._rows = _rows_on(device, data.loras) if keeps_rows else None

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Give one batch."""
        places = np.asarray(indices)
        picked = torch.from_numpy(places).to(self._targets.device)
        rows = as_tensor(self.X.read(places)) if self._rows is None else self._rows[picked]
        columns = {name: column[picked] for name, column in self._columns.items()}
        return {"rows": rows, **columns}, self._targets[picked]


def _rows_on(device: torch.device, loras: LoRACollection) -> Tensor:
    rows = empty((len(loras), loras.layout.width), getattr(torch, loras.dtype.name), device)
    for places, block in iter_blocks(loras, device, loras.layout.width):
        rows[places] = block
    return rows


def make_datasets(
    training: TrainingData, validation: TrainingData | None, device: torch.device
) -> tuple[LoRADataset, LoRADataset | None]:
    """Give what a network is trained and validated on.

    Parameters
    ----------
    training : TrainingData
    validation : TrainingData or None
    device : torch.device
        CUDA keeps the rows of both if they take a quarter of its free memory at most.

    Returns
    -------
    training : LoRADataset
    validation : LoRADataset or None
    """
    n_bytes = training.loras.nbytes + (0 if validation is None else validation.loras.nbytes)
    make = partial(LoRADataset, device=device, keeps_rows=_has_room(device, n_bytes))
    return make(training), None if validation is None else make(validation)


def _has_room(device: torch.device, n_bytes: int) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds for tensors that are gone is free too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return n_bytes <= _SHARE_OF_GPU * free


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
    if loras.layout != loras._store.layout:
        entries_per_adapter += loras._store.layout.width  # the rows as the store has them
    for rows in loras.iter_batches(8 * entries_per_adapter):
        yield rows, send(loras.read(rows, copy=False), device)
