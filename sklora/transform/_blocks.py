"""One way to run over a collection: in blocks that fit in memory, as tensors on a device."""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from joblib import Parallel, delayed, effective_n_jobs
from joblib.parallel import ParallelBackendBase, get_active_backend
from numpy.typing import NDArray
from sklearn.utils import gen_even_slices
from torch import Tensor
from torch.nn.functional import pad

from sklora._base import resolve_device, send
from sklora._progress import progress
from sklora._stores import ArrayStore, StreamingStore, as_slice, check_memory
from sklora.collection import LoRACollection, LoRALayout, check_numbers

_logger = logging.getLogger("sklora.transform")

# Of the factors that are worked on: a stack of them, float64 copies, and what a QR decomposition
# makes of those.
_BYTES_PER_WEIGHT_AT_WORK = 8 * 4

# Factors of a module up to the first are copied into a stack of up to the second: measured, from
# there on the copy takes as long as it saves.
_SMALL_BYTES, _STACK_BYTES = 2**20, 2**23
# On a GPU copies take next to nothing, and a step on few numbers as long as one on many; a stack
# has up to so many weights of an adapter, which the blocks leave room for.
_STACK_WEIGHTS_ON_GPU = 2**20

Factors: TypeAlias = list[tuple[Tensor, Tensor]]
Stack: TypeAlias = list[tuple[int, Tensor, Tensor]]


class Block(NamedTuple):
    """Some adapters.

    Attributes
    ----------
    factors : iterable of (Tensor of shape (B, n, r), Tensor of shape (B, m, r))
        One pair for every module, to be gone through once: views of the flat rows, which may be
        those of the collection, or read one by one.
    side : ndarray of shape (B, n_side)
    ranks : ndarray of shape (B, n_modules)
    """

    factors: Iterable[tuple[Tensor, Tensor]]
    side: NDArray[Any]
    ranks: NDArray[np.intp]


BlockFunction: TypeAlias = Callable[[Block, NDArray[Any]], None]
# What to do with some adapters on a device, and the part of a result that it fills.
Work: TypeAlias = Callable[[LoRACollection, torch.device, NDArray[Any]], None]
Task: TypeAlias = tuple[Work, LoRACollection, NDArray[Any]]


def factor_views(flat: Tensor, layout: LoRALayout) -> Factors:
    """Give the factors ``U (B, n, r)`` and ``V (B, m, r)`` of every module as views of flat rows.

    Parameters
    ----------
    flat : Tensor of shape (B, layout.width)
    layout : LoRALayout
        Where it has plain rows, ``V = 1`` is new.

    Returns
    -------
    list of (U, V)
    """
    if layout.has_plain_rows:
        return [(flat[:, layout.factor_slices[0][0], None], flat.new_ones((len(flat), 1, 1)))]
    return [
        (flat[:, U].reshape(-1, n, r), flat[:, V].reshape(-1, m, r))
        for (_, n, m, r), (U, V) in zip(layout.modules, layout.factor_slices, strict=True)
    ]


def stacks(
    factors: Iterable[tuple[Tensor, Tensor]],
    *,
    small: bool = True,
    kinds: Iterable[Hashable] = repeat(None),
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Put small factors of modules of one shape together, as work on them takes longest to start.

    Parameters
    ----------
    factors : iterable of (Tensor of shape (B, n, r), Tensor of shape (B, m, r))
    small : bool, default=True
        False leaves every module by itself.
    kinds : iterable of hashable
        What else the modules of one stack have in common.

    Yields
    ------
    positions : list of int
        Of k modules. Those by themselves come in order.
    U : Tensor of shape (k, B, n, r)
        A view of the factors for ``k = 1``.
    V : Tensor of shape (k, B, m, r)
    """
    waiting: defaultdict[Hashable, Stack] = defaultdict(list)
    for position, ((U, V), kind) in enumerate(zip(factors, kinds, strict=False)):
        n_bytes = U.nbytes + V.nbytes
        largest, full = _SMALL_BYTES, _STACK_BYTES
        if U.is_cuda:
            largest = full = _STACK_WEIGHTS_ON_GPU * U.itemsize * len(U)
        if not small or n_bytes > largest:
            yield [position], U[None], V[None]
            continue
        alike = (U.shape, V.shape, kind)
        waiting[alike].append((position, U, V))
        if (len(waiting[alike]) + 1) * n_bytes > full:
            yield _stacked(waiting.pop(alike))
    yield from map(_stacked, waiting.values())


def _stacked(stack: Stack) -> tuple[list[int], Tensor, Tensor]:
    positions, left, right = zip(*stack, strict=True)
    return [*positions], as_one(left), as_one(right)


def as_one(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors; one alone is a view."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack([*tensors])


def plan_blocks(
    X: LoRACollection,
    *,
    n_columns: int = 0,
    n_parallel: int = 1,
    sent: bool = False,
    stacked: bool = False,
) -> list[slice]:
    """Blocks of adapters of which ``n_parallel`` at once fit in the ``working_memory``.

    Parameters
    ----------
    X : LoRACollection
    n_columns : int, default=0
        Width of the result that one adapter gives.
    n_parallel : int, default=1
        Blocks worked on at the same time; there are at least so many, if X has as many adapters.
    sent : bool, default=False
        Whether they are sent to a GPU, or to another process.
    stacked : bool, default=False
        Whether a GPU is to work on modules in stacks.

    Returns
    -------
    list of slice
        They cover X in order.
    """
    at_work = max((module.n + module.m) * module.rank for module in X.layout.modules)
    if sent and stacked:
        at_work = max(at_work, min(_STACK_WEIGHTS_ON_GPU, X.layout.width))
    # Rows that have to be put together are there as stored and as laid out; those that are sent, on
    # the way (pinned, or pickled) and where they arrive.
    n_copies = (0 if _lies_in_memory(X) else 2) + 2 * sent
    width = n_columns + n_copies * X.layout.width
    bytes_per_adapter = X.dtype.itemsize * width + _BYTES_PER_WEIGHT_AT_WORK * at_work
    return parallel_blocks(X, bytes_per_adapter, n_parallel)


def parallel_blocks(X: LoRACollection, bytes_per_adapter: float, n_parallel: int) -> list[slice]:
    """Blocks of which ``n_parallel`` at once fit in the ``working_memory``, and at least so many.

    Parameters
    ----------
    X : LoRACollection
    bytes_per_adapter : float
        What the work on one adapter takes.
    n_parallel : int

    Returns
    -------
    list of slice
        They cover X in order; no more than its adapters.
    """
    blocks = list(X.iter_batches(n_parallel * bytes_per_adapter))
    return blocks if len(blocks) >= n_parallel else list(gen_even_slices(len(X), n_parallel))


def _lies_in_memory(X: LoRACollection) -> bool:
    """Whether rows of X are views of an array."""
    store, index = X._store, X._index
    return (
        isinstance(store, ArrayStore)
        and (store.array.dtype, store.layout) == (X.dtype, X.layout)
        and (index is None or isinstance(as_slice(index), slice))
    )


def read_block(X: LoRACollection, device: torch.device, *, check: bool = False) -> Block:
    """Read adapters onto a device.

    Parameters
    ----------
    X : LoRACollection
    device : torch.device
        To CUDA, as :func:`sklora._base.send` does.
    check : bool, default=False
        Whether to check all numbers. Those beyond the true ranks are checked anyway, as no result
        shows them.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        When numbers are not valid.
    """
    ranks = X.ranks
    if len(ranks) == 1 and isinstance(X._store, StreamingStore):
        return _streamed(X._store, X.layout, int(X._positions(slice(None))[0]), device)
    flat = X.read(copy=False)
    if check or (ranks != X.layout.ranks).any():
        check_numbers(X, slice(None), flat)
    factors = factor_views(send(flat, device), X.layout)
    return Block(factors, flat[:, X.layout.side_slice], ranks)


def copy_back(result: Tensor, out: Tensor) -> None:
    """Copy what a device has computed into memory that the CPU has.

    Parameters
    ----------
    result : Tensor
        From CUDA, it goes through pinned memory: the cores then share out the copy into `out`, and
        with it the search for memory that was never used before.
    out : Tensor of the same shape and dtype
        On the CPU.
    """
    if result.is_cuda:
        result = torch.empty_like(result, device="cpu", pin_memory=True).copy_(result)
    out.copy_(result)


def _streamed(store: StreamingStore, layout: LoRALayout, row: int, device: torch.device) -> Block:
    """Give one adapter module by module, in the ranks of a layout: it may be a large one."""

    def factors() -> Iterator[tuple[Tensor, Tensor]]:
        for module, pair in zip(layout.modules, store.iter_factors(row), strict=True):
            U, V = (send(A, device)[None] for A in pair)
            room = module.rank - U.shape[-1]
            yield (pad(U, (0, room)), pad(V, (0, room))) if room else (U, V)

    return Block(factors(), store.read_side(row)[None], store.ranks[[row]])


def map_blocks(
    function: BlockFunction,
    X: LoRACollection,
    n_columns: int,
    *,
    device: str | torch.device,
    n_jobs: int | None,
    stacked: bool = False,
    what: str = "adapters",
    verbose: int = 0,
) -> NDArray[Any]:
    """Fill an array, one row per adapter, block by block.

    Numbers that are not finite make results that are not, so results are what is checked: every
    weight is read once.

    Parameters
    ----------
    function : callable
        ``function(block, out)`` fills `out` (B, n_columns). It can be pickled.
    X : LoRACollection
    n_columns : int
    device : str or torch.device
        As for the estimators; "auto" is found out where the work is done.
    n_jobs : int or None
        Blocks at once, by joblib: in threads, as torch computes outside Python's lock, unless the
        backend that joblib is configured for is another. Other processes and machines get the
        collection of their block, which of a file is its path, and return its rows.
    stacked : bool, default=False
        As for :func:`plan_blocks`.
    what : str, default="adapters"
        Stands before the progress bar, and in log messages.
    verbose : int, default=0
        Whether there is a progress bar. It moves as blocks come back, all at once at the end from a
        backend that cannot stream results.

    Returns
    -------
    result : ndarray of shape (n_adapters, n_columns)
        Of the dtype of X.

    Raises
    ------
    ValueError
        When X has NaN or infinity.
    MemoryError
        When the result does not fit into memory.
    """
    check_memory(
        *(len(X), n_columns, X.dtype),
        what=f"what {what} gives",
        remedy="Take fewer adapters, or a featurizer that gives fewer columns.",
    )
    result = np.empty((len(X), n_columns), X.dtype)
    fill = partial(_fill, function)
    blocks = plan_blocks(
        X,
        n_columns=n_columns,
        n_parallel=effective_n_jobs(n_jobs),
        sent=are_sent(device),
        stacked=stacked,
    )
    tasks = [(fill, X[rows], result[rows]) for rows in blocks]
    run_tasks(tasks, device=device, n_jobs=n_jobs, what=what, verbose=verbose)
    return result


def are_sent(device: str | torch.device) -> bool:
    """Whether tasks get their adapters in memory of their own: on a GPU, or in another process."""
    _, shared = _backend()
    # Other processes may have devices that are not here.
    return not shared or resolve_device(device).type != "cpu"


def _backend() -> tuple[ParallelBackendBase, bool]:
    """Give the backend of joblib that runs tasks, and whether they share memory."""
    backend, _ = get_active_backend(prefer="threads")
    return backend, getattr(backend, "supports_sharedmem", False)


def run_tasks(
    tasks: Sequence[Task],
    *,
    device: str | torch.device,
    n_jobs: int | None,
    what: str,
    verbose: int,
) -> None:
    """Run every ``function(X, device, out)`` on some adapters, which fills its part of a result.

    Parameters
    ----------
    tasks : sequence of (function, LoRACollection, ndarray)
    device, n_jobs, what, verbose
        As for :func:`map_blocks`.
    """
    backend, shared = _backend()
    where = resolve_device(device) if shared else f"{device} of {type(backend).__name__}"
    n_adapters = sum(len(X) for _, X, _ in tasks)
    _logger.debug("%s: %d adapters in %d blocks on %s", what, n_adapters, len(tasks), where)
    streams = getattr(backend, "supports_return_generator", False)
    parallel: Callable[[Iterable[Any]], Iterable[Any]] = _here
    # Joblib takes a tenth of a millisecond to start, as long as the work on a small block takes.
    if not shared or len(tasks) > 1:
        parallel = Parallel(
            n_jobs=n_jobs,
            prefer="threads" if shared else None,
            return_as="generator" if streams else "list",
        )
    if shared:
        work = (delayed(_run)(*task, device) for task in tasks)
    else:
        work = (delayed(_result)(function, X, A.shape, A.dtype, device) for function, X, A in tasks)
    with progress(n_adapters, what, "adapter", verbose) as advance:
        for (_, X, out), part in zip(tasks, parallel(work), strict=True):
            if not shared:
                out[:] = part
            advance(len(X))


def _here(work: Iterable[Any]) -> Iterator[Any]:
    return (function(*args, **options) for function, args, options in work)


def _result(
    function: Work,
    X: LoRACollection,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    device: str | torch.device,
) -> NDArray[Any]:
    out = np.empty(shape, dtype)
    _run(function, X, out, device)
    return out


def _run(
    function: Work,
    X: LoRACollection,
    out: NDArray[Any],
    device: str | torch.device,
) -> None:
    here = resolve_device(device)
    with at_work(here):
        function(X, here, out)


def _fill(
    function: BlockFunction, X: LoRACollection, device: torch.device, out: NDArray[Any]
) -> None:
    try:
        function(read_block(X, device), out)
    except RuntimeError as error:  # such as that of a decomposition of NaN
        _look_at(X)
        if not isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            raise
        raise ValueError(overflow_of(X)) from error
    # One sum says whether all are finite, unless it overflows; then a look at X says it.
    if not math.isfinite(torch.from_numpy(out).sum()):
        _look_at(X)
        check_results(X, out)


def check_results(X: LoRACollection, out: NDArray[Any]) -> None:
    """Check that what was computed from adapters is finite; each has a row.

    Raises
    ------
    ValueError
        When it is not; the first of those adapters is named.
    """
    valid = np.isfinite(out).all(axis=1)
    if not valid.all():
        raise ValueError(overflow_of(X[[int(valid.argmin())]]))


def overflow_of(X: LoRACollection) -> str:
    """Say that results of these adapters, whose numbers are finite, are not."""
    first, last = X.ids[[0, -1]].tolist()
    which = f"adapter {first!r}" if len(X) == 1 else f"adapters {first!r} to {last!r}"
    return (
        f"numbers of {which} are finite, but what is computed from them overflows; rescale them, "
        "or leave out those that are far too large."
    )


def _look_at(X: LoRACollection) -> None:
    """Raise if numbers of these adapters are not valid."""
    if not X._store.is_checked:
        check_numbers(X, slice(None), X.read(copy=False))


# Streams of each GPU that no block is using. Torch keeps memory for every stream that was used, so
# there are no more of them than blocks at once.
_idle_streams: defaultdict[int, list[torch.cuda.Stream]] = defaultdict(list)
_first_use = threading.Lock()


@contextmanager
def at_work(device: torch.device) -> Iterator[None]:
    """Compute on a device as it is meant to be: in full precision, and beside other threads.

    On CUDA, the block inside gets a stream, so that its copies overlap the work on another block.

    Parameters
    ----------
    device : torch.device
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            idle = _idle_streams[torch.cuda.current_device()]
            with _first_use:
                _load_linear_algebra()
            try:
                stream = idle.pop()
            except IndexError:
                stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            try:
                with torch.cuda.stream(stream):
                    yield
            finally:
                idle.append(stream)


@cache
def _load_linear_algebra() -> None:
    # Torch loads it when it is first wanted, and fails where two threads are the first at once.
    torch.linalg.inv(torch.eye(1, device="cuda"))
