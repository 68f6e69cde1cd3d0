"""What the columns of a collection mean: modules, their factors, and side features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklora._modules import (
    LoRAModule,
    ModuleGroup,
    check_stacked,
    checked_modules,
    checked_side,
    raise_first_difference,
    side_names,
    side_slices,
)
from sklora._untrusted import counted

Factors = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, init=False, repr=False)
class LoRALayout:
    """The modules behind the columns of a flat array of LoRA weights.

    A row is ``U1.ravel(), V1.ravel(), U2.ravel(), V2.ravel(), ..., side``, with every factor
    zero-padded to the rank of its module. Layouts are immutable, hashable and picklable.

    Parameters
    ----------
    modules : iterable of (name, n, m, rank)
        Every update is ``U V^T (n, m)``, with ``U (n, rank)`` and ``V (m, rank)``.
    side : iterable of (name, size), default=()
        Features that are no factors, such as the magnitudes of DoRA: `size` columns each, at the
        end of the row.
    base_model : str or None, default=None
        What the adapters were trained on. Layouts of different base models do not match; None
        matches any.

    Attributes
    ----------
    modules : tuple of LoRAModule
    side : tuple of (str, int)
    base_model : str or None
    has_plain_rows : bool
        Whether the row itself is the one update, with ``V = 1`` implied; see `rows`.

    Raises
    ------
    ValueError
        When there is no module, a name is used twice, or a size is less than one.
    TypeError
        When a name is no string or a size no integer.

    Examples
    --------
    >>> from sklora import LoRALayout
    >>> layout = LoRALayout([("q", 8, 6, 2), ("v", 8, 6, 2), ("out", 6, 8, 2)])
    >>> layout
    LoRALayout(n_modules=3, width=84)
    >>> layout.factor_slices[0]
    (slice(0, 16, None), slice(16, 28, None))
    >>> layout.groups
    (ModuleGroup(n=8, m=6, rank=2, index=(0, 1)), ModuleGroup(n=6, m=8, rank=2, index=(2,)))
    """

    modules: tuple[LoRAModule, ...]
    side: tuple[tuple[str, int], ...]
    base_model: str | None
    has_plain_rows: bool

    def __init__(
        self,
        modules: Iterable[tuple[str, int, int, int]],
        *,
        side: Iterable[tuple[str, int]] = (),
        base_model: str | None = None,
    ) -> None:
        object.__setattr__(self, "modules", checked_modules(modules))
        object.__setattr__(self, "side", checked_side(side))
        object.__setattr__(self, "base_model", base_model)
        object.__setattr__(self, "has_plain_rows", False)

    @classmethod
    def rows(cls, n_features: int) -> LoRALayout:
        """Give the layout of plain rows: each is one update ``(n_features, 1)`` with ``V = 1``.

        ``V`` has no columns, so that the width is `n_features`.

        Parameters
        ----------
        n_features : int

        Returns
        -------
        LoRALayout
            Of one module, named ``"row"``.

        Raises
        ------
        ValueError
            When `n_features` is less than one.

        Examples
        --------
        >>> from sklora import LoRALayout
        >>> LoRALayout.rows(5)
        LoRALayout(n_modules=1, width=5, has_plain_rows=True)
        """
        layout = cls([("row", n_features, 1, 1)])
        object.__setattr__(layout, "has_plain_rows", True)
        return layout

    def __getstate__(self) -> dict[str, Any]:
        # Without the cached properties, so that equal layouts have equal pickles and hashes.
        return {
            "modules": tuple(tuple(module) for module in self.modules),
            "side": self.side,
            "base_model": self.base_model,
            "has_plain_rows": self.has_plain_rows,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(  # type: ignore[misc]
            state["modules"], side=state["side"], base_model=state["base_model"]
        )
        object.__setattr__(self, "has_plain_rows", state["has_plain_rows"])

    def __repr__(self) -> str:
        parts = [f"n_modules={self.n_modules}", f"width={self.width}"]
        if self.side:
            parts.append(f"n_side={self.n_side}")
        if self.base_model is not None:
            parts.append(f"base_model={self.base_model!r}")
        if self.has_plain_rows:
            parts.append("has_plain_rows=True")
        return f"LoRALayout({', '.join(parts)})"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the modules, in order."""
        return tuple(module.name for module in self.modules)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The largest rank of every module."""
        return tuple(module.rank for module in self.modules)

    @property
    def n_modules(self) -> int:
        """How many modules there are."""
        return len(self.modules)

    @cached_property
    def n_side(self) -> int:
        """How many columns the side features take, all together."""
        return sum(size for _, size in self.side)

    @cached_property
    def width(self) -> int:
        """How many columns a flat row has."""
        return int(self.factor_slices[-1][1].stop) + self.n_side

    @cached_property
    def factor_slices(self) -> tuple[tuple[slice, slice], ...]:
        """Columns of ``U`` and of ``V`` for every module; those of an implied ``V`` are empty."""
        slices, start = [], 0
        for module in self.modules:
            middle = start + module.n * module.rank
            stop = middle if self.has_plain_rows else middle + module.m * module.rank
            slices.append((slice(start, middle), slice(middle, stop)))
            start = stop
        return tuple(slices)

    @cached_property
    def side_slice(self) -> slice:
        """Columns of the side features, which are the last."""
        return slice(self.width - self.n_side, self.width)

    @cached_property
    def groups(self) -> tuple[ModuleGroup, ...]:
        """Modules of equal ``(n, m)`` together, in the order in which the shapes first appear."""
        members: dict[tuple[int, int], list[int]] = {}
        for position, module in enumerate(self.modules):
            members.setdefault((module.n, module.m), []).append(position)
        return tuple(
            ModuleGroup(n, m, max(self.ranks[position] for position in index), tuple(index))
            for (n, m), index in members.items()
        )

    def unpack(self, flat: NDArray[Any]) -> list[Factors]:
        """Cut flat rows into factors, stacked by group.

        Parameters
        ----------
        flat : ndarray of shape (N, width)

        Returns
        -------
        list of (U, V)
            For every group, of ``M`` modules, ``U (N, M, n, rank)`` and ``V (N, M, m, rank)``:
            new arrays of the dtype of `flat`, zero-padded to the rank of the group.

        Raises
        ------
        ValueError
            When `flat` is not 2-D or has another width.

        Examples
        --------
        >>> import numpy as np
        >>> from sklora import LoRALayout
        >>> layout = LoRALayout([("q", 2, 1, 1), ("v", 2, 1, 1)])
        >>> [(U, V)] = layout.unpack(np.arange(6.0)[None])
        >>> U[0, :, :, 0], V[0, :, :, 0]
        (array([[0., 1.], [3., 4.]]), array([[2.], [5.]]))
        """
        self._check_width(flat)
        n_rows = len(flat)
        stacks = []
        for group in self.groups:
            U = np.zeros((n_rows, len(group.index), group.n, group.rank), flat.dtype)
            V = np.zeros((n_rows, len(group.index), group.m, group.rank), flat.dtype)
            for place, position in enumerate(group.index):
                rank = self.ranks[position]
                U[:, place, :, :rank], V[:, place, :, :rank] = self._factors_at(flat, position)
            stacks.append((U, V))
        return stacks

    def pack(self, factors: Sequence[Factors], side: NDArray[Any] | None = None) -> NDArray[Any]:
        """Lay factors out as flat rows: the inverse of `unpack`.

        Parameters
        ----------
        factors : sequence of (U, V)
            For every group, of ``M`` modules, ``U (N, M, n, R)`` and ``V (N, M, m, R)``. What
            exceeds the rank of a module has to be zero.
        side : ndarray of shape (N, n_side) or None, default=None
            The side features, if the layout has any.

        Returns
        -------
        ndarray of shape (N, width)
            Where the layout has plain rows, the update ``U V^T`` itself, for which ``V = 1``.

        Raises
        ------
        ValueError
            When there are not as many pairs as groups, a shape does not fit, a factor would be cut
            off, or side features are missing or too many.

        Examples
        --------
        >>> import numpy as np
        >>> from sklora import LoRALayout
        >>> layout = LoRALayout([("q", 2, 1, 1), ("v", 2, 1, 1)])
        >>> layout.pack(layout.unpack(np.arange(6.0)[None]))
        array([[0., 1., 2., 3., 4., 5.]])
        """
        n_rows = check_stacked(self.groups, self.names, factors)
        arrays = [array for pair in factors for array in pair]
        dtype = np.result_type(*arrays)
        flat = np.empty((n_rows, self.width), dtype)
        for group, (U, V) in zip(self.groups, factors, strict=True):
            for place, position in enumerate(group.index):
                rank = self.ranks[position]
                one_U, one_V = U[:, place], V[:, place]
                if one_U[..., rank:].any() or one_V[..., rank:].any():
                    raise ValueError(
                        f"module {self.names[position]!r}: factors of rank {one_U.shape[-1]} do "
                        f"not fit into the layout's rank {rank}; make room with with_ranks."
                    )
                if self.has_plain_rows:
                    one_U = one_U * one_V
                place_U, place_V = self._factors_at(flat, position)
                place_U[...] = one_U[..., :rank]
                place_V[...] = one_V[..., :rank]
        expected = (n_rows, self.n_side)
        if self.n_side if side is None else side.shape != expected:
            found = "none" if side is None else f"an array of shape {side.shape}"
            raise ValueError(f"side features of shape {expected} are needed, got {found}.")
        if side is not None:
            flat[:, self.side_slice] = side
        return flat

    def infer_ranks(self, flat: NDArray[Any]) -> NDArray[np.intp]:
        """Find the rank of every update from the zero columns that its factors end in.

        Parameters
        ----------
        flat : ndarray of shape (N, width)

        Returns
        -------
        ndarray of shape (N, n_modules), of intp
            The place of the last column that is not zero in one factor or the other; 0 where there
            is none, which is the zero update of a module that the adapter lacks. Plain rows have
            rank 1.

        Raises
        ------
        ValueError
            When `flat` is not 2-D or has another width.

        Examples
        --------
        >>> import numpy as np
        >>> from sklora import LoRALayout
        >>> layout = LoRALayout([("q", 1, 1, 2), ("v", 1, 1, 2)])
        >>> layout.infer_ranks(np.array([[0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
        array([[1, 0]])
        """
        self._check_width(flat)
        ranks = np.ones((len(flat), self.n_modules), np.intp)
        if self.has_plain_rows:
            return ranks
        for position in range(self.n_modules):
            U, V = self._factors_at(flat, position)
            used = (U != 0).any(axis=1) | (V != 0).any(axis=1)
            last = self.ranks[position] - used[:, ::-1].argmax(axis=1)
            ranks[:, position] = np.where(used.any(axis=1), last, 0)
        return ranks

    def with_ranks(self, ranks: Iterable[int]) -> LoRALayout:
        """Give the layout of the same modules with other largest ranks.

        Parameters
        ----------
        ranks : iterable of int
            One for every module.

        Returns
        -------
        LoRALayout

        Raises
        ------
        ValueError
            When there are more or fewer ranks than modules, or one is less than one.

        Examples
        --------
        >>> from sklora import LoRALayout
        >>> LoRALayout([("q", 8, 6, 2)]).with_ranks([4]).ranks
        (4,)
        """
        ranks = tuple(ranks)
        if len(ranks) != self.n_modules:
            raise ValueError(
                f"{self.n_modules} ranks are needed, one for every module, got {len(ranks)}."
            )
        return self.with_shapes(
            [(module.n, module.m, rank) for module, rank in zip(self.modules, ranks, strict=True)]
        )

    def with_shapes(self, shapes: Iterable[tuple[int, int, int]]) -> LoRALayout:
        """Give the layout of modules of the same names with other shapes and ranks.

        Parameters
        ----------
        shapes : iterable of (n, m, rank)
            One for every module.

        Returns
        -------
        LoRALayout
            With the side features and base model of this one. Plain rows stay plain if their new
            shape is ``(n, 1)`` and their rank 1.

        Raises
        ------
        ValueError
            When there are more or fewer shapes than modules, or a size is less than one.

        Examples
        --------
        >>> from sklora import LoRALayout
        >>> LoRALayout([("q", 8, 6, 2)]).with_shapes([(4, 4, 2)]).modules
        (LoRAModule(name='q', n=4, m=4, rank=2),)
        """
        shapes = list(shapes)
        if len(shapes) != self.n_modules:
            raise ValueError(
                f"{self.n_modules} shapes are needed, one for every module, got {len(shapes)}."
            )
        layout = LoRALayout(
            [(name, *shape) for name, shape in zip(self.names, shapes, strict=True)],
            side=self.side,
            base_model=self.base_model,
        )
        if self.has_plain_rows and shapes[0][1:] == (1, 1):
            object.__setattr__(layout, "has_plain_rows", True)
        return layout

    def check_same_modules(self, other: LoRALayout) -> None:
        """Check that another layout has the modules of this one; ranks may differ.

        Parameters
        ----------
        other : LoRALayout

        Raises
        ------
        ValueError
            When base models, modules or side features differ; the message names the first module
            that does, both shapes and the remedy.

        Examples
        --------
        >>> from sklora import LoRALayout
        >>> LoRALayout([("q", 8, 6, 2)]).check_same_modules(LoRALayout([("q", 8, 4, 2)]))
        Traceback (most recent call last):
        ValueError: module 'q' has updates of shape (8, 4), but (8, 6) is expected. ...
        """
        if self is not other:
            raise_first_difference(self, other)

    def feature_names(self) -> list[str]:
        """Name all columns of a flat row, as for a data frame.

        Returns
        -------
        list of str
            ``q:U0,1`` is row 0 and column 1 of ``U`` of the module ``q``. Side features are last.

        Examples
        --------
        >>> from sklora import LoRALayout
        >>> LoRALayout([("q", 2, 1, 1)], side=[("scale", 1)]).feature_names()
        ['q:U0,0', 'q:U1,0', 'q:V0,0', 'scale']
        """
        return [
            f"{module.name}:{factor}{row},{column}"
            for module in self.modules
            for factor, size in (("U", module.n), ("V", 0 if self.has_plain_rows else module.m))
            for row in range(size)
            for column in range(module.rank)
        ] + side_names(self.side)

    def column_name(self, column: int) -> str:
        """Say what a column of a flat row belongs to.

        Parameters
        ----------
        column : int
            Counted from 0.

        Returns
        -------
        str
            Such as ``module 'q'`` or ``side feature 'scale'``.

        Raises
        ------
        IndexError
            When there is no such column.
        """
        for name, (_, V_columns) in zip(self.names, self.factor_slices, strict=True):
            if 0 <= column < V_columns.stop:
                return f"module {name!r}"
        for name, columns in side_slices(self.side, self.side_slice.start).items():
            if 0 <= column < columns.stop:
                return f"side feature {name!r}"
        raise IndexError(f"column {column} of {self.width}.")

    def _factors_at(self, flat: NDArray[Any], position: int) -> Factors:
        """Give views of one module in flat rows: ``U (N, n, rank)`` and ``V (N, m, rank)``."""
        module = self.modules[position]
        U_columns, V_columns = self.factor_slices[position]
        U = flat[:, U_columns].reshape(len(flat), module.n, module.rank)
        if self.has_plain_rows:
            return U, np.ones((len(flat), 1, 1), flat.dtype)
        return U, flat[:, V_columns].reshape(len(flat), module.m, module.rank)

    def _check_width(self, flat: NDArray[Any]) -> None:
        if flat.ndim != 2 or flat.shape[1] != self.width:
            raise ValueError(
                f"the layout, of {counted(self.n_modules, 'module')}, has rows of width "
                f"{self.width}, got an array of shape {flat.shape}."
            )
