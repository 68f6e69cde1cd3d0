"""A small denoising diffusion transformer that runs with many LoRA adapters at once.

The network predicts the noise in an 8 x 8 image (Ho et al., 2020, eq. 14) and is a plain
transformer over 2 x 2 patches (Peebles and Xie, 2023). Every function takes a stack of adapters:
a linear module computes ``x W^T`` for all of them in one product with the shared weight, and the
low-rank part ``(x V) U^T`` in one batched product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sklora.datasets import _adam as adam

SIDE, PATCH, HEADS = 8, 2, 4
TOKENS = (SIDE // PATCH) ** 2
LINEAR_MODULES = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out", "mlp.up", "mlp.down")

Weights = Mapping[str, Tensor]
Factors = Mapping[str, tuple[Tensor, Tensor]]


def module_shapes(dim: int, depth: int) -> dict[str, tuple[int, int]]:
    """Names and shapes ``(n, m)`` of the linear modules that take an adapter."""
    shapes = dict.fromkeys(LINEAR_MODULES, (dim, dim))
    shapes["mlp.up"], shapes["mlp.down"] = (2 * dim, dim), (dim, 2 * dim)
    return {f"blocks.{b}.{name}": shape for b in range(depth) for name, shape in shapes.items()}


def init_base(dim: int, depth: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw weights of the network, ``(n_out, n_in)`` at standard deviation ``n_in**-0.5``."""
    shapes = {
        "embed": (dim, PATCH * PATCH),
        "time.up": (dim, dim),
        "time.down": (dim, dim),
        "position": (TOKENS, dim),
        **module_shapes(dim, depth),
        "head": (PATCH * PATCH, dim),
    }
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        for name, shape in shapes.items()
    }


def add_noise(images: Tensor, time: Tensor, noise: Tensor) -> Tensor:
    """Noisy images at ``time`` in [0, 1] on the cosine schedule (Nichol and Dhariwal, 2021).

    ``images`` and ``noise`` are ``(..., 64)``, ``time`` is ``(...)``.
    """
    angle = (time * (math.pi / 2)).unsqueeze(-1)
    return torch.cos(angle) * images + torch.sin(angle) * noise


def _patches(images: Tensor) -> Tensor:
    grid = images.reshape(*images.shape[:-1], SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
    return grid.transpose(-3, -2).reshape(*images.shape[:-1], TOKENS, PATCH * PATCH)


def _images(patches: Tensor) -> Tensor:
    grid = patches.reshape(*patches.shape[:-2], SIDE // PATCH, SIDE // PATCH, PATCH, PATCH)
    return grid.transpose(-3, -2).reshape(*patches.shape[:-2], SIDE * SIDE)


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    return F.layer_norm(x, x.shape[-1:])


def attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int, *, is_causal: bool = False) -> Tensor:
    """Attention of ``(..., length, dim)`` along the length."""
    split = (-1, q.shape[-2], n_heads, q.shape[-1] // n_heads)
    q_heads, k_heads, v_heads = (t.reshape(split).transpose(1, 2) for t in (q, k, v))
    found = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, is_causal=is_causal)
    return found.transpose(1, 2).reshape(q.shape)


def denoise(base: Weights, noisy: Tensor, time: Tensor, factors: Factors | None = None) -> Tensor:
    """The noise that the network finds in ``noisy``.

    Parameters
    ----------
    base : mapping of str to Tensor
        Weights shared by all adapters, as `init_base` gives them.
    noisy : Tensor of shape (n_adapters, n_images, 64)
    time : Tensor of shape (n_adapters, n_images)
    factors : mapping of str to (U, V), or None
        ``U (n_adapters, n, r)`` and ``V (n_adapters, m, r)`` for each module that is adapted.

    Returns
    -------
    Tensor of shape (n_adapters, n_images, 64)
    """
    factors = factors or {}

    def linear(name: str, x: Tensor) -> Tensor:
        out = F.linear(x, base[name])
        if name in factors:
            U, V = factors[name]
            rows = x.flatten(1, 2)
            out = out + torch.bmm(torch.bmm(rows, V), U.mT).view_as(out)
        return out

    dim = base["embed"].shape[0]
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), dim // 2))
    waves = time.unsqueeze(-1) * frequencies
    embedded = torch.cat([waves.sin(), waves.cos()], dim=-1)
    clock = F.linear(F.silu(F.linear(embedded, base["time.up"])), base["time.down"])
    x = F.linear(_patches(noisy), base["embed"]) + base["position"] + clock.unsqueeze(-2)
    for b in range(sum(name.endswith("attn.to_q") for name in base)):
        block = f"blocks.{b}."
        h = norm(x)
        q, k, v = (linear(f"{block}attn.to_{name}", h) for name in "qkv")
        x = x + linear(f"{block}attn.to_out", attention(q, k, v, HEADS))
        x = x + linear(f"{block}mlp.down", F.gelu(linear(f"{block}mlp.up", norm(x))))
    return _images(F.linear(norm(x), base["head"]))


@torch.no_grad()
def sample(base: Weights, noise: Tensor, n_steps: int, factors: Factors | None = None) -> Tensor:
    """Images drawn by the deterministic sampler (Song et al., 2020, eq. 12 with sigma = 0).

    Parameters
    ----------
    base : mapping of str to Tensor
    noise : Tensor of shape (n_adapters, n_images, 64)
        What the images are made from.
    n_steps : int
        Times the network is asked, evenly spread.
    factors : mapping of str to (U, V), or None

    Returns
    -------
    Tensor of shape (n_adapters, n_images, 64)
        With values from -1 to 1.
    """
    # The schedule's signal is 0 at time 1, where no noise tells the image: half a step less.
    times = (torch.arange(n_steps, 0, -1, dtype=noise.dtype) - 0.5) / n_steps
    x = noise
    for step, time in enumerate(times):
        found = denoise(base, x, time.expand(x.shape[:-1]), factors)
        angle = time * (math.pi / 2)
        clean = ((x - torch.sin(angle) * found) / torch.cos(angle)).clamp(-1, 1)
        if step + 1 == n_steps:
            break
        x = add_noise(clean, times[step + 1], found)
    return clean


def train_base(
    images: Tensor,
    *,
    dim: int,
    depth: int,
    n_steps: int,
    generator: torch.Generator,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Train the base network on ``images (n_images, 64)`` with Adam and a cosine step size."""
    base = init_base(dim, depth, generator)

    def loss() -> Tensor:
        rows = torch.randint(len(images), (1, 128), generator=generator)
        return noise_loss(base, images[rows], generator).mean()

    return adam.train_network(base, loss, learning_rate=2e-3, n_steps=n_steps, progress=progress)


def noise_loss(
    base: Weights, images: Tensor, generator: torch.Generator, factors: Factors | None = None
) -> Tensor:
    """Mean squared error of the predicted noise per adapter, at random times."""
    time = torch.rand(images.shape[:-1], generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    found = denoise(base, add_noise(images, time, noise), time, factors)
    return (found - noise).square().mean(dim=(-1, -2))


def init_factors(
    shapes: Mapping[str, tuple[int, int]], n_adapters: int, rank: int, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA's initialisation (Hu et al., 2021): ``U = 0``, ``V`` uniform as PEFT draws it."""
    return {
        name: (
            torch.zeros(n_adapters, n, rank),
            (torch.rand(n_adapters, m, rank, generator=generator) * 2 - 1) / math.sqrt(m),
        )
        for name, (n, m) in shapes.items()
    }
