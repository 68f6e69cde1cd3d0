"""The modules of a layout, and what tells two layouts apart."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from sklora._untrusted import counted

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from sklora._layout import LoRALayout
    from sklora._loras import LoRACollection

_REMEDY = (
    "Make the collection by read_adapters or LoRACollection.from_factors with "
    "layout=estimator.layout_, for which a module that an adapter lacks is the zero update, or fit "
    "again."
)


class LoRAModule(NamedTuple):
    """One adapted module: the update ``U V^T (n, m)``, with ``U (n, rank)`` and ``V (m, rank)``.

    Attributes
    ----------
    name : str
    n : int
        Rows of the update: the output side.
    m : int
        Columns of the update: the input side.
    rank : int
        The largest rank that the flat columns have room for.

    Examples
    --------
    >>> from sklora import LoRALayout
    >>> LoRALayout([("q_proj", 8, 6, 2)]).modules
    (LoRAModule(name='q_proj', n=8, m=6, rank=2),)
    """

    name: str
    n: int
    m: int
    rank: int


@dataclass(frozen=True)
class ModuleGroup:
    """Modules of one shape, which are computed together.

    Attributes
    ----------
    n, m : int
        Shape of the updates.
    rank : int
        The largest among its modules.
    index : tuple of int
        Where its modules stand in ``layout.modules``.

    Examples
    --------
    >>> from sklora import LoRALayout
    >>> layout = LoRALayout([("0.up", 8, 6, 2), ("0.down", 6, 8, 2), ("1.up", 8, 6, 4)])
    >>> layout.groups
    (ModuleGroup(n=8, m=6, rank=4, index=(0, 2)), ModuleGroup(n=6, m=8, rank=2, index=(1,)))
    """

    n: int
    m: int
    rank: int
    index: tuple[int, ...]


def checked_modules(modules: Iterable[Sequence[Any]]) -> tuple[LoRAModule, ...]:
    """Check descriptions ``(name, n, m, rank)`` of modules, as for `LoRALayout`."""
    checked = []
    for module in modules:
        if len(module) != 4:
            raise ValueError(f"a module is described by (name, n, m, rank), got {module!r}.")
        name, *sizes = module
        n, m, rank = (
            _checked_size(size, f"{what} of module {name!r}")
            for what, size in zip(("n", "m", "rank"), sizes, strict=True)
        )
        checked.append(LoRAModule(name, n, m, rank))
    if not checked:
        raise ValueError("a layout has at least one module, got none.")
    _check_names("module", [module.name for module in checked])
    return tuple(checked)


def checked_side(side: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Check descriptions ``(name, size)`` of side features, as for `LoRALayout`."""
    checked = []
    for feature in side:
        if len(feature) != 2:
            raise ValueError(f"a side feature is described by (name, size), got {feature!r}.")
        name, size = feature
        checked.append((name, _checked_size(size, f"size of side feature {name!r}")))
    _check_names("side feature", [name for name, _ in checked])
    return tuple(checked)


def raise_first_difference(expected: LoRALayout, found: LoRALayout) -> None:
    """Raise ValueError for the first difference, if there is one in more than ranks."""
    labels = expected.base_model, found.base_model
    if None not in labels and labels[0] != labels[1]:
        raise ValueError(
            f"the adapters are of base model {labels[1]!r}, but {labels[0]!r} is expected: their "
            "modules mean different things. Fit one estimator per base model."
        )
    if expected.has_plain_rows != found.has_plain_rows:
        wanted, given = (
            f"plain rows of {layout.width} features" if layout.has_plain_rows else repr(layout)
            for layout in (expected, found)
        )
        raise ValueError(
            f"the weights are {given}, but {wanted} is expected. Fit on a collection, or pass "
            "layout=X.layout to the estimator and fit again."
        )
    for wanted_module, module in zip(expected.modules, found.modules, strict=False):
        if wanted_module[:3] != module[:3]:
            _raise_other_module(wanted_module, module)
    if expected.n_modules != found.n_modules:
        longer = max(expected, found, key=lambda layout: layout.n_modules)
        extra = longer.modules[min(expected.n_modules, found.n_modules)]
        raise ValueError(
            f"module {extra.name!r} of shape ({extra.n}, {extra.m}) is "
            f"{'missing' if longer is expected else 'not expected'}: the adapters have "
            f"{counted(found.n_modules, 'module')}, not {expected.n_modules}. {_REMEDY}"
        )
    if expected.side != found.side:
        raise ValueError(
            f"side features are {list(found.side)}, but {list(expected.side)} are expected. "
            "Pass the same ones to LoRACollection.from_factors(..., side=...), or read files with "
            "layout=estimator.layout_."
        )


def check_room(
    loras: LoRACollection,
    room: ArrayLike,
    remedy: str,
    limit: str = "rank {} is the most that fits here",
) -> None:
    """Check that ranks are at most those of `room (n_modules,)`; `limit` says where these are."""
    ranks, most = loras.ranks, np.asarray(room)
    too_high = ranks > most
    if too_high.any():
        row, position = np.argwhere(too_high)[0]
        name, n, m, _ = loras.layout.modules[position]
        rank = ranks[row, position]
        id = loras.ids.item(row)
        raise ValueError(
            f"module {name!r} of adapter {id!r} has rank {rank}, with U ({n}, {rank}) and "
            f"V ({m}, {rank}), but {limit.format(most[position])}. {remedy}"
        )


def _raise_other_module(expected: LoRAModule, found: LoRAModule) -> NoReturn:
    expected_shape, shape = f"({expected.n}, {expected.m})", f"({found.n}, {found.m})"
    if expected.name == found.name:
        raise ValueError(
            f"module {found.name!r} has updates of shape {shape}, but {expected_shape} is "
            f"expected. {_REMEDY}"
        )
    raise ValueError(
        f"module {found.name!r} of shape {shape} is where module {expected.name!r} of shape "
        f"{expected_shape} is expected. {_REMEDY}"
    )


def _checked_size(value: Any, what: str) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"the {what} must be an integer, got {value!r}.") from None
    if size < 1:
        raise ValueError(f"the {what} must be at least 1, got {size}.")
    return size


def _check_names(what: str, names: Sequence[Any]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"the name of a {what} must be a string, got {name!r}.")
    if len(set(names)) < len(names):
        [(twice, _)] = Counter(names).most_common(1)
        raise ValueError(f"{what} {twice!r} is named twice; names must be unique.")


def side_names(side: Iterable[tuple[str, int]]) -> list[str]:
    """Name the columns of side features: by the feature's own name if it has one column."""
    return [
        name if size == 1 else f"{name}:{column}" for name, size in side for column in range(size)
    ]


def side_slices(side: Iterable[tuple[str, int]], start: int = 0) -> dict[str, slice]:
    """Give the columns of every side feature, by name; the first begins at `start`."""
    slices = {}
    for name, size in side:
        slices[name] = slice(start, start + size)
        start += size
    return slices


def check_stacked(
    groups: Sequence[ModuleGroup],
    names: Sequence[str],
    factors: Sequence[tuple[NDArray[Any], NDArray[Any]]],
) -> int:
    """Check the shapes of stacked factors, and give the number of rows."""
    if len(factors) != len(groups):
        raise ValueError(
            f"{len(groups)} pairs (U, V) are needed, one for every group of modules of one shape, "
            f"got {len(factors)}."
        )
    n_rows = len(factors[0][0])
    for group, (U, V) in zip(groups, factors, strict=True):
        for letter, array, size in (("U", U, group.n), ("V", V, group.m)):
            expected = (n_rows, len(group.index), size)
            if array.ndim != 4 or array.shape[:3] != expected or array.shape[3] != U.shape[3]:
                raise ValueError(
                    f"{letter} of the modules of shape ({group.n}, {group.m}), of which the first "
                    f"is {names[group.index[0]]!r}, has shape {array.shape}, but "
                    f"{(*expected, 'rank')} is expected, with one rank for U and V."
                )
    return n_rows
