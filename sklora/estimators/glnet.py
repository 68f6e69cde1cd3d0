"""GLNetClassifier and GLNetRegressor: what no gauge changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from sklora._base import empty, resolve_device
from sklora._modules import ModuleGroup
from sklora._pages import Rows
from sklora._stores import by_rank
from sklora.collection import LoRACollection, LoRALayout
from sklora.estimators._base import BaseNetEstimator
from sklora.estimators._data import TrainingData, iter_blocks
from sklora.estimators._docs import document
from sklora.estimators._targets import (
    CLASS_WEIGHT_CONSTRAINT,
    ClassWeight,
    NetClassifier,
    NetRegressor,
)
from sklora.estimators._training import calibrate_input, weighted_moments
from sklora.linalg import spectrum, squared_norm
from sklora.nets import GLNet
from sklora.nets.equivariant import GateKind, HeadKind

Factors = list[tuple[Tensor, Tensor]]


class _GLNetEstimator(BaseNetEstimator):
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseNetEstimator._parameter_constraints,
        "n_layers": [Interval(Integral, 1, None, closed="left")],
        "nonlinearity": [StrOptions(set(get_args(GateKind)))],
        "head": [StrOptions(set(get_args(HeadKind)))],
        "spectrum": ["boolean"],
        "mlp_hidden": [Interval(Integral, 1, None, closed="left"), tuple],
    }
    _net_type = GLNet
    _accepted_rank = "any"

    head: HeadKind
    spectrum: bool
    mlp_hidden: int | tuple[int, ...]

    def _architecture(self, layout: LoRALayout, n_outputs: int) -> dict[str, Any]:
        mlp_hidden = self.mlp_hidden if isinstance(self.mlp_hidden, tuple) else (self.mlp_hidden,)
        if not all(isinstance(width, Integral) and width > 0 for width in mlp_hidden):
            raise ValueError(f"mlp_hidden={self.mlp_hidden!r} must hold integers of at least 1.")
        return {
            "groups": tuple((len(group.index), group.n, group.m) for group in layout.groups),
            "n_outputs": n_outputs,
            "hidden_dim": self.hidden_dim,
            "n_layers": self.n_layers,
            "nonlinearity": self.nonlinearity,
            "head": self.head,
            "mlp_hidden": mlp_hidden,
            "dropout": self.dropout,
            "n_side": layout.n_side,
            "spectrum": sum(layout.ranks) if self.spectrum else 0,
        }

    def _training_data(self, *args: Any, **kwargs: Any) -> TrainingData:
        data = super()._training_data(*args, **kwargs)
        if not self.spectrum:
            return data
        # Once a fit: at large ranks, they take as long as a step of the network.
        loras, device = data.loras, resolve_device(self.device)
        values = np.empty((len(loras), sum(self.layout_.ranks)), loras.dtype)
        for rows, factors in self._cut(loras, device):
            values[rows] = singular_values(factors, self.layout_).cpu().numpy()
        return data._replace(columns={"spectra": values})

    def _forward(
        self, net: nn.Module, layout: LoRALayout, dtype: torch.dtype
    ) -> Callable[..., Tensor]:
        memory: list[Tensor] = []

        def forward(rows: Tensor, spectra: Tensor | None = None) -> Tensor:
            factors, side = cut_factors(rows, layout, memory, dtype=dtype)
            if net.spectrum and spectra is None:
                spectra = singular_values(factors, self.layout_)
            outputs: Tensor = net(factors, side, spectra)
            return outputs

        return forward

    def _calibrate(self, net: nn.Module, data: TrainingData) -> None:
        assert isinstance(net, GLNet)
        layout, device = data.loras.layout, net.module_scale.device
        weights = data.adapter_weights

        def factors() -> Iterator[tuple[NDArray[np.intp], Factors]]:
            return self._cut(data.loras, device, torch.float32)

        square, _ = weighted_moments(
            (_mean_square_entries(pairs), weights[rows]) for rows, pairs in factors()
        )
        if not torch.isfinite(square).all():
            names = [layout.names[i] for group in layout.groups for i in group.index]
            raise ValueError(
                f"updates of module {names[int(torch.isfinite(square).int().argmin())]!r} overflow "
                "in float32: rescale the adapters, or leave out those that are far too large."
            )
        # Each factor takes half of what makes the entries of U V^T have unit size.
        scale = square.pow(-0.25)
        net.module_scale.copy_(torch.where(square > 0, scale, torch.ones_like(scale)))

        # A module whose update is the same in all adapters differs by rounding alone.
        rounding, _ = weighted_moments(
            (net.rounding(pairs), weights[rows]) for rows, pairs in factors()
        )
        calibrate_input(
            net,
            lambda: ((net.features(pairs), weights[rows]) for rows, pairs in factors()),
            rounding,
        )
        if layout.n_side:
            entries = self._entries_per_adapter(layout)
            calibrate_input(
                net.side_path,
                lambda: (
                    (block[:, layout.side_slice], weights[rows])
                    for rows, block in iter_blocks(data.loras, device, entries)
                ),
            )
        if net.spectrum:
            spectra = torch.from_numpy(data.columns["spectra"]).to(device)
            calibrate_input(net.spectrum_path, lambda: [(spectra, weights)])

    def _parts(self, loras: LoRACollection) -> Iterator[tuple[Rows, LoRACollection]]:
        """Give adapters of like ranks, without the room for larger ones, which would be work."""
        for places in by_rank(loras.ranks.max(axis=1)):
            part = loras[places]
            ranks = part.ranks.max(axis=0).clip(min=1).tolist()
            yield places, part.with_layout(part.layout.with_ranks(ranks))

    def _cut(
        self, loras: LoRACollection, device: torch.device, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[NDArray[np.intp], Factors]]:
        """Give the factors of all adapters, block by block, and their places."""
        for places, part in self._parts(loras):
            index = np.arange(len(loras))[places]
            for rows, block in iter_blocks(part, device, self._entries_per_adapter(part.layout)):
                yield index[rows], cut_factors(block, part.layout, dtype=dtype)[0]

    def _entries_per_adapter(self, layout: LoRALayout) -> int:
        hidden = 2 * self.hidden_dim * max(layout.ranks)
        products = self.hidden_dim**2 if self.head == "flatten" else 1
        copies = 5 if self.spectrum else 3
        # Modules of one shape are cut to the largest rank among them.
        cut = sum(len(group.index) * (group.n + group.m) * group.rank for group in layout.groups)
        work = (copies - 1) * cut + layout.n_modules * (4 * hidden + 3 * products)
        return layout.width + work


def cut_factors(
    rows: Tensor,
    layout: LoRALayout,
    memory: list[Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Factors, Tensor | None]:
    """Cut flat rows into module-major factors.

    Parameters
    ----------
    rows : Tensor of shape (B, width)
        Flat adapters.
    layout : LoRALayout
        What the columns mean.
    memory : list of Tensor, optional
        Holds the memory of the factors, which calls with the same list overwrite: fresh memory
        costs more time than the copy into it. Start with an empty list.
    dtype : torch.dtype, optional
        Of what is returned; by default that of `rows`.

    Returns
    -------
    factors : list of (U, V)
        One pair for every group of modules of one shape, ``U (M, n, B, r)`` and ``V (M, m, B, r)``;
        smaller ranks are padded with zeros.
    side : Tensor of shape (B, n_side) or None
        The side features.
    """
    dtype = dtype or rows.dtype
    if layout.has_plain_rows:
        rows = rows.to(dtype)
        return [(rows.T[None, :, :, None], rows.new_ones(1, 1, len(rows), 1))], None
    shapes = [
        (len(group.index), n, len(rows), group.rank)
        for group in layout.groups
        for n in (group.n, group.m)
    ]
    memory = [] if memory is None else memory
    flat = _of_sizes([math.prod(shape) for shape in shapes], dtype, rows.device, memory)
    factors = [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]
    pairs = list(zip(factors[::2], factors[1::2], strict=True))
    for group, pair in zip(layout.groups, pairs, strict=True):
        for member, module, count in _runs(group, layout):
            rank, members = layout.modules[module].rank, slice(member, member + count)
            left, right = layout.factor_slices[module]
            size = right.stop - left.start
            run = rows[:, left.start : left.start + count * size].reshape(len(rows), count, size)
            sides = torch.split(run, [group.n * rank, group.m * rank], dim=2)
            for factor, side in zip(pair, sides, strict=True):
                cut = side.reshape(len(rows), count, -1, rank).permute(1, 2, 0, 3)
                factor[members, :, :, :rank] = cut
                if rank < group.rank:
                    factor[members, :, :, rank:] = 0
    return pairs, rows[:, layout.side_slice].to(dtype) if layout.n_side else None


def _runs(group: ModuleGroup, layout: LoRALayout) -> Iterator[tuple[int, int, int]]:
    """Give first member, its module and the length of every run of like modules, side by side."""
    first = 0
    for member, module in enumerate(group.index[1:], start=1):
        before = group.index[member - 1]
        if module != before + 1 or layout.ranks[module] != layout.ranks[before]:
            yield first, group.index[first], member - first
            first = member
    yield first, group.index[first], len(group.index) - first


def singular_values(factors: Sequence[tuple[Tensor, ...]], layout: LoRALayout) -> Tensor:
    """Give the singular values of every update, largest first.

    Parameters
    ----------
    factors : sequence of (U, V)
        As :func:`cut_factors` gives them, of any rank.
    layout : LoRALayout
        Its largest rank is how many values of a module there are: further ones are left out,
        missing ones are zero.

    Returns
    -------
    Tensor of shape (B, sum of ranks)
        The modules in the order of the groups.

    Raises
    ------
    ValueError
        When numbers overflow on the way.
    """
    columns: list[Tensor] = []
    for (U, V), group in zip(factors, layout.groups, strict=True):
        try:
            values = spectrum(U.transpose(1, 2), V.transpose(1, 2))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"numbers of module {layout.names[group.index[0]]!r}, or of one of its shape, "
                "overflow in a decomposition in float64: rescale the adapters, leave out those "
                "that are far too large, or fit with spectrum=False."
            ) from error
        values = nn.functional.pad(values, (0, group.rank))
        columns += [values[k, :, : layout.ranks[module]] for k, module in enumerate(group.index)]
    return torch.cat(columns, dim=1)


def _of_sizes(
    sizes: list[int], dtype: torch.dtype, device: torch.device, memory: list[Tensor]
) -> list[Tensor]:
    """Give uninitialised flat tensors, in the memory of the last call if they fit there."""
    if not memory or any(len(m) < size for m, size in zip(memory, sizes, strict=True)):
        memory[:] = [empty(size, dtype, device) for size in sizes]
    return [m[:size] for m, size in zip(memory, sizes, strict=True)]


def _mean_square_entries(factors: Factors) -> Tensor:
    """Give ``||U V^T||_F^2 / (n m)`` of every adapter and module, ``(B, M)``."""
    squares = [
        squared_norm(U.transpose(1, 2), V.transpose(1, 2)) / (U.shape[1] * V.shape[1])
        for U, V in factors
    ]
    return torch.cat(squares).T


@document
class GLNetClassifier(NetClassifier, _GLNetEstimator):
    """Classifier of LoRA adapters that no gauge changes.

    The paper's ``gl-net``: equivariant layers with gates between them, the invariant products
    ``U V^T`` of their outputs, and a multilayer perceptron (:class:`~sklora.nets.GLNet`). The
    prediction depends on the update alone, whatever factors, of whatever rank, it is given by.
    Each module is scaled by the training root mean square of ``||U V^T||_F``, and the features that
    the perceptron reads are standardised; both are invariant, too. With `spectrum`, the singular
    values of every ``U V^T`` join these features, by a path of their own.

    Parameters
    ----------
    $gl_architecture
    $training
    $class_weights
    $running

    Attributes
    ----------
    $classes
    $attributes

    See Also
    --------
    GLNetRegressor : The same for numbers.
    MLPNetClassifier : A perceptron on flat rows, not invariant.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.estimators import GLNetClassifier
    >>> X = np.random.default_rng(0).normal(size=(40, 5))
    >>> y = np.where(X[:, 0] > 0, "up", "down")
    >>> model = GLNetClassifier(random_state=0, device="cpu").fit(X, y)
    >>> model.predict([[3, 0, 0, 0, 0], [-3, 0, 0, 0, 0]])
    array(['up', 'down'], dtype='<U4')
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **_GLNetEstimator._parameter_constraints,
        **CLASS_WEIGHT_CONSTRAINT,
    }

    def __init__(
        self,
        *,
        hidden_dim: int = 32,
        n_layers: int = 1,
        nonlinearity: GateKind = "sigmoid",
        head: HeadKind = "flatten",
        spectrum: bool = False,
        mlp_hidden: int | tuple[int, ...] = 128,
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
        self.head = head
        self.spectrum = spectrum
        self.mlp_hidden = mlp_hidden
        self.class_weight = class_weight


@document
class GLNetRegressor(NetRegressor, _GLNetEstimator):
    """Regressor of LoRA adapters that no gauge changes.

    The paper's ``gl-net``: equivariant layers with gates between them, the invariant products
    ``U V^T`` of their outputs, and a multilayer perceptron (:class:`~sklora.nets.GLNet`). The
    prediction depends on the update alone, whatever factors, of whatever rank, it is given by.
    Each module is scaled by the training root mean square of ``||U V^T||_F``, and the features that
    the perceptron reads are standardised; both are invariant, too. With `spectrum`, the singular
    values of every ``U V^T`` join these features, by a path of their own.

    Parameters
    ----------
    $gl_architecture
    $training
    $running

    Attributes
    ----------
    $targets
    $attributes

    See Also
    --------
    GLNetClassifier : The same for classes and labels.
    MLPNetRegressor : A perceptron on flat rows, not invariant.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.estimators import GLNetRegressor
    >>> X = np.random.default_rng(0).normal(size=(40, 5))
    >>> model = GLNetRegressor(random_state=0, device="cpu").fit(X, X[:, 0])
    >>> model.predict([[1, 0, 0, 0, 0]]).shape
    (1,)
    """

    def __init__(
        self,
        *,
        hidden_dim: int = 32,
        n_layers: int = 1,
        nonlinearity: GateKind = "sigmoid",
        head: HeadKind = "flatten",
        spectrum: bool = False,
        mlp_hidden: int | tuple[int, ...] = 128,
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
        self.head = head
        self.spectrum = spectrum
        self.mlp_hidden = mlp_hidden
