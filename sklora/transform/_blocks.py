"""One way to run over a collection: in blocks that fit in memory, as tensors on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from joblib import Parallel, delayed, effective_n_jobs
from numpy.typing import NDArray
from sklearn.utils import gen_even_slices
from torch import Tensor

from sklora.collection import LoRACollection

# One pair per group of the layout: U (B, M_g, n, R_g) and V (B, M_g, m, R_g).
GroupFactors: TypeAlias = list[tuple[Tensor, Tensor]]
BlockFunction: TypeAlias = Callable[[GroupFactors, NDArray[Any], slice, NDArray[Any]], None]

# Bytes per stored weight while a block is worked on: the block as read and as unpacked, float64
# copies of both factors, and what a decomposition makes of them.
_BYTES_PER_WEIGHT = 8 * 6


def plan_blocks(X: LoRACollection, *, n_columns: int = 0, n_parallel: int = 1) -> list[slice]:
    """Blocks of adapters of which ``n_parallel`` at once fit in the ``working_memory``.

    Parameters
    ----------
    X : LoRACollection
    n_columns : int, default=0
        Width of the result that one adapter gives.
    n_parallel : int, default=1
        Blocks worked on at the same time; there are at least so many, if X has as many adapters.

    Returns
    -------
    list of slice
        They cover X in order.
    """
    bytes_per_adapter = n_parallel * (_BYTES_PER_WEIGHT * X.layout.width + 8 * n_columns)
    blocks = list(X.iter_batches(bytes_per_adapter))
    if len(blocks) < n_parallel:
        blocks = list(gen_even_slices(len(X), min(n_parallel, len(X))))
    return blocks


def to_tensors(
    factors: Iterable[tuple[NDArray[Any], NDArray[Any]]], device: torch.device
) -> GroupFactors:
    """Unpacked factors as tensors on a device."""
    return [(torch.from_numpy(U).to(device), torch.from_numpy(V).to(device)) for U, V in factors]


def map_blocks(
    function: BlockFunction,
    X: LoRACollection,
    n_columns: int,
    *,
    device: torch.device,
    n_jobs: int | None,
) -> NDArray[Any]:
    """Fill an array, one row per adapter, block by block.

    Parameters
    ----------
    function : callable
        ``function(factors, side, rows, out)`` fills `out` (B, n_columns) for the adapters
        ``X[rows]``, from their factors as tensors on `device` and their side features (B, n_side).
    X : LoRACollection
    n_columns : int
    device : torch.device
    n_jobs : int or None
        Blocks at once. They run in threads, because torch computes outside Python's lock and
        threads share the weights, the device and the result.

    Returns
    -------
    result : ndarray of shape (n_adapters, n_columns)
        Of the dtype of X.
    """
    result = np.empty((len(X), n_columns), X.dtype)

    def run(rows: slice) -> None:
        flat = X.read(rows)
        factors = to_tensors(X.layout.unpack(flat), device)
        function(factors, flat[:, X.layout.side_slice], rows, result[rows])

    blocks = plan_blocks(X, n_columns=n_columns, n_parallel=effective_n_jobs(n_jobs))
    Parallel(n_jobs=n_jobs, require="sharedmem")(delayed(run)(rows) for rows in blocks)
    return result
