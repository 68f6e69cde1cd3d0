"""Projection of both sides of every update: fewer rows and columns, the same gauge group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from numbers import Integral
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import config_context, get_config
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor

from sklora._base import as_tensor, resolve_device
from sklora._modules import LoRAModule
from sklora._progress import progress
from sklora.collection import LoRACollection, LoRALayout
from sklora.linalg import CompressedUpdates, compress_updates, leading_directions
from sklora.linalg._random import gaussian_projections
from sklora.linalg._tall import project
from sklora.transform._base import WeightsToWeights
from sklora.transform._blocks import at_work, overflow_of, plan_blocks, read_block
from sklora.transform._pairs import parts_of

Sides: TypeAlias = dict[str, NDArray[Any]]


class GLEquivariantProjection(WeightsToWeights):
    r"""Project both sides of every update: ``dW`` becomes ``P dW Q^T``.

    The factors become :math:`(P U, Q V)` with fixed matrices :math:`P` (k x n) and :math:`Q` (k x
    m) for every module. A gauge acts the same before and after, so whatever is equivariant or
    invariant to GL(r) downstream stays so; the flat numbers themselves are not invariant.

    Parameters
    ----------
    n_components : int, default=32
        Rows to keep on either side. A side with no more rows keeps as many.
    method : {"random", "hosvd"}, default="random"
        ``"random"`` draws Gaussian matrices of variance ``1 / n_components``, and leaves a side
        alone that has no more rows than that. ``"hosvd"`` takes the leading left and right singular
        vectors of the training updates :math:`[U_1 V_1^\top, \ldots, U_N V_N^\top]` of the module,
        found without forming them. Like the updates, these are invariant to GL(r).
    random_state : int, RandomState instance or None, default=None
        Draws the matrices of ``"random"``.
    device : str or torch.device, default="auto"
        Where to compute. ``"auto"`` uses CUDA if there is one.
    n_jobs : int or None, default=None
        Blocks of adapters that `transform` works on at once, in threads.
    verbose : int, default=0
        With 1 or more there is a progress bar, if standard error is a terminal.
    layout : LoRALayout or None, default=None
        What the columns of a plain array mean. ``None`` takes each row for one update of shape
        ``(n_features, 1)``. Collections bring their own.

    Attributes
    ----------
    left_ : dict of str to ndarray of shape (min(n_components, n), n)
        ``P`` of every module, by name.
    right_ : dict of str to ndarray of shape (min(n_components, m), m)
        ``Q`` of every module, by name. With ``"hosvd"``, rows for which the training updates carry
        no signal above their rounding are zero.
    layout_ : LoRALayout
        Modules seen by `fit`.
    n_features_in_ : int
        Width of X seen by `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Only when X was a data frame with string column names.

    See Also
    --------
    sklora.linalg.leading_subspaces : The computation behind ``"hosvd"``.

    Notes
    -----
    Adapters of any rank can be transformed, and keep it. A collection gives a collection, an array
    a flat array.

    The fit of ``"hosvd"`` keeps up to ``n^2 + m^2`` numbers of every module in float64. Where those
    of all modules take more than half of scikit-learn's ``working_memory``, it goes through the
    adapters more than once, for some modules each time.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.collection import LoRACollection
    >>> from sklora.transform import GLEquivariantProjection
    >>> rng = np.random.default_rng(0)
    >>> adapters = [{"q": (rng.normal(size=(50, 2)), rng.normal(size=(40, 2)))} for _ in range(9)]
    >>> X = LoRACollection.from_factors(adapters)
    >>> projection = GLEquivariantProjection(n_components=3, method="hosvd").fit(X)
    >>> projection.transform(X).layout.modules
    (LoRAModule(name='q', n=3, m=3, rank=2),)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **WeightsToWeights._parameter_constraints,
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "method": [StrOptions({"random", "hosvd"})],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        n_components: int = 32,
        method: str = "random",
        *,
        random_state: int | np.random.RandomState | None = None,
        device: str | torch.device = "auto",
        n_jobs: int | None = None,
        verbose: int = 0,
        layout: LoRALayout | None = None,
    ) -> None:
        self.n_components = n_components
        self.method = method
        self.random_state = random_state
        self.device = device
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.layout = layout

    def _fit(self, X: LoRACollection) -> None:
        if self.method == "random":
            self.left_, self.right_ = draw_sides(X, self.n_components, self.random_state)
        else:
            self.left_, self.right_ = {}, {}
            self._fit_hosvd(X)

    @property
    def _fit_checks(self) -> bool:
        return self.method == "hosvd"

    def _fit_hosvd(self, X: LoRACollection) -> None:
        self._check_enough(X)
        device = resolve_device(self.device)
        # One half of the memory is for adapters, the other for what is kept of their updates.
        with config_context(working_memory=get_config()["working_memory"] / 2):
            groups, blocks = _module_groups(X), plan_blocks(X, sent=device.type != "cpu")
        n_passes = len(groups) * len(blocks)
        bar = progress(n_passes, "higher-order SVD", "block", self.verbose)
        with at_work(device), bar as advance:
            for modules in groups:
                found: dict[LoRAModule, CompressedUpdates] = {}
                for rows in blocks:
                    block = read_block(X[rows], device, check=modules.start == 0)
                    factors = islice(block.factors, modules.start, modules.stop)
                    known = zip(X.layout.modules[modules], block.ranks.T[modules], strict=True)
                    for (module, ranks), pair in zip(known, factors, strict=True):
                        for _, U, V in parts_of(*pair, ranks):
                            found[module] = compress_updates(U, V, previous=found.get(module))
                    advance()
                try:
                    self._keep_leading(found, X.dtype)
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                    raise ValueError(overflow_of(X)) from error

    def _keep_leading(
        self, found: Mapping[LoRAModule, CompressedUpdates], dtype: np.dtype[Any]
    ) -> None:
        for (name, n, m, _), updates in found.items():
            for matrices, side, size in (
                (self.left_, updates.left, n),
                (self.right_, updates.right, m),
            ):
                k = min(self.n_components, size)
                basis = leading_directions(side, k, noise=updates.noise)
                matrices[name] = basis.mT.cpu().numpy().astype(dtype)

    def _check_enough(self, X: LoRACollection) -> None:
        """Every side needs as many directions in the training updates as it is to keep."""
        for (name, n, m, _), ranks in zip(X.layout.modules, X.ranks.T, strict=True):
            available = int(np.minimum(ranks, min(n, m)).sum())
            needed = min(self.n_components, max(n, m))
            if available < needed:
                raise ValueError(
                    f"module {name!r} of shape ({n}, {m}): the ranks of its {len(X)} training "
                    f"updates add up to {available}, fewer than the {needed} directions that "
                    f"n_components={self.n_components} asks for. Fit on more adapters, lower "
                    "n_components, or use method='random'."
                )

    def _output_layout(self, layout: LoRALayout) -> LoRALayout:
        return layout.with_shapes(
            (len(self.left_[name]), len(self.right_[name]), rank)
            for name, _, _, rank in layout.modules
        )

    def _output_ranks(self, ranks: NDArray[np.intp]) -> NDArray[np.intp]:
        return ranks

    def _moved(self, X: LoRACollection) -> LoRACollection:
        # Lower ranks than those of the fit keep its width, which later steps may count on.
        ranks = np.maximum(self.layout_.ranks, X.ranks.max(axis=0))
        return super()._moved(X.with_layout(X.layout.with_ranks(ranks.tolist())))

    def _move(
        self,
        positions: Sequence[int],
        factors: Sequence[Tensor],
        ranks: NDArray[np.intp],
        out: Sequence[Tensor],
    ) -> None:
        name = self.layout_.names[positions[0]]
        for matrices, [A], [moved] in zip((self.left_, self.right_), factors, out, strict=True):
            moved.copy_(project(as_tensor(matrices[name]).to(A), A))


def draw_sides(
    X: LoRACollection, n_components: int, random_state: int | np.random.RandomState | None
) -> tuple[Sides, Sides]:
    """Draw Gaussian matrices for the left and the right side of every module, by name."""
    shapes = [(module.n, module.m) for module in X.layout.modules]
    rng = check_random_state(random_state)
    left, right = zip(*gaussian_projections(shapes, n_components, rng, X.dtype), strict=True)
    names = X.layout.names
    return dict(zip(names, left, strict=True)), dict(zip(names, right, strict=True))


def _module_groups(X: LoRACollection) -> list[slice]:
    """Modules of which what is kept of all updates fits in the `working_memory` together."""
    groups, start, taken = [], 0, 0
    for position, (_, n, m, rank) in enumerate(X.layout.modules):
        n_rows = len(X) * min(n, m, rank)
        needed = 8 * (min(n_rows, n) * n + min(n_rows, m) * m)
        if position > start and taken + needed > 2**20 * get_config()["working_memory"]:
            groups.append(slice(start, position))
            start, taken = position, 0
        taken += needed
    return [*groups, slice(start, X.layout.n_modules)]
