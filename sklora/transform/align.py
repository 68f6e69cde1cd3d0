"""The o-align architecture's features: factors rotated onto a template."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor
from torch.nn.functional import pad

from sklora._base import as_tensor
from sklora._modules import check_room
from sklora._stores import as_slice
from sklora.collection import LoRACollection, LoRALayout
from sklora.linalg import procrustes
from sklora.linalg._tall import times_small
from sklora.transform._base import WeightsToWeights
from sklora.transform._blocks import as_one


class OAlign(WeightsToWeights):
    r"""Rotate the factors of every update onto those of a template adapter (the paper's eq. 3).

    For every module the orthogonal :math:`Q` that minimises
    :math:`\|U Q - U_0\|_F^2 + \|V Q - V_0\|_F^2` is :math:`A B^\top`, where
    :math:`A S B^\top = U^\top U_0 + V^\top V_0`, and the factors become
    :math:`(U Q, V Q)`: the same update. The result is invariant to O(r), reflections included, but
    not to GL(r): two adapters with the same updates whose factors differ in scale or shear stay
    different.

    Parameters
    ----------
    template : "random" or int, default="random"
        The adapter to align to: its position among those that `fit` is given, or one drawn from
        those that have the largest rank in every module. If there is none, as when adapters lack
        different modules, every module draws its own template.
    random_state : int, RandomState instance or None, default=None
        Draws the template.
    device : str or torch.device, default="auto"
        Where to compute. ``"auto"`` uses CUDA if there is one.
    n_jobs : int or None, default=None
        Blocks of adapters to work on at once, in threads.
    verbose : int, default=0
        With 1 or more there is a progress bar, if standard error is a terminal.
    layout : LoRALayout or None, default=None
        What the columns of a plain array mean. ``None`` takes each row for one update of shape
        ``(n_features, 1)``, which has no gauge to fix and stays as it is. Collections bring their
        own.

    Attributes
    ----------
    template_ : dict of str to (ndarray, ndarray)
        Factors ``U0 (n, r0)`` and ``V0 (m, r0)`` of every module, by name.
    template_index_ : ndarray of shape (n_modules,), of int
        Position of the template of every module among the adapters that `fit` was given.
    layout_ : LoRALayout
        Modules seen by `fit`.
    n_features_in_ : int
        Width of X seen by `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Only when X was a data frame with string column names.

    See Also
    --------
    sklora.linalg.procrustes : The computation.

    Notes
    -----
    The result is unique where :math:`U^\top U_0 + V^\top V_0` has the rank of ``U`` and ``V`` as
    one matrix of ``n + m`` rows. If columns of the template depend on each other, and those of an
    adapter do not, it is one of several, and not invariant.

    An adapter of lower rank than the template is aligned by a ``Q`` with orthonormal rows, and has
    the template's rank afterwards; a higher rank is an error. A collection gives a collection, an
    array a flat array.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.collection import LoRACollection
    >>> from sklora.transform import OAlign
    >>> U, V = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> X = LoRACollection.from_factors([{"q": (U, V)}, {"q": (U @ swap, V @ swap)}])
    >>> aligned = OAlign(template=0).fit_transform(X)
    >>> np.allclose(aligned[1]["q"][0], U)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **WeightsToWeights._parameter_constraints,
        "template": [StrOptions({"random"}), Interval(Integral, 0, None, closed="left")],
        "random_state": ["random_state"],
    }
    _stacks = True

    def __init__(
        self,
        template: str | int = "random",
        *,
        random_state: int | np.random.RandomState | None = None,
        device: str | torch.device = "auto",
        n_jobs: int | None = None,
        verbose: int = 0,
        layout: LoRALayout | None = None,
    ) -> None:
        self.template = template
        self.random_state = random_state
        self.device = device
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.layout = layout

    def _fit(self, X: LoRACollection) -> None:
        index = self._choose(X.ranks)
        self.template_index_ = index
        templates = {}
        # There may be one for every module, so that their adapters are not all held in memory.
        for position in np.unique(index).tolist():
            adapter = X[position]
            for place in np.flatnonzero(index == position).tolist():
                name, n, m, _ = X.layout.modules[place]
                zero = np.zeros((n, 0), X.dtype), np.zeros((m, 0), X.dtype)
                U0, V0 = adapter.get(name, zero)
                templates[name] = U0.copy(), V0.copy()
        self.template_ = {name: templates[name] for name in X.layout.names}
        self._check_ranks(X)

    def _choose(self, ranks: NDArray[np.intp]) -> NDArray[np.intp]:
        """Position (n_modules,) of every module's template."""
        n_adapters, n_modules = ranks.shape
        if not isinstance(self.template, str):
            if self.template >= n_adapters:
                raise ValueError(
                    f"template={self.template}, but there are {n_adapters} adapters; pass a "
                    "position from 0 to one less, or 'random'."
                )
            return np.full(n_modules, self.template, np.intp)
        rng = check_random_state(self.random_state)
        largest = ranks == ranks.max(axis=0)
        full = np.flatnonzero(largest.all(axis=1))
        if len(full):
            return np.full(n_modules, rng.choice(full), np.intp)
        return np.array([rng.choice(np.flatnonzero(column)) for column in largest.T], np.intp)

    @property
    def _template_ranks(self) -> NDArray[np.intp]:
        return np.array([self.template_[name][0].shape[1] for name in self.layout_.names], np.intp)

    def _check_ranks(self, X: LoRACollection) -> None:
        remedy = (
            "Fit with an adapter of at least that rank as template, or use an architecture that "
            "takes any rank (svd, dense, gl-net)."
        )
        check_room(X, self._template_ranks, remedy, limit="the template has rank {}")

    def _output_layout(self, layout: LoRALayout) -> LoRALayout:
        return layout.with_ranks(np.maximum(self._template_ranks, 1).tolist())

    def _output_ranks(self, ranks: NDArray[np.intp]) -> NDArray[np.intp]:
        return np.where(ranks > 0, self._template_ranks, 0)

    def _moved(self, X: LoRACollection) -> LoRACollection:
        self._check_ranks(X)
        return super()._moved(X)

    def _kinds(self, ranks: NDArray[np.intp]) -> list[Hashable]:
        """Templates of one rank, and adapters of one; others are modules by themselves."""
        alike = (ranks == ranks[0]).all(axis=0)
        positions = np.where(alike, -1, np.arange(len(alike)))
        return [*map(tuple, np.column_stack([self._template_ranks, ranks[0], positions]).tolist())]

    def _move(
        self,
        positions: Sequence[int],
        factors: Sequence[Tensor],
        ranks: NDArray[np.intp],
        out: Sequence[Tensor],
    ) -> None:
        templates = [self.template_[self.layout_.names[position]] for position in positions]
        U0, V0 = (
            as_one([*map(as_tensor, side)]).to(factors[0])[:, None]
            for side in zip(*templates, strict=True)
        )
        # Padding would make the cross product singular, so all of one true rank go by themselves.
        for rank in np.unique(ranks).tolist():
            rows = as_slice(np.flatnonzero(ranks == rank))
            U, V = (A[:, rows, :, :rank] for A in factors)
            Q = pad(procrustes(U, V, U0, V0), (0, out[0].shape[-1] - U0.shape[-1]))
            for A, moved in ((U, out[0]), (V, out[1])):
                if isinstance(rows, slice):
                    times_small(A.flatten(0, 1), Q.flatten(0, 1), out=moved[:, rows].flatten(0, 1))
                else:
                    moved[:, rows] = A @ Q
