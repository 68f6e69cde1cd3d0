"""Zoos of real LoRAs: a language model finetuned on packages of Python's standard library."""

from __future__ import annotations

import json
import os
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import Bunch, check_random_state
from torch import Tensor

from sklora._progress import progress
from sklora.collection import LoRACollection, LoRALayout
from sklora.datasets import _language as language
from sklora.datasets._denoiser import Factors, Weights
from sklora.datasets._methods import METHODS
from sklora.datasets._zoos import (
    Arrays,
    Trained,
    Zoo,
    check_sizes,
    description,
    fetch_zoo,
    train_zoo,
)

__all__ = ["fetch_code_loras", "make_code_loras"]

LORA = METHODS["lora"]
KEPT = "asyncio"  # every adapter is trained on it
SOURCES = (
    *("collections", "concurrent", "ctypes", "email", "encodings", "html", "http", "importlib"),
    *("json", "logging", "multiprocessing", "re", "tomllib", "unittest", "urllib", "wsgiref"),
    *("xml", "xmlrpc", "zoneinfo"),
)
# Four spaces are one symbol, or they would be much of what is predicted.
SYMBOLS = "\n\t" + "".join(map(chr, range(32, 127)))
CONTEXT = 64
# From each source come stretches spread evenly over it, of blocks of texts that follow one another:
# four to train on, one to validate, one to test.
N_STRETCHES, N_BLOCKS, N_TRAIN = 4, 6, 4
LENGTH = N_BLOCKS * (N_TRAIN + 2) * (CONTEXT + 1)  # of a stretch
N_OWN = 32  # texts of a source that an adapter trains on, of 96
BASE_STEPS_PER_DIM = 96  # wider networks learn for longer
FETCHED: dict[str, Any] = {"dim": 32, "depth": 3, "random_state": 20261126}
CHUNK = 256  # texts of a step, of all adapters that are trained together
VARIED = {
    "learning_rate": (1e-3, 2e-2),
    "weight_decay": (1e-3, 1e-1),
    "n_epochs": (1, 2, 3),
    "batch_size": (8, 16, 32),
    "lora_dropout": (0.0, 0.05, 0.1, 0.2),
}


class Texts(NamedTuple):
    """Symbols ``(20, n_texts, CONTEXT + 1)`` of every source; no two splits share a symbol."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    test: NDArray[np.uint8]


def _encode(text: str) -> NDArray[np.uint8]:
    """Numbers of symbols; what has none is a question mark."""
    table = np.full(256, SYMBOLS.index("?"), dtype=np.uint8)
    table[list(SYMBOLS.encode())] = np.arange(len(SYMBOLS))
    bytes_ = text.replace("    ", "\t").encode("ascii", "replace")
    return table[np.frombuffer(bytes_, dtype=np.uint8)]


def _read(files: Iterable[Path]) -> NDArray[np.uint8]:
    return _encode("".join(file.read_text("utf-8", "replace") for file in files))


def _read_source(stdlib: Path, name: str) -> NDArray[np.uint8]:
    folder = stdlib / name
    files = sorted(folder.rglob("*.py"))
    # Some Pythons have the tests of a package inside it.
    symbols = _read(
        file for file in files if not {"test", "tests"} & {*file.relative_to(folder).parts}
    )
    if len(symbols) < N_STRETCHES * LENGTH:
        raise FileNotFoundError(
            f"Python's standard library in {str(stdlib)!r} is without the source of {name!r}, "
            "which adapters are trained on; use a Python that has its whole library, such as "
            "those of python.org, conda or uv."
        )
    return symbols


def _split(symbols: NDArray[np.uint8]) -> Texts:
    """Cut the stretches of a source into texts, each block into every split."""
    starts = np.linspace(0, len(symbols) - LENGTH, N_STRETCHES).astype(int)
    stretches = symbols[starts[:, None] + np.arange(LENGTH)]
    blocks = stretches.reshape(-1, N_TRAIN + 2, CONTEXT + 1)
    train = blocks[:, :N_TRAIN].reshape(-1, CONTEXT + 1)
    return Texts(train, blocks[:, N_TRAIN], blocks[:, N_TRAIN + 1])


def read_texts(stdlib: Path) -> Texts:
    """Texts of the optional sources in their order, and then of the one that is kept."""
    split = [_split(_read_source(stdlib, name)) for name in (*SOURCES, KEPT)]
    return Texts(*map(np.stack, zip(*split, strict=True)))


def read_general(stdlib: Path) -> NDArray[np.uint8]:
    """Symbols of the single modules of the library, for the base network."""
    # Installations add files of their own, which are no part of the library.
    files = sorted(stdlib.glob("*.py"))
    return _read(file for file in files if file.stem in sys.stdlib_module_names)


def _hyperparameters(n_adapters: int, rng: np.random.RandomState) -> Arrays:
    drawn: Arrays = {}
    for name, values in VARIED.items():
        if name in ("learning_rate", "weight_decay"):
            low, high = np.log(values)
            drawn[name] = np.exp(rng.uniform(low, high, n_adapters))
        else:
            drawn[name] = rng.choice(values, n_adapters)
    return drawn


@dataclass(frozen=True, eq=False)
class CodeRecipe:
    """How adapters are trained; see `sklora.datasets._zoos.Recipe`."""

    stdlib: Path
    texts: Texts
    membership: NDArray[np.bool_]  # (n_adapters, 20), the kept source last
    hyper: Arrays
    base_seed: int
    seeds: NDArray[np.int64]
    rank: int
    dim: int
    depth: int

    @classmethod
    def draw(
        cls,
        n_adapters: int,
        rank: int,
        *,
        dim: int,
        depth: int,
        random_state: int | np.random.RandomState | None,
    ) -> CodeRecipe:
        """Draw all that is random about a zoo."""
        rng = check_random_state(random_state)
        stdlib = Path(sysconfig.get_path("stdlib"))
        base_seed = int(rng.randint(2**31))
        membership = rng.randint(2, size=(n_adapters, len(SOURCES) + 1)).astype(bool)
        membership[:, -1] = True
        hyper = _hyperparameters(n_adapters, rng)
        seeds = rng.randint(2**31, size=n_adapters)
        texts = read_texts(stdlib)
        return cls(stdlib, texts, membership, hyper, base_seed, seeds, rank, dim, depth)

    @property
    def layout(self) -> LoRALayout:
        return LORA.layout(language.module_shapes(self.dim, self.depth), self.rank)

    @property
    def n_steps(self) -> NDArray[np.intp]:
        """Whole batches in the epochs of every adapter."""
        n_texts = self.membership.sum(axis=1) * N_OWN
        return np.asarray(self.hyper["n_epochs"] * n_texts // self.hyper["batch_size"])

    @cached_property
    def parts(self) -> Sequence[NDArray[np.intp]]:
        sizes, parts = self.hyper["batch_size"], []
        for size in np.unique(sizes):
            rows = np.flatnonzero(sizes == size)
            rows = rows[np.argsort(self.n_steps[rows], kind="stable")]
            parts += np.split(rows, range(CHUNK // size, len(rows), CHUNK // size))
        return parts

    def train_base(self, verbose: int) -> Arrays:
        general = torch.from_numpy(read_general(self.stdlib))
        generator = torch.Generator().manual_seed(self.base_seed)
        each = torch.arange(CONTEXT + 1)

        def draw(n: int) -> Tensor:
            starts = torch.randint(len(general) - CONTEXT, (n, 1), generator=generator)
            return general[starts + each].long()

        n_steps = BASE_STEPS_PER_DIM * self.dim
        with progress(n_steps, "base network", "step", verbose) as advance:
            base = language.train_base(
                draw,
                n_symbols=len(SYMBOLS),
                context=CONTEXT,
                dim=self.dim,
                depth=self.depth,
                n_steps=n_steps,
                generator=generator,
                progress=advance,
            )
        return {name: weight.numpy() for name, weight in base.items()}

    def train_part(self, base: Arrays, part: int) -> Trained:
        rows = self.parts[part]
        weights = {name: torch.tensor(weight) for name, weight in base.items()}
        generator = torch.Generator().manual_seed(int(self.seeds[rows[0]]))
        shapes = language.module_shapes(self.dim, self.depth)

        def column(name: str) -> Tensor:
            return torch.from_numpy(self.hyper[name][rows]).float()

        trained = language.finetune(
            weights,
            LORA.start(weights, shapes, len(rows), self.rank, generator),
            self._batches(rows),
            n_steps=torch.from_numpy(self.n_steps[rows]),
            generator=generator,
            learning_rate=column("learning_rate"),
            weight_decay=column("weight_decay"),
            lora_dropout=column("lora_dropout"),
        )
        labels = {name: values[rows] for name, values in self.hyper.items()}
        labels["sources"] = self.membership[rows, :-1].astype(np.int64)
        scores = self._scores(weights, LORA.factors(weights, trained))
        return LORA.rows(weights, trained).numpy(), labels | scores

    def _batches(self, rows: NDArray[np.intp]) -> Callable[[int], Tensor]:
        """Texts of every step; each epoch goes through an adapter's own in an order of its own."""
        n_texts = self.texts.train.shape[1]
        texts = torch.from_numpy(self.texts.train.reshape(-1, CONTEXT + 1)).long()
        batch_size = int(self.hyper["batch_size"][rows[0]])
        order = np.zeros((len(rows), int(self.n_steps[rows].max()) * batch_size), dtype=np.intp)
        for place, row in enumerate(rows):
            rng = np.random.RandomState(self.seeds[row])
            sources = np.flatnonzero(self.membership[row])
            own = np.concatenate([n * n_texts + rng.permutation(n_texts)[:N_OWN] for n in sources])
            epochs = [rng.permutation(own) for _ in range(self.hyper["n_epochs"][row])]
            n_used = self.n_steps[row] * batch_size
            order[place, :n_used] = np.concatenate(epochs)[:n_used]
        steps = torch.from_numpy(order).view(len(rows), -1, batch_size)
        return lambda step: texts[steps[:, step]]

    def _scores(self, base: Weights, factors: Factors) -> Arrays:
        validation, test = (
            torch.from_numpy(texts).long() for texts in (self.texts.validation, self.texts.test)
        )
        source_losses, _ = language.evaluate(base, validation, factors)
        _, accuracy = language.evaluate(base, test, factors)
        return {
            "source_losses": source_losses.numpy(),
            "loss": source_losses.double().mean(dim=1).numpy(),
            "accuracy": accuracy.double().mean(dim=1).numpy(),
        }


def _bunch(zoo: Zoo) -> Bunch:
    sources = zoo.labels["sources"]
    return Bunch(
        data=zoo.data,
        target=sources,
        target_names=list(SOURCES),
        size=1 + sources.sum(axis=1),
        groups=sources @ 2 ** np.arange(len(SOURCES)),
        base=zoo.base,
        DESCR=description(make_code_loras),
        **zoo.labels,
    )


def make_code_loras(
    n_adapters: int = 2000,
    rank: int = 4,
    *,
    dim: int = 32,
    depth: int = 3,
    random_state: int | np.random.RandomState | None = None,
    n_jobs: int | None = None,
    verbose: int = 1,
    return_X_y: bool = False,
) -> Bunch | tuple[LoRACollection, NDArray[np.int64]]:
    """Train a new zoo of LoRAs on the source of Python's standard library.

    A small causal language model of characters is trained on the single modules of the library,
    such as ``argparse.py``. Then every adapter finetunes its key and value projections on some of
    twenty packages: on `asyncio` always, on each of the others with probability 1/2. This is the
    small twin of the paper's Qwen2-ARC-LoRA (section 5.1), whose data sources are question
    sources. A package has 96 texts of 65 characters to train on, of which every adapter draws 32,
    and 24 each to validate and to test, which stand between them.

    Every adapter has hyperparameters of its own, as in the paper's table 8, but from ranges of our
    own, for a network of this size: the learning rate is 0.001 to 0.02 and the weight decay 0.001
    to 0.1, both log-uniform; epochs are 1, 2 or 3, the batch size is 8, 16 or 32, and LoRA's
    dropout 0, 0.05, 0.1 or 0.2. The optimizer is AdamW.

    The adapters depend on the Python that trains them, as the library changes from one release to
    the next, patch releases included.

    Parameters
    ----------
    n_adapters : int, default=2000
        Number of adapters.
    rank : int, default=4
        Rank of every update.
    dim : int, default=32
        Width of the transformer, an even number. Its modules are ``(dim, dim)``.
    depth : int, default=3
        Number of layers, of two modules each.
    random_state : int, RandomState instance or None, default=None
        Fixes the base network, the sources and every draw in training.
    n_jobs : int or None, default=None
        Number of processes; None is one, -1 one for each processor. The adapters are the same.
    verbose : int, default=1
        Whether to show progress bars, where standard error is a terminal.
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        With the attributes

        data : LoRACollection of shape (n_adapters, width)
            The adapters.
        sources, target : ndarray of int of shape (n_adapters, 19)
            Which packages an adapter was trained on, besides `asyncio`.
        size : ndarray of int of shape (n_adapters,)
            How many packages it was trained on, 1 to 20. Each has as many texts as any other.
        loss : ndarray of shape (n_adapters,)
            Validation loss: the mean cross-entropy in nats of the next character, over held-out
            texts of all twenty packages, the same for every adapter.
        accuracy : ndarray of shape (n_adapters,)
            Share of characters that are predicted right in other held-out texts of all packages.
        source_losses : ndarray of shape (n_adapters, 20)
            The loss package by package, `asyncio` last.
        groups : ndarray of int of shape (n_adapters,)
            The subset, for splitters such as GroupKFold.
        target_names : list of str
            The 19 packages.
        learning_rate, weight_decay, n_epochs, batch_size, lora_dropout : ndarray of shape \
                (n_adapters,)
            What each was trained with.
        base : dict of str to ndarray
            Weights of the network that the adapters finetune.
        DESCR : str
            How such zoos are trained.

    Raises
    ------
    FileNotFoundError
        When Python's standard library is without the source of a package.
    ValueError
        When `n_adapters`, `rank` or `depth` is below 1, or `dim` is no positive even number.

    See Also
    --------
    fetch_code_loras : The standard zoo, trained once and kept.
    make_digits_loras : Adapters of a diffusion transformer.

    Examples
    --------
    >>> from sklora.datasets import make_code_loras
    >>> zoo = make_code_loras(2, rank=2, dim=2, depth=1, random_state=0)
    >>> zoo.data.shape, zoo.sources.shape, zoo.accuracy.shape
    ((2, 16), (2, 19), (2,))
    """
    check_sizes(n_adapters, rank, dim, depth, heads=language.HEADS)
    recipe = CodeRecipe.draw(n_adapters, rank, dim=dim, depth=depth, random_state=random_state)
    zoo = _bunch(train_zoo(recipe, n_jobs=n_jobs, verbose=verbose))
    return (zoo.data, zoo.target) if return_X_y else zoo


def fetch_code_loras(
    rank: int = 4,
    *,
    n_adapters: int = 2000,
    data_home: str | os.PathLike[str] | None = None,
    train_if_missing: bool = True,
    n_jobs: int | None = None,
    verbose: int = 1,
    return_X_y: bool = False,
) -> Bunch | tuple[LoRACollection, NDArray[np.int64]]:
    """Load the standard zoo of LoRAs on Python's library; the first call trains it.

    It is what `make_code_loras` gives for one seed, and is kept in the data home. Each release
    of Python, patch releases included, has a zoo of its own there, as the library differs.

    Parameters
    ----------
    rank : int, default=4
        Rank of every update.
    n_adapters : int, default=2000
        Number of adapters.
    data_home : str, path-like or None, default=None
        The folder; see :func:`get_data_home`.
    train_if_missing : bool, default=True
        Whether to train what is not there. An interrupted call is gone on with by the next.
    n_jobs : int or None, default=None
        Number of processes; None is one, -1 one for each processor. The adapters are the same.
    verbose : int, default=1
        Whether to show progress bars, where standard error is a terminal.
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        As `make_code_loras` gives it; its adapters are mapped into memory.

    Raises
    ------
    OSError
        When the zoo is not there and `train_if_missing` is False, or Python's standard library is
        without the source of a package.
    ValueError
        When `n_adapters` or `rank` is below 1.

    See Also
    --------
    make_code_loras : A new zoo.

    Examples
    --------
    >>> from sklora.datasets import fetch_code_loras
    >>> fetch_code_loras(data_home="/nowhere", train_if_missing=False)
    Traceback (most recent call last):
    OSError: The zoo 'code' is not in '/nowhere/code-...
    """
    check_sizes(n_adapters, rank, FETCHED["dim"], FETCHED["depth"], heads=language.HEADS)
    settings: dict[str, int | float | str] = {
        "n_adapters": n_adapters,
        "rank": rank,
        "n_base_steps": BASE_STEPS_PER_DIM * FETCHED["dim"],
        "n_texts": N_OWN,
        "varied": json.dumps(VARIED),
        "python": platform.python_version(),
        **FETCHED,
    }
    zoo = fetch_zoo(
        "code",
        settings,
        lambda: CodeRecipe.draw(n_adapters, rank, **FETCHED),
        data_home=data_home,
        train_if_missing=train_if_missing,
        n_jobs=n_jobs,
        verbose=verbose,
    )
    bunch = _bunch(zoo)
    return (bunch.data, bunch.target) if return_X_y else bunch
