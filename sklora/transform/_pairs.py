"""Inner products between the updates of two collections, and estimators that need them later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import combinations_with_replacement, product
from typing import Any, TypeAlias

import numpy as np
import torch
from joblib import effective_n_jobs
from numpy.typing import NDArray
from torch import Tensor

from sklora._base import as_tensor
from sklora._stores import ArrayStore, as_slice, by_rank, check_memory
from sklora.collection import LoRACollection
from sklora.linalg.products import add_inner_products
from sklora.transform._blocks import (
    Task,
    are_sent,
    check_results,
    parallel_blocks,
    read_block,
    run_tasks,
)

# The factors U (B, n, r) and V (B, m, r) of the module at a position.
ReadModule: TypeAlias = Callable[[int], tuple[Tensor, Tensor]]
# Some adapters, and their ranks (B, modules).
Ranked: TypeAlias = tuple[ReadModule, NDArray[np.intp]]
# Of one module, adapters of like ranks: rows, U and V.
Part: TypeAlias = tuple[Tensor, Tensor, Tensor]

# Multiplications of a module that working by rank has to save at least: measured, each part takes
# as long to start.
_WORTH_PARTS = 2**24


def inner_products(
    X: LoRACollection,
    Y: LoRACollection | None = None,
    *,
    device: str | torch.device,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> NDArray[np.float64]:
    """Frobenius inner products of the updates of every adapter of X with every one of Y.

    Computed in float64, module by module, for blocks of X and Y that fit in the `working_memory`
    together. Collections in memory are not copied.

    Parameters
    ----------
    X : LoRACollection
    Y : LoRACollection or None, default=None
        Of the same modules. None is X, for half the work.
    device : str or torch.device
    n_jobs : int or None, default=None
        Blocks of X at once, by joblib.
    verbose : int, default=0
        Whether there is a progress bar.

    Returns
    -------
    ndarray of shape (len(X), len(Y)), of float64

    Raises
    ------
    MemoryError
        When it does not fit into memory.
    """
    n_columns = len(X if Y is None else Y)
    check_memory(
        *(len(X), n_columns, np.dtype(np.float64)),
        what="the matrix of inner products",
        remedy="Take fewer adapters.",
    )
    products = np.empty((len(X), n_columns))
    plan = partial(_blocks, device=device, n_parallel=effective_n_jobs(n_jobs))
    blocks = plan(X)
    if Y is None:
        # Those with the adapters before a block, and among each other; the rest are the same.
        tasks: list[Task] = [
            (partial(_fill_products, X, blocks[:n], True), X[rows], products[rows, : rows.stop])
            for n, rows in enumerate(blocks)
        ]
    else:
        fill = partial(_fill_products, Y, plan(Y), False)
        tasks = [(fill, X[rows], products[rows]) for rows in blocks]
    run_tasks(tasks, device=device, n_jobs=n_jobs, what="inner products", verbose=verbose)
    if Y is None:
        for rows in blocks:
            products[: rows.start, rows] = products[rows, : rows.start].T
    return products


def _fill_products(
    Y: LoRACollection,
    columns: list[slice],
    among: bool,
    X: LoRACollection,
    device: torch.device,
    out: NDArray[np.float64],
) -> None:
    """Inner products of some adapters with blocks of Y and then, if wanted, among each other."""
    left = _reader(X, device), X.ranks
    for block in columns:
        _set_products(out[:, block], left, (_reader(Y[block], device), Y[block].ranks), device)
    if among:
        _set_products(out[:, -len(X) :], left, None, device)


def _set_products(
    part: NDArray[np.float64], left: Ranked, right: Ranked | None, device: torch.device
) -> None:
    """Set the inner products of two blocks, or of one with itself where `right` is None."""
    target = torch.from_numpy(part).zero_()
    products = target.to(device)  # on the CPU, the same memory
    for position in range(left[1].shape[1]):
        first = _parts(left, position)
        pairs: Iterable[tuple[Part, Part]] = combinations_with_replacement(first, 2)
        if right is not None:
            pairs = product(first, _parts(right, position))
        for one, other in pairs:
            (rows, U1, V1), (columns, U2, V2) = one, other
            if len(rows) == len(products) and len(columns) == products.shape[1]:
                add_inner_products(products, U1, V1, U2, V2, symmetric=one is other)
                continue
            some = products.new_zeros(len(rows), len(columns))
            add_inner_products(some, U1, V1, U2, V2, symmetric=one is other)
            products[rows[:, None], columns] += some
            if right is None and one is not other:
                products[columns[:, None], rows] += some.mT
    target.copy_(products)


def _parts(block: Ranked, position: int) -> list[Part]:
    """Put adapters together whose ranks of a module have as many binary digits."""
    read, ranks = block
    return parts_of(*read(position), ranks[:, position])


def parts_of(U: Tensor, V: Tensor, ranks: NDArray[np.intp]) -> list[Part]:
    """Put factors of one module together whose ranks ``(B,)`` have as many binary digits.

    The work of a pair grows with both ranks, so that the room for the largest is left out. Where
    that would not save half of the work, or little, they stay together.
    """
    rank, own = int(ranks.max()), int(ranks.sum())
    saved = (len(ranks) * rank) ** 2 - 2 * own**2
    worth = saved * (U.shape[1] + V.shape[1]) >= _WORTH_PARTS
    numbers = torch.arange(len(ranks), device=U.device)
    return [
        (numbers[rows], U[rows, :, :rank], V[rows, :, :rank])
        for rows in (by_rank(ranks) if worth else [slice(None)])
        if (rank := int(ranks[rows].max()))
    ]


def sum_over_modules(
    function: Callable[[Tensor, Tensor], Tensor],
    X: LoRACollection,
    *,
    device: str | torch.device,
    n_jobs: int | None,
) -> NDArray[np.float64]:
    """Add up what a function gives of ``U`` and ``V`` of one module, over the modules.

    Parameters
    ----------
    function : callable
        Of stacks of factors in float64; gives a number for each adapter. It can be pickled.
    X : LoRACollection
    device : str or torch.device
    n_jobs : int or None
        Blocks at once, by joblib.

    Returns
    -------
    ndarray of shape (len(X),), of float64
    """
    sums = np.empty(len(X))
    fill = partial(_fill_sums, function)
    blocks = _blocks(X, device=device, n_parallel=effective_n_jobs(n_jobs))
    tasks: list[Task] = [(fill, X[rows], sums[rows]) for rows in blocks]
    run_tasks(tasks, device=device, n_jobs=n_jobs, what="norms", verbose=0)
    return sums


def _fill_sums(
    function: Callable[[Tensor, Tensor], Tensor],
    X: LoRACollection,
    device: torch.device,
    out: NDArray[np.float64],
) -> None:
    block = _reader(X, device), X.ranks
    sums = torch.from_numpy(out).zero_()
    for position in range(X.layout.n_modules):
        for rows, U, V in _parts(block, position):
            sums[rows.cpu()] += function(U.double(), V.double()).cpu()


def as_dtype_of(X: LoRACollection, results: NDArray[np.float64]) -> NDArray[Any]:
    """Round what was computed from adapters, a row for each, to their dtype.

    Raises
    ------
    ValueError
        When numbers are not finite, or too large for it; the first of those adapters is named.
    """
    with np.errstate(over="ignore"):
        rounded = results.astype(X.dtype, copy=False)
    check_results(X, rounded)
    return rounded


class KeepsTraining:
    """An estimator that compares new adapters with those that it was fitted on.

    It keeps a view of the training adapters, so that folds of a zoo in memory, or in files, take no
    memory of their own. What is pickled holds their weights, and no paths: it works where the files
    are not.
    """

    _training: LoRACollection

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        kept = state.get("_training")
        if kept is None:
            return state
        arrays = {"flat": np.asarray(kept), "ranks": kept.ranks, "layout": kept.layout}
        return {**state, "_training": arrays}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        kept = state.get("_training")
        if kept is not None:
            training = LoRACollection.from_array(kept["flat"], kept["layout"], ranks=kept["ranks"])
            state = {**state, "_training": training}
        super().__setstate__(state)  # type: ignore[misc]


def _blocks(X: LoRACollection, *, device: str | torch.device, n_parallel: int) -> list[slice]:
    """Blocks that leave room in the `working_memory` for as large a block of another collection."""
    sent = are_sent(device)
    stored, itemsize = X._store.layout, X.dtype.itemsize
    # One module as read, and its copy in float64.
    largest = max((module.n + module.m) * module.rank for module in stored.modules)
    bytes_per_adapter = largest * (itemsize + 8)
    if sent or not isinstance(X._store, ArrayStore):
        widths = stored.width + (X.layout.width if sent or X.layout != stored else 0)
        bytes_per_adapter += widths * itemsize
    return parallel_blocks(X, 2 * bytes_per_adapter, n_parallel)


def _reader(X: LoRACollection, device: torch.device) -> ReadModule:
    """Read adapters from files, if they are there, and give the factors of each module."""
    if device.type != "cpu":
        return list(read_block(X, device).factors).__getitem__
    store = X._store
    if isinstance(store, ArrayStore):
        layout, flat = store.layout, store.array
        picked = slice(None) if X._index is None else as_slice(X._index)
    else:
        layout, flat, picked = X.layout, X.read(copy=False), slice(None)

    def read(position: int) -> tuple[Tensor, Tensor]:
        U, V = (
            as_tensor(np.asarray(A[picked], X.dtype)) for A in layout._factors_at(flat, position)
        )
        return U, V

    return read
