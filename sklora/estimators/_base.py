"""What the four network estimators share: parameters, fitting, fitted state, and raw outputs."""

from __future__ import annotations

import math
import zlib
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted
from torch import Tensor, nn

from sklora._base import (
    VersionedState,
    as_tensor,
    atomic_fit,
    empty,
    float32_by_default,
    plain_torch,
    resolve_device,
)
from sklora._pages import Rows
from sklora._repr import DocumentedMixin
from sklora._stores import check_memory
from sklora.collection import LoRACollection, LoRALayout, check_loras
from sklora.estimators._data import (
    OPTIMIZERS,
    LossKind,
    TrainingData,
    TrainingSettings,
    iter_blocks,
    split_validation,
)
from sklora.estimators._training import (
    History,
    OptimizerState,
    moments_of,
    seeded,
    train,
)
from sklora.nets import Standardize

# With less than this many adapters, early_stopping="auto" trains on all of them (docs/results.md).
_ENOUGH_TO_SPARE = 200
_LEAVE_OUT = "Leave out adapters whose ranks are far above those of others."


class BaseNetEstimator(DocumentedMixin, VersionedState, BaseEstimator, metaclass=ABCMeta):
    """Shell around one network.

    One subclass says which network, how flat rows enter it and what its training statistics are;
    another says how targets are encoded and outputs decoded. Fitted state is arrays, numbers and
    strings only.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "hidden_dim": [Interval(Integral, 1, None, closed="left")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "optimizer": [StrOptions(set(OPTIMIZERS))],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean", StrOptions({"auto"})],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "patience": [Interval(Integral, 1, None, closed="left")],
        "callbacks": [list, tuple, None],
        "warm_start": ["boolean"],
        "device": [str, torch.device],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "layout": [LoRALayout, None],
    }

    _net_type: ClassVar[type[nn.Module]]
    _accepted_rank: ClassVar[Literal["any", "fitted"]]
    # In an epoch, however few adapters there are (docs/results.md).
    _least_steps: ClassVar[int] = 8

    layout_: LoRALayout
    weights_: dict[str, NDArray[Any]]
    architecture_: dict[str, Any]
    history_: History
    n_iter_: int
    optimizer_state_: OptimizerState
    n_outputs_: int

    # The defaults are those of a perceptron, whose regressor has no parameters but these.
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
        warm_start: bool = False,
        device: str | torch.device = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
        layout: LoRALayout | None = None,
    ) -> None:
        self.hidden_dim = hidden_dim
        self.n_layers = n_layers
        self.nonlinearity = nonlinearity
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.callbacks = callbacks
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.layout = layout

    # What a network brings.

    @abstractmethod
    def _architecture(self, layout: LoRALayout, n_outputs: int) -> dict[str, Any]:
        """Give the keyword arguments of the network."""

    @abstractmethod
    def _forward(
        self, net: nn.Module, layout: LoRALayout, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor]:
        """Give the map from flat rows of a layout to the outputs of a network of some dtype."""

    @abstractmethod
    def _calibrate(self, net: nn.Module, data: TrainingData) -> None:
        """Set the network's buffers from the training rows."""

    @abstractmethod
    def _entries_per_adapter(self, layout: LoRALayout) -> int:
        """Give about how many numbers one adapter occupies on its way through the network."""

    # What a kind of target brings.

    @property
    @abstractmethod
    def _loss(self) -> LossKind: ...

    @property
    @abstractmethod
    def _n_outputs(self) -> int:
        """Number of outputs of the network, once the targets are learnt."""

    @abstractmethod
    def _check_targets(self, y: Any) -> NDArray[Any]:
        """Give the targets as an array ``(N,)`` or ``(N, K)``, or say what is wrong with them."""

    @abstractmethod
    def _learn_targets(
        self, y: NDArray[Any], weights: NDArray[np.float64], classes: ArrayLike | None
    ) -> None:
        """Learn classes, or mean and scale, from checked targets."""

    @abstractmethod
    def _encode(
        self, y: NDArray[Any], weights: NDArray[np.float64]
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Give checked targets as the loss reads them, and its weights ``(N, 1)`` or ``(N, K)``."""

    # Fitting.

    @atomic_fit
    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Train the network, from new weights or, with `warm_start`, from those of the last fit.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, n_features)
            Adapters, or flat rows of `layout`.
        y : array-like of shape (n_adapters,) or (n_adapters, n_targets)
            Targets.
        sample_weight : array-like of shape (n_adapters,), optional
            Weights of the adapters in the loss. Those of weight zero are left out entirely.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            When a parameter, `X`, `y` or `sample_weight` is not valid, or training diverges. The
            estimator stays as it was.

        Warns
        -----
        TrainingInterruptedWarning
            When Ctrl-C ends training once an epoch is complete: the estimator is fitted, with the
            best weights so far. Before that, the interrupt is raised.
        """
        self._validate_params()
        resume = self.warm_start and hasattr(self, "weights_")
        history, _ = self._train(X, y, sample_weight, resume=resume)
        self.history_ = history
        self.n_iter_ = len(history)
        if hasattr(self, "optimizer_state_"):
            del self.optimizer_state_
        return self

    def _partial_fit(
        self,
        X: Any,
        y: ArrayLike,
        sample_weight: ArrayLike | None,
        classes: ArrayLike | None = None,
    ) -> None:
        """Train for one epoch at a constant learning rate, on all rows."""
        resume = hasattr(self, "weights_")
        history, optimizer = self._train(
            X, y, sample_weight, resume=resume, classes=classes, one_epoch=True
        )
        earlier = self.history_ if resume else []
        self.history_ = [*earlier, {**history[0], "epoch": len(earlier) + 1}]
        self.n_iter_ = len(self.history_)
        self.optimizer_state_ = moments_of(optimizer)

    def _train(
        self,
        X: Any,
        y: Any,
        sample_weight: ArrayLike | None,
        *,
        resume: bool,
        classes: ArrayLike | None = None,
        one_epoch: bool = False,
    ) -> tuple[History, torch.optim.Optimizer]:
        device = resolve_device(self.device)
        random_state = check_random_state(self.random_state)
        seed = random_state.randint(np.iinfo(np.int32).max)
        if resume:
            # A call that goes on from earlier ones is not to repeat their order and dropout.
            seed += self.n_iter_ + zlib.crc32(list(self.weights_.values())[-1].tobytes())
        data = self._training_data(X, y, sample_weight, classes, reset=not resume)
        # Those of one part of the data are to be compared with those of the others.
        data = data._replace(weights=_loss_weights(data.weights, of_mean_one=not one_epoch))
        training, validation = data, None
        if self._stops_early(len(data.loras)) and not one_epoch:
            training, validation = self._split(data, random_state)
        with plain_torch(device), seeded(seed, device):
            goes_on = one_epoch or self.warm_start
            net = self._resumed_net() if resume else self._new_net(data, device, goes_on)
            result = train(
                net.to(device),
                self._forward(net, data.loras.layout, torch.float32),
                self._loss,
                training,
                validation,
                self._settings(len(training.loras), one_epoch),
                device=device,
                optimizer_state=getattr(self, "optimizer_state_", None) if one_epoch else None,
            )
        self.weights_ = {k: v.cpu().numpy().copy() for k, v in net.state_dict().items()}
        return result

    def _training_data(
        self,
        X: Any,
        y: Any,
        sample_weight: ArrayLike | None,
        classes: ArrayLike | None,
        *,
        reset: bool,
    ) -> TrainingData:
        loras = check_loras(self, X, reset=reset, rank=self._accepted_rank)
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        y = self._check_targets(y)
        check_consistent_length(loras, y)
        # With array API dispatch this wants an array, of which it reads the length alone.
        weights = _check_sample_weight(
            sample_weight, np.empty(len(loras)), dtype=np.float64, ensure_non_negative=True
        )
        if not weights.any():  # scikit-learn 1.6 lets these pass
            raise ValueError("sample_weight is zero for every adapter; give some a weight.")
        if reset:
            self._learn_targets(y, weights, classes)
        targets, loss_weights = self._encode(y, weights)
        if not loss_weights.any():
            raise ValueError("class_weight is zero for every adapter; give some class a weight.")
        kept = np.flatnonzero(weights)
        if len(kept) < len(weights):
            # Not read at all, so that a weight of zero is the same as leaving the row out.
            loras, targets, loss_weights = loras[kept], targets[kept], loss_weights[kept]
        return TrainingData(loras, targets, loss_weights)

    def _stops_early(self, n_rows: int) -> bool:
        if self.early_stopping == "auto":
            return n_rows >= _ENOUGH_TO_SPARE
        return bool(self.early_stopping)

    def _split(
        self, data: TrainingData, random_state: np.random.RandomState
    ) -> tuple[TrainingData, TrainingData | None]:
        training, validation = split_validation(
            data.targets.reshape(len(data.targets), -1),
            self.validation_fraction,
            random_state,
            classes=self._loss == "cross_entropy",
        )
        if validation is None:
            return data, None
        return data.take(training), data.take(validation)

    def _new_net(self, data: TrainingData, device: torch.device, goes_on: bool) -> nn.Module:
        self.n_outputs_ = self._n_outputs
        self.architecture_ = self._architecture(self.layout_, self.n_outputs_)
        with float32_by_default():
            net = self._net_type(**self.architecture_).to(device)
        for part in net.modules():
            # Nothing is learnt of a constant column, unless training goes on with other adapters.
            if isinstance(part, Standardize) and not goes_on:
                part.constant_scale = torch.finfo(torch.float32).max
        self._calibrate(net, data)
        return net

    def _resumed_net(self) -> nn.Module:
        wanted = self._architecture(self.layout_, self.n_outputs_)
        for name, value in wanted.items():
            fitted = self.architecture_[name]
            if value != fitted:
                if isinstance(getattr(self, name, None), (bool, np.bool_)):
                    value, fitted = bool(value), bool(fitted)  # as the parameter has it
                raise ValueError(
                    f"{name} is {value!r}, but this estimator was fitted with {fitted!r}. "
                    "Set it back, or fit with warm_start=False."
                )
        return self._fitted_net()

    def _settings(self, n_rows: int, one_epoch: bool) -> TrainingSettings:
        return TrainingSettings(
            lr=self.lr,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            max_epochs=1 if one_epoch else self.max_epochs,
            # Smaller where that leaves about enough steps in an epoch; torch asks for an int.
            batch_size=min(int(self.batch_size), math.ceil(n_rows / self._least_steps)),
            patience=self.patience,
            callbacks=self.callbacks or (),
            verbose=int(self.verbose),
            decay=not one_epoch,
        )

    # Fitted state.

    @property
    def net_(self) -> nn.Module:
        """The fitted network, a new copy in float64 on `device`, ready to evaluate."""
        check_is_fitted(self, "weights_")
        try:
            return self._evaluated_net()
        except ValueError as error:
            # Scikit-learn's display of a fitted estimator reads every attribute that there is.
            raise AttributeError(str(error)) from None

    def _evaluated_net(self) -> nn.Module:
        return self._fitted_net(torch.float64).eval().to(resolve_device(self.device))

    def _fitted_net(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Give the network with copies of the weights, which are float32."""
        # On the meta device, weights that are replaced at once cost no time and no random numbers.
        with torch.device("meta"):
            net = self._net_type(**self.architecture_)
        state = {
            name: empty(np.shape(value), dtype).copy_(as_tensor(np.asarray(value)))
            for name, value in self.weights_.items()
        }
        net.load_state_dict(state, assign=True)
        return net

    def _parts(self, loras: LoRACollection) -> Iterable[tuple[Rows, LoRACollection]]:
        """Give the adapters that are computed together, and their places."""
        return [(slice(None), loras)]

    def _outputs(self, X: Any) -> NDArray[np.float64]:
        """Give the network's outputs ``(N, n_outputs)``, in float64, block by block."""
        check_is_fitted(self, "weights_")
        loras = check_loras(self, X, reset=False, rank=self._accepted_rank)
        net = self._evaluated_net()
        device = next(net.buffers()).device
        outputs = np.empty((len(loras), self.n_outputs_))
        for places, part in self._parts(loras):
            forward = self._forward(net, part.layout, torch.float64)
            entries = self._entries_per_adapter(part.layout)
            if device.type == "cpu":
                what = f"what {type(self).__name__} computes"
                check_memory(1, entries, np.dtype(np.float64), what=what, remedy=_LEAVE_OUT)
            with torch.inference_mode():
                found = [forward(block).cpu() for _, block in iter_blocks(part, device, entries)]
            outputs[places] = torch.cat(found).numpy()
        valid = np.isfinite(outputs).all(axis=1)
        if not valid.all():
            # Finite numbers overflow, and the largest of NaN would be the first class.
            id = loras.ids.item(valid.argmin())
            raise ValueError(
                f"the outputs of {type(self).__name__} for adapter {id!r} are NaN or infinite: its "
                "numbers, or the network's, are too large. Leave it out."
            )
        return outputs


def _loss_weights(weights: NDArray[Any], *, of_mean_one: bool) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        mean = weights.mean()
        weights = weights / mean if of_mean_one else weights
        scaled: NDArray[np.float32] = weights.astype(np.float32)
    if not (np.isfinite(mean) and np.isfinite(scaled).all()):
        raise ValueError(
            "the weights of the adapters, sample_weight times class_weight, are NaN, infinite or "
            "too large."
        )
    return scaled
