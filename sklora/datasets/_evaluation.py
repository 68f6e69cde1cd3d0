"""What finetuned networks do: their losses on held-out digits, and the images that they draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.utils import Bunch
from torch import Tensor

from sklora._progress import progress
from sklora.collection import LoRACollection, LoRALayout
from sklora.datasets import _denoiser as denoiser
from sklora.datasets._zoos import Arrays, undisturbed
from sklora.transform._blocks import factor_views

__all__ = ["evaluate_digits_loras"]

Tensors = dict[str, Tensor]

N_NOISES = 4  # behind the loss of an image
N_SAMPLES, N_SAMPLE_STEPS, SAMPLE_SEED = 33, 16, 0
CHUNK = 64  # adapters at once; larger stacks gain nothing on a CPU
# Beside the weights of a base network, there is what its adapters are judged by.
HELD_OUT, NOISE = "held_out.images", "held_out.noise"
COEF, INTERCEPT = "classifier.coef", "classifier.intercept"


def fit_classifier(images: NDArray[Any], digits: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """Fit the logistic regression that judges samples, on images ``(n_images, 64)``."""
    model = LogisticRegression(C=0.1, max_iter=1000).fit(images, digits)
    return {
        COEF: model.coef_.astype(np.float32),
        INTERCEPT: model.intercept_.astype(np.float32),
    }


def draw_noise(held_out: Tensor, seed: int) -> Tensor:
    """Noise behind the losses of held-out images ``(n_classes, n_images, 64)``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (held_out.shape[1] * N_NOISES, held_out.shape[2])
    return torch.stack([torch.randn(shape, generator=generator) for _ in held_out])


def to_tensors(base: Mapping[str, NDArray[Any]], dtype: torch.dtype = torch.float32) -> Tensors:
    """Copy a base network, which may be mapped into memory, to tensors."""
    return {name: torch.tensor(array, dtype=dtype) for name, array in base.items()}


def unpack(flat: NDArray[Any], layout: LoRALayout, dtype: torch.dtype) -> denoiser.Factors:
    """Cut flat rows ``(n_adapters, width)`` into the factors of every module."""
    views = factor_views(torch.tensor(flat, dtype=dtype), layout)
    return dict(zip(layout.names, views, strict=True))


@torch.no_grad()
def class_losses(base: Tensors, factors: denoiser.Factors) -> NDArray[Any]:
    """Denoising loss of every adapter on each class's held-out images, ``(n_adapters, 10)``.

    Times are evenly spread and the noise is the same for all adapters, so that losses compare.
    """
    n_adapters = next(iter(factors.values()))[0].shape[0]
    held_out = base[HELD_OUT]
    time = ((torch.arange(N_NOISES) + 0.5) / N_NOISES).repeat(held_out.shape[1]).to(held_out)
    losses = []
    for images, noise in zip(held_out, base[NOISE], strict=True):
        clean = images.repeat_interleave(N_NOISES, dim=0)
        noisy = denoiser.add_noise(clean, time, noise).expand(n_adapters, -1, -1)
        found = denoiser.denoise(base, noisy, time.expand(n_adapters, -1), factors)
        losses.append((found - noise).square().mean(dim=(-1, -2)))
    return torch.stack(losses, dim=1).numpy()


def draw_samples(base: Tensors, factors: denoiser.Factors) -> Tensor:
    """Images of every adapter from the same noises, ``(n_adapters, 33, 64)``."""
    n_adapters = next(iter(factors.values()))[0].shape[0]
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    noise = torch.randn(N_SAMPLES, denoiser.SIDE**2, generator=generator).to(base[COEF])
    return denoiser.sample(base, noise.expand(n_adapters, -1, -1), N_SAMPLE_STEPS, factors)


def class_probabilities(base: Tensors, samples: Tensor) -> NDArray[Any]:
    """Chance of each digit by the classifier, mean over samples: ``(n_adapters, 10)``."""
    logits = samples @ base[COEF].T + base[INTERCEPT]
    return logits.softmax(dim=-1).mean(dim=1).numpy()


@undisturbed()
def evaluate_digits_loras(
    X: LoRACollection, base: Mapping[str, NDArray[Any]], *, verbose: int = 1
) -> Bunch:
    """Run adapters of handwritten digits on the network that they finetune.

    The adapters may be those of a zoo, or edited, or cut to another rank.

    Parameters
    ----------
    X : LoRACollection of shape (n_adapters, width)
        Updates ``U V^T``: rows of the methods "dora" and "lokr" are something else. Modules that
        the network has and an adapter lacks are as in the base network.
    base : mapping of str to ndarray
        The `base` of the zoo.
    verbose : int, default=1
        Whether to show a progress bar, where standard error is a terminal.

    Returns
    -------
    result : :class:`~sklearn.utils.Bunch`
        With the attributes

        class_losses : ndarray of shape (n_adapters, 10)
            Mean squared error of the noise that is predicted on held-out images of each digit.
        samples : ndarray of shape (n_adapters, 33, 8, 8)
            Images that the networks draw, in the units of
            :func:`sklearn.datasets.load_digits`, 0 to 16. The noise that they start from is the
            same for all adapters. The sampler is deterministic (DDIM) and takes 16 steps.
        class_probabilities : ndarray of shape (n_adapters, 10)
            Chance of each digit, the mean over samples, by a logistic regression on the digits that
            trained the base network.

    Raises
    ------
    ValueError
        When X is empty, has a module that the network does not, or one of another shape, or holds
        magnitudes of DoRA.

    See Also
    --------
    make_digits_loras : Trains adapters.

    Examples
    --------
    >>> from sklora.datasets import evaluate_digits_loras, make_digits_loras
    >>> zoo = make_digits_loras(4, rank=2, dim=8, depth=1, random_state=0)
    >>> result = evaluate_digits_loras(zoo.data[:3], zoo.base)
    >>> result.samples.shape, result.class_probabilities.shape
    ((3, 33, 8, 8), (3, 10))
    """
    if not len(X):
        raise ValueError("Found a LoRACollection with 0 adapters while a minimum of 1 is required.")
    if any(":magnitude" in name for name, _ in X.layout.side):
        raise ValueError("X holds magnitudes of DoRA, without which its updates are not run.")
    adapted = {name: weight.shape for name, weight in base.items() if name.startswith("blocks.")}
    for name, n, m, _ in X.layout.modules:
        shape = adapted.get(name)
        if shape != (n, m):
            raise ValueError(
                f"Module {name!r} of X has the shape {(n, m)}, and that of the base network is "
                f"{shape}; X and base are to be of one zoo, and of another method than 'lokr'."
            )
    blocks = []
    with progress(len(X), "evaluation", "adapter", verbose) as advance:
        for start in range(0, len(X), CHUNK):
            blocks.append(_evaluate(X[start : start + CHUNK], base))
            advance(len(blocks[-1]["samples"]))
    return Bunch(**{name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})


def _evaluate(X: LoRACollection, base: Mapping[str, NDArray[Any]]) -> Arrays:
    dtype = torch.float64 if X.dtype == np.float64 else torch.float32
    weights, factors = to_tensors(base, dtype), unpack(X.read(), X.layout, dtype)
    samples = draw_samples(weights, factors)
    pixels = ((samples + 1) * 8).view(len(X), -1, denoiser.SIDE, denoiser.SIDE)
    return {
        "class_losses": class_losses(weights, factors),
        "samples": pixels.numpy(),
        "class_probabilities": class_probabilities(weights, samples),
    }
