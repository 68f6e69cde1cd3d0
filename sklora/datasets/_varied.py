"""Zoos of real LoRAs, each on a few like images of one digit, with hyperparameters of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.utils import Bunch, check_random_state

from sklora.collection import LoRACollection
from sklora.datasets import _denoiser as denoiser
from sklora.datasets import _digits, _evaluation
from sklora.datasets._attributes import ATTRIBUTES, describe
from sklora.datasets._digits import FETCHED
from sklora.datasets._zoos import (
    Arrays,
    Zoo,
    check_sizes,
    description,
    fetch_zoo,
    train_zoo,
    undisturbed,
)

__all__ = ["fetch_varied_digits_loras", "make_varied_digits_loras"]

N_IMAGES = 4  # of an identity
N_FINETUNE = 80  # images of each digit, which make 20 identities
VARIED = {
    "learning_rate": (1e-3, 1e-2),
    "n_steps": (50, 100, 150, 200),
    "batch_size": (4, 8, 16),
}


@dataclass(frozen=True)
class Identities:
    """Images of one digit that look alike, as photos of one person do; no two share an image."""

    images: NDArray[np.float32]  # (n_identities, N_IMAGES, 64), from -1 to 1
    digit: NDArray[np.int64]
    attributes: NDArray[np.int64]  # (n_identities, 5), 0 or 1


def _alike(images: NDArray[Any]) -> Iterator[NDArray[np.intp]]:
    """Cut images into fours: what is most unlike the rest, and the nearest to it."""
    distances, left = cdist(images, images), np.arange(len(images))
    while len(left):
        anchor = left[distances[np.ix_(left, left)].sum(axis=1).argmax()]
        near = left[np.argsort(distances[anchor, left], kind="stable")[:N_IMAGES]]
        yield near
        left = np.setdiff1d(left, near)


def _identities(pools: _digits.Pools) -> Identities:
    of_digit = [pool.numpy() for pool in pools.finetune]
    images = np.stack([images[rows] for images in of_digit for rows in _alike(images)])
    ink = (images.reshape(-1, denoiser.SIDE, denoiser.SIDE) + 1) / 2
    described = np.array([describe(image) for image in ink])
    values = described.reshape(len(images), N_IMAGES, -1).mean(axis=1)
    # Halves have an attribute each, but for the loop: most of the images have one, or have none.
    thresholds = np.median(values, axis=0)
    thresholds[ATTRIBUTES.index("loop")] = 0.5
    return Identities(
        images=images,
        digit=np.repeat(np.arange(_digits.N_CLASSES), N_FINETUNE // N_IMAGES),
        attributes=(values > thresholds).astype(np.int64),
    )


def _hyperparameters(n_adapters: int, rng: np.random.RandomState) -> Arrays:
    learning_rate, *others = rng.uniform(size=(n_adapters, len(VARIED))).T
    low, high = np.log(VARIED["learning_rate"])
    drawn = {"learning_rate": np.exp(low + (high - low) * learning_rate)}
    for name, places in zip(("n_steps", "batch_size"), others, strict=True):
        values = np.array(VARIED[name])
        drawn[name] = values[(places * len(values)).astype(np.intp)]
    return drawn


def _chunks(hyper: Arrays) -> Iterator[NDArray[np.intp]]:
    """Rows to train together: of one batch size, with numbers of steps as alike as can be."""
    order = np.lexsort((hyper["n_steps"], hyper["batch_size"]))
    sizes, chunk = hyper["batch_size"][order], _evaluation.CHUNK
    for rows in np.split(order, np.flatnonzero(np.diff(sizes)) + 1):
        yield from np.split(rows, range(chunk, len(rows), chunk))


def _plan(
    images: NDArray[np.float32], hyper: Arrays, rng: np.random.RandomState
) -> Iterator[_digits.Part]:
    for rows in _chunks(hyper):
        # Of two seeds, so that training draws the same images and noise at every rank.
        seed, seed_of_V = rng.randint(2**31, size=2)
        yield _digits.Part(
            rows=rows,
            images=torch.from_numpy(images[rows]),
            chances=torch.ones(len(rows), N_IMAGES),
            batch_size=int(hyper["batch_size"][rows[0]]),
            learning_rate=torch.from_numpy(hyper["learning_rate"][rows]).float(),
            n_steps=torch.from_numpy(hyper["n_steps"][rows]),
            seed=int(seed),
            seed_of_V=int(seed_of_V),
        )


def measure(base: _evaluation.Tensors, factors: denoiser.Factors) -> Arrays:
    samples = _evaluation.draw_samples(base, factors)
    return {
        "class_losses": _evaluation.class_losses(base, factors),
        "class_probabilities": _evaluation.class_probabilities(base, samples),
    }


@undisturbed()
def varied_recipe(
    n_adapters: int,
    rank: int,
    *,
    dim: int,
    depth: int,
    random_state: int | np.random.RandomState | None,
) -> _digits.DigitsRecipe:
    """Draw all that is random about a zoo of identities: the same at every rank, but for V.

    A smaller zoo has the first identities and hyperparameters of a larger.
    """
    rng = check_random_state(random_state)
    pools = _digits.split_digits(
        rng, n_finetune=N_FINETUNE, first_of_base=N_FINETUNE + _digits.N_HELD_OUT
    )
    base_seed, noise_seed = int(rng.randint(2**31)), int(rng.randint(2**31))
    identities = _identities(pools)
    groups_seed, hyper_seed = rng.randint(2**31, size=2)
    groups = _digits.deal(n_adapters, len(identities.digit), np.random.RandomState(groups_seed))
    hyper = _hyperparameters(n_adapters, np.random.RandomState(hyper_seed))
    return _digits.DigitsRecipe(
        pools=pools,
        dim=dim,
        depth=depth,
        rank=rank,
        n_base_steps=_digits.base_steps(dim),
        base_seed=base_seed,
        noise_seed=noise_seed,
        plan=list(_plan(identities.images[groups], hyper, rng)),
        labels={
            "groups": groups,
            "digit": identities.digit[groups],
            "attributes": identities.attributes[groups],
            **hyper,
        },
        measure=measure,
    )


def make_bunch(zoo: Zoo) -> Bunch:
    """Give the adapters with all that can be predicted of them."""
    labels, each = zoo.labels, np.arange(len(zoo.data))
    digit = labels["digit"]
    return Bunch(
        data=zoo.data,
        target=labels["attributes"],
        target_names=list(ATTRIBUTES),
        score=labels["class_probabilities"][each, digit].astype(np.float64),
        loss=labels["class_losses"][each, digit].astype(np.float64),
        base=zoo.base,
        DESCR=description(make_varied_digits_loras),
        **labels,
    )


def make_varied_digits_loras(
    n_adapters: int = 3900,
    rank: int = 4,
    *,
    dim: int = 32,
    depth: int = 3,
    random_state: int | np.random.RandomState | None = None,
    n_jobs: int | None = None,
    verbose: int = 1,
    return_X_y: bool = False,
) -> Bunch | tuple[LoRACollection, NDArray[np.int64]]:
    """Train a new zoo of LoRAs on images of one digit each, with sampled hyperparameters.

    The twin of the paper's CelebA-LoRA (section 5.1), where an adapter learns the face of one
    person. Here, an identity is four images of one digit that look alike. There are 200 of them, 20
    of each digit, and no two share an image. Every identity comes once before any comes again, each
    time with another learning rate (log-uniform from 1e-3 to 1e-2), number of steps (50, 100, 150
    or 200), batch size (4, 8 or 16) and start.

    For one `random_state`, networks, identities, hyperparameters and all noise in training are the
    same at every rank, so that ranks compare. A smaller zoo has the identities and hyperparameters
    of the first adapters of a larger, but other noise.

    Parameters
    ----------
    n_adapters : int, default=3900
        Number of adapters.
    rank : int, default=4
        Rank of every update.
    dim : int, default=32
        Width of the transformer, a multiple of 4, as for :func:`make_digits_loras`.
    depth : int, default=3
        Number of blocks, of six modules each.
    random_state : int, RandomState instance or None, default=None
        Fixes the digits, the base network, the identities, the hyperparameters and every draw in
        training.
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
        attributes, target : ndarray of int of shape (n_adapters, 5)
            What the images look like, 0 or 1. The first is whether most of the four have a hole;
            the others are whether their mean is above the median of the identities.
        target_names : list of str
            ``loop``, ``symmetric`` (ink that falls on ink in the mirror), ``thick`` (strokes),
            ``slanted`` (to the right), ``wide`` (for its height).
        digit : ndarray of int of shape (n_adapters,)
            What the images show.
        score : ndarray of shape (n_adapters,)
            How well samples of the finished network show the digit, 0 to 1: the chance that a
            classifier of real digits gives it, the mean over 33 samples. The twin of the paper's
            CLIP score; see :func:`evaluate_digits_loras`.
        class_probabilities : ndarray of shape (n_adapters, 10)
            The same for every digit.
        loss : ndarray of shape (n_adapters,)
            Mean squared error of the noise that the finished network predicts on held-out images of
            the digit. The noise has unit variance.
        class_losses : ndarray of shape (n_adapters, 10)
            The same for every digit.
        learning_rate, n_steps, batch_size : ndarray of shape (n_adapters,)
            The hyperparameters.
        groups : ndarray of int of shape (n_adapters,)
            The identity, for splitters such as GroupKFold.
        base : dict of str to ndarray
            The network that the adapters finetune, and what :func:`evaluate_digits_loras` judges
            them by.
        DESCR : str
            How such zoos are trained.

    Raises
    ------
    ValueError
        When `n_adapters`, `rank` or `depth` is below 1, or `dim` is no positive multiple of 4.

    See Also
    --------
    fetch_varied_digits_loras : A zoo that is trained once and kept.
    make_digits_loras : Adapters on several digits, all with the same hyperparameters.

    Examples
    --------
    >>> from sklora.datasets import make_varied_digits_loras
    >>> zoo = make_varied_digits_loras(3, rank=1, dim=8, depth=1, random_state=0)
    >>> zoo.data.shape, zoo.attributes.shape, zoo.score.shape
    ((3, 112), (3, 5), (3,))
    """
    check_sizes(n_adapters, rank, dim, depth, heads=denoiser.HEADS)
    recipe = varied_recipe(n_adapters, rank, dim=dim, depth=depth, random_state=random_state)
    zoo = make_bunch(train_zoo(recipe, n_jobs=n_jobs, verbose=verbose))
    return (zoo.data, zoo.target) if return_X_y else zoo


def fetch_varied_digits_loras(
    rank: int = 4,
    *,
    n_adapters: int = 3900,
    data_home: str | os.PathLike[str] | None = None,
    train_if_missing: bool = True,
    n_jobs: int | None = None,
    verbose: int = 1,
    return_X_y: bool = False,
) -> Bunch | tuple[LoRACollection, NDArray[np.int64]]:
    """Load a zoo of LoRAs on images of one digit each, and train it the first time.

    The twin of the paper's CelebA-LoRA, of width 32, three blocks and one seed.
    :func:`make_varied_digits_loras` says how adapters are trained.

    Parameters
    ----------
    rank : int, default=4
        Rank of every update. Each rank is a zoo of its own; zoos of as many adapters have
        everything else in common, others the identities and hyperparameters.
    n_adapters : int, default=3900
        Number of adapters. Each number is a zoo of its own.
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
        As :func:`make_varied_digits_loras` returns it.

    Raises
    ------
    ValueError
        When `rank` or `n_adapters` is below 1.
    OSError
        When the zoo is not there and `train_if_missing` is False.

    See Also
    --------
    fetch_digits_loras : Adapters on several digits, all with the same hyperparameters.

    Examples
    --------
    >>> from sklora.datasets import fetch_varied_digits_loras
    >>> zoo = fetch_varied_digits_loras()  # doctest: +SKIP
    >>> zoo.data.shape, zoo.target.shape  # doctest: +SKIP
    ((3900, 5376), (3900, 5))
    """
    check_sizes(n_adapters, rank, FETCHED["dim"], FETCHED["depth"], heads=denoiser.HEADS)
    zoo = make_bunch(
        fetch_zoo(
            "digits-varied",
            {
                "n_adapters": n_adapters,
                "rank": rank,
                "n_base_steps": _digits.base_steps(FETCHED["dim"]),
                **FETCHED,
                "varied": json.dumps(VARIED),
            },
            lambda: varied_recipe(n_adapters, rank, **FETCHED),
            data_home=data_home,
            train_if_missing=train_if_missing,
            n_jobs=n_jobs,
            verbose=verbose,
        )
    )
    return (zoo.data, zoo.target) if return_X_y else zoo
