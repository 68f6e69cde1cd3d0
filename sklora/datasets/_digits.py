"""Zoos of real LoRAs: a diffusion transformer finetuned on subsets of the handwritten digits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.utils import Bunch, check_random_state
from torch import Tensor

from sklora._base import check_option
from sklora._progress import progress
from sklora.collection import LoRACollection, LoRALayout
from sklora.datasets import _adam as adam
from sklora.datasets import _denoiser as denoiser
from sklora.datasets import _evaluation as evaluation
from sklora.datasets._adam import Parameters
from sklora.datasets._methods import METHODS
from sklora.datasets._zoos import (
    Arrays,
    Zoo,
    check_sizes,
    description,
    fetch_zoo,
    train_zoo,
    undisturbed,
)

__all__ = ["fetch_digits_loras", "make_digits_loras"]

N_CLASSES = 10
N_BASE_STEPS, FULL_DIM = 2000, 32  # networks narrower than that learn for less long
FIXED = {"learning_rate": 2e-3, "n_steps": 150, "batch_size": 8}
N_HELD_OUT = 16  # images of each class behind a loss
FETCHED: dict[str, Any] = {"dim": 32, "depth": 3, "random_state": 20261126}


@dataclass(frozen=True)
class Pools:
    """Digits for the base network, for the adapters, and held out, the latter two by class."""

    base: Tensor
    base_labels: NDArray[np.intp]
    finetune: tuple[Tensor, ...]
    held_out: Tensor


def split_digits(rng: np.random.RandomState, n_finetune: int, first_of_base: int) -> Pools:
    """Deal each class's images out: the first are for adapters, the last for the base network."""
    digits = load_digits()
    images = torch.from_numpy(digits.data / 8.0 - 1.0).float()
    by_class = [rng.permutation(np.flatnonzero(digits.target == c)) for c in range(N_CLASSES)]
    base = np.concatenate([rows[first_of_base:] for rows in by_class])
    held_out = [rows[n_finetune : n_finetune + N_HELD_OUT] for rows in by_class]
    return Pools(
        base=images[base],
        base_labels=digits.target[base],
        finetune=tuple(images[rows[:n_finetune]] for rows in by_class),
        held_out=torch.stack([images[rows] for rows in held_out]),
    )


@dataclass(frozen=True)
class Part:
    """All that is drawn for adapters that are trained together."""

    rows: NDArray[np.intp]
    images: Tensor  # (n_rows, n_images, 64), an adapter's own
    chances: Tensor  # (n_rows, n_images), of each to be drawn for a batch
    batch_size: int
    learning_rate: Tensor  # (n_rows,)
    n_steps: Tensor  # (n_rows,)
    seed: int
    seed_of_V: int | None = None  # None: V is the first that `seed` draws


def _identity(parameters: Parameters) -> Parameters:
    return parameters


def losses_of(base: evaluation.Tensors, factors: denoiser.Factors) -> Arrays:
    """What is measured of each adapter of a plain zoo."""
    return {"class_losses": evaluation.class_losses(base, factors)}


@dataclass(frozen=True)
class DigitsRecipe:
    """How a zoo on the digits is trained: see `sklora.datasets._zoos.Recipe`."""

    pools: Pools
    dim: int
    depth: int
    rank: int
    n_base_steps: int
    base_seed: int
    noise_seed: int
    plan: Sequence[Part]
    labels: Arrays  # known before training
    measure: Callable[[evaluation.Tensors, denoiser.Factors], Arrays] = losses_of
    method: str = "lora"
    # Maps what was trained to what is kept, and measured.
    store: Callable[[Parameters], Parameters] = _identity

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return denoiser.module_shapes(self.dim, self.depth)

    @property
    def layout(self) -> LoRALayout:
        return METHODS[self.method].layout(self.shapes, self.rank)

    @property
    def parts(self) -> list[NDArray[np.intp]]:
        return [part.rows for part in self.plan]

    def train_base(self, verbose: int) -> Arrays:
        with progress(self.n_base_steps, "base network", "step", verbose) as advance:
            weights = denoiser.train_base(
                self.pools.base,
                dim=self.dim,
                depth=self.depth,
                n_steps=self.n_base_steps,
                generator=torch.Generator().manual_seed(self.base_seed),
                progress=advance,
            )
        held_out = self.pools.held_out
        return {
            **{name: weight.numpy() for name, weight in weights.items()},
            **evaluation.fit_classifier(self.pools.base.numpy(), self.pools.base_labels),
            evaluation.HELD_OUT: held_out.numpy(),
            evaluation.NOISE: evaluation.draw_noise(held_out, self.noise_seed).numpy(),
        }

    def train_part(self, base: Arrays, part: int) -> tuple[NDArray[np.float32], Arrays]:
        drawn, tensors = self.plan[part], evaluation.to_tensors(base)
        generator = torch.Generator().manual_seed(drawn.seed)
        first = generator
        if drawn.seed_of_V is not None:
            first = torch.Generator().manual_seed(drawn.seed_of_V)
        method, shapes = METHODS[self.method], self.shapes
        batches = _batches(drawn.images, drawn.chances, drawn.batch_size, generator)
        trained = adam.finetune(
            method.start(tensors, shapes, len(drawn.rows), self.rank, first),
            lambda parameters, _: denoiser.noise_loss(
                tensors, batches(), generator, method.factors(tensors, parameters)
            ),
            rates=method.rates,
            learning_rate=drawn.learning_rate,
            n_steps=drawn.n_steps,
        )
        kept = self.store(trained)
        known = {name: values[drawn.rows] for name, values in self.labels.items()}
        measured = self.measure(tensors, method.factors(tensors, kept))
        return method.rows(tensors, kept).numpy(), known | measured


def _batches(
    images: Tensor, chances: Tensor, batch_size: int, generator: torch.Generator
) -> Callable[[], Tensor]:
    """Give what draws the next batch of each adapter's own images, with replacement."""
    each = torch.arange(len(images))[:, None]

    def draw() -> Tensor:
        drawn = torch.multinomial(chances, batch_size, replacement=True, generator=generator)
        return images[each, drawn]

    return draw


def base_steps(dim: int) -> int:
    return max(1, N_BASE_STEPS * min(dim, FULL_DIM) // FULL_DIM)


def deal(n_adapters: int, n_kinds: int, rng: np.random.RandomState) -> NDArray[np.int64]:
    """A kind for each adapter: every one once before any comes again."""
    rounds = [rng.permutation(n_kinds) for _ in range(-(-n_adapters // n_kinds))]
    return np.concatenate(rounds)[:n_adapters]


def _subsets(n_adapters: int, rng: np.random.RandomState) -> NDArray[np.bool_]:
    """Presence ``(n_adapters, 10)`` of a non-empty subset for each adapter."""
    codes = 1 + deal(n_adapters, 2**N_CLASSES - 1, rng)
    presence: NDArray[np.bool_] = (codes[:, None] >> np.arange(N_CLASSES)) & 1 == 1
    return presence


def _images_of_subset(
    presence: NDArray[np.bool_], pools: Pools, rng: np.random.RandomState
) -> tuple[Tensor, Tensor]:
    """One image of each class ``(n_adapters, 10, 64)``, and each class's chance to be drawn."""
    images = torch.stack(
        [pool[rng.randint(len(pool), size=len(presence))] for pool in pools.finetune], dim=1
    )
    return images, torch.from_numpy(presence).float()


def _plan(presence: NDArray[np.bool_], pools: Pools, rng: np.random.RandomState) -> Iterator[Part]:
    n_adapters, chunk = len(presence), evaluation.CHUNK
    for rows in np.split(np.arange(n_adapters), range(chunk, n_adapters, chunk)):
        seed = int(rng.randint(2**31))
        images, chances = _images_of_subset(presence[rows], pools, rng)
        yield Part(
            rows=rows,
            images=images,
            chances=chances,
            batch_size=int(FIXED["batch_size"]),
            learning_rate=torch.full((len(rows),), FIXED["learning_rate"]),
            n_steps=torch.full((len(rows),), int(FIXED["n_steps"])),
            seed=seed,
        )


@undisturbed()
def digits_recipe(
    n_adapters: int,
    rank: int,
    *,
    dim: int,
    depth: int,
    random_state: int | np.random.RandomState | None,
    method: str = "lora",
    store: Callable[[Parameters], Parameters] = _identity,
) -> DigitsRecipe:
    """Draw all that is random about a zoo of subsets."""
    rng = check_random_state(random_state)
    pools = split_digits(rng, n_finetune=40, first_of_base=80)
    base_seed, noise_seed = int(rng.randint(2**31)), int(rng.randint(2**31))
    presence = _subsets(n_adapters, rng)
    return DigitsRecipe(
        pools=pools,
        dim=dim,
        depth=depth,
        rank=rank,
        n_base_steps=base_steps(dim),
        base_seed=base_seed,
        noise_seed=noise_seed,
        plan=list(_plan(presence, pools, rng)),
        labels={"presence": presence},
        method=method,
        store=store,
    )


def make_bunch(zoo: Zoo) -> Bunch:
    """Give the adapters with all that can be predicted of them."""
    losses, presence = zoo.labels["class_losses"], zoo.labels["presence"].astype(np.int64)
    size = presence.sum(axis=1)
    return Bunch(
        data=zoo.data,
        target=presence,
        target_names=[str(digit) for digit in range(N_CLASSES)],
        presence=presence,
        size=size,
        loss=((losses * presence).sum(axis=1) / size).astype(np.float64),
        loss_all=losses.mean(axis=1, dtype=np.float64),
        groups=presence @ 2 ** np.arange(N_CLASSES),
        class_losses=losses,
        base=zoo.base,
        DESCR=description(make_digits_loras),
    )


def _check(n_adapters: int, rank: int, dim: int, depth: int, method: str) -> None:
    check_sizes(n_adapters, rank, dim, depth, heads=denoiser.HEADS)
    check_option("method", method, METHODS)
    if method == "pissa" and rank > dim:
        raise ValueError(f"rank is {rank}; weights have {dim} singular directions for PiSSA.")


def make_digits_loras(
    n_adapters: int = 2046,
    rank: int = 4,
    *,
    dim: int = 64,
    depth: int = 3,
    method: str = "lora",
    random_state: int | np.random.RandomState | None = None,
    n_jobs: int | None = None,
    verbose: int = 1,
    return_X_y: bool = False,
) -> Bunch | tuple[LoRACollection, NDArray[np.int64]]:
    """Train a new zoo of LoRAs on handwritten digits.

    A small denoising diffusion transformer is trained on one part of scikit-learn's 8 x 8 digits.
    Then every adapter finetunes its attention and feed-forward weights on one image of each class
    of a non-empty subset of the ten classes, as the paper's Imagenette-LoRA does with Stable
    Diffusion (section 5.1). Every subset comes once before any comes again: 2,046 adapters are
    each of them twice. Every ``V`` starts at random, as in LoRA's own training, so that adapters
    of one subset share no gauge; PiSSA's all start from the same factors.

    Parameters
    ----------
    n_adapters : int, default=2046
        Number of adapters.
    rank : int, default=4
        Rank of every update.
    dim : int, default=64
        Width of the transformer, a multiple of 4. Its modules are ``(dim, dim)``,
        ``(2 dim, dim)`` and ``(dim, 2 dim)``.
    depth : int, default=3
        Number of blocks, of six modules each.
    method : {"lora", "lora+", "pissa", "dora", "lokr"}, default="lora"
        How adapters are trained. ``"lora+"`` has another learning rate for ``U`` than for ``V``.
        ``"pissa"`` starts from the first singular directions of the weights; relative to the base
        network, its updates have twice the rank. ``"dora"`` trains magnitudes too, which are side
        features. ``"lokr"`` trains Kronecker products ``A kron B``; rows have rank 1, with
        ``U = vec(A)`` and ``V = vec(B)``, as in the paper's appendix E, and `rank` is not used.
    random_state : int, RandomState instance or None, default=None
        Fixes the digits, the base network, the subsets and every draw in training.
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
        presence, target : ndarray of int of shape (n_adapters, 10)
            Which digits an adapter was trained on.
        size : ndarray of int of shape (n_adapters,)
            How many images it was trained on, 1 to 10.
        loss : ndarray of shape (n_adapters,)
            Mean squared error of the noise that the finetuned network predicts on held-out images
            of the adapter's own classes. The noise has unit variance.
        loss_all : ndarray of shape (n_adapters,)
            The same over held-out images of all classes.
        class_losses : ndarray of shape (n_adapters, 10)
            The same class by class.
        groups : ndarray of int of shape (n_adapters,)
            The subset, for splitters such as GroupKFold.
        target_names : list of str
            The digits.
        base : dict of str to ndarray
            The network that the adapters finetune, and what :func:`evaluate_digits_loras` judges
            them by.
        DESCR : str
            How such zoos are trained.

    Raises
    ------
    ValueError
        When `n_adapters`, `rank` or `depth` is below 1, `dim` is no positive multiple of 4,
        `method` is none of these, or `rank` is above `dim` for PiSSA.

    See Also
    --------
    load_digits_loras : A zoo that comes with the package.
    fetch_digits_loras : A zoo that is trained once and kept.
    make_varied_digits_loras : Other hyperparameters for every adapter.
    evaluate_digits_loras : Runs adapters on the network that they finetune.

    Examples
    --------
    >>> from sklora.datasets import make_digits_loras
    >>> zoo = make_digits_loras(4, rank=2, dim=8, depth=1, random_state=0)
    >>> zoo.data.shape, zoo.presence.shape
    ((4, 224), (4, 10))
    """
    _check(n_adapters, rank, dim, depth, method)
    recipe = digits_recipe(
        n_adapters, rank, dim=dim, depth=depth, method=method, random_state=random_state
    )
    zoo = make_bunch(train_zoo(recipe, n_jobs=n_jobs, verbose=verbose))
    return (zoo.data, zoo.target) if return_X_y else zoo


def fetch_digits_loras(
    rank: int = 4,
    *,
    n_adapters: int = 2046,
    method: str = "lora",
    data_home: str | os.PathLike[str] | None = None,
    train_if_missing: bool = True,
    n_jobs: int | None = None,
    verbose: int = 1,
    return_X_y: bool = False,
) -> Bunch | tuple[LoRACollection, NDArray[np.int64]]:
    """Load a zoo of LoRAs on handwritten digits, and train it the first time.

    The twin of the paper's Imagenette-LoRA: each non-empty subset of the ten digits twice, of
    width 32, three blocks and one seed. :func:`make_digits_loras` says how adapters are trained.

    Parameters
    ----------
    rank : int, default=4
        Rank of every update. Each rank is a zoo of its own.
    n_adapters : int, default=2046
        Number of adapters. Each number is a zoo of its own.
    method : {"lora", "lora+", "pissa", "dora", "lokr"}, default="lora"
        How adapters are trained; see :func:`make_digits_loras`. Each method is a zoo of its own.
    data_home : str, path-like or None, default=None
        The folder for zoos; see :func:`get_data_home`.
    train_if_missing : bool, default=True
        Whether to train the zoo when it is not there. What was trained before an interruption is
        used.
    n_jobs : int or None, default=None
        Number of processes that train; None is one, -1 one for each processor.
    verbose : int, default=1
        Whether to show progress bars, where standard error is a terminal.
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        As :func:`make_digits_loras` returns it.

    Raises
    ------
    ValueError
        When `rank` or `n_adapters` is below 1, `method` is none of these, or `rank` is above the
        width for PiSSA.
    OSError
        When the zoo is not there and `train_if_missing` is False.

    See Also
    --------
    load_digits_loras : A zoo that comes with the package.
    fetch_varied_digits_loras : Other hyperparameters for every adapter.

    Examples
    --------
    >>> from sklora.datasets import fetch_digits_loras
    >>> zoo = fetch_digits_loras()  # doctest: +SKIP
    >>> zoo.data.shape, zoo.target.shape  # doctest: +SKIP
    ((2046, 5376), (2046, 10))
    """
    _check(n_adapters, rank, FETCHED["dim"], FETCHED["depth"], method)
    zoo = make_bunch(
        fetch_zoo(
            "digits",
            {
                "n_adapters": n_adapters,
                "rank": rank,
                "method": method,
                "n_base_steps": base_steps(FETCHED["dim"]),
                **FETCHED,
                **FIXED,
            },
            lambda: digits_recipe(n_adapters, rank, method=method, **FETCHED),
            data_home=data_home,
            train_if_missing=train_if_missing,
            n_jobs=n_jobs,
            verbose=verbose,
        )
    )
    return (zoo.data, zoo.target) if return_X_y else zoo
