"""Zoos of real LoRAs: a diffusion transformer finetuned on subsets of the handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.utils import Bunch, check_random_state
from sklearn.utils.validation import check_scalar
from torch import Tensor

from sklora._progress import progress
from sklora.collection import LoRACollection, LoRALayout
from sklora.datasets import _denoiser as denoiser

__all__ = ["make_digits_loras"]

N_CLASSES = 10
N_BASE_STEPS = 2000
CHUNK = 64  # adapters trained together; larger stacks gain nothing on a CPU
FIXED = {"learning_rate": 2e-3, "n_steps": 150, "batch_size": 8}
VARIED = {
    "learning_rate": (5e-4, 5e-3),
    "n_steps": (50, 100, 150, 200),
    "batch_size": (4, 8, 16),
}
N_HELD_OUT, N_NOISES = 16, 4  # images of each class, and noises of each, behind a loss


@dataclass(frozen=True)
class _Pools:
    """Digits for the base network, for the adapters, and held out, the latter two by class."""

    base: Tensor
    finetune: tuple[Tensor, ...]
    held_out: Tensor


def _split_digits(rng: np.random.RandomState) -> _Pools:
    digits = load_digits()
    images = torch.from_numpy(digits.data / 8.0 - 1.0).float()
    by_class = [rng.permutation(np.flatnonzero(digits.target == c)) for c in range(N_CLASSES)]
    return _Pools(
        base=images[np.concatenate([rows[80:] for rows in by_class])],
        finetune=tuple(images[rows[:40]] for rows in by_class),
        held_out=torch.stack([images[rows[40 : 40 + N_HELD_OUT]] for rows in by_class]),
    )


def _subsets(n_adapters: int, rng: np.random.RandomState) -> NDArray[np.bool_]:
    """Presence ``(n_adapters, 10)``: every non-empty subset once before any comes again."""
    n_subsets = 2**N_CLASSES - 1
    rounds = -(-n_adapters // n_subsets)
    codes = np.concatenate([1 + rng.permutation(n_subsets) for _ in range(rounds)])[:n_adapters]
    presence: NDArray[np.bool_] = (codes[:, None] >> np.arange(N_CLASSES)) & 1 == 1
    return presence


def _hyperparameters(
    n_adapters: int, varied: bool, rng: np.random.RandomState
) -> dict[str, NDArray[Any]]:
    if not varied:
        return {name: np.full(n_adapters, value) for name, value in FIXED.items()}
    low, high = np.log(VARIED["learning_rate"])
    return {
        "learning_rate": np.exp(rng.uniform(low, high, n_adapters)),
        "n_steps": rng.choice(VARIED["n_steps"], n_adapters),
        "batch_size": rng.choice(VARIED["batch_size"], n_adapters),
    }


def _chunks(hyper: dict[str, NDArray[Any]]) -> Iterator[NDArray[np.intp]]:
    """Rows to train together: of one batch size, with numbers of steps as alike as can be."""
    order = np.lexsort((hyper["n_steps"], hyper["batch_size"]))
    sizes = hyper["batch_size"][order]
    for rows in np.split(order, np.flatnonzero(np.diff(sizes)) + 1):
        yield from np.split(rows, range(CHUNK, len(rows), CHUNK))


def _images_of_subset(
    presence: NDArray[np.bool_], pools: _Pools, rng: np.random.RandomState
) -> tuple[Tensor, Tensor]:
    """One image of each class ``(n_adapters, 10, 64)``, and each class's chance to be drawn."""
    images = torch.stack(
        [pool[rng.randint(len(pool), size=len(presence))] for pool in pools.finetune], dim=1
    )
    return images, torch.from_numpy(presence).float()


@torch.no_grad()
def class_losses(
    base: denoiser.Weights, factors: denoiser.Factors, held_out: Tensor, seed: int
) -> NDArray[np.float32]:
    """Denoising loss of every adapter on each class's held-out images, ``(n_adapters, 10)``.

    Times are evenly spread and the noise is the same for all adapters, so that losses compare.
    """
    n_adapters = next(iter(factors.values()))[0].shape[0]
    generator = torch.Generator().manual_seed(seed)
    time = ((torch.arange(N_NOISES) + 0.5) / N_NOISES).repeat(held_out.shape[1])
    losses = []
    for images in held_out:
        clean = images.repeat_interleave(N_NOISES, dim=0)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = denoiser.add_noise(clean, time, noise).expand(n_adapters, -1, -1)
        found = denoiser.denoise(base, noisy, time.expand(n_adapters, -1), factors)
        losses.append((found - noise).square().mean(dim=(-1, -2)))
    return torch.stack(losses, dim=1).numpy()


def _identity(factors: denoiser.Factors) -> denoiser.Factors:
    return factors


def _batches(
    images: Tensor, chances: Tensor, batch_size: int, generator: torch.Generator
) -> Callable[[], Tensor]:
    """Give what draws the next batch of each adapter's own images, with replacement."""
    each = torch.arange(len(images))[:, None]

    def draw() -> Tensor:
        drawn = torch.multinomial(chances, batch_size, replacement=True, generator=generator)
        return images[each, drawn]

    return draw


def _train_base(pools: _Pools, dim: int, depth: int, seed: int, verbose: int) -> denoiser.Weights:
    with progress(N_BASE_STEPS, "base network", "step", verbose) as advance:
        return denoiser.train_base(
            pools.base,
            dim=dim,
            depth=depth,
            n_steps=N_BASE_STEPS,
            generator=torch.Generator().manual_seed(seed),
            progress=advance,
        )


def train_zoo(
    n_adapters: int,
    rank: int,
    *,
    varied: bool,
    dim: int,
    depth: int,
    random_state: int | np.random.RandomState | None,
    verbose: int,
    store: Callable[[denoiser.Factors], denoiser.Factors] = _identity,
) -> Bunch:
    """Train a zoo; `store` maps trained factors to those that are kept, and whose losses count."""
    rng = check_random_state(random_state)
    pools = _split_digits(rng)
    base = _train_base(pools, dim, depth, int(rng.randint(2**31)), verbose)
    seed = int(rng.randint(2**31))
    presence = _subsets(n_adapters, rng)
    hyper = _hyperparameters(n_adapters, varied, rng)
    shapes = denoiser.module_shapes(dim, depth)
    layout = LoRALayout([(name, n, m, rank) for name, (n, m) in shapes.items()])
    flat = np.empty((n_adapters, layout.width), dtype=np.float32)
    losses = np.empty((n_adapters, N_CLASSES), dtype=np.float32)
    with progress(n_adapters, "adapters", "adapter", verbose) as advance:
        for rows in _chunks(hyper):
            generator = torch.Generator().manual_seed(int(rng.randint(2**31)))
            images, chances = _images_of_subset(presence[rows], pools, rng)
            factors = denoiser.finetune(
                base,
                denoiser.init_factors(shapes, len(rows), rank, generator),
                _batches(images, chances, int(hyper["batch_size"][rows[0]]), generator),
                learning_rate=torch.from_numpy(hyper["learning_rate"][rows]).float(),
                n_steps=torch.from_numpy(hyper["n_steps"][rows]),
                generator=generator,
            )
            kept = store(factors)
            flat[rows] = np.concatenate(
                [t.flatten(1).numpy() for pair in kept.values() for t in pair], axis=1
            )
            losses[rows] = class_losses(base, kept, pools.held_out, seed)
            advance(len(rows))
    X = LoRACollection.from_array(flat, layout, ranks=np.full((n_adapters, len(shapes)), rank))
    return make_bunch(X, presence, losses, hyper if varied else {})


def make_bunch(
    X: LoRACollection,
    presence: NDArray[np.bool_],
    losses: NDArray[np.float32],
    hyper: dict[str, NDArray[Any]],
) -> Bunch:
    """Give the adapters with all that can be predicted of them."""
    presence = presence.astype(np.int64)
    size = presence.sum(axis=1)
    return Bunch(
        data=X,
        target=presence,
        target_names=[str(digit) for digit in range(N_CLASSES)],
        presence=presence,
        size=size,
        loss=((losses * presence).sum(axis=1) / size).astype(np.float64),
        loss_all=losses.mean(axis=1, dtype=np.float64),
        groups=presence @ 2 ** np.arange(N_CLASSES),
        class_losses=losses,
        **hyper,
    )


def make_digits_loras(
    n_adapters: int = 2046,
    rank: int = 4,
    *,
    varied: bool = False,
    dim: int = 64,
    depth: int = 3,
    random_state: int | np.random.RandomState | None = None,
    verbose: int = 1,
    return_X_y: bool = False,
) -> Bunch | tuple[LoRACollection, NDArray[np.int64]]:
    """Train a new zoo of LoRAs on handwritten digits.

    A small denoising diffusion transformer is trained on one part of scikit-learn's 8 x 8 digits.
    Then every adapter finetunes its attention and feed-forward weights on one image of each class
    of a non-empty subset of the ten classes, as the paper's Imagenette-LoRA does with Stable
    Diffusion (section 5.1). Every subset comes once before any comes again: 2,046 adapters are
    each of them twice. Every ``V`` starts at random, as in LoRA's own training, so that adapters
    of one subset share no gauge.

    Parameters
    ----------
    n_adapters : int, default=2046
        Number of adapters.
    rank : int, default=4
        Rank of every update.
    varied : bool, default=False
        Whether every adapter has a learning rate, a number of steps and a batch size of its own, as
        in CelebA-LoRA. They are then returned as targets too.
    dim : int, default=64
        Width of the transformer, a multiple of 4. Its modules are ``(dim, dim)``,
        ``(2 dim, dim)`` and ``(dim, 2 dim)``.
    depth : int, default=3
        Number of blocks, of six modules each.
    random_state : int, RandomState instance or None, default=None
        Fixes the digits, the base network, the subsets and every draw in training.
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
        learning_rate, n_steps, batch_size : ndarray of shape (n_adapters,)
            Only with ``varied=True``.

    Raises
    ------
    ValueError
        When `n_adapters`, `rank` or `depth` is below 1, or `dim` is no positive multiple of 4.

    See Also
    --------
    load_digits_loras : A zoo that comes with the package.

    Examples
    --------
    >>> from sklora.datasets import make_digits_loras
    >>> zoo = make_digits_loras(4, rank=2, dim=8, depth=1, random_state=0)
    >>> zoo.data.shape, zoo.presence.shape
    ((4, 224), (4, 10))
    """
    for name, value in (("n_adapters", n_adapters), ("rank", rank), ("depth", depth)):
        check_scalar(value, name, Integral, min_val=1)
    check_scalar(dim, "dim", Integral, min_val=denoiser.HEADS)
    if dim % denoiser.HEADS:
        raise ValueError(f"dim is {dim}; the attention heads need a multiple of {denoiser.HEADS}.")
    zoo = train_zoo(
        n_adapters,
        rank,
        varied=varied,
        dim=dim,
        depth=depth,
        random_state=random_state,
        verbose=verbose,
    )
    return (zoo.data, zoo.target) if return_X_y else zoo
