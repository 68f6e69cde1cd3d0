"""How zoos are trained, in parts, and kept under a data home."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from safetensors.numpy import load, save
from sklearn.utils.validation import check_scalar

from sklora._base import float32_by_default, plain_torch
from sklora._files import replacing
from sklora._progress import progress
from sklora.collection import LoRACollection, LoRALayout

__all__ = ["get_data_home"]

Arrays = dict[str, NDArray[Any]]
Trained = tuple[NDArray[np.float32], Arrays]

WEIGHTS, LABELS, BASE = "weights.safetensors", "labels.safetensors", "base.safetensors"
WHOLE = (WEIGHTS, LABELS, BASE)
LOCK = ".lock"
_FLAT = "weights"  # beside the labels in the file of a part

# Part of every folder's name. To be raised with each change of code that trains other adapters from
# the same settings: what was trained before is then trained anew.
RECIPES_VERSION = 1


class Recipe(Protocol):
    """A base network, and adapters in parts that do not depend on one another.

    All that is random about a part is in the recipe, so that parts come out the same in any order,
    in any process, and after an interruption.
    """

    @property
    def layout(self) -> LoRALayout:
        """The layout; every adapter has its ranks."""

    @property
    def parts(self) -> Sequence[NDArray[np.intp]]:
        """The rows of every part; together every row once."""

    def train_base(self, verbose: int) -> Arrays:
        """Train the network that adapters finetune."""

    def train_part(self, base: Arrays, part: int) -> Trained:
        """Give flat rows ``(n_rows, width)``, and labels with as many rows."""


class Zoo(NamedTuple):
    """Adapters in the order of their rows, what is known of them, and the network they finetune."""

    data: LoRACollection
    labels: Arrays
    base: Arrays


@contextmanager
def undisturbed() -> Iterator[None]:
    """Undo, inside the block, settings of torch under which one seed would give another zoo."""
    with plain_torch("cpu"), float32_by_default():
        yield


@undisturbed()
def train_zoo(recipe: Recipe, *, n_jobs: int | None = None, verbose: int = 1) -> Zoo:
    """Train a zoo in memory.

    Parameters
    ----------
    recipe : Recipe
    n_jobs : int or None, default=None
        Parts at once, in processes of their own.
    verbose : int, default=1
        Whether to show progress bars.

    Returns
    -------
    Zoo
    """
    base = recipe.train_base(verbose)
    parts = _train(recipe, base, range(len(recipe.parts)), n_jobs, verbose)
    flat, labels = _assembled(recipe, parts)
    return Zoo(of_full_rank(flat, recipe.layout), labels, base)


def fetch_zoo(
    name: str,
    settings: Mapping[str, int | float | str],
    build: Callable[[], Recipe],
    *,
    data_home: str | os.PathLike[str] | None = None,
    train_if_missing: bool = True,
    n_jobs: int | None = None,
    verbose: int = 1,
) -> Zoo:
    """Load a zoo from the data home, where it is trained first if need be.

    Each part is kept as soon as it is trained: an interrupted call is gone on with by the next.
    Files are used only if they are as they were written. Of several processes one trains.

    Parameters
    ----------
    name : str
        Of the zoo.
    settings : mapping of str to number or str
        What may differ from call to call; each choice has a folder of its own.
    build : callable
        Gives the recipe of these settings; called only when something is missing.
    data_home : str, path-like or None, default=None
        See :func:`get_data_home`.
    train_if_missing : bool, default=True
    n_jobs : int or None, default=None
        Parts at once, in processes of their own.
    verbose : int, default=1
        Whether to show progress bars.

    Returns
    -------
    Zoo
        Its weights are mapped into memory.

    Raises
    ------
    OSError
        When the zoo is not there and `train_if_missing` is False, or a folder is in the place of
        one of its files.
    """
    keyed = {"recipes_version": RECIPES_VERSION, **settings}
    text = json.dumps(keyed, sort_keys=True, indent=1, default=int)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = Path(get_data_home(data_home)) / f"{name}-{digest}"
    for path in folder.glob("*"):
        if path.is_dir():
            raise OSError(
                f"{str(path)!r} is a folder where a file of the zoo {name!r} belongs; remove it, "
                "or name another data_home."
            )
    if not all(_is_intact(folder / file) for file in WHOLE):
        if not train_if_missing:
            raise OSError(
                f"The zoo {name!r} is not in {str(folder)!r}; train_if_missing=True trains it, or "
                f"name the right data_home."
            )
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), undisturbed():
            # Another process may have trained it meanwhile.
            if not all(_is_intact(folder / file) for file in WHOLE):
                with replacing(folder / "settings.json") as file:
                    file.write(text.encode())
                _fill(folder, build(), n_jobs, verbose)
    return Zoo(LoRACollection.open(folder / WEIGHTS), _read(folder / LABELS), _read(folder / BASE))


def check_sizes(n_adapters: int, rank: int, dim: int, depth: int, *, heads: int) -> None:
    """Raise a ValueError that names the size which no zoo of networks with so many heads has."""
    for name, value in (("n_adapters", n_adapters), ("rank", rank), ("depth", depth)):
        check_scalar(value, name, Integral, min_val=1)
    check_scalar(dim, "dim", Integral, min_val=heads)
    if dim % heads:
        raise ValueError(f"dim is {dim}; the attention heads need a multiple of {heads}.")


def get_data_home(data_home: str | os.PathLike[str] | None = None) -> str:
    """Give the folder that the zoos of the ``fetch_*`` functions are kept in.

    Parameters
    ----------
    data_home : str, path-like or None, default=None
        With None, the environment variable ``SKLORA_DATA``, or else ``~/sklora_data``.

    Returns
    -------
    str
        The folder, which may not exist yet. What is in it can be deleted at any time.

    Examples
    --------
    >>> from sklora.datasets import get_data_home
    >>> get_data_home("/tmp/zoos")
    '/tmp/zoos'
    """
    if data_home is None:
        data_home = os.environ.get("SKLORA_DATA") or os.path.join("~", "sklora_data")
    return os.path.expanduser(data_home)


def description(make: Callable[..., Any]) -> str:
    """Give the `DESCR` of the zoos of a function: how it trains them, as its docstring says."""
    text = inspect.cleandoc(make.__doc__ or "")  # none under python -OO
    return text.partition("\n\nParameters\n")[0].partition("\n\n")[2]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into a folder, and keep others out."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        warnings.warn(
            f"Another process trains the zoo in {str(folder)!r}, which is waited for.", stacklevel=5
        )
        held = lock.acquire()
    with held:
        yield


def _fill(folder: Path, recipe: Recipe, n_jobs: int | None, verbose: int) -> None:
    """Train what is missing in the folder, and put the parts together."""
    # Or, after an interruption, old weights would pass for those of a new base network.
    (folder / WEIGHTS).unlink(missing_ok=True)
    if not _is_intact(folder / BASE):
        # Parts belong to the base network that they were trained on.
        for path in [*folder.glob("part-*")]:
            path.unlink()
        _write(folder / BASE, recipe.train_base(verbose))
    base = _read(folder / BASE)
    paths = [folder / f"part-{part:05}.safetensors" for part in range(len(recipe.parts))]
    missing = [part for part, path in enumerate(paths) if not _is_intact(path)]
    for part, (flat, labels) in _train(recipe, base, missing, n_jobs, verbose):
        _write(paths[part], {_FLAT: flat, **labels})
    stored = (_read(path) for path in paths)
    flat, labels = _assembled(recipe, enumerate((part.pop(_FLAT), part) for part in stored))
    _write(folder / LABELS, labels)
    of_full_rank(flat, recipe.layout).save(folder / WEIGHTS)
    _sign(folder / WEIGHTS)
    for path in [*folder.glob("part-*"), *folder.glob(".*.tmp")]:  # and what killed runs left
        path.unlink()


def _train(
    recipe: Recipe, base: Arrays, parts: Sequence[int], n_jobs: int | None, verbose: int
) -> Iterator[tuple[int, Trained]]:
    """Give every part with its number, as soon as it is trained."""
    n_adapters = sum(len(recipe.parts[part]) for part in parts)
    jobs = (delayed(_train_part)(recipe, base, part) for part in parts)
    with progress(n_adapters, "adapters", "adapter", verbose) as advance:
        for part, trained in Parallel(n_jobs=n_jobs, return_as="generator_unordered")(jobs):
            yield part, trained
            advance(len(recipe.parts[part]))


def _train_part(recipe: Recipe, base: Arrays, part: int) -> tuple[int, Trained]:
    return part, recipe.train_part(base, part)


def _assembled(recipe: Recipe, parts: Iterable[tuple[int, Trained]]) -> Trained:
    n_adapters = sum(len(rows) for rows in recipe.parts)
    whole: Arrays = {}
    for part, (flat, labels) in parts:
        for name, values in {_FLAT: flat, **labels}.items():
            if name not in whole:
                whole[name] = np.empty((n_adapters, *values.shape[1:]), dtype=values.dtype)
            whole[name][recipe.parts[part]] = values
    return whole.pop(_FLAT), whole


def of_full_rank(flat: NDArray[Any], layout: LoRALayout) -> LoRACollection:
    """Make a collection of rows that all have the ranks of the layout, without looking."""
    return LoRACollection.from_array(flat, layout, ranks=np.tile(layout.ranks, (len(flat), 1)))


def _read(path: Path) -> Arrays:
    return load(path.read_bytes())


def _write(path: Path, arrays: Arrays) -> None:
    with replacing(path) as file:
        file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    _sign(path)


def _signature(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sign(path: Path) -> None:
    """Write the checksum beside a file, as sha256sum does."""
    with replacing(_signature(path)) as file:
        file.write(f"{_checksum(path)}  {path.name}\n".encode())


def _is_intact(path: Path) -> bool:
    """Whether the file is there as it was written; one that was never finished has no checksum."""
    if not (path.exists() and _signature(path).exists()):
        return False
    found = _signature(path).read_text(errors="replace").partition(" ")[0] == _checksum(path)
    if not found:
        warnings.warn(f"{str(path)!r} is not as it was written, and is not used.", stacklevel=5)
    return found
