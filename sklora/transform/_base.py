"""The estimator shells that the featurizers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from numbers import Integral
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted
from torch import Tensor

from sklora._base import VersionedState, atomic_fit, resolve_device
from sklora._modules import side_names
from sklora._pages import Rows
from sklora._repr import DocumentedMixin
from sklora._stores import by_rank
from sklora.collection import LoRACollection, LoRALayout, check_loras
from sklora.transform._blocks import (
    Block,
    BlockFunction,
    copy_back,
    factor_views,
    map_blocks,
    stacks,
)

T = TypeVar("T")


class Featurizer(DocumentedMixin, VersionedState, TransformerMixin, BaseEstimator, ABC):
    """Parameters, validation and the way through the blocks: what is the same for all.

    A subclass learns in ``_fit``, and names and computes its columns in ``_column_names`` and
    ``_transform``, from adapters that have been validated, their numbers excepted where
    ``_checks_results`` says so.
    """

    # Whether `_transform` works through `map_blocks`, which finds invalid numbers by their results.
    _checks_results: ClassVar[bool] = True
    # Whether modules of one shape may be worked on together.
    _stacks: ClassVar[bool] = False

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "device": [str, torch.device],
        "n_jobs": [None, Integral],
        "verbose": ["verbose"],
        "layout": [None, LoRALayout],
    }

    device: str | torch.device
    n_jobs: int | None
    verbose: int
    layout: LoRALayout | None
    layout_: LoRALayout
    n_features_in_: int

    @atomic_fit
    def fit(self, X: LoRACollection | ArrayLike, y: Any = None) -> Self:
        """Learn the layout of the adapters, and what else the transformation needs.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, width)
            A plain array is read by the parameter `layout`.
        y : None
            Ignored.

        Returns
        -------
        self : object

        Raises
        ------
        ValueError
            When a parameter or X is not valid. The estimator is then as it was before.
        """
        self._learn(X, numbers=not self._fit_checks)
        return self

    def fit_transform(self, X: LoRACollection | ArrayLike, y: Any = None) -> Any:
        """Fit to adapters and transform them; each is read once, unless `fit` has to see them all.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, width)
        y : None
            Ignored.

        Returns
        -------
        ndarray of shape (n_adapters, n_features_out)
            What `transform` gives.

        Raises
        ------
        ValueError
            When a parameter or X is not valid. The estimator is then as it was before.
        MemoryError
            When the result does not fit into memory.
        """
        return self._fit_then(X, self._transform_training)

    def transform(self, X: LoRACollection | ArrayLike) -> Any:
        """Turn adapters into an array.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, width)
            Adapters of the modules that `fit` saw; a collection may have other ranks.

        Returns
        -------
        ndarray of shape (n_adapters, n_features_out)
            Of the dtype of X, or the data frame that `set_output` asks for.

        Raises
        ------
        ValueError
            When X is not valid, or has other modules than `fit` saw.
        MemoryError
            When the result does not fit into memory.
        """
        return self._transform(self._check(X))

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the columns of the array that `transform` gives for an array.

        Parameters
        ----------
        input_features : array-like of shape (`n_features_in_`,), of str, or None, default=None
            Checked but not used: the names come from the layout.

        Returns
        -------
        ndarray of shape (n_features_out,), of str

        Raises
        ------
        ValueError
            When there are not `n_features_in_` input features, or they are not those that `fit`
            saw as the names of a data frame.
        """
        check_is_fitted(self)
        _check_feature_names_in(self, input_features, generate_names=False)
        return np.array(self._column_names(), dtype=object)

    def __sklearn_tags__(self) -> Tags:
        """Tags for scikit-learn: float32 stays float32."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def _fit_checks(self) -> bool:
        """Whether `_fit` reads all adapters, and checks their numbers."""
        return False

    def _fit(self, X: LoRACollection) -> None:
        """Learn from validated adapters."""

    @abstractmethod
    def _transform(self, X: LoRACollection) -> NDArray[Any]:
        """The array that validated adapters give."""

    def _transform_training(self, X: LoRACollection) -> NDArray[Any]:
        """The same for the adapters that `_fit` has just learned from, which may take less work."""
        return self._transform(X)

    @abstractmethod
    def _column_names(self) -> list[str]:
        """What its columns are called."""

    def _check(self, X: LoRACollection | ArrayLike) -> LoRACollection:
        check_is_fitted(self)
        return check_loras(self, X, reset=False, numbers=not self._checks_results)

    def _learn(self, X: LoRACollection | ArrayLike, *, numbers: bool) -> LoRACollection:
        self._validate_params()
        resolve_device(self.device)
        loras = check_loras(self, X, reset=True, numbers=numbers)
        self._fit(loras)
        return loras

    @atomic_fit
    def _fit_then(
        self, X: LoRACollection | ArrayLike, transform: Callable[[LoRACollection], T]
    ) -> T:
        return transform(self._learn(X, numbers=not self._checks_results))

    def _map(self, function: BlockFunction, X: LoRACollection, n_columns: int) -> NDArray[Any]:
        return map_blocks(
            function,
            X,
            n_columns,
            device=self.device,
            n_jobs=self.n_jobs,
            stacked=self._stacks,
            what=type(self).__name__,
            verbose=self.verbose,
        )


class WeightsToFeatures(Featurizer):
    """Every module gives some columns; side features follow as the last.

    A subclass says what the columns of a module are in ``_feature_counts``, ``_feature_names`` and
    ``_module_features``.
    """

    @abstractmethod
    def _feature_names(self, position: int) -> Sequence[str]:
        """What the columns of the module at this position are called."""

    @abstractmethod
    def _module_features(self, positions: Sequence[int], U: Tensor, V: Tensor) -> Tensor:
        """Features (k, B, C) of factors (k, B, n, r) and (k, B, m, r); C may differ from `fit`'s.

        They are of the k modules at these positions: one, unless the class ``_stacks``.
        """

    @abstractmethod
    def _feature_counts(self) -> list[int]:
        """How many columns every module gives, which may be more than there is memory for names."""

    def _column_names(self) -> list[str]:
        names = [
            f"{name}:{feature}"
            for position, name in enumerate(self.layout_.names)
            for feature in self._feature_names(position)
        ]
        return names + side_names(self.layout_.side)

    def _transform(self, X: LoRACollection) -> NDArray[Any]:
        ends = np.cumsum([0, *self._feature_counts()]).tolist()
        return self._map(partial(self._fill, ends), X, ends[-1] + self.layout_.n_side)

    def _fill(self, ends: Sequence[int], block: Block, out: NDArray[Any]) -> None:
        for rows, factors in _without_room(block):
            for positions, U, V in stacks(factors, small=self._stacks):
                features = self._module_features(positions, U, V).cpu().numpy()
                for position, columns in zip(positions, features, strict=True):
                    # The ranks here may be other than those that fit saw.
                    start, end = ends[position], ends[position + 1]
                    stop = min(end, start + columns.shape[1])
                    out[rows, start:stop] = columns[:, : stop - start]
                    out[rows, stop:end] = 0
        out[:, ends[-1] :] = block.side


def _without_room(block: Block) -> Iterator[tuple[Rows, Iterator[tuple[Tensor, Tensor]]]]:
    """Give rows whose largest ranks have as many binary digits, and their factors.

    The work grows with the rank that factors are padded to: the room for larger ones is left out.
    """
    groups = by_rank(block.ranks.max(axis=1))
    factors = block.factors if len(groups) == 1 else [*block.factors]
    for rows in groups:
        largest = block.ranks[rows].max(axis=0).clip(min=1).tolist()
        yield rows, map(partial(_trimmed, rows), factors, largest)


def _trimmed(rows: Rows, factors: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    U, V = (A[rows, :, :rank] for A in factors)
    return U, V


class _CollectionsStay:
    """Gives a collection for a collection, whatever `set_output` asks for.

    Scikit-learn wraps the `transform` that a TransformerMixin defines, and would make a data frame
    of the collection, which has lost its layout. It leaves alone what a plain class defines.
    """

    def fit_transform(self, X: LoRACollection | ArrayLike, y: Any = None) -> Any:
        """Fit to adapters, and transform them.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, width)
        y : None
            Ignored.

        Returns
        -------
        LoRACollection or ndarray
            What `transform` gives.

        Raises
        ------
        ValueError
            When a parameter or X is not valid. The estimator is then as it was before.
        MemoryError
            When the result does not fit into memory.
        """
        if isinstance(X, LoRACollection):
            return self._fit_then(X, self._moved)  # type: ignore[attr-defined]
        return super().fit_transform(X, y)  # type: ignore[misc]

    def transform(self, X: LoRACollection | ArrayLike) -> Any:
        """Turn adapters into adapters: a collection into a collection, an array into an array.

        Parameters
        ----------
        X : LoRACollection or array-like of shape (n_adapters, width)
            Adapters of the modules that `fit` saw.

        Returns
        -------
        LoRACollection or ndarray of shape (n_adapters, n_features_out)
            A collection for a collection, with its ids and side features; `set_output` does not
            apply to it. A flat array for an array, or the data frame that `set_output` asks for.

        Raises
        ------
        ValueError
            When X is not valid, or has other modules than `fit` saw.
        MemoryError
            When the result does not fit into memory.
        """
        if isinstance(X, LoRACollection):
            return self._moved(self._check(X))  # type: ignore[attr-defined]
        return super().transform(X)  # type: ignore[misc]


class WeightsToWeights(_CollectionsStay, Featurizer):
    """Factors become other factors of the same modules; ids and side features stay.

    A subclass says what the result looks like in ``_output_layout`` and ``_output_ranks``, and
    writes it in ``_move``.
    """

    @abstractmethod
    def _output_layout(self, layout: LoRALayout) -> LoRALayout:
        """Layout of the result for adapters of this layout."""

    @abstractmethod
    def _output_ranks(self, ranks: NDArray[np.intp]) -> NDArray[np.intp]:
        """Ranks of the result for adapters of these ranks."""

    def _kinds(self, ranks: NDArray[np.intp]) -> Iterable[Hashable]:
        """What modules, of true ranks (B, n_modules), that are stacked share beside their shapes.

        A class that ``_stacks`` names their ranks and the shapes of what they become, at least.
        """
        return repeat(None)

    @abstractmethod
    def _move(
        self,
        positions: Sequence[int],
        factors: Sequence[Tensor],
        ranks: NDArray[np.intp],
        out: Sequence[Tensor],
    ) -> None:
        """Write the pair of new factors, each (k, B, ...), of the k modules at these positions.

        Theirs are (k, B, n, r) and (k, B, m, r), of true ranks (B,), which the modules share. There
        is one, unless the class ``_stacks``.
        """

    def _column_names(self) -> list[str]:
        return self._output_layout(self.layout_).feature_names()

    def _transform(self, X: LoRACollection) -> NDArray[Any]:
        return np.asarray(self._moved(X))

    def _moved(self, X: LoRACollection) -> LoRACollection:
        layout = self._output_layout(X.layout)
        flat = self._map(partial(self._fill, layout), X, layout.width)
        ranks = self._output_ranks(X.ranks)
        return LoRACollection.from_array(flat, layout, ranks=ranks, ids=X.ids)

    def _fill(self, layout: LoRALayout, block: Block, out: NDArray[Any]) -> None:
        target = torch.from_numpy(out)
        device = resolve_device(self.device)
        moved = target if device.type == "cpu" else torch.empty_like(target, device=device)
        views = factor_views(moved, layout)
        kinds = self._kinds(block.ranks)
        for positions, *factors in stacks(block.factors, small=self._stacks, kinds=kinds):
            sides = [*zip(*(views[position] for position in positions), strict=True)]
            alone = len(positions) == 1
            new = [A[None] if alone else A.new_empty(len(positions), *A.shape) for A, *_ in sides]
            self._move(positions, factors, block.ranks[:, positions[0]], new)
            if layout.has_plain_rows:
                new[0].mul_(new[1])
            if not alone:
                for view, result in zip(chain(*sides), chain(*new), strict=True):
                    view.copy_(result)
        if moved is not target:
            copy_back(moved, target)
        out[:, layout.side_slice] = block.side
